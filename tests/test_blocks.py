"""Models that are almost Llama: what they are is right, or refused by name before it is changed."""

import copy

import pytest
import torch
from families import LLAMA_TYPE, NO_SDPA, OTHERS, SUPPORTED, WINDOW, family, token_ids
from torch import nn
from torch.nn.utils import prune

from labkit import blocks, kernels, mixed, ptq, qat
from labkit.int8 import with_int8_linears

METHODS = [{}, {"scaling": True}, {"clipping": True}, {"compensation": True}]
METHODS += [{"scaling": True, "clipping": True, "compensation": True, "shrink": 0.3}]


@torch.no_grad()
def logits(model, ids) -> torch.Tensor:
    return model(ids).logits


def state(model) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_unchanged(model, before: dict[str, torch.Tensor], kinds: list[type]) -> None:
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(tensor, before[name]) for name, tensor in after.items())
    assert [type(module) for module in model.modules()] == kinds
    assert not any("forward" in vars(module) for module in model.modules())
    assert not any(module._forward_pre_hooks for module in model.modules())


@torch.no_grad()
def entering(model, ids) -> dict[tuple[int, str], torch.Tensor]:
    """Return what enters each linear layer in `model(ids)`, float64 `(tokens, in)`."""
    seen, hooks = {}, []
    for number, block in enumerate(model.model.layers):
        for name in blocks.LAYERS:
            hook = block.get_submodule(name).register_forward_pre_hook(
                lambda _, x, key=(number, name): seen.update({key: x[0].flatten(0, -2).double()})
            )
            hooks.append(hook)
    model(ids)
    for hook in hooks:
        hook.remove()
    return seen


def variants(kind: str):
    for options in ({}, WINDOW):
        for attention in ("eager", *(("sdpa",) if kind not in NO_SDPA else ())):
            yield family(kind, attn_implementation=attention, **options)


# Calibration


@pytest.mark.parametrize("kind", LLAMA_TYPE)
def test_calibration_sees_what_the_model_sees(kind):
    ids = token_ids()
    for model in variants(kind):
        before, kinds = state(model), [type(module) for module in model.modules()]
        expected = entering(model, ids)
        propagate = model.config._attn_implementation == "sdpa"
        passes = ptq.calibrate(model, ids, batch_size=2, propagate=propagate)
        for number, (_, inputs) in enumerate(passes):
            for name, layers in blocks.LINEARS.items():
                for layer in layers:
                    x = expected[number, layer]
                    hessian = (x.T @ x / len(x)).float()
                    error = (inputs[name].hessian - hessian).norm() / hessian.norm()
                    assert error < 1e-5, (kind, number, layer)
        assert_unchanged(model, before, kinds)


def test_a_window_and_a_mask_matter_to_these_models():
    """Else the test above could not fail."""
    ids = token_ids()
    wide, narrow = (entering(family("mistral", **options), ids) for options in ({}, WINDOW))
    change = wide[2, "mlp.gate_proj"] - narrow[2, "mlp.gate_proj"]
    assert change.norm() > 0.02 * wide[2, "mlp.gate_proj"].norm()


@pytest.mark.parametrize("kind", ["llama", "qwen3"])
def test_a_model_in_training_is_calibrated_without_dropout_and_goes_on_training(kind):
    model, ids = family(kind, attention_dropout=0.5), token_ids()
    expected = next(ptq.calibrate(model, ids))[1]["output"].hessian
    model.train()
    model.model.layers[1].eval()
    modes = [module.training for module in model.modules()]
    passes = ptq.calibrate(model, ids)
    _, inputs = next(passes)
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(inputs["output"].hessian, expected)
    list(passes)
    assert [module.training for module in model.modules()] == modes


