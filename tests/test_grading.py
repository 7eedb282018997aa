"""A course through nbgrader: generated, fetched, submitted by five learners, graded, fed back."""

import copy
import html
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from nbformat import v4

from labkit import exercises
from labkit.authoring import exercise_cells, grading, learner, notebooks

CHAPTER = "01_basics"
STARS = {id: e.stars for id, e in exercises.registry().items() if id.startswith("1.")}
# nbgrader names a learner after the system's user; on JupyterHub's images, after the hub's. It
# takes seconds to start, so several commands share a process.
AS_ON_A_HUB = """
import json, os, sys
import nbgrader.utils
nbgrader.utils.get_osusername = lambda: "jovyan"
from nbgrader.apps.nbgraderapp import NbGraderApp, main
for folder, user, arguments in json.loads(sys.argv[1]):
    os.chdir(folder)
    os.environ["JUPYTERHUB_USER"] = user
    sys.argv[1:] = arguments
    main()
    NbGraderApp.clear_instance()
"""

# In a process of its own: nbgrader imports setuptools, which refuses to where distutils came first.
GRADES = """
import json, sys
from nbgrader.api import Gradebook
with Gradebook(sys.argv[1]) as book:
    (notebook,) = book.find_submission(*sys.argv[2:]).notebooks
    print(json.dumps({grade.name: grade.score for grade in notebook.grades}))
"""


def nbgrader(folder: Path, *arguments: str, fails: bool = False) -> str:
    """Run a command of the teacher; return what it printed."""
    return nbgraders([(folder, "teacher", arguments)], fails)


