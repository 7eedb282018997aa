"""Mixed precision: the Fisher estimate, the integer program, and layers of several widths."""

import copy
import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from notebook_rules import taught

import labkit as lk
from labkit import mixed
from labkit.kernels import PackedLinear
from labkit.quant import dequantize_groups, group_qparams, pack_bits, quantize_groups, unpack_bits


@pytest.fixture(scope="module")
def tiny():
    model, tokenizer = lk.load_model("tiny", device="cpu")
    return model, lk.windows(tokenizer, "reference-fit", 8, 128)


# Sensitivity


def test_fisher_is_the_squared_gradient_of_drawn_labels(tiny):
    model, ids = tiny
    information = mixed.fisher(model, ids[:2], seed=3)
    generator = torch.Generator().manual_seed(3)
    weight = model.model.layers[1].mlp.down_proj.weight
    expected = torch.zeros_like(weight)
    for window in ids[:2]:
        model.zero_grad()
        log_p = model(window[None]).logits[0].log_softmax(-1)
        drawn = torch.multinomial(log_p.detach().exp(), 1, generator=generator)
        log_p.gather(1, drawn).sum().backward()
        expected += weight.grad**2
    model.zero_grad()
    torch.testing.assert_close(
        information["model.layers.1.mlp.down_proj"], expected / ids[:2].numel(), rtol=1e-3, atol=0
    )
    assert list(information) == mixed.layer_names(model)


def test_costs_predict_the_divergence_that_is_measured(tiny):
    model, ids = tiny
    costs = mixed.rounding_costs(model, mixed.fisher(model, ids), (3, 4, 8))
    with torch.inference_mode():
        reference = model(ids).logits.log_softmax(-1)
    for name in mixed.layer_names(model)[::5]:
        for bits in (3, 4):
            rounded = mixed.pack_layers(copy.deepcopy(model), {name: bits})
            with torch.inference_mode():
                log_q = rounded(ids).logits.log_softmax(-1)
            measured = torch.nn.functional.kl_div(
                log_q, reference, log_target=True, reduction="sum"
            )
            assert 0.5 < costs[name][bits] / (measured / ids.numel()) < 2
        assert costs[name][3] > costs[name][4] > 20 * costs[name][8] > 0


@pytest.mark.parametrize("group_size", [16, 64])
@pytest.mark.parametrize("bits", [2, 3, 8])
def test_rounding_is_that_of_the_reference_quantizers(bits, group_size):
    linear = torch.nn.Linear(100, 24)
    weight, matter = linear.weight.detach(), torch.rand(24, 100)
    weight[3] = 0
    grid = group_qparams(weight, group_size, bits)
    codes = quantize_groups(weight, *grid, group_size, bits)
    expected = dequantize_groups(codes, *grid, group_size)
    assert torch.equal(mixed.round_to_nearest(weight, bits, group_size), expected)
    model = torch.nn.Sequential(linear)
    costs = mixed.rounding_costs(model, {"0": matter}, (bits,), group_size)
    assert costs["0"][bits] == float((matter * (expected - weight).square()).sum() / 2)


def test_fisher_refuses_ids_that_are_no_windows(tiny):
    with pytest.raises(ValueError, match=r"ids must be \(n_windows ≥ 1, length ≥ 2\)"):
        mixed.fisher(tiny[0], tiny[1][0])


# Allocation


@st.composite
def instances(draw):
    n, widths = draw(st.integers(1, 5)), (3, 4, 8)
    costs, nbytes = {}, {}
    for i in range(n):
        values = draw(st.lists(st.floats(1e-6, 1), min_size=3, max_size=3))
        costs[f"layer {i}"] = dict(zip(widths, sorted(values, reverse=True), strict=True))
        nbytes[f"layer {i}"] = {bits: bits * draw(st.integers(100, 900)) for bits in widths}
    low = sum(min(row.values()) for row in nbytes.values())
    high = sum(max(row.values()) for row in nbytes.values())
    return costs, nbytes, draw(st.integers(low, high))


@given(instances())
def test_integer_program_equals_brute_force(instance):
    costs, nbytes, budget = instance
    best = math.inf
    for widths in itertools.product((3, 4, 8), repeat=len(costs)):
        choice = dict(zip(costs, widths, strict=True))
        if sum(nbytes[name][b] for name, b in choice.items()) <= budget:
            best = min(best, sum(costs[name][b] for name, b in choice.items()))
    chosen = mixed.allocate(costs, nbytes, budget)
    assert list(chosen) == list(costs)
    assert sum(nbytes[name][b] for name, b in chosen.items()) <= budget
    found = sum(costs[name][b] for name, b in chosen.items())
    assert found == pytest.approx(best, rel=2e-4, abs=1e-6)


