"""Fake quantization and its gradients against torch's own and finite differences; the loop."""

import copy
import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

import labkit as lk
from labkit import qat, quant
from labkit.kernels import PackedLinear


def weights(rows=6, columns=32, seed=0) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def layer_of(weight: torch.Tensor) -> nn.Linear:
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    linear.weight.data = weight.clone()
    return linear


# Gradients


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("shrink", [1.0, 0.5])  # at 0.5 many weights are clipped
def test_value_and_gradients_are_those_of_torch(bits, symmetric, shrink):
    weight, upstream = weights(), weights(seed=1)
    scale, zero_point = quant.group_qparams(weight, 32, bits, symmetric)
    scale = quant.to_fp16(scale * shrink)
    layer = qat.QATLinear(layer_of(weight), bits, 32, symmetric, (scale, zero_point))
    ours = layer.rounded()
    ours.backward(upstream)
    w, s = weight.clone().requires_grad_(), scale.flatten().clone().requires_grad_()
    theirs = torch._fake_quantize_learnable_per_channel_affine(
        w, s, zero_point.flatten(), 0, *quant.integer_range(bits, symmetric), 1.0
    )
    theirs.backward(upstream)
    assert torch.equal(ours, theirs)
    assert torch.equal(layer.weight.grad, w.grad)
    torch.testing.assert_close(layer.scale.grad.flatten(), s.grad, rtol=1e-4, atol=1e-4)
    share = float((layer.weight.grad == 0).float().mean())
    assert share > 0.02 if shrink < 1 else share < 0.2  # the clipped range is really met


def test_the_scale_gradient_is_that_of_the_paper():
    """LSQ, equation 3, in float64: round(w/s) − w/s inside the range, the last code outside."""
    weight = weights().double()
    scale = torch.full((6, 1), 0.2, dtype=torch.float64, requires_grad=True)
    zero_point = torch.zeros(6, 1, dtype=torch.float64)
    upstream = weights(seed=1).double()
    qat.FakeQuantize.apply(weight, scale, zero_point, -7, 7).backward(upstream)
    codes = (weight / 0.2).round().clamp(-7, 7)
    inside = (weight / 0.2).round().abs() <= 7
    assert 0 < (~inside).sum() < inside.sum()
    expected = (upstream * (codes - inside * weight / 0.2)).sum(1, keepdim=True)
    torch.testing.assert_close(scale.grad, expected)


def test_a_clipped_weight_gets_the_gradient_of_clipping():
    """Finite differences of the clip function, which the estimator puts in place of rounding."""
    weight = torch.linspace(-3, 3, 61, dtype=torch.float64)[None].requires_grad_()
    one, zero = torch.ones(1, 1, dtype=torch.float64), torch.zeros(1, 1, dtype=torch.float64)
    qat.FakeQuantize.apply(weight, one, zero, -1, 1).sum().backward()
    step = 1e-6
    clip = [(weight.detach() + d).clamp(-1.5, 1.5) for d in (-step, step)]
    slope = (clip[1] - clip[0]) / (2 * step)
    away = (weight.detach().abs() - 1.5).abs() > 0.01
    torch.testing.assert_close(weight.grad[away], slope[away])


def test_groups_with_a_shorter_tail_learn_too():
    layer = qat.QATLinear(layer_of(weights(4, 40)), 3, 16)
    assert layer.scale.shape == (4, 3, 1)
    layer(weights(5, 40)).square().sum().backward()
    assert layer.scale.grad.abs().min() > 0
    assert layer.weight.grad.shape == (4, 40)


@pytest.mark.parametrize(("bits", "error"), [(1, ValueError), (9, ValueError), (4.0, TypeError)])
def test_bits_outside_2_to_8_are_refused(bits, error):
    linear = layer_of(weights())
    with pytest.raises(error, match="from 2 to 8"):
        qat.QATLinear(linear, bits, 32)
    grid = quant.group_qparams(linear.weight, 32, 4)
    with pytest.raises(error, match="from 2 to 8"):
        qat.QATLinear(linear, bits, 32, grid=grid)


@pytest.mark.parametrize("value", [0.0, -0.01, float("nan")])
def test_a_step_size_that_is_not_positive_is_refused(value):
    layer = qat.QATLinear(layer_of(weights()), 4, 32)
    layer.scale.data[2] = value
    with pytest.raises(qat.StepSizeError, match="must stay above 0"):
        layer(weights(2, 32))


