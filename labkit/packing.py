"""What is stored of a rounded weight: codes of any width without gaps, and scales in FP16."""

from numbers import Integral

import numpy as np
import torch

from labkit.arguments import SMALLEST_FP16


def pack_bits(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Pack codes of any width without gaps; each row begins with a new byte.

    Args:
        codes: uint8 `(..., n)`, 0 to 2**bits − 1.
        bits: 1 to 8.

    Returns:
        uint8 `(..., ceil(n · bits / 8))`; the lowest bit of the first code is bit 0 of byte 0.

    Raises:
        ValueError: if `codes` or `bits` is not as above, see `check_codes`.
    """
    check_codes(codes, bits)
    if bits == 8 or (bits == 4 and codes.shape[-1] % 2 == 0):  # the common widths, quicker
        return codes if bits == 8 else codes[..., 0::2] | (codes[..., 1::2] << 4)
    digits = (codes.numpy()[..., None] >> np.arange(bits, dtype=np.uint8)) & 1
    flat = digits.reshape(*codes.shape[:-1], codes.shape[-1] * bits)
    return torch.from_numpy(np.packbits(flat, axis=-1, bitorder="little"))


def unpack_bits(packed: torch.Tensor, bits: int, n: int) -> torch.Tensor:
    """Return the codes `(..., n)` that `pack_bits` packed, uint8.

    Raises:
        ValueError: if `packed` is not uint8 `(..., ceil(n · bits / 8))`, see `check_packed`.
    """
    check_packed(packed, bits, n)
    if bits in (4, 8):
        halves = [packed & 0x0F, packed >> 4] if bits == 4 else [packed]
        return torch.stack(halves, dim=-1).flatten(-2)[..., :n]
    flat = np.unpackbits(packed.numpy(), axis=-1, count=n * bits, bitorder="little")
    digits = flat.reshape(*packed.shape[:-1], n, bits)
    return torch.from_numpy(np.packbits(digits, axis=-1, bitorder="little")[..., 0])


def to_fp16(scale: torch.Tensor, bits: int | None = None) -> torch.Tensor:
    """Round scales to values that FP16 holds, none of them 0; float32.

    Below 6.1e-5 FP16 has steps of 6e-8, and rounding down can clip much of a grid's range. With
    `bits`, a scale there is rounded down only where that clips half a scale or less at each end,
    and up elsewhere; so the error grows little down to 6e-8, the smallest scale there is.

    Args:
        scale: any shape, positive; 0 becomes 6e-8.
        bits: width of the codes. None: to the nearest everywhere.

    Raises:
        ValueError: if a scale is NaN, or too large for FP16 (65504).
    """
    stored = scale.half().float().clamp(min=SMALLEST_FP16)
    if not torch.isfinite(stored).all():
        raise ValueError(f"scale: {float(scale.max()):.3g} is too large for FP16 (65504)")
    if bits is None or stored.min() >= (normal := torch.finfo(torch.float16).tiny):
        return stored
    steps = scale.float() / SMALLEST_FP16
    whole = steps.floor()
    whole += (steps - whole) * (2**bits - 1) > whole
    return torch.where(scale < normal, (whole * SMALLEST_FP16).clamp(min=SMALLEST_FP16), stored)


def check_codes(codes: torch.Tensor, bits: int) -> None:
    """Refuse codes that do not fit into `bits`: ValueError unless uint8, 0 to 2**bits − 1."""
    _check_packing("codes", codes, bits)
    if bits < 8 and codes.numel() and (largest := int(codes.max())) >= 2**bits:
        raise ValueError(f"codes must be from 0 to {2**bits - 1} at bits={bits}, not {largest}")


def check_packed(packed: torch.Tensor, bits: int, n: int) -> None:
    """Refuse bytes that do not hold n codes a row: ValueError unless uint8, ceil(n · bits / 8)."""
    _check_packing("packed", packed, bits)
    if isinstance(n, bool) or not isinstance(n, Integral) or n < 0:
        raise ValueError(f"n must be an integer from 0 up, not {n!r}")
    if packed.shape[-1] != (expected := -(-n * bits // 8)):
        raise ValueError(
            f"packed must have {expected} bytes a row for n={n} codes of bits={bits}, not "
            f"{packed.shape[-1]}"
        )


def _check_packing(name: str, x: torch.Tensor, bits: int) -> None:
    if isinstance(bits, bool) or not isinstance(bits, Integral) or not 1 <= bits <= 8:
        raise ValueError(f"bits must be an integer from 1 to 8, not {bits!r}")
    if not isinstance(x, torch.Tensor) or x.dtype != torch.uint8 or x.ndim == 0:
        kind = x.dtype if isinstance(x, torch.Tensor) else type(x).__name__
        kind = "a single number" if kind == torch.uint8 else kind
        signed = f"; add {2 ** (bits - 1)} to signed codes first" if kind == torch.int8 else ""
        raise ValueError(
            f"{name} must be a uint8 tensor of one dimension or more, not {kind}{signed}"
        )
