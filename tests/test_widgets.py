"""The explorers without a browser: formats against torch, sentences against independent sums."""

import base64
import math
import random
import re
import struct
import threading

import ipywidgets
import pytest
import torch
import traitlets
from notebook_rules import chapter1_explorer

from labkit import formats, plotting, widgets
from labkit.formats import (
    FORMATS,
    bits_figure,
    bits_sentence,
    bits_title,
    decode,
    format_bits,
)
from labkit.plotting import png
from labkit.widgets import bits_explorer

FLOATS = [name for name, (dtype, *_) in FORMATS.items() if dtype]
INTEGERS = [name for name, (_, _, exponent, _) in FORMATS.items() if not exponent]


def by_torch(pattern: int, name: str) -> float:
    dtype, carrier, *_ = FORMATS[name]
    codes = torch.arange(1, dtype=torch.int64) + pattern
    return float(codes.to(carrier).view(dtype).double())


def some_patterns(name: str) -> list[int]:
    width = 8 * FORMATS[name][0].itemsize
    if width == 8:
        return list(range(256))
    ends = [0, 1, 2**width - 1, 2 ** (width - 1), 2 ** (width - 1) - 1]
    exponent_ones = (2 ** FORMATS[name][2] - 1) << FORMATS[name][3]
    return [*ends, exponent_ones, *random.Random(0).sample(range(2**width), 2000)]


def as_bits(pattern: int, name: str) -> str:
    return f"{pattern:0{8 * FORMATS[name][0].itemsize}b}"


def same(a: float, b: float) -> bool:
    both_nan = math.isnan(a) and math.isnan(b)
    return both_nan or (a == b and math.copysign(1, a) == math.copysign(1, b))


def number(pattern: str, sentence: str) -> float:
    """Read one number out of a sentence."""
    found = re.search(pattern, sentence)
    assert found, f"{pattern!r} not in {sentence!r}"
    return float(found[1].replace("−", "-").replace(",", ""))


NUMBER = r"([−+]?[\d.,]*\d(?:e[−+]\d+)?)"


@pytest.mark.parametrize("name", FLOATS)
def test_patterns_mean_what_torch_reads(name):
    for pattern in some_patterns(name):
        bits = as_bits(pattern, name)
        assert same(decode(bits, name), by_torch(pattern, name)), bits


@pytest.mark.parametrize("name", FLOATS)
def test_finite_patterns_survive_the_round_trip(name):
    for bits in (as_bits(pattern, name) for pattern in some_patterns(name)):
        if math.isfinite(decode(bits, name)):
            assert format_bits(decode(bits, name), name).replace(" ", "") == bits
        elif math.isnan(decode(bits, name)):
            assert math.isnan(decode(format_bits(math.nan, name), name))


@pytest.mark.parametrize("name", FLOATS)
def test_typed_numbers_are_rounded_as_torch_rounds(name):
    draw = random.Random(2)
    for _ in range(500):
        value = draw.gauss(0, 1) * 10.0 ** draw.randint(-6, 6)
        expected = float(torch.tensor(value).to(FORMATS[name][0]).double())
        assert same(decode(format_bits(value, name), name), expected), value


def test_fp4_has_sixteen_codes_and_rounds_to_the_nearest_ties_to_even():
    values = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
    for pattern, value in enumerate([*values, *(-x for x in values)]):
        assert same(decode(f"{pattern:04b}", "FP4 E2M1"), value)
        assert format_bits(math.copysign(value, pattern < 8 or -1), "FP4 E2M1") == (
            f"{pattern >> 3} {pattern >> 1 & 3:02b} {pattern & 1}"
        )
    typed = [0.25, 0.75, 2.5, 5, 5.1, -2.6, 1e300, -7.0]
    stored = [0, 1, 2, 4, 6, -3, 6, -6]
    assert [decode(format_bits(x, "FP4 E2M1"), "FP4 E2M1") for x in typed] == stored
    assert "out of range and is stored as 6." in bits_sentence(7.0, "FP4 E2M1")
    with pytest.raises(ValueError, match="FP4 E2M1 has no code for nan"):
        format_bits(math.nan, "FP4 E2M1")


