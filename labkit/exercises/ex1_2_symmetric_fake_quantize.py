"""Exercise 1.2: `symmetric_fake_quantize` rounds a tensor to a symmetric grid with one scale.

The reference is torch's own `fake_quantize_per_tensor_affine`; either side of a tie will do.
"""

import functools
import math

import torch

from labkit.exercises.judge import Exercise, call, insist_on_dtype, judge, misfit, show


def _check(function) -> None:
    random = torch.Generator().manual_seed(12)
    small = (
        ([1.0, -3.0, 0.5], 4),
        ([0.3, 2.0, -1.1], 3),
        ([-0.7], 8),
        ([[3.0, 1.0], [0.2, -0.5]], 4),
    )
    small += ([2.0, 3.0, 2.5], 4), ([0.0, 0.0, 0.0], 8), ([[0.0, 0.0], [0.0, 0.0]], 4)
    small += (([1e-12, -3e-12, 5e-13], 4),)
    cases = [(torch.tensor(x, dtype=torch.float32), bits) for x, bits in small]
    shapes = (
        (2, (9,)),
        (3, (4, 5)),
        (4, (2, 3, 4)),
        (5, ()),
        (6, (64,)),
        (8, (16, 64)),
        (8, (3, 40)),
    )
    for bits, shape in shapes:
        x = torch.randn(shape, generator=random, dtype=torch.float32)
        cases += [(x * 10.0 ** (bits - 5), bits), (x * 1e-12, bits)]
    judge("symmetric_fake_quantize", function, cases, _examine, (*_WRONG, *_OTHER_FORMS))


def _examine(x, bits, got) -> str | None:
    written = call("symmetric_fake_quantize", x, bits)
    insist_on_dtype(f"{written} returns", got, torch.float32, x.shape)
    if complaint := misfit(got, torch.float32, x.shape):
        return f"{written} returns {complaint}"
    limit = 2 ** (bits - 1) - 1
    step = x.abs().max().item() / limit
    if step == 0:
        expected = allowed = torch.zeros_like(x)
    else:
        expected = torch.fake_quantize_per_tensor_affine(x, step, 0, -limit, limit)
        tie = ((x.double() / step).frac().abs() - 0.5).abs() < 1e-3
        allowed = step * (1e-3 + tie)
    if ((got - expected).abs() <= allowed).all():
        return None
    if x.numel() <= 3:
        return f"{written} gives {show(got)}, expected {show(expected)}"
    worst = ((got - expected).abs() - allowed).nan_to_num(math.inf).argmax()
    values = [show(t.flatten()[worst].item()) for t in (x, got, expected)]
    return "{} turns {} into {}, expected {}".format(written, *values)


def _to_grid(x, scale, low, high, rounding=torch.round):
    return torch.nan_to_num(rounding(x / scale)).clamp(low, high) * scale


def largest_x(x, bits):
    """Takes the scale from max x, so a large negative value is clipped."""
    limit = 2 ** (bits - 1) - 1
    return _to_grid(x, x.max() / limit, -limit, limit)


def cut_off(x, bits):
    """Truncates toward zero where it should round to nearest."""
    limit = 2 ** (bits - 1) - 1
    return _to_grid(x, x.abs().max() / limit, -limit, limit, rounding=torch.trunc)


def next_code_below(x, bits):
    """Takes the floor where it should round to nearest."""
    limit = 2 ** (bits - 1) - 1
    return _to_grid(x, x.abs().max() / limit, -limit, limit, rounding=torch.floor)


def all_levels_on_each_side(x, bits):
    """Divides by 2^b − 1 and clips there too: that grid needs b + 1 bits."""
    limit = 2**bits - 1
    return _to_grid(x, x.abs().max() / limit, -limit, limit)


def scale_of_the_unsigned_range(x, bits):
    """Divides by 2^b − 1 but clips at 2^(b−1) − 1, so the larger half is clipped."""
    limit = 2 ** (bits - 1) - 1
    return _to_grid(x, x.abs().max() / (2**bits - 1), -limit, limit)


def scale_of_one_code_more(x, bits):
    """Divides the whole range by 2^b − 1, the steps of 2^b codes, and clips the larger code."""
    limit = 2 ** (bits - 1) - 1
    return _to_grid(x, 2 * x.abs().max() / (2**bits - 1), -limit, limit)


def one_code_more(x, bits):
    """Divides the whole range by 2^b − 1 and does not clip."""
    return _to_grid(x, 2 * x.abs().max() / (2**bits - 1), -math.inf, math.inf)


def full_negative_range(x, bits):
    """Divides by 2^(b−1), a code that only the negative side has."""
    limit = 2 ** (bits - 1)
    return _to_grid(x, x.abs().max() / limit, -limit, limit - 1)


def codes_only(x, bits):
    """Stops at the codes and never multiplies by the scale."""
    limit = 2 ** (bits - 1) - 1
    return torch.nan_to_num(x / (x.abs().max() / limit)).round()


def multiplied_first(x, bits):
    """Multiplies by the scale to find the codes, and divides to come back."""
    scale = x.abs().max() / (2 ** (bits - 1) - 1)
    return torch.nan_to_num((x * scale).round() / scale)


def zero_divided_by_zero(x, bits):
    """Divides by a scale of 0 when the whole tensor is 0."""
    scale = x.abs().max() / (2 ** (bits - 1) - 1)
    return (x / scale).round() * scale


