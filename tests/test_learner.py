"""Learner copies: what is taken out, and that no work is ever lost."""

import ast
import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import nbformat
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from nbformat import v4

from labkit.authoring import book, exercise_cells, grading, learner, notebooks
from labkit.authoring import commands as command_line
from labkit.authoring import released as released_chapters

ROOT = Path(__file__).parents[1]
NAMES = notebooks.NAMES
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
        later = [c for c in later if not asks_the_check_first(c, id)]
        for cell in later:
            tree = ast.parse(cell.source)
            bound -= names(tree, ast.Store)
            assert names(tree, ast.Load) & bound == set(), id


def asks_the_check_first(cell, id: str) -> bool:
    """Whether a cell runs an answer only where `lk.exercises.verdict` calls it correct."""
    last = ast.parse(cell.source).body[-1]
    return (
        isinstance(last, ast.If)
        and ast.unparse(last.test).startswith(f"lk.exercises.verdict('{id}', ")
        and ast.unparse(last.test).endswith("status == 'correct'")
    )


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


# Reset, in every way that work comes to stand beside, below or in place of a chapter

TEXT = "what the learner wrote"
CHAPTER, STEM = NAMES[0], NAMES[0].removesuffix(".ipynb")
STAMP = "2026-11-26_101112"


def git(folder, *arguments: str, fails: bool = False) -> None:
    who = ("-c", "user.name=a", "-c", "user.email=a@example.org", "-c", "init.defaultBranch=main")
    done = subprocess.run(["git", *who, *arguments], cwd=folder, capture_output=True, check=False)
    assert bool(done.returncode) == fails, done.stderr.decode()


@pytest.fixture(scope="module")
def upstream(tmp_path_factory):
    """A small workbook in git: two chapters, and both as they were released."""
    root = tmp_path_factory.mktemp("upstream") / "workbook"
    for name in NAMES[:2]:
        packed = released_chapters.packed(name)
        for target in (root / "notebooks" / name, released_chapters._place(name, root)):
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(packed, target)
    git(root, "init")
    git(root, "add", ".")
    git(root, "commit", "-m", "book")
    return root


@pytest.fixture
def clone(upstream, tmp_path, monkeypatch):
    """The notebooks of a learner's own clone, in which the learner is."""
    git(tmp_path, "clone", str(upstream), "workbook")
    monkeypatch.setattr(learner.time, "strftime", lambda _: STAMP)
    monkeypatch.chdir(tmp_path / "workbook")
    return Path("notebooks")


def write(path: Path, text: str = TEXT) -> None:
    """Put a text into a notebook, or into a new file."""
    content = json.loads(path.read_text(encoding="utf8")) if path.exists() else {"cells": [{}] * 9}
    content["cells"][7] = {**content["cells"][7], "source": [text]}
    path.write_text(json.dumps(content), encoding="utf8")


def edited(folder):
    write(folder / CHAPTER)


def committed(folder):
    edited(folder)
    git(folder, "commit", "-am", "Automatic commit by nbgitpuller")


def committed_daily(folder):
    for text in ("yesterday", "today"):
        write(folder / CHAPTER, text)
        git(folder, "commit", "-am", "Automatic commit by nbgitpuller")
    edited(folder)


def committed_and_merged(folder):
    committed(folder)
    git(folder, "checkout", "-b", "theirs", "HEAD~1")
    (folder / "new.md").write_text("news", encoding="utf8")
    git(folder, "add", ".")
    git(folder, "commit", "-m", "news")
    git(folder, "checkout", "main")
    git(folder, "merge", "-Xours", "theirs", "-m", "merged")


def merging(folder, command: str = "merge"):
    git(folder, "checkout", "-b", "theirs")
    write(folder / CHAPTER, "another text")
    git(folder, "commit", "-am", "news")
    git(folder, "checkout", "main")
    committed(folder)
    git(folder, command, "theirs", fails=True)
    assert "<<<<<<<" in (folder / CHAPTER).read_text(encoding="utf8")


