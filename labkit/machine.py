"""The machine: memory a process takes, and hardware facts that bear on quantization."""

import ctypes
import gc
import inspect
import json
import os
import platform
import subprocess
import sys
import textwrap
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import torch

from labkit import limits

# torch's name of a capability → the name in the manuals.
_INSTRUCTIONS = {
    "avx2": "AVX2",
    "avx_vnni": "AVX-VNNI",
    "avx512_f": "AVX-512",
    "avx512_vnni": "AVX-512 VNNI",
    "avx512_bf16": "AVX-512 BF16",
    "avx512_fp16": "AVX-512 FP16",
    "amx_int8": "AMX INT8",
    "amx_bf16": "AMX BF16",
    "neon": "NEON",
    "dot": "NEON dot product",
    "i8mm": "NEON INT8 matrix",
    "bf16": "NEON BF16",
    "fp16_arith": "NEON FP16",
    "sve": "SVE",
    "sme": "SME",
}


def resident_memory() -> int:
    """Return the bytes of memory this process occupies now, after collecting garbage."""
    import psutil

    gc.collect()
    return psutil.Process().memory_info().rss


def release_memory() -> None:
    """Collect garbage, and hand freed memory back to the system where the C library keeps it.

    glibc keeps the many small blocks of a model that is gone, and the next model comes on top.
    """
    gc.collect()
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)


class PeakMemory(NamedTuple):
    """The most memory a process occupied, in bytes, and what its code left in `result`."""

    nbytes: int
    result: Any


def peak_nbytes() -> int:
    """Return the most memory this process has occupied, in bytes."""
    # Runs in other processes, from its source: an import of torch would itself raise the peak. On
    # Linux `ru_maxrss` is wrong: a child starts with the peak of its parent, VmHWM does not.
    import sys

    if sys.platform == "win32":
        import psutil

        return psutil.Process().memory_info().peak_wset
    if sys.platform == "linux":
        with open("/proc/self/status") as status:  # noqa: PTH123
            for line in status:
                if line.startswith("VmHWM:"):
                    return int(line.split()[1]) * 1024
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


_REPORT = f"""
{inspect.getsource(peak_nbytes)}
_peak = peak_nbytes()
import json
print("\\n" + json.dumps({{"nbytes": _peak, "result": globals().get("result")}}))
"""


def peak_memory(code: str, timeout: float = 600) -> PeakMemory:
    """Run Python code in a fresh process and return the most memory that process occupied.

    Args:
        code: what to run, indented or not; its variable `result` comes back, if JSON can hold it.
        timeout: seconds to wait.

    Returns:
        A `PeakMemory`; bytes include the interpreter (about 10 MB) and what the code imports.

    Raises:
        RuntimeError: if the code fails or takes too long; holds the end of its error output.
    """
    command = [sys.executable, "-X", "utf8", "-c", textwrap.dedent(code) + "\n" + _REPORT]
    try:
        child = subprocess.run(command, capture_output=True, encoding="utf8", timeout=timeout)
    except subprocess.TimeoutExpired:
        raise RuntimeError(f"code took more than timeout={timeout} s") from None
    reports = [line for line in child.stdout.splitlines() if line.startswith('{"nbytes": ')]
    if child.returncode or not reports:
        tail = child.stderr[-2000:].strip() or "no error output; did it leave early?"
        raise RuntimeError(f"code failed with exit status {child.returncode}:\n{tail}")
    return PeakMemory(**json.loads(reports[-1]))


def hardware() -> dict[str, Any]:
    """Return facts about this machine that bear on quantization; None where unknown.

    Of cores and memory only what this process may use counts: see `labkit.limits`.
    """
    import psutil

    cpu, logical = torch.cpu.get_capabilities(), limits.cores()
    physical = psutil.cpu_count(logical=False)
    return {
        "cpu": cpu.get("cpu_name") or platform.processor() or platform.machine(),
        "architecture": cpu.get("architecture") or platform.machine(),
        "physical cores": physical and min(physical, logical),
        "logical cores": logical,
        "L1d cache bytes": cpu.get("l1d_cache_size"),
        "L2 cache bytes": cpu.get("l2_cache_size"),
        "L3 cache bytes": _l3_nbytes(),
        "memory bytes": limits.memory().total,
        "instruction sets": [name for key, name in _INSTRUCTIONS.items() if cpu.get(key)],
        "quantized engines": [e for e in torch.backends.quantized.supported_engines if e != "none"],
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "system": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def _l3_nbytes() -> int | None:
    # Of the first processor, as Linux tells it: "307200K".
    try:
        size = Path("/sys/devices/system/cpu/cpu0/cache/index3/size").read_text().strip()
    except OSError:
        return None
    return int(size[:-1]) * 1024 if size.endswith("K") else None


def quantized_engine() -> str:
    """Return the value that suits this machine for `torch.backends.quantized.engine`; sets nothing.

    The environment variable LABKIT_ENGINE names another one, e.g. `qnnpack`, which ARM uses.

    Raises:
        RuntimeError: if this build of torch has none, or not the one that LABKIT_ENGINE names.
    """
    supported = torch.backends.quantized.supported_engines
    if chosen := os.environ.get("LABKIT_ENGINE"):
        if chosen not in supported:
            raise RuntimeError(f"LABKIT_ENGINE must be one of {supported}, not {chosen!r}")
        return chosen
    arm = platform.machine().lower() in ("arm64", "aarch64")
    for engine in ("qnnpack",) if arm else ("x86", "fbgemm", "qnnpack"):
        if engine in supported:
            return engine
    raise RuntimeError(f"this build of torch has no INT8 engine for this CPU, only {supported}")


@torch.no_grad()
def exact_at_8_bits(engine: str | None = None) -> bool:
    """Say whether an INT8 engine of torch multiplies exactly when activations use all 8 bits.

    On x86 without VNNI the sum of two products has 16 bits: 2 · 255 · 127 does not fit, is cut, and
    nobody is told. With 7 bits (torch's `reduce_range`) it fits.

    Args:
        engine: a value of `torch.backends.quantized.engine`; None: `quantized_engine()`.
    """
    before = torch.backends.quantized.engine
    torch.backends.quantized.engine = engine or quantized_engine()
    try:
        with warnings.catch_warnings(action="ignore"):  # deprecated, as all of this engine
            weight = torch.quantize_per_tensor(torch.full((16, 64), 127.0), 1.0, 0, torch.qint8)
        packed = torch.ops.quantized.linear_prepack(weight, None)
        found = torch.ops.quantized.linear_dynamic(torch.ones(4, 64), packed, False)
    finally:
        torch.backends.quantized.engine = before
    return bool(torch.allclose(found, torch.full((4, 16), 64 * 127.0), rtol=1e-3))
