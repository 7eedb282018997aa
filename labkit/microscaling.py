"""Small floats and their block formats: FP8, FP4, MXFP8, MXFP4, NVFP4, as chapter 1 writes them.

Sources: OCP Microscaling Formats (MX) Specification 1.0, 2023; OCP 8-bit Floating Point
Specification (OFP8) 1.0; NVIDIA, "Introducing NVFP4", 2025. Codes of 4 bits lie two to a byte, the
first of two neighbors in the low half, as `quant.pack_bits` puts them.
"""

import torch

from labkit.quant import check_input, pack_bits, unpack_bits

E2M1 = (2, 1, 6.0)
"""Exponent bits, fraction bits and largest value of FP4, the argument of `round_to_float`."""
E4M3 = (4, 3, 448.0)
E5M2 = (5, 2, 57344.0)
FP4_VALUES = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
"""What the codes 0 to 7 of E2M1 stand for; 8 more is the same with a minus sign."""
BITS_PER_WEIGHT = {"MXFP8": 8 + 8 / 32, "MXFP4": 4 + 8 / 32, "NVFP4": 4 + 8 / 16}
"""Codes and scales of the blocks; NVFP4's scale of the tensor adds 32 bits in all."""


def round_to_float(
    x: torch.Tensor, exponent_bits: int, fraction_bits: int, largest: float
) -> torch.Tensor:
    """Round numbers to the nearest that a small float can hold, ties to even, float32.

    Args:
        x: float tensor, finite.
        exponent_bits, fraction_bits: the format's fields; the bias is 2^(exponent_bits − 1) − 1.
        largest: its largest finite value; what lies beyond becomes this (saturation).
    """
    x = x.float()
    power = (x.view(torch.int32) & 0x7F800000).view(torch.float32)  # the exponent's bits alone
    lowest = 2 - 2 ** (exponent_bits - 1)  # below 2^lowest numbers are subnormal
    step = power.clamp(min=2.0**lowest).div_(2**fraction_bits)
    return (x / step).round_().mul_(step).clamp_(-largest, largest)


def fp4_codes(x: torch.Tensor) -> torch.Tensor:
    """Return the codes 0 to 15 of FP4 (E2M1) nearest to float numbers, uint8; they saturate."""
    rounded = round_to_float(x, *E2M1)
    magnitude = torch.bucketize(rounded.abs(), FP4_VALUES.to(x.device))
    return (magnitude + 8 * rounded.signbit()).to(torch.uint8)


def fp4_decode(codes: torch.Tensor) -> torch.Tensor:
    """Return the numbers that FP4 codes 0 to 15 stand for, float32."""
    both_signs = torch.cat([FP4_VALUES, -FP4_VALUES]).to(codes.device)
    return both_signs[codes.int()]


def to_blocks(w: torch.Tensor, size: int) -> torch.Tensor:
    """Cut the last dimension of a tensor into blocks, `(..., n_blocks, size)`, float32.

    Raises:
        TypeError, ValueError: see `quant.check_input`; ValueError too if `size` does not divide it.
    """
    check_input(w, 8)
    if w.ndim == 0 or w.shape[-1] % size:
        raise ValueError(f"w: its last dimension must be a multiple of {size}, not {(*w.shape,)}")
    return w.float().unflatten(-1, (-1, size))


def shared_exponent(blocks: torch.Tensor, largest_exponent: int) -> torch.Tensor:
    """Return the exponent of the scale of each block by the rule of MX: ⌊log₂ max⌋ − emax.

    Args:
        blocks: `(..., n_blocks, 32)`.
        largest_exponent: emax, the exponent of the element format's largest number: 2 for E2M1, 8
            for E4M3.

    Returns:
        int32 `(..., n_blocks, 1)`, −127 to 127; −127 for a block of zeros.

    Source: OCP MX 1.0, section 6.3.
    """
    largest = blocks.abs().amax(-1, keepdim=True)
    _, exponent = torch.frexp(largest)  # largest = m · 2^exponent with m from 0.5 up to 1
    return (exponent - 1 - largest_exponent).where(largest > 0, -127).clamp(-127, 127)


