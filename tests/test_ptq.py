"""Post-training quantization by blocks: statistics, rewrites, quantized blocks."""

import copy

import pytest
import torch
from notebook_rules import taught
from torch import nn

import labkit as lk
from labkit import kernels, ptq, quant


def entering(model, ids, number: int, layer: str) -> torch.Tensor:
    """Return what enters a layer in a plain forward pass, `(tokens, in)`."""
    caught = []
    linear = model.model.layers[number].get_submodule(layer)
    hook = linear.register_forward_pre_hook(lambda module, x: caught.append(x[0]))
    with torch.no_grad():
        model(ids)
    hook.remove()
    return caught[0].flatten(0, 1)


@torch.no_grad()
def logits(model, ids) -> torch.Tensor:
    return model(ids).logits


# The pass by blocks


@pytest.mark.parametrize("propagate", [True, False])
def test_statistics_are_those_of_a_plain_forward_pass(model, ids, propagate):
    passes = ptq.calibrate(model, ids, batch_size=4, propagate=propagate)
    for number, (block, inputs) in enumerate(passes):
        assert block is model.model.layers[number]
        assert inputs.keys() == ptq.LINEARS.keys()
        for name, layers in ptq.LINEARS.items():
            x = entering(model, ids, number, layers[-1])  # the last: all of them read the same
            torch.testing.assert_close(inputs[name].mean, x.abs().mean(0), rtol=1e-4, atol=1e-6)
            torch.testing.assert_close(inputs[name].peak, x.abs().amax(0), rtol=1e-4, atol=1e-6)
            hessian = (x.double().T @ x.double() / len(x)).float()
            torch.testing.assert_close(inputs[name].hessian, hessian, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("propagate", [True, False])
def test_a_changed_block_changes_what_the_next_one_sees(model, ids, propagate):
    before = entering(model, ids, 1, "self_attn.q_proj").abs().mean(0)
    passes = ptq.calibrate(model, ids, propagate=propagate)
    block, _ = next(passes)
    with torch.no_grad():
        block.mlp.down_proj.weight.zero_()
    _, inputs = next(passes)
    after = entering(model, ids, 1, "self_attn.q_proj").abs().mean(0)
    assert not torch.allclose(before, after, rtol=1e-2)
    seen = after if propagate else before
    torch.testing.assert_close(inputs["attention"].mean, seen, rtol=1e-4, atol=1e-6)


def test_the_pass_leaves_no_hook_behind(model, ids):
    passes = ptq.calibrate(model, ids)
    next(passes)
    passes.close()
    for module in model.modules():
        assert not module._forward_pre_hooks


def test_calibration_refuses_what_it_cannot_use(model, ids):
    with pytest.raises(ValueError, match=r"ids must be \(n_windows ≥ 1, length ≥ 2\), not \(64,\)"):
        next(ptq.calibrate(model, ids[0]))
    with pytest.raises(ValueError, match=r"not \(0, 64\)"):
        next(ptq.calibrate(model, ids[:0]))
    with pytest.raises(TypeError, match="ids must be an int64 tensor"):
        next(ptq.calibrate(model, ids.float()))
    with pytest.raises(ValueError, match="ids must be from 0 to 2047"):
        next(ptq.calibrate(model, ids + 2048))
    with pytest.raises(ValueError, match="batch_size must be at least 1"):
        next(ptq.calibrate(model, ids, batch_size=0))


def test_calibration_names_the_layer_that_nan_enters(model, ids):
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] = torch.nan
    passes = ptq.calibrate(model, ids)
    next(passes)
    with pytest.raises(ValueError, match=r"NaN or infinity enters mlp\.down_proj of block 1"):
        next(passes)


# An observer, as chapter 2 writes it


@pytest.fixture(scope="module")
def histogram_range():
    namespace = vars(quant) | {"torch": torch}
    exec(taught("02_ptq", "histogram_range"), namespace)
    return namespace["histogram_range"]


@pytest.mark.parametrize("bits", [8, 4])
def test_the_histogram_range_is_near_the_best_that_brute_force_finds(histogram_range, bits):
    x = torch.randn(200, 200, generator=torch.Generator().manual_seed(3)) ** 3 + 0.5

    def error(ends) -> float:
        grid = quant.choose_qparams(torch.as_tensor(ends), bits, dim=0)
        return (quant.dequantize(quant.quantize(x, *grid, bits), *grid) - x).square().mean().item()

    found = histogram_range(x, bits)
    low, high, shrinks = x.min(), x.max(), torch.logspace(0, -1.7, 12)
    tried = {(a, b): error([low * a, high * b]) for a in shrinks for b in shrinks}
    assert error(found) <= 1.05 * min(tried.values())
    if bits == 4:
        assert error(found) < 0.7 * error([low, high])