def rebasing(folder):
    merging(folder, "rebase")


def detached(folder):
    git(folder, "checkout", "--detach")
    committed(folder)


def on_a_branch(folder):
    git(folder, "checkout", "-b", "mine")
    committed(folder)


def amended(folder):
    edited(folder)
    git(folder, "commit", "-a", "--amend", "-m", "book")


def staged(folder):
    edited(folder)
    git(folder, "add", ".")


def hidden_from_git(folder):
    git(folder, "update-index", "--skip-worktree", CHAPTER)
    edited(folder)


def stashed(folder):
    write(folder / CHAPTER, "stashed")
    git(folder, "stash")
    edited(folder)


def stashed_and_popped(folder):
    edited(folder)
    git(folder, "stash")
    git(folder, "stash", "pop")


def untracked(folder):
    git(folder, "rm", "--cached", CHAPTER)
    git(folder, "commit", "-m", "no chapter")
    edited(folder)


def without_git(folder):
    edited(folder)
    shutil.rmtree(folder.parent / ".git")


def with_a_broken_git(folder):
    committed(folder)
    (folder.parent / ".git" / "HEAD").write_text("nothing", encoding="utf8")


def shallow(folder):
    committed(folder)
    git(folder, "fetch", "--depth", "1")
    git(folder, "gc", "--prune=now")


def copied(folder, name: str = f"{STEM}-Copy1.ipynb"):
    shutil.copy(folder / CHAPTER, folder / name)
    write(folder / name)


def downloaded_again(folder):
    copied(folder, f"{STEM} (1).ipynb")


def dated(folder):
    copied(folder, f"{STEM}_2026-11-01.ipynb")


def copied_and_edited(folder):
    copied(folder)
    write(folder / CHAPTER, "another text")


def kept_by_hand(folder):
    copied(folder, f"{STEM}_mine.ipynb")


def renamed(folder):
    edited(folder)
    (folder / CHAPTER).rename(folder / "my work.ipynb")


def renamed_in_git(folder):
    edited(folder)
    git(folder, "mv", CHAPTER, "Untitled.ipynb")
    git(folder, "commit", "-am", "mine")


def renamed_to_another_number(folder):
    edited(folder)
    (folder / CHAPTER).rename(folder / "00_basics.ipynb")


def deleted_but_for_a_copy(folder):
    copied(folder)
    (folder / CHAPTER).unlink()
    git(folder, "commit", "-am", "deleted")


def read_only(folder):
    edited(folder)
    (folder / CHAPTER).chmod(0o444)


def the_name_is_taken(folder):
    edited(folder)
    kept = folder / f"{STEM}_{STAMP}_mine.ipynb"
    write(kept, "of an earlier reset")
    kept.with_name(f"{STEM}_{STAMP}_2_mine.ipynb").mkdir()
    kept.with_name(f"{STEM}_{STAMP}_3_mine.ipynb").symlink_to("nowhere")


def reset_before(folder):
    write(folder / CHAPTER, "of an earlier reset")
    assert command("reset", "01") == 0
    edited(folder)


def reset_and_committed(folder):
    reset_before(folder)
    git(folder, "commit", "-am", "Automatic commit by nbgitpuller")


def a_folder_of_that_name(folder):
    (folder / CHAPTER).unlink()
    (folder / CHAPTER).mkdir()
    write(folder / CHAPTER / "notes.txt")


def a_link(folder):
    edited(folder)
    (folder / CHAPTER).rename(folder / "elsewhere")
    (folder / CHAPTER).symlink_to("elsewhere")


def half_saved(folder):
    (folder / CHAPTER).write_text(f'{{"cells": ["{TEXT}', encoding="utf8")


def other_bytes(folder):
    (folder / CHAPTER).write_bytes(TEXT.encode() + b"\xff\x00\r\n")