def test_single_precision_agrees_with_the_c_compiler():
    for value in (0.1, -3.25, 1e-40, 3e38):
        packed = int.from_bytes(struct.pack(">f", value), "big")
        assert format_bits(value, "FP32").replace(" ", "") == f"{packed:032b}"


@pytest.mark.parametrize("name", INTEGERS)
def test_integers_are_twos_complement(name):
    width = 1 + FORMATS[name][3]
    for value in range(-(2 ** (width - 1)), 2 ** (width - 1)):
        bits = format_bits(value, name).replace(" ", "")
        assert int.from_bytes([int(bits.rjust(8, bits[0]), 2)], "big", signed=True) == value
        assert decode(bits, name) == value
    assert decode(format_bits(1000, name), name) == 2 ** (width - 1) - 1
    assert decode(format_bits(-1000, name), name) == -(2 ** (width - 1))
    assert [decode(format_bits(x, name), name) for x in (0.5, 1.5, 2.5, -0.5)] == [0, 2, 2, 0]


def test_fields_are_spaced_and_spaces_do_not_matter():
    assert format_bits(0.1, "FP16") == "0 01011 1001100110"
    assert format_bits(-1, "INT8") == "1 1111111"
    assert decode("0 01011 1001100110", "FP16") == decode("0010111001100110", "FP16")


@pytest.mark.parametrize(("value", "name"), [(0.1, "FP16"), (-7.7, "BF16"), (3.3, "FP8 E5M2")])
def test_sentence_has_the_right_numbers(value, name):
    sentence, dtype = bits_sentence(value, name), FORMATS[name][0]
    stored = float(torch.tensor(value).to(dtype).double())
    carrier = torch.tensor(value).to(dtype).view(FORMATS[name][1])
    towards_infinity = 1 if value > 0 else -1
    above = float((carrier + towards_infinity).view(dtype).double())
    assert number(rf" = {NUMBER}\. Error", sentence) == stored
    assert number(rf"Error: {NUMBER} \(", sentence) == pytest.approx(stored - value, rel=1e-3)
    percent = 100 * abs(stored / value - 1)
    assert number(rf"\({NUMBER} %\)", sentence) == pytest.approx(percent, rel=1e-2)
    assert number(rf", {NUMBER} away", sentence) == pytest.approx(above - stored, rel=1e-3)
    info = torch.finfo(dtype)
    assert number(rf"from {NUMBER} to", sentence) == pytest.approx(info.min, rel=1e-8)
    assert number(rf" to {NUMBER};", sentence) == pytest.approx(info.max, rel=1e-8)
    smallest = info.smallest_normal * 2.0 ** -FORMATS[name][3]
    assert number(rf"number is {NUMBER}\.", sentence) == pytest.approx(smallest, rel=1e-3)


@pytest.mark.parametrize(
    ("value", "name"),
    [(70000.0, "FP16"), (500.0, "FP8 E4M3"), (1e6, "FP8 E5M2"), (-math.inf, "FP8 E4M3")],
)
def test_beyond_the_range_the_sentence_says_what_torch_does(value, name):
    stored = float(torch.tensor(value).to(FORMATS[name][0]).double())
    words = "NaN" if math.isnan(stored) else "infinity" if math.isinf(stored) else f"{stored:g}"
    words = words.replace("-", "−")
    assert f"is out of range and is stored as {words}." in bits_sentence(value, name)


