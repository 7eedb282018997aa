"""The reference quantizers: one function for each numeric step, as chapter 1 writes them out."""

from collections.abc import Callable

import numpy as np
import torch


def check_input(x: torch.Tensor, bits: int) -> None:
    """Refuse what no quantizer can handle.

    Raises:
        TypeError: if `x` is no floating-point tensor or `bits` no integer.
        ValueError: if `x` is empty or holds NaN or infinity, or `bits` is not from 2 to 8.
    """
    if not isinstance(x, torch.Tensor) or not x.is_floating_point():
        kind = x.dtype if isinstance(x, torch.Tensor) else type(x).__name__
        raise TypeError(f"x must be a floating-point tensor, not {kind}")
    if isinstance(bits, bool) or not isinstance(bits, int):
        raise TypeError(f"bits must be an integer from 2 to 8, not {bits!r}")
    if not 2 <= bits <= 8:
        raise ValueError(f"bits must be from 2 to 8, not {bits}")
    if x.numel() == 0:
        raise ValueError(f"x is empty (shape {tuple(x.shape)}); a quantizer needs a value or more")
    wide = x.float()  # every step computes in float32
    if not torch.isfinite(torch.stack(wide.aminmax())).all():  # NaN passes through both
        bad = int((~torch.isfinite(wide)).sum())
        raise ValueError(f"x holds {bad} NaN or infinite value(s); remove them before quantizing")


def integer_range(bits: int, symmetric: bool) -> tuple[int, int]:
    """Return the smallest and the largest code: (−127, 127), if symmetric, or (0, 255) at 8 bits.

    The signed range leaves out −128, so that both signs reach equally far.
    """
    if symmetric:
        return -(2 ** (bits - 1) - 1), 2 ** (bits - 1) - 1
    return 0, 2**bits - 1


