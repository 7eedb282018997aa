"""Loading, caching and refusing models."""

import os
import subprocess
import sys

import pytest
import torch

from labkit import models


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
