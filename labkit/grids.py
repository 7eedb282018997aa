"""The grid of a quantized weight: the state as numbers, as a sentence, and as a figure."""

import math
from types import SimpleNamespace

import torch

from labkit.formats import minus
from labkit.plotting import COLORS, subplots
from labkit.quant import check_input, choose_qparams, dequantize, integer_range, quantize

GRANULARITIES = ("per tensor", "per channel", "groups of 128", "groups of 64", "groups of 32")


def grid_state(
    weight: torch.Tensor,
    bits: int = 4,
    symmetric: bool = False,
    granularity: str = "per tensor",
    clip: float = 100.0,
    row: int = 0,
) -> SimpleNamespace:
    """Quantize a weight and measure what it cost.

    Args:
        weight: floating-point tensor `(out, in)`, finite.
        bits: width of a code, 2 to 8.
        symmetric: True puts the zero point at 0.
        granularity: one of `GRANULARITIES`; a group size must divide `in`.
        clip: percentile of the magnitudes under one scale, 50 to 100; the grid reaches no further.
        row: the output channel to draw (of groups: the first in it).

    Returns:
        What it cost: `mse`, `snr_db` and `bits_per_weight` (with a 16-bit scale and, if asymmetric,
        an 8-bit zero point) of the whole; all else of the part drawn.

    Raises:
        TypeError, ValueError: if an argument is not as above.
    """
    check_input(weight, bits)
    units = _units(weight, granularity)
    if not 50 <= clip <= 100:
        raise ValueError(f"clip must be a percentile from 50 to 100, not {clip!r}")
    if row not in range(len(weight)):
        raise ValueError(f"row must be from 0 to {len(weight) - 1}, not {row!r}")
    kept = units
    if clip < 100:
        limit = units.abs().kthvalue(math.ceil(units.shape[1] * clip / 100), dim=1, keepdim=True)
        kept = units.clamp(-limit.values, limit.values)
    scale, zero_point = choose_qparams(kept, bits, symmetric, dim=1)
    codes = quantize(units, scale, zero_point, bits, symmetric)
    restored = dequantize(codes, scale, zero_point)
    mse = float((restored - units).square().mean())
    part = row * len(units) // len(weight)
    qmin, qmax = integer_range(bits, symmetric)
    place = f"row {row}" + (", first group" if "groups" in granularity else "")
    return SimpleNamespace(
        heading=f"{bits} bits, {'' if symmetric else 'a'}symmetric, {granularity}",
        part="whole tensor" if granularity == "per tensor" else place,
        grid=dequantize(torch.arange(qmin, qmax + 1), scale[part], zero_point[part]),
        weights=units[part],
        restored=restored[part],
        scale=float(scale[part]),
        zero_point=int(zero_point[part]),
        levels_used=len(codes[part].unique()),
        clipped=int((units[part] != kept[part]).sum()),
        mse=mse,
        snr_db=10 * math.log10(float(units.square().mean()) / mse) if mse else math.inf,
        bits_per_weight=bits + (16 if symmetric else 24) / units.shape[1],
    )


def grid_sentence(state: SimpleNamespace) -> str:
    """Say what the grid is, what error it makes, and what it costs in bits."""
    return minus(
        f"{state.heading}. {state.part.capitalize()} ({state.weights.numel():,} weights): scale "
        f"{state.scale:.4g}, zero point {state.zero_point}, {state.levels_used} of "
        f"{len(state.grid)} levels used, {state.clipped:,} weights clipped. Whole weight: mean "
        f"squared error {state.mse:.3g}, signal-to-noise ratio {_decibels(state)}, "
        f"{state.bits_per_weight:.3f} bits per weight, scales and zero points included."
    )


def grid_title(state: SimpleNamespace) -> str:
    """Return the finding in a few words: title of the figure, alt text of the picture."""
    levels = f"{state.levels_used} of {len(state.grid)} levels used"
    return minus(f"{state.heading}: {levels}, {_decibels(state)}")


def grid_figure(state: SimpleNamespace):
    """Draw the weights on their grid and the rounding error beneath, as a matplotlib figure."""
    figure, (top, bottom) = subplots(2, 1, figsize=(7.2, 4.2), height_ratios=(1.7, 1), sharex=True)
    top.set_title(grid_title(state))
    low, high = float(state.weights.min()), float(state.weights.max())
    if low == high:  # a histogram needs a range
        low, high = low - 0.5, high + 0.5
    counts = torch.histc(state.weights, bins=80, min=low, max=high)
    edges = torch.linspace(low, high, 81)
    top.stairs(counts, edges, fill=True, color=COLORS["sky"], label=f"weights ({state.part})")
    line = {"color": COLORS["orange"], "linewidth": 1.4 if len(state.grid) <= 16 else 0.5}
    for axes, height in ((top, 0.85), (bottom, 1)):  # leaves room for the legend
        axes.grid(False)
        lines = axes.vlines(state.grid, 0, height, transform=axes.get_xaxis_transform(), **line)
        lines.set_alpha(1 if len(state.grid) <= 64 else 0.5)
    top.plot([], [], "-", label=f"{len(state.grid)} grid points", **line)
    top.set(yscale="log", ylabel="weights per bin", ylim=(0.7, 40 * float(counts.max())))
    top.legend(ncols=2, loc="upper right", frameon=False)
    _draw_error(bottom, state)
    return figure


def group_size_of(granularity: str) -> int:
    """Return 64 for "groups of 64"."""
    return int(granularity.removeprefix("groups of "))


def _units(weight: torch.Tensor, granularity: str) -> torch.Tensor:
    """Reshape a weight to `(scales, weights per scale)`, float32."""
    if weight.ndim != 2:
        raise ValueError(f"weight must have shape (out, in), not {tuple(weight.shape)}")
    if granularity not in GRANULARITIES:
        raise ValueError(f"granularity must be one of {GRANULARITIES}, not {granularity!r}")
    weight = weight.detach().float().cpu()
    if granularity == "per tensor":
        return weight.reshape(1, -1)
    if granularity == "per channel":
        return weight
    size = group_size_of(granularity)
    if weight.shape[1] % size:
        raise ValueError(f"granularity: {size} does not divide the {weight.shape[1]} inputs")
    return weight.reshape(-1, size)


def _decibels(state: SimpleNamespace) -> str:
    return f"{state.snr_db:.1f} dB" if math.isfinite(state.snr_db) else "infinite (no error)"


def _draw_error(axes, state: SimpleNamespace) -> None:
    error, edge = state.restored - state.weights, 1.5 * state.scale
    # A sample is enough for the eye, with the largest weights in it.
    shown = torch.cat(
        [
            torch.arange(0, len(error), max(1, len(error) // 3000)),
            state.weights.abs().topk(min(300, len(error))).indices,
        ]
    )
    weights, error = state.weights[shown], error[shown]
    far = error.abs() > edge
    axes.plot(weights[~far], error[~far], ".", color=COLORS["blue"], markersize=3, zorder=3)
    label = "weight value"
    if far.any():
        above = error[far].sign() * edge
        axes.plot(weights[far], above, "v", color=COLORS["pink"], markersize=5, zorder=3)
        label += f" (triangles: clipped, error up to {float(error.abs().max()):.2g})"
    axes.set(xlabel=label, ylabel="rounding error")
