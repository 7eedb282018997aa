"""Claims hold or raise and say what was measured; those about time never raise."""

import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from nbval.plugin import get_sanitize_patterns

import labkit as lk
from labkit import claims, measure

ROOT = Path(__file__).parent.parent
SANITIZE = ROOT / "notebooks" / "measured_values.cfg"


@pytest.fixture(autouse=True)
def _empty_registry(monkeypatch):
    monkeypatch.setattr(claims, "REGISTRY", {})


def in_turn(*rounds: tuple[float, float]) -> measure.Ratio:
    """Return a ratio of two calls that took these seconds, timed in turn."""
    ones, others = (iter(seconds) for seconds in zip(*rounds, strict=True))
    clock = {"one": lambda: next(ones), "other": lambda: next(others)}
    times = lk.alternate(clock, repeats=len(rounds), warmup=0, own_clock=True)
    return lk.ratio(times["one"], times["other"])


def sanitized(text: str) -> str:
    for regex, replacement in dict(get_sanitize_patterns(SANITIZE.read_text("utf8"))).items():
        text = re.sub(regex, replacement, text)
    return text


# Values


@pytest.mark.parametrize(
    ("value", "low", "high", "printed"),
    [
        (3.9, 3.8, 4.05, "3.9 (band 3.8 to 4.05; null 1)"),
        (3.9, 3.8, math.inf, "3.9 (band at least 3.8; null 1)"),
        (0.0312, -math.inf, 0.5, "0.0312 (band at most 0.5; null 1)"),
        (71_234.5, 50_000, 100_000, "71,234 (band 50,000 to 100,000; null 1)"),
        (16, 16, 16, "16 (band exactly 16; null 1)"),
    ],
)
def test_a_claim_prints_what_was_measured(capsys, value, low, high, printed):
    lk.claim("size", "INT8 over FP32", value, low, high, null=1)
    assert capsys.readouterr().out == f"✓ size: INT8 over FP32 = {printed}\n"
    assert claims.REGISTRY["size"].value == value
    assert claims.REGISTRY["size"].kind == "measured"


@pytest.mark.parametrize("value", [3.7999, 4.0501, -4, math.inf, -math.inf, math.nan])
def test_a_claim_that_fails_says_so_and_is_kept_for_the_ledger(capsys, value):
    with pytest.raises(AssertionError) as raised:
        lk.claim("size", "INT8 over FP32", value, 3.8, 4.05)
    assert str(raised.value).startswith("size: INT8 over FP32 = ")
    hint = "; look for what broke in the cells above" if math.isnan(value) else ""
    assert str(raised.value).endswith(f", outside its band: 3.8 to 4.05{hint}")
    assert not claims.REGISTRY["size"].holds
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("yes", [True, np.bool_(True), torch.tensor(True), torch.ones(1) > 0])
def test_a_yes_needs_no_band(capsys, yes):
    lk.claim("same", "Both write the same tokens", yes)
    assert (
        capsys.readouterr().out == "✓ same: Both write the same tokens = yes (band must be yes)\n"
    )
    with pytest.raises(AssertionError, match="same: Both write the same tokens = no, outside"):
        lk.claim("same", "Both write the same tokens", not yes)


def test_a_recorded_claim_says_whose_record_it_is(capsys):
    lk.claim("old", "Gain in nats", 0.2, 0.1, 0.3, null=0, record="07_healed.jsonl, AMD EPYC")
    assert capsys.readouterr().out == (
        "✎ old: Gain in nats = 0.2 (band 0.1 to 0.3; null 0; recorded: 07_healed.jsonl, AMD EPYC)\n"
    )
    assert claims.REGISTRY["old"].kind == "recorded"


@pytest.mark.parametrize("value", [1, True, np.float32(1), torch.tensor(1.0), np.array(1.0)])
def test_every_kind_of_number_is_a_value(value):
    lk.claim("one", "One", value, 1, 1)
    assert claims.REGISTRY["one"].value == 1.0


def test_running_a_cell_again_replaces_its_claim():
    lk.claim("x", "First", 1, 0, 2)
    lk.claim("x", "Second", 2, 0, 2)
    assert [claim.sentence for claim in claims.REGISTRY.values()] == ["Second"]


# Bad input


@pytest.mark.parametrize("value", ["high", None, [1, 2], torch.ones(2)])
def test_what_is_no_number_is_refused(value):
    with pytest.raises(TypeError, match="claim x: the value must be a number or a bool"):
        lk.claim("x", "A sentence", value, 0, 1)


@pytest.mark.parametrize("value", [1, 1.0, torch.tensor(2)])
def test_a_claim_without_a_bound_is_refused(value):
    with pytest.raises(ValueError, match="claim x: give low, high or both"):
        lk.claim("x", "A sentence", value)