class Between(nn.Module):
    """A base model that does something between its blocks, or tells them about the text."""

    def __init__(self, base, what):
        super().__init__()
        self.embed_tokens, self.layers, self.norm = base.embed_tokens, base.layers, base.norm
        self.rotary_emb, self.what = base.rotary_emb, what

    def forward(self, ids, use_cache=False):
        hidden = self.embed_tokens(ids)
        options = {"position_embeddings": self.rotary_emb(hidden, torch.arange(ids.shape[1])[None])}
        if self.what == "text":
            options["ids"] = ids
        for number, block in enumerate(self.layers):
            if self.what != "skip" or number != 1:
                hidden = block(hidden, **options)
            if self.what == "double":
                hidden = 2 * hidden
            if self.what == "twice" and number == 1:
                hidden = block(hidden, **options)
        return self.norm(hidden)


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("double", "does more than to run its blocks one after the other"),
        ("twice", r"model\.layers\.1\.self_attn\.q_proj does not read, once"),
        ("skip", r"model\.layers\.1\.self_attn\.q_proj does not read, once"),
        ("text", "gives its blocks what depends on the text"),
    ],
)
def test_a_model_that_cannot_be_run_by_blocks_is_refused(what, message):
    model = family("llama")
    model.model = Between(model.model, what)
    before, kinds = state(model), [type(module) for module in model.modules()]
    with pytest.raises(TypeError, match=f"model: LlamaForCausalLM .*{message}"):
        next(ptq.calibrate(model, token_ids(), batch_size=2))
    assert_unchanged(model, before, kinds)


def test_layers_of_one_entry_that_read_different_inputs_are_refused():
    model = family("llama")
    attention = model.model.layers[2].self_attn

    class Doubled(nn.Module):
        def __init__(self, attention):
            super().__init__()
            self.q_proj, self.k_proj = attention.q_proj, attention.k_proj
            self.v_proj, self.o_proj = attention.v_proj, attention.o_proj

        def forward(self, hidden_states, **_):
            mixed = self.q_proj(hidden_states) + self.k_proj(hidden_states).repeat(1, 1, 2)
            return self.o_proj(mixed + self.v_proj(2 * hidden_states).repeat(1, 1, 2)), None

    model.model.layers[2].self_attn = Doubled(attention)
    with pytest.raises(TypeError, match=r"layers\.2\.self_attn\.v_proj does not read, once, what"):
        next(ptq.calibrate(model, token_ids()))


# Rescaling


@pytest.mark.parametrize("kind", LLAMA_TYPE)
@pytest.mark.parametrize("name", blocks.PRODUCERS)
def test_rescaling_changes_no_logit_or_is_refused_before_anything_is_changed(kind, name):
    model, ids = family(kind), token_ids(2)
    expected, before = logits(model, ids), state(model)
    kinds = [type(module) for module in model.modules()]
    block, layer = model.model.layers[1], blocks.LINEARS[name][0]
    size = block.get_submodule(layer).in_features
    factor = torch.rand(size, generator=torch.Generator().manual_seed(3)) * 4 + 0.2
    if name in LLAMA_TYPE[kind]:
        ptq.rescale_input(block, name, factor)
        torch.testing.assert_close(logits(model, ids), expected, rtol=0, atol=1e-4)
        old = before[f"model.layers.1.{layer}.weight"]
        assert torch.equal(block.get_submodule(layer).weight, old * factor)
    else:
        with pytest.raises(TypeError, match=type(block).__name__):
            ptq.rescale_input(block, name, factor)
        assert_unchanged(model, before, kinds)


@pytest.mark.parametrize("kind", LLAMA_TYPE)
def test_awq_is_right_for_the_whole_block_or_refused_before_it(kind):
    model, ids = family(kind), token_ids()
    block, inputs = next(ptq.calibrate(model, ids))
    before, kinds = state(model), [type(module) for module in model.modules()]
    if len(LLAMA_TYPE[kind]) == 3:
        assert ptq.quantize_block(block, inputs, 16, 8, scaling=True).keys() == set(blocks.LAYERS)
        change = logits(model, ids) - logits(family(kind), ids)
        assert 0 < change.norm() < 0.1 * logits(model, ids).norm()
    else:
        with pytest.raises(TypeError, match=type(block).__name__):
            ptq.quantize_block(block, inputs, 16, 4, scaling=True)
        assert_unchanged(model, before, kinds)


def stablelm_in_parallel() -> nn.Module:
    return family("stablelm", use_parallel_residual=True).model.layers[0]


def with_qat(block: nn.Module) -> nn.Module:
    block.self_attn.k_proj = qat.QATLinear(block.self_attn.k_proj, 4, 16)
    return block


def pruned(block: nn.Module) -> nn.Module:
    prune.l1_unstructured(block.self_attn.k_proj, "weight", 0.5)
    return block


def parametrized(block: nn.Module) -> nn.Module:
    nn.utils.parametrizations.weight_norm(block.self_attn.k_proj)
    return block


