"""Linear layers whose weights really are stored in few bits."""

import torch
from torch import nn

from labkit import quant


class PackedLinear(nn.Module):
    """A linear layer that keeps its weight as codes, scales and zero points.

    The buffers are what a saved file holds: `codes` (uint8; at 4 bits two codes a byte), `scale`
    (float16) and, when asymmetric, `zero_point` (uint8). `forward` dequantizes first, so it saves
    bytes, not time.
    """

    def __init__(
        self,
        linear: nn.Linear,
        bits: int,
        group_size: int,
        symmetric: bool = False,
        grid: tuple[torch.Tensor, torch.Tensor] | None = None,
    ):
        """Quantize a float layer by rounding to nearest.

        Args:
            linear: the layer; its weight is `(out, in)`.
            bits: 4 or 8.
            group_size: inputs that share a scale, 1 to `in`; `in` itself: per channel. If it does
                not divide `in`, the last group is shorter.
            symmetric: signed grid around 0 (no zero points stored).
            grid: scale and zero point, `(out, n_groups, 1)`. None: min-max, see `group_qparams`. A
                weight that lies on this grid already keeps its values.

        Raises:
            ValueError: if `bits` is neither 4 nor 8, `group_size` is out of range, or 4-bit codes
                of an odd number of inputs cannot fill whole bytes.
        """
        super().__init__()
        if bits not in (4, 8):
            raise ValueError(f"bits must be 4 or 8 to fill whole bytes, not {bits}")
        weight = linear.weight.detach().float()
        self.bits, self.group_size, self.symmetric = bits, group_size, symmetric
        grid = grid or quant.group_qparams(weight, group_size, bits, symmetric)
        codes = quant.quantize_groups(weight, *grid, group_size, bits, symmetric)
        if symmetric:
            codes = (codes.to(torch.int16) + 2 ** (bits - 1)).to(torch.uint8)
        self.register_buffer("codes", quant.pack_int4(codes) if bits == 4 else codes)
        self.register_buffer("scale", grid[0].half())
        if not symmetric:
            self.register_buffer("zero_point", grid[1].to(torch.uint8))
        self.bias = None if linear.bias is None else nn.Parameter(linear.bias.detach().clone())

    def dequantized(self) -> torch.Tensor:
        """Return the weight `(out, in)` in float32."""
        codes = quant.unpack_int4(self.codes) if self.bits == 4 else self.codes
        zero_point = 2 ** (self.bits - 1) if self.symmetric else self.zero_point.float()
        return quant.dequantize_groups(codes, self.scale.float(), zero_point, self.group_size)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x, self.dequantized().to(x.dtype), self.bias)
