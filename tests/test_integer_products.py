"""Integer products that the book calls are exact, also on CPUs that are not here.

Without VNNI, x86 adds two products in 16 bits: 8-bit activations overflow there, silently. No
variable makes ONNX Runtime believe that VNNI is missing, so QEMU plays such a CPU.
"""

import functools
import json
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("integer_products.py")
QEMU = "qemu-x86_64"
HALF_A_STEP = 0.5 / 127 * 1.01  # a static engine rounds its results to 8 bits
ONE_THREAD = {f"{name}_NUM_THREADS": "1" for name in ("OMP", "MKL", "NUMBA")}


@functools.cache
def errors(cpu: str = "", kind: str = "", numba_cpu: str = "") -> dict[str, float]:
    """Run the script in a process of its own; `cpu`: one that QEMU plays, else this one."""
    command = [QEMU, "-cpu", cpu] if cpu else []
    environment = {**os.environ, **ONE_THREAD}
    if numba_cpu:
        environment["NUMBA_CPU_NAME"] = numba_cpu
    done = subprocess.run(
        [*command, sys.executable, SCRIPT, *kind.split()],
        env=environment,
        capture_output=True,
        encoding="utf8",
        check=False,
        timeout=500,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture
def without_vnni() -> dict[str, float]:
    """The errors of torch's and ONNX Runtime's products on an AVX2 CPU without VNNI."""
    if platform.system() != "Linux" or platform.machine() != "x86_64":
        pytest.skip("QEMU plays an x86 CPU for a process of Linux on x86 only")
    if not shutil.which(QEMU):
        reason = f"no {QEMU}: install Debian's qemu-user"
        (pytest.fail if os.environ.get("CI") else pytest.skip)(reason)
    return errors(cpu="Haswell")


def assert_exact(found: dict[str, float]) -> None:
    for name, error in found.items():
        if name == "qnnpack, 8 bits" or name.endswith("_int_mm") or "Int8Linear" in name:
            assert error == 0, name
        elif name.endswith("static, 7 bits"):
            assert error <= HALF_A_STEP, name
        elif name.endswith("7 bits"):
            assert error == 0, name


def test_what_the_book_calls_exact_is_exact_here():
    assert_exact(errors())
    assert len(errors()) >= 7


def test_what_the_book_calls_exact_is_exact_without_vnni(without_vnni):
    assert_exact(without_vnni)


def test_eight_bits_overflow_without_vnni(without_vnni):
    for name in ("x86, 8 bits", "fbgemm, 8 bits", "ONNX Runtime, 8 bits"):
        assert without_vnni[name] > 0.3, f"{name} is exact now: the book says that it overflows"


@pytest.mark.parametrize("engine", ["x86", "fbgemm", "qnnpack"])
def test_the_probe_tells_who_overflows(engine, without_vnni):
    for found in (errors(), without_vnni):
        if f"{engine}, probe" in found:
            assert bool(found[f"{engine}, probe"]) == (found[f"{engine}, 8 bits"] < 1e-3)


@pytest.mark.parametrize("numba_cpu", ["", "haswell"])
def test_our_kernels_are_exact(numba_cpu):
    if numba_cpu and platform.machine() not in ("x86_64", "AMD64"):
        pytest.skip("a Haswell is an x86 CPU")
    found = errors(kind="ours", numba_cpu=numba_cpu)
    assert found == {"packed, 8 bits": 0, "packed, 4 bits": 0}
