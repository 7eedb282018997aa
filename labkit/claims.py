"""Executable claims: a sentence, a value, the band it must lie in, its value were it false."""

import math
from dataclasses import dataclass
from typing import Any

WIDEST = 3.0
"""How many times its lower end the upper end of a band may be, unless a reason is given."""


@dataclass(frozen=True)
class Claim:
    """What a notebook claimed.

    Attributes:
        id, sentence: as given.
        value: what was measured; True and False count as 1 and 0.
        low, high: the band, both ends included.
        null: the value if the sentence were false; None where no single value stands for that.
        kind: `"measured"`, `"timed"` or `"recorded"`.
        holds: whether the value lies in the band.
        record: file and machine of a recorded value, else empty.
        reason: why the band is wide, else empty.
    """

    id: str
    sentence: str
    value: float
    low: float
    high: float
    null: float | None
    kind: str
    holds: bool
    record: str = ""
    reason: str = ""


REGISTRY: dict[str, Claim] = {}


def claim(
    id: str,
    sentence: str,
    value: Any,
    low: float = -math.inf,
    high: float = math.inf,
    *,
    null: float | None = None,
    record: str = "",
    reason: str = "",
) -> None:
    """Assert that a value lies in a band; print the sentence, the value and the band.

    Args:
        id: short name, e.g. `"storage-75"`; a notebook uses each once (running the cell again
            replaces it).
        sentence: the claim in words, read before an equals sign, without a full stop.
        value: what was measured. A bool needs no band: it has to be true.
        low, high: the band, both ends included. At least one must be given.
        null: the value if the sentence were false, e.g. 1 for a ratio, 0 for a difference. Needed
            wherever an effect is claimed; the band must not hold it.
        record: of a recorded value, file and machine, e.g. `"03_tiny_lm.jsonl, AMD EPYC"`.
        reason: why the band is wider than a factor of 3.

    Raises:
        AssertionError: if the value lies outside the band, or is NaN; names the value.
        TypeError: if `value` is no number.
        ValueError: if no bound is given, the band is empty, holds its null, or is wider than a
            factor of 3 without a reason.
    """
    number = _number(id, value)
    yes_or_no = _is_bool(value) and math.isinf(low) and math.isinf(high)
    low, high = (1.0, 1.0) if yes_or_no else _checked_band(id, low, high, null, reason)
    kind, holds = "recorded" if record else "measured", low <= number <= high
    REGISTRY[id] = Claim(id, sentence, number, low, high, null, kind, holds, record, reason)
    shown = ("no", "yes")[int(number)] if yes_or_no else _digits(number)
    band = "must be yes" if yes_or_no else _band(low, high)
    if not holds:
        hint = "; look for what broke in the cells above" if math.isnan(number) else ""
        raise AssertionError(f"{id}: {sentence} = {shown}, outside its band: {band}{hint}")
    facts = [f"band {band}", *_null(null), *([f"recorded: {record}"] if record else [])]
    print(f"{'✎' if record else '✓'} {id}: {sentence} = {shown} ({'; '.join(facts)})")


def timed_claim(
    id: str,
    sentence: str,
    ratio: Any,
    low: float = -math.inf,
    high: float = math.inf,
    *,
    null: float = 1.0,
    reason: str = "",
) -> None:
    """State a claim about time, and print whether it holds on this machine; it never raises for it.

    Args:
        id, sentence, reason: as of `claim`.
        ratio: from `labkit.measure.ratio`: its `value`, and where that comes from.
        low, high: the band; it lies on one side of `null`.
        null: the ratio if both were equally fast; nothing holds whose quartiles it lies between.

    Raises:
        TypeError: if `ratio` is a bare number, which does not say how it was timed.
        ValueError: as of `claim`.
    """
    if not all(hasattr(ratio, name) for name in ("value", "low", "high", "origin")):
        kind = type(ratio).__name__
        raise TypeError(f"claim {id}: ratio must be from lk.ratio(one, other), not {kind}")
    number = _number(id, ratio.value)
    low, high = _checked_band(id, low, high, null, reason)
    holds = low <= number <= high and not ratio.low <= null <= ratio.high
    REGISTRY[id] = Claim(id, sentence, number, low, high, null, "timed", holds, "", reason)
    facts = "; ".join([f"band {_band(low, high)}", *_null(null)])
    verdict = "holds here" if holds else "does not hold here"
    print(f"◷ {id}: {sentence} = {_digits(number)} ({facts}): {verdict}, {ratio.origin}")


def _number(id: str, value: Any) -> float:
    try:
        return float(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"claim {id}: the value must be a number or a bool ({error})") from None


def _is_bool(value: Any) -> bool:
    # A bool of Python, numpy or torch.
    return isinstance(value, bool) or "bool" in str(getattr(value, "dtype", ""))


def _checked_band(
    id: str, low: float, high: float, null: float | None, reason: str
) -> tuple[float, float]:
    try:
        low, high = float(low), float(high)
    except (TypeError, ValueError) as error:
        raise TypeError(f"claim {id}: low and high must be numbers ({error})") from None
    if math.isinf(low) and math.isinf(high):
        raise ValueError(f"claim {id}: give low, high or both; without a bound nothing is claimed")
    if not low <= high:
        raise ValueError(f"claim {id}: low={low:g} must not be above high={high:g}")
    if null is not None and not math.isfinite(null):
        raise ValueError(f"claim {id}: null must be a finite number, not {null}")
    if null is not None and low <= null <= high:
        raise ValueError(
            f"claim {id}: the band ({_band(low, high)}) holds null={null:g}, so it would stand if "
            "the sentence were false; move an end past it, or claim something else"
        )
    ends = sorted((abs(low), abs(high)))
    if low * high > 0 and math.isfinite(ends[1]) and ends[1] > WIDEST * ends[0] and not reason:
        raise ValueError(
            f"claim {id}: the band ({_band(low, high)}) is wider than a factor of {WIDEST:g}; "
            "narrow it, or say why in reason="
        )
    return low, high


def _digits(value: float) -> str:
    if abs(value) < 1e6 and value == round(value):
        return f"{value:.0f}"
    if 100 <= abs(value) < 1e6:
        return f"{value:,.0f}"
    return f"{value:.3g}"


def _band(low: float, high: float) -> str:
    if low == high:
        return f"exactly {_end(low)}"
    if math.isinf(high):
        return f"at least {_end(low)}"
    if math.isinf(low):
        return f"at most {_end(high)}"
    return f"{_end(low)} to {_end(high)}"


def _end(value: float) -> str:
    return f"{value:,.0f}" if 10_000 <= abs(value) < 1e7 else f"{value:g}"


def _null(null: float | None) -> list[str]:
    return [] if null is None else [f"null {_end(null)}"]
