"""The script that records a GPU for chapter 5, run on the CPU with the tiny LM."""

import json

import pytest
import torch

from labkit.authoring import gpu

SMALL = gpu.Sizes(square=64, layer=256, copied=2**20, model="tiny", windows=2, length=300)


@pytest.fixture(scope="module")
def found():
    def unavailable(device, size):
        raise NotImplementedError("no kernel\nfor this")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "compile", lambda function, **options: function)  # takes minutes
        patch.setattr(gpu, "SCHEMES", ("BF16", "INT8 weights"))
        patch.setattr(gpu, "TOKENS", (1, 8))
        patch.setattr(gpu, "WRITTEN", 8)
        patch.setitem(gpu.PRODUCTS, "broken", unavailable)
        steps = [json.loads(json.dumps(found)) for found in gpu.record("cpu", SMALL)]
        assert len(steps[1]["products"]) < len(steps[2]["products"])  # written step by step
        yield steps[-1]


def test_the_record_holds_every_format_or_why_not(found):
    assert list(found["products"]) == list(gpu.PRODUCTS)
    assert found["products"]["broken"] == "NotImplementedError: no kernel"
    assert min(found["products"][name] for name in ("FP32", "TF32", "BF16", "FP16")) > 1e6
    assert found["bandwidth"]["copy"] > 1e8
    assert found["gpu"] == "no GPU"
    assert found["date"] > "2026"


def test_a_layer_is_timed_at_each_number_of_tokens(found):
    assert list(found["layer"]) == ["BF16", "INT8 weights"]
    assert all(list(seconds) == ["1", "8"] for seconds in found["layer"].values())
    assert all(0 < t < 1 for seconds in found["layer"].values() for t in seconds.values())


def test_models_write_the_same_however_they_are_started(found):
    assert list(found["model"]) == ["FP32", "BF16", "INT8 weights"]
    for spoken in found["model"].values():
        ways = [spoken[way] for way in ("eager", "graph", "compiled") if way in spoken]
        assert len(ways) >= 2
        assert all(way["same tokens"] == 8 and way["tokens a second"] > 1 for way in ways)


def test_bytes_are_those_of_the_linear_layers_and_loss_is_over_fp32(found):
    whole, half, quarter = found["model"].values()
    assert whole["bytes"] == 2 * half["bytes"]
    assert 0.5 < quarter["bytes"] / half["bytes"] < 0.55  # a scale a row besides
    assert whole["loss"] == {"news": [0, 0], "docs": [0, 0]}
    assert all(abs(loss) < 0.02 for loss, _ in quarter["loss"].values())
    assert all(0 < spoken["seconds to read 512 tokens"] < 60 for spoken in (whole, half, quarter))
