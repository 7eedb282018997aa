"""Exercise 2.1: `percentile_range` keeps the middle of the values and cuts off both tails.

The reference is numpy's `percentile` in float64.
"""

import math
from numbers import Real

import numpy as np
import torch

from labkit.exercises.judge import Exercise, call, judge, kind, show
from labkit.exercises.named_errors import Explained, explain_errors

_IN_PERCENT = "a quantile is a fraction from 0 to 1: divide percent by 100"
_EACH_ROW = "one range for the whole tensor, not one for each row: flatten it first"
_SCALARS = ("more than one value", "converted to Scalar", "only one element tensors")  # in errors


def _check(function) -> None:
    random = torch.Generator().manual_seed(21)
    cases = [(torch.arange(101.0), 90.0), (torch.arange(-100.0, 1), 90.0), (-torch.ones(1), 99.0)]
    cases += [(torch.tensor([5.0, 6.0, 9.0]), 50.0), (torch.tensor([-4.0, 2.0, 1.0, -3.0]), 50.0)]
    for percent, shape in ((100.0, (7,)), (99.0, (4, 50)), (99.9, (30, 200)), (80.0, (2, 3, 40))):
        for shift in (0.0, 3.0, -2.0):
            cases.append((torch.randn(shape, generator=random) ** 3 + shift, percent))
    judge("percentile_range", explain_errors(function, _explain), cases, _examine, _WRONG)


def _explain(error, x, percent) -> str | None:
    if "range [0, 1]" in str(error):
        return _IN_PERCENT
    return _EACH_ROW if x.ndim > 1 and any(words in str(error) for words in _SCALARS) else None


def _examine(x, percent, got) -> str | None:
    written = call("percentile_range", x, percent)
    if isinstance(got, Explained):
        return got.complaint(written, "a pair of floats")
    pair = isinstance(got, tuple | list) and len(got) == 2
    if not pair or not all(isinstance(end, Real) and not isinstance(end, bool) for end in got):
        came = f"({', '.join(map(kind, got))})" if pair else kind(got)
        hint = _hint(got, x) if pair or isinstance(got, torch.Tensor) else ""
        return f"{written} returns {came}, expected a pair of floats (low, high){hint}"
    low, high = np.percentile(x.double().numpy(), [50 - percent / 2, 50 + percent / 2])
    expected = min(low, 0.0), max(high, 0.0)
    close = 1e-4 * max(1e-30, expected[1] - expected[0])
    if all(abs(a - b) <= close for a, b in zip(got, expected, strict=True)):
        return None
    return f"{written} gives {show(tuple(got))}, expected {show(expected)}"


def _hint(got, x) -> str:
    if isinstance(got, torch.Tensor):
        return ": take .tolist()" if got.shape == (2,) else ""
    tensors = [end for end in got if isinstance(end, torch.Tensor)]
    if tensors and all(end.ndim == 0 for end in tensors):
        return ": take .item()"
    return f": {_EACH_ROW}" if x.ndim > 1 and len(tensors) == 2 else ""


def _ends(x, low, high, zero=True):
    low, high = (float(np.quantile(x.double().numpy(), q)) for q in (low, high))
    return (min(low, 0.0), max(high, 0.0)) if zero else (low, high)


def whole_tail_at_each_end(x, percent):
    """Cuts 100 − percent off each end."""
    tail = min(0.5, 1 - percent / 100)
    return _ends(x, tail, 1 - tail)


def upper_end_only(x, percent):
    """Keeps the minimum and cuts at the top."""
    return _ends(x, 0, percent / 100)


def percentile_without_zero(x, percent):
    """Leaves zero outside where all values have one sign."""
    return _ends(x, 0.5 - percent / 200, 0.5 + percent / 200, zero=False)


def ends_pushed_past_zero(x, percent):
    """Exchanges min and max where zero is let in."""
    low, high = _ends(x, 0.5 - percent / 200, 0.5 + percent / 200, zero=False)
    return max(low, 0.0), min(high, 0.0)


def high_before_low(x, percent):
    """Returns the upper end first."""
    return _ends(x, 0.5 - percent / 200, 0.5 + percent / 200)[::-1]


def tail_in_percent(x, percent):
    """Asks for a quantile in percent, not as a fraction."""
    low, high = x.flatten().quantile((100 - percent) / 2), x.flatten().quantile(percent)
    return min(low.item(), 0.0), max(high.item(), 0.0)


def quantile_of_each_row(x, percent):
    """Takes the quantiles of the last dimension."""
    low, high = (x.quantile(q, dim=-1) for q in (0.5 - percent / 200, 0.5 + percent / 200))
    return min(low.item(), 0.0), max(high.item(), 0.0)


def magnitudes(x, percent):
    """Takes the percentile of |x| and mirrors it."""
    high = float(np.quantile(x.abs().double().numpy(), percent / 100))
    return -high, high


def minimum_and_maximum(x, percent):
    """Ignores the percentage."""
    return _ends(x, 0, 1)


def share_of_the_range(x, percent):
    """Shrinks the range by the percentage, whatever the values in it."""
    low, high = _ends(x, 0, 1)
    return low * percent / 100, high * percent / 100


_WRONG = (
    (whole_tail_at_each_end, "what is left out is shared by two ends: (100 − percent) / 2 each"),
    (upper_end_only, "the lower end has a tail too"),
    (percentile_without_zero, "zero must be inside the range: it has to be a grid point"),
    (ends_pushed_past_zero, "low is at most 0 and high at least 0: min(low, 0.0), max(high, 0.0)"),
    (high_before_low, "the pair is (low, high): the lower end comes first"),
    (tail_in_percent, _IN_PERCENT),
    (quantile_of_each_row, _EACH_ROW),
    (magnitudes, "a range of |x| is symmetric; cut the two ends of x itself"),
    (minimum_and_maximum, "this is min-max: the percentage has no effect"),
    (share_of_the_range, "a percentile counts values; this shrinks the range instead"),
)


def percentile_by_sorting(x, percent):
    """Sorts, interpolates between neighbors, and lets zero in as an int."""
    values, ends = sorted(x.flatten().tolist()), []
    for fraction in (0.5 - percent / 200, 0.5 + percent / 200):
        place = min(max(fraction, 0.0), 1.0) * (len(values) - 1)
        below, above = values[math.floor(place)], values[math.ceil(place)]
        ends.append(below + (place - math.floor(place)) * (above - below))
    return min(0, ends[0]), max(0, ends[1])


def percentile_with_numpy(x, percent):
    """Asks numpy for percentiles, with a zero clamped in."""
    low, high = np.percentile(x.numpy().astype(np.float64), [50 - percent / 2, 50 + percent / 2])
    return np.minimum(low, 0.0), np.maximum(high, 0.0)


EXERCISE = Exercise(
    id="2.1",
    title="A percentile observer",
    stars=1,
    minutes=10,
    function_names=("percentile_range",),
    check=_check,
    takeaway="A percentile trades a large error on few values for a small one on all the others.",
    wrong_answers=_WRONG,
    variants=(percentile_by_sorting, percentile_with_numpy),
)