def choose_qparams(
    x: torch.Tensor, bits: int = 8, symmetric: bool = False, dim: int | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Choose scale and zero point from the smallest and the largest value (min-max).

    Zero is always inside the range and always a grid point, so padding and ReLU stay exact.

    Args:
        x: floating-point tensor of any shape, finite.
        bits: width of a code, 2 to 8.
        symmetric: True puts the zero point at 0 and uses signed codes.
        dim: the dimension that shares one scale. None: the whole tensor (per tensor). 1 for a
            weight `(out, in)`: per output channel. −1 for activations `(..., features)`: per token.
            For groups, unflatten first: `w.unflatten(1, (-1, group_size))`, then −1.

    Returns:
        `scale` and `zero_point`, float32, shaped like `x` with `dim` reduced to 1 (all ones for
        None), so that both broadcast against `x`.

    Raises:
        TypeError, ValueError: see `check_input`.

    Source: Jacob et al., "Quantization and Training of Neural Networks for Efficient
    Integer-Arithmetic-Only Inference", arXiv 1712.05877.
    """
    check_input(x, bits)
    qmin, qmax = integer_range(bits, symmetric)
    dims = tuple(range(x.ndim)) if dim is None else dim
    low = x.float().amin(dims, keepdim=True).clamp(max=0)
    high = x.float().amax(dims, keepdim=True).clamp(min=0)
    if symmetric:
        scale = torch.maximum(-low, high) / qmax
    else:
        scale = high / (qmax - qmin) - low / (qmax - qmin)
    scale = scale.clamp(min=torch.finfo(torch.float32).tiny)
    zero_point = torch.zeros_like(scale) if symmetric else (qmin - low / scale).round()
    return scale, zero_point.clamp(qmin, qmax)


def quantize(
    x: torch.Tensor,
    scale: torch.Tensor,
    zero_point: torch.Tensor,
    bits: int = 8,
    symmetric: bool = False,
) -> torch.Tensor:
    """Round `x` to the nearest code: `clip(round(x / scale) + zero_point)`.

    Args:
        x: floating-point tensor of any shape, finite.
        scale, zero_point, bits, symmetric: of `choose_qparams`; broadcastable against `x`.

    Returns:
        Codes shaped like `x`: int8 when symmetric, uint8 otherwise. One code a byte: see
        `pack_bits` for less.

    Raises:
        TypeError, ValueError: see `check_input`; ValueError too if a scale is not positive.
    """
    check_input(x, bits)
    if not (scale > 0).all():
        raise ValueError("scale must be positive everywhere; use choose_qparams to get one")
    qmin, qmax = integer_range(bits, symmetric)
    codes = (x.float() / scale).round() + zero_point
    return codes.clamp(qmin, qmax).to(torch.int8 if symmetric else torch.uint8)


def dequantize(codes: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor) -> torch.Tensor:
    """Return the grid points that the codes stand for: `(codes − zero_point) · scale`, float32."""
    return (codes.float() - zero_point) * scale


def fake_quantize(
    x: torch.Tensor, bits: int = 8, symmetric: bool = False, dim: int | None = None
) -> torch.Tensor:
    """Quantize and dequantize at once, float32: the rounding error without the saved bytes.

    Args, errors: as in `choose_qparams`.
    """
    scale, zero_point = choose_qparams(x, bits, symmetric, dim)
    return dequantize(quantize(x, scale, zero_point, bits, symmetric), scale, zero_point)


def round_to_grid(
    x: torch.Tensor,
    scale: torch.Tensor,
    zero_point: torch.Tensor,
    bits: int = 8,
    symmetric: bool = False,
) -> torch.Tensor:
    """Return the nearest values of a grid, float32: `quantize` and `dequantize` in one step.

    In place where it can, for searches that try many grids: fresh memory would take most of their
    time. It checks nothing.

    Args: as of `quantize`; `x` is float32.
    """
    codes = (x / scale).round_().add_(zero_point).clamp_(*integer_range(bits, symmetric))
    return codes.sub_(zero_point).mul_(scale)


def to_groups(weight: torch.Tensor, group_size: int) -> torch.Tensor:
    """Cut each row of a weight into groups of inputs that share a scale.

    If `group_size` does not divide the inputs, the last group is shorter. Here it is filled up with
    zeros, which change no scale, because 0 is in every range.

    Args:
        weight: `(out, in)`.
        group_size: inputs a group, 1 to `in`.

    Returns:
        `(out, n_groups, group_size)`.

    Raises:
        ValueError: if `weight` is no matrix or `group_size` is out of range.
    """
    if weight.ndim != 2:
        raise ValueError(f"weight must be (out, in), not of shape {tuple(weight.shape)}")
    inputs = weight.shape[1]
    if not 1 <= group_size <= inputs:
        raise ValueError(f"group_size must be from 1 to the {inputs} inputs, not {group_size}")
    missing = -inputs % group_size
    padded = torch.nn.functional.pad(weight, (0, missing)) if missing else weight  # no copy
    return padded.unflatten(1, (-1, group_size))


def quantize_groups(
    weight: torch.Tensor,
    scale: torch.Tensor,
    zero_point: torch.Tensor,
    group_size: int,
    bits: int = 4,
    symmetric: bool = False,
) -> torch.Tensor:
    """Round a weight `(out, in)` to nearest in groups; codes have its shape.

    Args:
        scale, zero_point: `(out, n_groups, 1)`, see `group_qparams`.
        weight, group_size, bits, symmetric: see `to_groups` and `quantize`, also for errors.
    """
    groups = to_groups(weight, group_size)
    codes = quantize(groups, scale, zero_point, bits, symmetric)
    return codes.flatten(1)[:, : weight.shape[1]]


def dequantize_groups(
    codes: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor, group_size: int
) -> torch.Tensor:
    """Return the weight `(out, in)`, float32, that codes in groups stand for."""
    groups = dequantize(to_groups(codes, group_size), scale, zero_point)
    return groups.flatten(1)[:, : codes.shape[1]]


def group_qparams(
    weight: torch.Tensor,
    group_size: int,
    bits: int = 4,
    symmetric: bool = False,
    importance: torch.Tensor | None = None,
    steps: int = 10,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Choose scale and zero point of each group, by min-max or by a search for the best clipping.

    Args:
        weight: `(out, in)`, finite.
        group_size: inputs a group; the last may be shorter, see `to_groups`.
        bits, symmetric: the grid, see `choose_qparams`.
        importance: `(in,)`, the weight of each input's squared error. None: min-max, no search.
        steps: how many ranges are tried, from the full one down to half of it.

    Returns:
        `scale` (its values fit FP16, as they are stored) and `zero_point`, `(out, n_groups, 1)`.

    Raises:
        TypeError, ValueError: see `check_input` and `to_groups`; the latter for a scale over FP16.
    """
    check_input(weight, bits)
    groups = to_groups(weight, group_size)
    ends = torch.cat([groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)], dim=-1)
    shrinks = [1.0] if importance is None else torch.linspace(1, 0.5, steps).tolist()
    best = None
    for shrink in shrinks:
        scale, zero_point = choose_qparams(ends * shrink, bits, symmetric, dim=-1)
        scale = to_fp16(scale)
        if importance is None:
            return scale, zero_point
        rounded = round_to_grid(groups, scale, zero_point, bits, symmetric)
        errors = rounded.sub_(groups).square_()
        new = errors.mul_(to_groups(importance[None], group_size)).sum(-1, keepdim=True)
        best = best or (new, scale, zero_point)
        better = new < best[0]
        pairs = zip((new, scale, zero_point), best, strict=True)
        best = tuple(torch.where(better, candidate, kept) for candidate, kept in pairs)
    return best[1], best[2]


def to_fp16(scale: torch.Tensor) -> torch.Tensor:
    """Round scales to values that FP16 holds, none of them 0; float32."""
    stored = scale.half().float().clamp(min=torch.finfo(torch.float16).tiny)
    if not torch.isfinite(stored).all():
        raise ValueError(f"scale: {float(scale.max()):.3g} is too large for FP16 (65504)")
    return stored


