"""Memory and cores: what the cgroups of a container leave of them, in folders made up here."""

import ctypes
import platform
import types
from pathlib import Path

import pytest

from labkit import limits
from labkit.authoring import doctor

GB = 2**30
NO_LIMIT = 9223372036854771712  # what version 1 writes


@pytest.fixture
def machine(monkeypatch):
    """A machine of 64 GB, 60 of them free, and 16 cores."""
    memory = types.SimpleNamespace(available=60 * GB, total=64 * GB)
    monkeypatch.setattr("psutil.virtual_memory", lambda: memory)
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: set(range(16)), raising=False)
    monkeypatch.setattr("os.cpu_count", lambda: 16)


def container(root: Path, cgroup: str, mounts: list[str], files: dict[str, object]) -> Path:
    """Write the files that a process in a container sees; `mounts`: "root place type options"."""
    lines = []
    for number, mount in enumerate(mounts):
        start, place, kind, options = mount.split()
        lines.append(f"{number} 1 0:{number} {start} {place} rw,nosuid - {kind} cgroup {options}")
    for name, content in (
        {"proc/self/cgroup": cgroup, "proc/self/mountinfo": "\n".join(lines)} | files
    ).items():
        path = root / name.lstrip("/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{content}\n")
    return root


V2 = ["/ /sys/fs/cgroup cgroup2 rw"]
V1 = [
    "/ /sys/fs/cgroup/memory cgroup rw,memory",
    "/ /sys/fs/cgroup/cpu,cpuacct cgroup rw,cpu,cpuacct",
]
HYBRID = [*V1, "/ /sys/fs/cgroup/unified cgroup2 rw"]
TOP, V1_TOP = "/sys/fs/cgroup", "/sys/fs/cgroup/memory"


def v2(folder: str, limit, used=0, cpu="max 100000", files=0) -> dict[str, object]:
    return {
        f"{folder}/memory.max": limit,
        f"{folder}/memory.current": used,
        f"{folder}/memory.stat": f"anon 5\ninactive_file {files}\nactive_file 7",
        f"{folder}/cpu.max": cpu,
    }


def v1(folder: str, limit, used=0, files=0) -> dict[str, object]:
    return {
        f"{folder}/memory.limit_in_bytes": limit,
        f"{folder}/memory.usage_in_bytes": used,
        f"{folder}/memory.stat": f"cache 5\ninactive_file 1\ntotal_inactive_file {files}",
    }


MEMORY = {
    "no cgroups": ("", [], {}, (60, 64)),
    "version 2, no limit": ("0::/", V2, v2(TOP, "max", GB), (60, 64)),
    "version 2": ("0::/", V2, v2(TOP, 4 * GB, GB), (3, 4)),
    "version 2, of the machine's size": ("0::/", V2, v2(TOP, 128 * GB, GB), (60, 64)),
    "cached files count as free": ("0::/", V2, v2(TOP, 4 * GB, 3 * GB, files=2 * GB), (3, 4)),
    "more in use than allowed": ("0::/", V2, v2(TOP, 4 * GB, 5 * GB), (0, 4)),
    "a limit above": ("0::/a/b", V2, v2(f"{TOP}/a", 4 * GB, GB) | v2(f"{TOP}/a/b", "max"), (3, 4)),
    "the tighter of two": (
        "0::/a/b",
        V2,
        v2(f"{TOP}/a", 8 * GB, 7 * GB) | v2(f"{TOP}/a/b", 4 * GB, GB),
        (1, 4),
    ),
    "a path of the host": (
        "0::/docker/x",
        ["/docker/x /sys/fs/cgroup cgroup2 rw"],
        v2(TOP, GB),
        (1, 1),
    ),
    "a path outside the mount": ("0::/../y", V2, v2(TOP, 4 * GB, GB), (3, 4)),
    "version 1, no limit": ("4:memory:/", V1, v1(V1_TOP, NO_LIMIT, GB), (60, 64)),
    "version 1": ("4:memory:/", V1, v1(V1_TOP, 4 * GB, 3 * GB, files=GB), (2, 4)),
    "version 1, nested": (
        "7:cpu,cpuacct:/\n4:memory:/pod/c",
        V1,
        v1(V1_TOP, NO_LIMIT) | v1(f"{V1_TOP}/pod", 6 * GB, GB) | v1(f"{V1_TOP}/pod/c", NO_LIMIT),
        (5, 6),
    ),
    "version 1, a path of the host": (
        "4:memory:/docker/x",
        ["/docker/x /sys/fs/cgroup/memory cgroup rw,memory"],
        v1(V1_TOP, 4 * GB, GB),
        (3, 4),
    ),
    "both versions": ("4:memory:/a\n0::/", HYBRID, v1(f"{V1_TOP}/a", 4 * GB, GB), (3, 4)),
    "unreadable": ("0::/", V2, {f"{TOP}/memory.max": "much"}, (60, 64)),
}


