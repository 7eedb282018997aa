"""Learner copies: what `python -m labkit release` and `reset` do."""

import contextlib
import copy
import hashlib
import importlib.metadata
import json
import re
import time
from itertools import chain, count
from pathlib import Path
from typing import Any

from labkit.authoring import answers, exercise_cells, notebooks, released

NOTEBOOKS = Path(__file__).parents[2] / "notebooks"
MANIFEST = "MANIFEST.json"
LINKS = re.compile(r"^Without installing: .*\n\n", re.MULTILINE)  # see labkit.authoring.elsewhere


class ReleaseError(RuntimeError):
    """A copy could not be made; the message says what would help."""


def chapters() -> list[Path]:
    """Return the workbook's own chapters, in reading order.

    Raises:
        ReleaseError: if they are not beside this package.
    """
    found = notebooks.chapters_in(NOTEBOOKS)
    if not found:
        raise ReleaseError(
            f"no chapter in {NOTEBOOKS}: in a clone of the workbook, pip install -e ."
        )
    return found


def unanswered() -> dict[str, Any]:
    """Return the chapters to be handed out, by file name, each an `nbformat.NotebookNode`.

    Raises:
        ReleaseError: if one gives an answer away, or an exercise is in pieces; names them all.
    """
    read, refused = {}, []
    for path in chapters():
        original = notebooks.read(released.packed(path.name))
        read[path.name] = notebooks.read(path)
        try:
            found = answers.answers_in(read[path.name], original)
        except notebooks.NotebookError as error:
            refused.append(f"{path.name}: {error}")
        else:
            refused += [f"{path.name}, exercise {id}: {what}" for id, what in found.items()]
    if refused:
        listed = "\n".join(f"  {line}" for line in refused)
        starts = sorted({line.partition("_")[0] for line in refused})
        resets = "\n".join(f"  python -m labkit reset {s} --folder {NOTEBOOKS}" for s in starts)
        raise ReleaseError(
            f"nothing was written; learners would get answers, or broken exercises:\n{listed}\n"
            f"This puts a chapter back, and keeps yours under a dated name:\n{resets}"
        )
    return read


def learner_copy(notebook, hints: bool = True):
    """Return a copy of a chapter to work in: no outputs, no solutions, in normal form.

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
    return notebooks.normalize(made)


def records() -> dict[str, bytes]:
    """Return the logs that the chapters read, by the path a chapter knows them under."""
    found = sorted((NOTEBOOKS / "records").iterdir())
    return {f"records/{path.name}": path.read_bytes() for path in found if path.is_file()}


def release(folder: Path, hints: bool = True) -> int:
    """Write learner copies of every chapter, with the records, and say what was done.

    Returns:
        The exit status: 1 if a file was left alone because somebody has worked in it.

    Raises:
        ReleaseError: if `folder` is the workbook's own, or as of `unanswered`.
    """
    files = {
        name: notebooks.as_bytes(learner_copy(notebook, hints))
        for name, notebook in unanswered().items()
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
    before, kept = manifest_of(folder).get("files", {}), []
    for name, content in files.items():
        path = folder / name
        if path.exists():
            now = digest(path.read_bytes()) if path.is_file() else None
            if now not in (digest(content), before.get(name)):
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


def full_name(chapter: str) -> str:
    """Return the file name of the chapter that starts so.

    Raises:
        ReleaseError: if none or several do.
    """
    found = notebooks.starting(notebooks.NAMES, chapter)
    if len(found) != 1:
        names = ", ".join(notebooks.NAMES)
        raise ReleaseError(f"chapter must start one of {names}; got {chapter!r}")
    return found[0]


def reset(chapter: str, folder: Path | None = None) -> Path:
    """Put a fresh copy of a chapter in place; what stood there is kept under a dated name.

    Fresh is the chapter as it was released, see `labkit.authoring.released`; in a folder that
    `release` made, the learner copy.

    Args:
        chapter: how the name of the notebook starts, e.g. "01".
        folder: where the learner works. None: here if a chapter is here, else `notebooks`.

    Returns:
        Where the learner's work is now; the chapter itself, if there was nothing to keep.

    Raises:
        ReleaseError: as of `full_name`; if there is no such folder, or the file belongs to an
            nbgrader course.
        NotPacked: if there is no fresh copy to be had.
    """
    name = full_name(chapter)
    if folder is None:
        here = any(Path(known).exists() for known in (*notebooks.NAMES, MANIFEST))
        folder = Path() if here else Path("notebooks")
    if not folder.is_dir():
        raise ReleaseError(f"{folder} is no folder; --folder says where you work")
    own, fresh = folder / name, _fresh(name, folder)
    now = own.read_bytes() if own.is_file() else b""
    if now == fresh:
        return own
    if b'"nbgrader"' in now:
        raise ReleaseError(
            f"{own} belongs to an nbgrader course, and its marks would be lost; rename it, then "
            f"nbgrader fetch_assignment {own.stem} --replace brings a fresh one"
        )
    return _exchange(own, fresh)


def _exchange(own: Path, fresh: bytes) -> Path:
    # The fresh copy is complete before the learner's file moves.
    aside = own.with_name(f".{own.name}.fresh")
    notebooks.write_whole(aside, fresh)
    kept = _free_name(own) if _is_there(own) else own
    try:
        if kept != own:
            own.rename(kept)
        aside.replace(own)
    finally:
        aside.unlink(missing_ok=True)
    return kept


def _fresh(name: str, folder: Path) -> bytes:
    manifest, home = manifest_of(folder), folder.resolve()
    root = released.ROOT if home == NOTEBOOKS else home.parent
    if not manifest:
        with contextlib.suppress(released.NotPacked):
            return released.packed(name, root).read_bytes()

    def copied(path: Path) -> bytes:
        hints = manifest.get("hints", True)
        return notebooks.as_bytes(learner_copy(notebooks.read(path), hints))

    # A teacher may have handed out a chapter that they had changed.
    with contextlib.suppress(OSError, notebooks.NotebookError):
        changed = copied(NOTEBOOKS / name)
        if digest(changed) == manifest.get("files", {}).get(name):
            return changed
    return copied(released.packed(name))


def _free_name(path: Path) -> Path:
    stamp = time.strftime("%Y-%m-%d_%H%M%S")
    names = (
        f"{path.stem}_{stamp}{again}_mine.ipynb"
        for again in chain([""], map("_{}".format, count(2)))
    )
    return next(kept for kept in map(path.with_name, names) if not _is_there(kept))


def _is_there(path: Path) -> bool:
    return path.exists() or path.is_symlink()  # a link may lead nowhere


def copies_of(chapter: str, folder: Path) -> list[Path]:
    """Return the notebooks of a folder that are copies of a chapter, by name or by title.

    Args:
        chapter: how its name starts.
        folder: where to look; the chapters themselves do not count.

    Raises:
        ReleaseError: as of `full_name`.
    """
    name = full_name(chapter)
    title = _title(released.packed(name))
    others = sorted(path for path in folder.glob("*.ipynb") if path.name not in notebooks.NAMES)
    stem = Path(name).stem
    return [p for p in others if p.is_file() and (stem in p.name or _title(p) == title)]


def _title(path: Path) -> str | None:
    try:
        cells = notebooks.read(path).cells
    except (OSError, notebooks.NotebookError):
        return None
    return next((c.source.partition("\n")[0] for c in cells if c.source.startswith("# ")), None)