def inside(folder):
    edited(folder)
    os.chdir(folder)


WAYS = [
    *(edited, committed, committed_daily, committed_and_merged, merging, rebasing, detached),
    *(on_a_branch, amended, staged, hidden_from_git, stashed, stashed_and_popped, untracked),
    *(without_git, with_a_broken_git, shallow, copied, downloaded_again, dated, kept_by_hand),
    *(copied_and_edited, renamed, renamed_in_git, renamed_to_another_number, read_only),
    *(deleted_but_for_a_copy, the_name_is_taken, reset_before, reset_and_committed),
    *(a_folder_of_that_name, a_link, half_saved, other_bytes, inside),
]


def holding(folder: Path, text: str) -> set[Path]:
    """Return the files below a folder that hold a text."""
    return {p for p in folder.rglob("*") if p.is_file() and text.encode() in p.read_bytes()}


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
def test_reset_in_a_clone_loses_nothing(clone, way, capsys, monkeypatch):
    home = clone.absolute()
    way(clone)
    before = {text: len(holding(home, text)) for text in (TEXT, "another text", "of an earlier")}
    capsys.readouterr()
    assert command("reset", "01") == 0
    said = capsys.readouterr().out
    assert (home / CHAPTER).read_bytes() == released_chapters.packed(CHAPTER).read_bytes()
    kept = holding(home, TEXT)
    assert any(p.name in said or p.parent.name in said for p in kept - {home / CHAPTER})
    assert {text: len(holding(home, text)) for text in before} == before
    assert not list(home.glob(".*"))
    assert command("reset", "01") == 0  # and once more
    assert "there was nothing to keep" in capsys.readouterr().out
    assert {text: len(holding(home, text)) for text in before} == before


STEPS = {
    "write": lambda folder, n: write(folder / CHAPTER, f"{TEXT} {n}."),
    "commit": lambda folder, n: git(folder, "commit", "--allow-empty", "-am", "automatic"),
    "copy": lambda folder, n: shutil.copy(folder / CHAPTER, folder / f"{STEM}-Copy{n}.ipynb"),
    "rename": lambda folder, n: (folder / CHAPTER).rename(folder / f"mine {n}.ipynb"),
    "branch": lambda folder, n: git(folder, "checkout", "-b", f"b{n}"),
    "detach": lambda folder, n: git(folder, "checkout", "--detach"),
    "lock": lambda folder, n: (folder / CHAPTER).chmod(0o444),
    "reset": lambda folder, n: command("reset", "01"),
}


@settings(max_examples=25, suppress_health_check=list(HealthCheck))
@given(steps=st.lists(st.sampled_from(sorted(STEPS)), max_size=12))
def test_no_order_of_steps_loses_a_text(upstream, steps):
    with tempfile.TemporaryDirectory() as home, contextlib.chdir(home):
        git(Path(home), "clone", str(upstream), "workbook")
        os.chdir("workbook")
        folder, written = Path("notebooks"), []
        for number, step in enumerate([*steps, "reset"]):
            if not (folder / CHAPTER).exists() and step != "reset":
                continue
            if step == "write" and written and holding(folder, written[-1]) == {folder / CHAPTER}:
                written.pop()  # the learner replaces it
            STEPS[step](folder, number)
            written += [f"{TEXT} {number}."] * (step == "write")
            assert all(holding(folder, text) for text in written)
        packed = released_chapters.packed(CHAPTER).read_bytes()
        assert (folder / CHAPTER).read_bytes() == packed
        os.chdir(home)