def tied(block: nn.Module) -> nn.Module:
    block.self_attn.v_proj.weight = block.self_attn.k_proj.weight
    return block


def one_norm(block: nn.Module) -> nn.Module:
    block.post_attention_layernorm.weight = block.input_layernorm.weight
    return block


def gated(block: nn.Module) -> nn.Module:
    """The same norm feeds a gate as well."""

    class Gated(type(block)):
        def forward(self, hidden_states, **options):
            gate = self.gate(self.input_layernorm(hidden_states)).sigmoid()
            return super().forward(hidden_states, **options) * gate

    block.__class__ = Gated
    block.gate = nn.Linear(32, 32)
    return block


@pytest.mark.parametrize(
    ("block", "message"),
    [
        (stablelm_in_parallel, "input_layernorm cannot be divided .* what enters mlp.gate_proj"),
        (lambda: with_qat(family("llama").model.layers[0]), "k_proj must be .* not QATLinear"),
        (lambda: pruned(family("llama").model.layers[0]), "k_proj computes its weight"),
        (lambda: parametrized(family("llama").model.layers[0]), "k_proj must be a plain nn.Linear"),
        (lambda: tied(family("llama").model.layers[0]), "two layers share a weight"),
        (lambda: one_norm(family("llama").model.layers[0]), "two layers share a weight"),
        (lambda: gated(family("llama").model.layers[0]), "what enters output"),
        (lambda: family("gpt2").transformer.h[0], "GPT2Block has no layer self_attn.q_proj"),
        (lambda: family("phi3").model.layers[0], "Phi3DecoderLayer has no layer self_attn.q_proj"),
    ],
)
def test_a_block_that_would_compute_something_else_is_named(block, message):
    block = block()
    before = state(block)
    with pytest.raises(TypeError, match=message):
        ptq.rescale_input(block, "attention", torch.full((32,), 2.0))
    assert all(torch.equal(tensor, before[name]) for name, tensor in block.state_dict().items())


def test_trying_a_rescaling_runs_no_hook_of_the_model_and_draws_no_random_number():
    block, calls = family("qwen2").model.layers[0], []
    for module in block.modules():
        module.register_forward_hook(lambda *_: calls.append(1))
        module.register_forward_pre_hook(lambda *_: calls.append(1))
    before = torch.random.get_rng_state()
    ptq.rescale_input(block, "attention", torch.full((32,), 3.0))
    assert not calls
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("kind", ["llama", "qwen3", "stablelm", "gemma"])
def test_other_float_formats_are_told_apart_as_well(kind, dtype):
    model = family(kind).to(dtype)
    for name in blocks.PRODUCERS:
        block = model.model.layers[0]
        factor = torch.full((block.get_submodule(blocks.LINEARS[name][0]).in_features,), 2.0)
        if name in LLAMA_TYPE[kind]:
            expected = logits(model, token_ids(1))
            ptq.rescale_input(block, name, factor)
            assert torch.equal(logits(model, token_ids(1)), expected)  # a factor of 2 is exact
        else:
            with pytest.raises(TypeError, match="cannot be divided"):
                ptq.rescale_input(block, name, factor)


# What is not of Llama type


def calls_on(model, ids, other):
    """Every function that takes a model or a block, by name."""
    _, inputs = next(ptq.calibrate(other, ids))
    block = next(m for n, m in model.named_modules() if n.endswith((".h.0", ".layers.0")))
    name = "model.layers.0.self_attn.q_proj"
    return {
        "calibrate": lambda: next(ptq.calibrate(model, ids)),
        "quantize_block": lambda: ptq.quantize_block(block, inputs, 16),
        "AWQ": lambda: ptq.quantize_block(block, inputs, 16, scaling=True),
        "prepare": lambda: qat.prepare(model, 4, 16),
        "with_int8_head": lambda: kernels.with_int8_head(model),
        "with_int8_linears": lambda: with_int8_linears(model),
        "layer_names": lambda: mixed.layer_names(model),
        "fisher": lambda: mixed.fisher(model, ids[:1]),
        "rounding_costs": lambda: mixed.rounding_costs(model, {f"{name}s": torch.ones(32, 32)}),
        "pack_layers": lambda: mixed.pack_layers(model, {f"{name}s": 4}),
    }


