"""Tensors, layers and models in an ordinary PyTorch state: with a graph, frozen, narrow, BF16."""

import copy

import pytest
import torch
from families import SUPPORTED, family, token_ids
from torch import nn

import labkit as lk
from labkit import kernels, mixed, ptq, qat, quant
from labkit.decoder import Decoder
from labkit.int8 import Int8Linear, with_int8_linears
from labkit.kernels import PackedLinear

NARROW = (torch.bfloat16, torch.float16)


def linear(out: int = 8, inputs: int = 32, bias: bool = True) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(inputs, out, bias)


def grid_of(weight: torch.Tensor, symmetric: bool = False):
    return quant.group_qparams(weight, 16, 4, symmetric)


@torch.no_grad()
def logits(model, ids) -> torch.Tensor:
    return model(ids).logits


# Grids

GRIDS = {
    "with a graph": lambda w, s: grid_of(w, s),
    "trained": lambda w, s: tuple(nn.Parameter(part) for part in grid_of(w.detach(), s)),
    "not contiguous": lambda w, s: tuple(
        part.transpose(0, 1).contiguous().transpose(0, 1) for part in grid_of(w.detach(), s)
    ),
    "expanded": lambda w, s: tuple(
        part[:, :1].expand(-1, 2, 1) for part in quant.group_qparams(w.detach(), 32, 4, s)
    ),
    "FP16": lambda w, s: tuple(part.half() for part in grid_of(w.detach(), s)),
    "FP64": lambda w, s: tuple(part.double() for part in grid_of(w.detach(), s)),
    "of inference mode": lambda w, s: torch.inference_mode()(grid_of)(w, s),
}


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("kind", GRIDS)
def test_a_grid_may_be_any_tensor_and_stays_the_users(kind, symmetric):
    layer = linear()
    x = torch.randn(5, 32)
    grid = GRIDS[kind](layer.weight, symmetric)
    kept = [part.detach().clone().float() for part in grid]
    expected = [part.clone() for part in kept]
    packed = PackedLinear(layer, 4, 16, symmetric, grid)
    learning = qat.QATLinear(layer, 4, 16, symmetric, grid)
    codes = quant.quantize_groups(layer.weight.detach(), *expected, 16, 4, symmetric)
    rounded = quant.dequantize_groups(codes, *expected, 16)
    torch.testing.assert_close(packed.dequantized(), rounded)
    torch.testing.assert_close(learning.rounded(), rounded)
    assert all(tensor.is_contiguous() for tensor in packed.state_dict().values())
    assert not any(tensor.requires_grad for tensor in packed.buffers())
    optimizer = torch.optim.Adam(learning.parameters(), 0.01)
    for _ in range(3):
        loss = learning(x).square().mean() + packed(x).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert not torch.equal(learning.scale, expected[0])
    assert learning.scale.dtype == torch.float32
    assert all(
        torch.equal(part.detach().float(), old) for part, old in zip(grid, kept, strict=True)
    )
    torch.testing.assert_close(packed.dequantized(), rounded)


def other_grids(layer) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    scale, zero_point = grid_of(layer.weight)
    return {
        "a scale a row": (scale[:, 0, 0], zero_point),
        "other groups": quant.group_qparams(layer.weight.detach(), 8),
        "another layer's": grid_of(linear(out=7).weight),
        "another width": quant.group_qparams(layer.weight.detach(), 16, 8),
        "negative scales": (-scale, zero_point),
        "zero points between codes": (scale, zero_point + 0.5),
    }


@pytest.mark.parametrize("kind", other_grids(linear()))
@pytest.mark.parametrize("of", [PackedLinear, qat.QATLinear])
def test_a_grid_of_something_else_is_refused(kind, of):
    layer = linear()
    before = layer.weight.detach().clone()
    with pytest.raises(ValueError, match=r"(scale|zero_point) must"):
        of(layer, 4, 16, grid=other_grids(layer)[kind])
    assert torch.equal(layer.weight, before)


