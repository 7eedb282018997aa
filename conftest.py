"""Which notebooks are tested, how many run side by side, and with how many threads each."""

import os
from pathlib import Path

import psutil

CHAPTERS = Path(__file__).parent / "notebooks"
MOST_WORKERS = 2
MEMORY_OF_A_WORKER = 4_000_000_000  # bytes: a chapter takes up to 3.3 GB


def pytest_ignore_collect(collection_path: Path) -> bool | None:
    """Pass over notebooks that are no chapters: copies, and what learners keep beside them."""
    if collection_path.suffix == ".ipynb" and collection_path.is_relative_to(CHAPTERS):
        from labkit.authoring import notebooks  # not above: torch must start after pytest_configure

        return collection_path not in notebooks.chapters_in(CHAPTERS) or None
    return None


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