def test_title_states_the_finding():
    assert bits_title(0.1, "FP16") == "0.1 becomes 0.0999755859 in FP16: 0.0244 % off"
    assert bits_title(-0.5, "FP16") == "−0.5 is exact in FP16"
    assert bits_title(70000, "FP16") == "70000 becomes infinity in FP16"
    assert bits_title("0 11111 0000000001", "FP16").endswith("is NaN in FP16")
    assert "NaN" in bits_sentence("0 11111 0000000001", "FP16")


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_draws_typical_and_odd_states(name):
    width = len(format_bits(0, name).replace(" ", ""))
    states = [0.0, -0.3, 1e300, "1" * width, "0" + "1" * (width - 1), "0" * (width - 1) + "1"]
    for state in states:
        assert png(bits_figure(state, name)).startswith(b"\x89PNG")
        assert bits_sentence(state, name).startswith(name)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: format_bits(1, "FP12"), "number_format must be one of"),
        (lambda: format_bits(math.nan, "INT8"), "INT8 has no code for nan"),
        (lambda: decode("0101", "FP16"), "16 characters 0 or 1"),
        (lambda: decode("000x", "INT4"), "4 characters 0 or 1"),
        (lambda: bits_explorer(0.1, "FP12"), "number_format must be one of"),
    ],
)
def test_bad_formats_and_patterns(call, words):
    with pytest.raises(ValueError, match=words):
        call()


# The explorers' controls


def find(box, description: str):
    if getattr(box, "description", None) == description:
        return box
    children = (find(child, description) for child in getattr(box, "children", ()))
    return next((child for child in children if child), None)


def toggles(box) -> list:
    if isinstance(box, ipywidgets.ToggleButton):
        return [box]
    return [toggle for child in getattr(box, "children", ()) for toggle in toggles(child)]


def shown(explorer) -> tuple[str, str]:
    *_, picture, sentence = explorer.children
    return picture.value, sentence.value


def test_bits_explorer_answers_each_control():
    explorer = bits_explorer(0.1, "FP16")
    value, chooser = find(explorer, "Value"), find(explorer, "Format")
    states = [shown(explorer)]
    value.value = "70000"
    states.append(shown(explorer))
    chooser.value = "FP8 E4M3"
    states.append(shown(explorer))
    toggles(explorer)[-1].value = True  # 1111 110 becomes 1111 111
    states.append(shown(explorer))
    assert len({picture for picture, _ in states}) == len({words for _, words in states}) == 4
    assert value.value == "NaN"
    assert "0 1111 111: " in states[-1][1]
    assert all("Output" not in type(child).__name__ for child in explorer.children)


def test_bits_explorer_buttons_carry_bit_and_place():
    explorer = bits_explorer(-2, "FP8 E5M2")
    buttons = toggles(explorer)
    assert "".join(button.description for button in buttons) == "11000000"
    assert buttons[0].tooltip == "sign bit 0"
    assert [button.tooltip for button in buttons[1:3]] == ["exponent bit 4", "exponent bit 3"]
    buttons[0].value = False
    assert find(explorer, "Value").value == "2"
    assert buttons[0].description == "0"
    find(explorer, "Format").value = "INT4"
    assert [button.tooltip for button in toggles(explorer)][1:] == [
        "value bit 2",
        "value bit 1",
        "value bit 0",
    ]


@pytest.mark.parametrize(
    ("typed", "words"),
    [
        ("abc", "is not a number; type one such as 0.1"),
        ("", "is not a number"),
        ("1e400", "1e400 is too large to read"),
        ("1e-400", "1e-400 is too small to read"),
        ("<b>", "&lt;b&gt;"),
    ],
)
def test_bits_explorer_keeps_the_last_state_on_bad_input(typed, words):
    explorer = bits_explorer(0.1, "FP16")
    picture, sentence = shown(explorer)
    value = find(explorer, "Value")
    value.value = typed
    assert words in shown(explorer)[1]
    assert "Still showing 0.1 in FP16" in shown(explorer)[1]
    assert shown(explorer)[0] == picture
    value.value = "0.1"
    assert shown(explorer) == (picture, sentence)


