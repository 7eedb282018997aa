"""The clipping explorer: its numbers, its sentence, its figure, and its controls."""

import html
import re

import pytest
import torch

from labkit import clipping, quant, widgets


@pytest.fixture(scope="module")
def heavy() -> torch.Tensor:
    return torch.randn(64, 400, generator=torch.Generator().manual_seed(0)) ** 3


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("reach", [100.0, 12.0, 1.0])
def test_the_two_errors_add_up_to_that_of_the_grid(heavy, bits, reach):
    state = clipping.clip_state(heavy, bits, reach)
    ends = torch.stack([heavy.min(), heavy.max()]) * reach / 100
    grid = quant.choose_qparams(ends, bits, dim=0)
    error = quant.dequantize(quant.quantize(heavy, *grid, bits), *grid) - heavy
    assert sum(state.curve[reach]) == pytest.approx(error.square().mean().item(), rel=1e-4)
    assert state.scale == pytest.approx(grid[0].item())
    beyond = (heavy - heavy.clamp(state.low, state.high)).square().mean().item()
    assert state.curve[reach][1] == pytest.approx(beyond, rel=1e-3, abs=1e-6)
    assert state.clipped == ((heavy < state.low) | (heavy > state.high)).sum()


def test_the_best_range_is_narrower_with_fewer_bits(heavy):
    best = [clipping.clip_state(heavy, bits).best_reach for bits in (2, 4, 8)]
    assert best == sorted(best)
    assert best[0] < best[2]
    for bits, reach in zip((2, 4, 8), best, strict=True):
        totals = {r: sum(e) for r, e in clipping.clip_state(heavy, bits).curve.items()}
        assert totals[reach] == min(totals.values())


def test_sentence_and_title_say_what_the_state_holds(heavy):
    state = clipping.clip_state(heavy, 4, 50.0)
    sentence = clipping.clip_sentence(state)
    assert sentence.startswith("4 bits, range cut to 50 % of its ends: from −")
    assert f"{state.clipped:,} of 25,600 values clipped" in sentence
    assert f"The sum is least at {state.best_reach:g} %." in sentence
    titles = {r: clipping.clip_title(clipping.clip_state(heavy, 4, r)) for r in (100.0, 1.0)}
    assert titles[100.0] == "4 bits, range cut to 100 %: rounding costs most"
    assert titles[1.0] == "4 bits, range cut to 1 %: clipping costs most"
    best = clipping.clip_state(heavy, 4, state.best_reach)
    assert clipping.clip_title(best).endswith("the least total error")


def test_figure_has_labels_and_the_range(heavy):
    figure = clipping.clip_figure(clipping.clip_state(heavy, 4, 12.0))
    left, right = figure.axes
    assert all(axes.get_xlabel() and axes.get_ylabel() for axes in (left, right))
    assert {line.get_label() for line in right.lines} >= {"rounding error", "clipping error", "sum"}


@pytest.mark.parametrize("x", [torch.full((9,), 2.0), torch.zeros(4, 4), torch.tensor([1.5])])
def test_constant_activations_are_no_trouble(x):
    state = clipping.clip_state(x, 8, 100.0)
    assert sum(state.curve[100.0]) < 1e-4
    assert len(clipping.clip_figure(state).axes) == 2


def test_bad_input_is_refused(heavy):
    with pytest.raises(ValueError, match=r"reach must be one of .*, not 33"):
        clipping.clip_state(heavy, 4, 33)
    with pytest.raises(ValueError, match="bits must be from 2 to 8, not 9"):
        widgets.clip_explorer(heavy, 9)
    with pytest.raises(ValueError, match="NaN or infinite"):
        widgets.clip_explorer(torch.tensor([1.0, torch.nan]))


def test_controls_change_picture_and_sentence(heavy):
    box = widgets.clip_explorer(heavy, 4, 100.0)
    row, picture, sentence = box.children
    bits, reach = row.children
    seen = [(picture.value, sentence.value)]
    for control, value in ((reach, 12.0), (bits, 8)):
        control.value = value
        seen.append((picture.value, sentence.value))
    assert len(set(seen)) == 3
    state = clipping.clip_state(heavy, 8, 12.0)
    assert html.escape(clipping.clip_sentence(state)) in sentence.value
    alt = re.search(r'alt="([^"]*)"', picture.value)[1]
    assert alt == html.escape(clipping.clip_title(state))
    assert all(control.description for control in (bits, reach))
