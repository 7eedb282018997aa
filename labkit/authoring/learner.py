"""Learner copies: what `python -m labkit release` and `reset` do."""

import copy
import hashlib
import importlib.metadata
import json
import os
import re
import subprocess
import time
from itertools import chain, count
from pathlib import Path

from labkit.authoring import exercise_cells, notebooks

NOTEBOOKS = Path(__file__).parents[2] / "notebooks"
MANIFEST = "MANIFEST.json"
LINKS = re.compile(r"^Without installing: .*\n\n", re.MULTILINE)  # see labkit.authoring.elsewhere


class ReleaseError(RuntimeError):
    """A copy could not be made; the message says what would help."""


def chapters() -> list[Path]:
    """Return the workbook's own notebooks, in reading order.

    Raises:
        ReleaseError: if they are not beside this package.
    """
    found = sorted(
        path for path in NOTEBOOKS.glob("[0-9][0-9]_*.ipynb") if "_mine" not in path.stem
    )
    if not found:
        raise ReleaseError(
            f"no chapter in {NOTEBOOKS}: in a clone of the workbook, pip install -e ."
        )
    return found


def learner_copy(notebook, hints: bool = True):
    """Return a copy of a chapter to work in: no outputs, no solutions; stubs as they are.

    The links to the chapter on other machines go too: solutions are there.

    Args:
        notebook: an `nbformat.NotebookNode`; stays as it is.
        hints: whether the folded hints stay.
    """
    made = copy.deepcopy(notebook)
    for cell in made.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    made.cells[0].source = LINKS.sub("", made.cells[0].source)
    dropped = (exercise_cells.SOLUTION, *(() if hints else exercise_cells.HINTS))
    for found in exercise_cells.exercises_of(made).values():
        found.folded.source = exercise_cells.without_folds(found.folded.source, dropped)
    made.cells = [cell for cell in made.cells if cell.source]
    return made


def records() -> dict[str, bytes]:
    """Return the logs that the chapters read, by the path a chapter knows them under."""
    found = sorted((NOTEBOOKS / "records").iterdir())
    return {f"records/{path.name}": path.read_bytes() for path in found if path.is_file()}


def release(folder: Path, hints: bool = True) -> int:
    """Write learner copies of every chapter, with the records, and say what was done.

    Returns:
        The exit status: 1 if a file was left alone because somebody has worked in it.

    Raises:
        ReleaseError: if `folder` is the workbook's own.
    """
    files = {
        path.name: notebooks.as_bytes(learner_copy(notebooks.read(path), hints))
        for path in chapters()
    }
    return report(folder, store(folder, {**files, **records()}, hints=hints), "release")


def report(folder: Path, kept: list[str], command: str) -> int:
    """Say what `store` did; return the exit status."""
    for name in kept:
        print(f"{folder / name}: somebody has worked in it; left as it is.")
    if kept:
        where = f"python -m labkit reset 01 --folder {folder}"
        remedy = f"to keep it under a dated name beside a fresh copy: {where}"
        print(f"{remedy}." if command == "release" else "Move it away to have a new one.")
    print(f"{folder}: {command} complete" + (f", but for {len(kept)} files." if kept else "."))
    return int(bool(kept))


def store(folder: Path, files: dict[str, bytes], **about) -> list[str]:
    """Write files and a manifest of their hashes; a file that somebody has changed stays.

    Args:
        folder: where; made if missing.
        files: contents by relative path.
        about: what else the manifest says.

    Returns:
        The paths of `files` that were left alone: neither new, nor as an earlier release left them.

    Raises:
        ReleaseError: if `folder` is the workbook's own, or its manifest cannot be read.
    """
    if folder.resolve() in (NOTEBOOKS, NOTEBOOKS.parent):
        raise ReleaseError(f"{folder} is the workbook's own folder; name a new one")
    released, kept = manifest_of(folder).get("files", {}), []
    for name, content in files.items():
        path = folder / name
        if path.exists():
            now = digest(path.read_bytes())
            if now not in (digest(content), released.get(name)):
                kept.append(name)
                continue
        notebooks.write_whole(path, content)
    version = importlib.metadata.version("labkit")
    hashes = {name: digest(content) for name, content in sorted(files.items())}
    text = json.dumps({"labkit": version, **about, "files": hashes}, indent=2)
    notebooks.write_whole(folder / MANIFEST, (text + "\n").encode())
    return kept


