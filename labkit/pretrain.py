"""How the tiny LM was trained: `python -m labkit.pretrain` does it again."""

import argparse
import json
import math
import time
from pathlib import Path

import torch

from labkit import data
from labkit.models import TINY_FOLDER

PACKAGES = ("stdlib", "numpy", "scipy", "sklearn", "pandas", "matplotlib", "torch", "torchao")
END_OF_TEXT = "<|endoftext|>"


def train_tokenizer(texts: list[str], vocab_size: int = 2048):
    """Train a byte-level BPE tokenizer: every string can be encoded, none is unknown.

    Args:
        texts: the training texts.
        vocab_size: tokens in the vocabulary, the 256 bytes and one end marker included.

    Returns:
        A `transformers.PreTrainedTokenizerFast`.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=END_OF_TEXT, eos_token=END_OF_TEXT
    )


def tiny_config():
    """Return the architecture: Llama, 1.97 million parameters, every dimension a multiple of 64."""
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=2048,
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=3,
        num_key_value_heads=1,
        head_dim=64,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
    )


def encode_stream(tokenizer, texts: list[str]) -> torch.Tensor:
    """Encode texts into one stream, an end marker after each.

    Returns:
        int64 tensor `(n_tokens,)`.
    """
    ids = []
    for start in range(0, len(texts), 1000):
        for row in tokenizer(texts[start : start + 1000], verbose=False)["input_ids"]:
            ids.extend(row)
            ids.append(tokenizer.eos_token_id)
    return torch.tensor(ids)


def learning_rate(step: int, n_steps: int, peak: float, warmup: int = 100) -> float:
    """Rise linearly for `warmup` steps, then fall to 2 % of `peak` along a cosine."""
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = (step - warmup) / max(1, n_steps - warmup)
    return peak * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * progress)))


def has_bf16_arithmetic() -> bool:
    """Say whether this machine multiplies BF16 in hardware; emulated, it would be slower."""
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported(including_emulation=False)
    flags = torch.cpu.get_capabilities()
    return bool(flags.get("avx512_bf16") or flags.get("amx_bf16") or flags.get("bf16"))


@torch.no_grad()
def held_out_loss(model, stream: torch.Tensor, length: int, n_windows: int = 64) -> float:
    """Return the mean negative log-likelihood (nats a token) on the first windows of a stream."""
    model.eval()
    rows = stream[: n_windows * length].view(-1, length)
    losses = [model(input_ids=part, labels=part).loss.item() for part in rows.split(16)]
    model.train()
    return sum(losses) / len(losses)


def pretrain(
    folder: Path = TINY_FOLDER,
    n_steps: int = 8000,
    batch_size: int = 16,
    length: int = 256,
    peak_lr: float = 4e-3,
    seed: int = 0,
) -> None:
    """Train the tiny LM on docstrings and write weights, tokenizer and log.

    Args:
        folder: where `model.safetensors`, `config.json`, the tokenizer and `train_log.jsonl` go.
        n_steps: optimizer steps, each on `batch_size` windows of `length` tokens.
        batch_size: windows a step.
        length: tokens a window.
        peak_lr: the highest learning rate of AdamW.
        seed: of the weights and of the order of windows.
    """
    from transformers import LlamaForCausalLM

    device = "cuda" if torch.cuda.is_available() else "cpu"
    bf16 = has_bf16_arithmetic()
    torch.manual_seed(seed)
    texts = data.docstrings(PACKAGES)
    tokenizer = train_tokenizer(texts)
    train = encode_stream(tokenizer, texts)
    held_out = encode_stream(tokenizer, data.docstrings(PACKAGES, held_out=True)).to(device)
    model = LlamaForCausalLM(tiny_config()).to(device).train()
    optimizer = _optimizer(model)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save_pretrained(folder)
    log = folder / "train_log.jsonl"
    facts = {"parameters": sum(p.numel() for p in model.parameters()), "train_tokens": len(train)}
    facts |= {"device": device, "bf16_autocast": bf16, "torch": torch.__version__}
    log.write_text(json.dumps(facts) + "\n")
    started, running = time.time(), None
    for step, batch in enumerate(_batches(train, n_steps, batch_size, length, seed)):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, n_steps, peak_lr)
        with torch.autocast(device, torch.bfloat16, enabled=bf16):
            loss = model(input_ids=batch.to(device), labels=batch.to(device)).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        running = loss.item() if running is None else 0.98 * running + 0.02 * loss.item()
        if (step + 1) % 100 == 0 or step + 1 == n_steps:
            seconds, held_out_nats = time.time() - started, held_out_loss(model, held_out, length)
            _note(log, step + 1, (step + 1) * batch.numel(), seconds, running, held_out_nats)
            model.save_pretrained(folder)


def _batches(stream: torch.Tensor, n_steps: int, batch_size: int, length: int, seed: int):
    order = torch.Generator().manual_seed(seed)
    for _ in range(n_steps):
        starts = torch.randint(len(stream) - length, (batch_size, 1), generator=order)
        yield stream[starts + torch.arange(length)]


def _note(log: Path, step: int, tokens: int, seconds: float, train: float, held_out: float) -> None:
    record = {"step": step, "tokens": tokens, "seconds": round(seconds)}
    record |= {"train_nats_per_token": round(train, 4)}
    record |= {"held_out_nats_per_token": round(held_out, 4)}
    with log.open("a") as file:
        print(json.dumps(record), file=file)
    print(json.dumps(record), flush=True)


def _optimizer(model) -> torch.optim.AdamW:
    decay = [p for p in model.parameters() if p.ndim == 2]
    keep = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": decay, "weight_decay": 0.1}, {"params": keep, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, betas=(0.9, 0.95))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=TINY_FOLDER, help="where the files go")
    parser.add_argument("--steps", type=int, default=8000, help="optimizer steps")
    arguments = parser.parse_args()
    pretrain(arguments.folder, arguments.steps)