@pytest.mark.parametrize(
    "way",
    [edited, copied, dated, renamed, kept_by_hand, read_only, a_link, half_saved, reset_before],
    ids=lambda way: way.__name__,
)
def test_reset_in_copies_loses_nothing(released, way, capsys, monkeypatch, tmp_path):
    # The teacher solves the chapter in the workbook meanwhile: that is no fresh copy.
    fresh = (released / CHAPTER).read_bytes()
    monkeypatch.setattr(learner, "NOTEBOOKS", tmp_path / "notebooks")
    learner.NOTEBOOKS.mkdir()
    notebooks.write(solved(CHAPTER, "1.2"), learner.NOTEBOOKS / CHAPTER)
    monkeypatch.chdir(released)
    way(released)
    assert command("reset", "01") == 0
    said = capsys.readouterr().out
    assert (released / CHAPTER).read_bytes() == fresh
    assert any(path.name in said for path in holding(released, TEXT))


def test_a_changed_chapter_that_was_handed_out_comes_back_changed(teachers, tmp_path):
    changed = notebooks.read(teachers / CHAPTER)
    changed.cells[1].source = "The words of the teacher."
    notebooks.write(changed, teachers / CHAPTER)
    assert learner.release(tmp_path / "copies") == 0
    handed_out = (tmp_path / "copies" / CHAPTER).read_bytes()
    assert b"The words of the teacher." in handed_out
    edited(tmp_path / "copies")
    learner.reset("01", tmp_path / "copies")
    assert (tmp_path / "copies" / CHAPTER).read_bytes() == handed_out


def test_a_clone_beside_the_installed_workbook_is_reset_in_full(clone, monkeypatch):
    edited(clone)
    assert clone.absolute() != learner.NOTEBOOKS
    assert learner.reset("01", clone).parent == clone
    assert (clone / CHAPTER).read_bytes() == released_chapters.packed(CHAPTER).read_bytes()


def test_an_nbgrader_notebook_keeps_its_marks(tmp_path, capsys):
    source = grading.source_notebook(notebooks.read(released_chapters.packed(CHAPTER)))
    notebooks.write(source, tmp_path / CHAPTER)
    before = (tmp_path / CHAPTER).read_bytes()
    assert command("reset", "01", "--folder", tmp_path) == 1
    assert "nbgrader fetch_assignment 01_basics --replace" in capsys.readouterr().err
    assert [p.read_bytes() for p in tmp_path.iterdir()] == [before]


def test_a_workbook_without_its_packed_chapters_says_so(clone, monkeypatch, capsys):
    monkeypatch.setattr(learner, "NOTEBOOKS", clone.absolute())
    monkeypatch.setattr(released_chapters, "ROOT", Path("nowhere"))
    monkeypatch.setattr(learner.released.packed, "__defaults__", (Path("nowhere"),))
    edited(clone)
    assert command("reset", "01") == 1
    assert "01_basics.json is missing: install the workbook again" in capsys.readouterr().err
    assert holding(clone, TEXT) == {clone / CHAPTER}


def test_every_chapter_is_packed_as_it_is():
    for path in learner.chapters():
        same = released_chapters.packed(path.name).read_bytes() == path.read_bytes()
        assert same, "run: python -m labkit.authoring.released"


def test_packing_says_what_changed(clone, monkeypatch, capsys):
    root = clone.absolute().parent
    monkeypatch.setattr(released_chapters, "ROOT", root)
    edited(clone)
    assert released_chapters.main() == 0
    assert capsys.readouterr().out == f"{CHAPTER}: packed\n{NAMES[1]}: unchanged\n"
    packed = released_chapters.packed(CHAPTER, root)
    assert packed.read_bytes() == (clone / CHAPTER).read_bytes()


# Chapters are known by name


BESIDE = (
    f"{STEM}-Copy1.ipynb",
    "02_ptq (1).ipynb",
    f"{STEM}_2026-11-01.ipynb",
    f"{STEM}_mine.ipynb",
    f"{STEM}_old.ipynb",
    f"Copy of {CHAPTER}",
    "00_basics.ipynb",
    "08_my_notes.ipynb",
    "Untitled.ipynb",
    f".ipynb_checkpoints/{STEM}-checkpoint.ipynb",
    f".ipynb_checkpoints/{CHAPTER}",
    f"old/{CHAPTER}",
    f"03_qat.ipynb/{CHAPTER}",  # a folder named as a chapter, and one as a copy
    f"{STEM}-old.ipynb/{CHAPTER}",
)