def test_prepare_takes_grids_that_carry_a_graph_and_they_learn():
    model, ids = family("qwen2"), token_ids(2)
    grids = [
        {name: grid_of(block.get_submodule(name).weight) for name in sum(ptq.LINEARS.values(), ())}
        for block in model.model.layers
    ]
    qat.prepare(model, 4, 16, grids=grids)
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    losses = qat.train(lambda step: model(ids, labels=ids).loss, optimizer, 3)
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("what", ["too few", "too many", "a name is missing", "a bad shape"])
def test_prepare_that_fails_leaves_every_layer_as_it_was(what):
    model = family("llama")
    good = [
        {name: grid_of(block.get_submodule(name).weight) for name in sum(ptq.LINEARS.values(), ())}
        for block in model.model.layers
    ]
    grids = {"too few": good[:2], "too many": [*good, good[0]]}.get(what, good)
    if what == "a name is missing":
        del good[2]["mlp.up_proj"]
    options = {"bits": 9} if what == "a bad shape" else {"bits": 4, "grids": grids}
    modules = list(model.modules())
    with pytest.raises(ValueError, match="bits must be" if "bad" in what else "grids must hold 3"):
        qat.prepare(model, group_size=16, **options)
    assert all(one is other for one, other in zip(model.modules(), modules, strict=True))
    block = model.model.layers[2]
    block.mlp.down_proj.weight.data[0, 0] = torch.nan  # the last layer of all
    for call in (lambda: qat.prepare(model, 4, 16), lambda: with_int8_linears(model)):
        with pytest.raises(ValueError, match="NaN"):
            call()
        assert all(one is other for one, other in zip(model.modules(), modules, strict=True))


def test_prepare_twice_is_refused_and_what_was_learned_stays():
    model, ids = family("llama"), token_ids(2)
    layers = qat.prepare(model, 4, 16)
    optimizer = torch.optim.Adam(qat.parameter_groups(model, 1e-3))
    qat.train(lambda step: model(ids, labels=ids).loss, optimizer, 2)
    learned = [layer.scale.clone() for layer in layers]
    with pytest.raises(TypeError, match="this LlamaForCausalLM is prepared already"):
        qat.prepare(model, 4, 16)
    found = [module for module in model.modules() if isinstance(module, qat.QATLinear)]
    assert found == layers
    assert all(
        torch.equal(layer.scale, scale) for layer, scale in zip(layers, learned, strict=True)
    )
    qat.convert(model)
    with pytest.raises(TypeError, match=r"q_proj must be a plain nn\.Linear, not PackedLinear"):
        qat.prepare(model, 4, 16)
    with pytest.raises(TypeError, match=r"q_proj must be a plain nn\.Linear, not PackedLinear"):
        mixed.pack_layers(model, {"model.layers.0.self_attn.q_proj": 4})


def test_learned_step_sizes_are_not_rounded_over():
    model = family("llama")
    qat.prepare(model, 4, 16)
    with pytest.raises(TypeError, match="not QATLinear"):
        mixed.pack_layers(model, {"model.layers.0.self_attn.q_proj": 4})
    with pytest.raises(TypeError, match="not QATLinear"):
        with_int8_linears(model)
    block, inputs = next(ptq.calibrate(model, token_ids(1)))  # to look is allowed
    with pytest.raises(TypeError, match="not QATLinear"):
        ptq.quantize_block(block, inputs, 16)


def test_a_block_that_cannot_be_rounded_is_left_as_it_was():
    model = family("llama")
    block, inputs = next(ptq.calibrate(model, token_ids(2)))
    before = copy.deepcopy(block.state_dict())
    block.mlp.down_proj.weight.data[3, 3] = torch.inf
    before["mlp.down_proj.weight"][3, 3] = torch.inf
    for methods in ({}, {"clipping": True}, {"compensation": True}):
        with pytest.raises(ValueError, match="NaN or infinite"):
            ptq.quantize_block(block, inputs, 16, **methods)
        assert all(torch.equal(tensor, before[n]) for n, tensor in block.state_dict().items())


# BF16 and FP16