@pytest.mark.parametrize("kind", OTHERS)
def test_other_models_get_one_type_error_that_names_them(kind):
    model, ids = family(kind), token_ids()
    before, kinds = state(model), [type(module) for module in model.modules()]
    for name, call in calls_on(model, ids, family("llama")).items():
        with pytest.raises(TypeError) as caught:
            call()
        message = str(caught.value)
        if name in ("quantize_block", "AWQ"):
            assert "Block is not" in message or "Layer is not of Llama type" in message, message
        else:
            assert type(model).__name__ in message
        if name in ("calibrate", "prepare", "fisher", "layer_names"):
            assert OTHERS[kind] in message
        assert_unchanged(model, before, kinds)


def test_a_layer_of_another_kind_is_named():
    model = family("gpt2")
    for call in (
        lambda: mixed.pack_layers(model, {"transformer.h.0.attn.c_attn": 4}),
        lambda: mixed.rounding_costs(model, {"transformer.h.0.attn.c_attn": torch.ones(32, 96)}),
    ):
        with pytest.raises(TypeError, match=r"GPT2LMHeadModel: .*c_attn must be .*, not Conv1D"):
            call()
    layer = model.transformer.h[0].attn.c_proj  # square: its axes could be taken for one another
    for wrap in (
        lambda: kernels.PackedLinear(layer, 4, 16),
        lambda: qat.QATLinear(layer, 4, 16),
        lambda: mixed.packed_nbytes(layer, 4, 16),
    ):
        with pytest.raises(TypeError, match=r"linear must be .*nn\.Linear, not Conv1D"):
            wrap()


# Families that are supported throughout


@pytest.mark.parametrize("options", [{}, WINDOW | {"tie_word_embeddings": True, "head_dim": 12}])
@pytest.mark.parametrize("kind", SUPPORTED)
def test_every_method_and_its_packed_layers(kind, options):
    ids = token_ids()
    original = family(kind, **options)
    before = logits(original, ids)
    for methods in METHODS:
        model = copy.deepcopy(original)
        for block, inputs in ptq.calibrate(model, ids, batch_size=2):
            grids = ptq.quantize_block(block, inputs, 16, 8, **methods)
            simulated = copy.deepcopy(block)
            for name, grid in grids.items():
                linear = block.get_submodule(name)
                packed = kernels.PackedLinear(linear, 8, 16, grid=grid)
                assert torch.equal(packed.dequantized(), simulated.get_submodule(name).weight)
                assert (packed.bias is None) == (linear.bias is None)
                block.set_submodule(name, packed)
        change = logits(model, ids) - before
        assert 0 < change.norm() < 0.1 * before.norm(), methods
    if options.get("tie_word_embeddings"):
        kernels.with_int8_head(model)
        assert (logits(model, ids) - before).norm() < 0.1 * before.norm()


@pytest.mark.parametrize("kind", SUPPORTED)
def test_other_functions_of_the_families(kind):
    model, ids = family(kind, attention_bias=True), token_ids()
    before = logits(model, ids)
    names = mixed.layer_names(model)
    information = mixed.fisher(model, ids[:2])
    assert all(information[name].shape == model.get_submodule(name).weight.shape for name in names)
    costs = mixed.rounding_costs(model, information, (4, 8), 16)
    assert all(row[4] > row[8] > 0 for row in costs.values())
    packed = mixed.pack_layers(copy.deepcopy(model), dict.fromkeys(names, 8), 16)
    assert 0 < (logits(packed, ids) - before).norm() < 0.1 * before.norm()
    eight = with_int8_linears(copy.deepcopy(model), per_token=True)
    assert 0 < (logits(eight, ids) - before).norm() < 0.1 * before.norm()
    learning = copy.deepcopy(model)
    layers = qat.prepare(learning, 8, 16)
    optimizer = torch.optim.Adam(qat.parameter_groups(learning, 1e-3))
    biases = {id(p) for n, p in learning.named_parameters() if n.endswith("_proj.bias")}
    trained = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert biases <= trained
    assert len(biases) > 0 or kind == "mistral"

    def loss_of(step):
        return learning(ids, labels=ids).loss

    losses = qat.train(loss_of, optimizer, 4)
    assert losses[-1] < losses[0]
    simulated = logits(learning, ids)
    qat.convert(learning)
    assert len(layers) == len(names)
    assert not any(isinstance(module, qat.QATLinear) for module in learning.modules())
    assert (logits(learning, ids) - simulated).abs().max() < 1e-3
