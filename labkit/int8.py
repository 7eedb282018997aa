"""W8A8 with all eight bits of the activations, exact also where torch's own kernels overflow."""

import functools
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
    call (per tensor) or one a token. The products are integers: torch's INT8 engine computes them,
    which is asked first whether it is exact. Where its 16-bit sums would overflow (x86 without
    VNNI), the lowest bit of the activations is multiplied apart: 2 × the upper seven bits and that
    bit fit.

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
        weight = linear.weight.detach()
        scale, zero_point = choose_qparams(weight, 8, symmetric=True, dim=1)
        self.per_token, self.bits = per_token, bits
        self.register_buffer("codes", quantize(weight, scale, zero_point, 8, symmetric=True))
        self.register_buffer("scale", scale[:, 0])
        self.bias = None if linear.bias is None else nn.Parameter(linear.bias.detach().clone())
        self._packed = None

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_packed": None}  # packed weights are of this process

    def _load_from_state_dict(self, *arguments) -> None:
        super()._load_from_state_dict(*arguments)
        self._packed = None  # of the codes that were there before

    @torch.no_grad()  # integers pass no gradient
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return `x · weightᵀ + bias`, `(..., out)`, of an input `(..., in)`, in its dtype."""
        rows = x.flatten(0, -2).float()
        low, high = rows.aminmax(dim=1, keepdim=True) if self.per_token else rows.aminmax()
        low, high, most = low.clamp(max=0), high.clamp(min=0), 2**self.bits - 1
        scale = (high / most - low / most).clamp_(min=torch.finfo(torch.float32).tiny)
        if not torch.isfinite(scale).all():
            raise ValueError("x holds NaN or infinite values; look at the layer before this one")
        zero = (low / scale).round_().neg_()  # `quant.choose_qparams`, without its checks
        half = 2 ** (self.bits - 1)
        codes = torch.empty(len(rows) + 2, rows.shape[1])  # two rows more, see _engine
        torch.div(rows, scale, out=codes[:-2]).round_().add_(zero - half).clamp_(-half, half - 1)
        sums = self._product(codes)
        sums.addcmul_(zero - half, self._weight_sums, value=-1)
        out = sums.mul_(scale).mul_(self.scale)
        out = out if self.bias is None else out.add_(self.bias)
        return out.unflatten(0, x.shape[:-1]).to(x.dtype)

    def _product(self, codes: torch.Tensor) -> torch.Tensor:
        # codes · codes of the weightᵀ; codes from -64 to 63 or from -128 to 127, two rows free
        if self._packed is None:
            self._pack()
        if self.bits == 7 or self._exact:
            return self._engine(codes, self.bits)
        upper = codes.div(2).floor_()
        lowest = codes.sub_(upper, alpha=2).sub_(64)
        sums = self._engine(upper, 7).mul_(2).add_(self._engine(lowest, 7))
        return sums.add_(self._weight_sums, alpha=64)

    def _engine(self, codes: torch.Tensor, bits: int) -> torch.Tensor:
        # torch finds a scale for what it gets: both ends of the range, in two rows, make it 1.
        codes[-2].fill_(-(2 ** (bits - 1)))
        codes[-1].fill_(2 ** (bits - 1) - 1)
        return torch.ops.quantized.linear_dynamic(codes, self._packed, bits == 7)[:-2]

    def _pack(self) -> None:
        before, engine = torch.backends.quantized.engine, machine.quantized_engine()
        torch.backends.quantized.engine = engine
        try:
            with warnings.catch_warnings(action="ignore"):  # deprecated, as all of this engine
                one = torch.ones(len(self.codes), dtype=torch.float64)
                weight = torch._make_per_channel_quantized_tensor(
                    self.codes, one, torch.zeros(len(one), dtype=torch.int64), 0
                )
            self._packed = torch.ops.quantized.linear_prepack(weight, None)
        finally:
            torch.backends.quantized.engine = before
        self._exact = _exact(engine)
        self._weight_sums = self.codes.sum(1, dtype=torch.int64).float()


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
