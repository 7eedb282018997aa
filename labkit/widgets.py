"""The interactive explorers. Each state is also a still figure and a sentence, by pure functions.

The picture is an `HTML` widget with an `<img>`, since `ipywidgets.Image` carries no alt text.
"""

import base64
import html
import math
import threading
from dataclasses import dataclass

import torch

# The pure halves of explorers; an alias marks what is here for callers only.
from labkit.clipping import REACHES, clip_figure, clip_sentence, clip_state, clip_title
from labkit.formats import (
    FIELD_COLORS,
    FORMATS,
    bits_figure,
    bits_sentence,
    bits_title,
    fields,
    minus,
    number_text,
    parse_number,
    resolve,
)
from labkit.formats import decode as decode
from labkit.formats import format_bits as format_bits
from labkit.plotting import COLORS, png, subplots
from labkit.quant import check_input, choose_qparams, dequantize, integer_range, quantize

GRANULARITIES = ("per tensor", "per channel", "groups of 128", "groups of 64", "groups of 32")
PERCENTILES = (100.0, 99.9, 99.0)

# JupyterLab sends events to two threads of the kernel, and pyplot's state is global. Re-entrant,
# since a callback sets controls and so calls itself.
_ONE_AT_A_TIME = threading.RLock()


def bits_explorer(value: float = 0.1, number_format: str = "FP16"):
    """Show the bits of a number: choose a format, type a value, or switch single bits.

    Args:
        value: the number to begin with.
        number_format: a key of `FORMATS`.

    Returns:
        An `ipywidgets.VBox`.

    Raises:
        ValueError: see `format_bits`.
    """
    import ipywidgets as widgets

    chooser = widgets.Dropdown(options=list(FORMATS), description="Format")
    typed = widgets.Text(description="Value", continuous_update=False)
    buttons = [widgets.ToggleButton(layout={"width": "24px", "padding": "0"}) for _ in range(32)]
    row = widgets.HBox(layout={"flex_flow": "row wrap"})
    picture, sentence = widgets.HTML(), widgets.HTML()
    state = {"format": None, "busy": False}

    def show(new: float | str, name: str) -> None:
        number, bits, _ = resolve(new, name)
        digits = bits.replace(" ", "")
        state["busy"] = True  # what follows sets controls, and must not be taken for the reader
        if name != state["format"]:
            row.children = _button_groups(buttons, name)
        for button, bit in zip(buttons, digits, strict=False):
            button.description, button.value = bit, bit == "1"
        chooser.value, typed.value = name, number_text(number)
        state.update(value=number, format=name, bits=digits, busy=False)
        picture.value = _image(bits_figure(new, name), bits_title(new, name))
        sentence.value = _paragraph(bits_sentence(new, name))

    def update(change) -> None:
        with _ONE_AT_A_TIME:
            if state["busy"]:
                return
            try:
                show(*_wanted(change, buttons, state))
            except ValueError as problem:
                state["busy"], chooser.value = True, state["format"]
                state["busy"] = False
                kept = f"Still showing {number_text(state['value'])} in {state['format']}."
                sentence.value = _paragraph(f"{problem}. {kept}")

    show(value, number_format)
    for control in (chooser, typed, *buttons):
        control.observe(update, "value")
    return widgets.VBox([widgets.HBox([chooser, typed]), row, picture, sentence])


@dataclass(frozen=True, eq=False)
class GridState:
    """A quantized weight, as `grid_state` measures it.

    `weights` and `restored` (float32, 1-D, one scale) are the part that is drawn, before and after
    rounding; `grid`, `scale`, `zero_point`, `levels_used` and `clipped` (a count) are its own.
    `mse`, `snr_db` and `bits_per_weight` are of the whole weight.
    """

    heading: str
    part: str
    grid: torch.Tensor
    weights: torch.Tensor
    restored: torch.Tensor
    scale: float
    zero_point: int
    levels_used: int
    clipped: int
    mse: float
    snr_db: float
    bits_per_weight: float


