"""Claims hold or raise, and print the same everywhere; figures come with their text."""

import base64
import math
import subprocess
import sys

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch

import labkit as lk
from labkit import claims, plotting

mpl.use("agg")
ALT = "A line rises from one to three."


@pytest.fixture(autouse=True)
def _empty_registry(monkeypatch):
    monkeypatch.setattr(claims, "REGISTRY", {})


@pytest.fixture
def displayed(monkeypatch):
    calls = []
    monkeypatch.setattr("IPython.display.display", lambda *a, **k: calls.append((a, k)))
    return calls


# Claims


@pytest.mark.parametrize(
    ("low", "high", "band"),
    [
        (3.8, 4.05, "between 3.8 and 4.05"),
        (3.8, math.inf, "at least 3.8"),
        (-math.inf, 4.05, "at most 4.05"),
        (3.9, 3.9, "exactly 3.9"),
    ],
)
def test_a_claim_that_holds_prints_the_band_and_not_the_value(capsys, low, high, band):
    lk.claim("storage", "INT8 takes a quarter", 3.9, low, high)
    assert capsys.readouterr().out == f"✓ storage: INT8 takes a quarter ({band})\n"
    assert claims.REGISTRY["storage"].value == 3.9


@pytest.mark.parametrize("value", [3.8, 3.801, 4.05])
def test_two_values_in_the_band_print_the_same(capsys, value):
    lk.claim("x", "A sentence", value, 3.8, 4.05)
    assert capsys.readouterr().out == "✓ x: A sentence (between 3.8 and 4.05)\n"


@pytest.mark.parametrize("value", [3.7999, 4.0501, -4, math.inf, -math.inf, math.nan])
def test_a_claim_that_fails_names_what_was_measured(capsys, value):
    with pytest.raises(AssertionError) as raised:
        lk.claim("storage", "INT8 takes a quarter", value, 3.8, 4.05)
    assert str(raised.value) == (
        f"storage: INT8 takes a quarter: measured {value:.6g}, expected between 3.8 and 4.05"
    )
    assert claims.REGISTRY == {}
    assert capsys.readouterr().out == ""


def test_the_condition_is_printed_and_kept(capsys):
    lk.claim("fast", "INT8 is faster", 2.5, low=1, condition="AVX2, no VNNI")
    assert capsys.readouterr().out == "✓ fast: INT8 is faster (at least 1) [AVX2, no VNNI]\n"
    assert claims.REGISTRY["fast"].condition == "AVX2, no VNNI"


@pytest.mark.parametrize("value", [1, True, np.float32(1), torch.tensor(1.0), np.array(1.0)])
def test_every_kind_of_number_is_a_value(value):
    lk.claim("one", "One is one", value, 1, 1)
    assert claims.REGISTRY["one"] == claims.Claim("one", "One is one", 1.0, 1.0, 1.0, "")


def test_running_a_cell_again_replaces_its_claim():
    lk.claim("x", "First", 1, 0, 2)
    lk.claim("x", "Second", 2, 0, 2)
    assert [claim.sentence for claim in claims.REGISTRY.values()] == ["Second"]


@pytest.mark.parametrize("value", ["high", None, [1, 2], torch.ones(2)])
def test_what_is_no_number_is_refused(value):
    with pytest.raises(TypeError, match="claim x: value, low and high must be numbers"):
        lk.claim("x", "A sentence", value, 0, 1)


def test_a_claim_without_a_bound_is_refused():
    with pytest.raises(ValueError, match="claim x: give low, high or both"):
        lk.claim("x", "A sentence", 1)


@pytest.mark.parametrize(("low", "high"), [(2, 1), (math.nan, 1), (1, math.nan)])
def test_an_empty_band_is_refused(low, high):
    with pytest.raises(ValueError, match="must not be above"):
        lk.claim("x", "A sentence", 1, low, high)


# Figures


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
