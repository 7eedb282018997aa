"""How many notebooks and test files run side by side, and with how many threads each."""

import os

import psutil

MOST_WORKERS = 2
MEMORY_OF_A_WORKER = 4_000_000_000  # bytes: a chapter takes up to 3.3 GB


def pytest_xdist_auto_num_workers(config) -> int:
    """Return the number of workers: as many as cores and free memory allow, two at most."""
    fitting = psutil.virtual_memory().available // MEMORY_OF_A_WORKER
    return max(1, min(MOST_WORKERS, _cores(), fitting))


def pytest_configure(config) -> None:
    """Share the cores among the workers: torch's threads wait busily, and would fight for them."""
    if workers := int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", 0)):
        for name in ("OMP", "MKL", "OPENBLAS", "NUMBA"):
            os.environ.setdefault(f"{name}_NUM_THREADS", str(max(1, _cores() // workers)))


def _cores() -> int:
    return psutil.cpu_count(logical=False) or os.cpu_count() or 1