def inverse_factor(hessian: torch.Tensor, damping: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Return GPTQ's order of the inputs, and the factor that spreads each rounding error.

    Args:
        hessian: `(in, in)`, the mean of x xᵀ.
        damping: share of the mean diagonal added to the diagonal.

    Returns:
        `order`, `(in,)`: inputs by falling activation power. `factor`, `(in, in)`: the upper
        Cholesky factor of the inverse Hessian in that order. An input that never fires (its row is
        zero) gets a 1 on the diagonal, and so neither gives nor takes.
    """
    power = hessian.diagonal()
    order = power.argsort(descending=True, stable=True)
    damped = hessian.float() + torch.diag((power == 0) + damping * power.mean())
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped[order][:, order]))
    return order, torch.linalg.cholesky(inverse, upper=True)


def check_hessian(hessian: torch.Tensor, inputs: int, damping: float) -> None:
    """Refuse a Hessian not `(inputs, inputs)` and finite, and a damping not above 0: ValueError."""
    if hessian.shape != (inputs, inputs) or not torch.isfinite(hessian).all():
        raise ValueError(f"hessian must be ({inputs}, {inputs}) and finite: check the activations")
    if damping <= 0:
        raise ValueError(f"damping must be above 0, for example 0.01, not {damping}")


@torch.no_grad()
def gptq(
    weight: torch.Tensor,
    hessian: torch.Tensor,
    scale: torch.Tensor,
    zero_point: torch.Tensor,
    group_size: int,
    bits: int = 4,
    symmetric: bool = False,
    damping: float = 0.01,
    nearest: Callable[[torch.Tensor], torch.Tensor] = torch.round,
) -> torch.Tensor:
    """Round a weight input by input; each rounding error is made good by the inputs still to come.

    Inputs go in the order of falling activation power. One that never fires is rounded to nearest.

    Args:
        weight: `(out, in)`, finite.
        hessian: `(in, in)`, the mean of x xᵀ over calibration tokens.
        scale, zero_point: `(out, n_groups, 1)`, from `group_qparams`.
        group_size, bits, symmetric: what they were chosen with.
        damping: share of the mean diagonal added to the diagonal, so that a singular Hessian has
            an inverse; more than 0.
        nearest: rounds `weight / scale` to the grid; its points must be integers within `bits`.

    Returns:
        Codes `(out, in)`, uint8, or int8 when symmetric.

    Raises:
        TypeError, ValueError: see `check_input` and `check_hessian`.

    Source: Frantar et al., "GPTQ", arXiv 2210.17323; static groups and order as in its code.
    """
    check_input(weight, bits)
    check_hessian(hessian, weight.shape[1], damping)
    order, factor = inverse_factor(hessian, damping)
    rows = weight.float().T.contiguous()[order]  # one row an input
    scales, zeros = (x[..., 0].T.contiguous()[order // group_size] for x in (scale, zero_point))
    lowest, highest = (end - zeros for end in integer_range(bits, symmetric))
    steps, spread = torch.empty_like(rows), factor / factor.diagonal()[:, None]
    lines = list(zip(rows, steps, scales, lowest, highest, strict=True))
    for first in range(0, len(rows), 32):
        last = min(first + 32, len(rows))
        for j in range(first, last):
            row, step, s, low, high = lines[j]
            torch.clamp(nearest(row / s), low, high, out=step)
            row.addcmul_(step, s, value=-1)  # from here on, its rounding error
            rows[j + 1 : last].addr_(spread[j, j + 1 : last], row, alpha=-1)
        rows[last:].addmm_(spread[first:last, last:].T, rows[first:last], alpha=-1)
    codes = (steps + zeros).to(torch.int8 if symmetric else torch.uint8)
    return codes[order.argsort()].T.contiguous()


def pack_bits(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Pack codes of any width without gaps; each row begins with a new byte.

    Args:
        codes: uint8 `(..., n)`, 0 to 2**bits − 1.
        bits: 1 to 8.

    Returns:
        uint8 `(..., ceil(n · bits / 8))`; the lowest bit of the first code is bit 0 of byte 0.
    """
    if bits == 8 or (bits == 4 and codes.shape[-1] % 2 == 0):  # the common widths, quicker
        return codes if bits == 8 else codes[..., 0::2] | (codes[..., 1::2] << 4)
    digits = (codes.numpy()[..., None] >> np.arange(bits, dtype=np.uint8)) & 1
    flat = digits.reshape(*codes.shape[:-1], -1)
    return torch.from_numpy(np.packbits(flat, axis=-1, bitorder="little"))


def unpack_bits(packed: torch.Tensor, bits: int, n: int) -> torch.Tensor:
    """Return the codes `(..., n)` that `pack_bits` packed, uint8."""
    if bits in (4, 8):
        halves = [packed & 0x0F, packed >> 4] if bits == 4 else [packed]
        return torch.stack(halves, dim=-1).flatten(-2)[..., :n]
    flat = np.unpackbits(packed.numpy(), axis=-1, count=n * bits, bitorder="little")
    digits = flat.reshape(*packed.shape[:-1], n, bits)
    return torch.from_numpy(np.packbits(digits, axis=-1, bitorder="little")[..., 0])
