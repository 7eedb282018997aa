"""Learner copies: what is taken out, and that no work is ever lost."""

import ast
import json
import os
import shutil
import subprocess

import pytest

from labkit.authoring import commands as command_line
from labkit.authoring import exercise_cells, learner, notebooks

NAMES = [path.name for path in learner.chapters()]
each_chapter = pytest.mark.parametrize("path", learner.chapters(), ids=lambda path: path.stem)


def command(*arguments) -> int:
    return command_line.main([str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def first_release(tmp_path_factory):
    folder = tmp_path_factory.mktemp("class") / "copies"
    assert learner.release(folder) == 0
    return folder


@pytest.fixture
def released(first_release, tmp_path):
    return shutil.copytree(first_release, tmp_path / "copies")


# What a copy holds


@each_chapter
def test_a_copy_has_the_same_code_and_no_outputs(path):
    # nbval runs the chapter as it is committed, with untouched stubs: so it runs the copy too.
    original = notebooks.read(path)
    copy = learner.learner_copy(original)
    before, after = ([c for c in n.cells if c.cell_type == "code"] for n in (original, copy))
    assert [cell.source for cell in before] == [cell.source for cell in after]
    assert any(cell.outputs for cell in before), "the original must stay as it was"
    assert all(cell.outputs == [] and cell.execution_count is None for cell in after)
    for id, cells in exercise_cells.exercises_of(original).items():
        (output,) = cells.check.outputs
        assert output.text == f"Exercise {id}: not attempted yet\n"
        assert "tags" not in cells.check.metadata, "nbval must compare what the check says"


@each_chapter
def test_solutions_go_and_hints_go_on_request(path):
    original = notebooks.read(path)
    for hints, left in ((True, exercise_cells.HINTS), (False, ())):
        copy = learner.learner_copy(original, hints)
        text = "\n".join(cell.source for cell in copy.cells)
        folds = text.count("<details>")
        assert folds == len(left) * len(exercise_cells.exercises_of(original))
        assert f"<summary>{exercise_cells.SOLUTION}</summary>" not in text
        assert len(copy.cells) >= len(original.cells) - len(exercise_cells.exercises_of(original))


@each_chapter
def test_a_solved_chapter_runs_on_as_an_unsolved_one(path):
    # No later cell may read what an answer binds: then solving cannot change how it runs.
    cells = notebooks.read(path).cells
    places = exercise_cells.exercises_of(notebooks.read(path))
    for id, exercise in places.items():
        bound = names(ast.parse(exercise_cells.solution_of(exercise.folded.source)), ast.Store)
        at = next(i for i, cell in enumerate(cells) if cell.id == exercise.check.id)
        own = {cell.id for cells_ in places.values() for cell in cells_}
        later = [c for c in cells[at + 1 :] if c.cell_type == "code" and c.id not in own]
        for cell in later:
            tree = ast.parse(cell.source)
            bound -= names(tree, ast.Store)
            assert names(tree, ast.Load) & bound == set(), id


def names(tree: ast.AST, context: type) -> set[str]:
    """Return what the top level of a module binds, imports apart, or what it reads anywhere."""
    if context is ast.Load:
        found = [n for n in ast.walk(tree) if isinstance(n, ast.Name)]
        return {node.id for node in found if isinstance(node.ctx, ast.Load)}
    bound = set()
    for statement in tree.body:
        if isinstance(statement, ast.FunctionDef | ast.ClassDef):
            bound.add(statement.name)
        elif not isinstance(statement, ast.Import | ast.ImportFrom):  # these mean the same anywhere
            walked = [n for n in ast.walk(statement) if isinstance(n, ast.Name)]
            bound |= {node.id for node in walked if isinstance(node.ctx, ast.Store)}
    return bound


# Release


def test_the_manifest_has_the_hash_of_every_file(released):
    manifest = json.loads((released / learner.MANIFEST).read_text(encoding="utf8"))
    files = {p.relative_to(released).as_posix(): p for p in released.rglob("*") if p.is_file()}
    del files[learner.MANIFEST]
    assert manifest["files"] == {n: learner.digest(p.read_bytes()) for n, p in files.items()}
    assert set(NAMES) < set(files)
    assert manifest["hints"] is True


def test_a_second_release_never_touches_work(released, capsys):
    work = released / NAMES[0]
    work.write_text("mine", encoding="utf8")
    (released / NAMES[1]).unlink()
    (released / "notes.txt").write_text("mine too", encoding="utf8")
    assert command("release", released, "--without-hints") == 1
    assert f"{NAMES[0]}: somebody has worked in it" in capsys.readouterr().out
    assert work.read_text(encoding="utf8") == "mine"
    assert (released / "notes.txt").read_text(encoding="utf8") == "mine too"
    assert (released / NAMES[1]).exists()
    assert "<details>" not in (released / NAMES[2]).read_text(encoding="utf8"), "not yet worked in"
    assert command("release", released) == 1
    assert work.read_text(encoding="utf8") == "mine"


def test_a_file_of_the_same_name_is_work_too(tmp_path):
    (tmp_path / NAMES[0]).write_text("mine", encoding="utf8")
    assert learner.release(tmp_path) == 1
    assert (tmp_path / NAMES[0]).read_text(encoding="utf8") == "mine"


@pytest.mark.parametrize("folder", [learner.NOTEBOOKS, learner.NOTEBOOKS.parent])
def test_the_workbook_itself_is_refused(folder, capsys):
    before = (learner.NOTEBOOKS / NAMES[0]).read_bytes()
    assert command("release", folder) == 1
    assert "is the workbook's own folder; name a new one" in capsys.readouterr().err
    assert (learner.NOTEBOOKS / NAMES[0]).read_bytes() == before


def test_a_broken_manifest_is_refused_and_nothing_written(released, capsys):
    (released / learner.MANIFEST).write_text("{", encoding="utf8")
    (released / NAMES[0]).unlink()
    assert command("release", released) == 1
    assert "is not JSON; move it away" in capsys.readouterr().err
    assert not (released / NAMES[0]).exists()


# Reset


def test_reset_keeps_the_work_and_puts_a_fresh_copy(released, capsys, monkeypatch):
    fresh = (released / NAMES[0]).read_bytes()
    kept = []
    for work in ("first", "second"):
        (released / NAMES[0]).write_text(work, encoding="utf8")
        monkeypatch.setattr(learner.time, "strftime", lambda _: "2026-11-26_101112")
        assert command("reset", "01", "--folder", released) == 0
        assert (released / NAMES[0]).read_bytes() == fresh
        kept.append(capsys.readouterr().out)
    found = {p.name: p.read_text(encoding="utf8") for p in released.glob("*_mine.ipynb")}
    stem = f"{learner.chapters()[0].stem}_2026-11-26_101112"
    assert found == {f"{stem}_mine.ipynb": "first", f"{stem}_2_mine.ipynb": "second"}
    assert f"{stem}_mine.ipynb" in kept[0]


def test_reset_gives_the_kind_of_copy_that_was_released(tmp_path):
    assert learner.release(tmp_path, hints=False) == 0
    fresh = (tmp_path / NAMES[0]).read_bytes()
    (tmp_path / NAMES[0]).write_text("mine", encoding="utf8")
    assert learner.reset("01", tmp_path).read_text(encoding="utf8") == "mine"
    assert (tmp_path / NAMES[0]).read_bytes() == fresh


def test_reset_of_a_fresh_or_missing_chapter_keeps_nothing(released):
    before = (released / NAMES[0]).read_bytes()
    assert learner.reset("01", released) == released / NAMES[0]
    (released / NAMES[0]).unlink()
    assert learner.reset("01", released) == released / NAMES[0]
    assert (released / NAMES[0]).read_bytes() == before
    assert list(released.glob("*_mine.ipynb")) == []


def test_reset_finds_where_one_works(released, monkeypatch):
    (released / NAMES[0]).write_text("mine", encoding="utf8")
    monkeypatch.chdir(released)
    assert learner.reset("01").read_text(encoding="utf8") == "mine"


@pytest.mark.parametrize("chapter", ["", "9", "0", "basics"])
def test_an_unclear_chapter_is_refused(released, chapter, capsys):
    assert command("reset", chapter, "--folder", released) == 1
    assert f"chapter must start one of {NAMES[0]}" in capsys.readouterr().err


def test_a_missing_folder_is_refused(tmp_path, capsys):
    assert command("reset", "01", "--folder", tmp_path / "nowhere") == 1
    assert "is no folder; --folder says where you work" in capsys.readouterr().err


@pytest.fixture
def clone(tmp_path, monkeypatch):
    """A workbook of one chapter that a learner has cloned, to work in the clone itself."""
    folder = tmp_path / "notebooks"
    folder.mkdir()
    (folder / NAMES[0]).write_text("as committed", encoding="utf8")
    monkeypatch.setattr(learner, "NOTEBOOKS", folder)
    return folder


def git(folder, *arguments: str) -> None:
    who = ("-c", "user.name=a", "-c", "user.email=a@example.org")
    subprocess.run(["git", *who, *arguments], cwd=folder, check=True, capture_output=True)


def test_reset_in_the_clone_itself_asks_git(clone):
    commit(clone)
    (clone / NAMES[0]).write_text("mine", encoding="utf8")
    kept = learner.reset("01", clone)
    assert kept.read_text(encoding="utf8") == "mine"
    assert (clone / NAMES[0]).read_text(encoding="utf8") == "as committed"


def test_reset_without_git_loses_nothing(clone):
    with pytest.raises(learner.ReleaseError, match="clone the workbook again"):
        learner.reset("01", clone)
    assert (clone / NAMES[0]).read_text(encoding="utf8") == "as committed"


def commit(clone) -> None:
    git(clone.parent, "init")
    git(clone, "add", ".")
    git(clone, "commit", "-m", "book")


def refused(clone) -> str:
    with pytest.raises(learner.ReleaseError) as caught:
        learner.reset("01", clone)
    assert (clone / NAMES[0]).read_text(encoding="utf8") == "as committed"
    return str(caught.value)


def test_reset_says_that_git_is_missing(clone, monkeypatch, tmp_path):
    commit(clone)
    monkeypatch.setenv("PATH", str(tmp_path))
    message = refused(clone)
    assert "git does not run" in message
    assert "install it" in message
    assert "clone the workbook" not in message


@pytest.mark.skipif(not hasattr(os, "getuid"), reason="Windows has other owners")
def test_reset_says_that_git_distrusts_the_owner(clone, monkeypatch):
    commit(clone)
    # Git's own switch for its tests: it takes the folder for another user's.
    monkeypatch.setenv("GIT_TEST_ASSUME_DIFFERENT_OWNER", "1")
    monkeypatch.setenv("LC_ALL", "de_DE.UTF-8")
    message = refused(clone)
    assert f"git config --global --add safe.directory {clone.parent}" in message
    assert "clone the workbook" not in message


@pytest.mark.parametrize("state", ["empty", "without the chapter", "no repository"])
def test_reset_asks_for_a_clone_where_git_has_no_chapter(clone, state):
    if state != "no repository":
        git(clone.parent, "init")
    if state == "without the chapter":
        git(clone, "commit", "--allow-empty", "-m", "nothing")
    assert "clone the workbook again" in refused(clone)


def test_reset_shows_what_else_git_says(clone):
    commit(clone)
    (clone.parent / ".git" / "config").write_text("[broken", encoding="utf8")
    message = refused(clone)
    assert "git failed: fatal: bad config" in message
    assert "clone the workbook" not in message