@pytest.mark.parametrize("case", MEMORY)
def test_memory_is_what_the_cgroups_leave(machine, tmp_path, case):
    *files, expected = MEMORY[case]
    found = limits.memory(container(tmp_path, *files))
    assert (found.available / GB, found.total / GB, found.machine / GB) == (*expected, 64)


CPU = "/sys/fs/cgroup/cpu,cpuacct"
CORES = {
    "no cgroups": ("", [], {}, 16),
    "version 2, no limit": ("0::/", V2, v2(TOP, "max"), 16),
    "version 2": ("0::/", V2, v2(TOP, "max", cpu="200000 100000"), 2),
    "one and a half": ("0::/a", V2, v2(f"{TOP}/a", "max", cpu="150000 100000"), 2),
    "a tenth": ("0::/", V2, v2(TOP, "max", cpu="10000 100000"), 1),
    "more than there are": ("0::/", V2, v2(TOP, "max", cpu="9900000 100000"), 16),
    "a limit above": (
        "0::/a/b",
        V2,
        v2(f"{TOP}/a", "max", cpu="300000 100000") | v2(f"{TOP}/a/b", "max"),
        3,
    ),
    "version 1, no limit": (
        "2:cpu,cpuacct:/",
        V1,
        {f"{CPU}/cpu.cfs_quota_us": -1, f"{CPU}/cpu.cfs_period_us": 100000},
        16,
    ),
    "version 1, nested": (
        "2:cpu,cpuacct:/pod/c",
        V1,
        {f"{CPU}/pod/cpu.cfs_quota_us": 400000, f"{CPU}/pod/cpu.cfs_period_us": 100000},
        4,
    ),
}


@pytest.mark.parametrize("case", CORES)
def test_cores_are_what_the_cgroups_leave(machine, tmp_path, case):
    *files, expected = CORES[case]
    assert limits.cores(container(tmp_path, *files)) == expected


def test_cores_are_those_of_the_affinity(machine, monkeypatch, tmp_path):
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: {3, 5, 7}, raising=False)
    assert limits.cores(tmp_path) == 3
    monkeypatch.delattr("os.sched_getaffinity")  # as on macOS and Windows
    assert limits.cores(tmp_path) == 16


def test_this_machine_has_no_more_than_its_own():
    memory = limits.memory()
    assert 0 < memory.available <= memory.total <= memory.machine
    assert limits.cores() >= 1


@pytest.mark.parametrize(
    ("memory", "status", "remedy"),
    [
        ((20, 32, 64), "ok", ""),
        ((3, 32, 64), "warning", "close other programs"),
        ((1, 2, 64), "failed", "give the container 3.5 GB"),
        ((1, 8, 8), "failed", "close other programs"),
    ],
)
def test_doctor_names_the_limit_of_a_container(monkeypatch, memory, status, remedy):
    memory = limits.Memory(*(int(x * 1e9) for x in memory))
    monkeypatch.setattr(limits, "memory", lambda: memory)
    (found,) = doctor.check_memory()
    assert found.status == status
    assert f"free of {memory.total / 1e9:.1f} GB" in found.text
    assert ("the machine has 64.0 GB" in found.text) == (memory.total < memory.machine)
    assert found.remedy.startswith(remedy)
    assert bool(found.remedy) == bool(remedy)


def test_hardware_counts_what_this_process_may_use(monkeypatch):
    from labkit import machine

    monkeypatch.setattr(limits, "cores", lambda: 1)
    monkeypatch.setattr(limits, "memory", lambda: limits.Memory(1, 2, 3))
    facts = machine.hardware()
    assert (facts["physical cores"], facts["logical cores"], facts["memory bytes"]) == (1, 1, 2)


def test_freed_memory_is_kept_where_the_c_library_is_glibc(monkeypatch):
    calls = []
    library = types.SimpleNamespace(mallopt=lambda *arguments: calls.append(arguments))
    monkeypatch.setattr("ctypes.CDLL", lambda name: library)
    monkeypatch.setattr("platform.libc_ver", lambda: ("", ""))
    limits.keep_freed_memory()
    assert calls == []
    monkeypatch.setattr("platform.libc_ver", lambda: ("glibc", "2.36"))
    limits.keep_freed_memory(1000)
    assert calls == [(-1, 1000), (-3, 2**25)]  # M_TRIM_THRESHOLD and M_MMAP_THRESHOLD of malloc.h


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")
def test_glibc_takes_what_it_is_told():
    library = ctypes.CDLL(None)
    assert library.mallopt(-1, 2**28) == 1
    assert library.mallopt(-3, 2**25) == 1
