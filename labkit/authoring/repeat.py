"""Run the whole test again and again, and say what differs: `python -m labkit.authoring.repeat 20`.

Every second run shares the machine with a process that computes without pause. What each run took
and which tests failed in it goes into a report, line by line: an interrupted series is kept.
"""

import argparse
import contextlib
import json
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator, Sequence
from pathlib import Path

COMMAND = (sys.executable, "-m", "pytest", "--nbval", "-q")
_BUSY = "x = 1.0\nwhile True: x = x * 1.0000001 % 7.0"


def series(runs: int, report: Path, command: Sequence[str] = COMMAND) -> list[dict]:
    """Run a pytest command `runs` times; every second run beside a busy process.

    Args:
        report: a file that gets one JSON line a run, as soon as it ends.
        command: it gets one more option, where to write its JUnit file.

    Returns:
        What the lines hold: `run`, `busy`, `seconds`, `status` (pytest's), `tests` and `failed`,
        the names of tests that failed or broke.
    """
    found = []
    report.parent.mkdir(parents=True, exist_ok=True)
    for number in range(1, runs + 1):
        busy = number % 2 == 0
        with _other_process() if busy else contextlib.nullcontext():
            entry = {"run": number, "busy": busy, **_run_once(command)}
        found.append(entry)
        with report.open("a", encoding="utf8") as file:
            file.write(json.dumps(entry) + "\n")
        beside = "beside a busy process" if busy else "alone"
        failed = ", ".join(entry["failed"]) or "none"
        print(
            f"run {number}, {beside}: {entry['tests']} tests, {entry['seconds']:.0f} s, "
            f"failed: {failed}",
            flush=True,
        )
    return found


@contextlib.contextmanager
def _other_process() -> Iterator[None]:
    process = subprocess.Popen([sys.executable, "-c", _BUSY])
    try:
        yield
    finally:
        process.kill()
        process.wait()


def _run_once(command: Sequence[str]) -> dict:
    with tempfile.TemporaryDirectory() as folder:
        results, start = Path(folder) / "junit.xml", time.perf_counter()
        done = subprocess.run([*command, f"--junitxml={results}"], capture_output=True, check=False)
        seconds = round(time.perf_counter() - start, 1)
        cases = list(ElementTree.parse(results).iter("testcase")) if results.exists() else []
    broken = [case for case in cases if {"failure", "error"} & {part.tag for part in case}]
    return {
        "seconds": seconds,
        "status": done.returncode,
        "tests": len(cases),
        "failed": sorted({f"{case.get('classname')}::{case.get('name')}" for case in broken}),
    }


def differences(found: list[dict]) -> list[str]:
    """Return, in sentences, what was not the same in all runs."""
    said = []
    for name in sorted({name for entry in found for name in entry["failed"]}):
        runs = [str(entry["run"]) for entry in found if name in entry["failed"]]
        said.append(f"{name} failed in {len(runs)} of {len(found)} runs: {', '.join(runs)}")
    if len(counts := {entry["tests"] for entry in found}) > 1:
        said.append(f"the number of tests differs: {sorted(counts)}")
    # Without a failing test, pytest itself broke off.
    said += [
        f"run {entry['run']} ended with status {entry['status']} and no failed test"
        for entry in found
        if entry["status"] and not entry["failed"]
    ]
    return said


def main(arguments: list[str] | None = None) -> int:
    """Run the series of the command line, and return 1 if anything failed or differed."""
    parser = argparse.ArgumentParser(prog="python -m labkit.authoring.repeat", description=__doc__)
    parser.add_argument("runs", type=int, nargs="?", default=20)
    parser.add_argument("--report", type=Path, default=Path("build/repeat.jsonl"))
    chosen = parser.parse_args(arguments)
    found = series(chosen.runs, chosen.report)
    said = differences(found)
    print("\n".join(said or [f"{len(found)} runs, no failure and no difference"]))
    return int(bool(said))


if __name__ == "__main__":
    sys.exit(main())
