"""What the quantizers refuse: each argument is checked once, at the door, and named."""

import math
from numbers import Integral

import torch

SMALLEST_FP16 = 2.0**-24  # above 0; also the distance between its numbers below 2**-14


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


def check_shapes(x: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor) -> None:
    """Refuse a grid that would broadcast by accident, as a scale `(out,)` of a square weight does.

    Raises:
        ValueError: if `scale` or `zero_point` is no single value, and has not as many dimensions as
            `x`, each 1 or the same.
    """
    for name, part in (("scale", scale), ("zero_point", zero_point)):
        if not isinstance(part, torch.Tensor) or part.shape == x.shape:
            continue
        if part.numel() == 1 and part.ndim <= x.ndim:
            continue
        pairs = zip(part.shape, x.shape, strict=False)
        if part.ndim != x.ndim or any(n not in (1, size) for n, size in pairs):
            raise ValueError(
                f"{name} of shape {tuple(part.shape)} does not fit values of shape "
                f"{tuple(x.shape)}: as many dimensions, each 1 or the same, or a single value"
            )


def check_grid(
    x: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor, bits: int, symmetric: bool
) -> None:
    """Refuse a grid on which values `x` cannot be rounded.

    Raises:
        TypeError: if `scale` or `zero_point` is no tensor.
        ValueError: see `check_shapes`; also if a scale is not positive and finite, or a zero point
            no code of the grid: an integer from 0 to 2**bits − 1, or 0 when symmetric.
    """
    if not isinstance(scale, torch.Tensor) or not isinstance(zero_point, torch.Tensor):
        kinds = f"{type(scale).__name__} and {type(zero_point).__name__}"
        raise TypeError(f"scale and zero_point must be tensors, not {kinds}")
    check_shapes(x, scale, zero_point)
    low, high = scale.detach().aminmax()
    if not 0 < low <= high < math.inf:
        raise ValueError(
            "scale must be positive and finite everywhere; use choose_qparams to get one"
        )
    low, high = zero_point.detach().aminmax()
    highest = 0 if symmetric else 2**bits - 1
    if not 0 <= low <= high <= highest or not torch.equal(zero_point, zero_point.round()):
        kind = "symmetric" if symmetric else "asymmetric"
        raise ValueError(
            f"zero_point must hold integers from 0 to {highest} on a {kind} grid of {bits} bits, "
            f"not {float(low):g} to {float(high):g}; bits and symmetric must be those of the grid"
        )


