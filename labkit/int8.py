"""W8A8 with all eight bits of the activations, exact also where torch's own kernels overflow."""

import functools
import math
import warnings

import torch
from torch import nn

from labkit import machine
from labkit.blocks import LAYERS, blocks_of, linear_layers
from labkit.quant import choose_qparams, quantize

_exact = functools.cache(machine.exact_at_8_bits)


class Int8Linear(nn.Module):
    """A linear layer that multiplies INT8 weights with activations rounded as they arrive (W8A8).

    Weights are symmetric, one scale an output channel. Activations are asymmetric, with one scale a
    call (per tensor) or one a token. The products are integers, computed by torch's INT8 engine,
    which is asked first whether it is exact. x86 without VNNI adds two neighboring products in 16
    bits, which overflow if both weights are large: there, what is too much of such a pair, about
    one weight in a hundred, is multiplied apart, as a sparse matrix.

    The buffers are what a saved file holds: `codes`, int8 `(out, in)`, and `scale`, float32
    `(out,)`.
    """

    def __init__(self, linear: nn.Linear, per_token: bool = False, bits: int = 8):
        """Quantize a float layer.

        Args:
            linear: the layer; its weight is `(out, in)`.
            per_token: one scale a token (the last dimension of the input) in place of one a call.
            bits: of the activations: 8, or 7 as torch's own dynamic layer takes on x86.

        Raises:
            ValueError: if `bits` is neither 7 nor 8, or a weight is NaN or infinite.
        """
        super().__init__()
        if bits not in (7, 8):
            raise ValueError(f"bits must be 7 or 8, not {bits}")
        weight = linear.weight.detach().float()
        scale, zero_point = choose_qparams(weight, 8, symmetric=True, dim=1)
        self.per_token, self.bits = per_token, bits
        self.register_buffer("codes", quantize(weight, scale, zero_point, 8, symmetric=True))
        self.register_buffer("scale", scale[:, 0])
        self.bias = None if linear.bias is None else nn.Parameter(linear.bias.detach().float())
        self._packed = None

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_packed": None}  # packed weights are of this process

    def _load_from_state_dict(self, *arguments) -> None:
        super()._load_from_state_dict(*arguments)
        self._packed = None  # of the codes that were there before

    @torch.no_grad()  # integers pass no gradient
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return `x · weightᵀ + bias`, `(..., out)`, of an input `(..., in)`, in its dtype.

        Raises:
            ValueError: if a value of `x` is NaN or infinite.
        """
        if self._packed is None:
            self._packed = self._pack()
        rows = x.flatten(0, -2).float()
        if self.bits == 8 and (len(rows) == 1 or not self.per_token):
            out = self._in_one_call(rows)
        else:
            out = self._by_codes(rows)
        out = out.mul_(self.scale)
        out = out if self.bias is None else out.add_(self.bias)
        return out.unflatten(0, x.shape[:-1]).to(x.dtype)

    def _in_one_call(self, rows: torch.Tensor) -> torch.Tensor:
        # The engine finds the scale: rows · codes of the weightᵀ, rows rounded.
        if not all(math.isfinite(end) for end in rows.aminmax()):
            raise _not_finite()
        weight, rest, _ = self._packed
        out = torch.ops.quantized.linear_dynamic(rows, weight, False)
        if rest is not None:
            rounded = torch.quantize_per_tensor_dynamic(rows, torch.quint8, False).dequantize()
            out += (rest @ rounded.T).T
        return out

    def _by_codes(self, rows: torch.Tensor) -> torch.Tensor:
        # The same with a scale for each row, or with 7 bits: the engine gets codes.
        low, high = rows.aminmax(dim=1, keepdim=True) if self.per_token else rows.aminmax()
        low, high, most = low.clamp(max=0), high.clamp(min=0), 2**self.bits - 1
        scale = (high / most - low / most).clamp_(min=torch.finfo(torch.float32).tiny)
        if not torch.isfinite(scale).all():
            raise _not_finite()
        zero = (low / scale).round_().neg_()  # `quant.choose_qparams`, without its checks
        half = 2 ** (self.bits - 1)
        # It would find a scale for these: both ends of 8 bits, in two rows more, make it 1.
        codes = torch.empty(len(rows) + 2, rows.shape[1])
        codes[-2], codes[-1] = -128, 127
        torch.div(rows, scale, out=codes[:-2]).round_().add_(zero - half).clamp_(-half, half - 1)
        weight, rest, weight_sums = self._packed
        sums = torch.ops.quantized.linear_dynamic(codes, weight, False)[:-2]
        if rest is not None:
            sums += (rest @ codes[:-2].T).T
        return sums.addcmul_(zero - half, weight_sums, value=-1).mul_(scale)

    def _pack(self) -> tuple:
        # The engine's own form of the codes, what it is spared, and the sum of each row.
        before, engine = torch.backends.quantized.engine, machine.quantized_engine()
        codes, rest = self.codes, None
        torch.backends.quantized.engine = engine
        try:
            with warnings.catch_warnings(action="ignore"):  # deprecated, as all of this engine
                if not _exact(engine):
                    too_much = _too_much(codes)
                    codes, rest = codes - too_much, too_much.float().to_sparse_csr()
                one = torch.ones(len(codes), dtype=torch.float64)
                zero = torch.zeros(len(codes), dtype=torch.int64)
                weight = torch._make_per_channel_quantized_tensor(codes, one, zero, 0)
                packed = torch.ops.quantized.linear_prepack(weight, None)
        finally:
            torch.backends.quantized.engine = before
        return packed, rest, self.codes.sum(1, dtype=torch.int64).float()


def _not_finite() -> ValueError:
    return ValueError("x holds NaN or infinite values; look at the layer before this one")


def _too_much(codes: torch.Tensor) -> torch.Tensor:
    # int8 (out, in): what to take off so that 255 times the sum of two neighbors fits in 16 bits.
    pairs = nn.functional.pad(codes.long(), (0, codes.shape[1] % 2)).unflatten(1, (-1, 2))
    most = 2**15 // 255
    excess = (pairs.sum(-1).abs() - most).clamp(min=0) * (pairs.prod(-1) > 0)
    larger = pairs.abs().argmax(-1, keepdim=True)
    taken = excess[..., None] * pairs.sum(-1, keepdim=True).sign()
    rest = torch.zeros_like(pairs).scatter_(-1, larger, taken)
    return rest.flatten(1)[:, : codes.shape[1]].to(torch.int8)


def with_int8_linears(model: nn.Module, per_token: bool = False, bits: int = 8) -> nn.Module:
    """Make the linear layers in the blocks of a Llama-type model `Int8Linear`, in place.

    Raises:
        TypeError: if the model is of another type, or its layers are no plain `nn.Linear`.
        ValueError: see `Int8Linear`. The model is then unchanged.
    """
    layers = [
        (block, name, Int8Linear(linear, per_token, bits))
        for block in blocks_of(model)
        for name, linear in zip(LAYERS, linear_layers(block, LAYERS), strict=True)
    ]
    for block, name, layer in layers:
        block.set_submodule(name, layer)
    return model
