"""Numba's compiler, with a place on disk for what it compiled, wherever labkit is installed."""

import os
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numba

from labkit.downloads import cache_folder

_UID = getattr(os, "getuid", int)()
TEMPORARY = Path(tempfile.gettempdir()) / f"labkit-numba-{_UID}"
"""Where kernels are kept if no better place can be written."""


def _places() -> Iterator[str]:
    """Yield where Numba may keep kernels, the usual place first (empty: it looks for one)."""
    yield numba.config.CACHE_DIR
    yield str(cache_folder() / "numba")
    try:
        TEMPORARY.mkdir(mode=0o700, exist_ok=True)
        facts = TEMPORARY.lstat()
    except OSError:
        return
    # Others could leave code for us in a folder of theirs: this one must be ours alone.
    alone = facts.st_uid == _UID and not facts.st_mode & 0o077
    if stat.S_ISDIR(facts.st_mode) and (alone or os.name == "nt"):
        yield str(TEMPORARY)


def _can_keep() -> bool:
    usual = numba.config.CACHE_DIR
    for numba.config.CACHE_DIR in _places():
        try:
            numba.njit(cache=True)(_can_keep)
        except RuntimeError:  # nothing there can be written
            continue
        return True
    numba.config.CACHE_DIR = usual
    return False


KEPT = _can_keep()
"""Whether compiled kernels are kept on disk; if not, each process compiles them again."""


def njit(*arguments, cache: bool = False, **options):
    """Compile as `numba.njit` does, and do without a cache where there is no place for one."""
    return numba.njit(*arguments, cache=cache and KEPT, **options)
