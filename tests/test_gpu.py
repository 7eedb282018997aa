"""The script that records a GPU for chapter 5, run on the CPU with the tiny LM."""

import json

from labkit.authoring import gpu


def test_the_record_holds_every_format_or_why_not(monkeypatch):
    monkeypatch.setattr(gpu, "MODEL_DTYPES", {"FP32": gpu.MODEL_DTYPES["FP32"]})

    def unavailable(device, size):
        raise NotImplementedError("no kernel\nfor this")

    monkeypatch.setitem(gpu.PRODUCTS, "broken", unavailable)
    found = json.loads(json.dumps(gpu.record("cpu", 64, "tiny")))
    assert list(found["products"]) == list(gpu.PRODUCTS)
    assert found["products"]["broken"] == "NotImplementedError: no kernel"
    assert min(found["products"][name] for name in ("FP32", "TF32", "BF16", "FP16")) > 1e6
    model = found["model"]["FP32"]
    assert model["tokens a second written"] > 1
    assert 0 < model["seconds to read 512 tokens"] < 60
    assert 50 < model["perplexity"] < 80
    assert found["gpu"] == "no GPU"
    assert found["date"] > "2026"
