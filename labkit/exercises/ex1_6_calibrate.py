"""Exercise 1.6: `calibrate` finds one static 8-bit grid that covers all calibration batches.

The reference is torch's own `MinMaxObserver`.
"""

import functools
import math

import numpy as np
import torch

from labkit.exercises.judge import Exercise, Wrong, judge, kind, show


def _check(function) -> None:
    random = torch.Generator().manual_seed(16)
    lists = [[[-1.0, 2.0], [5.0, 0.0], [1.0]], [[2.0, 3.0], [4.0]], [[-4.0], [-2.0, -3.0]]]
    lists += [[[-0.5, 1.0], [0.25, 0.0]]], [[-1.0, 2.5]], [[-1.0], [1.6, 0.5]]
    cases = [([torch.tensor(x, dtype=torch.float32) for x in batches],) for batches in lists]
    for shapes in (((4, 8), (2, 8), (7, 8)), ((3,), (2, 5), (1, 2, 3)), ((64, 32),) * 5):
        for shift in (0.0, 9.0):
            form = {"generator": random, "dtype": torch.float32}
            draws = [torch.randn(shape, **form) for shape in shapes]
            cases.append(([draw * (1 + i % 3) + shift for i, draw in enumerate(draws)],))
    judge("calibrate", function, cases, _examine, (*_WRONG, *_OTHER_FORMS))


def _examine(batches, got) -> str | None:
    small = sum(batch.numel() for batch in batches) <= 6
    of = show(batches) if small else f"{len(batches)} random batches"
    if not isinstance(got, tuple | list) or len(got) != 2:
        return f"calibrate returns {kind(got)}, expected the pair (scale, zero_point)"
    scale, zero_point = got
    if type(scale) in (int, np.int64) and isinstance(zero_point, float):
        return f"for {of} calibrate returns (an int, a float), expected (a float, an int)"
    if not isinstance(scale, float | np.floating):
        raise Wrong(f"for {of} the scale is {kind(scale)}, expected a float (tensors have .item())")
    if isinstance(zero_point, bool) or not isinstance(zero_point, int | np.integer):
        raise Wrong(f"for {of} the zero point is {kind(zero_point)}, expected an int")
    observer = torch.ao.quantization.MinMaxObserver(
        dtype=torch.quint8, qscheme=torch.per_tensor_affine
    )
    for batch in batches:
        observer(batch)
    true_scale, true_zero = (part.item() for part in observer.calculate_qparams())
    if not abs(scale / true_scale - 1) < 1e-4:
        return f"for {of} the scale is {show(scale)}, expected {show(true_scale)}"
    exact = -min(0.0, observer.min_val.item()) / true_scale
    if zero_point != true_zero and abs(zero_point - exact) > 0.501:  # either side of a tie will do
        return f"for {of} the zero point is {zero_point}, expected {true_zero}"
    return None


def _grid(low, high, zero=True, steps=255):
    low, high = float(low), float(high)
    if zero:
        low, high = min(low, 0.0), max(high, 0.0)
    scale = (high - low) / steps
    return scale, round(-low / scale)


def last_batch_only(batches):
    """Overwrites the range with each batch."""
    return _grid(batches[-1].min(), batches[-1].max())


def first_batch_only(batches):
    """Looks at one batch and stops."""
    return _grid(batches[0].min(), batches[0].max())


def average_of_extremes(batches):
    """Averages the minima and the maxima: no longer a bound."""
    lows, highs = [b.min().item() for b in batches], [b.max().item() for b in batches]
    return _grid(sum(lows) / len(lows), sum(highs) / len(highs))


def low_always_zero(batches):
    """Lets the grid begin at 0, as after a ReLU."""
    return max(0.0, *(b.max().item() for b in batches)) / 255, 0


def percentiles(batches, share=0.01):
    """Cuts off a share of the values at each end."""
    values = torch.cat([batch.reshape(-1) for batch in batches]).double()
    return _grid(values.quantile(share), values.quantile(1 - share))


def moving_average(batches, old=0.9, start=None):
    """Keeps a moving average of the minima and maxima."""
    low, high = (batches[0].min(), batches[0].max()) if start is None else (start, start)
    for batch in batches[start is None :]:
        low, high = old * low + (1 - old) * batch.min(), old * high + (1 - old) * batch.max()
    return _grid(low, high)


def mean_of_scales(batches):
    """Averages the scales of the batches' own grids, and their zero points."""
    grids = [_grid(batch.min(), batch.max()) for batch in batches]
    scale, zero_point = (sum(part) / len(grids) for part in zip(*grids, strict=True))
    return scale, round(zero_point)


def mean_scale_of_common_range(batches):
    """Averages the scales of the batches, and takes the zero point from the range of all."""
    scale, _ = mean_of_scales(batches)
    return scale, round(-min(0.0, *(b.min().item() for b in batches)) / scale)


def zero_point_first(batches):
    """Returns the zero point before the scale."""
    return _grid(min(b.min() for b in batches), max(b.max() for b in batches))[::-1]


def widest_batch(batches):
    """Takes the grid of the batch whose scale is largest."""
    return max(_grid(batch.min(), batch.max()) for batch in batches)