def check_groups(
    weight: torch.Tensor,
    scale: torch.Tensor,
    zero_point: torch.Tensor,
    group_size: int,
    shared_zero: bool = False,
) -> None:
    """Refuse a grid of other groups: ValueError unless both parts are `(out, n_groups, 1)`.

    Args:
        weight: `(out, in)`, or codes of this shape.
        shared_zero: whether `zero_point` may also be a single value.

    Raises:
        TypeError, ValueError: see `check_group_size`.
    """
    check_group_size(weight, group_size)
    expected = (len(weight), -(-weight.shape[1] // group_size), 1)
    single = not isinstance(zero_point, torch.Tensor) or zero_point.numel() == 1
    parts = {"scale": scale, "zero_point": scale if shared_zero and single else zero_point}
    for name, part in parts.items():
        if (shape := tuple(getattr(part, "shape", ()))) != expected:
            raise ValueError(
                f"{name} must be {expected}, one for each row and group of group_size={group_size} "
                f"inputs, not {shape}; group_size must be that of group_qparams"
            )


def check_group_grid(
    weight: torch.Tensor,
    scale: torch.Tensor,
    zero_point: torch.Tensor,
    group_size: int,
    bits: int,
    symmetric: bool,
) -> None:
    """Refuse a grid that is not the weight's own: other groups, bits or symmetry.

    Raises:
        TypeError, ValueError: see `check_groups` and `check_grid`; ValueError too if the zero
            points are those of a symmetric grid, `symmetric` is not set, and the weight is signed.
    """
    check_groups(weight, scale, zero_point, group_size)
    check_grid(scale, scale, zero_point, bits, symmetric)
    if symmetric or zero_point.any():
        return
    steps = scale[..., 0].repeat_interleave(group_size, dim=1)[:, : weight.shape[1]]
    if (weight < -0.75 * steps).any():  # more than rounding would leave below 0
        raise ValueError(
            "zero_point is 0 everywhere, but weight has negative values: pass symmetric=True, as "
            "to group_qparams"
        )


def check_group_size(weight: torch.Tensor, group_size: int) -> None:
    """Refuse groups that cannot be cut.

    Raises:
        TypeError: if `group_size` is no integer.
        ValueError: if `weight` is no matrix or `group_size` is not from 1 to its inputs.
    """
    if weight.ndim != 2:
        raise ValueError(f"weight must be (out, in), not of shape {tuple(weight.shape)}")
    if isinstance(group_size, bool) or not isinstance(group_size, Integral):
        raise TypeError(f"group_size must be an integer, not {group_size!r}")
    if not 1 <= group_size <= weight.shape[1]:
        raise ValueError(
            f"group_size must be from 1 to the {weight.shape[1]} inputs, not {group_size}"
        )


def check_reach(weight: torch.Tensor, scale: torch.Tensor) -> None:
    """Refuse a weight that its scales, the smallest that FP16 holds, would round to zeros.

    Raises:
        ValueError: if every scale is above all magnitudes of `weight`, and not all of these are 0.
    """
    finest = scale.detach().min()
    if finest <= SMALLEST_FP16 and 0 < (reach := weight.detach().abs().max()) < finest:
        raise ValueError(
            f"weight: its largest magnitude, {float(reach):.3g}, is below the smallest scale that "
            f"FP16 holds, {SMALLEST_FP16:.3g}: all would be 0. Multiply it by a power of 2 first"
        )


def check_search(importance: torch.Tensor | None, inputs: int, steps: int) -> None:
    """Refuse an `importance` not `(inputs,)`, finite and from 0 up, and `steps` under 1.

    Raises:
        ValueError: if either is refused.
    """
    if isinstance(steps, bool) or not isinstance(steps, Integral) or steps < 1:
        raise ValueError(f"steps must be an integer from 1 up, not {steps!r}")
    if importance is None:
        return
    if not isinstance(importance, torch.Tensor) or importance.shape != (inputs,):
        came = tuple(getattr(importance, "shape", ())) or type(importance).__name__
        raise ValueError(f"importance must be a tensor ({inputs},), one value an input, not {came}")
    low, high = importance.detach().aminmax()
    if not 0 <= low <= high < math.inf:
        raise ValueError(
            f"importance must be finite and not negative, not {float(low):g} to {float(high):g}"
        )


def check_hessian(hessian: torch.Tensor, inputs: int, damping: float) -> None:
    """Refuse a Hessian and a damping that GPTQ cannot use.

    Raises:
        ValueError: if `hessian` is not `(inputs, inputs)`, finite and with a diagonal from 0 up, or
            `damping` is not above 0; also if `hessian` is not symmetric, but for rounding.
    """
    if (
        hessian.shape != (inputs, inputs)
        or not torch.isfinite(torch.stack(hessian.aminmax())).all()
    ):
        raise ValueError(f"hessian must be ({inputs}, {inputs}) and finite: check the activations")
    if (smallest := hessian.diagonal().min()) < 0:
        raise ValueError(
            f"hessian must have a diagonal from 0 up, a mean of squares, not {float(smallest):g}"
        )
    off = (hessian - hessian.T).abs().max()
    if off > 1e-3 * hessian.abs().max():
        raise ValueError(
            f"hessian must be symmetric, a mean of x xᵀ, but differs from its transpose by "
            f"{float(off):.3g}"
        )
    if not 0 < damping < math.inf:
        raise ValueError(f"damping must be above 0, for example 0.01, not {damping}")