def test_the_histogram_range_of_positive_values_starts_at_zero(histogram_range):
    low, high = histogram_range(torch.rand(1000) + 3, 8).tolist()
    assert low == 0
    assert 3 < high <= 4


# Rewrites that change nothing


@pytest.mark.parametrize("name", ptq.PRODUCERS)
def test_rescaling_an_input_leaves_the_outputs_unchanged(model, ids, name):
    before = logits(model, ids)
    block = model.model.layers[1]
    kept = block.get_submodule(ptq.LINEARS[name][0]).weight.clone()
    factor = torch.rand(kept.shape[1], generator=torch.Generator().manual_seed(0)) * 4 + 0.2
    ptq.rescale_input(block, name, factor)
    torch.testing.assert_close(logits(model, ids), before, rtol=0, atol=1e-4)
    changed = block.get_submodule(ptq.LINEARS[name][0]).weight
    torch.testing.assert_close(changed, kept * factor)


def test_smoothing_and_awq_leave_the_outputs_of_the_model_unchanged(tiny, ids):
    before = logits(tiny[0], ids)
    for method in ("smooth", "awq"):
        model = copy.deepcopy(tiny[0])
        for block, inputs in ptq.calibrate(model, ids):
            for name in ptq.PRODUCERS:
                weights = [block.get_submodule(layer).weight for layer in ptq.LINEARS[name]]
                if method == "smooth":
                    factor = ptq.smooth_factor(inputs[name].peak, weights, 0.5)
                else:
                    factor = ptq.awq_factor(weights, inputs[name], 64)
                ptq.rescale_input(block, name, factor)
        torch.testing.assert_close(logits(model, ids), before, rtol=0, atol=1e-4)


def test_rescaling_divides_a_bias_too():
    block = nn.Module()
    block.mlp = nn.Module()
    block.mlp.up_proj, block.mlp.down_proj = nn.Linear(6, 4), nn.Linear(4, 3)
    x, factor = torch.randn(5, 6), torch.tensor([0.5, 2.0, 3.0, 8.0])
    before = block.mlp.down_proj(block.mlp.up_proj(x))
    ptq.rescale_input(block, "down", factor)
    torch.testing.assert_close(block.mlp.down_proj(block.mlp.up_proj(x)), before)


def test_rescaling_refuses_what_it_cannot_use(model):
    block = model.model.layers[0]
    with pytest.raises(ValueError, match=r"name must be one of .*'down'.*, not 'output'"):
        ptq.rescale_input(block, "output", torch.ones(192))
    bad = torch.ones(192)
    bad[3] = 0
    for factor in (torch.ones(191), bad, torch.full((192,), torch.inf)):
        with pytest.raises(ValueError, match=r"factor must be \(192,\), positive and finite"):
            ptq.rescale_input(block, "attention", factor)


def test_smoothing_shares_the_difficulty_as_alpha_says():
    peak, weights = torch.tensor([8.0, 0.5, 0.0]), [torch.tensor([[2.0, -1.0, 4.0], [0.5, 3.0, 0]])]
    assert torch.allclose(
        ptq.smooth_factor(peak, weights, 0.5)[:2], (peak / torch.tensor([2, 3, 4])).sqrt()[:2]
    )
    assert torch.allclose(ptq.smooth_factor(peak, weights, 1.0)[:2], peak[:2])
    assert torch.allclose(ptq.smooth_factor(peak, weights, 0.0), 1 / torch.tensor([2.0, 3.0, 4.0]))
    both = ptq.smooth_factor(peak, [*weights, torch.tensor([[6.0, 0, 0]])], 0.0)
    assert both[0] == pytest.approx(1 / 6)
    assert (ptq.smooth_factor(peak, weights, 0.7) > 0).all()


# Quantized blocks


def total_output_error(before, after, inputs) -> float:
    return sum(
        ptq.output_error(
            after.get_submodule(layer).weight - before.get_submodule(layer).weight,
            inputs[name].hessian,
        )
        for name, layers in ptq.LINEARS.items()
        for layer in layers
    )


def test_output_error_is_the_squared_error_of_the_outputs():
    x, error = torch.randn(50, 8), torch.randn(3, 8)
    expected = (x @ error.T).square().sum(1).mean()
    assert ptq.output_error(error, x.T @ x / 50) == pytest.approx(expected.item(), rel=1e-4)


def test_awq_never_loses_to_rounding_in_the_layers_it_scales(model, ids):
    for block, inputs in ptq.calibrate(model, ids, propagate=False):
        for name in ptq.PRODUCERS:
            weights = [block.get_submodule(layer).weight.detach() for layer in ptq.LINEARS[name]]
            factor = ptq.awq_factor(weights, inputs[name], 64)
            errors = []
            for s in (torch.ones_like(factor), factor):
                total = 0
                for w in weights:
                    grid = quant.group_qparams(w * s, 64)
                    codes = quant.quantize_groups(w * s, *grid, 64)
                    rounded = quant.dequantize_groups(codes, *grid, 64) / s
                    total += ptq.output_error(rounded - w, inputs[name].hessian)
                errors.append(total)
            assert errors[1] <= errors[0] * (1 + 1e-6)


