"""The reference quantizers: one function for each numeric step, as chapter 1 writes them out."""

import torch


def check_input(x: torch.Tensor, bits: int) -> None:
    """Refuse what no quantizer can handle.

    Args:
        x: any shape; must be a floating-point tensor, not empty, all finite.
        bits: must be an integer from 2 to 8.

    Raises:
        TypeError: if `x` is no floating-point tensor or `bits` no integer.
        ValueError: if `x` is empty or holds NaN or infinity, or `bits` is out of range.
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
    finite = torch.isfinite(x.float())  # in float32, in which every step computes
    if not finite.all():
        bad = int((~finite).sum())
        raise ValueError(f"x holds {bad} NaN or infinite value(s); remove them before quantizing")


def integer_range(bits: int, symmetric: bool) -> tuple[int, int]:
    """Return the smallest and the largest code.

    Args:
        bits: width of a code.
        symmetric: True for signed codes around 0, False for unsigned codes from 0.

    Returns:
        `(qmin, qmax)`: (−127, 127) or (0, 255) at 8 bits. The signed range leaves out −128, so that
        both signs reach equally far.
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
        scale: positive, broadcastable against `x`.
        zero_point: integer-valued, broadcastable against `x`.
        bits: width of a code, 2 to 8.
        symmetric: the range of `integer_range`; must be what `choose_qparams` was given.

    Returns:
        Codes shaped like `x`: int8 when symmetric, uint8 otherwise. One code a byte: see
        `pack_int4` for two.

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
    """Quantize and dequantize at once: the rounding error without the saved bytes.

    Args, errors: as in `choose_qparams`.

    Returns:
        float32 tensor shaped like `x`.
    """
    scale, zero_point = choose_qparams(x, bits, symmetric, dim)
    return dequantize(quantize(x, scale, zero_point, bits, symmetric), scale, zero_point)


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
    padded = torch.nn.functional.pad(weight, (0, -inputs % group_size))
    return padded.unflatten(1, (-1, group_size))


def gptq(
    weight: torch.Tensor,
    hessian: torch.Tensor,
    scale: torch.Tensor,
    zero_point: torch.Tensor,
    group_size: int,
    bits: int = 4,
    symmetric: bool = False,
    damping: float = 0.01,
) -> torch.Tensor:
    """Round a weight input by input; each rounding error is made good by the inputs still to come.

    Inputs go in the order of falling activation power. One that never fires (its Hessian row is
    zero) is rounded to nearest.

    Args:
        weight: `(out, in)`, finite.
        hessian: `(in, in)`, the mean of x xᵀ over calibration tokens.
        scale, zero_point: `(out, n_groups, 1)`, from `choose_qparams(to_groups(...), dim=-1)`.
        group_size, bits, symmetric: what they were chosen with.
        damping: share of the mean diagonal added to the diagonal, so that a singular Hessian has
            an inverse; more than 0.

    Returns:
        Codes `(out, in)`, uint8, or int8 when symmetric.

    Raises:
        TypeError, ValueError: see `check_input`; ValueError too for a Hessian of another shape or
            with NaN or infinity (were the activations finite?), or a `damping` not above 0.

    Source: Frantar et al., "GPTQ", arXiv 2210.17323; static groups and order as in its code.
    """
    check_input(weight, bits)
    inputs = weight.shape[1]
    if hessian.shape != (inputs, inputs) or not torch.isfinite(hessian).all():
        raise ValueError(f"hessian must be ({inputs}, {inputs}) and finite: check the activations")
    if damping <= 0:
        raise ValueError(f"damping must be above 0, for example 0.01, not {damping}")
    power = hessian.diagonal()
    order = power.argsort(descending=True, stable=True)
    hessian = hessian.float() + torch.diag((power == 0) + damping * power.mean())
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(hessian[order][:, order]))
    factor = torch.linalg.cholesky(inverse, upper=True)
    rows = weight.float().T[order]  # one row an input, in memory order
    codes = torch.empty_like(rows)
    qmin, qmax = integer_range(bits, symmetric)
    for start in range(0, inputs, 64):
        block = slice(start, min(start + 64, inputs))
        errors = torch.zeros_like(rows[block])
        for j in range(block.start, block.stop):
            group = order[j] // group_size
            s, z = scale[:, group, 0], zero_point[:, group, 0]
            codes[j] = ((rows[j] / s).round() + z).clamp(qmin, qmax)
            errors[j - start] = (rows[j] - (codes[j] - z) * s) / factor[j, j]
            rows[j + 1 : block.stop] -= torch.outer(
                factor[j, j + 1 : block.stop], errors[j - start]
            )
        rows[block.stop :] -= factor[block, block.stop :].T @ errors
    return codes[order.argsort()].T.contiguous().to(torch.int8 if symmetric else torch.uint8)


def pack_int4(codes: torch.Tensor) -> torch.Tensor:
    """Put two 4-bit codes into each byte, the first of a pair in the low half.

    Args:
        codes: uint8 tensor `(..., n)`, n even, values 0 to 15. Add 8 to signed codes first.

    Returns:
        uint8 tensor `(..., n / 2)`.

    Raises:
        TypeError: if `codes` is not uint8.
        ValueError: if n is odd or a code is above 15.
    """
    if codes.dtype != torch.uint8:
        raise TypeError(f"codes must be uint8, not {codes.dtype}; add 8 to signed codes first")
    if codes.shape[-1] % 2:
        raise ValueError(f"codes: the last dimension must be even, not {codes.shape[-1]}; pad it")
    if (codes > 15).any():
        raise ValueError(f"codes must be from 0 to 15, not {int(codes.max())}")
    return codes[..., 0::2] | (codes[..., 1::2] << 4)


def unpack_int4(packed: torch.Tensor) -> torch.Tensor:
    """Undo `pack_int4`.

    Args:
        packed: uint8 tensor `(..., n)`.

    Returns:
        uint8 tensor `(..., 2 n)`, values 0 to 15.

    Raises:
        TypeError: if `packed` is not uint8.
    """
    if packed.dtype != torch.uint8:
        raise TypeError(f"packed must be uint8, not {packed.dtype}")
    return torch.stack([packed & 0x0F, packed >> 4], dim=-1).flatten(-2)
