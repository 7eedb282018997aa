"""The series of whole test runs, on a test file that fails now and then."""

import json
import os
import subprocess
import sys

import pytest

from labkit.authoring import repeat

FLAKY = """
from pathlib import Path
COUNT = Path(__file__).with_name("count")

def test_sound():
    pass

def test_flaky():
    runs = int(COUNT.read_text()) + 1 if COUNT.exists() else 1
    COUNT.write_text(str(runs))
    assert runs != 2
"""


@pytest.fixture
def command(tmp_path):
    (tmp_path / "test_made.py").write_text(FLAKY, encoding="utf8")
    options = ["-q", "-p", "no:cacheprovider", f"--rootdir={tmp_path}", "-c", os.devnull]
    return [sys.executable, "-m", "pytest", *options, str(tmp_path)]


def test_a_test_that_fails_in_one_run_is_named(command, tmp_path, capsys):
    report = tmp_path / "new" / "report.jsonl"
    found = repeat.series(3, report, command)
    assert [json.loads(line) for line in report.read_text().splitlines()] == found
    assert [entry["busy"] for entry in found] == [False, True, False]
    assert [entry["tests"] for entry in found] == [2, 2, 2]
    assert [entry["status"] for entry in found] == [0, 1, 0]
    (said,) = repeat.differences(found)
    assert said.endswith("test_made::test_flaky failed in 1 of 3 runs: 2")
    assert "run 2, beside a busy process: 2 tests" in capsys.readouterr().out


def test_a_run_that_breaks_off_is_said(tmp_path):
    broken = [sys.executable, "-m", "pytest", "--no-such-option"]
    found = repeat.series(1, tmp_path / "report.jsonl", broken)
    assert repeat.differences(found) == ["run 1 ended with status 4 and no failed test"]


def test_runs_of_different_length_are_said():
    same = {"busy": False, "seconds": 1.0, "status": 0, "failed": []}
    found = [{**same, "run": 1, "tests": 5}, {**same, "run": 2, "tests": 4}]
    assert repeat.differences(found) == ["the number of tests differs: [4, 5]"]
    assert repeat.differences(found[:1]) == []


def test_the_busy_process_ends_with_its_run(monkeypatch):
    started = []
    popen = subprocess.Popen
    monkeypatch.setattr(subprocess, "Popen", lambda *a: started.append(popen(*a)) or started[0])
    with repeat._other_process():
        assert started[0].poll() is None
    assert started[0].poll() is not None
