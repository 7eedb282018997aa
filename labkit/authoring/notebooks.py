"""Execute notebooks and store them in normal form: what `python -m labkit refresh` does."""

import hashlib
import inspect
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from labkit import machine
from labkit.authoring import folding

# The chapters, in reading order. What else lies beside them is a copy, or a learner's own.
NAMES = (
    "01_basics.ipynb",
    "02_ptq.ipynb",
    "02b_weights.ipynb",
    "02c_formats_rotations.ipynb",
    "03_qat.ipynb",
    "04_mixed_precision.ipynb",
    "05_hardware.ipynb",
    "06_comparison.ipynb",
    "07_pruning_distillation.ipynb",
)
CELL_SECONDS = 600
KERNELSPEC = {"display_name": "Python 3 (ipykernel)", "language": "python", "name": "python3"}
WIDGET_VIEW = "application/vnd.jupyter.widget-view+json"
_LASTING_METADATA = {"authors", "deletable", "editable", "jupyter", "slideshow", "tags", "title"}
_ANSI = re.compile(r"\x1b\[[0-9;]*m")
_FORM = re.compile(r"\d\d[a-z]?(_[a-z]+)*(?<!_mine)")
_PROGRESS_BAR = re.compile(r"\d+%\|.*\|\s*\S+/\S+ \[")


class NotebookError(RuntimeError):
    """A notebook could not be read or executed; the message says which cell and why."""


def read(path: Path):
    """Read a notebook; cells that have no usable id get one made from their content.

    Raises:
        NotebookError: if the file is not a notebook of format 4.
    """
    import nbformat

    try:
        raw = json.loads(path.read_text(encoding="utf8"))
        if raw["nbformat"] != 4:
            raise ValueError(f"format {raw['nbformat']}")
        _give_ids(raw["cells"])
        raw["nbformat_minor"] = 5
        return nbformat.reads(json.dumps(raw), as_version=4)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise NotebookError(f"{path} is not a notebook of format 4 ({error!r})") from None


def _give_ids(cells: list[dict]) -> None:
    # An id that is there stays, so that moving or editing a cell shows up as just that in a diff.
    taken = set()
    for cell in cells:
        chosen = str(cell.get("id", ""))
        while chosen in taken or not re.fullmatch(r"[A-Za-z0-9_-]{1,64}", chosen):
            content = chosen + "".join(cell["source"])
            chosen = hashlib.sha256(content.encode()).hexdigest()[:8]
        taken.add(chosen)
        cell["id"] = chosen


def normalize(notebook):
    """Drop what changes from run to run or machine to machine and means nothing, in place.

    Gone afterwards: kernel details, timings, widget state and widget ids (a widget keeps its
    `text/plain`, which nbval compares), progress bars in cells whose output is ignored, and the
    library frames of a stored traceback, which hold paths. Cells that only draw are folded. Returns
    the same notebook.
    """
    for part in (notebook, *notebook.cells):
        for key in set(part.metadata):
            if key not in _LASTING_METADATA or part.metadata[key] in ([], {}):
                del part.metadata[key]
    notebook.metadata |= {"kernelspec": KERNELSPEC, "language_info": {"name": "python"}}
    for cell in notebook.cells:
        if cell.cell_type == "code":
            ignored = "nbval-ignore-output" in cell.metadata.get("tags", [])
            kept = [out for out in cell.outputs if not (ignored and _is_progress_bar(out))]
            cell.outputs = [_normalize_output(out, cell.execution_count) for out in kept]
    folding.fold(notebook)
    return notebook


def _is_progress_bar(output) -> bool:
    data = output.get("data", {})
    return WIDGET_VIEW in data and bool(_PROGRESS_BAR.search(str(data.get("text/plain", ""))))


def _normalize_output(output, execution_count: int | None):
    output.pop("transient", None)
    output.get("data", {}).pop(WIDGET_VIEW, None)
    if output.output_type == "execute_result":
        output.execution_count = execution_count
    if output.output_type == "error":
        frames = [_ANSI.sub("", frame) for frame in output.traceback]
        output.traceback = [frame for frame in frames if not frame.startswith("File ")]
    return output


class Executed(NamedTuple):
    """The most memory a kernel occupied, in bytes, and what the code that ran last printed."""

    peak_nbytes: int
    printed: str


def execute(
    notebook,
    folder: Path,
    *,
    environment: dict[str, str] | None = None,
    keep_going: bool = False,
    last: str = "",
) -> Executed:
    """Run every code cell of a notebook in a fresh kernel; outputs and counts go into it.

    Args:
        notebook: an `nbformat.NotebookNode`; changed in place.
        folder: where the kernel runs.
        environment: variables that the kernel gets beside those of this process.
        keep_going: whether cells run on after one that raised.
        last: code to run in the kernel after all cells.

    Returns:
        The peak memory of the kernel, and what `last` printed.

    Raises:
        NotebookError: if a cell raises (unless tagged `raises-exception`), takes longer than
            `CELL_SECONDS`, or ends the kernel.
    """
    from nbclient import NotebookClient
    from nbclient.exceptions import CellExecutionError, CellTimeoutError, DeadKernelError
    from nbformat.v4 import new_code_cell

    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None  # nbclient skips an empty cell
    started = []
    client = NotebookClient(
        notebook,
        kernel_name=KERNELSPEC["name"],
        resources={"metadata": {"path": str(folder)}},
        timeout=CELL_SECONDS,
        allow_errors=keep_going,
        record_timing=False,
        store_widget_state=False,
        coalesce_streams=True,
        on_cell_start=lambda cell, cell_index: started.append(cell),
    )
    # Only the kernel itself knows its peak on every system: a cell added for this run prints it.
    probes = [new_code_cell(peak_probe()), new_code_cell(last)]
    notebook.cells.extend(probes)
    variables = {**os.environ, **(environment or {})}
    try:
        # What goes nowhere is the kernel's own log, not the stderr of cells.
        client.execute(stderr=subprocess.DEVNULL, env=variables)
    except (CellExecutionError, CellTimeoutError, DeadKernelError) as error:
        raise NotebookError(f"{_place(started)}: {_reason(error)}") from None
    finally:
        del notebook.cells[-len(probes) :]
    peak, printed = ("".join(o.get("text", "") for o in probe.outputs) for probe in probes)
    return Executed(int(peak.split()[-1]), printed)