def test_bits_explorer_refuses_a_format_that_lacks_the_number():
    explorer = bits_explorer(math.inf, "FP16")
    find(explorer, "Format").value = "INT8"
    assert "INT8 has no code for inf" in shown(explorer)[1]
    assert find(explorer, "Format").value == "FP16"
    find(explorer, "Format").value = "BF16"
    assert 'labkit-sentence" role="status"' in shown(explorer)[1]
    assert "BF16 0 11111111 0000000: " in shown(explorer)[1]


@pytest.mark.parametrize(
    ("second", "expected"),
    [("typed", "INT8 0 0000101"), ("bit", "INT8 0 0000101"), ("format", "INT4 0 111")],
)
def test_bits_explorer_loses_no_event_that_comes_while_it_draws(second, expected, monkeypatch):
    # JupyterLab sends the first comm messages to the main thread and later ones to a subshell
    # thread, so that two callbacks can run at once.
    explorer = bits_explorer(3, "INT8")
    value, chooser, bit = find(explorer, "Value"), find(explorer, "Format"), toggles(explorer)[-2]
    drawing, go_on = threading.Event(), threading.Event()
    plain = formats.number_text

    def slow(*arguments):
        drawing.set()
        assert go_on.wait(10)
        return plain(*arguments)

    monkeypatch.setattr(formats, "number_text", slow)
    events = {"typed": (value, "5"), "bit": (bit, False), "format": (chooser, "INT4")}
    control, new = events[second]
    first = threading.Thread(target=setattr, args=(value, "value", "7"))
    after = threading.Thread(target=setattr, args=(control, "value", new))
    first.start()
    assert drawing.wait(10)
    after.start()
    after.join(0.3)  # time to be lost
    go_on.set()
    first.join(10)
    after.join(10)
    assert expected in shown(explorer)[1]
    assert value.value == ("7" if second == "format" else "5")


def test_bits_explorer_is_quiet_repeatable_and_described(capfd):
    first, second = bits_explorer(), bits_explorer()
    assert capfd.readouterr() == ("", "")
    assert shown(first) == shown(second)
    plain = [explorer._repr_mimebundle_()["text/plain"] for explorer in (first, second)]
    assert plain[0] == plain[1]
    picture, sentence = shown(first)
    alt = re.search(r'alt="([^"]+)"', picture)
    assert alt
    assert len(alt[1]) > 20
    assert "color:" not in sentence


def test_picture_of_the_explorer_is_the_still_figure():
    picture, sentence = shown(bits_explorer(0.1, "FP16"))
    data = base64.b64decode(re.search(r"base64,([^\"]+)", picture)[1])
    assert data == png(bits_figure(0.1, "FP16"))
    assert bits_sentence(0.1, "FP16") in sentence


def test_an_explorer_of_a_notebook_draws_what_is_chosen():
    drawn = []

    def draw(bits, method):
        drawn.append((bits, method))
        return plotting.subplots()[0], f"{bits} bits <{method}>", f"{method} at {bits} bits."

    choices = {"Bits": (2, 3, 4), "Method": {"QAT": "qat", "PTQ": "ptq"}}
    box = widgets.explorer(choices, draw, start=(3,))
    row, picture, sentence = box.children
    assert [control.description for control in row.children] == ["Bits", "Method"]
    assert drawn == [(3, "qat")]
    row.children[1].value = "ptq"
    assert drawn[1:] == [(3, "ptq")]
    assert "ptq at 3 bits." in sentence.value
    assert 'alt="3 bits &lt;ptq&gt;"' in picture.value
    with pytest.raises(traitlets.TraitError, match="not found"):
        widgets.explorer(choices, draw, start=(5,))


# The explorer of chapter 1: the grid of a weight


def make_weight() -> torch.Tensor:
    weight = torch.randn(64, 256, generator=torch.Generator().manual_seed(1)) * 0.02
    weight[3, 7] = 0.4
    return weight


@pytest.fixture(scope="module")
def chapter1() -> dict:
    """What the cells of the explorer define, run on a small weight."""
    names: dict = {"weight": make_weight()}
    exec(chapter1_explorer(), names)
    return names


