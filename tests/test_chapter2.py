"""What chapters 2b and 2c write out for themselves, held against labkit, gguf and definitions."""

import copy
import dataclasses

import gguf
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from notebook_rules import taught

from labkit import microscaling, ptq, quant, rotations
from labkit.authoring import four_bits, overfitting

WEIGHTS, FORMATS = "02b_weights", "02c_formats_rotations"


def taught_functions(*names: str, chapter: str = WEIGHTS, **known) -> dict:
    space = {"torch": torch, "np": np, **vars(quant), **vars(microscaling), **known}
    space |= {"output_error": ptq.output_error}
    for name in names:
        exec(taught(chapter, name), space)
    return space


def random_layer(rows: int, inputs: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return a weight and a Hessian of correlated inputs."""
    random = torch.Generator().manual_seed(seed)
    x = torch.randn(3 * inputs, inputs, generator=random)
    x = x @ torch.randn(inputs, inputs, generator=random)
    return torch.randn(rows, inputs, generator=random), x.T @ x / len(x)


@settings(max_examples=15, deadline=None)
@given(st.integers(1, 9), st.integers(2, 80), st.integers(1, 80), st.integers(2, 8))
def test_gptq_of_the_chapter_gives_the_codes_of_labkit(rows, inputs, group_size, bits):
    codes_of = taught_functions("spread_errors", "gptq_codes")["gptq_codes"]
    weight, hessian = random_layer(rows, inputs, 7 * inputs + rows)
    size = min(group_size, inputs)
    grid = quant.group_qparams(weight, size, bits)
    codes = codes_of(weight, hessian, *grid, size, bits)
    expected = quant.gptq(weight, hessian, *grid, size, bits)
    assert (codes == expected).float().mean() >= 0.98, "a tie may fall to either side"


def test_awq_of_the_chapter_finds_the_factor_of_labkit():
    search = taught_functions("awq_search")["awq_search"]
    weight, hessian = random_layer(24, 64, 3)
    mean = torch.logspace(-2, 1, 64)
    inputs = ptq.Inputs(mean, 4 * mean, hessian * mean * mean[:, None])
    factor, errors = search([weight, weight[:8]], inputs, 32)
    torch.testing.assert_close(factor, ptq.awq_factor([weight, weight[:8]], inputs, 32))
    assert errors[0] == 1
    assert errors.min() < 1


@pytest.mark.parametrize("number_format", ["MXFP4", "NVFP4"])
def test_blocks_of_the_chapter_are_those_of_the_formats(number_format):
    w = torch.randn(8, 192, generator=torch.Generator().manual_seed(1)) * 0.02
    values = microscaling.FP4_VALUES
    grids = {"FP4": torch.cat([-values.flip(0), values[1:]])}
    names = "block_scales", "round_in_blocks"
    rounded = taught_functions(*names, chapter=FORMATS, GRIDS=grids)["round_in_blocks"]
    arguments = {"MXFP4": (32, "E8M0"), "NVFP4": (16, "E4M3")}[number_format]
    expected = microscaling.round_to_blocks(w, number_format)
    torch.testing.assert_close(rounded(w, "FP4", *arguments), expected, rtol=1e-5, atol=0)
    torch.testing.assert_close(
        four_bits.round_weight(w, "FP4", *arguments), expected, rtol=1e-5, atol=0
    )


def test_even_is_torchaos_rule_and_higher_never_cuts():
    from torchao.prototype.mx_formats.config import ScaleCalculationMode
    from torchao.prototype.mx_formats.mx_tensor import MXTensor

    w = torch.randn(64, 256, generator=torch.Generator().manual_seed(3))
    by_torchao = MXTensor.to_mx(
        w, torch.float4_e2m1fn_x2, 32, scaling_mode=ScaleCalculationMode.EVEN
    )
    found = four_bits.round_weight(w, "FP4", 32, "E8M0, EVEN")
    assert torch.equal(found, by_torchao.dequantize(torch.float32))
    peak = w.unflatten(1, (-1, 32)).abs().amax(-1, keepdim=True)
    scale = four_bits.block_scale(peak, 6.0, "E8M0, higher")
    assert torch.equal(scale, 2 * four_bits.block_scale(peak, 6.0, "E8M0"))
    assert (peak <= 6 * scale).all()


@settings(max_examples=15, deadline=None)
@given(st.integers(1, 4), st.floats(-3, 3), st.floats(1e-4, 10))
def test_q4_k_is_read_by_gguf_as_we_read_it(rows, shift, scale):
    names = "q4_k", "from_q4_k", "q4_k_bytes"
    functions = taught_functions(*names, chapter=FORMATS)
    w = torch.randn(rows, 512, generator=torch.Generator().manual_seed(rows)) * scale + shift
    w[0, :32] = 0
    parts = functions["q4_k"](w)
    ours, packed = functions["from_q4_k"](*parts, w.shape), functions["q4_k_bytes"](*parts)
    assert packed.shape == (2 * rows, 144)
    theirs = gguf.quants.dequantize(packed.numpy(), gguf.GGMLQuantizationType.Q4_K)
    np.testing.assert_allclose(theirs.reshape(w.shape), ours.numpy(), rtol=1e-5, atol=1e-6 * scale)
    step = (w.view(-1, 32).amax(1) - w.view(-1, 32).amin(1).clamp(max=0)).clamp(min=0) / 15
    off = (ours - w).view(-1, 32).abs().amax(1)
    assert (off <= 4 * step + 0.1 * scale + 0.05 * abs(shift)).all()


# The records


def test_gptq_on_a_float_grid_stays_on_it_and_beats_rounding_on_its_own_text():
    weight, hessian = random_layer(16, 64, 5)
    nearest = four_bits.round_weight(weight, "FP4", 32, "E8M0")
    fitted = four_bits.round_weight(weight, "FP4", 32, "E8M0", hessian)
    again = four_bits.round_weight(fitted, "FP4", 32, "FP16")
    peak = weight.view(16, 2, 32).abs().amax(-1, keepdim=True)
    scale = four_bits.block_scale(peak, 6.0, "E8M0")
    steps = fitted.view(16, 2, 32) / scale
    torch.testing.assert_close(steps, microscaling.round_to_float(steps, *microscaling.E2M1))
    assert again.shape == fitted.shape
    errors = [ptq.output_error(x - weight, hessian) for x in (fitted, nearest)]
    assert errors[0] < 0.8 * errors[1]


def test_gptq_uses_the_sixteenth_level_where_rounding_does():
    weight, hessian = random_layer(16, 64, 5)
    grid = "INT4, 16 levels", 16, "E4M3"
    found = [four_bits.round_weight(weight, *grid, h) for h in (None, hessian)]
    blocks = weight.view(16, 4, 16)
    peak = blocks.abs().amax(-1, keepdim=True)
    scale = four_bits.block_scale(peak, 8.0, "E4M3")
    sign = -blocks.gather(-1, blocks.abs().argmax(-1, keepdim=True)).sign()
    for rounded in found:
        steps = rounded.view(16, 4, 16) / scale * sign
        torch.testing.assert_close(steps, steps.round(), atol=1e-4, rtol=0)
        assert steps.min() == pytest.approx(-8, abs=1e-4)
        assert steps.max() <= 7 + 1e-4
    errors = [ptq.output_error(x - weight, hessian) for x in found]
    assert errors[1] < 0.8 * errors[0]


@pytest.mark.parametrize("fitted", [False, True])
def test_turned_where_it_is_rounded_means_both_sides_in_turned_axes(fitted):
    torch.manual_seed(0)
    layer, x = torch.nn.Linear(64, 8, bias=False), torch.randn(100, 64) * torch.linspace(0.1, 9, 64)
    seen = ptq.Inputs(x.abs().mean(0), x.abs().amax(0), x.T @ x / len(x))
    square = rotations.hadamard_transform(torch.eye(64))
    expected = torch.nn.Linear(64, 8, bias=False)
    expected.weight.data = layer.weight @ square
    turned = dataclasses.replace(seen, hessian=square.T @ seen.hessian @ square)
    task = {"weights": ("INT4 with zero point", 64, "FP16"), "activations": "4 bits a token"}
    task |= {"gptq": fitted}
    four_bits._round(expected, task, turned)
    four_bits._round(layer, task | {"turn": "where rounded"}, seen)
    torch.testing.assert_close(layer(x), expected(x @ square), rtol=1e-3, atol=1e-3)
    assert not torch.allclose(layer.weight, expected.weight, atol=1e-2)


@pytest.mark.parametrize("but", [0, 0.7])
def test_gains_are_folded_save_the_small_ones(model, ids, but):
    made = copy.deepcopy(model)
    four_bits.fold(made, but)
    with torch.inference_mode():
        torch.testing.assert_close(
            made(ids[:1]).logits, model(ids[:1]).logits, rtol=1e-3, atol=1e-3
        )
    gain, left = (net.model.layers[0].input_layernorm.weight for net in (model, made))
    small = gain.abs() < but * gain.abs().median()
    assert torch.equal(left != 1, small)
    assert small.any() == (but > 0)


def test_every_task_of_the_record_is_written_once():
    tasks = [repr(task) for task in four_bits.tasks()]
    assert len(set(tasks)) == len(tasks)


def test_hessians_add_up_over_windows(model, ids):
    found = dict(overfitting.hessians(model, ids[:4], (2, 4), blocks=(0,)))
    whole = next(iter(ptq.calibrate(model, ids[:4], propagate=False)))[1]
    for name, inputs in whole.items():
        torch.testing.assert_close(found[4][0, name], inputs.hessian, rtol=1e-3, atol=1e-4)
    assert not torch.allclose(found[2][0, "mlp"], found[4][0, "mlp"], rtol=1e-2)
