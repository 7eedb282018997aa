"""Where Numba keeps the kernels, also on machines on which the usual places are read-only."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

UID = getattr(os, "getuid", int)()
LABKIT = Path(__file__).parent.parent / "labkit"
CODE = """
import numpy as np
from labkit import compiling, matvec
from labkit.authoring import doctor
y = matvec.swiglu(np.array([0, 1, 3, 4], np.float32))
assert np.allclose(y, [0, 4 / (1 + np.exp(-1))]), y
print(compiling.KEPT, matvec.swiglu.stats.cache_path or "nowhere")
for status, text, remedy in doctor.check_kernels():
    print(status, remedy or text)
"""


@pytest.fixture
def read_only(tmp_path):
    """A copy of labkit and a home in which nothing can be written, not even by root."""
    package = tmp_path / "site" / "labkit"
    shutil.copytree(LABKIT, package, ignore=shutil.ignore_patterns("__pycache__", "tiny"))
    (package / "__pycache__").write_text("a file, where a folder would have to be")
    (tmp_path / "home").write_text("a file")
    (tmp_path / "temporary").mkdir()
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("XDG_", "NUMBA_CACHE"))}
    home = dict.fromkeys(("HOME", "USERPROFILE", "LOCALAPPDATA"), str(tmp_path / "home"))
    environment |= home | {"PYTHONPATH": str(tmp_path / "site"), "PYTHONDONTWRITEBYTECODE": "1"}
    environment.pop("LABKIT_CACHE", None)
    return environment | {"TMPDIR": str(tmp_path / "temporary")}


def run(environment) -> list[str]:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", CODE],
        env=environment,
        cwd=environment["PYTHONPATH"],
        capture_output=True,
        encoding="utf8",
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_kernels_run_where_package_and_home_are_read_only(read_only, tmp_path):
    first, found = run(read_only)
    assert first.startswith(f"True {tmp_path / 'temporary'}")
    assert list((tmp_path / "temporary").rglob("matvec.swiglu*.nbi"))
    assert found.startswith("warning set NUMBA_CACHE_DIR")
    (folder,) = (tmp_path / "temporary").iterdir()
    assert os.name == "nt" or folder.stat().st_mode & 0o777 == 0o700


def test_kernels_run_where_nothing_can_be_written(read_only, tmp_path):
    (tmp_path / "temporary" / f"labkit-numba-{UID}").write_text("a file")
    assert run(read_only) == [
        "False nowhere",
        "warning set NUMBA_CACHE_DIR to a folder that you can write and that stays",
    ]


@pytest.mark.parametrize("mode", [0o777, 0o750])
def test_a_temporary_folder_open_to_others_is_not_used(read_only, tmp_path, mode):
    folder = tmp_path / "temporary" / f"labkit-numba-{UID}"
    folder.mkdir()
    folder.chmod(mode)
    assert run(read_only)[0] == "False nowhere"
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize("name", ["LABKIT_CACHE", "NUMBA_CACHE_DIR"])
def test_kernels_are_kept_where_the_reader_says(read_only, tmp_path, name):
    chosen = tmp_path / "chosen"
    first, found = run(read_only | {name: str(chosen), "TMPDIR": str(tmp_path / "home")})
    assert first.startswith(f"True {chosen}")
    assert found.startswith("ok kernels: compiled once, then kept in")
    assert list(chosen.rglob("matvec.swiglu*.nbi"))