@pytest.mark.parametrize("dtype", [*NARROW, torch.float64])
@pytest.mark.parametrize("bias", [True, False])
def test_layers_of_other_formats_compute_in_float32_and_keep_the_dtype(dtype, bias):
    layer = linear(bias=bias)
    wide = copy.deepcopy(layer.to(dtype)).float()
    x = torch.randn(3, 32).to(dtype)
    makers = {
        "packed": lambda layer: PackedLinear(layer, 4, 16),
        "QAT": lambda layer: qat.QATLinear(layer, 4, 16),
        "INT8": Int8Linear,
    }
    for name, make in makers.items():
        found, expected = make(layer)(x), make(wide)(x.float())
        assert found.dtype == dtype, name
        eps = max(torch.finfo(dtype).eps, 1e-6)
        torch.testing.assert_close(found.float(), expected, rtol=eps, atol=eps, msg=name)
        assert make(wide)(x).dtype == dtype  # a float32 layer that reads BF16, as under autocast
        later = make(copy.deepcopy(wide)).to(dtype)
        torch.testing.assert_close(later(x).float(), expected, rtol=0.02, atol=0.02, msg=name)


@pytest.mark.parametrize("dtype", NARROW)
def test_the_scales_of_a_packed_layer_stay_fp16(dtype):
    packed = PackedLinear(linear(), 8, 16)
    scale, weight = packed.scale.clone(), packed.dequantized()
    for move in (lambda m: m.to(dtype), lambda m: m.float(), lambda m: m.double()):
        move(packed)
        assert torch.equal(packed.scale, scale)
        assert packed.scale.dtype == torch.float16
        assert torch.equal(packed.dequantized(), weight)


@pytest.mark.parametrize("dtype", NARROW)
@pytest.mark.parametrize("kind", SUPPORTED)
def test_whole_models_of_other_formats_work(kind, dtype):
    ids = token_ids(2)
    model = family(kind, tie_word_embeddings=True).to(dtype)
    expected = logits(model, ids).float()

    def near(other, share=0.1):
        found = logits(other, ids)
        assert found.dtype == dtype
        assert 0 < (found.float() - expected).norm() < share * expected.norm()

    near(kernels.with_int8_head(copy.deepcopy(model)))
    near(with_int8_linears(copy.deepcopy(model), per_token=True))
    near(mixed.pack_layers(copy.deepcopy(model), dict.fromkeys(mixed.layer_names(model), 8), 16))
    later = kernels.with_int8_head(copy.deepcopy(model).float()).to(dtype)
    near(later)
    rounded = copy.deepcopy(model)
    for block, inputs in ptq.calibrate(rounded, ids):
        methods = {"scaling": True, "clipping": True, "compensation": True}
        grids = ptq.quantize_block(block, inputs, 16, 8, **methods)
        for name, grid in grids.items():
            packed = PackedLinear(block.get_submodule(name), 8, 16, grid=grid)
            off = packed.dequantized() - block.get_submodule(name).weight
            assert off.abs().max() <= torch.finfo(dtype).eps * packed.dequantized().abs().max()
            block.set_submodule(name, packed)
    near(rounded)
    information = mixed.fisher(model, ids)
    reference = mixed.fisher(copy.deepcopy(model).float(), ids)
    assert all(values.dtype == torch.float32 for values in information.values())
    assert sum(map(torch.sum, information.values())) == pytest.approx(
        float(sum(map(torch.sum, reference.values()))), rel=0.5
    )
    learning = copy.deepcopy(model)
    layers = qat.prepare(learning, 8, 16)
    near(learning)
    assert all(layer.weight.dtype == torch.float32 for layer in layers)
    optimizer = torch.optim.Adam([layer.weight for layer in layers], 1e-4)
    losses = qat.train(lambda step: learning(ids, labels=ids).loss, optimizer, 4)
    assert losses[-1] < losses[0]
    simulated = logits(learning, ids).float()
    qat.convert(learning)
    assert (logits(learning, ids).float() - simulated).norm() < 0.01 * simulated.norm()
    with pytest.raises(TypeError, match=r"must be float32, not torch\.(bfloat16|float16); call"):
        Decoder(model)


# Heads


