"""An nbgrader course made from the chapters: what `python -m labkit release --nbgrader` does.

A chapter becomes an assignment. Its stubs become solution cells, with the folded solution between
nbgrader's markers; its checks become locked tests that are worth as many points as the exercise has
stars. Autograding runs imports, definitions, answers and checks: the other cells of a chapter carry
a tag that keeps nbgrader from running them, for they take minutes and no answer depends on them.
"""

import ast
import builtins
import copy
import importlib
from pathlib import Path

from nbformat import NotebookNode

from labkit import exercises
from labkit.authoring import exercise_cells, learner, notebooks

SKIP = "skip-execution"  # nbclient, by which nbgrader runs a notebook, passes over such a cell
STUB = "# Your answer goes into the function above."
CONFIG = f'''"""The workbook as an nbgrader course. Run nbgrader's commands in this folder."""

c = get_config()
c.CourseDirectory.course_id = "quantization-workbook"
c.ClearSolutions.code_stub = {{"python": "{STUB}"}}
# An endless loop is interrupted after this many seconds; the cells below it run all the same.
c.Execute.timeout = 60
c.Execute.interrupt_on_timeout = True
# A submission that cannot be graded is named, and stops no other.
c.Autograde.exporter_class = "labkit.authoring.submissions.Submission"
'''


def release_course(folder: Path) -> int:
    """Write a course that nbgrader accepts, and say what was done; as `learner.release`."""
    files = {"nbgrader_config.py": CONFIG.encode()}
    for name, notebook in learner.unanswered().items():
        home = f"source/{Path(name).stem}"
        files[f"{home}/{name}"] = notebooks.as_bytes(source_notebook(notebook))
        files |= {f"{home}/{name}": content for name, content in learner.records().items()}
    return learner.report(folder, learner.store(folder, files), "release --nbgrader")


def source_notebook(notebook) -> NotebookNode:
    """Return the teacher's notebook of a chapter: solved, with the cells marked for nbgrader.

    Args:
        notebook: an `nbformat.NotebookNode`; stays as it is.
    """
    solutions = {
        id: exercise_cells.solution_of(cells.folded.source)
        for id, cells in exercise_cells.exercises_of(notebook).items()
    }
    made = learner.learner_copy(notebook)
    found = exercise_cells.exercises_of(made)
    for id, cells in found.items():
        _mark_answer(id, cells.stub, solutions[id])
        _mark_test(id, cells.check)
    marked = {cell.id for cells in found.values() for cell in (cells.stub, cells.check)}
    known, cells = set(dir(builtins)), []
    for cell in made.cells:
        work = cell.cell_type == "code" and cell.id not in marked
        cells += _split(cell, known) if work else [cell]
    made.cells = cells
    return made


def _mark_answer(id: str, cell, solution: str) -> None:
    region = f"### BEGIN SOLUTION\n{solution.strip()}\n### END SOLUTION"
    cell.source = f"{cell.source.rstrip()}\n\n\n{region}"
    cell.metadata["nbgrader"] = _marks(f"answer-{id}", solution=True)


def _mark_test(id: str, cell) -> None:
    exercise = exercises.registry()[id]
    names = ", ".join(exercise.function_names)
    test = f'lk.exercises.verdict("{id}", {names}).status == "correct"'
    hidden = f'### BEGIN HIDDEN TESTS\nassert {test}, "{id} is not solved"\n### END HIDDEN TESTS'
    cell.source = f"{cell.source.rstrip()}\n{hidden}"
    cell.metadata["nbgrader"] = _marks(f"check-{id}", grade=True) | {"points": exercise.stars}


def _marks(name: str, solution: bool = False, grade: bool = False) -> dict:
    return {
        "schema_version": 3,
        "grade_id": name.replace(".", "-"),
        "grade": grade,
        "solution": solution,
        "locked": grade,
        "task": False,
    }


def _split(cell, known: set[str]) -> list[NotebookNode]:
    # The plain statements at the top of a cell, which autograding runs, and the rest, which it
    # does not. `known` grows by the names that the first part binds.
    try:
        statements = ast.parse(cell.source).body
    except SyntaxError:  # a magic
        statements = []
    plain = 0
    while plain < len(statements) and _is_plain(statements[plain], known):
        known |= _bound(statements[plain])
        plain += 1
    if statements and plain == len(statements):
        return [cell]
    rest = copy.deepcopy(cell)
    rest.metadata["tags"] = [*rest.metadata.get("tags", []), SKIP]
    if not plain:
        return [rest]
    lines = cell.source.splitlines(keepends=True)
    cut = _first_line(statements[plain]) - 1
    while cut and lines[cut - 1].lstrip().startswith("#"):  # its comment belongs to it
        cut -= 1
    first = copy.deepcopy(cell)
    first.source, rest.source = "".join(lines[:cut]).strip(), "".join(lines[cut:]).strip()
    first.metadata.pop("tags", None)
    rest.id = f"{cell.id}-work"
    return [first, rest]


def _first_line(statement: ast.stmt) -> int:
    decorators = getattr(statement, "decorator_list", [])
    return min([statement.lineno, *(decorator.lineno for decorator in decorators)])


def _is_plain(statement: ast.stmt, known: set[str]) -> bool:
    # Whether it binds names at no cost: an import, a definition, a constant.
    if isinstance(statement, ast.Import | ast.ImportFrom):
        return True
    if isinstance(statement, ast.FunctionDef):
        arguments = statement.args
        now = [*statement.decorator_list, *arguments.defaults, statement.returns]
        now += [
            a.annotation for a in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)
        ]
        now += arguments.kw_defaults
    elif isinstance(statement, ast.ClassDef):
        now = [*statement.decorator_list, *statement.bases]
    elif isinstance(statement, ast.Assign):
        now = [statement.value]
        if any(isinstance(n, ast.Call | ast.Subscript) for n in ast.walk(statement.value)):
            return False
    else:
        return False
    needed = [
        node.id for part in now if part for node in ast.walk(part) if isinstance(node, ast.Name)
    ]
    return known.issuperset(needed)


def _bound(statement: ast.stmt) -> set[str]:
    if isinstance(statement, ast.ImportFrom) and statement.names[0].name == "*":
        return set(dir(importlib.import_module(statement.module)))
    if isinstance(statement, ast.Import | ast.ImportFrom):
        return {alias.asname or alias.name.partition(".")[0] for alias in statement.names}
    if isinstance(statement, ast.Assign):
        names = [node for target in statement.targets for node in ast.walk(target)]
        return {node.id for node in names if isinstance(node, ast.Name)}
    return {statement.name}
