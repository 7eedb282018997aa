"""The interactive explorers. Each state is also a still figure and a sentence, by pure functions.

The picture is an `HTML` widget with an `<img>`, since `ipywidgets.Image` carries no alt text.
"""

import base64
import html
import itertools
import threading
from collections.abc import Callable, Iterable

from labkit import formats
from labkit.plotting import png

# JupyterLab sends events to two threads of the kernel, and pyplot's state is global. Re-entrant,
# since a callback sets controls and so calls itself.
_ONE_AT_A_TIME = threading.RLock()


def bits_explorer(value: float = 0.1, number_format: str = "FP16"):
    """Return an explorer of the bits of a number: choose a format, type a value, switch bits.

    Args, errors: as in `formats.format_bits`, to begin with.
    """
    import ipywidgets as widgets

    chooser = widgets.Dropdown(options=list(formats.FORMATS), description="Format")
    typed = widgets.Text(description="Value", continuous_update=False)
    buttons = [widgets.ToggleButton(layout={"width": "24px", "padding": "0"}) for _ in range(32)]
    row = widgets.HBox(layout={"flex_flow": "row wrap"})
    picture, sentence = widgets.HTML(), widgets.HTML()
    state = {"format": None, "busy": False}

    def show(new: float | str, name: str) -> None:
        number, bits, _ = formats.resolve(new, name)
        digits = bits.replace(" ", "")
        state["busy"] = True  # what follows sets controls, and must not be taken for the reader
        if name != state["format"]:
            row.children = _button_groups(buttons, name)
        for button, bit in zip(buttons, digits, strict=False):
            button.description, button.value = bit, bit == "1"
        chooser.value, typed.value = name, formats.number_text(number)
        state.update(value=number, format=name, bits=digits, busy=False)
        picture.value = _image(formats.bits_figure(new, name), formats.bits_title(new, name))
        sentence.value = _paragraph(formats.bits_sentence(new, name))

    def update(change) -> None:
        with _ONE_AT_A_TIME:
            if state["busy"]:
                return
            try:
                show(*_wanted(change, buttons, state))
            except ValueError as problem:
                state["busy"], chooser.value = True, state["format"]
                state["busy"] = False
                kept = f"Still showing {formats.number_text(state['value'])} in {state['format']}."
                sentence.value = _paragraph(f"{problem}. {kept}")

    show(value, number_format)
    for control in (chooser, typed, *buttons):
        control.observe(update, "value")
    return widgets.VBox([widgets.HBox([chooser, typed]), row, picture, sentence])


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

    controls = [widgets.Dropdown(options=v, description=k) for k, v in choices.items()]
    picture, sentence = widgets.HTML(), widgets.HTML()

    def update(change=None) -> None:
        with _ONE_AT_A_TIME:
            figure, alt, text = draw(*[control.value for control in controls])
            picture.value, sentence.value = _image(figure, alt), _paragraph(text)

    for control, value in zip(controls, start, strict=False):
        control.value = value
    for control in controls:
        control.style.description_width = "initial"
        control.layout.width = "auto"
        control.observe(update, "value")
    update()
    row = widgets.HBox(controls, layout={"flex_flow": "row wrap"})
    return widgets.VBox([row, picture, sentence])


def _button_groups(buttons: list, number_format: str) -> list:
    """Label the first buttons by field, and return a labeled box for each field."""
    import ipywidgets as widgets

    groups, unlabeled = [], iter(buttons)
    for name, width in formats.fields(number_format).items():
        group = list(itertools.islice(unlabeled, width))
        for place, button in enumerate(group):
            button.tooltip = f"{name} bit {width - 1 - place}"
        line = f"border-bottom: 4px solid {formats.FIELD_COLORS[name]}"
        label = widgets.HTML(f'<div style="{line}">{name}</div>')
        groups.append(widgets.VBox([label, widgets.HBox(group)]))
    return groups


def _wanted(change, buttons: list, state: dict) -> tuple[float | str, str]:
    """Return the number or pattern, and the format, that a change of a control asks for."""
    # Not the controls but the change counts: another event may have set the controls since.
    bits, name = state["bits"], state["format"]
    if change.owner in buttons:
        place = buttons.index(change.owner)
        # Cut, since the button may be one that this format no longer has.
        return (bits[:place] + str(int(change.new)) + bits[place + 1 :])[: len(bits)], name
    if change.new in formats.FORMATS:
        return state["value"], change.new
    return formats.parse_number(change.new), name


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