def test_parameters_are_taken_over_not_copied():
    linear = nn.Linear(32, 6)
    layer = qat.QATLinear(linear, 4, 32)
    assert layer.weight is linear.weight
    assert layer.bias is linear.bias


# The whole model


@pytest.mark.parametrize(
    ("bits", "group_size", "symmetric"), [(4, 64, False), (8, 0, True), (3, 64, False)]
)
def test_converted_equals_simulated_and_loads_from_its_file(
    tiny, tmp_path, bits, group_size, symmetric
):
    model = copy.deepcopy(tiny[0])
    layers = qat.prepare(model, bits, group_size, symmetric)
    assert len(layers) == 28
    with torch.no_grad():  # as training would leave it: off the grid, odd step sizes
        for layer in layers:
            layer.weight += 0.01 * torch.randn_like(layer.weight)
            layer.scale *= 0.973
    ids = lk.windows(tiny[1], "reference-judge", 2, 64)
    simulated = model(ids).logits
    qat.convert(model)
    packed = [m for m in model.modules() if isinstance(m, PackedLinear)]
    assert len(packed) == 28
    assert not any(isinstance(m, qat.QATLinear) for m in model.modules())
    assert (model(ids).logits - simulated).abs().max() <= 1e-3
    path = lk.save_weights(model, tmp_path / "model.safetensors")
    codes = lk.byte_ledger(path)["quantized codes"]
    assert codes == sum(m.codes.numel() for m in packed)  # bytes
    assert codes * 8 == bits * sum(layer.weight.numel() for layer in layers)
    blank = copy.deepcopy(tiny[0])
    qat.prepare(blank, bits, group_size, symmetric)
    qat.convert(blank)
    lk.load_weights(blank, path)
    assert (blank(ids).logits - simulated).abs().max() <= 1e-3


def test_a_bad_step_size_converts_no_layer(tiny):
    model = copy.deepcopy(tiny[0])
    qat.prepare(model, 4, 64)[-1].scale.data[0] = 0
    with pytest.raises(qat.StepSizeError, match="must stay above 0"):
        qat.convert(model)
    assert not any(isinstance(m, PackedLinear) for m in model.modules())


def test_grids_of_chapter_2_are_where_training_begins(tiny):
    from labkit.ptq import calibrate, quantize_block

    model = copy.deepcopy(tiny[0])
    ids = lk.windows(tiny[1], "reference-fit", 2, 64)
    grids = [quantize_block(b, inputs, 64, 3, clipping=True) for b, inputs in calibrate(model, ids)]
    before = model(ids).logits
    qat.prepare(model, 3, 64, grids=grids)
    assert (model(ids).logits - before).abs().max() <= 1e-3  # its weights lie on the grid


# The loop


def problem(seed=0, lr=0.01):
    layer = qat.QATLinear(layer_of(weights(seed=seed)), 3, 32)
    target = weights(8, 6, seed=2)

    def loss_of(step):
        x = torch.randn(8, 32, generator=torch.Generator().manual_seed(step))
        return (layer(x) - target).square().mean()

    return layer, loss_of, torch.optim.AdamW(layer.parameters(), lr)


def state(layer):
    return {name: tensor.clone() for name, tensor in layer.state_dict().items()}


def test_the_loss_falls_and_the_learning_rate_with_it():
    _, loss_of, optimizer = problem()
    first = loss_of(0).item()
    losses = qat.train(loss_of, optimizer, 40)
    assert len(losses) == 40
    assert losses[0] == first
    assert sum(losses[-5:]) < 0.7 * sum(losses[:5])
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.01 / 40)


