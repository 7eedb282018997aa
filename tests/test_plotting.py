"""Figures follow the style of the book, and come with their text."""

import base64
import io
import os
import subprocess
import sys
from pathlib import Path

import matplotlib as mpl
import matplotlib.pyplot as plt
import pytest

import labkit as lk
from labkit import plotting

mpl.use("agg")
ROOT = Path(__file__).parent.parent
ALT = "A line rises from one to three."


@pytest.fixture
def displayed(monkeypatch):
    calls = []
    monkeypatch.setattr("IPython.display.display", lambda *a, **k: calls.append((a, k)))
    return calls


def test_a_figure_is_shown_with_its_text(displayed):
    figure, axes = lk.subplots()
    axes.plot([1, 2, 3])
    lk.show(figure, alt=ALT)
    ((bundle,), options) = displayed[0]
    assert bundle["text/plain"] == f"Figure: {ALT}"
    assert options == {"raw": True, "metadata": {"image/png": {"alt": ALT}}}
    picture = base64.b64decode(bundle["image/png"])
    assert picture.startswith(b"\x89PNG")
    width, height = (int.from_bytes(picture[at : at + 4]) for at in (16, 20))
    assert (width, height) == (792, 396)  # 7.2 × 3.6 inches at 110 dots
    assert not plt.get_fignums()


@pytest.mark.parametrize("alt", ["", "   ", "A figure", " short text        .    "])
def test_a_figure_without_a_sentence_is_refused(displayed, alt):
    figure, _ = lk.subplots()
    with pytest.raises(ValueError, match="alt must say what the figure shows"):
        lk.show(figure, alt=alt)
    assert not displayed
    plt.close(figure)


def test_the_same_figure_gives_the_same_bytes():
    assert picture() == picture()


def picture() -> bytes:
    """Draw a figure with all that a style can touch: title, labels, ticks, legend, lines, bars."""
    figure, axes = lk.subplots(1, 2)
    axes[0].plot([1, 2, 3], label="a line")
    axes[0].set(title="A finding", xlabel="x", ylabel="y")
    axes[0].legend(title="kinds")
    axes[1].bar(["a", "b"], [1, 2])
    axes[1].text(0, 1, "a note")
    figure.suptitle("Both")
    return plotting.png(figure)


def set_ugly_numbers():
    mpl.rcParams.update({"font.size": 24, "figure.figsize": (2, 9), "axes.grid": False})
    mpl.rcParams.update({"savefig.dpi": 40, "savefig.bbox": "tight", "savefig.pad_inches": 2})
    mpl.rcParams.update({"xtick.labelsize": 30, "text.color": "white", "savefig.transparent": True})


NAMES = ("dark_background", "ggplot", "classic", "fivethirtyeight", "seaborn-v0_8-darkgrid")
STYLES = {name: (lambda name=name: plt.style.use(name)) for name in NAMES}
STYLES |= {"numbers": set_ugly_numbers, "xkcd": plt.xkcd}


@pytest.mark.parametrize("style", STYLES)
def test_figures_look_the_same_in_any_style(style):
    expected = picture()
    with mpl.rc_context():
        STYLES[style]()
        assert picture() == expected


def test_a_style_set_between_drawing_and_showing_changes_no_background():
    with mpl.rc_context():
        figure, axes = lk.subplots()
        axes.plot([1, 2, 3])
        expected = plotting.png(figure)
        figure, axes = lk.subplots()
        axes.plot([1, 2, 3])
        plt.style.use("dark_background")
        assert plotting.png(figure) == expected


def test_text_is_dark_on_white_under_a_dark_matplotlibrc(tmp_path):
    style = plt.style.library["dark_background"]
    lines = [
        f"{key}: {str(value).lstrip('#')}" for key, value in style.items() if "cycle" not in key
    ]
    (tmp_path / "matplotlibrc").write_text("\n".join([*lines, "font.size: 30"]), encoding="utf8")
    code = (
        "import sys, matplotlib as mpl; mpl.use('agg'); assert mpl.rcParams['font.size'] == 30; "
        "sys.path.insert(0, 'tests'); import test_plotting; "
        "sys.stdout.buffer.write(test_plotting.picture())"
    )
    environment = os.environ | {"MATPLOTLIBRC": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, cwd=ROOT, check=True
    )
    assert done.stdout == picture()
    pixels = plt.imread(io.BytesIO(done.stdout))[..., :3]
    assert (pixels[:3] == 1).all()  # the border is white
    assert (pixels[:60].max(-1) < 0.2).sum() > 50  # the title is black


def test_subplots_follow_the_style_and_leave_matplotlib_alone():
    before = dict(mpl.rcParams)
    figure, axes = lk.subplots(2, 2, figsize=(4, 4))
    try:
        assert axes.shape == (2, 2)
        assert tuple(figure.get_size_inches()) == (4, 4)
        assert not axes[0, 0].spines["top"].get_visible()
        lines = [axes[0, 0].plot([0, n])[0] for n in range(len(lk.MARKERS))]
        assert [line.get_color() for line in lines] == list(lk.COLORS.values())
        assert [line.get_marker() for line in lines] == list(lk.MARKERS)
        assert dict(mpl.rcParams) == before
    finally:
        plt.close(figure)


def luminance(color: str) -> float:
    channels = (int(color[at : at + 2], 16) / 255 for at in (1, 3, 5))
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_colors_are_distinct_and_dark_enough_on_white():
    assert len(set(lk.COLORS.values())) == len(lk.COLORS) == len(lk.MARKERS) == len(lk.HATCHES)
    assert len(set(lk.MARKERS)) == len(lk.MARKERS)
    assert len(set(lk.HATCHES)) == len(lk.HATCHES)
    contrast = {name: 1.05 / (luminance(color) + 0.05) for name, color in lk.COLORS.items()}
    assert min(contrast.values()) >= 2, contrast


def test_a_figure_can_be_made_where_there_is_no_screen():
    code = f"import labkit as lk; f, a = lk.subplots(); lk.show(f, alt={ALT!r})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