@given(instances())
def test_greedy_of_chapter_4_stays_within_the_budget_and_never_beats_the_program(instance):
    costs, nbytes, budget = instance
    namespace = {}
    exec(taught("04_mixed_precision", "allocate_greedily"), namespace)
    chosen = namespace["allocate_greedily"](costs, nbytes, budget)
    best = mixed.allocate(costs, nbytes, budget)
    totals = [sum(costs[name][b] for name, b in x.items()) for x in (chosen, best)]
    assert list(chosen) == list(costs)
    assert sum(nbytes[name][b] for name, b in chosen.items()) <= budget
    assert totals[0] >= totals[1] * (1 - 2e-4) - 1e-6


def test_the_best_choice_is_not_the_most_gain_for_each_byte():
    costs = {"a": {3: 10.0, 8: 0.0}, "b": {3: 6.0, 8: 0.0}, "c": {3: 6.0, 8: 0.0}}
    nbytes = {"a": {3: 0, 8: 6}, "b": {3: 0, 8: 5}, "c": {3: 0, 8: 5}}
    assert mixed.allocate(costs, nbytes, 10) == {"a": 3, "b": 8, "c": 8}


def test_a_budget_too_small_names_the_smallest_that_does():
    costs = {"a": {3: 1.0, 8: 0.1}, "b": {3: 1.0, 8: 0.1}}
    nbytes = {"a": {3: 30, 8: 80}, "b": {3: 15, 8: 40}}
    with pytest.raises(ValueError, match="no choice fits into 44 bytes; the smallest is 45"):
        mixed.allocate(costs, nbytes, 44)
    assert mixed.allocate(costs, nbytes, 45) == {"a": 3, "b": 3}
    with pytest.raises(ValueError, match="same layers and widths"):
        mixed.allocate(costs, {"a": nbytes["a"]}, 100)
    with pytest.raises(ValueError, match="costs must be finite"):
        mixed.allocate({"a": {3: math.nan, 8: 0.1}, "b": costs["b"]}, nbytes, 100)


# Packing


@given(st.integers(1, 8), st.lists(st.integers(0, 255), min_size=1, max_size=40))
def test_codes_of_any_width_survive_packing(bits, values):
    codes = (torch.tensor([values, values[::-1]]) % 2**bits).to(torch.uint8)
    packed = pack_bits(codes, bits)
    assert packed.shape == (2, math.ceil(len(values) * bits / 8))
    assert torch.equal(unpack_bits(packed, bits, len(values)), codes)
    number = sum(int(code) << (bits * i) for i, code in enumerate(codes[0].tolist()))
    assert bytes(packed[0].tolist()) == number.to_bytes(packed.shape[1], "little")


@pytest.mark.parametrize(("inputs", "group_size"), [(64, 64), (100, 64), (37, 16)])
@pytest.mark.parametrize("bits", range(2, 9))
def test_packed_bytes_are_those_of_the_buffers(inputs, group_size, bits):
    linear = torch.nn.Linear(inputs, 24)
    packed = PackedLinear(linear, bits, group_size)
    nbytes = sum(buffer.nbytes for buffer in packed.buffers())
    assert mixed.packed_nbytes(linear, bits, group_size) == nbytes
    x = torch.randn(3, inputs)
    torch.testing.assert_close(
        packed(x), torch.nn.functional.linear(x, packed.dequantized(), linear.bias)
    )
    weight = linear.weight.detach()
    step = float((weight.max() - weight.min()) / (2**bits - 1))
    assert float((packed.dequantized() - weight).abs().max()) <= 0.51 * step + 1e-3


def test_layers_of_several_widths_reach_the_file(tiny, tmp_path):
    model = copy.deepcopy(tiny[0])
    names = mixed.layer_names(model)
    floats = {name: model.get_submodule(name) for name in names}
    widths = {name: (3, 4, 8)[i % 3] for i, name in enumerate(names[:-1])}
    assert mixed.pack_layers(model, widths) is model
    assert isinstance(model.get_submodule(names[-1]), torch.nn.Linear)
    ledger = lk.byte_ledger(lk.save_weights(model, tmp_path / "mixed.safetensors"))
    expected = sum(mixed.packed_nbytes(floats[name], b, 64) for name, b in widths.items())
    assert ledger["quantized codes"] + ledger["scales"] + ledger["zero points"] == expected


def test_an_unknown_layer_is_named_and_nothing_changes(tiny):
    model = copy.deepcopy(tiny[0])
    name = mixed.layer_names(model)[0]
    with pytest.raises(ValueError, match=r"'model.layers.0.self_attn.qproj'; nearest: .*q_proj$"):
        mixed.pack_layers(model, {name: 4, "model.layers.0.self_attn.qproj": 4})
    with pytest.raises(ValueError, match="bits must be from 2 to 8, not 9"):
        mixed.pack_layers(model, {name: 4, mixed.layer_names(model)[1]: 9})
    assert not any(isinstance(module, PackedLinear) for module in model.modules())