def grid_state(
    weight: torch.Tensor,
    bits: int = 4,
    symmetric: bool = False,
    granularity: str = "per tensor",
    clip: float = 100.0,
    row: int = 0,
) -> GridState:
    """Quantize a weight and measure what it cost.

    Args:
        weight: floating-point tensor `(out, in)`, finite.
        bits: width of a code, 2 to 8.
        symmetric: True puts the zero point at 0.
        granularity: one of `GRANULARITIES`; a group size must divide `in`.
        clip: percentile of the magnitudes under one scale, 50 to 100; the grid reaches no further.
        row: the output channel to draw (of groups: the first in it).

    Returns:
        A `GridState`; its bits count a 16-bit scale and, if asymmetric, an 8-bit zero point.

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
    return GridState(
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


def grid_sentence(state: GridState) -> str:
    """Say what the grid is, what error it makes, and what it costs in bits."""
    return minus(
        f"{state.heading}. {state.part.capitalize()} ({state.weights.numel():,} weights): scale "
        f"{state.scale:.4g}, zero point {state.zero_point}, {state.levels_used} of "
        f"{len(state.grid)} levels used, {state.clipped:,} weights clipped. Whole weight: mean "
        f"squared error {state.mse:.3g}, signal-to-noise ratio {_decibels(state)}, "
        f"{state.bits_per_weight:.3f} bits per weight, scales and zero points included."
    )


def grid_title(state: GridState) -> str:
    """Return the finding in a few words: title of the figure, alt text of the picture."""
    levels = f"{state.levels_used} of {len(state.grid)} levels used"
    return minus(f"{state.heading}: {levels}, {_decibels(state)}")


def grid_figure(state: GridState):
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


def grid_explorer(
    weight: torch.Tensor, bits: int = 4, symmetric: bool = False, granularity: str = "per tensor"
):
    """Show the grid of a weight: choose bit-width, symmetry, granularity, clipping and row.

    Args:
        weight, bits, symmetric, granularity: as in `grid_state`, to begin with.

    Returns:
        An `ipywidgets.VBox`.

    Raises:
        TypeError, ValueError: see `grid_state`.
    """
    import ipywidgets as widgets

    grid_state(weight, bits, symmetric, granularity)
    kinds = [("asymmetric", False), ("symmetric", True)]
    fitting = [g for g in GRANULARITIES if g[0] != "g" or weight.shape[1] % _group_size(g) == 0]
    controls = {
        "bits": widgets.Dropdown(options=range(2, 9), value=bits, description="Bits"),
        "symmetric": widgets.Dropdown(options=kinds, value=symmetric, description="Grid"),
        "granularity": widgets.Dropdown(
            options=fitting, value=granularity, description="Granularity"
        ),
        "clip": widgets.Dropdown(options=PERCENTILES, description="Clip at percentile"),
        "row": widgets.BoundedIntText(max=len(weight) - 1, description="Row shown"),
    }
    picture, sentence = widgets.HTML(), widgets.HTML()

    def update(change=None) -> None:
        with _ONE_AT_A_TIME:
            state = grid_state(weight, **{name: box.value for name, box in controls.items()})
            controls["row"].disabled = controls["granularity"].value == "per tensor"
            picture.value = _image(grid_figure(state), grid_title(state))
            sentence.value = _paragraph(grid_sentence(state))

    for control in controls.values():
        control.style.description_width = "initial"
        control.layout.width = "auto"
        control.observe(update, "value")
    update()
    row = widgets.HBox(list(controls.values()), layout={"flex_flow": "row wrap"})
    return widgets.VBox([row, picture, sentence])


def clip_explorer(x: torch.Tensor, bits: int = 8, reach: float = 100.0):
    """Show what a range costs on an activation: choose the bits, and how far the range reaches.

    Args:
        x, bits, reach: as in `clip_state`, to begin with.

    Returns:
        An `ipywidgets.VBox`.

    Raises:
        TypeError, ValueError: see `clip_state`.
    """
    import ipywidgets as widgets

    clip_state(x, bits, reach)
    cuts = [(f"{percent:g} %", percent) for percent in REACHES]
    controls = {
        "bits": widgets.Dropdown(options=range(2, 9), value=bits, description="Bits"),
        "reach": widgets.Dropdown(options=cuts, value=reach, description="Range kept"),
    }
    picture, sentence = widgets.HTML(), widgets.HTML()

    def update(change=None) -> None:
        with _ONE_AT_A_TIME:
            state = clip_state(x, **{name: box.value for name, box in controls.items()})
            picture.value = _image(clip_figure(state), clip_title(state))
            sentence.value = _paragraph(clip_sentence(state))

    for control in controls.values():
        control.style.description_width = "initial"
        control.observe(update, "value")
    update()
    return widgets.VBox([widgets.HBox(list(controls.values())), picture, sentence])


def _button_groups(buttons: list, number_format: str) -> list:
    """Label the first buttons by field, and return a labeled box for each field."""
    import ipywidgets as widgets

    groups, first = [], 0
    widths = fields(number_format)
    colors = FIELD_COLORS if len(widths) == 3 else FIELD_COLORS[::2]
    for (name, width), color in zip(widths.items(), colors, strict=True):
        group = buttons[first : first + width]
        for place, button in enumerate(group):
            button.tooltip = f"{name} bit {width - 1 - place}"
        line = f"border-bottom: 4px solid {color}"
        label = widgets.HTML(f'<div style="{line}">{name}</div>')
        groups.append(widgets.VBox([label, widgets.HBox(group)]))
        first += width
    return groups


def _wanted(change, buttons: list, state: dict) -> tuple[float | str, str]:
    """Return the number or pattern, and the format, that a change of a control asks for."""
    # Not the controls but the change counts: another event may have set the controls since.
    if change.owner in buttons:
        place, bit = buttons.index(change.owner), str(int(change.new))
        bits = state["bits"]
        return bits[:place] + bit + bits[place + 1 :] if place < len(bits) else bits, state[
            "format"
        ]
    if change.new in FORMATS:
        return state["value"], change.new
    return parse_number(change.new), state["format"]


def _image(figure, alt: str) -> str:
    source = base64.b64encode(png(figure)).decode()
    return (
        f'<img class="labkit-picture" alt="{html.escape(alt)}" style="max-width: 100%"'
        f' src="data:image/png;base64,{source}">'
    )


def _paragraph(sentence: str) -> str:
    # No color of its own: the sentence follows the theme. The role makes screen readers speak it.
    return (
        '<p class="labkit-sentence" role="status" style="line-height: 1.5; max-width: 80ch">'
        f"{html.escape(sentence)}</p>"
    )


def _group_size(granularity: str) -> int:
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
    size = _group_size(granularity)
    if weight.shape[1] % size:
        raise ValueError(f"granularity: {size} does not divide the {weight.shape[1]} inputs")
    return weight.reshape(-1, size)


def _decibels(state: GridState) -> str:
    return f"{state.snr_db:.1f} dB" if math.isfinite(state.snr_db) else "infinite (no error)"


def _draw_error(axes, state: GridState) -> None:
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