def manifest_of(folder: Path) -> dict:
    """Return the manifest of a released folder; empty if there is none.

    Raises:
        ReleaseError: if it cannot be read.
    """
    path = folder / MANIFEST
    try:
        return json.loads(path.read_text(encoding="utf8")) if path.exists() else {}
    except ValueError:
        raise ReleaseError(f"{path} is not JSON; move it away, or name another folder") from None


def digest(content: bytes) -> str:
    """Return the SHA-256 of a content as 64 hexadecimal digits."""
    return hashlib.sha256(content).hexdigest()


def reset(chapter: str, folder: Path | None = None) -> Path:
    """Put a fresh copy of a chapter in place; what stood there is kept under a dated name.

    Args:
        chapter: how the name of the notebook starts, e.g. "01".
        folder: where the learner works. None: here if the chapter is here, else `notebooks`.

    Returns:
        Where the learner's work is now; the chapter itself, if there was nothing to keep.

    Raises:
        ReleaseError: if no chapter or several start so, or there is no fresh copy to be had.
    """
    starting = [path for path in chapters() if chapter and path.name.startswith(chapter)]
    if len(starting) != 1:
        names = ", ".join(path.name for path in chapters())
        raise ReleaseError(f"chapter must start one of {names}; got {chapter!r}")
    name = starting[0].name
    if folder is None:
        folder = Path() if Path(name).exists() else Path("notebooks")
    if not folder.is_dir():
        raise ReleaseError(f"{folder} is no folder; --folder says where you work")
    own, fresh = folder / name, _fresh(starting[0], folder)
    if not own.exists() or own.read_bytes() == fresh:
        notebooks.write_whole(own, fresh)
        return own
    kept = _free_name(own)
    own.rename(kept)
    notebooks.write_whole(own, fresh)
    return kept


def _fresh(chapter: Path, folder: Path) -> bytes:
    if folder.resolve() != chapter.parent:
        hints = manifest_of(folder).get("hints", True)
        return notebooks.as_bytes(learner_copy(notebooks.read(chapter), hints))
    # The learner works in the workbook itself: only git still knows the chapter.
    command = ["git", "show", f"HEAD:./{chapter.name}"]
    english = os.environ | {"LC_ALL": "C"}  # its messages are told apart below
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, check=True, env=english)
    except (OSError, subprocess.CalledProcessError) as error:
        raise ReleaseError(
            f"{folder} is the workbook itself, where git keeps {chapter.name}, but "
            f"{_git_problem(error)}. Or work in copies made by: python -m labkit release DIR"
        ) from None
    return done.stdout


def _git_problem(error: OSError | subprocess.CalledProcessError) -> str:
    """Say why git gave no chapter, and what to do."""
    if isinstance(error, OSError):
        return f"git does not run ({error.strerror}): install it, and see that it is on PATH"
    said = error.stderr.decode(errors="replace").strip()
    if trust := re.search(r"safe\.directory (.+)$", said, re.MULTILINE):
        return (
            f"git does not trust {trust[1]}, which another user owns: if you do, run: "
            f"git config --global --add safe.directory {trust[1]}"
        )
    if "not a git repository" in said:
        return "this is no clone, as after a download without git: clone the workbook again"
    if re.search("not in 'HEAD'|does not exist in|invalid object name|unknown revision", said):
        return "its last commit does not hold the chapter: clone the workbook again"
    return f"git failed: {said.splitlines()[-1] if said else error}"


def _free_name(path: Path) -> Path:
    stamp = time.strftime("%Y-%m-%d_%H%M%S")
    names = (
        f"{path.stem}_{stamp}{again}_mine.ipynb"
        for again in chain([""], map("_{}".format, count(2)))
    )
    return next(kept for kept in map(path.with_name, names) if not kept.exists())
