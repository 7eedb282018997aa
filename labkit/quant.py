"""The reference quantizers: one function for each numeric step, as chapter 1 writes them out."""

from collections.abc import Callable

import torch

from labkit.arguments import (
    check_grid,
    check_group_grid,
    check_group_size,
    check_groups,
    check_hessian,
    check_input,
    check_reach,
    check_search,
    check_shapes,
)
from labkit.packing import pack_bits as pack_bits
from labkit.packing import to_fp16
from labkit.packing import unpack_bits as unpack_bits

Dims = int | tuple[int, ...] | None


def integer_range(bits: int, symmetric: bool) -> tuple[int, int]:
    """Return the smallest and the largest code: (−127, 127), if symmetric, or (0, 255) at 8 bits.

    The signed range leaves out −128, so that both signs reach equally far.
    """
    if symmetric:
        return -(2 ** (bits - 1) - 1), 2 ** (bits - 1) - 1
    return 0, 2**bits - 1


def choose_qparams(
    x: torch.Tensor, bits: int = 8, symmetric: bool = False, dim: Dims = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Choose scale and zero point from the smallest and the largest value (min-max).

    Zero is always inside the range and always a grid point, so padding and ReLU stay exact.

    Args:
        x: floating-point tensor of any shape, finite.
        bits: width of a code, 2 to 8.
        symmetric: True puts the zero point at 0 and uses signed codes.
        dim: what shares one scale. None: the whole tensor (per tensor). 1 for a weight `(out, in)`:
            per output channel. −1 for activations `(..., features)`: per token; (−2, −1): per
            window. For groups, unflatten first: `w.unflatten(1, (-1, group_size))`, then −1.

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
        scale, zero_point, bits, symmetric: of `choose_qparams`: as many dimensions as `x`, each 1
            or the same, or a single value.

    Returns:
        Codes shaped like `x`: int8 when symmetric, uint8 otherwise. One code a byte: see
        `pack_bits` for less.

    Raises:
        TypeError, ValueError: see `check_input` and `check_grid`.
    """
    check_input(x, bits)
    check_grid(x, scale, zero_point, bits, symmetric)
    qmin, qmax = integer_range(bits, symmetric)
    codes = (x.float() / scale).round() + zero_point
    return codes.clamp(qmin, qmax).to(torch.int8 if symmetric else torch.uint8)


def dequantize(codes: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor) -> torch.Tensor:
    """Return the grid points that the codes stand for: `(codes − zero_point) · scale`, float32.

    Raises:
        ValueError: if `scale` or `zero_point` does not fit the codes, see `check_shapes`.
    """
    check_shapes(codes, scale, zero_point)
    return (codes.float() - zero_point) * scale


def fake_quantize(
    x: torch.Tensor, bits: int = 8, symmetric: bool = False, dim: Dims = None
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
    time. It checks nothing but the shapes.

    Args: as of `quantize`; `x` is float32.

    Raises:
        ValueError: if `scale` or `zero_point` does not fit `x`, see `check_shapes`.
    """
    check_shapes(x, scale, zero_point)
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
        TypeError, ValueError: if `weight` is no matrix, or `group_size` no integer or out of range.
    """
    check_group_size(weight, group_size)
    missing = -weight.shape[1] % group_size
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
        weight, group_size, bits, symmetric: see `to_groups` and `quantize`.

    Raises:
        TypeError, ValueError: see `check_input` and `check_group_grid`.
    """
    check_group_grid(weight, scale, zero_point, group_size, bits, symmetric)
    groups = to_groups(weight, group_size)
    codes = quantize(groups, scale, zero_point, bits, symmetric)
    return codes.flatten(1)[:, : weight.shape[1]]


def dequantize_groups(
    codes: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor, group_size: int
) -> torch.Tensor:
    """Return the weight `(out, in)`, float32, that codes in groups stand for.

    Args:
        codes: `(out, in)`.
        scale: `(out, n_groups, 1)`.
        zero_point: likewise, or a single value.
        group_size: see `to_groups`.

    Raises:
        TypeError, ValueError: if the grid is of other groups, see `check_groups`.
    """
    check_groups(codes, scale, zero_point, group_size, shared_zero=True)
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
        importance: `(in,)`, the weight of each input's squared error, finite, from 0 up. None:
            min-max, no search.
        steps: how many ranges are tried, from the full one down to half of it.

    Returns:
        `scale` and `zero_point`, `(out, n_groups, 1)`, as they are stored: see `stored_qparams`.

    Raises:
        TypeError, ValueError: see `check_input`, `to_groups`, `check_search`, `stored_qparams`.
    """
    check_input(weight, bits)
    check_search(importance, weight.shape[-1], steps)
    groups = to_groups(weight, group_size)
    ends = torch.cat([groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)], dim=-1)
    shrinks = [1.0] if importance is None else torch.linspace(1, 0.5, steps).tolist()
    best = None
    for shrink in shrinks:
        scale, zero_point = stored_qparams(ends * shrink, bits, symmetric)
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


def stored_qparams(
    ends: torch.Tensor, bits: int, symmetric: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Choose scales that FP16 holds, and the zero points that fit them.

    Args:
        ends: `(..., n)`, floating-point; the smallest and the largest of the last dimension count.
        bits, symmetric: the grid, see `choose_qparams`.

    Returns:
        `scale` and `zero_point`, float32 `(..., 1)`.

    Raises:
        TypeError, ValueError: see `check_input`, `check_reach` and `to_fp16`.
    """
    scale = to_fp16(choose_qparams(ends, bits, symmetric, dim=-1)[0], bits)
    check_reach(ends, scale)
    if symmetric:
        return scale, torch.zeros_like(scale)
    low = ends.float().amin(-1, keepdim=True).clamp(max=0)
    return scale, (-low / scale).round().clamp(0, 2**bits - 1)


def inverse_factor(hessian: torch.Tensor, damping: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Return GPTQ's order of the inputs, and the factor that spreads each rounding error.

    Args:
        hessian: `(in, in)`, the mean of x xᵀ.
        damping: share of the mean diagonal added to the diagonal.

    Returns:
        `order`, `(in,)`: inputs by falling activation power. `factor`, `(in, in)`: the upper
        Cholesky factor of the inverse Hessian in that order. An input that never fires (its row is
        zero) gets a 1 on the diagonal, and so neither gives nor takes.

    Raises:
        ValueError: see `check_hessian`.
    """
    check_hessian(hessian, len(hessian), damping)
    power = hessian.diagonal()
    order = power.argsort(descending=True, stable=True)
    damped = hessian.float() + torch.diag((power == 0) + damping * power.mean())
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped[order][:, order]))
    return order, torch.linalg.cholesky(inverse, upper=True)


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
        TypeError, ValueError: see `check_input`, `check_group_grid` and `check_hessian`.

    Source: Frantar et al., "GPTQ", arXiv 2210.17323; static groups and order as in its code.
    """
    check_input(weight, bits)
    check_group_grid(weight, scale, zero_point, group_size, bits, symmetric)
    check_hessian(hessian, weight.shape[1], damping)
    order, factor = inverse_factor(hessian, damping)
    rows = weight.float().T.contiguous()[order]  # one row an input
    scales, zeros = (x[..., 0].float().T[order // group_size] for x in (scale, zero_point))
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
