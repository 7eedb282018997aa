"""The study of calibration text: what it measures, and what it leaves alone."""

import json

import pytest

import labkit as lk
from labkit.authoring import calibration

GRID = {"group_size": 64, "bits": 3}
SMALL = {"n_windows": 4, "length": 32, "judged": (3, 48), **GRID}


@pytest.fixture(scope="module")
def record(tmp_path_factory):
    path = tmp_path_factory.mktemp("study") / "record.jsonl"
    pairs = [(text, method) for text in ("code", "calibration") for method in ("rounding", "GPTQ")]
    calibration.run("tiny", pairs, path, **SMALL)
    return path


def test_each_pair_is_measured_once_and_rounding_needs_no_text(record):
    tasks = [json.loads(line)["task"] for line in record.read_text().splitlines()]
    assert [(task["text"], task["method"]) for task in tasks] == [
        (None, "rounding"),
        ("code", "GPTQ"),
        ("calibration", "GPTQ"),
    ]
    before = record.read_text()
    calibration.run("tiny", [("code", "GPTQ"), ("code", "rounding")], record, **SMALL)
    assert record.read_text() == before


def test_what_is_recorded_is_what_the_evaluation_says(record):
    model, tokenizer = lk.load_model("tiny", device="cpu")
    reference = lk.reference(model, tokenizer, 3, 48)
    entry = json.loads(record.read_text().splitlines()[0])
    for layer in (m for b in model.model.layers for m in b.modules() if hasattr(m, "weight")):
        if layer.weight.ndim == 2:
            grid = lk.quant.group_qparams(layer.weight.detach(), 64, 3)
            codes = lk.quant.quantize_groups(layer.weight.detach(), *grid, 64, 3)
            layer.weight.data = lk.quant.dequantize_groups(codes, *grid, 64)
    for name, on in lk.quality(model, reference).items():
        assert entry["on"][name]["loss"] == pytest.approx(on.loss.by_window.tolist(), rel=1e-2)
        assert entry["on"][name]["kl"] == pytest.approx(on.kl.by_window.tolist(), rel=1e-2)


def test_tuning_comes_after_all_three(tmp_path):
    path = tmp_path / "record.jsonl"
    pairs = [("calibration", "all"), ("calibration", "all, tuned")]
    calibration.run("tiny", pairs, path, **SMALL | {"n_windows": 40})
    one, other = (json.loads(line)["on"]["docs"]["kl"] for line in path.read_text().splitlines())
    assert sum(other) < sum(one)


def test_the_command_line_names_what_there_is(capsys):
    with pytest.raises(SystemExit):
        calibration.main(["--text", "novels"])
    assert "invalid choice: 'novels'" in capsys.readouterr().err
