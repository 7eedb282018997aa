"""A pytest plugin that records what notebooks take.

`pytest -n 0 -p labkit.authoring.times --nbval notebooks` runs it. The record,
`notebooks/records/00_times.json`, is where the teacher's guide has its times from. A notebook that
was not run, or not passed, keeps the figures of an earlier run.
"""

import json
import queue
import time
from pathlib import Path

from labkit import machine
from labkit.authoring import notebooks

COMMAND = "pytest -n 0 -p labkit.authoring.times --nbval notebooks"
_SHOWN_CELLS = 3
_ANSWER_SECONDS = 30


def pytest_configure(config) -> None:
    """Start with an empty record."""
    config.pluginmanager.register(_Recorder(), "labkit-times-recorder")


class _Recorder:
    def __init__(self):
        self.cells: dict[str, list] = {}  # notebook → (first line, seconds) of each cell
        self.peaks: dict[str, int] = {}
        self.broken: set[str] = set()

    def pytest_runtest_logreport(self, report) -> None:
        name = Path(report.nodeid.partition("::")[0]).name
        if name.endswith(".ipynb"):
            if report.failed:
                self.broken.add(name)
            spent = self.cells.setdefault(name, [])
            if report.when == "setup":
                spent.append(0.0)
            spent[-1] += report.duration

    def pytest_runtest_teardown(self, item, nextitem) -> None:
        # Before nbval ends the kernel: only the kernel itself knows its peak on every system.
        last = nextitem is None or nextitem.parent is not item.parent
        if last and item.path.suffix == ".ipynb" and getattr(item.parent, "kernel", None):
            kernel, name = item.parent.kernel, item.path.name
            if len(self.cells.get(name, ())) == len(_code_cells(item.path)):
                try:
                    self.peaks[name] = int(_answer(kernel, notebooks.peak_probe()))
                except queue.Empty:
                    self.broken.add(name)

    def pytest_sessionfinish(self, session) -> None:
        complete = {name: peak for name, peak in self.peaks.items() if name not in self.broken}
        folder = Path(session.config.rootpath) / "notebooks"
        if complete:
            found = {name: self._figures(folder / name, peak) for name, peak in complete.items()}
            _store(found, folder / "records" / "00_times.json")

    def _figures(self, path: Path, peak_nbytes: int) -> dict:
        firsts = [cell["source"].partition("\n")[0] for cell in _code_cells(path)]
        slowest = sorted(zip(firsts, self.cells[path.name], strict=True), key=lambda c: -c[1])
        return {
            "seconds": round(sum(self.cells[path.name]), 1),
            "peak_nbytes": peak_nbytes,
            "cells": len(firsts),
            "slowest": [[first, round(s, 1)] for first, s in slowest[:_SHOWN_CELLS]],
        }


def _code_cells(path: Path) -> list:
    import nbformat

    cells = nbformat.read(path, as_version=4).cells
    return [cell for cell in cells if cell.cell_type == "code"]


def _answer(kernel, code: str) -> str:
    # What nbval's kernel prints when it runs the code.
    asked, printed = kernel.execute_cell_input(code, allow_stdin=False), ""
    while True:
        message = kernel.get_message("iopub", timeout=_ANSWER_SECONDS)
        if message["parent_header"].get("msg_id") != asked:
            continue
        printed += message["content"].get("text", "")
        if message["content"].get("execution_state") == "idle":
            return printed


def _store(found: dict[str, dict], path: Path) -> None:
    facts = machine.hardware()
    here = {name: str(facts[name]) for name in ("cpu", "architecture", "physical cores")}
    old = json.loads(path.read_text(encoding="utf8")) if path.exists() else {}
    kept = old.get("notebooks", {}) if old.get("machine") == here else {}
    record = {
        "label": "measured on the machine named here; another one differs",
        "command": COMMAND,
        "date": time.strftime("%Y-%m-%d"),
        "machine": here,
        "notebooks": dict(sorted({**kept, **found}.items())),
    }
    text = json.dumps(record, indent=2, ensure_ascii=False) + "\n"
    notebooks.write_whole(path, text.encode())
