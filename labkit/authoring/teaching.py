"""The generated parts of the teacher's guide.

`python -m labkit.authoring.teaching` brings them up to date.

They lie between two comments, `<!-- generated: NAME -->` and `<!-- end -->`, each alone on a line.
`answers 1.1` holds the known wrong answers of exercise 1.1 with what the check says to each;
`times` holds how long the notebooks take. All else in the guide is written by hand and stays.
"""

import json
import re
import sys
from collections.abc import Iterable
from pathlib import Path

from labkit.authoring import notebooks
from labkit.exercises import Exercise, registry

GUIDE = Path(__file__).parents[2] / "notebooks" / "TEACHING.md"
_MARKER = re.compile(r"^<!-- (?:generated: (?P<name>.+?)|end) -->$", re.MULTILINE)
_SHOWN_SIGNS = 40  # of the first line of a cell
_SIGNS = {"&": "&amp;", "<": "&lt;", ">": "&gt;"} | {sign: f"\\{sign}" for sign in "\\`*_[]$|~"}


class GuideError(RuntimeError):
    """The markers of the guide, or the record of times, do not fit; the message says where."""


def update(path: Path) -> bool:
    """Rewrite what lies between the markers of a guide, complete or not at all.

    The record of times is read from `records/00_times.json` beside the guide. Where there is none,
    the block `times` stays as it is.

    Args:
        path: the guide, a Markdown file.

    Returns:
        Whether the file changed.

    Raises:
        GuideError: if a marker is missing, doubled, unknown or out of place, or the record does not
            fit; the file is left as it was.
    """
    text = path.read_text(encoding="utf8")
    parts = {f"answers {exercise.id}": answers(exercise) for exercise in registry().values()}
    parts["times"] = times(record) if (record := read_times(path)) else None
    filled = fill(text, parts)
    if filled == text:
        return False
    notebooks.write_whole(path, filled.encode())
    return True


def read_times(guide: Path) -> dict | None:
    """Read the record of times beside a guide; None if there is none.

    Raises:
        GuideError: if the file is no JSON.
    """
    path = guide.parent / "records" / "00_times.json"
    if not path.exists():
        return None
    try:
        return json.loads(path.read_text(encoding="utf8"))
    except ValueError as error:
        raise GuideError(f"{path} is no JSON ({error})") from None


def fill(text: str, parts: dict[str, str | None]) -> str:
    """Put each part between its markers.

    Args:
        text: the guide.
        parts: Markdown by name; None leaves what is there.

    Raises:
        GuideError: if the markers are not exactly one pair for each part.
    """
    pieces, names, kept_from, opened = [], [], 0, None
    for marker in _MARKER.finditer(text):
        name, line = marker["name"], text.count("\n", 0, marker.start()) + 1
        if (name is None) == (opened is None):
            what = f"{opened['name']!r} is still open" if opened else "nothing is open"
            raise GuideError(f"line {line}: {marker[0]} where {what}")
        if name is not None:
            if name not in parts or name in names:
                why = "twice" if name in names else f"unknown; there are {', '.join(parts)}"
                raise GuideError(f"line {line}: {marker[0]} is {why}")
            names.append(name)
            opened = marker
            continue
        if (part := parts[opened["name"]]) is not None:
            pieces += [text[kept_from : opened.end()], f"\n\n{part.strip()}\n\n"]
            kept_from = marker.start()
        opened = None
    if opened:
        raise GuideError(f"{opened[0]} has no <!-- end -->")
    if missing := [name for name in parts if name not in names]:
        raise GuideError(f"no <!-- generated: {missing[0]} -->, {len(missing)} in all")
    return "".join(pieces) + text[kept_from:]


def answers(exercise: Exercise) -> str:
    """Return the known wrong answers of an exercise as a folded Markdown table."""
    title = (
        f"{'★' * exercise.stars} · {exercise.minutes} min · "
        f"{len(exercise.wrong_answers)} known wrong answers"
    )
    rows = [
        ((mistake.__doc__ or "").strip().split("\n")[0], sentence)
        for mistake, sentence in exercise.wrong_answers
    ]
    body = table(("the mistake", "what the check answers"), rows)
    return f"<details><summary>{title}</summary>\n\n{body}\n\n</details>"