def largest_x_unclipped(x, bits):
    """Takes the scale from max x and does not clip, so large negative values get more codes."""
    scale = x.max() / (2 ** (bits - 1) - 1)
    return torch.nan_to_num(x / scale).round() * scale


def min_to_max(x, bits):
    """Stretches an asymmetric grid from min x to max x."""
    scale = (x.max() - x.min()) / (2**bits - 1)
    return x.min() + torch.nan_to_num((x - x.min()) / scale).round() * scale


def asymmetric_with_zero(x, bits):
    """Lays an asymmetric grid, with a zero point, from min x to max x and 0."""
    low, high = x.amin().clamp(max=0), x.amax().clamp(min=0)
    scale = (high - low) / (2**bits - 1)
    zero = torch.nan_to_num(-low / scale).round()
    codes = (torch.nan_to_num(x / scale).round() + zero).clamp(0, 2**bits - 1)
    return (codes - zero) * scale


def scale_a_row(x, bits):
    """Gives each row (the last dimension) a scale of its own."""
    limit = 2 ** (bits - 1) - 1
    largest = x.abs().amax(-1, keepdim=True) if x.ndim else x.abs()
    return _to_grid(x, largest / limit, -limit, limit)


def floored_scale(x, bits, least=1e-8):
    """Keeps the scale above a floor that small tensors lie below."""
    limit = 2 ** (bits - 1) - 1
    return _to_grid(x, (x.abs().max() / limit).clamp(min=least), -limit, limit)


def brackets_forgotten(x, bits, clip=False, least=-math.inf):
    """Divides by 2^(b−1) and then subtracts 1 from the scale."""
    limit = 2 ** (bits - 1) - 1 if clip else math.inf
    scale = (x.abs().max() / 2 ** (bits - 1) - 1).clamp(min=least)
    return _to_grid(x, scale, -limit, limit)


_WRONG = (
    (largest_x, "the scale comes from the largest |x|, not from the largest x"),
    (largest_x_unclipped, "take the scale from the largest |x|, or codes leave the range"),
    (cut_off, "round to the nearest code instead of cutting the fraction off"),
    (next_code_below, "the nearest code is asked for, not the next one below (floor)"),
    (all_levels_on_each_side, "2^b − 1 codes on each side of 0 need b + 1 bits"),
    (scale_of_the_unsigned_range, "a scale of max |x| / (2^b − 1) is too small: large values clip"),
    (
        scale_of_one_code_more,
        "2 · max |x| / (2^b − 1) is the scale of 2^b codes; a symmetric grid has 2^b − 1",
    ),
    (
        one_code_more,
        "with 2 · max |x| / (2^b − 1) the largest |x| gets the code 2^(b−1), one too many",
    ),
    (full_negative_range, "divide by 2^(b−1) − 1: the code 2^(b−1) exists only as a negative"),
    (codes_only, "these are the codes; multiply them by the scale to come back to real values"),
    (zero_divided_by_zero, "an all-zero tensor has the scale 0, and 0 / 0 is NaN"),
    (min_to_max, "a symmetric grid is centered on 0; this one is laid from min x to max x"),
    (asymmetric_with_zero, "this grid has a zero point; a symmetric one reaches equally far"),
    (scale_a_row, "this is one scale a row; the whole tensor shares one"),
    (
        floored_scale,
        "a floor under the scale changes tensors whose scale lies below it (the rows of Exercise "
        "1.3 lie above its 1e-8): guard against 0 alone",
    ),
    (
        brackets_forgotten,
        "brackets forgotten: max |x| / 2 ** (bits - 1) - 1 subtracts 1 from the scale",
    ),
    (
        multiplied_first,
        "codes are x divided by the scale, and come back times the scale; this turns it round",
    ),
)
_MESSAGES = dict(_WRONG)
_OTHER_FORMS = tuple(
    (functools.partial(function, **options), _MESSAGES[function])
    for function, options in (
        (brackets_forgotten, {"clip": True}),
        (brackets_forgotten, {"least": 1e-30}),
        (brackets_forgotten, {"clip": True, "least": 1e-30}),
        (brackets_forgotten, {"clip": True, "least": 1e-8}),
        (brackets_forgotten, {"least": 1e-8}),
        (floored_scale, {"least": 1e-5}),
        (floored_scale, {"least": 1e-6}),
        (floored_scale, {"least": 1e-10}),
        (floored_scale, {"least": 1e-12}),
    )
)


def symmetric_one_by_one(x, bits):
    """Plain Python over single values."""
    limit = 2 ** (bits - 1) - 1
    scale = max((abs(value) for value in x.flatten().tolist()), default=0.0) / limit or 1.0
    values = [round(v / scale) * scale for v in x.flatten().tolist()]
    return torch.tensor(values, dtype=torch.float32).view(x.shape)


def symmetric_in_double(x, bits):
    """Works in float64, ties away from zero, and floors the scale at a tiny value."""
    limit = 2 ** (bits - 1) - 1
    scale = torch.clamp(x.double().abs().max() / limit, min=1e-30)
    codes = torch.floor(x.double().abs() / scale + 0.5).clamp(0, limit)
    return (x.sign() * codes * scale).float()


EXERCISE = Exercise(
    id="1.2",
    title="Symmetric fake quantization",
    stars=1,
    minutes=10,
    function_names=("symmetric_fake_quantize",),
    check=_check,
    takeaway="One number, the largest |x|, sets the step for all the others.",
    wrong_answers=_WRONG,
    variants=(symmetric_one_by_one, symmetric_in_double),
)