def peak_probe() -> str:
    """Return code that prints the peak memory, in bytes, of the kernel that runs it."""
    return f"{inspect.getsource(machine.peak_nbytes)}print(peak_nbytes())"


def _place(started: list) -> str:
    number = sum(cell.cell_type == "code" for cell in started)
    first_line = started[-1].source.strip().partition("\n")[0]
    return f"code cell {number} ({first_line})"


def _reason(error: Exception) -> str:
    if isinstance(error, TimeoutError):
        return f"took longer than {CELL_SECONDS} s"
    if isinstance(error, RuntimeError):
        return "the kernel died; this is often a lack of memory"
    # nbclient puts the whole source of the cell first; IPython begins with 75 dashes.
    tail = _ANSI.sub("", error.traceback).split("-" * 75)[-1].strip()
    return f"{error.ename}: {error.evalue}\n{tail}"


def refresh(path: Path) -> str:
    """Execute a notebook in its folder and store it in normal form, if every cell succeeds.

    Returns:
        A report: cells, seconds, peak memory, and which cells wrote to stderr.

    Raises:
        NotebookError: see `read` and `execute`; the file is left as it was.
    """
    notebook, started = read(path), time.perf_counter()
    peak_nbytes = execute(notebook, path.parent).peak_nbytes
    seconds = time.perf_counter() - started
    code_cells = [cell for cell in normalize(notebook).cells if cell.cell_type == "code"]
    changed = write(notebook, path)
    report = (
        f"{path}: {len(code_cells)} code cells, {seconds:.0f} s, peak memory "
        f"{peak_nbytes / 1e9:.2f} GB, {'stored' if changed else 'unchanged'}"
    )
    loud = [any(output.get("name") == "stderr" for output in c.outputs) for c in code_cells]
    if any(loud):
        numbers = ", ".join(str(number) for number, is_loud in enumerate(loud, 1) if is_loud)
        report += f"\n{path}: stderr must stay empty, but these code cells wrote to it: {numbers}"
    return report


def write(notebook, path: Path) -> bool:
    """Store a notebook, complete or not at all, and say whether the file changed.

    Raises:
        NotebookError: if the notebook breaks the notebook format.
    """
    import nbformat

    try:
        nbformat.validate(notebook)
    except nbformat.ValidationError as error:
        raise NotebookError(f"{path}: {str(error).splitlines()[0]}") from None
    stored = as_bytes(notebook)
    if path.exists() and path.read_bytes() == stored:
        return False
    write_whole(path, stored)
    return True


def as_bytes(notebook) -> bytes:
    """Return what a file of the notebook holds."""
    import nbformat

    return (nbformat.writes(notebook).rstrip("\n") + "\n").encode()


def write_whole(path: Path, content: bytes) -> None:
    """Write a file, complete or not at all; its folder is made if missing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    partial.write_bytes(content)
    partial.replace(path)


def chapters_in(folder: Path) -> list[Path]:
    """Return the chapters of the workbook that a folder holds, in reading order."""
    return [folder / name for name in NAMES if (folder / name).is_file()]


def starting(names: Iterable[str], chapter: str) -> list[str]:
    """Return the file names that start so; of 02 and 02b, "02" stands for the first alone."""
    names = list(names)
    exact = [name for name in names if name.partition("_")[0] == chapter]
    return exact or [name for name in names if name.startswith(chapter)]


def chosen(folder: Path, chapters: list[str]) -> list[Path]:
    """Return the chapters of a folder whose names start as `chapters` say; none says: every one.

    In a folder without a chapter of the workbook, every notebook counts whose name has their form:
    two digits, perhaps a letter, then words in lowercase.

    Raises:
        FileNotFoundError: if the folder holds none of them, or a start fits none.
    """
    others = sorted(path for path in folder.glob("*.ipynb") if _FORM.fullmatch(path.stem))
    every = chapters_in(folder) or [path for path in others if path.is_file()]
    if not every:
        raise FileNotFoundError(f"no notebook in {folder.resolve()}; --folder says where they are")
    names, wanted = [path.name for path in every], set()
    for chapter in chapters:
        found = starting(names, chapter)
        if not found:
            listed = ", ".join(names)
            raise FileNotFoundError(f"no notebook starts with {chapter!r}; there are {listed}")
        wanted.update(found)
    return [path for path in every if not chapters or path.name in wanted]


def refresh_folder(folder: Path, chapters: list[str]) -> int:
    """Refresh the chapters whose names start as `chapters` say; return the exit status.

    Args, errors: as of `chosen`.
    """
    status = 0
    for path in chosen(folder, chapters):
        print(f"{path} …", flush=True)
        try:
            print(refresh(path))
        except NotebookError as error:
            print(f"{path}, {error}\n{path} was left as it was.", file=sys.stderr)
            status = 1
    return status