@pytest.fixture
def crowded(tmp_path, monkeypatch):
    """The workbook's folder with two chapters, and much beside them."""
    folder = tmp_path / "notebooks"
    for name in (*NAMES[:2], *BESIDE):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(learner.NOTEBOOKS / NAMES[0 if "02" not in name else 1], folder / name)
    (folder / "records").mkdir()
    monkeypatch.setattr(learner, "NOTEBOOKS", folder)
    return folder


def test_copies_are_not_handed_out(crowded, tmp_path):
    assert [path.name for path in learner.chapters()] == list(NAMES[:2])
    assert command("release", tmp_path / "copies") == 0
    found = {path.name for path in (tmp_path / "copies").iterdir()}
    assert found == {*NAMES[:2], learner.MANIFEST}
    assert command("release", "--nbgrader", tmp_path / "course") == 0
    found = {path.name for path in (tmp_path / "course" / "source").rglob("*")}
    assert found == {f"{Path(name).stem}{end}" for name in NAMES[:2] for end in ("", ".ipynb")}


@pytest.mark.parametrize(("start", "n"), [("02", 1), ("02b", 1), ("02c", 1), ("0", len(NAMES))])
def test_the_parts_of_chapter_2_have_names_of_their_own(start, n):
    found = [path.name for path in notebooks.chosen(learner.NOTEBOOKS, [start])]
    assert len(found) == n
    if n == 1:
        assert found == [learner.full_name(start)] == [f for f in NAMES if f.startswith(start)][:1]


def test_copies_are_neither_refreshed_nor_published(crowded, tmp_path):
    for start in ([], ["0"], ["01", "02"]):
        found = [path.name for path in notebooks.chosen(crowded, start)]
        assert found == list(NAMES[:2])
    assert [path.name for path in notebooks.chosen(crowded, ["01"])] == [CHAPTER]
    with pytest.raises(FileNotFoundError, match=r"no notebook starts with '01_basics-Copy1'; "):
        notebooks.chosen(crowded, ["01_basics-Copy1"])
    book.write_source(crowded, tmp_path / "source")
    assert {path.name for path in (tmp_path / "source").glob("*.ipynb")} == set(NAMES[:2])


def test_reset_is_not_confused_by_copies(crowded, monkeypatch):
    before = {name: (crowded / name).read_bytes() for name in BESIDE}
    edited(crowded)
    kept = learner.reset("01", crowded)
    assert TEXT in kept.read_text(encoding="utf8")
    assert {name: (crowded / name).read_bytes() for name in BESIDE} == before
    assert learner.reset("03", crowded).is_dir(), "a folder in the chapter's place moves away"
    assert (crowded / "03_qat.ipynb").read_bytes() == released_chapters.packed(
        "03_qat.ipynb"
    ).read_bytes()


