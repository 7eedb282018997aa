"""Submissions that nbgrader cannot grade: each is refused by name, and the others are graded.

Left alone, nbgrader stops a class at the first cell whose marks it does not know, and to make a
duplicated cell count for nothing it takes its marks away. So a course made by `labkit release
--nbgrader` reads submissions by `Submission`, which looks at them first.
"""

from collections import Counter
from pathlib import Path

from nbconvert.exporters import NotebookExporter
from nbgrader.api import Gradebook, MissingEntry

from labkit.authoring import notebooks

_SCHEMA = 3  # of nbgrader's marks
_KEYS = {"grade_id", "grade", "solution", "locked"}


class Unsound(RuntimeError):
    """A submission cannot be graded; the message says why, and what the teacher can do."""


class Submission(NotebookExporter):
    """nbgrader's way to read a submission, after a look at it."""

    def from_filename(self, filename, resources=None, **options):
        """Convert a submission.

        Raises:
            Unsound: if nbgrader could not grade it.
        """
        of = resources["nbgrader"]
        try:
            with Gradebook(of["db_url"]) as book:
                source = book.find_notebook(of["notebook"], of["assignment"])
                graded = {cell.name for cell in source.grade_cells}
                marked = {cell.name: cell.name in graded for cell in source.source_cells}
        except MissingEntry:  # nbgrader itself says so
            marked = None
        if marked and (found := problem(Path(filename), marked)):
            raise Unsound(
                f"{filename}: {found}; then run: "
                f"nbgrader autograde {of['assignment']} --student={of['student']}"
            )
        return super().from_filename(filename, resources=resources, **options)


def problem(path: Path, marked: dict[str, bool]) -> str | None:
    """Say why nbgrader could not grade a submission, and what to do; None if it can.

    Args:
        path: the notebook.
        marked: the ids of the assignment's marked cells, in their order, and whether each is
            graded: those that are, nbgrader puts back below the marked cell before them.
    """
    again = "ask for the notebook again"
    try:
        if not path.read_bytes().strip():
            return f"the file is empty: {again}"
        cells = [c for c in notebooks.read(path).cells if "nbgrader" in c.get("metadata", ())]
    except OSError as error:
        return f"the file cannot be read ({error.strerror}): {again}"
    except notebooks.NotebookError as error:
        return f"the file {str(error).removeprefix(f'{path} ')}: {again}"
    marks = [(cell, cell.metadata["nbgrader"]) for cell in cells]
    for cell, mark in marks:
        if not _is_whole(mark):
            first = cell.source.partition("\n")[0]
            return f"nbgrader's marks of the cell {first!r} are damaged: delete them, or the cell"
    counts = Counter(mark["grade_id"] for _, mark in marks)
    there = counts.keys() & marked.keys()
    if not there:
        return f"no cell has marks of this assignment; another notebook, or a copy of it? {again}"
    if twice := [id for id, n in counts.items() if n > 1]:
        return f"more than one cell is {', '.join(twice)}: delete all but the one that counts"
    if foreign := sorted(counts.keys() - marked.keys()):
        return f"{', '.join(foreign)} belongs to another assignment: delete the cell"
    if lost := _lost(marked, there):
        return f"{', '.join(lost)} are gone: copy these cells from the release"
    return None


def _is_whole(mark) -> bool:
    keys = _KEYS | ({"points"} if isinstance(mark, dict) and mark.get("grade") else set())
    return isinstance(mark, dict) and mark.keys() >= keys and mark.get("schema_version") == _SCHEMA


def _lost(marked: dict[str, bool], there: set[str]) -> list[str]:
    # The first graded cell that nbgrader cannot put back, with the one above it.
    found, above = set(there), None
    for id, is_graded in marked.items():
        if is_graded and id not in found:
            if above not in {None, *found}:
                return [above, id]
            found.add(id)
        above = id
    return []
