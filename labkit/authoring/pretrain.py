"""How the tiny LM was trained: `python -m labkit.authoring.pretrain` does it again."""

import argparse
import json
import math
import time
from pathlib import Path

import torch

from labkit import data, measure
from labkit.models import TINY_FOLDER

PACKAGES = ("stdlib", "numpy", "scipy", "sklearn", "pandas", "matplotlib", "torch", "torchao")


def encode_stream(tokenizer, texts: list[str]) -> torch.Tensor:
    """Encode texts into one stream, int64 `(n_tokens,)`, an end marker after each."""
    # 1000 at a time: what the tokenizer returns also holds every token's place and spelling.
    batches = (texts[start : start + 1000] for start in range(0, len(texts), 1000))
    rows = (row for batch in batches for row in tokenizer(batch, verbose=False)["input_ids"])
    return torch.tensor([id_ for row in rows for id_ in (*row, tokenizer.eos_token_id)])


def pretrain(
    folder: Path = TINY_FOLDER,
    n_steps: int = 8000,
    batch_size: int = 16,
    length: int = 256,
    peak_lr: float = 4e-3,
    seed: int = 0,
) -> None:
    """Train the tiny LM on docstrings and write weights, tokenizer and log.

    The architecture and the kind of tokenizer (byte-level BPE: every string can be encoded) are
    read from `labkit/tiny`; vocabulary and weights are learned from nothing.

    Args:
        folder: where `model.safetensors`, `config.json`, the tokenizer and `train_log.jsonl` go.
        n_steps, batch_size, length: optimizer steps, windows a step, tokens a window.
        peak_lr: the highest learning rate of AdamW.
        seed: of the weights and of the order of windows.
    """
    from transformers import AutoConfig, AutoTokenizer, LlamaForCausalLM

    device, bf16 = _device()
    torch.manual_seed(seed)
    config = AutoConfig.from_pretrained(TINY_FOLDER)
    texts, held_out = data.docstrings(PACKAGES), data.docstrings(PACKAGES, held_out=True)
    tokenizer = AutoTokenizer.from_pretrained(TINY_FOLDER)
    tokenizer = tokenizer.train_new_from_iterator(texts, config.vocab_size, show_progress=False)
    tokenizer.save_pretrained(folder)
    train = encode_stream(tokenizer, texts)
    held_out = encode_stream(tokenizer, held_out)[: 64 * length].view(-1, length)
    model = LlamaForCausalLM(config).to(device).train()
    optimizer = _optimizer(model)
    log = folder / "train_log.jsonl"
    facts = {"parameters": model.num_parameters(), "train_tokens": len(train)}
    facts |= {"device": device, "bf16_autocast": bf16, "torch": torch.__version__}
    log.write_text(json.dumps(facts) + "\n")
    started, running = time.time(), None
    for step, batch in enumerate(_batches(train, n_steps, batch_size, length, seed), 1):
        for group in optimizer.param_groups:
            group["lr"] = _learning_rate(step, n_steps, peak_lr)
        with torch.autocast(device, torch.bfloat16, enabled=bf16):
            loss = model(input_ids=batch.to(device), labels=batch.to(device)).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        running = loss.item() if running is None else 0.98 * running + 0.02 * loss.item()
        if step % 100 == 0 or step == n_steps:
            model.save_pretrained(folder)
            seconds, score = time.time() - started, measure.perplexity(model, held_out, 16)
            _note(log, step, step * batch.numel(), seconds, running, score.nats_per_token)


def _device() -> tuple[str, bool]:
    """Return the device, and if it multiplies BF16 in hardware; emulated, BF16 would be slower."""
    if torch.cuda.is_available():
        return "cuda", torch.cuda.is_bf16_supported(including_emulation=False)
    flags = torch.cpu.get_capabilities()
    return "cpu", any(flags.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))


def _batches(stream: torch.Tensor, n_steps: int, batch_size: int, length: int, seed: int):
    order = torch.Generator().manual_seed(seed)
    for _ in range(n_steps):
        starts = torch.randint(len(stream) - length, (batch_size, 1), generator=order)
        yield stream[starts + torch.arange(length)]


def _optimizer(model) -> torch.optim.AdamW:
    decay = [p for p in model.parameters() if p.ndim == 2]
    keep = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": decay, "weight_decay": 0.1}, {"params": keep, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, betas=(0.9, 0.95))


def _learning_rate(step: int, n_steps: int, peak: float, warmup: int = 100) -> float:
    """Rise linearly for `warmup` steps, then fall to 2 % of `peak` along a cosine."""
    if step <= warmup:
        return peak * step / warmup
    progress = (step - 1 - warmup) / max(1, n_steps - warmup)
    return peak * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * progress)))


def _note(log: Path, step: int, tokens: int, seconds: float, train: float, held_out: float) -> None:
    record = {"step": step, "tokens": tokens, "seconds": round(seconds)}
    record |= {"train_nats_per_token": round(train, 4)}
    record |= {"held_out_nats_per_token": round(held_out, 4)}
    with log.open("a") as file:
        print(json.dumps(record), file=file)
    print(json.dumps(record), flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=TINY_FOLDER, help="where the files go")
    parser.add_argument("--steps", type=int, default=8000, help="optimizer steps")
    arguments = parser.parse_args()
    pretrain(arguments.folder, arguments.steps)
