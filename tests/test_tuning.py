"""Scales and norms that learn: codes stay, held-out text gains, nothing is lost on bad input."""

import copy

import pytest
import torch

import labkit as lk
from labkit import ptq, qat
from labkit.kernels import PackedLinear
from labkit.quant import to_groups
from labkit.tuning import tune

GROUP = 32


@pytest.fixture(scope="module")
def study():
    """The tiny model, a copy at 3 bits, its grids, windows to learn from and to judge on."""
    teacher, tokenizer = lk.load_model("tiny", device="cpu")
    model = copy.deepcopy(teacher)
    windows = lk.windows(tokenizer, "reference-fit", 64, 64)
    rounded = [
        ptq.quantize_block(block, inputs, GROUP, bits=3)
        for block, inputs in ptq.calibrate(model, windows[:4])
    ]
    return teacher, model, rounded, windows, lk.windows(tokenizer, "reference-judge", 8, 64)


def divergence(model, teacher, ids):
    with torch.inference_mode():
        p, q = (net(ids).logits.log_softmax(-1) for net in (teacher, model))
    return float((p.exp() * (p - q)).sum(-1).mean())


@pytest.fixture(scope="module")
def tuned(study):
    teacher, rounded, grids, windows, _ = study
    model = copy.deepcopy(rounded)
    return model, *tune(model, grids, GROUP, teacher, windows, batch_size=4, rate=4e-3)


def test_text_that_it_did_not_see_gains(study, tuned):
    teacher, rounded, _, windows, judged = study
    model, _, losses = tuned
    assert len(losses) == len(windows) // 4
    assert losses[0] == pytest.approx(divergence(rounded, teacher, windows[:4]), rel=1e-3)
    assert divergence(model, teacher, judged) < 0.8 * divergence(rounded, teacher, judged)


def test_codes_stay_and_scales_fit_in_fp16(study, tuned):
    _, rounded, grids, _, _ = study
    model, new, _ = tuned
    for number, (block, old) in enumerate(zip(model.model.layers, grids, strict=True)):
        for name, (scale, zero_point) in new[number].items():
            assert torch.equal(scale, scale.half().float())
            assert torch.equal(zero_point, old[name][1])
            before = rounded.model.layers[number].get_submodule(name).weight
            codes = [
                to_groups(weight, GROUP) / s
                for weight, s in ((before, old[name][0]), (block.get_submodule(name).weight, scale))
            ]
            assert torch.equal(codes[0].round(), codes[1].round())
            assert (codes[1] - codes[1].round()).abs().max() < 1e-4
    assert not torch.equal(new[0]["mlp.down_proj"][0], grids[0]["mlp.down_proj"][0])


def test_what_is_packed_computes_the_same(study, tuned):
    model, new, _ = tuned
    layer = model.model.layers[0].mlp.down_proj
    packed = PackedLinear(layer, 3, GROUP, grid=new[0]["mlp.down_proj"])
    assert torch.equal(packed.dequantized(), layer.weight)


def test_norms_learn_and_the_embedding_and_the_teacher_do_not(study, tuned):
    teacher, rounded, *_ = study
    model = tuned[0]
    names = {n for n, p in model.named_parameters() if not torch.equal(p, rounded.get_parameter(n))}
    assert {"model.norm.weight", "model.layers.0.input_layernorm.weight"} <= names
    assert "model.embed_tokens.weight" not in names
    assert all(p.grad is None for p in teacher.parameters())
    assert torch.equal(teacher.model.norm.weight, rounded.model.norm.weight)


def test_a_run_that_fails_leaves_the_model_as_it_was(study):
    teacher, rounded, grids, windows, _ = study
    model = copy.deepcopy(rounded)
    with pytest.raises(qat.TrainingStopped, match="nan"):
        tune(model, grids, GROUP, teacher, windows, batch_size=4, rate=float("inf"))
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, rounded.get_parameter(name))


def test_too_few_windows_are_refused(study):
    teacher, model, grids, windows, _ = study
    with pytest.raises(ValueError, match="at least batch_size=8 windows, not 3"):
        tune(model, grids, GROUP, teacher, windows[:3])


def test_each_block_needs_its_grid(study):
    teacher, model, grids, windows, _ = study
    with pytest.raises(ValueError, match="one for each block of the model, not 3 grids for 4"):
        tune(model, grids[:3], GROUP, teacher, windows)
