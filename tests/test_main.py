"""The command line: help, doctor, fetch, and refresh on notebooks made for it."""

import errno
import json
import re
import shutil
import subprocess
import sys
import types
from pathlib import Path

import nbformat
import pytest
from nbformat import v4
from packaging.specifiers import SpecifierSet

from labkit import downloads, models, python_version
from labkit.authoring import commands as command_line
from labkit.authoring import doctor, notebooks


def labkit(*arguments: str, **options) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "labkit", *arguments]
    return subprocess.run(command, capture_output=True, encoding="utf8", check=False, **options)


def code(source: str, *tags: str):
    return v4.new_code_cell(source, metadata={"tags": list(tags)} if tags else {})


def store(path: Path, *cells) -> Path:
    path.parent.mkdir(exist_ok=True)
    nbformat.write(v4.new_notebook(cells=list(cells)), path)
    return path


# Help and bad commands


def test_without_a_command_it_prints_help(capsys):
    assert command_line.main([]) == 0
    shown = capsys.readouterr().out
    assert "python -m labkit" in shown
    commands = ("doctor", "fetch", "refresh", "release", "reset", "book")
    assert all(re.search(rf"^  +{command} ", shown, re.MULTILINE) for command in commands)


def test_an_unknown_command_is_refused(capsys):
    with pytest.raises(SystemExit) as stopped:
        command_line.main(["quantize"])
    assert stopped.value.code == 2
    assert "invalid choice: 'quantize'" in capsys.readouterr().err


# Fetch


def test_fetch_says_where_and_how_big(monkeypatch, capsys, tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"0" * 3_000_000)
    monkeypatch.setattr(downloads.Download, "fetch", lambda self: tmp_path)
    assert command_line.main(["fetch"]) == 0
    said = f"SmolLM2, ready: {tmp_path} (3 MB)\nThe texts, ready: {tmp_path} (3 MB)\n"
    assert capsys.readouterr().out == said


@pytest.mark.parametrize("error", [downloads.Unavailable, models.ModelUnavailable, PermissionError])
def test_fetch_fails_in_one_line(monkeypatch, capsys, error):
    def fail(self):
        raise error("no network; run it where there is one")

    monkeypatch.setattr(downloads.Download, "fetch", fail)
    assert command_line.main(["fetch"]) == 1
    assert capsys.readouterr().err == "labkit fetch: no network; run it where there is one\n"


@pytest.mark.parametrize("error", [KeyError, RuntimeError, NotImplementedError])
def test_a_bug_keeps_its_traceback(monkeypatch, error):
    def fail(self):
        raise error("a bug")

    monkeypatch.setattr(downloads.Download, "fetch", fail)
    with pytest.raises(error, match="a bug"):
        command_line.main(["fetch"])


# Refresh


CELLS = (
    v4.new_markdown_cell("# A title"),
    code("import labkit as lk\nprint('one')\nprint('two')"),
    code("lk.show(lk.subplots()[0], alt='Two empty axes, nothing more.')"),
    code("lk.claim('one', 'One is one', 1, 1, 1)"),
    code("import ipywidgets\nipywidgets.BoundedIntText(value=3, description='bits')"),
    code("import time\nfrom tqdm.auto import tqdm", "nbval-ignore-output"),
    code("print(sum(tqdm(range(3))), time.time_ns())", "nbval-ignore-output"),
    code("import torch\nlk.quant.pack_int4(torch.zeros(2))", "raises-exception"),
    code("memory = bytearray(300_000_000)\nlen(memory)"),
)


@pytest.fixture(scope="module")
def refreshed(tmp_path_factory):
    """Refresh a notebook twice; give its path, both texts, and what the first run printed."""
    path = store(tmp_path_factory.mktemp("book") / "01_small.ipynb", *CELLS)
    runs, texts = [], []
    for _ in range(2):
        runs.append(labkit("refresh", "01", "--folder", str(path.parent)))
        texts.append(path.read_text(encoding="utf8"))
    assert runs[0].returncode == runs[1].returncode == 0, runs[0].stderr + runs[1].stderr
    return path, texts, runs[0].stdout