def brute_force(weight, bits: int, symmetric: bool, size: int) -> float:
    """The mean squared error of nearest-point rounding, in float64, one group at a time."""
    total = 0.0
    for group in weight.double().reshape(-1, size):
        low, high = min(0.0, float(group.min())), max(0.0, float(group.max()))
        if symmetric:
            top = 2 ** (bits - 1) - 1
            grid = torch.arange(-top, top + 1) * max(-low, high) / top
        else:
            scale = (high - low) / (2**bits - 1)
            grid = (torch.arange(2**bits) - round(-low / scale)) * scale
        total += float((group[:, None] - grid.double()).abs().amin(1).square().sum())
    return total / weight.numel()


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize(
    ("granularity", "size"),
    [("per tensor", 64 * 256), ("per channel", 256), ("groups of 128", 128), ("groups of 32", 32)],
)
def test_sentence_of_the_grid_agrees_with_brute_force(chapter1, bits, symmetric, granularity, size):
    weight = make_weight()
    figure, title, sentence = chapter1["draw_grid"](bits, symmetric, granularity, 100, 3)
    mse = brute_force(weight, bits, symmetric, size)
    assert number(rf"squared error {NUMBER},", sentence) == pytest.approx(mse, rel=1e-2)
    decibels = 10 * math.log10(float(weight.double().square().mean()) / mse)
    assert number(rf"SNR {NUMBER} dB", sentence) == pytest.approx(decibels, abs=0.06)
    assert number(rf", {NUMBER} dB", title) == pytest.approx(decibels, abs=0.06)
    expected = bits + (16 if symmetric else 24) / size
    assert number(rf"{NUMBER} bits per weight", sentence) == pytest.approx(expected, abs=1e-3)
    assert number(rf"\({NUMBER} weights\)", sentence) == size
    assert number(rf"of {NUMBER} codes used", sentence) == 2**bits - symmetric
    top, bottom = figure.axes
    grid = [x for (x, _), _ in top.collections[0].get_segments()]
    assert min(map(abs, grid)) == 0, "zero must be on the grid"
    weights, errors = bottom.lines[0].get_data()
    part = weight if size > 256 else weight[3, :size]
    assert weights == pytest.approx(part.flatten().numpy())
    back = torch.tensor(weights + errors).double()
    nearest = (back[:, None] - torch.tensor(grid)).abs().amin(1)
    assert float(nearest.max()) < 1e-6
    assert number(rf"{NUMBER} of \d+ codes", sentence) == len({round(float(x), 6) for x in back})
    plotting.png(figure)


def test_clipping_shortens_the_grid_and_counts_what_it_cut(chapter1):
    magnitudes = make_weight().abs().flatten().sort().values
    kept = math.ceil(0.99 * len(magnitudes))
    for clip, end, clipped in [(100, 0.4, 0), (99, magnitudes[kept - 1], len(magnitudes) - kept)]:
        figure, _, sentence = chapter1["draw_grid"](8, True, "per tensor", clip, 0)
        segments = figure.axes[0].collections[0].get_segments()
        assert max(x for (x, _), _ in segments) == pytest.approx(float(end))
        assert f"{clipped:,} weights clipped" in sentence
        triangles = figure.axes[1].lines[1].get_xdata() if clipped else []
        assert len(triangles) == clipped
        plotting.png(figure)


def test_explorer_of_chapter_1_answers_each_control(chapter1):
    box = widgets.explorer(chapter1["choices"], chapter1["draw_grid"], (4, False, "per channel"))
    states = [shown(box)]
    for description, value in [
        ("Bits", 3),
        ("Grid", True),
        ("Row", 3),
        ("Clip at percentile", 99),
        ("Granularity", "groups of 64"),
    ]:
        find(box, description).value = value
        states.append(shown(box))
    assert len({picture for picture, _ in states}) == len({words for _, words in states}) == 6
    assert "Row 3, first group (64 weights)" in states[-1][1]
