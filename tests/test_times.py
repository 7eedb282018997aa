"""The recorder of what notebooks take, on notebooks made for it."""

import json
import subprocess
import sys

import nbformat
import pytest
from nbformat import v4


def cell(source: str, printed: str):
    shown = v4.new_output("stream", text=printed)
    return v4.new_code_cell(source, outputs=[shown], execution_count=1)


BIG = "import time\nmemory = bytearray(300_000_000)\nprint(len(memory))"
NOTEBOOKS = {
    "01_good.ipynb": [cell("print(1)", "1\n"), cell(BIG, "300000000\n")],
    "02_sleeps.ipynb": [cell("import time; time.sleep(1); print(2)", "2\n")],
    "03_wrong.ipynb": [cell("print(3)", "4\n")],
}


def record(folder, *chosen: str) -> dict:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "labkit.authoring.times", "--nbval"]
    options = ["--nbval-current-env", f"--rootdir={folder}", "-p", "no:cacheprovider"]
    paths = [str(folder / "notebooks" / name) for name in chosen]
    subprocess.run([*command, *options, *paths], capture_output=True, check=False)
    stored = folder / "notebooks" / "records" / "00_times.json"
    return json.loads(stored.read_text(encoding="utf8"))["notebooks"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("book")
    (folder / "notebooks").mkdir()
    for name, cells in NOTEBOOKS.items():
        nbformat.write(v4.new_notebook(cells=cells), folder / "notebooks" / name)
    return folder


def test_what_passes_is_recorded_and_what_was_is_kept(folder):
    found = record(folder, "01_good.ipynb", "03_wrong.ipynb")
    assert list(found) == ["01_good.ipynb"]
    assert found["01_good.ipynb"]["cells"] == 2
    assert 300e6 < found["01_good.ipynb"]["peak_nbytes"] < 1e9
    both = record(folder, "02_sleeps.ipynb")
    assert both["01_good.ipynb"] == found["01_good.ipynb"]
    assert 1 <= both["02_sleeps.ipynb"]["seconds"] < 30
    ((first, seconds),) = both["02_sleeps.ipynb"]["slowest"]
    assert first.startswith("import time; time.sleep")
    assert seconds >= 1
