"""Read the claims that a notebook printed, from its stored outputs."""

import math
import re
from collections.abc import Iterator
from typing import NamedTuple

SIGNS = {"✓": "measured", "✎": "recorded", "◷": "timed"}
_LINE = re.compile(
    rf"^([{''.join(SIGNS)}]) ([\w.+-]+): (.+) = (\S+) "
    r"\(band ([^;)]+)(?:; null ([^;)]+))?(?:; recorded: ([^)]+))?\)(.*)$",
    re.MULTILINE,
)
_START = re.compile(rf"^[{''.join(SIGNS)}] ", re.MULTILINE)


class ClaimLine(NamedTuple):
    """A claim as it was printed.

    Attributes:
        kind: `"measured"`, `"recorded"` or `"timed"`.
        id, sentence: as given to `claim`.
        shown: the value as printed: a number, or yes.
        low, high: the band; a yes has 1 and 1.
        null: the value if the sentence were false, or None.
        record: file and machine of a recorded value, else empty.
        rest: what follows the band: whether a timed claim held, and how it was timed.
    """

    kind: str
    id: str
    sentence: str
    shown: str
    low: float
    high: float
    null: float | None
    record: str
    rest: str


def claims_in(text: str) -> list[ClaimLine]:
    """Return the claims in a text that a cell printed.

    Raises:
        ValueError: if a line starts with a claim's sign, but does not read as a claim.
    """
    found = [_read(*parts) for parts in _LINE.findall(text)]
    if len(found) != len(_START.findall(text)):
        started = [line for line in text.splitlines() if _START.match(line)]
        odd = next(line for line in started if not _LINE.match(line))
        raise ValueError(f"not a claim in today's form: {odd!r}")
    return found


def claims_of(notebook) -> Iterator[ClaimLine]:
    """Yield the claims in the stored outputs of a notebook.

    Raises:
        ValueError: as of `claims_in`.
    """
    for cell in notebook.cells:
        for output in cell.get("outputs", ()):
            if output.output_type == "stream" and output.name == "stdout":
                yield from claims_in(output.text)


def _read(sign, id, sentence, shown, band, null, record, rest) -> ClaimLine:
    low, high = _band(band.replace(",", "").split())
    null = float(null.replace(",", "")) if null else None
    return ClaimLine(SIGNS[sign], id, sentence, shown, low, high, null, record, rest)


def _band(words: list[str]) -> tuple[float, float]:
    match words:
        case ["must", "be", "yes"]:
            return 1.0, 1.0
        case ["exactly", value]:
            return float(value), float(value)
        case ["at", "least", low]:
            return float(low), math.inf
        case ["at", "most", high]:
            return -math.inf, float(high)
        case [low, "to", high]:
            return float(low), float(high)
    raise ValueError(f"not a band: {' '.join(words)!r}")
