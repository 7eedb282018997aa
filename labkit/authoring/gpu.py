"""Chapter 5's record of a GPU: `python -m labkit.authoring.gpu` measures and writes it.

Products of square matrices by number format, and SmolLM2 in three formats. What this GPU or this
build of torch cannot do is recorded as its error.
"""

import copy
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from labkit import data, machine, measure, models

FOLDER = Path(__file__).parents[2] / "notebooks" / "records"


def record(device: str = "cuda", size: int = 8192, model_name: str = "smollm2") -> dict:
    """Measure everything.

    Args:
        device: where.
        size: rows and columns of the matrices.
        model_name: see `labkit.load_model`.

    Returns:
        Machine, versions and date; under `products`, operations a second by format; under
        `model`, by format: seconds of reading 512 tokens, tokens a second of writing, and the
        perplexity. Where a format failed: its error, as a string.
    """
    name = torch.cuda.get_device_name(device) if device.startswith("cuda") else "no GPU"
    return {
        "label": "measured once on the machine named here; not run by the tests",
        "script": "python -m labkit.authoring.gpu",
        "gpu": name,
        "machine": {key: str(value) for key, value in machine.hardware().items()},
        "cuda": str(torch.version.cuda),
        "date": time.strftime("%Y-%m-%d"),
        "size": size,
        "products": {form: _or_error(make, device, size) for form, make in PRODUCTS.items()},
        "model": {form: _or_error(_speak, device, model_name, form) for form in MODEL_DTYPES},
    }


def _or_error(function: Callable, *arguments):
    try:
        return function(*arguments)
    except (RuntimeError, NotImplementedError, ImportError, AssertionError, ValueError) as error:
        return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"


def _rate(call: Callable, size: int) -> float:
    return 2 * size**3 / measure.alternate({"it": call}, repeats=15, warmup=5)["it"].seconds


def _matrices(device: str, size: int, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    some = (torch.randn(size, size, generator=generator) for _ in range(2))
    return [matrix.to(device, dtype) for matrix in some]


def _by_columns(matrix: torch.Tensor) -> torch.Tensor:
    # The layout in which a linear layer keeps its weight; the fast kernels want it.
    return matrix.t().contiguous().t()


def _in_float(dtype: torch.dtype, precision: str = "highest") -> Callable[[str, int], float]:
    def product(device: str, size: int) -> float:
        before, (a, b) = torch.get_float32_matmul_precision(), _matrices(device, size, dtype)
        torch.set_float32_matmul_precision(precision)
        try:
            return _rate(lambda: a @ b, size)
        finally:
            torch.set_float32_matmul_precision(before)

    return product


def _in_fp8(device: str, size: int) -> float:
    a, b = _matrices(device, size, torch.float8_e4m3fn)
    one, columns = torch.ones((), device=device), _by_columns(b)
    options = {"scale_a": one, "scale_b": one, "out_dtype": torch.bfloat16}
    return _rate(lambda: torch._scaled_mm(a, columns, **options), size)


def _in_int8(device: str, size: int) -> float:
    a, b = ((40 * matrix).clamp(-127, 127).to(torch.int8) for matrix in _matrices(device, size))
    columns = _by_columns(b)
    return _rate(lambda: torch._int_mm(a, columns), size)


def _in_two_of_four(device: str, size: int) -> float:
    a, b = _matrices(device, size, torch.float16)
    lowest = a.abs().view(-1, 4).topk(2, dim=1, largest=False).indices
    pruned = a.view(-1, 4).scatter(1, lowest, 0).view_as(a)
    packed, columns = torch.sparse.to_sparse_semi_structured(pruned), _by_columns(b)
    return _rate(lambda: packed @ columns, size)


def _in_int4(device: str, size: int) -> float:
    from torchao.quantization import Int4WeightOnlyConfig, quantize_

    layer = torch.nn.Sequential(torch.nn.Linear(size, size, bias=False))
    layer = layer.to(device, torch.bfloat16)
    quantize_(layer, Int4WeightOnlyConfig(group_size=64 if size % 128 else 128))
    x = _matrices(device, size, torch.bfloat16)[0]
    with torch.inference_mode():
        return _rate(lambda: layer(x), size)


PRODUCTS = {
    "FP32": _in_float(torch.float32),
    "TF32": _in_float(torch.float32, "high"),
    "BF16": _in_float(torch.bfloat16),
    "FP16": _in_float(torch.float16),
    "FP16, 2:4 sparse": _in_two_of_four,
    "FP8": _in_fp8,
    "INT8": _in_int8,
    "INT4 weights, BF16 activations": _in_int4,
}
MODEL_DTYPES = {"FP32": torch.float32, "BF16": torch.bfloat16, "FP16": torch.float16}


@torch.inference_mode()
def _speak(device: str, model_name: str, form: str) -> dict[str, float]:
    model, tokenizer = models.load_model(model_name, device="cpu")
    model = copy.deepcopy(model).to(device, MODEL_DTYPES[form])
    ids = data.windows(tokenizer, "reference-judge", 4, 512)
    prompt = ids[:1].to(device)
    read = measure.alternate({"it": lambda: model(prompt, use_cache=True)}, repeats=7, warmup=3)
    options = {"do_sample": False, "pad_token_id": tokenizer.eos_token_id}
    seconds = []
    for _ in range(4):  # the first does not count
        start = time.perf_counter()
        model.generate(prompt[:, :64], max_new_tokens=64, min_new_tokens=64, **options)
        seconds.append(time.perf_counter() - start)
    return {
        "seconds to read 512 tokens": read["it"].seconds,
        "tokens a second written": 64 / statistics.median(seconds[1:]),
        "perplexity": measure.perplexity(model, ids).perplexity,
    }


if __name__ == "__main__":
    if not torch.cuda.is_available():
        sys.exit("labkit.authoring.gpu: torch sees no CUDA device; install a CUDA build of torch")
    found = record()
    path = FOLDER / f"05_gpu_{found['date']}.json"
    if path.exists():
        sys.exit(f"labkit.authoring.gpu: {path} exists; move it away first")
    path.write_text(json.dumps(found, indent=2) + "\n")
    sys.stdout.write(f"{path}\n")
