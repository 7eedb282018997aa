"""How exact the integer products of the book are on this CPU: prints JSON, `{name: error}`.

Each product runs at the extremes (activations 255 or 127, weights 127) and on random integers, and
is held against NumPy's 64-bit product. The error is the largest difference over the largest result;
"probe" is 1 where `labkit.machine.exact_at_8_bits` calls the engine exact. With the argument `ours`
our own kernels run, else those of torch and ONNX Runtime. `tests/test_integer_products.py` runs
this here, and on a CPU that is not here.
"""

import json
import os
import sys
import warnings
from collections.abc import Callable

import numpy as np
import torch

from labkit import machine

TOKENS, INPUTS, OUTPUTS = 32, 64, 64


def cases(activation_bits: int, signed: bool = False) -> list[tuple[np.ndarray, np.ndarray]]:
    """Return activations `(tokens, in)` and weights `(out, in)` as int64, extremes first."""
    random = np.random.default_rng(0)
    most = 127 if signed else 2**activation_bits - 1
    least = -127 if signed else 0
    x, w = np.full((TOKENS, INPUTS), most), np.full((OUTPUTS, INPUTS), 127)
    some = random.integers(least, most + 1, (TOKENS, INPUTS))
    some[:, 0] = most  # so that a scale found on the fly is 1
    if signed:
        some[:, 1] = -most
    return [(x, w), (some, random.integers(-127, 128, (OUTPUTS, INPUTS)))]


def error(product: Callable[[np.ndarray, np.ndarray], np.ndarray], pairs) -> float:
    """Return the largest error of a product over all pairs, relative to the largest result."""
    worst = 0.0
    for x, w in pairs:
        exact = x @ w.T
        worst = max(worst, np.abs(product(x, w) - exact).max() / np.abs(exact).max())
    return float(worst)


def torch_dynamic(engine: str, reduce_range: bool) -> Callable:
    """torch's dynamic engine: with `reduce_range` activations have 7 bits."""

    def product(x, w):
        torch.backends.quantized.engine = engine
        weight = torch.quantize_per_tensor(torch.from_numpy(w).float(), 1.0, 0, torch.qint8)
        packed = torch.ops.quantized.linear_prepack(weight, None)
        tokens = torch.from_numpy(x).float()
        return torch.ops.quantized.linear_dynamic(tokens, packed, reduce_range).numpy()

    return product


def torch_static(engine: str) -> Callable:
    """torch's static engine: the caller's scales, 8-bit results."""

    def product(x, w):
        torch.backends.quantized.engine = engine
        step = float(np.abs(x @ w.T).max()) / 127
        weight = torch.quantize_per_tensor(torch.from_numpy(w).float(), 1.0, 0, torch.qint8)
        packed = torch.ops.quantized.linear_prepack(weight, None)
        codes = torch.quantize_per_tensor(torch.from_numpy(x).float(), 1.0, 0, torch.quint8)
        return torch.ops.quantized.linear(codes, packed, step, 128).dequantize().numpy()

    return product


def int_mm(x, w):
    """torch's product of INT8 matrices, which torchao uses."""
    x, w = (torch.from_numpy(values).to(torch.int8) for values in (x, w))
    return torch._int_mm(x, w.T).numpy()


def onnx_runtime(x, w):
    """ONNX Runtime's MatMulInteger: uint8 activations, int8 weights."""
    import onnxruntime
    from onnx import TensorProto, helper, numpy_helper

    graph = helper.make_graph(
        [helper.make_node("MatMulInteger", ["x", "w"], ["y"])],
        "product",
        [helper.make_tensor_value_info("x", TensorProto.UINT8, x.shape)],
        [helper.make_tensor_value_info("y", TensorProto.INT32, None)],
        [numpy_helper.from_array(np.ascontiguousarray(w.T.astype(np.int8)), "w")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=10)
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    return session.run(None, {"x": x.astype(np.uint8)})[0]


def packed(bits: int) -> Callable:
    """Our kernel of chapter 5: packed codes times activations rounded to 16 bits."""

    def product(x, w):
        from torch import nn

        from labkit.decoder import Product
        from labkit.kernels import PackedLinear

        linear = nn.Linear(INPUTS, OUTPUTS, bias=False)
        linear.weight.data = torch.from_numpy(w).float()
        grid = torch.ones(OUTPUTS, 1, 1), torch.full((OUTPUTS, 1, 1), 2.0 ** (bits - 1))
        kernel = Product("one", PackedLinear(linear, bits, INPUTS, grid=grid))
        return np.stack([kernel(row.astype(np.float32)) for row in x])

    return product


def int8_linear(engine: str, per_token: bool) -> Callable:
    """Our W8A8 layer on an engine of torch, which it asks whether all 8 bits fit."""

    def product(x, w):
        from torch import nn

        from labkit.int8 import Int8Linear

        os.environ["LABKIT_ENGINE"] = engine
        layer = Int8Linear(nn.Linear(INPUTS, OUTPUTS, bias=False), per_token)
        layer.codes, layer.scale = torch.from_numpy(w).to(torch.int8), torch.ones(OUTPUTS)
        return layer(torch.from_numpy(x).float()).detach().numpy()

    return product


def library_products() -> dict[str, float]:
    """Return the error of each product of torch and ONNX Runtime."""
    found = {"_int_mm": error(int_mm, cases(8, signed=True))}
    for engine in {"x86", "fbgemm", "qnnpack"} & set(torch.backends.quantized.supported_engines):
        if engine != "qnnpack":  # it takes no notice of reduce_range
            found[f"{engine}, 7 bits"] = error(torch_dynamic(engine, True), cases(7))
        found[f"{engine}, 8 bits"] = error(torch_dynamic(engine, False), cases(8))
        found[f"{engine}, static, 7 bits"] = error(torch_static(engine), cases(7))
        found[f"{engine}, probe"] = float(machine.exact_at_8_bits(engine))
        for per_token in (False, True):
            name = f"{engine}, Int8Linear, {'token' if per_token else 'tensor'}"
            found[name] = error(int8_linear(engine, per_token), cases(8))
    found["ONNX Runtime, 7 bits"] = error(onnx_runtime, cases(7))
    found["ONNX Runtime, 8 bits"] = error(onnx_runtime, cases(8))
    return found


def our_products() -> dict[str, float]:
    """Return the error of our kernels; the weights of the second fit into 4 bits."""
    small = [(x, np.clip(w, -8, 7)) for x, w in cases(8)]
    return {"packed, 8 bits": error(packed(8), cases(8)), "packed, 4 bits": error(packed(4), small)}


if __name__ == "__main__":
    warnings.filterwarnings("ignore")
    print(json.dumps(our_products() if sys.argv[1:] == ["ours"] else library_products()))