def test_refresh_runs_and_counts_every_cell(refreshed):
    path, (text, _), printed = refreshed
    cells = [cell for cell in json.loads(text)["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in cells] == list(range(1, 9))
    assert cells[0]["outputs"][0]["text"] == ["one\n", "two\n"]
    assert "image/png" in cells[1]["outputs"][0]["data"]
    assert "✓ one: One is one" in cells[2]["outputs"][0]["text"][0]
    assert cells[7]["outputs"][0]["data"]["text/plain"] == ["300000000"]
    assert f"{path}: 8 code cells" in printed
    gigabytes = float(printed.partition("peak memory ")[2].partition(" GB")[0])
    assert 0.35 < gigabytes < 4
    assert [p.name for p in path.parent.iterdir() if p.name != ".ipynb_checkpoints"] == [path.name]


def test_a_second_refresh_changes_only_ignored_output(refreshed):
    _, texts, _ = refreshed
    first, second = map(json.loads, texts)
    assert first != second, "the clock in the ignored cell should differ"
    for notebook in (first, second):
        notebook["cells"][6]["outputs"] = []
    assert first == second


def test_nbval_passes_on_what_refresh_stored(refreshed):
    path, _, _ = refreshed
    command = [sys.executable, "-m", "pytest", "--nbval", "--nbval-current-env", "-q", path.name]
    done = subprocess.run(
        [*command, "-p", "no:cacheprovider"],
        cwd=path.parent,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    assert "8 passed" in done.stdout


def test_what_is_stored_is_in_normal_form(refreshed):
    path, (_, text), _ = refreshed
    stored = json.loads(text)
    assert stored["metadata"] == {
        "kernelspec": notebooks.KERNELSPEC,
        "language_info": {"name": "python"},
    }
    ids = [cell["id"] for cell in stored["cells"]]
    assert len(set(ids)) == len(ids)
    for cell in stored["cells"]:
        draws = "lk.show" in "".join(cell["source"])
        assert set(cell["metadata"]) - {"tags"} == ({"jupyter"} if draws else set())
    assert notebooks.WIDGET_VIEW not in text
    assert "BoundedIntText(value=3, description='bits'" in text
    assert "it/s" not in text  # the progress bar
    assert "quant.py" not in text  # the library's frames in the traceback
    assert "Cell In[7]" in text
    assert not notebooks.write(notebooks.normalize(notebooks.read(path)), path)


def test_a_failing_cell_leaves_the_file_and_is_named(tmp_path):
    bad = store(tmp_path / "02_bad.ipynb", code("x = {}"), code("\n# look it up\nx['missing']"))
    good = store(tmp_path / "03_good.ipynb", code("1 + 1"))
    before = bad.read_bytes()
    done = labkit("refresh", "--folder", str(tmp_path))
    assert done.returncode == 1
    assert f"{bad}, code cell 2 (# look it up): KeyError: 'missing'" in done.stderr
    assert bad.read_bytes() == before
    assert "1 code cells" in done.stdout  # the other notebook was done all the same
    assert json.loads(good.read_text())["cells"][0]["execution_count"] == 1


@pytest.mark.parametrize(
    ("source", "reason"),
    [("import time\ntime.sleep(30)", "took longer than 1 s"), ("exit_now()", "the kernel died")],
)
def test_a_cell_that_never_ends_or_ends_the_kernel_is_named(tmp_path, monkeypatch, source, reason):
    monkeypatch.setattr(notebooks, "CELL_SECONDS", 1)
    setup = code("import os\ndef exit_now(): os._exit(1)")
    path = store(tmp_path / "01.ipynb", setup, code(source))
    with pytest.raises(notebooks.NotebookError, match=rf"^code cell 2 .*: {reason}"):
        notebooks.refresh(path)
    assert json.loads(path.read_text())["cells"][0]["execution_count"] is None


def test_a_cell_that_writes_to_stderr_is_reported(tmp_path, capsys):
    store(tmp_path / "01.ipynb", code("1"), code("import sys\nprint('oh', file=sys.stderr)"))
    assert command_line.main(["refresh", "--folder", str(tmp_path)]) == 0
    assert "these code cells wrote to it: 2" in capsys.readouterr().out


def test_an_emptied_cell_loses_its_old_output(tmp_path):
    emptied = code("")
    emptied.outputs = [v4.new_output("stream", text="of the past")]
    notebooks.refresh(store(tmp_path / "01.ipynb", code("1"), emptied))
    assert notebooks.read(tmp_path / "01.ipynb").cells[1].outputs == []


def test_what_is_not_there_is_said(tmp_path, capsys):
    assert command_line.main(["refresh", "--folder", str(tmp_path)]) == 1
    assert "no notebook in" in capsys.readouterr().err
    store(tmp_path / "01_a.ipynb", code("1"))
    assert command_line.main(["refresh", "07", "--folder", str(tmp_path)]) == 1
    assert "no notebook starts with '07'; there are 01_a.ipynb" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"nbformat": 3, "worksheets": []}'])
def test_what_is_no_notebook_is_refused(tmp_path, capsys, text):
    path = tmp_path / "01.ipynb"
    path.write_text(text)
    assert command_line.main(["refresh", "--folder", str(tmp_path)]) == 1
    assert "is not a notebook of format 4" in capsys.readouterr().err
    assert path.read_text() == text


# Normal form


def test_ids_stay_and_missing_or_repeated_ones_come_from_the_content(tmp_path):
    def ids_of(*cells) -> list[str]:
        raw = {"nbformat": 4, "nbformat_minor": 4, "metadata": {}, "cells": list(cells)}
        path = tmp_path / "ids.ipynb"
        path.write_text(json.dumps(raw))
        return [cell.id for cell in notebooks.read(path).cells]

    def cell(source: str, **more) -> dict:
        return {"cell_type": "markdown", "metadata": {}, "source": [source], **more}

    first = ids_of(cell("a", id="kept"), cell("b"), cell("b"), cell("c", id="kept"), cell("d"))
    assert first[0] == "kept"
    assert len(set(first)) == 5
    moved = ids_of(cell("d"), cell("b"), cell("a", id="kept"))
    assert moved == [first[4], first[1], "kept"]


def test_normal_form_drops_what_is_transient():
    cell = code("x", "nbval-ignore-output")
    cell.metadata |= {"execution": {"iopub.status.busy": "now"}, "collapsed": True, "nbgrader": {}}
    cell.metadata["editable"] = False
    view = {notebooks.WIDGET_VIEW: {"model_id": "1"}}
    bar = "  50%|█████     | 1/2 [00:00<?, ?it/s]"
    cell.outputs = [
        v4.new_output("display_data", {**view, "text/plain": text}) for text in (bar, "VBox()")
    ]
    notebook = v4.new_notebook(cells=[cell], metadata={"widgets": {"state": {}}, "title": "T"})
    notebooks.normalize(notebook)
    assert set(notebook.metadata) == {"title", "kernelspec", "language_info"}
    assert cell.metadata == {"tags": ["nbval-ignore-output"], "editable": False}
    assert [output.data for output in cell.outputs] == [{"text/plain": "VBox()"}]


# Doctor


def test_doctor_finds_this_machine_ready():
    done = labkit("doctor")
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stderr == ""
    for word in (
        "torch 2.13.0",
        "memory:",
        "disk:",
        "kernels: compiled once, then kept in",
        "instruction sets:",
        "INT8 engine:",
        "SmolLM2",
    ):
        assert word in done.stdout
    assert "quantize and run: perplexity" in done.stdout
    assert "This machine is ready." in done.stdout


def findings(check) -> list[tuple[str, str, str]]:
    return [(found.status, found.text, found.remedy) for found in check()]


@pytest.mark.parametrize(
    ("version", "status"),
    [((3, 10, 13), "failed"), ((3, 11, 0), "ok"), ((3, 13, 9), "ok"), ((3, 14, 0), "warning")],
)
def test_doctor_says_what_to_do_on_another_python(monkeypatch, version, status):
    monkeypatch.setattr(doctor.sys, "version_info", version)
    ((found, _, remedy),) = findings(doctor.check_python)
    assert found == status
    assert ("python3.13 -m venv .venv" in remedy) == (status != "ok")


def test_the_tried_pythons_are_those_that_the_project_asks_for():
    text = (Path(__file__).parents[1] / "pyproject.toml").read_text(encoding="utf8")
    wanted = SpecifierSet(re.search(r'^requires-python = "(.+)"', text, re.MULTILINE)[1])
    oldest, newest = python_version.OLDEST, python_version.NEWEST
    assert all(f"{major}.{minor}" in wanted for major, minor in (oldest, newest))
    assert f"{oldest[0]}.{oldest[1] - 1}.99" not in wanted


@pytest.mark.parametrize("minor", [9, 10])
def test_an_old_python_is_told_so_in_one_line(minor):
    old = shutil.which(f"python3.{minor}")
    if old is None:
        pytest.skip(f"there is no Python 3.{minor} here")
    command = [old, "-m", "labkit", "doctor"]
    root = Path(__file__).parents[1]
    done = subprocess.run(command, cwd=root, capture_output=True, encoding="utf8", check=False)
    if "pyenv" in done.stderr:
        pytest.skip(f"python3.{minor} is a stand-in that starts nothing")
    assert done.returncode == 1
    assert done.stderr.startswith(f"labkit: this is Python 3.{minor}.")
    assert done.stderr.count("\n") == 1


def test_doctor_names_a_wrong_and_a_missing_package(monkeypatch):
    wanted = ["torch==1.0", "no-such-thing>=2", "numpy", "no-such-extra; extra == 'test'"]
    monkeypatch.setattr(doctor.importlib.metadata, "requires", lambda name: wanted)
    (first, second) = findings(doctor.check_packages)
    assert first[0] == second[0] == "failed"
    assert first[1].startswith("torch: 2.13.0")
    assert "labkit needs ==1.0" in first[1]
    assert second[1] == "no-such-thing: not installed, but labkit needs >=2"
    assert "pip install" in first[2]
    assert "pip install" in second[2]


@pytest.mark.parametrize(("available", "status"), [(8e9, "ok"), (3e9, "warning"), (1e9, "failed")])
def test_doctor_looks_at_free_memory(monkeypatch, available, status):
    memory = types.SimpleNamespace(available=available, total=8e9)
    monkeypatch.setattr("psutil.virtual_memory", lambda: memory)
    ((found, text, remedy),) = findings(doctor.check_memory)
    assert found == status
    assert f"{available / 1e9:.1f} GB free of 8.0 GB" in text
    assert bool(remedy) == (status != "ok")


def test_doctor_looks_at_the_disk_of_the_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("LABKIT_CACHE", str(tmp_path / "not" / "yet"))
    assert findings(doctor.check_disk)[0][0] == "ok"
    usage = types.SimpleNamespace(free=5e8)
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda path: usage)
    ((status, text, remedy),) = findings(doctor.check_disk)
    assert (status, "0.5 GB free" in text, "LABKIT_CACHE" in remedy) == ("failed", True, True)
    monkeypatch.setattr(doctor.os, "access", lambda path, mode: False)
    ((status, text, remedy),) = findings(doctor.check_disk)
    assert (status, "not writable" in text, "LABKIT_CACHE" in remedy) == ("failed", True, True)


def test_doctor_warns_of_what_is_missing_and_fails_on_what_is_damaged(monkeypatch, tmp_path):
    monkeypatch.setenv("LABKIT_CACHE", str(tmp_path))
    for title, (status, text, remedy) in zip(
        ("SmolLM2", "the texts"), findings(doctor.check_fetched), strict=True
    ):
        assert (status, text) == ("warning", f"{title}: not in the cache")
        assert "python -m labkit fetch" in remedy
    models.SMOLLM2.folder.mkdir()
    (status, text, remedy), _ = findings(doctor.check_fetched)
    assert status == "failed"
    assert "damaged" in text
    assert "python -m labkit fetch" in remedy


def test_doctor_goes_on_after_a_check_that_breaks(monkeypatch, capsys):
    def check_engine():
        raise ImportError("libtorch.so: cannot open shared object file")

    def check_other():
        yield doctor.Finding("warning", "a warning", "do this")

    monkeypatch.setattr(doctor, "CHECKS", (check_engine, check_other))
    assert doctor.examine() == 1
    assert capsys.readouterr().out.splitlines() == [
        "✗ engine: ImportError: libtorch.so: cannot open shared object file",
        f"    → {doctor.REINSTALL}",
        "! a warning",
        "    → do this",
        "1 problem(s) to mend.",
    ]


@pytest.mark.parametrize(
    ("error", "remedy"),
    [
        (PermissionError(errno.EACCES, "denied", "/a/file"), "may not read or write /a/file"),
        (OSError(errno.EROFS, "read-only", "/a/file"), "may not read or write /a/file"),
        (OSError(errno.ENOSPC, "full", "/a/file"), "no room is left at /a/file"),
        (MemoryError(), "close other programs"),
        (OSError("libtorch.so: cannot open shared object file"), "pip install -e ."),
        (AttributeError("no such name"), "pip install -e ."),
    ],
)
def test_doctor_tells_an_error_of_the_machine_from_a_broken_installation(
    monkeypatch, capsys, error, remedy
):
    def check_things():
        raise error
        yield

    monkeypatch.setattr(doctor, "CHECKS", (check_things,))
    assert doctor.examine() == 1
    assert remedy in capsys.readouterr().out
    assert ("install" in doctor.remedy_of(error)) == ("install" in remedy)


def test_doctor_says_how_to_get_pip_where_there_is_none(monkeypatch, tmp_path):
    monkeypatch.setenv("LABKIT_CACHE", str(tmp_path))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    for _, text, remedy in findings(doctor.check_fetched):
        assert "not in the cache" in text
        assert remedy.index("uv pip install pip") < remedy.index("python -m labkit fetch")


def test_doctor_says_that_kernels_cannot_be_kept(monkeypatch):
    from labkit import compiling

    monkeypatch.setattr(compiling, "KEPT", False)
    ((status, text, remedy),) = findings(doctor.check_kernels)
    assert (status, "kernels" in text, "NUMBA_CACHE_DIR" in remedy) == ("warning", True, True)


def test_doctor_does_not_fail_on_a_warning(monkeypatch, capsys):
    warning = doctor.Finding("warning", "a warning", "do this")
    monkeypatch.setattr(doctor, "CHECKS", (lambda: [warning],))
    assert command_line.main(["doctor"]) == 0
    assert "This machine is ready." in capsys.readouterr().out


def test_doctor_notices_kernels_that_compute_nonsense(monkeypatch):
    from labkit import kernels

    if not (models.TINY_FOLDER / "model.safetensors").exists():
        pytest.fail("labkit/tiny is missing")
    monkeypatch.setattr(
        kernels.PackedLinear, "forward", lambda self, x: x @ self.dequantized().T * 9
    )
    ((status, text, remedy),) = findings(doctor.check_quantize_and_run)
    assert status == "failed"
    assert "INT4" in text
    assert remedy