def test_an_interrupted_run_ends_as_if_it_had_not_been(tmp_path):
    layer, loss_of, optimizer = problem()
    whole = qat.train(loss_of, optimizer, 30)
    expected = state(layer)

    layer, loss_of, optimizer = problem()
    path = tmp_path / "run.safetensors"

    def interrupted(step):
        if step == 17:
            raise KeyboardInterrupt
        return loss_of(step)

    with pytest.raises(KeyboardInterrupt):
        qat.train(interrupted, optimizer, 30, path, every=5)
    with safe_open(path, "pt") as file:
        assert len(json.loads(file.metadata()["losses"])) == 15

    layer, loss_of, optimizer = problem(seed=7)  # a new process would start from other values
    layer.zero_point.copy_(expected["zero_point"])
    steps = []
    again = qat.train(lambda step: steps.append(step) or loss_of(step), optimizer, 30, path, 5)
    assert steps == list(range(15, 30))
    assert again == whole
    assert all(torch.equal(value, expected[name]) for name, value in state(layer).items())
    assert [file.name for file in tmp_path.iterdir()] == ["run.safetensors"]
    assert qat.train(lambda step: 1 / 0, optimizer, 30, path) == whole  # nothing left to do


@pytest.mark.parametrize("bad", ["nan", "inf", "step size", "last step"])
def test_a_run_that_breaks_stops_with_the_step_and_goes_back(tmp_path, bad):
    layer, loss_of, optimizer = problem()
    path, kept = tmp_path / "run.safetensors", {}

    def breaking(step):
        if step == 10:
            kept.update(state(layer))
        loss = loss_of(step)
        if step == 12 and bad in ("nan", "inf"):
            return loss * float(bad)
        if step == 11 and bad == "step size":
            layer.scale.data[3] = -1e-3
            return loss_of(step)
        if step == 19 and bad == "last step":
            return loss + (layer.weight[0, 0] - layer.weight[0, 0].detach()).sqrt()
        return loss

    said = {
        "nan": "step 12: the loss is nan",
        "inf": "step 12: the loss is inf",
        "step size": "step 11: a step size became -0.001",
        "last step": "step 20: a parameter is NaN or infinite",
    }[bad]
    with pytest.raises(qat.TrainingStopped, match=said) as caught:
        qat.train(breaking, optimizer, 20, path, every=10)
    assert "step 10 are back, from run.safetensors" in str(caught.value)
    assert all(torch.equal(value, kept[name]) for name, value in state(layer).items())


def test_without_a_checkpoint_it_says_so():
    _, loss_of, optimizer = problem()
    with pytest.raises(qat.TrainingStopped, match=r"step 3: the loss is nan\. No checkpoint"):
        qat.train(lambda step: loss_of(step) * (1 if step < 3 else torch.nan), optimizer, 5)


def test_a_checkpoint_of_another_run_is_neither_used_nor_lost(tmp_path):
    _, loss_of, optimizer = problem()
    path = tmp_path / "run.safetensors"
    qat.train(loss_of, optimizer, 5, path)
    content = path.read_bytes()
    other = torch.optim.AdamW([nn.Parameter(torch.ones(3))], 0.1)
    foreign = tmp_path / "foreign.safetensors"
    save_file({"a": torch.ones(2)}, foreign)
    for run in ((optimizer, 6, path), (other, 5, path), (optimizer, 5, foreign)):
        with pytest.raises(ValueError, match="belongs to another run"):
            qat.train(loss_of, *run)
    assert path.read_bytes() == content
    assert load_file(foreign)["a"].tolist() == [1, 1]


@pytest.mark.parametrize("counts", [{"n_steps": 0}, {"n_steps": 5, "every": 0}])
def test_counts_below_one_are_refused(counts):
    _, loss_of, optimizer = problem()
    with pytest.raises(ValueError, match="at least 1"):
        qat.train(loss_of, optimizer, **counts)


def test_step_sizes_learn_at_a_rate_of_their_own(tiny):
    model = copy.deepcopy(tiny[0])
    plain = qat.parameter_groups(model, 1e-3)
    assert [len(group["params"]) for group in plain] == [len(list(model.parameters()))]
    layers = qat.prepare(model, 4, 64)
    model.model.embed_tokens.requires_grad_(False)
    others, scales = qat.parameter_groups(model, 1e-3, scale_rate=0.01)
    assert others["lr"] == 1e-3
    assert {id(p) for p in scales["params"]} == {id(layer.scale) for layer in layers}
    mean = torch.cat([layer.scale.detach().flatten() for layer in layers]).mean().item()
    assert scales["lr"] == pytest.approx(0.01 * mean)
    everything = {id(p) for p in model.parameters() if p.requires_grad}
    assert {id(p) for p in others["params"] + scales["params"]} == everything
