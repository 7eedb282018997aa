"""What this process may use of the machine: memory and cores, a container's limits included."""

import ctypes
import math
import os
import platform
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple


class Memory(NamedTuple):
    """Bytes that are free, bytes in all, and bytes of the machine: more, where a limit is set."""

    available: int
    total: int
    machine: int


def memory(root: Path = Path("/")) -> Memory:
    """Return the memory of this machine, or less, if a cgroup above this process allows less.

    Args:
        root: where `proc` and the mounted cgroups lie.
    """
    import psutil

    found = psutil.virtual_memory()
    available, total = found.available, found.total
    for folder in _cgroups("memory", root):
        stat = dict(re.findall(r"^(\w+) (\d+)$", _read(folder / "memory.stat"), re.MULTILINE))
        for limit, usage, reclaimable in (
            ("memory.max", "memory.current", "inactive_file"),
            ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
        ):
            allowed, used = _number(folder / limit), _number(folder / usage)
            if allowed is not None and allowed < total:  # version 1 writes 2**63 for "no limit"
                total = allowed
            if allowed is not None and used is not None:
                used -= int(stat.get(reclaimable, 0))  # the kernel drops these files when asked
                available = min(available, max(0, allowed - max(0, used)))
    return Memory(available, total, found.total)


def keep_freed_memory(nbytes: int = 2**28) -> None:
    """Let the C library keep freed memory at hand for the next results, where it is glibc.

    By default it hands large results back at once, and to fetch fresh pages takes up to half the
    time of an operation that works value by value. `machine.release_memory` hands all back.

    Args:
        nbytes: how much it may keep.
    """
    if platform.libc_ver()[0] == "glibc":
        library = ctypes.CDLL(None)
        library.mallopt(-1, nbytes)  # M_TRIM_THRESHOLD of malloc.h
        library.mallopt(-3, 2**25)  # M_MMAP_THRESHOLD: from this size on, as it comes


def cores(root: Path = Path("/")) -> int:
    """Return how many logical cores this process may use, at least 1.

    The least of the machine's, those of its affinity, and the share of time a cgroup allows.

    Args:
        root: where `proc` and the mounted cgroups lie.
    """
    if hasattr(os, "sched_getaffinity"):
        fewest = len(os.sched_getaffinity(0))
    else:
        fewest = os.cpu_count() or 1
    for folder in _cgroups("cpu", root):
        said = _read(folder / "cpu.max").split()  # version 2
        said = said or [
            _read(folder / f"cpu.cfs_{name}_us").strip() for name in ("quota", "period")
        ]
        if all(map(str.isdecimal, said)):  # not "max", not -1
            quota, period = map(int, said)
            fewest = min(fewest, math.ceil(quota / period))
    return max(1, fewest)


def _cgroups(controller: str, root: Path) -> Iterator[Path]:
    """Yield the folders of this process's cgroups, of versions 1 and 2, each with all above it."""
    paths, listed = {}, _read(root / "proc/self/cgroup")
    for controllers, path in re.findall(r"^\d+:([^:]*):(.*)$", listed, re.MULTILINE):
        if not controllers or controller in controllers.split(","):
            paths["cgroup" if controllers else "cgroup2"] = path
    for line in _read(root / "proc/self/mountinfo").splitlines():
        left, _, right = line.partition(" - ")
        kind, options = right.split(" ")[0], right.split(" ")[-1]
        if kind not in paths or (kind == "cgroup" and controller not in options.split(",")):
            continue
        start, mounted = left.split(" ")[3:5]
        top = root / mounted.lstrip("/")
        # Without a namespace of its own, a container sees its path from the host: cut to the mount.
        path, start = Path(paths[kind]), Path(start)
        inside = path.relative_to(start) if path.is_relative_to(start) else Path()
        folder = top / inside.as_posix().lstrip("/")
        yield from (f for f in (folder, *folder.parents) if f.is_relative_to(top))


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except (OSError, UnicodeDecodeError):
        return ""


def _number(path: Path) -> int | None:
    text = _read(path).strip()
    return int(text) if text.isdecimal() else None  # "max" is no limit