def zero_left_out(batches):
    """Covers the data but not zero."""
    return _grid(min(b.min() for b in batches), max(b.max() for b in batches), zero=False)


def range_of_means(batches):
    """Takes the range of the batch means."""
    means = [batch.mean() for batch in batches]
    return _grid(min(means), max(means))


def steps_256(batches):
    """Divides the range by 256, though 256 codes have 255 steps."""
    return _grid(min(b.min() for b in batches), max(b.max() for b in batches), steps=256)


def symmetric_activations(batches):
    """Centers the grid on zero, with the zero point in the middle."""
    return max(b.abs().max().item() for b in batches) / 127, 128


def zero_point_sign(batches):
    """Rounds low / scale without the minus sign."""
    scale, zero_point = _grid(min(b.min() for b in batches), max(b.max() for b in batches))
    return scale, -zero_point


def zero_point_cut_off(batches):
    """Cuts the fraction of the zero point off, as int() does."""
    low, high = min(0.0, *(b.min().item() for b in batches)), max(b.max() for b in batches)
    scale, _ = _grid(low, high)
    return scale, int(-low / scale)


def zero_point_rounded_up(batches):
    """Rounds the zero point up."""
    low, high = min(0.0, *(b.min().item() for b in batches)), max(b.max() for b in batches)
    scale, _ = _grid(low, high)
    return scale, math.ceil(-low / scale)


def zero_point_less_128(batches):
    """Lays the same grid with codes from −128 to 127."""
    scale, zero_point = _grid(min(b.min() for b in batches), max(b.max() for b in batches))
    return scale, zero_point - 128


def symmetric_without_zero_point(batches):
    """Takes the symmetric grid of signed codes, max |x| / 127 with the zero point 0."""
    return max(b.abs().max().item() for b in batches) / 127, 0


def zero_point_clamped(batches):
    """Leaves zero out of the range, then clamps the zero point into the codes."""
    scale, zero_point = zero_left_out(batches)
    return scale, min(255, max(0, zero_point))


_WRONG = (
    (zero_point_first, "the scale comes first, then the zero point"),
    (last_batch_only, "each batch overwrites the range of the ones before it"),
    (first_batch_only, "this is the range of the first batch; later ones reach further"),
    (average_of_extremes, "an average of minima and maxima bounds nothing: larger values clip"),
    (low_always_zero, "a grid from 0 is for after a ReLU: here, negative values would clip"),
    (percentiles, "percentiles leave out the extreme values; this grid reaches all of them"),
    (moving_average, "a moving average of the extremes lags behind them: larger values clip"),
    (mean_of_scales, "a mean of scales is too small for the widest batch: take one range of all"),
    (widest_batch, "the batch with the largest scale does not hold both ends of the range of all"),
    (zero_left_out, "zero must be a grid point even if no batch holds it: padding needs it"),
    (zero_point_clamped, "a zero point that had to be clamped moves the whole grid off the data"),
    (range_of_means, "batch means lie well inside the data; the range needs the extreme values"),
    (steps_256, "256 codes have 255 steps between them"),
    (symmetric_activations, "this grid is symmetric; an asymmetric one reaches from low to high"),
    (zero_point_cut_off, "round the zero point to the nearest: int() cuts its fraction off"),
    (zero_point_rounded_up, "the zero point is rounded to the nearest integer, not up"),
    (
        zero_point_less_128,
        "this zero point is for codes from −128 to 127; here they start at 0",
    ),
    (
        symmetric_without_zero_point,
        "max |x| / 127 with zero point 0 is the grid of signed codes; here they run from 0 to 255",
    ),
    (zero_point_sign, "low + zero_point · scale must be 0, so the zero point is −low / scale"),
)
_MESSAGES = dict(_WRONG)
_OTHER_FORMS = (
    (mean_scale_of_common_range, _MESSAGES[mean_of_scales]),
    *(
        (functools.partial(percentiles, share=share), _MESSAGES[percentiles])
        for share in (0.0001, 0.0005, 0.001, 0.005, 0.02, 0.025, 0.05)
    ),
    *(
        (functools.partial(moving_average, old=old, start=start), _MESSAGES[moving_average])
        for old in (0.9, 0.99, 0.1, 0.5, 0.8)
        for start in (None, 0.0)
    ),
)


def calibrate_at_once(batches):
    """Joins the batches into one vector, with a zero beside them."""
    values = torch.cat([batch.reshape(-1).double() for batch in batches])
    values = torch.nn.functional.pad(values, (0, 1))  # and a zero
    scale = (values.max() - values.min()) / 255
    return scale.item(), int((-values.min() / scale).round())


def calibrate_running(batches):
    """Keeps a running range, value by value."""
    low = high = 0.0
    for batch in batches:
        for value in batch.flatten().tolist():
            low, high = min(low, value), max(high, value)
    scale = (high - low) / 255
    return scale, min(255, max(0, math.floor(0.5 - low / scale)))


EXERCISE = Exercise(
    id="1.6",
    title="A static grid from calibration batches",
    stars=2,
    minutes=15,
    function_names=("calibrate",),
    check=_check,
    takeaway="A static grid is as good as its calibration data: what lies outside will be clipped.",
    wrong_answers=_WRONG,
    variants=(calibrate_at_once, calibrate_running),
)
