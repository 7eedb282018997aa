"""Linear layers whose weights really are stored in few bits."""

import torch
from torch import nn

from labkit import quant


class PackedLinear(nn.Module):
    """A linear layer that keeps its weight as codes, scales and zero points.

    The buffers are what a saved file holds: `codes` (uint8; at 4 bits two codes a byte), `scale`
    (float16) and, when asymmetric, `zero_point` (uint8). `forward` dequantizes first, so it saves
    bytes, not time.

    Attributes:
        bits, group_size, symmetric: how the weight was quantized.
    """

    def __init__(self, linear: nn.Linear, bits: int, group_size: int, symmetric: bool = False):
        """Quantize a float layer by rounding to nearest.

        Args:
            linear: the layer; its weight is `(out, in)`.
            bits: 4 or 8.
            group_size: inputs that share a scale; must divide `in`. `in` itself: per channel.
            symmetric: signed grid around 0 (no zero points stored).

        Raises:
            ValueError: if `bits` is neither 4 nor 8, or `group_size` does not divide `in`.
        """
        super().__init__()
        if bits not in (4, 8):
            raise ValueError(f"bits must be 4 or 8 to fill whole bytes, not {bits}")
        if group_size < 1 or linear.in_features % group_size:
            raise ValueError(
                f"group_size must divide the {linear.in_features} inputs, not {group_size}"
            )
        self.bits, self.group_size, self.symmetric = bits, group_size, symmetric
        groups = linear.weight.detach().float().unflatten(1, (-1, group_size))
        scale, zero_point = quant.choose_qparams(groups, bits, symmetric, dim=-1)
        scale = scale.half().float().clamp(min=torch.finfo(torch.float16).tiny)  # as stored
        codes = quant.quantize(groups, scale, zero_point, bits, symmetric).flatten(1)
        if symmetric:
            codes = (codes.to(torch.int16) + 2 ** (bits - 1)).to(torch.uint8)
        self.register_buffer("codes", quant.pack_int4(codes) if bits == 4 else codes)
        self.register_buffer("scale", scale.half())
        if not symmetric:
            self.register_buffer("zero_point", zero_point.to(torch.uint8))
        self.bias = None if linear.bias is None else nn.Parameter(linear.bias.detach().clone())

    def dequantized(self) -> torch.Tensor:
        """Return the weight `(out, in)` in float32."""
        codes = quant.unpack_int4(self.codes) if self.bits == 4 else self.codes
        zero_point = 2 ** (self.bits - 1) if self.symmetric else self.zero_point.float()
        groups = codes.unflatten(1, (-1, self.group_size))
        return quant.dequantize(groups, self.scale.float(), zero_point).flatten(1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x, self.dequantized().to(x.dtype), self.bias)
