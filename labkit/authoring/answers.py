"""Find answers in a chapter that is to be handed out."""

import ast

from labkit.authoring import exercise_cells, folding


def answers_in(notebook, original) -> dict[str, str]:
    """Say, by exercise, what a chapter holds that would give an answer away.

    Only code counts: comments and docstrings of a stub may be written anew, and an exercise may be
    taken out as a whole.

    Args:
        notebook: an `nbformat.NotebookNode`.
        original: the chapter as it was released.

    Raises:
        NotebookError: if the four cells of an exercise do not stand together.
    """
    now, before = map(exercise_cells.exercises_of, (notebook, original))
    stubs = {_code(cells.stub) for cells in before.values()}
    own = {cells.stub.id for cells in now.values()}
    code = [c for c in notebook.cells if c.cell_type == "code" and c.id not in own]
    defined = set().union(*(folding.names(c)[1] for c in code if _code(c) not in stubs))
    folded = {cells.folded.id for cells in now.values()}
    text = "\n".join(_left(c, folded) for c in notebook.cells if c.cell_type == "markdown")
    found = {}
    for id, cells in before.items():
        names = folding.names(cells.stub)[1]
        if id in now and _code(now[id].stub) != _code(cells.stub):
            found[id] = "the stub is not as it was released"
        elif names & defined:
            found[id] = f"a cell apart from the stub defines {', '.join(sorted(names & defined))}"
        elif any(f"def {name}(" in text for name in names):
            found[id] = "its solution is not folded, as Solution, right below its check"
    return found


def _left(cell, folded: set[str]) -> str:
    # What a copy keeps of a text.
    dropped = (exercise_cells.SOLUTION,) if cell.id in folded else ()
    return exercise_cells.without_folds(cell.source, dropped)


def _code(cell) -> str:
    try:
        tree = ast.parse(cell.source)
    except SyntaxError:
        return cell.source
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef) and ast.get_docstring(node) is not None:
            del node.body[0]
    return ast.dump(tree)