def times(record: dict) -> str:
    """Return the table of how long each notebook takes, with what its exercises add.

    Args:
        record: what the recorder wrote: `date`, `command`, `machine`, and under `notebooks`, by
            file name, `seconds`, `peak_nbytes` and `slowest`: pairs of a cell's first line and
            its seconds.

    Raises:
        GuideError: if a notebook has no record, or a part of it is missing.
    """
    chapters: dict[str, list[Exercise]] = {}
    for exercise in registry().values():
        chapters.setdefault(exercise.id.split(".")[0], []).append(exercise)
    try:
        if missing := [name for name in notebooks.NAMES if name not in record["notebooks"]]:
            raise GuideError(
                f"the record of times lacks {', '.join(missing)}: run {record['command']}"
            )
        found: dict[str, dict[str, dict]] = {}  # by chapter: some have several notebooks
        for name in notebooks.NAMES:
            found.setdefault(str(int(name[:2])), {})[name] = record["notebooks"][name]
        rows = [_times_row(number, found[number], inside) for number, inside in chapters.items()]
        rows.append(_times_total([of for parts in found.values() for of in parts.values()]))
        machine = f"{record['machine']['cpu']}, {record['machine']['physical cores']} cores"
        said = f"Measured on {machine}, on {record['date']}, by `{record['command']}`."
    except (KeyError, TypeError, ValueError) as error:
        raise GuideError(f"the record of times does not fit: {error!r}") from None
    head = ("chapter", "exercises", "code alone (min:s)", "memory (GB)", "slowest cell")
    return f"{table(head, rows, 'lrrrl')}\n\n{said} Another machine takes another time."


def _times_row(number: str, parts: dict[str, dict], inside: Iterable[Exercise]) -> tuple[str, ...]:
    slowest = ""
    if every := [pair for of in parts.values() for pair in of["slowest"]]:
        line, seconds = max(every, key=lambda pair: pair[1])
        shown = line if len(line) <= _SHOWN_SIGNS else line[: _SHOWN_SIGNS - 1].rstrip() + "…"
        slowest = f"{shown} ({seconds:.0f} s)"
    return f"{number} ({', '.join(parts)})", *_sums(inside), *_cost(parts.values()), slowest


def _times_total(every: list[dict]) -> tuple[str, ...]:
    seconds, memory = _cost(every)
    return "all", *_sums(registry().values()), seconds, f"at most {memory}", ""


def _sums(inside: Iterable[Exercise]) -> tuple[str]:
    minutes = [exercise.minutes for exercise in inside]
    return (f"{len(minutes)}, {sum(minutes)} min",)


def _cost(every: Iterable[dict]) -> tuple[str, str]:
    # Of notebooks run one after the other.
    every = list(every)
    minutes, rest = divmod(round(sum(of["seconds"] for of in every)), 60)
    return f"{minutes}:{rest:02}", f"{max(of['peak_nbytes'] for of in every) / 1e9:.1f}"


def table(head: Iterable[str], rows: Iterable[Iterable[str]], align: str = "") -> str:
    """Return a Markdown table whose cells show their text as it is, whatever signs it holds.

    Args:
        head: the names of the columns.
        rows: the texts of the cells.
        align: "l" or "r" for each column; none: all to the left.
    """
    head = list(head)
    rules = [" --: " if side == "r" else " --- " for side in align or "l" * len(head)]
    lines = [_line(head), f"|{'|'.join(rules)}|", *map(_line, rows)]
    return "\n".join(lines)


def _line(texts: Iterable[str]) -> str:
    return f"| {' | '.join(map(_as_it_is, texts))} |"


def _as_it_is(text: str) -> str:
    lines = ("".join(_SIGNS.get(sign, sign) for sign in line) for line in text.splitlines())
    return "<br>".join(line.strip() for line in lines)


def main() -> int:
    """Bring the guide of this repository up to date, and say what happened."""
    try:
        changed = update(GUIDE)
    except (GuideError, OSError) as error:
        print(f"teaching: {error}", file=sys.stderr)
        return 1
    if read_times(GUIDE) is None:
        print("records/00_times.json is not there: the table of times stays as it was.")
    print(f"{GUIDE.name}: {'rewritten' if changed else 'unchanged'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
