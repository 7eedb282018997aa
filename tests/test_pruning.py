"""Chapter 7: what it teaches, against brute force, masked models and torch; its records."""

import copy
import json
from functools import partial

import pytest
import torch
from notebook_rules import ROOT, taught
from safetensors.torch import load_file
from scipy.sparse import csr_array
from torch import nn

import labkit as lk
from labkit import kernels, qat, quant
from labkit.ptq import LINEARS, calibrate

CHAPTER = "07_pruning_distillation"
SPARSE_GPT = ("keep_largest", "keep_in_layers", "inverse_root", "rounder", "settle", "sparse_gpt")
HEAL = ("soft_loss", "through", "logits_of", "distance", "heal")
RECORDS = ROOT / "notebooks" / "records"


def functions(*names, **known) -> dict:
    """Return a namespace with functions that the chapter teaches."""
    space = {"torch": torch, "nn": nn, "copy": copy, "qat": qat, "LINEARS": LINEARS}
    space |= {name: getattr(quant, name) for name in ("pack_bits", "group_qparams")}
    space |= {"calibrate": calibrate, "PackedLinear": kernels.PackedLinear, "partial": partial}
    space |= known
    for name in names:
        exec(taught(CHAPTER, name), space)
    return space


def problem(inputs: int, rows: int = 5, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Return a weight, and the Hessian of inputs that depend on each other."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(4 * inputs, inputs, generator=generator)
    x = x @ torch.randn(inputs, inputs, generator=generator)
    return torch.randn(rows, inputs, generator=generator), x.T @ x / len(x)


# SparseGPT


def brain_surgeon(weight, hessian, sparsity, round_input=lambda column, j: column, damping=0.01):
    """Prune input by input with an inverse that loses a row and a column each time, in float64.

    The scores of 64 inputs are taken together, and the others wait for their errors.
    """
    weight, hessian = weight.double().clone(), hessian.double()
    inverse = (hessian + damping * hessian.diagonal().mean() * torch.eye(len(hessian))).inverse()
    for first in range(0, len(hessian), 64):
        block = range(first, min(first + 64, len(hessian)))
        ahead, scores = inverse.clone(), []
        for j in block:
            scores.append(weight[:, j].square() / ahead[j, j])
            ahead = ahead - torch.outer(ahead[:, j], ahead[j]) / ahead[j, j]
        scores = torch.stack(scores, 1)
        kept = scores > scores.flatten().sort().values[int(sparsity * scores.numel()) - 1]
        for i, j in enumerate(block):
            new = round_input(weight[:, j], j) * kept[:, i]
            error = (weight[:, j] - new) / inverse[j, j]
            weight[:, j + 1 :] -= torch.outer(error, inverse[j, j + 1 :])
            weight[:, j] = new
            inverse = inverse - torch.outer(inverse[:, j], inverse[j]) / inverse[j, j]
            inverse[j, j] = 1  # done: its row and column are zero now
    return weight


@pytest.mark.parametrize("inputs", [12, 64, 160])
@pytest.mark.parametrize("sparsity", [0.25, 0.5, 0.75])
def test_sparsegpt_is_the_brain_surgeon_in_order(inputs, sparsity):
    space = functions(*SPARSE_GPT)
    weight, hessian = problem(inputs)
    expected = brain_surgeon(weight, hessian, sparsity)
    found = space["sparse_gpt"](weight, hessian, sparsity)
    torch.testing.assert_close(found.double(), expected, rtol=1e-3, atol=1e-3)
    assert torch.equal(found == 0, expected == 0)


def test_sparsegpt_rounds_in_the_same_pass():
    space = functions(*SPARSE_GPT)
    weight, hessian = problem(128)
    scale, zero_point = grid = quant.group_qparams(weight, 64)

    def round_input(column, j):
        s, z = scale[:, j // 64, 0].double(), zero_point[:, j // 64, 0]
        return (((column / s).round() + z).clamp(0, 15) - z) * s

    expected = brain_surgeon(weight, hessian, 0.5, round_input)
    found = space["sparse_gpt"](weight, hessian, 0.5, grid, 4)
    torch.testing.assert_close(found.double(), expected, rtol=1e-3, atol=1e-3)
    on_grid = quant.quantize_groups(found, *grid, 64)
    assert torch.equal(quant.dequantize_groups(on_grid, *grid, 64), found)


def test_without_pruning_it_is_gptq_in_the_same_order():
    """An input of falling power keeps GPTQ's order, so that both do the same."""
    space = functions(*SPARSE_GPT)
    weight, hessian = problem(64)
    order = hessian.diagonal().argsort(descending=True)
    weight, hessian = weight[:, order].contiguous(), hessian[order][:, order].contiguous()
    grid = quant.group_qparams(weight, 64)
    codes = quant.gptq(weight, hessian, *grid, 64)
    found = space["sparse_gpt"](weight, hessian, 0, grid, 4)
    torch.testing.assert_close(found, quant.dequantize_groups(codes, *grid, 64))


def test_sparsegpt_survives_an_input_that_never_fires():
    space = functions(*SPARSE_GPT)
    weight, hessian = problem(16)
    hessian[3], hessian[:, 3] = 0, 0
    found = space["sparse_gpt"](weight, hessian, 0.5)
    assert torch.isfinite(found).all()
    assert int((found == 0).sum()) == weight.numel() // 2


@pytest.mark.parametrize("bits", [16, 4])
def test_layers_in_one_loop_are_pruned_as_each_alone(bits):
    space = functions(*SPARSE_GPT)
    weights = [problem(128, rows, seed)[0] for seed, rows in enumerate((4, 7, 2))]
    hessian, stacked = problem(128)[1], torch.cat(weights)
    grids = [quant.group_qparams(w, 64, bits) if bits < 16 else None for w in (*weights, stacked)]
    found = space["sparse_gpt"](stacked, hessian, 0.5, grids.pop(), bits, [4, 7, 2])
    for weight, grid, part in zip(weights, grids, found.split([4, 7, 2]), strict=True):
        alone = space["sparse_gpt"](weight, hessian, 0.5, grid, bits)
        torch.testing.assert_close(part, alone)
        assert torch.equal(part == 0, alone == 0)


def test_all_layers_are_pruned_in_place_onto_the_grids_that_come_back(model, ids):
    space = functions(*SPARSE_GPT, "prune_together", "prune_all")
    statistics = [inputs for _, inputs in calibrate(model, ids, propagate=False)]
    net = copy.deepcopy(model)
    grids = space["prune_all"](net, statistics, space["sparse_gpt"], 0.5, 4)
    assert len(grids) == 7 * len(net.model.layers)
    for name, grid in grids.items():
        weight, block = net.get_submodule(name).weight, int(name.split(".")[2])
        codes = quant.quantize_groups(weight, *grid, 64)
        assert torch.equal(quant.dequantize_groups(codes, *grid, 64), weight)
        kind = next(kind for kind, layers in LINEARS.items() if name.endswith(layers))
        hessian, old = statistics[block][kind].hessian, model.get_submodule(name).weight
        alone = space["sparse_gpt"](old, hessian, 0.5, grid, 4)
        torch.testing.assert_close(weight, alone)


def test_wanda_keeps_the_largest_of_each_row():
    wanda = functions("keep_largest", "wanda")["wanda"]
    weight, hessian = problem(16)
    score = weight.abs() * hessian.diagonal().sqrt()
    rank = score.argsort(1).argsort(1)  # 0: the smallest of its row
    assert torch.equal(wanda(weight, hessian, 0.25), weight * (rank >= 4))


def test_two_of_four_keeps_the_two_largest():
    two_of_four = functions("keep_largest", "two_of_four")["two_of_four"]
    score = torch.tensor([[4.0, 1, 3, 2, -1, -4, -3, -2]])
    assert two_of_four(score).tolist() == [[True, False, True, False, True, False, False, True]]


def test_sparsegpt_in_the_pattern():
    space = functions(*SPARSE_GPT, "two_of_four")
    weight, hessian = problem(128)
    found = space["sparse_gpt"](weight, hessian, 0.5, choose=space["two_of_four"])
    assert ((found.unflatten(1, (-1, 4)) == 0).sum(-1) == 2).all()


def test_what_stays_makes_good_for_what_goes():
    space = functions(*SPARSE_GPT)
    weight, hessian = problem(64)
    found = space["sparse_gpt"](weight, hessian, 0.5)
    errors = [new - weight for new in (found, weight * (found != 0))]
    repaired, dropped = (((e @ hessian) * e).sum() for e in errors)
    assert repaired < 0.8 * dropped


# Sparse files


@pytest.mark.parametrize("bits", [3, 4, 8])
def test_a_bitmap_and_csr_give_the_codes_back(bits):
    sparse_tensors = functions("sparse_tensors")["sparse_tensors"]
    generator = torch.Generator().manual_seed(bits)
    codes = torch.randint(0, 2**bits, (6, 21), generator=generator, dtype=torch.uint8)
    kept = torch.rand(6, 21, generator=generator) < 0.4
    n_kept = int(kept.sum())
    parts = sparse_tensors(codes, kept, bits, "bitmap")
    mask = quant.unpack_bits(parts["map"], 1, 21).bool()
    assert torch.equal(mask, kept)
    again = torch.zeros_like(codes)
    again[mask] = quant.unpack_bits(parts["values"], bits, n_kept)[0]
    assert torch.equal(again, codes * kept)
    assert parts["values"].numel() == -(-n_kept * bits // 8)
    parts = sparse_tensors(codes, kept, bits, "csr")
    values = quant.unpack_bits(parts["values"], bits, n_kept)[0]
    rows = csr_array((values, parts["columns"], parts["pointers"]), shape=(6, 21))
    assert (rows.toarray() == (codes * kept).numpy()).all()


# Structure


def test_thinner_mlps_compute_what_masked_ones_do(model, ids):
    space = functions("thinner", "with_fewer_channels")
    statistics = [inputs for _, inputs in calibrate(model, ids[:4], propagate=False)]
    small = space["with_fewer_channels"](copy.deepcopy(model), 320, statistics)
    assert small.model.layers[0].mlp.down_proj.weight.shape == (192, 320)
    for inputs, old, new in zip(statistics, model.model.layers, small.model.layers, strict=True):
        gone = ~(old.mlp.gate_proj.weight[:, None] == new.mlp.gate_proj.weight).all(2).any(1)
        assert int(gone.sum()) == 512 - 320
        power = inputs["down"].hessian.diagonal()
        strength = power * old.mlp.down_proj.weight.detach().square().sum(0)
        assert strength[gone].max() <= strength[~gone].min()
        old.mlp.down_proj.weight.data[:, gone] = 0
    with torch.no_grad():
        torch.testing.assert_close(small(ids).logits, model(ids).logits, rtol=1e-4, atol=1e-4)


def test_fewer_heads_compute_what_masked_ones_do():
    config = copy.deepcopy(lk.load_model("tiny", device="cpu")[0].config)
    config.update({"num_attention_heads": 6, "num_key_value_heads": 3, "head_dim": 32})
    torch.manual_seed(0)
    model = type(lk.load_model("tiny", device="cpu")[0])(config).eval()
    ids = torch.arange(64).view(2, 32)
    space = functions("thinner", "strongest_heads", "with_fewer_heads")
    statistics = [inputs for _, inputs in calibrate(model, ids, propagate=False)]
    small = space["with_fewer_heads"](copy.deepcopy(model), 2, statistics)
    for old, new in zip(model.model.layers, small.model.layers, strict=True):
        columns = old.self_attn.o_proj.weight.T[:, None] == new.self_attn.o_proj.weight.T
        gone = ~columns.all(2).any(1)
        assert int(gone.sum()) == 64  # two query heads of 32
        old.self_attn.o_proj.weight.data[:, gone] = 0
    with torch.no_grad():
        torch.testing.assert_close(small(ids).logits, model(ids).logits, rtol=1e-4, atol=1e-4)


def test_without_layers_still_writes(tiny, model):
    small = functions("without_layers")["without_layers"](model, {1, 2})
    assert len(small.model.layers) == small.config.num_hidden_layers == 2
    prompt = torch.tensor([[5, 6, 7]])
    text = small.generate(prompt, max_new_tokens=4, do_sample=False, pad_token_id=0)
    with torch.no_grad():
        slowly = prompt
        for _ in range(4):
            slowly = torch.cat([slowly, small(slowly).logits[:, -1:].argmax(-1)], 1)
    assert torch.equal(text, slowly)


# Distillation


@pytest.mark.parametrize("temperature", [1.0, 2.0, 5.0])
def test_the_soft_loss_is_the_divergence_of_torch(temperature):
    soft_loss = functions("soft_loss")["soft_loss"]
    torch.manual_seed(0)
    student, teacher = (10 * torch.randn(7, 11, dtype=torch.float64) for _ in "ab")
    q, p = (torch.distributions.Categorical(logits=x / temperature) for x in (student, teacher))
    expected = temperature**2 * torch.distributions.kl_divergence(p, q).mean()
    torch.testing.assert_close(soft_loss(student, teacher, temperature), expected)
    student.requires_grad_()
    assert torch.autograd.gradcheck(lambda s: soft_loss(s, teacher, temperature), student)


@pytest.mark.parametrize("goal", ["states", "answers", "labels"])
def test_healing_trains_the_blocks_around_the_gap_alone(model, ids, goal):
    space = functions("without_layers", *HEAL, model=model)
    student = space["without_layers"](copy.deepcopy(model), {2})
    before = {name: p.clone() for name, p in student.named_parameters()}
    losses = space["heal"](student, [ids] * 12, 1, 3, goal)
    assert losses[-1] < losses[0]
    for name, parameter in student.named_parameters():
        learned = name.startswith(("model.layers.1.", "model.layers.2."))
        assert torch.equal(parameter, before[name]) != learned, name


@pytest.mark.parametrize("goal", ["states", "answers"])
def test_a_student_that_lacks_nothing_has_nothing_to_learn(model, ids, goal):
    space = functions(*HEAL, model=model)
    losses = space["heal"](copy.deepcopy(model), [ids], 1, 3, goal)
    assert abs(losses[0]) < 1e-6


# The tied pair


def test_the_packed_pair_reads_one_tensor(tiny, model, tmp_path):
    packed = kernels.with_int8_head(model)
    ids = torch.tensor([[0, 7, 2047], [3, 3, 5]])
    expected = packed.lm_head.dequantized()[ids]
    torch.testing.assert_close(packed.model.embed_tokens(ids), expected)
    step = float((tiny[0].lm_head.weight[ids] - expected).detach().abs().max())
    assert step < 0.01 * float(tiny[0].lm_head.weight.detach().abs().max())
    stored = load_file(lk.save_weights(packed, tmp_path / "packed"))
    assert sum(tensor.numel() == 2048 * 192 for tensor in stored.values()) == 1


def test_an_untied_pair_is_refused(model):
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())
    with pytest.raises(ValueError, match="one tensor"):
        kernels.with_int8_head(model)


# Records


def test_the_records_hold_what_the_chapter_reads():
    tasks = [json.loads(line)["task"] for line in (RECORDS / "07_pruned.jsonl").open()]
    keys = {(t["method"], t["sparsity"], t["bits"]) for t in tasks}
    expected = {("SparseGPT", s, b) for s in (0, 0.25, 0.5, 0.6, 0.7) for b in (16, 8, 4, 3)}
    others = ("magnitude", "Wanda", "2:4 magnitude", "2:4 Wanda", "2:4 SparseGPT")
    expected |= {(method, 0.5, 16) for method in others}
    assert keys == expected | {("prune first", 0.5, 4), ("round first", 0.5, 4)}
    assert len(tasks) == len(keys)
    for name in ("07_pruned", "07_healed"):
        for record in map(json.loads, (RECORDS / f"{name}.jsonl").open()):
            assert len(record["window_nats"]) == 24
            assert record["where"]