@pytest.mark.parametrize(("low", "high"), [(2, 1), (math.nan, 1), (1, math.nan)])
def test_an_empty_band_is_refused(low, high):
    with pytest.raises(ValueError, match="must not be above"):
        lk.claim("x", "A sentence", 1, low, high)


@pytest.mark.parametrize(
    ("low", "high", "null"),
    [(0.7, 6, 1), (-0.04, 0.04, -0.018), (1, math.inf, 1), (-math.inf, 1, 1), (0, 0, 0)],
)
def test_a_band_that_holds_its_null_is_refused(low, high, null):
    with pytest.raises(ValueError, match=r"claim x: the band \(.*\) holds null=.*move an end"):
        lk.claim("x", "A sentence", low if math.isfinite(low) else high, low, high, null=null)
    with pytest.raises(ValueError, match=r"claim x: the band \(.*\) holds null="):
        lk.timed_claim("x", "A sentence", in_turn((1, 1)), low, high, null=null)
    assert claims.REGISTRY == {}


@pytest.mark.parametrize("null", [math.nan, math.inf])
def test_a_null_is_a_number(null):
    with pytest.raises(ValueError, match="claim x: null must be a finite number"):
        lk.claim("x", "A sentence", 1, 1, 2, null=null)


@pytest.mark.parametrize(("low", "high"), [(1.3, 40), (2, 100_000), (-40, -1.3), (1, 3.01)])
def test_a_wide_band_needs_a_reason(low, high):
    with pytest.raises(ValueError, match=r"claim x: the band \(.*\) is wider than a factor of 3"):
        lk.claim("x", "A sentence", low, low, high)
    lk.claim("x", "A sentence", low, low, high, reason="CPUs differ so much")
    assert claims.REGISTRY["x"].reason == "CPUs differ so much"


@pytest.mark.parametrize(("low", "high"), [(1, 3), (-3, -1), (0, 5), (-1, 9), (2, math.inf)])
def test_other_bands_need_none(low, high):
    lk.claim("x", "A sentence", low, low, high)


# Time


def test_a_timed_claim_says_whether_it_holds_here_and_never_raises(capsys):
    fast = in_turn((4, 1), (6, 2), (10, 2), (4, 1), (8, 2))
    lk.timed_claim("tiles", "Time by rows over time in tiles", fast, 1.2)
    assert claims.REGISTRY["tiles"].holds
    start = "◷ tiles: Time by rows over time in tiles = 4 (band at least 1.2; null 1): "
    said = capsys.readouterr().out
    assert said == start + "holds here, quartiles 4 to 4 over 5 rounds in turn\n"
    lk.timed_claim("tiles", "Time by rows over time in tiles", in_turn((1, 2)), 1.2)
    assert "= 0.5 (band at least 1.2; null 1): does not hold here, " in capsys.readouterr().out
    assert not claims.REGISTRY["tiles"].holds
    assert claims.REGISTRY["tiles"].kind == "timed"


def test_a_time_whose_quartiles_hold_the_null_does_not_hold(capsys):
    near = in_turn((20, 10), (10, 20), (20, 10), (10, 20), (13, 10))
    lk.timed_claim("tiles", "Time by rows over time in tiles", near, 1.2)
    assert "= 1.3 (band at least 1.2; null 1): does not hold here, " in capsys.readouterr().out
    assert not claims.REGISTRY["tiles"].holds


def test_a_bare_number_is_no_timing():
    with pytest.raises(TypeError, match=r"claim x: ratio must be from lk.ratio\(one, other\)"):
        lk.timed_claim("x", "A speed", 2.5, 1.2)


# What nbval compares


def test_values_are_not_compared_but_everything_else_is(capsys):
    def printed(value, seconds, sentence="A ratio = of two", low=1.5):
        lk.claim("x-1", sentence, value, low, 4, null=1)
        lk.claim("y", "Recorded", value, low, 4, null=1, record="a.jsonl, Xeon")
        lk.timed_claim("z", "Speed", in_turn((seconds, 1)), 2)
        lk.claim("yes", "It is so", True)
        print("x = 3 (of 4)")
        return sanitized(capsys.readouterr().out)

    assert printed(2, 1) == printed(3.75, 9.7)
    assert "x = 3 (of 4)" in printed(2, 1)
    assert printed(2, 1) != printed(2, 1, sentence="Another")
    assert printed(2, 1) != printed(2, 1, low=1.6)


def test_the_test_command_uses_the_sanitize_file():
    settings = (ROOT / "pyproject.toml").read_text("utf8")
    assert f'"--nbval-sanitize-with={SANITIZE.relative_to(ROOT).as_posix()}"' in settings
    assert SANITIZE.read_bytes().isascii()  # nbval reads it in the encoding of the system
