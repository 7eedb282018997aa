"""The interactive explorers. Each state is also a still figure and a sentence, by pure functions.

The picture is an `HTML` widget with an `<img>`, since `ipywidgets.Image` carries no alt text.
"""

import base64
import html
import threading
from collections.abc import Callable, Iterable

import torch

# The pure halves of the explorers; `as` marks what is here for callers only.
from labkit.formats import (
    FIELD_COLORS,
    FORMATS,
    bits_figure,
    bits_sentence,
    bits_title,
    fields,
    number_text,
    parse_number,
    resolve,
)
from labkit.formats import decode as decode
from labkit.formats import format_bits as format_bits
from labkit.grids import (
    GRANULARITIES,
    grid_figure,
    grid_sentence,
    grid_state,
    grid_title,
    group_size_of,
)
from labkit.plotting import png

PERCENTILES = (100.0, 99.9, 99.0)

# JupyterLab sends events to two threads of the kernel, and pyplot's state is global. Re-entrant,
# since a callback sets controls and so calls itself.
_ONE_AT_A_TIME = threading.RLock()


def bits_explorer(value: float = 0.1, number_format: str = "FP16"):
    """Return an explorer of the bits of a number: choose a format, type a value, switch bits.

    Args, errors: as in `format_bits`, to begin with.
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


def grid_explorer(
    weight: torch.Tensor, bits: int = 4, symmetric: bool = False, granularity: str = "per tensor"
):
    """Return an explorer of a weight's grid: bit-width, symmetry, granularity, clipping, row.

    Args, errors: as in `grid_state`, to begin with.
    """
    import ipywidgets as widgets

    grid_state(weight, bits, symmetric, granularity)
    kinds = [("asymmetric", False), ("symmetric", True)]
    fitting = [g for g in GRANULARITIES if g[0] != "g" or weight.shape[1] % group_size_of(g) == 0]
    controls = {
        "bits": widgets.Dropdown(options=range(2, 9), value=bits, description="Bits"),
        "symmetric": widgets.Dropdown(options=kinds, value=symmetric, description="Grid"),
        "granularity": widgets.Dropdown(
            options=fitting, value=granularity, description="Granularity"
        ),
        "clip": widgets.Dropdown(options=PERCENTILES, description="Clip at percentile"),
        "row": widgets.BoundedIntText(max=len(weight) - 1, description="Row shown"),
    }

    def draw(**chosen) -> tuple:
        state = grid_state(weight, **chosen)
        controls["row"].disabled = chosen["granularity"] == "per tensor"
        return grid_figure(state), grid_title(state), grid_sentence(state)

    return _explorer(controls, draw)


def explorer(choices: dict[str, Iterable], draw: Callable[..., tuple], start: tuple = ()):
    """Return an explorer of anything that a notebook can draw: a dropdown for each choice.

    Args:
        choices: by label, the options of a dropdown; a dictionary gives each value its own text.
        draw: called with the chosen values in this order; returns a matplotlib figure, what it
            shows in a few words, and the state in a sentence or two.
        start: the values to begin with; of those not given, the first.

    Raises:
        traitlets.TraitError: if `start` names a value that is no option.
    """
    import ipywidgets as widgets

    controls = {k: widgets.Dropdown(options=v, description=k) for k, v in choices.items()}
    for box, value in zip(controls.values(), start, strict=False):
        box.value = value
    return _explorer(controls, lambda **chosen: draw(*chosen.values()))


def _explorer(controls: dict, draw: Callable[..., tuple]):
    """Put controls above a picture and a sentence; `draw(**values)` returns figure, alt, text."""
    import ipywidgets as widgets

    picture, sentence = widgets.HTML(), widgets.HTML()

    def update(change=None) -> None:
        with _ONE_AT_A_TIME:
            figure, alt, text = draw(**{name: box.value for name, box in controls.items()})
            picture.value, sentence.value = _image(figure, alt), _paragraph(text)

    for control in controls.values():
        control.style.description_width = "initial"
        control.layout.width = "auto"
        control.observe(update, "value")
    update()
    row = widgets.HBox(list(controls.values()), layout={"flex_flow": "row wrap"})
    return widgets.VBox([row, picture, sentence])


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
