"""Figures follow the style of the book, and come with their text."""

import base64
import subprocess
import sys

import matplotlib as mpl
import matplotlib.pyplot as plt
import pytest

import labkit as lk
from labkit import plotting

mpl.use("agg")
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
    def picture() -> bytes:
        figure, axes = lk.subplots(1, 2)
        axes[0].plot([1, 2, 3])
        axes[1].bar(["a", "b"], [1, 2])
        return plotting.png(figure)

    assert picture() == picture()


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
