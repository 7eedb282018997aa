"""One look for every figure, and the way to show it with a text alternative."""

import base64
import io
from pathlib import Path

COLORS = {
    "blue": "#0072B2",
    "orange": "#D55E00",
    "green": "#009E73",
    "pink": "#CC79A7",
    "sky": "#56B4E9",
    "yellow": "#E69F00",
    "gray": "#6E6E6E",
}
"""The palette of Okabe and Ito, which color-blind readers can tell apart (yellow darkened)."""

MARKERS = ("o", "s", "^", "D", "v", "P", "X")
HATCHES = ("", "//", "..", "xx", "--", "\\\\", "++")


def subplots(rows: int = 1, columns: int = 1, **kwargs):
    """Make a figure and axes in the style of the book.

    Args, returns: as of `matplotlib.pyplot.subplots`; `figsize` is in inches.
    """
    import matplotlib.pyplot as plt

    plt.style.use(_style())  # for good: titles and legends are made after this returns
    return plt.subplots(rows, columns, **kwargs)


def _style() -> list:
    # After matplotlib's own defaults: a reader's style or matplotlibrc may have set anything.
    from cycler import cycler

    cycle = cycler(color=list(COLORS.values())) + cycler(marker=MARKERS)
    return ["default", Path(__file__).with_name("book.mplstyle"), {"axes.prop_cycle": cycle}]


def png(figure) -> bytes:
    """Render a figure as PNG, and close it."""
    import matplotlib.pyplot as plt

    buffer = io.BytesIO()
    with plt.style.context(_style()):  # ticks are made now, and saving has settings of its own
        figure.savefig(buffer, format="png", dpi=figure.dpi)
    plt.close(figure)
    return buffer.getvalue()


def show(figure, alt: str) -> None:
    """Display a figure with a text alternative that says what it shows.

    The picture is PNG (small, and the same cell compares equal on every machine); the text goes
    with it as `text/plain` and in the metadata of the picture.

    Args:
        figure: a matplotlib figure; it is closed.
        alt: what a reader who cannot see the figure needs to know, one or two sentences.

    Raises:
        ValueError: if `alt` is shorter than 20 characters.
    """
    from IPython.display import display

    if len(alt.strip()) < 20:
        raise ValueError(f"alt must say what the figure shows in a sentence, not {alt!r}")
    bundle = {"image/png": base64.b64encode(png(figure)).decode(), "text/plain": f"Figure: {alt}"}
    display(bundle, raw=True, metadata={"image/png": {"alt": alt}})
