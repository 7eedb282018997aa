"""Exercise 4.2: `outlier_product` takes outlier columns in float and all others in 8-bit codes.

The reference is the definition in numpy, with sums in float64.
"""

import math

import numpy as np
import torch

from labkit.exercises.judge import Exercise, call, judge, misfit, show


def _cases():
    # No code lies half-way between two integers, where rounding may go either way.
    x = torch.tensor([[1.0, -20.0, 0.6], [0.25, 8.0, -1.0]])
    yield x, torch.tensor([[1.0, 0.6, -1.0], [0.3, -0.2, 0.7]]), 6.0
    yield x, torch.tensor([[1.0, 0.6, -1.0]]), math.inf
    yield torch.tensor([[0.0, -20.0], [1.0, 2.0]]), torch.tensor([[1.0, 0.5]]), 6.0
    random = torch.Generator().manual_seed(42)
    for n, inputs, outputs in ((1, 8, 4), (5, 16, 3), (7, 64, 10), (12, 33, 5)):
        for threshold in (2.5, 6.0, math.inf):
            x = torch.randn(n, inputs, generator=random)
            x[:, ::7] *= 10
            yield x, torch.randn(outputs, inputs, generator=random), threshold


def _check(function) -> None:
    judge("outlier_product", function, _cases(), _examine, _WRONG)


def _codes(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    scale = np.abs(values).max(1, keepdims=True) / np.float32(127)
    scale[scale == 0] = 1
    return np.round(values / scale), scale


def _examine(x, weight, threshold, got) -> str | None:
    written = call("outlier_product", x, weight, threshold)
    if complaint := misfit(got, torch.float32, (len(x), len(weight))):
        return f"{written} returns {complaint}"
    x, weight = x.numpy(), weight.numpy()
    out = (np.abs(x) > threshold).any(0)
    (codes, scale), (rows, steps) = _codes(np.where(out, np.float32(0), x)), _codes(weight)
    expected = (codes.astype(np.float64) @ rows.T) * scale * steps.T + x[:, out] @ weight[:, out].T
    bad = ~np.isclose(got.numpy(), expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max())
    if not bad.any():
        return None
    at = tuple(int(i) for i in np.argwhere(bad)[0])
    return f"{written} gives {show(float(got[at]))} at {at}, expected {show(float(expected[at]))}"


def _int8(values):
    scale = (values.abs().amax(1, keepdim=True) / 127).clamp(min=1e-30)
    return (values / scale).round(), scale


def _product(x, weight, rest, floats):
    (codes, scale), (rows, steps) = _int8(rest), _int8(weight)
    return codes @ rows.T * scale * steps.T + floats @ weight.T


def single_values(x, weight, threshold):
    """Takes single values out, not whole columns."""
    out = x.abs() > threshold
    return _product(x, weight, x.masked_fill(out, 0), x * out)


def positive_outliers(x, weight, threshold):
    """Compares x, not its magnitude."""
    out = (x > threshold).any(0)
    return _product(x, weight, x.masked_fill(out, 0), x * out)


def whole_rows(x, weight, threshold):
    """Takes tokens out instead of features."""
    out = (x.abs() > threshold).any(1, keepdim=True)
    return _product(x, weight, x.masked_fill(out, 0), x * out)


def counted_twice(x, weight, threshold):
    """Adds the float part, but leaves it in the integer part."""
    out = (x.abs() > threshold).any(0)
    return _product(x, weight, x, x * out)


def left_out(x, weight, threshold):
    """Forgets to add the float part."""
    out = (x.abs() > threshold).any(0)
    return _product(x, weight, x.masked_fill(out, 0), torch.zeros_like(x))


def scale_with_outliers(x, weight, threshold):
    """Chooses the scales before the outliers are gone."""
    out = (x.abs() > threshold).any(0)
    _, scale = _int8(x)
    rows, steps = _int8(weight)
    codes = (x.masked_fill(out, 0) / scale).round()
    return codes @ rows.T * scale * steps.T + (x * out) @ weight.T


def one_scale(x, weight, threshold):
    """Uses one scale for all tokens."""
    out = (x.abs() > threshold).any(0)
    rest = x.masked_fill(out, 0)
    scale = (rest.abs().amax() / 127).clamp(min=1e-30)
    rows, steps = _int8(weight)
    return (rest / scale).round() @ rows.T * scale * steps.T + (x * out) @ weight.T


def scale_of_zero(x, weight, threshold):
    """Divides a token of zeros by a scale of zero."""
    out = (x.abs() > threshold).any(0)
    rest = x.masked_fill(out, 0)
    scale = rest.abs().amax(1, keepdim=True) / 127
    rows, steps = _int8(weight)
    return (rest / scale).round() @ rows.T * scale * steps.T + (x * out) @ weight.T


def sums_in_int8(x, weight, threshold):
    """Adds the products up in 8 bits, where they overflow."""
    out = (x.abs() > threshold).any(0)
    (codes, scale), (rows, steps) = _int8(x.masked_fill(out, 0)), _int8(weight)
    sums = (codes.long() @ rows.long().T).to(torch.int8)
    return sums * scale * steps.T + (x * out) @ weight.T


_WRONG = (
    (scale_of_zero, "a token without anything left has scale 0, and 0/0 is NaN: clamp the scale"),
    (positive_outliers, "outliers have two signs: compare magnitudes"),
    (single_values, "a column goes to float as a whole, for all tokens"),
    (whole_rows, "outliers sit in features: take columns of x, not rows"),
    (counted_twice, "the outlier columns count twice: set them to 0 in the integer part"),
    (left_out, "the float part is missing from the sum"),
    (scale_with_outliers, "choose the scales when the outliers are gone; that is the whole point"),
    (one_scale, "each token has a scale of its own"),
    (sums_in_int8, "add up in 32 bits: a single product already exceeds int8"),
)


def outliers_by_columns(x, weight, threshold):
    """Cuts the columns out, in float64."""
    out = (x.abs() > threshold).any(0)
    rows, steps = _int8(weight)
    total = x[:, out].double() @ weight[:, out].double().T
    if not out.all():
        codes, scale = _int8(x[:, ~out])
        total += codes.double() @ rows[:, ~out].double().T * scale * steps.T
    return total.float()


def outliers_in_integers(x, weight, threshold):
    """Multiplies real integers, a token at a time."""
    out = (x.abs() > threshold).any(0)
    rows, steps = _int8(weight)
    lines = []
    for token in x:
        codes, scale = _int8(token.masked_fill(out, 0)[None])
        sums = rows.int() @ codes[0].int()
        lines.append(sums * scale[0] * steps[:, 0] + weight[:, out] @ token[out])
    return torch.stack(lines)


EXERCISE = Exercise(
    id="4.2",
    title="A product in two arithmetics",
    stars=2,
    minutes=20,
    function_names=("outlier_product",),
    check=_check,
    takeaway="A few columns in float, and the scales of all others become fine.",
    wrong_answers=_WRONG,
    variants=(outliers_by_columns, outliers_in_integers),
)
