"""Say what is wrong with a result that should be a number; shared by exercises of chapter 5."""

from numbers import Real

from labkit.exercises.judge import kind, show


def number_misfit(written: str, got, expected: float, tolerance: float) -> str | None:
    """Return a clause that begins with the call as `written`, or None if the number is right."""
    if not isinstance(got, Real):
        return f"{written} returns {kind(got)}, expected a float"
    if abs(float(got) - expected) <= tolerance:  # NaN is not
        return None
    return f"{written} gives {show(float(got))}, expected {show(expected)}"
