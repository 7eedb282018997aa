"""Clip range against error on one activation: the state as numbers, as a sentence, as a figure."""

from dataclasses import dataclass
from functools import lru_cache

import torch

from labkit.formats import minus
from labkit.plotting import COLORS, MARKERS, subplots
from labkit.quant import check_input, choose_qparams, dequantize, quantize

REACHES = (100.0, 70.0, 50.0, 35.0, 25.0, 18.0, 12.0, 9.0, 6.0, 4.5, 3.0, 2.0, 1.5, 1.0)


@dataclass(frozen=True, eq=False)
class ClipState:
    """One range for one activation: its grid, and (rounding, clipping) error at each reach."""

    x: torch.Tensor
    bits: int
    reach: float
    low: float
    high: float
    scale: float
    clipped: int
    curve: dict[float, tuple[float, float]]
    best_reach: float


def clip_state(x: torch.Tensor, bits: int = 8, reach: float = 100.0) -> ClipState:
    """Cut the range of an activation and measure what rounding and clipping cost.

    Args:
        x: activations of any shape, finite.
        bits: width of a code, 2 to 8.
        reach: one of `REACHES`: percent of the smallest and of the largest value that is kept.

    Raises:
        TypeError, ValueError: see `check_input`; ValueError too for another reach.
    """
    check_input(x, bits)
    if reach not in REACHES:
        raise ValueError(f"reach must be one of {REACHES}, not {reach!r}")
    curve = _curve(x, bits)
    low, high, scale, _ = _range(x, bits, reach)
    clipped = int(((x < low) | (x > high)).sum())
    best_reach = min(curve, key=lambda percent: sum(curve[percent]))
    return ClipState(x, bits, reach, low, high, scale, clipped, curve, best_reach)


def _range(x: torch.Tensor, bits: int, reach: float) -> tuple[float, float, float, torch.Tensor]:
    ends = torch.stack([x.min(), x.max()]).float() * reach / 100
    scale, zero_point = choose_qparams(ends, bits, dim=0)
    low, high = dequantize(torch.tensor([0, 2**bits - 1]), scale, zero_point).tolist()
    return low, high, float(scale), zero_point


@lru_cache(maxsize=16)  # tensors hash by identity: a control that moves does not measure again
def _curve(x: torch.Tensor, bits: int) -> dict[float, tuple[float, float]]:
    curve = {}
    for reach in REACHES:
        low, high, scale, zero_point = _range(x, bits, reach)
        grid = torch.tensor([scale]), zero_point
        error = (dequantize(quantize(x, *grid, bits), *grid) - x).square()
        outside = (x < low) | (x > high)
        clipping = float(error[outside].sum()) / x.numel()
        curve[reach] = float(error.mean()) - clipping, clipping
    return curve


def clip_title(state: ClipState) -> str:
    """Return the finding in a few words."""
    side = "clipping" if state.reach < state.best_reach else "rounding"
    found = f"{side} costs most" if state.reach != state.best_reach else "the least total error"
    return f"{state.bits} bits, range cut to {state.reach:g} %: {found}"


def clip_sentence(state: ClipState) -> str:
    """Say what the range is, what the two errors are, and where their sum is least."""
    rounding, clipping = state.curve[state.reach]
    return minus(
        f"{state.bits} bits, range cut to {state.reach:g} % of its ends: from {state.low:.3g} to "
        f"{state.high:.3g}, step {state.scale:.3g}; {state.clipped:,} of {state.x.numel():,} "
        f"values clipped. Mean squared error {rounding + clipping:.3g}: {rounding:.3g} from "
        f"rounding, {clipping:.3g} from clipping. The sum is least at {state.best_reach:g} %."
    )


def clip_figure(state: ClipState):
    """Draw the histogram with the range, and both errors over the reach, as a figure."""
    figure, (left, right) = subplots(1, 2, figsize=(8.2, 3.3))
    low, high = float(state.x.min()), float(state.x.max())
    if low == high:  # a histogram needs a range
        low, high = low - 0.5, high + 0.5
    counts = torch.histc(state.x.float(), 120, low, high)
    left.stairs(counts, torch.linspace(low, high, 121), fill=True, color=COLORS["sky"])
    for end in (state.low, state.high):
        left.axvline(end, color=COLORS["orange"], linestyle="--")
    left.set(yscale="log", ylim=(0.7, None), xlabel="activation", ylabel="values per bin")
    left.set_title(clip_title(state))
    totals = [sum(state.curve[reach]) for reach in REACHES]
    floor = max(min(totals) / 100, 1e-12)  # an error of 0 has no place on a log axis
    for i, (name, color) in enumerate((("rounding", "blue"), ("clipping", "orange"))):
        errors = [max(state.curve[reach][i], floor) for reach in REACHES]
        label = f"{name} error"
        right.plot(REACHES, errors, marker=MARKERS[i], color=COLORS[color], label=label)
    right.plot(REACHES, totals, marker="", color="black", label="sum")
    right.axvline(state.reach, color=COLORS["gray"], linestyle="--")
    right.set(xscale="log", yscale="log", ylim=(floor, None))
    right.set(xlabel="range kept (% of each end)", ylabel="mean squared error")
    right.legend()
    return figure
