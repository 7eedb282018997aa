"""Executable claims: a sentence, a measured value, and the band it must lie in."""

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Claim:
    """What a notebook asserted: the sentence, the value, the band `[low, high]`, the condition."""

    id: str
    sentence: str
    value: float
    low: float
    high: float
    condition: str


REGISTRY: dict[str, Claim] = {}


def claim(
    id: str,
    sentence: str,
    value: float,
    low: float = -math.inf,
    high: float = math.inf,
    *,
    condition: str = "",
) -> None:
    """Assert that a measured value lies in a band, and print the sentence with the band.

    What is printed does not hold the value, so the output is the same on every machine.

    Args:
        id: short name, e.g. `"storage-75"`; a notebook uses each once (running the cell again
            replaces it).
        sentence: the claim in words, without a full stop.
        value: what was measured; True and False count as 1 and 0.
        low, high: the band, both ends included. At least one must be given.
        condition: the case this machine met, if the claim depends on the hardware.

    Raises:
        AssertionError: if the value lies outside the band; names the value.
        TypeError: if `value` is no number.
        ValueError: if no bound is given, or the band is empty.
    """
    try:
        value, low, high = float(value), float(low), float(high)
    except (TypeError, ValueError) as error:
        raise TypeError(f"claim {id}: value, low and high must be numbers ({error})") from None
    if math.isinf(low) and math.isinf(high):
        raise ValueError(f"claim {id}: give low, high or both; without a bound nothing is claimed")
    if not low <= high:
        raise ValueError(f"claim {id}: low={low:g} must not be above high={high:g}")
    band = _band(low, high)
    if not low <= value <= high:
        raise AssertionError(f"{id}: {sentence}: measured {value:.6g}, expected {band}")
    REGISTRY[id] = Claim(id, sentence, value, low, high, condition)
    met = f" [{condition}]" if condition else ""
    print(f"✓ {id}: {sentence} ({band}){met}")


def _band(low: float, high: float) -> str:
    if low == high:
        return f"exactly {low:g}"
    if math.isinf(high):
        return f"at least {low:g}"
    if math.isinf(low):
        return f"at most {high:g}"
    return f"between {low:g} and {high:g}"