def test_pytest_collects_the_chapters_alone(crowded, tmp_path):
    shutil.copy(ROOT / "conftest.py", tmp_path)
    for path in crowded.glob("*.ipynb"):
        if path.is_file():
            nbformat.write(v4.new_notebook(cells=[v4.new_code_cell("1")]), path)
    command = [sys.executable, "-m", "pytest", "--nbval", "--collect-only", "-q", "notebooks"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    options = {"cwd": tmp_path, "env": environment, "capture_output": True, "encoding": "utf8"}
    done = subprocess.run([*command, "-p", "no:cacheprovider"], check=False, **options)
    found = {line.partition("::")[0] for line in done.stdout.splitlines() if "::" in line}
    assert found == {f"notebooks/{name}" for name in NAMES[:2]}, done.stdout


def test_every_chapter_of_the_readme_is_known():
    readme = (ROOT / "README.md").read_text(encoding="utf8")
    assert tuple(re.findall(r"^\| \[.+?\]\(notebooks/(.+?)\)", readme, re.MULTILINE)) == NAMES


# No answer goes out


def solved(name: str, id: str):
    """Return a chapter in whose clone the teacher has solved an exercise."""
    notebook = notebooks.read(released_chapters.packed(name))
    cells = exercise_cells.exercises_of(notebook)[id]
    cells.stub.source = exercise_cells.solution_of(cells.folded.source)
    return notebook


def insert(notebook, cell, source: str, kind=v4.new_code_cell) -> None:
    notebook.cells.insert(notebook.cells.index(cell), kind(source, id="added"))


def append(notebook, source: str) -> None:
    notebook.cells.append(v4.new_code_cell(source, id="added"))


def solution(cells) -> str:
    return exercise_cells.solution_of(cells.folded.source)


def stub(change: Callable[[str, str], str]) -> Callable:
    """Return what changes the text of a stub, given that and the solution."""
    return lambda n, cells: cells.stub.update(source=change(cells.stub.source, solution(cells)))


ANSWERED = {
    "solved": stub(lambda now, answer: answer),
    "solved below the stub": stub(lambda now, answer: f"{now}\n{answer}"),
    "half solved": stub(lambda now, answer: now.replace("...", "x = 1\n    ...")),
    "solved wrongly": stub(lambda now, answer: now.replace("...", "return 1")),
    "as lambda": stub(lambda now, answer: "symmetric_fake_quantize = lambda x, bits: x"),
    "no Python": stub(lambda now, answer: "def symmetric_fake_quantize("),
    "a helper in the stub": stub(lambda now, answer: f"SCALE = 2\n{now}"),
    "solved in the last cell": lambda n, c: append(n, solution(c)),
    "solved in the first": lambda n, c: insert(n, n.cells[1], solution(c)),
    "imported": lambda n, c: append(n, "from mine import symmetric_fake_quantize"),
    "a cell before the stub": lambda n, c: insert(n, c.stub, "1 + 1"),
    "a cell before the check": lambda n, c: insert(n, c.check, solution(c)),
    "a text before the check": lambda n, c: insert(n, c.check, "Think.", v4.new_markdown_cell),
    "a cell below the check": lambda n, c: insert(n, c.folded, "1 + 1"),
    "a text below the check": lambda n, c: insert(n, c.folded, "Think.", v4.new_markdown_cell),
    "a solution by another name": lambda n, c: c.folded.update(
        source=c.folded.source.replace("<summary>Solution", "<summary>Answer")
    ),
    "a solution unfolded": lambda n, c: insert(n, n.cells[-1], solution(c), v4.new_markdown_cell),
    "checked twice": lambda n, c: append(n, c.check.source),
    "a check behind a comment": lambda n, c: c.check.update(source=f"# now\n{c.check.source}"),
    "a check that is gone": lambda n, c: n.cells.remove(c.check),
}


@pytest.fixture
def teachers(tmp_path, monkeypatch):
    """The clone of a teacher who works in it; the first chapter is theirs to change."""
    folder = tmp_path / "notebooks"
    (folder / "records").mkdir(parents=True)
    shutil.copy(released_chapters.packed(CHAPTER), folder / CHAPTER)
    monkeypatch.setattr(learner, "NOTEBOOKS", folder)
    return folder


BOTH_RELEASES = [(change, ()) for change in ANSWERED]
BOTH_RELEASES += [(change, ("--nbgrader",)) for change in list(ANSWERED)[::4]]


@pytest.mark.parametrize(("change", "nbgrader"), BOTH_RELEASES, ids=lambda value: "".join(value))
def test_what_gives_an_answer_away_is_refused_and_named(teachers, change, nbgrader, capsys):
    notebook = notebooks.read(teachers / CHAPTER)
    ANSWERED[change](notebook, exercise_cells.exercises_of(notebook)["1.2"])
    notebooks.write_whole(teachers / CHAPTER, notebooks.as_bytes(notebook))
    target = teachers.parent / "out"
    assert command("release", *nbgrader, target) == 1
    said = capsys.readouterr().err
    assert re.search(rf"^  {CHAPTER}(, |: )exercise 1\.2", said, re.MULTILINE), said
    assert len(re.findall("exercise", said)) == 2, "and no other"
    assert f"  python -m labkit reset 01 --folder {teachers}\n" in said
    assert not target.exists()


def test_all_that_is_answered_is_named(teachers, capsys):
    shutil.copy(released_chapters.packed(NAMES[1]), teachers / NAMES[1])
    for name, ids in ((CHAPTER, ("1.1", "1.5")), (NAMES[1], ("2.2",))):
        notebook = notebooks.read(teachers / name)
        for id in ids:
            cells = exercise_cells.exercises_of(notebook)[id]
            cells.stub.source = solution(cells)
        notebooks.write(notebook, teachers / name)
    assert command("release", teachers.parent / "out") == 1
    said = capsys.readouterr().err
    assert re.findall(r"(0\d_\w+\.ipynb), exercise (\S+):", said) == [
        (CHAPTER, "1.1"),
        (CHAPTER, "1.5"),
        (NAMES[1], "2.2"),
    ]
    remedies = re.findall(r"reset (\d+)", said)
    assert remedies == ["01", "02"]
    for chapter in remedies:
        assert command("reset", chapter, "--folder", teachers) == 0
    assert command("release", teachers.parent / "out") == 0


def attempt(notebook, cells) -> None:
    cells.check.outputs = [v4.new_output("stream", text="Exercise 1.2: correct. Well done.\n")]
    cells.check.execution_count = 3
    cells.check.metadata["execution"] = {"iopub.status.busy": "now"}


def clear(notebook, cells) -> None:
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None


def comment(notebook, cells) -> None:
    cells.stub.source = re.sub('""".*?"""', '"""In other words."""', cells.stub.source) + "  # here"


HARMLESS = {
    "the outputs of an attempt": (attempt, True),
    "no outputs": (clear, True),
    "another docstring": (comment, False),
    "a text": (lambda n, c: insert(n, c.stub, "Think.", v4.new_markdown_cell), False),
    "a cell elsewhere": (lambda n, c: append(n, "1 + 1"), False),
    "no exercise": (lambda n, c: [n.cells.remove(cell) for cell in c], False),
    "only its stub": (lambda n, c: [n.cells.remove(cell) for cell in c if cell != c.stub], False),
    "no Python elsewhere": (lambda n, c: append(n, "%%bash\nls\n"), False),
    "a return elsewhere": (lambda n, c: append(n, "return 1"), False),
}


@pytest.mark.parametrize("change", HARMLESS)
def test_what_gives_nothing_away_goes_out(teachers, change, first_release):
    work, as_before = HARMLESS[change]
    notebook = notebooks.read(teachers / CHAPTER)
    work(notebook, exercise_cells.exercises_of(notebook)["1.2"])
    notebooks.write(notebook, teachers / CHAPTER)
    assert command("release", teachers.parent / "out") == 0
    out = (teachers.parent / "out" / CHAPTER).read_bytes()
    assert (out == (first_release / CHAPTER).read_bytes()) == as_before
    assert b"Well done" not in out
    assert command("release", "--nbgrader", teachers.parent / "course") == 0


def test_a_folder_where_a_copy_should_be_is_left(released, capsys):
    (released / CHAPTER).unlink()
    (released / CHAPTER).mkdir()
    assert command("release", released) == 1
    assert f"{CHAPTER}: somebody has worked in it" in capsys.readouterr().out
