"""The study of calibration text: what it measures, and what it leaves alone."""

import copy
import json

import pytest
import torch

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


def test_a_mixture_holds_as_many_windows_of_each_kind_as_it_says(tmp_path):
    path, mix = tmp_path / "record.jsonl", {"code": 3, "self-written": 1}
    calibration.run("tiny", [("calibration", "GPTQ")], path, **SMALL, mix=mix)
    task = json.loads(path.read_text())["task"]
    assert (task["mix"], task["n_windows"]) == (mix, 4)
    _, tokenizer = lk.load_model("tiny", device="cpu")
    kinds = {kind: lk.windows(tokenizer, kind, n, 32).tolist() for kind, n in mix.items()}
    found = calibration._windows(tokenizer, task).tolist()
    assert sorted(found) == sorted(window for kind in kinds.values() for window in kind)
    assert found != [window for kind in kinds.values() for window in kind]  # in no order of kinds


@pytest.mark.parametrize("first", [0.0, 3.0])
def test_first_tokens_count_as_often_as_asked(first):
    model, tokenizer = lk.load_model("tiny", device="cpu")
    ids = lk.windows(tokenizer, "code", 6, 32)
    given = {}

    def keep(layer, arguments):
        given[layer] = torch.cat([given[layer], arguments[0]]) if layer in given else arguments[0]

    weighed = [inputs for _, inputs in calibration._calibrate(copy.deepcopy(model), ids, first)]
    for block in model.model.layers:
        block.mlp.up_proj.register_forward_pre_hook(keep)
    model(ids)
    for block, inputs in zip(model.model.layers, weighed, strict=True):
        x = given[block.mlp.up_proj].detach()
        x[:, 0] *= first**0.5
        expected = x.flatten(0, 1).T @ x.flatten(0, 1) / ids.numel()
        assert torch.allclose(inputs["mlp"].hessian, expected, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--mix", "novels=3"], "'novels=3' is not KIND=WINDOWS"),
        (["--mix", "code"], "'code' is not KIND=WINDOWS"),
        (["--mix", "code=0"], "'code=0' is not KIND=WINDOWS"),
        (["--mix", "code=4", "--text", "code"], "--mix: goes with --text calibration alone"),
        (["--first", "-1"], "--first: must be a weight of 0 or more, not -1.0"),
        (["--first", "nan"], "--first: must be a weight of 0 or more, not nan"),
    ],
)
def test_options_that_say_nothing_are_refused(arguments, message, capsys):
    with pytest.raises(SystemExit):
        calibration.main(arguments)
    assert message in capsys.readouterr().err


def test_the_command_line_names_what_there_is(capsys):
    with pytest.raises(SystemExit):
        calibration.main(["--text", "novels"])
    assert "invalid choice: 'novels'" in capsys.readouterr().err
