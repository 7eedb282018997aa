"""Chapter 5's record of a GPU: `python -m labkit.authoring.gpu` measures and writes it.

Four parts: bytes a second; products of square matrices by number format; a model that writes, in
torchao's schemes; and one large layer from one token to many. What this GPU or this build of torch
cannot do is recorded as its error. The file is written after each step, so that nothing is lost
where time runs out.
"""

import copy
import dataclasses
import json
import sys
import time
from collections.abc import Callable, Iterator
from functools import cache, partial
from pathlib import Path

import torch
from torch import nn

from labkit import evaluation, ledger, machine, measure, models

FOLDER = Path(__file__).parents[2] / "notebooks" / "records"
TOKENS = (1, 8, 32, 128, 512, 2048)  # at once, through one layer
PROMPT, WRITTEN = 64, 64  # tokens


@dataclasses.dataclass(frozen=True)
class Sizes:
    """How large everything is: for a GPU, or for a test of this script.

    Attributes:
        square: rows and columns of the matrices that are multiplied.
        layer: inputs and outputs of the one layer; its INT4 weights should not fit into a cache.
        copied: bytes of what is copied.
        model: the name of a trained model, see `labkit.load_model`.
        windows, length: of the evaluation texts.
    """

    square: int = 8192
    layer: int = 16384
    copied: int = 2**32
    model: str = "smollm2"
    windows: int = 16
    length: int = 256


def record(device: str = "cuda", sizes: Sizes | None = None) -> Iterator[dict]:
    """Measure everything, step by step.

    Args:
        device: where.
        sizes: see `Sizes`.

    Yields:
        The same growing dict after each step: machine, versions and date; under `products`,
        operations a second by format; under `bandwidth`, bytes a second; under `layer`, seconds
        by scheme and number of tokens; under `model`, by scheme what `write` returns, seconds of
        reading a prompt, and the loss over FP32 with its margin by text.
        Where a step failed: its error, as a string.
    """
    sizes = sizes or Sizes()
    name = torch.cuda.get_device_name(device) if device.startswith("cuda") else "no GPU"
    found = {
        "label": "measured once on the machine named here; not run by the tests",
        "script": "python -m labkit.authoring.gpu",
        "gpu": name,
        "machine": {key: str(value) for key, value in machine.hardware().items()},
        "cuda": str(torch.version.cuda),
        "date": time.strftime("%Y-%m-%d"),
        "sizes": dataclasses.asdict(sizes),
    }
    steps = {
        "bandwidth": {"copy": partial(_copied, device, sizes.copied)},
        "products": {n: partial(make, device, sizes.square) for n, make in PRODUCTS.items()},
        "model": _speakers(device, sizes),
        "layer": {s: partial(layer_seconds, device, sizes.layer, s) for s in SCHEMES},
    }
    for part, calls in steps.items():
        found[part] = {}
        for key, call in calls.items():
            start = time.perf_counter()
            found[part][key] = _or_error(call)
            if device.startswith("cuda"):
                torch.cuda.empty_cache()
            seconds = time.perf_counter() - start
            sys.stderr.write(f"{part}, {key}: {seconds:.0f} s: {found[part][key]}\n")
            yield found


def _or_error(call: Callable):
    try:
        return call()
    except Exception as error:  # compilers and drivers raise all kinds
        return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"


# -- one product --


def _rate(call: Callable, size: int) -> float:
    return 2 * size**3 / measure.alternate({"it": call}, repeats=15, warmup=5)["it"].seconds