@pytest.mark.parametrize("kind", ["gemma3_text", "gemma4_unified_text"])
def test_an_embedding_that_scales_what_it_reads_is_refused(kind):
    model = family(kind, tie_word_embeddings=True)
    before = list(model.modules())
    with pytest.raises(
        TypeError, match=r"embedding of \w+ must be an nn\.Embedding, not \w+Scaled"
    ):
        kernels.with_int8_head(model)
    assert all(one is other for one, other in zip(model.modules(), before, strict=True))


def test_a_head_that_is_packed_or_not_tied_is_refused():
    model = kernels.with_int8_head(family("qwen2", tie_word_embeddings=True))
    with pytest.raises(TypeError, match=r"head of Qwen2ForCausalLM must .*, not PackedLinear"):
        kernels.with_int8_head(model)
    with pytest.raises(ValueError, match="must be one tensor, tied, not two"):
        kernels.with_int8_head(family("qwen2", tie_word_embeddings=False))


# Frozen, packed, in training, in inference mode


def test_the_fisher_information_of_a_frozen_model_is_that_of_a_free_one():
    model, ids = family("qwen3", attention_dropout=0.3), token_ids(2)
    expected = mixed.fisher(model, ids)
    model.requires_grad_(False).train()
    model.model.layers[1].mlp.up_proj.weight.requires_grad_()
    model.model.layers[0].eval()
    flags = [(p.requires_grad, p.grad) for p in model.parameters()]
    modes = [module.training for module in model.modules()]
    for context in (torch.enable_grad, torch.no_grad, torch.inference_mode):
        with context():
            found = mixed.fisher(model, token_ids(2))
        assert all(torch.equal(found[name], values) for name, values in expected.items())
        assert [(p.requires_grad, p.grad) for p in model.parameters()] == flags
        assert [module.training for module in model.modules()] == modes


def test_the_fisher_information_of_a_packed_model_is_refused():
    model = family("llama")
    mixed.pack_layers(model, {"model.layers.1.mlp.up_proj": 4}, 16)
    name = r"LlamaForCausalLM: model\.layers\.1\.mlp\.up_proj must be .*, not PackedLinear"
    with pytest.raises(TypeError, match=name):
        mixed.fisher(model, token_ids(1))
    with pytest.raises(TypeError, match=name):
        mixed.rounding_costs(model, {"model.layers.1.mlp.up_proj": torch.ones(48, 32)})


def test_new_layers_are_in_the_mode_of_the_old_ones_and_frozen_biases_stay_frozen():
    for training in (True, False):
        layer = linear().train(training)
        layer.bias.requires_grad_(False)
        for new in (PackedLinear(layer, 4, 16), qat.QATLinear(layer, 4, 16)):
            assert new.training == training
            assert not new.bias.requires_grad


def test_weights_that_inference_mode_made_can_be_trained():
    with torch.inference_mode():
        layer = linear()
    learning = qat.QATLinear(layer, 4, 16)
    learning(torch.randn(3, 32)).square().sum().backward()
    assert learning.weight.grad.abs().sum() > 0
    packed = PackedLinear(layer, 4, 16)
    assert not any(tensor.is_inference() for tensor in packed.state_dict().values())


def test_a_checkpoint_holds_weights_that_are_views(tmp_path):
    layer = linear()
    layer.weight = nn.Parameter(torch.randn(32, 8).T)
    learning = qat.QATLinear(layer, 4, 16)
    path, x = tmp_path / "run.safetensors", torch.randn(3, 32)
    for n_steps in (2, 2):
        optimizer = torch.optim.Adam(learning.parameters(), 0.01)
        qat.train(lambda step: learning(x).square().mean(), optimizer, n_steps, path)
    assert path.exists()


def test_a_reference_is_made_without_dropout(model, tiny):
    expected = lk.reference(model, tiny[1], 2, 32)
    for module in model.train().modules():
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.5
    found = lk.reference(model, tiny[1], 2, 32)
    assert model.training
    assert all(torch.equal(found.answers[name], expected.answers[name]) for name in expected.ids)


def test_a_decoder_reads_prompts_without_dropout():
    model = family("mistral", attention_dropout=0.5)
    expected = Decoder(model).prefill(range(3, 15))
    assert (Decoder(model.train()).prefill(range(3, 15)) == expected).all()
    assert model.training