def nbgraders(calls: list[tuple[Path, str, tuple[str, ...]]], fails: bool = False) -> str:
    """Run commands one after the other: each in a folder, by a user."""
    root = calls[0][0].parent
    options = [f"--Exchange.root={root / 'exchange'}"]
    known = [(str(folder), user, [*arguments, *options]) for folder, user, arguments in calls]
    done = subprocess.run(
        [sys.executable, "-c", AS_ON_A_HUB, json.dumps(known)],
        env={**os.environ, "HOME": str(root)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        encoding="utf8",
        check=False,
    )
    assert bool(done.returncode) == fails, done.stdout[-3000:]
    return done.stdout


# What learners do with a fetched notebook


def solve(notebook, *ids: str) -> None:
    original = notebooks.read(learner.NOTEBOOKS / f"{CHAPTER}.ipynb")
    for id in ids:
        folded = exercise_cells.exercises_of(original)[id].folded.source
        solution = exercise_cells.solution_of(folded)
        exercise_cells.exercises_of(notebook)[id].stub.source += "\n" + solution


def solved(notebook) -> None:
    solve(notebook, *STARS)


def unsolved(notebook) -> None:
    pass


def half(notebook) -> None:
    solve(notebook, "1.1", "1.2", "1.3")
    stub = exercise_cells.exercises_of(notebook)["1.4"].stub
    (name,) = exercises.registry()["1.4"].function_names
    stub.source += f"\ndef {name}(*arguments):\n    return arguments[0]"


def hostile(notebook) -> None:
    cells = exercise_cells.exercises_of(notebook)
    solve(notebook, "1.3", "1.4", "1.6")
    cells["1.1"].stub.source += "\ndef decode_fp16(pattern):\n    while True:\n        pass"
    cells["1.2"].stub.source += "\nimport sys\nsys.exit(0)"
    cells["1.3"].check.metadata.nbgrader.points = 1000
    cells["1.5"].check.metadata.nbgrader.locked = False
    cells["1.5"].check.source = "print('Exercise 1.5: correct.')"
    notebook.cells.remove(cells["1.4"].check)
    notebook.cells.insert(2, v4.new_code_cell("while True:\n    pass"))


def killer(notebook) -> None:
    solve(notebook, "1.1")
    cells = exercise_cells.exercises_of(notebook)
    cells["1.2"].stub.source += "\nimport os\nos._exit(0)"


# Submissions as they turn up in `submitted`, named so that they come before the others.


def once_more(cell, **marks):
    made = copy.deepcopy(cell)
    made.id = "again"
    made.metadata.nbgrader |= marks
    return made


def twice(notebook) -> None:
    solve(notebook, *STARS)
    check = exercise_cells.exercises_of(notebook)["1.2"].check
    notebook.cells.append(once_more(check))


def stub_twice(notebook) -> None:
    stub = exercise_cells.exercises_of(notebook)["1.2"].stub
    notebook.cells.insert(0, once_more(stub))


def unmarked(notebook) -> None:
    for each in notebook.cells:
        each.metadata.pop("nbgrader", None)


def marks_changed(notebook, **changed) -> None:
    for each in notebook.cells:
        if mark := each.metadata.get("nbgrader"):
            mark |= changed
            for key in [key for key, value in changed.items() if value is None]:
                del mark[key]


def foreign(notebook) -> None:
    stub = exercise_cells.exercises_of(notebook)["1.2"].stub
    notebook.cells.append(once_more(stub, grade_id="answer-2-1"))


def without_an_exercise(notebook) -> None:
    solve(notebook, *STARS)
    cells = exercise_cells.exercises_of(notebook)["1.4"]
    notebook.cells = [c for c in notebook.cells if c not in (cells.stub, cells.check)]


def old_format(notebook) -> str:
    return nbformat.v3.writes_json(nbformat.convert(notebook, 3))


def chapter_2(notebook) -> str:
    path = learner.NOTEBOOKS / "02_ptq.ipynb"
    return nbformat.writes(grading.source_notebook(notebooks.read(path)))


UNSOUND = {  # what the teacher reads of each
    "twice": (twice, "more than one cell is check-1-2: delete all but the one that counts"),
    "stub-twice": (stub_twice, "more than one cell is answer-1-2"),
    "unmarked": (unmarked, "no cell has marks of this assignment"),
    "chapter-2": (chapter_2, "no cell has marks of this assignment"),
    "no-schema": (lambda n: marks_changed(n, schema_version=None), "are damaged"),
    "old-schema": (lambda n: marks_changed(n, schema_version=1), "are damaged"),
    "new-schema": (lambda n: marks_changed(n, schema_version=4), "are damaged"),
    "no-id": (lambda n: marks_changed(n, grade_id=None), "are damaged"),
    "no-kind": (lambda n: marks_changed(n, solution=None), "are damaged"),
    "foreign": (foreign, "answer-2-1 belongs to another assignment: delete the cell"),
    "gone": (without_an_exercise, "answer-1-4, check-1-4 are gone: copy these cells"),
    "old-format": (old_format, "not a notebook of format 4"),
    "empty": (lambda n: "", "the file is empty: ask for the notebook again"),
    "half": (lambda n: nbformat.writes(n)[:5000], "not a notebook of format 4"),
    "number": (lambda n: "1", "not a notebook of format 4"),
    "texts": (lambda n: '{"nbformat": 4, "cells": ["a"]}', "not a notebook of format 4"),
    "conflict": (lambda n: "<<<<<<< HEAD\n" + nbformat.writes(n), "not a notebook of format 4"),
}


def hand_in(course: Path, name: str, work) -> None:
    """Put a submission where `nbgrader collect` would."""
    path = course / "submitted" / f"0-{name}" / CHAPTER / f"{CHAPTER}.ipynb"
    path.parent.mkdir(parents=True)
    notebook = nbformat.read(course / "release" / CHAPTER / path.name, as_version=4)
    text = work(notebook)
    path.write_text(nbformat.writes(notebook) if text is None else text, encoding="utf8")


LEARNERS = {f.__name__: f for f in (solved, unsolved, half, hostile, killer)}
# An answer that ends the kernel leaves nothing to grade: nbgrader names the learner and goes on.
NOTHING = dict.fromkeys(STARS, 0)
POINTS = {
    "solved": STARS,
    "unsolved": NOTHING,
    "half": {**NOTHING, "1.1": 1, "1.2": 1, "1.3": 2},
    "hostile": {**NOTHING, "1.3": 2, "1.6": 2},
    "killer": NOTHING,
}
SOLVED = {
    "solved": set(STARS),
    "unsolved": set(),
    "half": {"1.1", "1.2", "1.3"},
    "hostile": {"1.3", "1.4", "1.6"},
}


@pytest.fixture(scope="module")
def course(tmp_path_factory):
    """The whole round; the folder of the course."""
    root = tmp_path_factory.mktemp("class")
    course = root / "course"
    assert grading.release_course(course) == 0
    (root / "exchange").mkdir(mode=0o777)
    steps = ("generate_assignment", "release_assignment")
    nbgraders([(course, "teacher", (step, CHAPTER)) for step in steps])
    take_part(root)
    nbgrader(course, "collect", CHAPTER)
    for name, (work, _) in UNSOUND.items():
        hand_in(course, name, work)
    log = nbgrader(course, "autograde", CHAPTER, "--Execute.timeout=10", fails=True)
    (course / "autograde.log").write_text(log, encoding="utf8")
    steps = ("generate_feedback", "release_feedback")
    nbgraders([(course, "teacher", (step, CHAPTER)) for step in steps])
    return course


def take_part(root: Path) -> None:
    """Let each learner fetch the chapter, work, and submit it."""
    for name in LEARNERS:
        (root / name).mkdir()
    for_all = [(root / name, name) for name in LEARNERS]
    which = CHAPTER, "--course=quantization-workbook"
    nbgraders([(home, name, ("fetch_assignment", *which)) for home, name in for_all])
    for home, name in for_all:
        path = home / CHAPTER / f"{CHAPTER}.ipynb"
        notebook = nbformat.read(path, as_version=4)
        LEARNERS[name](notebook)
        nbformat.write(notebook, path)
    nbgraders([(home, name, ("submit", *which)) for home, name in for_all])


def scores(course: Path, name: str) -> dict[str, float]:
    printed = subprocess.check_output(
        [sys.executable, "-c", GRADES, f"sqlite:///{course / 'gradebook.db'}", CHAPTER, name],
        encoding="utf8",
    )
    found = json.loads(printed)
    return {id: found[f"check-{id.replace('.', '-')}"] for id in STARS}


@pytest.mark.parametrize("name", LEARNERS)
def test_points_are_right(course, name):
    assert scores(course, name) == POINTS[name]


def test_who_ends_the_kernel_is_named_and_gets_no_feedback(course):
    for folder in ("autograded", "feedback"):
        assert (course / folder / "half" / CHAPTER).exists()
        assert not (course / folder / "killer" / CHAPTER).exists()
    log = (course / "autograde.log").read_text(encoding="utf8")
    assert f"error processing assignment '{CHAPTER}' for student 'killer'" in log


@pytest.mark.parametrize("name", UNSOUND)
def test_what_cannot_be_graded_is_named_and_stops_nobody(course, name):
    log = (course / "autograde.log").read_text(encoding="utf8")
    assert f"error processing assignment '{CHAPTER}' for student '0-{name}'" in log
    path = rf"\S*/submitted/0-{name}/{CHAPTER}/{CHAPTER}\.ipynb"
    (said,) = set(re.findall(rf"Unsound: {path}: (.+)", log))
    assert UNSOUND[name][1] in said
    assert said.endswith(f"; then run: nbgrader autograde {CHAPTER} --student=0-{name}")
    for folder in ("autograded", "feedback"):
        assert not (course / folder / f"0-{name}" / CHAPTER).exists()


def test_the_guide_counts_them():
    guide = (learner.NOTEBOOKS / "TEACHING.md").read_text(encoding="utf8")
    assert f"five learners and {len(UNSOUND)} spoiled files" in " ".join(guide.split())


def test_a_mended_submission_is_graded(course):
    path = course / "submitted" / "0-twice" / CHAPTER / f"{CHAPTER}.ipynb"
    notebook = nbformat.read(path, as_version=4)
    notebook.cells = [each for each in notebook.cells if each.id != "again"]
    nbformat.write(notebook, path)
    nbgrader(course, "autograde", CHAPTER, "--student=0-twice")
    assert scores(course, "0-twice") == STARS


def test_the_release_has_locked_checks_and_untouched_stubs(course):
    released = notebooks.read(course / "release" / CHAPTER / f"{CHAPTER}.ipynb")
    original = exercise_cells.exercises_of(notebooks.read(learner.NOTEBOOKS / f"{CHAPTER}.ipynb"))
    for id, cells in exercise_cells.exercises_of(released).items():
        assert cells.stub.source.split(grading.STUB)[0].strip() == original[id].stub.source.strip()
        assert cells.check.source.strip() == original[id].check.source.strip()
        marks = cells.check.metadata.nbgrader
        assert (marks.grade, marks.locked, marks.points) == (True, True, STARS[id])
        assert (cells.stub.metadata.nbgrader.solution, cells.stub.metadata.nbgrader.grade) == (1, 0)


# No solution leaks


def squeezed(text: str) -> str:
    return re.sub(r"\s", "", text)


def secret_lines(path: Path) -> dict[str, set[str]]:
    """Return the lines that only the folded solution of an exercise has, by exercise."""
    notebook = notebooks.read(path)
    public = squeezed("\n".join(c.source for c in learner.learner_copy(notebook).cells))
    found = {}
    for id, cells in exercise_cells.exercises_of(notebook).items():
        lines = map(squeezed, exercise_cells.solution_of(cells.folded.source).splitlines())
        found[id] = {line for line in lines if len(line) > 12 and line not in public}
    return found


def leaks(text: str, secrets: dict[str, set[str]], known: set[str] = frozenset()) -> set[str]:
    """Return the exercises, those in `known` apart, of whose solution a line is in the text."""
    seen = squeezed(text)
    return {id for id in secrets.keys() - known if any(line in seen for line in secrets[id])}


@pytest.mark.parametrize("path", learner.chapters(), ids=lambda path: path.stem)
def test_no_solution_is_in_a_learner_copy(path):
    secrets, notebook = secret_lines(path), notebooks.read(path)
    assert all(secrets.values()), "every solution should have a line of its own"
    for hints in (True, False):
        copy = notebooks.as_bytes(learner.learner_copy(notebook, hints)).decode()
        text = "\n".join(cell.source for cell in nbformat.reads(copy, as_version=4).cells)
        assert leaks(text, secrets) == set()
    folded = "\n".join(c.folded.source for c in exercise_cells.exercises_of(notebook).values())
    assert leaks(folded, secrets) == set(secrets), "the test must see a leak where there is one"


def test_no_solution_is_in_the_release(course):
    text = (course / "release" / CHAPTER / f"{CHAPTER}.ipynb").read_text(encoding="utf8")
    sources = "\n".join(cell.source for cell in nbformat.reads(text, as_version=4).cells)
    assert leaks(sources, secret_lines(learner.NOTEBOOKS / f"{CHAPTER}.ipynb")) == set()
    assert "BEGIN SOLUTION" not in text
    assert "HIDDEN TESTS" not in text
    names = {path.name for path in (course / "release").rglob("*") if path.is_file()}
    assert names == {f"{CHAPTER}.ipynb", *(Path(name).name for name in learner.records())}


@pytest.mark.parametrize("name", SOLVED)
def test_feedback_shows_points_and_no_solution_but_the_learners_own(course, name):
    (page,) = (course / "feedback" / name / CHAPTER).glob("*.html")
    text = html.unescape(re.sub(r"<[^>]*>", "", page.read_text(encoding="utf8")))
    secrets = secret_lines(learner.NOTEBOOKS / f"{CHAPTER}.ipynb")
    assert leaks(text, secrets, known=SOLVED[name]) == set()
    assert leaks(text, secrets) == SOLVED[name], "own answers are in the feedback"
    total = sum(POINTS[name].values())
    assert re.search(rf"Score:\s*{total:.1f}\s*/\s*{sum(STARS.values()):.1f}", text)


# Every chapter


@pytest.mark.parametrize("path", learner.chapters(), ids=lambda path: path.stem)
def test_autograding_has_what_every_answer_and_check_needs(path, tmp_path):
    source = grading.source_notebook(notebooks.read(path))
    namespace, tested, file = {"__name__": "__main__"}, 0, tmp_path / "cell.py"
    for cell in source.cells:
        if cell.cell_type == "code" and grading.SKIP not in cell.metadata.get("tags", []):
            file.write_text(cell.source, encoding="utf8")  # numba wants a file for its cache
            exec(compile(cell.source, file, "exec"), namespace)
            tested += "BEGIN HIDDEN TESTS" in cell.source
    assert tested == len(exercise_cells.exercises_of(source))
    assert len(source.cells) > 2 * tested
    ids = [cell.id for cell in source.cells]
    assert len(set(ids)) == len(ids)


def test_a_wrong_answer_fails_its_test():
    source = grading.source_notebook(notebooks.read(learner.NOTEBOOKS / f"{CHAPTER}.ipynb"))
    cells = exercise_cells.exercises_of(source)["1.1"]
    namespace = {}
    exec("import labkit as lk\ndef decode_fp16(pattern): return 0.0", namespace)
    with pytest.raises(AssertionError, match=r"1\.1 is not solved"):
        exec(cells.check.source, namespace)


def cell(source: str):
    return v4.new_code_cell(source, id="one")


@pytest.mark.parametrize(
    ("source", "run", "skipped"),
    [
        ("import torch\nSIZE = 3", "import torch\nSIZE = 3", None),
        ("def f(x):\n    return y", "def f(x):\n    return y", None),
        ("import os\n\n# then\nprint(1)\nx = 2", "import os", "# then\nprint(1)\nx = 2"),
        ("model = load()", None, "model = load()"),
        ("rows = model.rows", None, "rows = model.rows"),
        ("first = print[0]", None, "first = print[0]"),
        ("def f(x=model):\n    pass", None, "def f(x=model):\n    pass"),
        ("@cache\ndef f():\n    pass", None, "@cache\ndef f():\n    pass"),
        ("class A(nn.Module):\n    pass", None, "class A(nn.Module):\n    pass"),
        ("%pip install labkit", None, "%pip install labkit"),
    ],
)
def test_work_is_told_from_definitions(source, run, skipped):
    parts = grading._split(cell(source), {"print"})
    ran = [p.source for p in parts if grading.SKIP not in p.metadata.get("tags", [])]
    left = [p.source for p in parts if grading.SKIP in p.metadata.get("tags", [])]
    assert (ran, left) == ([run] if run else [], [skipped] if skipped else [])
