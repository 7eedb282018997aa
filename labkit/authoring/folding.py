"""Fold the cells of a notebook that only draw: a reader sees the figure, and may open its code.

JupyterLab hides the source (`source_hidden`); the book offers to show it (tag `hide-input`).
"""

import ast
import dis
import functools
import types

from IPython.core.inputtransformer2 import TransformerManager

DRAWING = {"show", "subplots"}
TELLING = {"print", "claim", "timed_claim", "check", "display"}
TAG = "hide-input"


def fold(notebook) -> None:
    """Fold the cells that only draw, and unfold all others, in place."""
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    read_later: set[str] = set()
    for cell in reversed(code):
        kept = [tag for tag in cell.metadata.get("tags", []) if tag != TAG]
        hidden = only_draws(cell, read_later)
        _set(cell.metadata, "tags", [*kept, TAG] if hidden else kept)
        _set(cell.metadata, "jupyter", {"source_hidden": True} if hidden else {})
        read, bound = names(cell)
        read_later = (read_later - bound) | read


def only_draws(cell, read_later: set[str]) -> bool:
    """Say whether a cell makes a figure and nothing that the rest of the notebook needs.

    A function whose name starts with draw or plot may be needed: an explorer calls it. A cell that
    holds nothing else only draws, too.

    Args:
        cell: a code cell.
        read_later: names that later cells read before they bind them.
    """
    tree = _tree(cell.source)
    called = {
        getattr(node.func, "attr", None) or getattr(node.func, "id", "")
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
    }
    for_figures = tree.body and all(
        isinstance(part, ast.FunctionDef) and part.name.startswith(("draw_", "plot_"))
        for part in tree.body
    )
    if not (for_figures or called & DRAWING) or called & TELLING:
        return False
    needed = names(cell)[1] & read_later
    return all(name.startswith(("draw", "plot")) for name in needed)


def names(cell) -> tuple[frozenset[str], frozenset[str]]:
    """Return the global names that a cell reads before it binds them, and those that it binds."""
    return _names(cell.source)


@functools.lru_cache(maxsize=4096)  # a release asks for those of each cell several times
def _names(source: str) -> tuple[frozenset[str], frozenset[str]]:
    read, bound = set(), set()

    def walk(code: types.CodeType) -> None:
        for step in dis.get_instructions(code):
            if step.opname in ("LOAD_NAME", "LOAD_GLOBAL") and step.argval not in bound:
                read.add(step.argval)
            elif step.opname in ("STORE_NAME", "STORE_GLOBAL"):
                bound.add(step.argval)
            elif isinstance(step.argval, types.CodeType):
                walk(step.argval)

    walk(compile(_tree(source), "cell", "exec"))
    return frozenset(read), frozenset(bound)


@functools.lru_cache(maxsize=4096)
def _tree(source: str) -> ast.Module:
    try:
        tree = ast.parse(TransformerManager().transform_cell(source))
        compile(tree, "cell", "exec")  # a parsed one may still not compile: a return outside
        return tree
    except (SyntaxError, ValueError):
        return ast.Module(body=[], type_ignores=[])


def _set(metadata, key: str, value) -> None:
    if value:
        metadata[key] = value
    else:
        metadata.pop(key, None)
