"""Linear layers whose weights really are stored in few bits."""

import numpy as np
import torch
from torch import nn

from labkit import quant
from labkit.blocks import blocks_of, check_linear


class PackedLinear(nn.Module):
    """A linear layer that keeps its weight as codes, scales and zero points.

    The buffers are what a saved file holds: `codes` (uint8, packed without gaps), `scale`
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
            linear: the layer; its weight is `(out, in)`, of any float format.
            bits: 2 to 8.
            group_size: inputs that share a scale, 1 to `in`; `in` itself: per channel. If it does
                not divide `in`, the last group is shorter.
            symmetric: signed grid around 0 (no zero points stored).
            grid: scale and zero point, `(out, n_groups, 1)`. None: min-max, see `group_qparams`. A
                weight that lies on this grid already keeps its values.

        Raises:
            TypeError: if `linear` is no `nn.Linear`.
            TypeError, ValueError: if `bits` or `group_size` is out of range.
        """
        super().__init__()
        if not isinstance(linear, nn.Linear):
            raise TypeError(f"linear must be an nn.Linear, not {type(linear).__name__}")
        self.training = linear.training
        weight = linear.weight.detach().float()
        self.bits, self.inputs = bits, weight.shape[1]
        self.group_size, self.symmetric = group_size, symmetric
        grid = grid or quant.group_qparams(weight, group_size, bits, symmetric)
        grid = [part.detach() for part in grid]
        # Some rows at a time: what lies between weights and codes then stays in the caches.
        some = max(1, 2**18 // self.inputs)
        parts = zip(*(x.split(some) for x in (weight, *grid)), strict=True)
        self.register_buffer("codes", torch.cat([self._packed(*part) for part in parts]))
        self.register_buffer("scale", grid[0].to(torch.float16, copy=True).contiguous())
        if not symmetric:
            self.register_buffer("zero_point", grid[1].to(torch.uint8, copy=True).contiguous())
        bias = linear.bias
        self.bias = (
            bias if bias is None else nn.Parameter(bias.detach().clone(), bias.requires_grad)
        )

    def _packed(self, weight, scale, zero_point) -> torch.Tensor:
        bits, symmetric = self.bits, self.symmetric
        codes = quant.quantize_groups(weight, scale, zero_point, self.group_size, bits, symmetric)
        if symmetric:
            codes = (codes.to(torch.int16) + 2 ** (bits - 1)).to(torch.uint8)
        return quant.pack_bits(codes, bits)

    def grid(self) -> tuple[np.ndarray, np.ndarray]:
        """Return scales, float32, and zero points, uint8, both `(out, n_groups)`."""
        scale = self.scale[..., 0].float().numpy()
        if self.symmetric:
            return scale, np.full(scale.shape, 2 ** (self.bits - 1), np.uint8)
        return scale, self.zero_point[..., 0].numpy()

    def dequantized(self) -> torch.Tensor:
        """Return the weight `(out, in)` in float32."""
        from labkit.matvec import dequantize_rows  # brings Numba, which takes a moment

        bits, codes = self.bits, self.codes
        if bits not in (4, 8):
            bits, codes = 8, quant.unpack_bits(codes, bits, self.inputs)
        size, grid = self.group_size, self.grid()
        return torch.from_numpy(dequantize_rows(codes.numpy(), bits, *grid, size, self.inputs))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return `x · weightᵀ + bias`, `(..., out)`, of an input `(..., in)`, in its dtype."""
        return linear_in_float32(x, self.dequantized(), self.bias)

    def _apply(self, fn, recurse=True) -> "PackedLinear":
        scale = self.scale
        super()._apply(fn, recurse)
        if self.scale.dtype != torch.float16:  # as after `model.bfloat16()`, which would round it
            self.scale = scale.to(self.scale.device)
        return self


def linear_in_float32(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    """Return `x · weightᵀ + bias` in the dtype of x; BF16 and FP16 are widened meanwhile."""
    wide = torch.promote_types(x.dtype, torch.float32)
    bias = None if bias is None else bias.to(wide)
    return nn.functional.linear(x.to(wide), weight.to(wide), bias).to(x.dtype)


class PackedEmbedding(nn.Module):
    """Reads the rows of a packed head, so that the tied pair is stored once."""

    def __init__(self, head: PackedLinear, dtype: torch.dtype = torch.float32):
        super().__init__()
        self.head, self.training = head, head.training
        self.register_buffer("like", torch.empty(0, dtype=dtype), persistent=False)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        head, rows = self.head, ids.flatten()
        codes = quant.unpack_bits(head.codes[rows], head.bits, head.inputs)
        grid = head.scale[rows].float(), head.zero_point[rows].float()
        weight = quant.dequantize_groups(codes, *grid, head.group_size)
        return weight.unflatten(0, ids.shape).to(self.like.dtype)


def with_int8_head(model: nn.Module) -> nn.Module:
    """Round a tied head and embedding of a Llama-type model to 8 bits, in place.

    Raises:
        TypeError: if the model is of another type, or head or embedding is no plain layer.
        ValueError: if they are two tensors.
    """
    check_head(model)
    head = PackedLinear(model.lm_head, 8, model.lm_head.in_features)
    embedding = PackedEmbedding(head, model.lm_head.weight.dtype)
    model.lm_head, model.model.embed_tokens = head, embedding
    return model


def check_head(model: nn.Module) -> None:
    """Refuse a model whose head and embedding are not one tensor, see `with_int8_head`."""
    blocks_of(model)
    name = f"model: the {{}} of {type(model).__name__}"
    check_linear(getattr(model, "lm_head", None), name.format("head"))
    embedding = getattr(model.model, "embed_tokens", None)
    if type(embedding) is not nn.Embedding:  # others scale what they read
        kind = type(embedding).__name__
        raise TypeError(f"{name.format('embedding')} must be an nn.Embedding, not {kind}")
    if model.lm_head.weight is not embedding.weight:
        raise ValueError("model: head and embedding must be one tensor, tied, not two")
