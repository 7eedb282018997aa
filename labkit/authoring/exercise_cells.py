"""Find the exercises in a notebook: task, stub, check, and what is folded below them."""

import re
from typing import NamedTuple

from nbformat import NotebookNode

from labkit.authoring.notebooks import NotebookError

HINTS, SOLUTION = ("Hint", "Bigger hint"), "Solution"
_KINDS = ["markdown", "code", "code", "markdown"]
_CHECK = re.compile(r'lk\.check\("([\d.]+)", ')
_FOLD = re.compile(r"<details>\s*<summary>(.*?)</summary>\n\n(.*?)\n\n</details>\n*", re.DOTALL)
_CODE = re.compile(r"```python\n(.*?)```", re.DOTALL)


class Cells(NamedTuple):
    """The four cells of an exercise, in their order; changing one changes the notebook."""

    task: NotebookNode
    stub: NotebookNode
    check: NotebookNode
    folded: NotebookNode


def exercises_of(notebook) -> dict[str, Cells]:
    """Return the exercises of a notebook by id, in their order.

    Raises:
        NotebookError: if a check does not stand between its stub and what is folded, or an
            exercise is checked twice.
    """
    found = {}
    for i, cell in enumerate(notebook.cells):
        called = _CHECK.match(cell.source)
        if cell.cell_type == "code" and called:
            around = notebook.cells[i - 2 : i + 2]
            if [c.cell_type for c in around] != _KINDS or called[1] in found:
                raise NotebookError(
                    f"exercise {called[1]} needs four cells, once: task, stub, check, folded text"
                )
            found[called[1]] = Cells(*around)
    return found


def folds_of(text: str) -> dict[str, str]:
    """Return what is folded in a Markdown text, by its summary."""
    return dict(_FOLD.findall(text))


def solution_of(text: str) -> str:
    """Return the Python code of the folded solution in a Markdown text.

    Raises:
        NotebookError: if there is none.
    """
    parts = _CODE.findall(folds_of(text).get(SOLUTION, ""))
    if not parts:
        raise NotebookError(f"no folded solution in: {text[:60]!r}")
    return "\n".join(parts)


def without_folds(text: str, dropped: tuple[str, ...]) -> str:
    """Return a Markdown text without the folded parts whose summaries are in `dropped`."""
    return _FOLD.sub(lambda fold: "" if fold[1] in dropped else fold[0], text).strip()