def _matrices(device: str, size: int, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    generator = torch.Generator(device).manual_seed(0)
    some = (torch.randn(size, size, generator=generator, device=device) for _ in range(2))
    return [matrix.to(dtype) for matrix in some]


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


PRODUCTS = {
    "FP32": _in_float(torch.float32),
    "TF32": _in_float(torch.float32, "high"),
    "BF16": _in_float(torch.bfloat16),
    "FP16": _in_float(torch.float16),
    "FP16, 2:4 sparse": _in_two_of_four,
    "FP8": _in_fp8,
    "INT8": _in_int8,
}


def _copied(device: str, nbytes: int) -> float:
    source = torch.ones(nbytes // 4, device=device)
    target = torch.empty_like(source)
    call = measure.alternate({"it": lambda: target.copy_(source)}, repeats=15, warmup=3)
    return 2 * nbytes / call["it"].seconds  # read and written


# -- torchao's schemes --


def _schemes() -> dict[str, Callable]:
    from torchao import quantization as ao

    int4 = {"group_size": 64, "int4_packing_format": "tile_packed_to_4d"}
    return {
        "INT8 weights": ao.Int8WeightOnlyConfig,
        "INT4 weights": lambda: ao.Int4WeightOnlyConfig(**int4),
        "INT8 weights and activations": ao.Int8DynamicActivationInt8WeightConfig,
        "FP8 weights and activations": lambda: ao.Float8DynamicActivationFloat8WeightConfig(
            granularity=ao.PerRow()
        ),
    }


SCHEMES = ("BF16", *_schemes())
WRITING = tuple(scheme for scheme in SCHEMES if not scheme.startswith("INT8 weights and"))


def _quantize(model: nn.Module, scheme: str) -> nn.Module:
    from torchao.quantization import quantize_

    if make := _schemes().get(scheme):
        quantize_(model, make())
    return model


def _graph(call: Callable) -> Callable[[], None]:
    """Return the call as a CUDA graph, which the GPU repeats without Python.

    The call runs a few times meanwhile. On a CPU, which has no such graphs, it stays as it is.
    """
    if not torch.cuda.is_available():
        return call
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


@torch.no_grad()
def layer_seconds(device: str, size: int, scheme: str) -> dict:
    """Time one linear layer without bias on 1 to 2048 tokens, compiled and as a CUDA graph.

    Returns:
        Seconds by the number of tokens.
    """
    torch._dynamo.reset()
    layer = nn.Sequential(nn.Linear(size, size, bias=False, device=device, dtype=torch.bfloat16))
    run = torch.compile(_quantize(layer, scheme), dynamic=False)
    found = {}
    for tokens in TOKENS:
        x = torch.randn(tokens, size, device=device, dtype=torch.bfloat16)
        found[tokens] = _or_error(lambda x=x: _graphed_seconds(lambda: run(x)))
    return found


def _graphed_seconds(call: Callable) -> float:
    return measure.alternate({"it": _graph(call)}, repeats=15, warmup=3)["it"].seconds


# -- a model that writes --


def linear_nbytes(model: nn.Module) -> int:
    """Return the bytes of all linear layers, the head included: what each token reads."""
    layers = (module for module in model.modules() if isinstance(module, nn.Linear))
    return sum(t.nbytes for layer in layers for _, t in ledger.flatten("", layer.weight))


@torch.no_grad()
def write(model: nn.Module, prompt: torch.Tensor, ways: tuple[str, ...]) -> dict:
    """Write greedily with a static cache, one step a token.

    Args:
        model: a causal LM of transformers.
        prompt: int64 `(1, tokens)`, on its device.
        ways: `"eager"`, `"graph"`: eager, repeated as a CUDA graph; `"compiled"`: by
            `torch.compile`, then as a CUDA graph.

    Returns:
        Bytes of the linear layers; by way the tokens a second (the best of seven runs) and after
        how many tokens, of 64, the first one comes that the first way did not write; or an error.
    """
    found, written = {"bytes": linear_nbytes(model)}, {}
    for way in ways:
        found[way] = _or_error(lambda way=way: _write(model, prompt, way, written))
    return found


def _write(model: nn.Module, prompt: torch.Tensor, way: str, written: dict) -> dict:
    from transformers import StaticCache

    torch._dynamo.reset()
    cache = StaticCache(config=model.config, max_cache_len=PROMPT + WRITTEN)
    first = model(prompt, past_key_values=cache, use_cache=True).logits[:, -1:].argmax(-1)
    token = first.clone()

    def step() -> None:
        logits = model(token, past_key_values=cache, use_cache=True).logits
        token.copy_(logits[:, -1:].argmax(-1))

    def rewind() -> None:
        for layer in cache.layers:
            layer.cumulative_length.fill_(prompt.shape[1])
        token.copy_(first)

    again = torch.compile(step) if way == "compiled" else step
    again = again if way == "eager" else _graph(again)
    rewind()
    tokens = [first.clone()]
    for _ in range(WRITTEN - 1):
        again()
        tokens.append(token.clone())
    seconds = []
    for _ in range(7):
        rewind()
        seconds.append(_seconds(again))
    written[way] = torch.cat(tokens).flatten()
    equal = written[way] == next(iter(written.values()))
    return {"tokens a second": 1 / min(seconds), "same tokens": int(equal.long().cumprod(0).sum())}


def _seconds(step: Callable) -> float:
    def some() -> None:
        for _ in range(WRITTEN - 1):
            step()

    return measure.once(some)[0].seconds / (WRITTEN - 1)


def _speakers(device: str, sizes: Sizes) -> dict[str, Callable]:
    @cache
    def start():
        model, tokenizer = models.load_model(sizes.model, device=device)
        windows = sizes.windows, sizes.length
        return model, evaluation.reference(model, tokenizer, *windows, spread=True)

    def speak(dtype: torch.dtype, scheme: str, ways: tuple[str, ...]) -> dict:
        model, reference = start()
        made = _quantize(copy.deepcopy(model).to(dtype), scheme)
        ids = reference.ids["news"][:2].flatten()[None]
        found = write(made, ids[:, :PROMPT], ways)
        with torch.inference_mode():
            read = measure.alternate({"it": lambda: made(ids[:, :512])}, repeats=7, warmup=3)
        quality = evaluation.quality(made, reference)
        losses = {text: [on.loss.value, on.loss.margin] for text, on in quality.items()}
        return found | {"seconds to read 512 tokens": read["it"].seconds, "loss": losses}

    all_ways = ("eager", "graph", "compiled")
    found = {"FP32": partial(speak, torch.float32, "FP32", ("eager", "graph"))}
    for scheme in SCHEMES:  # torch._int_mm takes no single token
        ways = all_ways if scheme in WRITING else ()
        found[scheme] = partial(speak, torch.bfloat16, scheme, ways)
    return found


def main() -> None:
    """Measure, and write the record of today's date."""
    if not torch.cuda.is_available():
        sys.exit("labkit.authoring.gpu: torch sees no CUDA device; install a CUDA build of torch")
    path = FOLDER / f"05_gpu_{time.strftime('%Y-%m-%d')}.json"
    if path.exists():
        sys.exit(f"labkit.authoring.gpu: {path} exists; move it away first")
    for found in record():
        path.write_text(json.dumps(found, indent=2) + "\n")
    sys.stdout.write(f"{path}\n")


if __name__ == "__main__":
    main()