def quantize_mxfp4(w: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantize to MXFP4: blocks of 32 in FP4, one power of two each.

    Args:
        w: float `(..., n)`, finite; 32 divides n.

    Returns:
        `packed`, uint8 `(..., n / 2)`, and `scale`, uint8 `(..., n / 32)`: exponent + 127 (E8M0).

    Raises:
        TypeError, ValueError: see `to_blocks`.
    """
    blocks = to_blocks(w, 32)
    exponent = shared_exponent(blocks, 2)
    codes = fp4_codes(blocks / 2.0**exponent)
    return pack_bits(codes.flatten(-2), 4), (exponent[..., 0] + 127).to(torch.uint8)


def dequantize_mxfp4(packed: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Return the numbers `(..., n)` that `quantize_mxfp4` packed, float32."""
    blocks = fp4_decode(unpack_bits(packed, 4, 2 * packed.shape[-1])).unflatten(-1, (-1, 32))
    return (blocks * 2.0 ** (scale.int()[..., None] - 127)).flatten(-2)


def quantize_mxfp8(w: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantize to MXFP8: blocks of 32 in FP8 E4M3, one power of two each.

    Args, errors: as of `quantize_mxfp4`.

    Returns:
        `codes`, float8_e4m3fn `(..., n)`, and `scale`, uint8 `(..., n / 32)`.
    """
    blocks = to_blocks(w, 32)
    exponent = shared_exponent(blocks, 8)
    codes = round_to_float(blocks / 2.0**exponent, *E4M3).to(torch.float8_e4m3fn)
    return codes.flatten(-2), (exponent[..., 0] + 127).to(torch.uint8)


def dequantize_mxfp8(codes: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Return the numbers `(..., n)` that `quantize_mxfp8` rounded, float32."""
    blocks = codes.float().unflatten(-1, (-1, 32))
    return (blocks * 2.0 ** (scale.int()[..., None] - 127)).flatten(-2)


def quantize_nvfp4(w: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Quantize to NVFP4: blocks of 16 in FP4, an FP8 scale each, and one FP32 scale for all.

    Args:
        w: float `(..., n)`, finite; 16 divides n.

    Returns:
        `packed`, uint8 `(..., n / 2)`; `scale`, float8_e4m3fn `(..., n / 16)`, none of them 0;
        `tensor_scale`, float32 without dimensions. It puts the largest scale at 448, E4M3's
        largest number, so that a block's scale is finer than a power of two.

    Raises:
        TypeError, ValueError: see `to_blocks`.
    """
    blocks = to_blocks(w, 16)
    largest = blocks.abs().amax(-1, keepdim=True)
    tensor_scale = (largest.max() / (6 * 448)).clamp(min=torch.finfo(torch.float32).tiny)
    scale = round_to_float(largest / 6 / tensor_scale, *E4M3).clamp(min=2**-9)
    codes = fp4_codes(blocks / (scale * tensor_scale))
    return pack_bits(codes.flatten(-2), 4), scale[..., 0].to(torch.float8_e4m3fn), tensor_scale


def dequantize_nvfp4(
    packed: torch.Tensor, scale: torch.Tensor, tensor_scale: torch.Tensor
) -> torch.Tensor:
    """Return the numbers `(..., n)` that `quantize_nvfp4` packed, float32."""
    blocks = fp4_decode(unpack_bits(packed, 4, 2 * packed.shape[-1])).unflatten(-1, (-1, 16))
    return (blocks * (scale.float()[..., None] * tensor_scale)).flatten(-2)


_FORMATS = {"MXFP8": (32, E4M3, 8), "MXFP4": (32, E2M1, 2), "NVFP4": (16, E2M1, None)}
# Size of a block, elements, and by the rule of MX the exponent of the largest.


def round_to_blocks(w: torch.Tensor, number_format: str) -> torch.Tensor:
    """Round a weight to a block format and back, float32, of the same shape.

    It returns what the `quantize_` and `dequantize_` functions of the format return together, and
    is faster, since it packs no codes.

    Args:
        w: float `(..., n)`, finite; the block divides n.
        number_format: a key of `BITS_PER_WEIGHT`.

    Raises:
        TypeError, ValueError: see `to_blocks`; ValueError too if the format is unknown.
    """
    if number_format not in _FORMATS:
        raise ValueError(f"number_format must be one of {[*_FORMATS]}, not {number_format!r}")
    size, elements, largest_exponent = _FORMATS[number_format]
    blocks = to_blocks(w, size)
    if number_format == "NVFP4":  # the scales of `quantize_nvfp4`
        largest = blocks.abs().amax(-1, keepdim=True)
        tensor_scale = (largest.max() / (6 * 448)).clamp(min=torch.finfo(torch.float32).tiny)
        scale = round_to_float(largest / 6 / tensor_scale, *E4M3).clamp(min=2**-9) * tensor_scale
    else:
        scale = 2.0 ** shared_exponent(blocks, largest_exponent)
    scale = scale.float()  # a notebook may have set another default dtype
    return (round_to_float(blocks / scale, *elements).float() * scale).flatten(-2)