@pytest.mark.parametrize("group_size", [0, 64, 80])
def test_compensation_and_clipping_lower_the_output_error(tiny, model, ids, group_size):
    statistics = [inputs for _, inputs in ptq.calibrate(model, ids, propagate=False)]
    errors = {}
    for method in ("rounding", "clipping", "compensation"):
        block = copy.deepcopy(tiny[0].model.layers[2])
        options = {} if method == "rounding" else {method: True}
        ptq.quantize_block(block, statistics[2], group_size, **options)
        errors[method] = total_output_error(tiny[0].model.layers[2], block, statistics[2])
    assert errors["clipping"] < errors["rounding"]
    assert errors["compensation"] < 0.8 * errors["rounding"]


def test_trust_in_correlations_goes_from_gptq_to_rounding(tiny, ids):
    """With a diagonal Hessian no input can make good another's error: GPTQ rounds to nearest."""
    blocks = {}
    for name, options in {
        "rounded": {},
        "diagonal": {"compensation": True, "shrink": 1.0},
        "half": {"compensation": True, "shrink": 0.5},
        "whole": {"compensation": True},
    }.items():
        net = copy.deepcopy(tiny[0])
        block, inputs = next(ptq.calibrate(net, ids))
        old = block.mlp.up_proj.weight.detach().clone()
        ptq.quantize_block(block, inputs, 64, 3, **options)
        new = block.mlp.up_proj.weight.detach()
        blocks[name] = new, ptq.output_error(new - old, inputs["mlp"].hessian)
    assert torch.equal(blocks["rounded"][0], blocks["diagonal"][0])
    assert blocks["whole"][1] < blocks["half"][1] < blocks["diagonal"][1]


def test_shrinking_keeps_the_diagonal_and_refuses_other_shares(model, ids):
    _, inputs = next(ptq.calibrate(model, ids))
    some = inputs["mlp"]
    half = some.shrunk(0.25)
    torch.testing.assert_close(half.hessian.diagonal(), some.hessian.diagonal())
    torch.testing.assert_close(half.hessian[0, 1:], 0.75 * some.hessian[0, 1:])
    assert half.mean is some.mean
    for share in (-0.1, 1.1, float("nan")):
        with pytest.raises(ValueError, match="share must be from 0 to 1"):
            some.shrunk(share)


def test_rounding_by_blocks_is_rounding_each_weight(tiny, model, ids):
    for block, inputs in ptq.calibrate(model, ids):
        ptq.quantize_block(block, inputs, 80, 3, symmetric=True)
    for number, layers in enumerate(zip(tiny[0].model.layers, model.model.layers, strict=True)):
        for name in (layer for group in ptq.LINEARS.values() for layer in group):
            before, after = (block.get_submodule(name).weight.detach() for block in layers)
            expected = rounded_in_slices(before, 80, 3)
            torch.testing.assert_close(after, expected, msg=f"{number} {name}")


def rounded_in_slices(weight: torch.Tensor, group_size: int, bits: int) -> torch.Tensor:
    """Round symmetrically, one slice of columns after the other."""
    parts, top = [], 2 ** (bits - 1) - 1
    for part in weight.split(group_size, dim=1):
        scale = (part.abs().amax(1, keepdim=True) / top).half().float()
        parts.append((part / scale).round().clamp(-top, top) * scale)
    return torch.cat(parts, dim=1)


@pytest.mark.parametrize("group_size", [0, 64, 80])
def test_the_saved_file_holds_two_codes_a_byte_and_the_same_model(model, ids, tmp_path, group_size):
    options = {"scaling": True, "clipping": True, "compensation": True}
    for block, inputs in ptq.calibrate(model, ids):
        grids = ptq.quantize_block(block, inputs, group_size, **options)
        for name, grid in grids.items():
            linear = block.get_submodule(name)
            size = group_size or linear.in_features
            block.set_submodule(name, kernels.PackedLinear(linear, 4, size, grid=grid))
            assert torch.equal(block.get_submodule(name).dequantized(), linear.weight)
    packed = [m for m in model.modules() if isinstance(m, kernels.PackedLinear)]
    n_weights = sum(m.dequantized().numel() for m in packed)
    path = lk.save_weights(model, tmp_path / "model.safetensors")
    assert lk.byte_ledger(path)["quantized codes"] == n_weights // 2
    other = copy.deepcopy(model)
    for parameter in (*other.parameters(), *other.buffers()):
        parameter.data.zero_() if parameter.is_floating_point() else parameter.fill_(0)
    other.model.rotary_emb = model.model.rotary_emb
    lk.load_weights(other, path)
    assert torch.equal(logits(other, ids), logits(model, ids))
