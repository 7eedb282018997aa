"""Execute notebooks and store them in normal form: what `python -m labkit refresh` does."""

import hashlib
import json
import re
import subprocess
import threading
import time
from dataclasses import dataclass
from pathlib import Path

CELL_SECONDS = 600
KERNELSPEC = {"display_name": "Python 3 (ipykernel)", "language": "python", "name": "python3"}
WIDGET_VIEW = "application/vnd.jupyter.widget-view+json"
_TRANSIENT_METADATA = {
    "ExecuteTime",
    "collapsed",
    "colab",
    "execution",
    "id",
    "outputId",
    "pycharm",
    "scrolled",
    "trusted",
    "vscode",
}
_ANSI = re.compile(r"\x1b\[[0-9;]*m")
_PROGRESS_BAR = re.compile(r"\d+%\|.*\|\s*\S+/\S+ \[")


class NotebookError(RuntimeError):
    """A notebook could not be read or executed; the message says which cell and why."""


@dataclass(frozen=True)
class Refreshed:
    """What one refresh did: code cells run, seconds, peak memory in bytes, and two findings."""

    n_cells: int
    seconds: float
    peak_nbytes: int
    changed: bool
    stderr_cells: tuple[int, ...]


def read(path: Path):
    """Read a notebook; cells that have no usable id get one made from their content.

    Args:
        path: an `.ipynb` file of format 4.

    Returns:
        An `nbformat.NotebookNode`.

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
    except (ValueError, KeyError, TypeError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise NotebookError(f"{path} is not a notebook of format 4 ({reason})") from None


def _give_ids(cells: list[dict]) -> None:
    # An id that is there stays, so that moving or editing a cell shows up as just that in a diff.
    taken = set()
    for cell in cells:
        chosen = str(cell.get("id", ""))
        if not re.fullmatch(r"[A-Za-z0-9_-]{1,64}", chosen) or chosen in taken:
            chosen = _short_hash(cell["cell_type"] + "\n" + "".join(cell["source"]))
            while chosen in taken:
                chosen = _short_hash(chosen)
        taken.add(chosen)
        cell["id"] = chosen


def _short_hash(content: str) -> str:
    return hashlib.sha256(content.encode()).hexdigest()[:8]


def normalize(notebook):
    """Drop what changes from run to run or machine to machine and means nothing, in place.

    Gone afterwards: kernel details, timings, widget state and widget ids (a widget keeps its
    `text/plain`, which nbval compares), progress bars in cells whose output is ignored, and the
    library frames of a stored traceback, which hold paths.

    Args:
        notebook: an `nbformat.NotebookNode`.

    Returns:
        The same notebook.
    """
    metadata = {k: v for k, v in notebook.metadata.items() if k not in {"widgets", "signature"}}
    metadata = _lasting(metadata) | {"kernelspec": KERNELSPEC, "language_info": {"name": "python"}}
    notebook.metadata.clear()
    notebook.metadata.update(metadata)
    notebook.nbformat, notebook.nbformat_minor = 4, 5
    for cell in notebook.cells:
        cell.metadata = type(notebook)(_lasting(cell.metadata))
        if cell.cell_type == "code":
            ignored = "nbval-ignore-output" in cell.metadata.get("tags", [])
            kept = [out for out in cell.outputs if not (ignored and _is_progress_bar(out))]
            cell.outputs = [_normalize_output(out, cell.execution_count) for out in kept]
    return notebook


def _lasting(metadata: dict) -> dict:
    return {k: v for k, v in metadata.items() if k not in _TRANSIENT_METADATA and v not in ([], {})}


def _is_progress_bar(output) -> bool:
    data = output.get("data", {})
    return WIDGET_VIEW in data and bool(_PROGRESS_BAR.search(str(data.get("text/plain", ""))))


def _normalize_output(output, execution_count: int | None):
    output.pop("transient", None)
    if "data" in output:
        output.data.pop(WIDGET_VIEW, None)
    if output.output_type == "execute_result":
        output.execution_count = execution_count
    if output.output_type == "error":
        frames = [_ANSI.sub("", frame) for frame in output.traceback]
        output.traceback = [frame for frame in frames if not frame.startswith("File ")]
    return output


def execute(notebook, folder: Path) -> int:
    """Run every code cell of a notebook in a fresh kernel; outputs and counts go into it.

    Args:
        notebook: an `nbformat.NotebookNode`; changed in place.
        folder: where the kernel runs.

    Returns:
        The peak resident memory of the kernel in bytes (macOS: the largest of ten looks a second).

    Raises:
        NotebookError: if a cell raises (unless tagged `raises-exception`), takes longer than
            `CELL_SECONDS`, or ends the kernel.
    """
    from nbclient import NotebookClient
    from nbclient.exceptions import CellExecutionError, CellTimeoutError, DeadKernelError

    code_cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    for cell in code_cells:
        cell.outputs, cell.execution_count = [], None
    running, peaks, stop = [], [0], threading.Event()
    client = NotebookClient(
        notebook,
        kernel_name=KERNELSPEC["name"],
        resources={"metadata": {"path": str(folder)}},
        timeout=CELL_SECONDS,
        record_timing=False,
        store_widget_state=False,
        coalesce_streams=True,
        on_cell_execute=lambda cell, cell_index: running.append(cell),
        on_notebook_start=lambda notebook: threading.Thread(
            target=_watch_memory, args=(client.km.provisioner.pid, stop, peaks), daemon=True
        ).start(),
    )
    try:
        client.execute(stderr=subprocess.DEVNULL)  # the kernel's own log, not the cells' stderr
    except CellExecutionError as error:
        raise NotebookError(_failure(code_cells, running[-1], _traceback(error))) from None
    except CellTimeoutError:
        reason = f"took longer than {CELL_SECONDS} s"
        raise NotebookError(_failure(code_cells, running[-1], reason)) from None
    except DeadKernelError:
        reason = "the kernel died; this is often a lack of memory"
        raise NotebookError(_failure(code_cells, running[-1], reason)) from None
    finally:
        stop.set()
    return max(peaks)


def _failure(code_cells: list, cell, reason: str) -> str:
    number = next(n for n, other in enumerate(code_cells, 1) if other is cell)
    first_line = next((line for line in cell.source.splitlines() if line.strip()), "")
    return f"code cell {number} ({first_line.strip()}): {reason}"


def _traceback(error) -> str:
    # nbclient puts the whole source of the cell first; IPython begins with 75 dashes.
    tail = _ANSI.sub("", error.traceback).split("-" * 75)[-1].strip()
    return f"{error.ename}: {error.evalue}\n{tail}"


def _watch_memory(pid: int, stop: threading.Event, peaks: list[int]) -> None:
    import psutil

    while not stop.wait(0.1):
        try:
            peaks.append(_peak_nbytes(psutil.Process(pid)))
        except (psutil.Error, OSError):
            return  # the kernel has ended
        peaks[:] = [max(peaks)]


def _peak_nbytes(process) -> int:
    status = Path(f"/proc/{process.pid}/status")
    if status.exists():
        found = re.search(r"VmHWM:\s*(\d+) kB", status.read_text())
        return int(found[1]) * 1024 if found else 0
    memory = process.memory_info()
    return getattr(memory, "peak_wset", memory.rss)


def refresh(path: Path) -> Refreshed:
    """Execute a notebook and store it in normal form.

    The file is replaced at once, and only when every cell succeeded.

    Args:
        path: the notebook; its kernel runs in its folder.

    Returns:
        What was done; `stderr_cells` numbers the code cells (from 1) that wrote to stderr.

    Raises:
        NotebookError: see `read` and `execute`; the file is left as it was.
    """
    notebook = read(path)
    started = time.perf_counter()
    peak_nbytes = execute(notebook, path.parent)
    seconds = time.perf_counter() - started
    code_cells = [cell for cell in normalize(notebook).cells if cell.cell_type == "code"]
    noisy = [
        number
        for number, cell in enumerate(code_cells, 1)
        if any(output.get("name") == "stderr" for output in cell.outputs)
    ]
    changed = write(notebook, path)
    return Refreshed(len(code_cells), seconds, peak_nbytes, changed, tuple(noisy))


def write(notebook, path: Path) -> bool:
    """Store a notebook under its name, complete or not at all.

    Returns:
        Whether the file changed.

    Raises:
        NotebookError: if the notebook breaks the notebook format.
    """
    import nbformat

    try:
        nbformat.validate(notebook)
    except nbformat.ValidationError as error:
        raise NotebookError(f"{path}: {str(error).splitlines()[0]}") from None
    stored = nbformat.writes(notebook).rstrip("\n") + "\n"
    if path.exists() and path.read_text(encoding="utf8") == stored:
        return False
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(stored, encoding="utf8", newline="\n")
    partial.replace(path)
    return True
