"""How `labkit/self_written.txt` was made: `python -m labkit.authoring.self_written` does it again.

SmolLM2 in FP32 writes, sampled at temperature 1 with nothing cut off, from each of three of its
special tokens. Another machine rounds otherwise and so gets another text of the same kind.
"""

import argparse
import re
from pathlib import Path

import torch

from labkit import models
from labkit.texts import SELF_WRITTEN

# A class may read the file: samples with such words are left out.
UNFIT = re.compile(r"\b(fuck|shit|bitch|sex|rape|nazi|porn|nigg|whore|slut)", re.IGNORECASE)
STARTS = (0, 1, 2)  # <|endoftext|>, <|im_start|>, <|im_end|>


@torch.inference_mode()
def write(model, n_samples: int = 32, length: int = 256, seed: int = 0) -> torch.Tensor:
    """Sample from each special token; return int64 `(3 · n_samples, length)`, the starts in turn.

    Args:
        model: a causal LM of transformers.
        n_samples, length: how many from each start, of how many tokens.
        seed: of torch's generator.
    """
    torch.manual_seed(seed)
    rows = []
    for start in STARTS:
        ids = torch.full((n_samples, 1), start)
        options = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0}
        options |= {"max_new_tokens": length, "min_new_tokens": length, "pad_token_id": 0}
        mask = torch.ones_like(ids)
        rows.append(model.generate(ids, attention_mask=mask, **options)[:, 1:])
    return torch.stack(rows, dim=1).flatten(0, 1)


def as_text(tokenizer, ids: torch.Tensor) -> str:
    """Decode samples, without special tokens, an empty line between two; leave out unfit ones."""
    decoded = tokenizer.batch_decode(ids, skip_special_tokens=True)
    samples = ("\n".join(sample.splitlines()).strip() for sample in decoded)
    return "\n\n".join(s for s in samples if s and not UNFIT.search(s))


def main() -> None:
    """Write the file that the command line names."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=SELF_WRITTEN, help="the file to write")
    model, tokenizer = models.load_model("smollm2", device="cpu")
    text = as_text(tokenizer, write(model))
    parser.parse_args().out.write_bytes(text.encode("utf8"))


if __name__ == "__main__":
    main()
