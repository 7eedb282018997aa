"""The decoder and its kernels, held against float64, and against transformers on two models."""

import copy
import math

import numpy as np
import pytest
import torch
import transformers
from families import SUPPORTED, WINDOW, family, token_ids
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

import labkit as lk
from labkit import matvec, mixed, quant
from labkit.decoder import Decoder, Product
from labkit.kernels import PackedLinear

# Bits, inputs, inputs a group: odd sizes, one group, many groups, a last group that is shorter.
GRIDS = [(8, 1, 1), (8, 3, 3), (8, 63, 63), (8, 64, 16), (8, 65, 64), (8, 130, 130), (8, 130, 48)]
ROUNDED = 1e-2  # what 16 bits of the activations may change a logit by
KNOWN = "the decoder knows causal LMs of llama, mistral, qwen2, qwen3 with SiLU"
GRIDS += [
    (4, 1, 1),
    (4, 63, 63),
    (4, 63, 56),
    (4, 64, 64),
    (4, 65, 64),
    (4, 130, 24),
    (4, 132, 132),
]


def numbers(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


def linear(out: int, inputs: int, seed: int = 0) -> torch.nn.Linear:
    layer = torch.nn.Linear(inputs, out, bias=False)
    layer.weight.data = torch.from_numpy(numbers(out, inputs, seed=seed))
    return layer


def weight_float64(layer: PackedLinear) -> np.ndarray:
    codes = layer.codes.numpy()
    if layer.bits == 4:
        codes = np.stack([codes & 15, codes >> 4], axis=-1).reshape(len(codes), -1)
    groups = np.arange(layer.inputs) // layer.group_size
    zero = 2 ** (layer.bits - 1) if layer.symmetric else layer.zero_point.numpy()[:, groups, 0]
    return (codes[:, : layer.inputs].astype(float) - zero) * layer.scale.double()[
        :, groups, 0
    ].numpy()


def check_product(y: np.ndarray, weight: np.ndarray, x: np.ndarray, step: float = 0.0) -> None:
    """Compare with float64; `step`: of the scale to which x may have been rounded."""
    exact, size = weight @ x.astype(float), np.abs(weight) @ np.abs(x).astype(float)
    assert y.dtype == np.float32
    assert y.shape == exact.shape
    assert (np.abs(y - exact) <= 2e-6 * size + step / 2 * np.abs(weight).sum(-1)).all()


def step_of(x: np.ndarray) -> float:
    """Return the smallest power of two by which x fits in 16 bits."""
    return 2.0 ** math.ceil(math.log2(np.abs(x).max() / 32767))


# Kernels


@pytest.mark.parametrize("inputs", [1, 3, 63, 64, 65, 130])
def test_float_products_agree_with_float64(inputs):
    x = numbers(inputs, seed=1)
    for out in (1, 3, 63, 64, 65, 130):
        weight = numbers(out, inputs)
        check_product(matvec.matvec_fp32(weight, x), weight.astype(float), x)


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize(("bits", "inputs", "group_size"), GRIDS)
def test_packed_products_agree_with_float64(bits, inputs, group_size, symmetric):
    x = numbers(inputs, seed=1)
    for out in (1, 3, 63, 64, 65, 130):
        layer = PackedLinear(linear(out, inputs), bits, group_size, symmetric)
        check_product(Product("layer", layer)(x), weight_float64(layer), x, step_of(x))


@settings(max_examples=40)
@given(st.data(), st.sampled_from([4, 8]), st.integers(1, 700), st.integers(-120, 80))
def test_packed_products_of_16_bits_are_exact(data, bits, inputs, exponent):
    """The largest codes and activations at once: no sum overflows, at any size of x."""
    group_size = data.draw(st.integers(1, inputs)) // (32 // bits) * (32 // bits) or inputs
    seed, extreme = data.draw(st.integers(0, 99)), data.draw(st.booleans())
    random = np.random.default_rng(seed)
    most = 2 ** (bits - 1)
    codes, x = np.full((3, inputs), most - 1), np.full(inputs, 32767)
    if not extreme:
        codes = random.integers(-most, most, (3, inputs))
        x[1:] = random.integers(-32767, 32768, inputs - 1)
    layer = torch.nn.Linear(inputs, 3, bias=False)
    layer.weight.data = torch.from_numpy(codes).float()
    shape = 3, -(-inputs // group_size), 1
    grid = torch.ones(shape), torch.full(shape, float(most))
    product = Product("one", PackedLinear(layer, bits, group_size, grid=grid))
    found = product((x * 2.0**exponent).astype(np.float32)) / 2.0**exponent
    within = 1e-6 * (np.abs(codes) @ np.abs(x)).max()  # what float32 loses between spans
    np.testing.assert_allclose(found, codes @ x, rtol=0, atol=within)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("bits", [8, 4])
def test_what_is_not_finite_is_not_hidden(bits, bad):
    x = numbers(70)
    x[5] = bad
    assert np.isnan(Product("one", PackedLinear(linear(3, 70), bits, 32))(x)).all()
    zeros = Product("one", PackedLinear(linear(3, 70), bits, 32))(np.zeros(70, np.float32))
    assert (zeros == 0).all()


@pytest.mark.parametrize("bits", [32, 8, 4])
def test_layers_that_read_the_same_input_are_one_product(bits):
    layers = [linear(out, 70, seed) for seed, out in enumerate((65, 3, 64))]
    weights = [layer.weight.detach().double().numpy() for layer in layers]
    if bits < 32:
        layers = [PackedLinear(layer, bits, 32) for layer in layers]
        weights = [weight_float64(layer) for layer in layers]
    product, x = Product("three", *layers), numbers(70, seed=9)
    assert (product.bits, product.out) == (bits, 132)
    check_product(product(x), np.concatenate(weights), x, step_of(x) if bits < 32 else 0)


@settings(max_examples=60)
@given(st.data(), st.sampled_from([4, 8]), st.booleans(), st.integers(1, 70), st.integers(1, 5))
def test_the_quick_way_to_dequantize_is_exact(data, bits, symmetric, inputs, out):
    group_size = data.draw(st.integers(1, inputs))
    layer = PackedLinear(linear(out, inputs), bits, group_size, symmetric)
    codes = quant.unpack_bits(layer.codes, bits, inputs)
    zero_point = 2 ** (bits - 1) if symmetric else layer.zero_point.float()
    slow = quant.dequantize_groups(codes, layer.scale.float(), zero_point, group_size)
    quick = matvec.dequantize_rows(layer.codes.numpy(), bits, *layer.grid(), group_size, inputs)
    assert torch.equal(torch.from_numpy(quick), slow)
    assert torch.equal(layer.dequantized(), slow)


@pytest.mark.parametrize("size", [0.0, 1e-4, 1.0, 1e4])
@pytest.mark.parametrize("n", [1, 7, 64, 129])
def test_the_norm_is_torchs(n, size):
    x, weight = (
        torch.from_numpy(numbers(n) * np.float32(size)),
        torch.from_numpy(numbers(n, seed=1)),
    )
    expected = functional.rms_norm(x.double(), (n,), weight.double(), 1e-5)
    found = torch.from_numpy(matvec.rms_norm(x.numpy(), weight.numpy(), 1e-5))
    torch.testing.assert_close(found, expected.float(), rtol=1e-5, atol=0)


def test_the_gate_is_torchs_and_does_not_overflow():
    gate = torch.from_numpy(np.concatenate([numbers(33), np.float32([-200, 200, 0])]))
    up = torch.from_numpy(numbers(36, seed=1))
    found = torch.from_numpy(matvec.swiglu(torch.cat([gate, up]).numpy()))
    expected = functional.silu(gate.double()) * up.double()
    torch.testing.assert_close(found, expected.float(), rtol=1e-5, atol=1e-30)


@pytest.mark.parametrize("size", [1, 20])  # 20: exp of a score alone would overflow
@pytest.mark.parametrize(("heads", "kv_heads", "width"), [(1, 1, 2), (3, 1, 64), (4, 2, 10)])
def test_attention_is_torchs_at_every_position(heads, kv_heads, width, size):
    length = 9
    rows = numbers(length, heads + 2 * kv_heads, width) * np.float32(size)
    angles = numbers(2, length, width, seed=1)
    keys, values = np.full((2, kv_heads, length + 2, width), np.nan, np.float32)
    found = [
        matvec.attend(rows[i].copy(), *angles[:, i], keys, values, 0, i).reshape(heads, width)
        for i in range(length)
    ]
    q, k, v = (
        torch.from_numpy(rows).double().transpose(0, 1)[None].split([heads, kv_heads, kv_heads], 1)
    )
    q, k = apply_rotary_pos_emb(q, k, *torch.from_numpy(angles).double()[:, None])
    expected = functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    found = torch.from_numpy(np.stack(found, axis=1))
    torch.testing.assert_close(found, expected[0].float(), rtol=1e-4, atol=1e-5 * size**2)
    torch.testing.assert_close(torch.from_numpy(keys[:, :length]), k[0].float())
    assert np.array_equal(values[:, :length], v[0].float().numpy())
    assert np.isnan(keys[:, length:]).all()
    assert np.isnan(values[:, length:]).all()


# The decoder


def small_llama(**options) -> transformers.LlamaForCausalLM:
    torch.manual_seed(0)
    config = {"vocab_size": 97, "hidden_size": 40, "intermediate_size": 52, "num_hidden_layers": 2}
    config |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 6}
    config |= {"initializer_range": 0.2, "eos_token_id": None, "bos_token_id": None}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**config | options)).eval()


@pytest.fixture(scope="module")
def small():
    return small_llama()


@pytest.fixture(scope="module", params=["tiny", "small"])
def llama(request, small):
    """A model, windows of ids, and the inputs a group that its narrowest layer allows."""
    if request.param == "small":
        return small, torch.randint(97, (2, 20), generator=torch.Generator().manual_seed(1)), 16
    model, tokenizer = lk.load_model("tiny", device="cpu")
    return model, lk.windows(tokenizer, "reference-judge", 2, 64), 64


def all_layers(model, bits: int) -> dict[str, int]:
    return dict.fromkeys([*mixed.layer_names(model), "lm_head"], bits)


def packed(model, widths: dict[str, int], group_size: int):
    return mixed.pack_layers(copy.deepcopy(model), widths, group_size)


@torch.inference_mode()
def logits(model, ids: torch.Tensor) -> torch.Tensor:
    return model(ids).logits


def assert_same_logits(found, expected, within: float) -> None:
    torch.testing.assert_close(torch.as_tensor(found), expected, rtol=0, atol=within)


def test_greedy_text_is_that_of_transformers(llama):
    model, ids, _ = llama
    n_tokens = len(ids[0]) if model.config.vocab_size == 97 else 64
    prompt = ids[0, :12]
    expected = model.generate(
        prompt[None],
        attention_mask=torch.ones_like(prompt[None]),
        do_sample=False,
        max_new_tokens=n_tokens,
        pad_token_id=0,
        eos_token_id=-1,
    )
    written = Decoder(model, 12 + n_tokens - 1).generate(prompt.tolist(), n_tokens)
    assert len(written) == n_tokens
    assert written == expected[0, 12:].tolist()


def test_logits_are_those_of_transformers(llama):
    model, ids, _ = llama
    found = Decoder(model, ids.shape[1])(ids)
    assert found.dtype == torch.float32
    assert_same_logits(found, logits(model, ids), 1e-3)


@pytest.mark.parametrize("bits", [8, 4])
def test_logits_of_packed_layers_are_those_of_transformers(llama, bits):
    model, ids, group_size = llama
    small_model = packed(model, all_layers(model, bits), group_size)
    decoder = Decoder(small_model)
    assert decoder.head.bits == bits
    assert_same_logits(decoder(ids), logits(small_model, ids), ROUNDED)
    assert (logits(small_model, ids) - logits(model, ids)).abs().max() > 10 * ROUNDED


def test_layers_of_several_widths_work_together(llama):
    model, ids, group_size = llama
    widths = {name: 4 if "self_attn" in name else 8 for name in mixed.layer_names(model)}
    widths |= {"model.layers.0.self_attn.o_proj": 8, "model.layers.1.mlp.down_proj": 4}
    for name in ("q_proj", "k_proj", "v_proj"):
        widths[f"model.layers.1.self_attn.{name}"] = 8
    del widths["model.layers.1.self_attn.o_proj"]
    several = packed(model, widths, group_size)
    decoder = Decoder(several)
    blocks = [[x.bits for x in block if isinstance(x, Product)] for block in decoder.blocks[:2]]
    assert blocks == [[4, 8, 8, 8], [8, 32, 8, 4]]
    assert decoder.head.bits == 32
    assert_same_logits(decoder(ids), logits(several, ids), ROUNDED)


def test_a_compiled_block_and_its_python_say_the_same(llama):
    model, ids, group_size = llama
    small_model = packed(model, all_layers(model, 4), group_size)
    compiled, by_python = Decoder(small_model), Decoder(small_model)
    assert all(run is not matvec.one_block for run, _ in compiled.ways)
    by_python.ways = [(matvec.one_block, block) for block in by_python.blocks]
    assert torch.equal(compiled(ids), by_python(ids))


def test_a_kernel_of_plain_python_is_called_from_python(small):
    calls = []

    def kernel(*arguments):
        calls.append(arguments)
        return matvec.matvec_packed(*arguments)

    model, ids = packed(small, all_layers(small, 8), 16), torch.arange(6)[None]
    found = Decoder(model, kernel=kernel)(ids)
    assert len(calls) == ids.numel() * (4 * len(model.model.layers) + 1)
    assert torch.equal(found, Decoder(model)(ids))


@pytest.mark.parametrize("bits", [32, 4])
def test_a_prompt_read_at_once_leaves_what_steps_leave(llama, bits):
    model, ids, group_size = llama
    if bits < 32:
        model = packed(model, all_layers(model, bits), group_size)
    at_once, by_steps = Decoder(model), Decoder(model)
    expected = by_steps(ids[:1])[0]
    within = 1e-4 if bits == 32 else ROUNDED
    assert_same_logits(at_once.prefill(ids[0, :9]), expected[8], within)
    assert at_once.length == 9
    for i in range(9, ids.shape[1]):
        assert_same_logits(at_once.step(int(ids[0, i])), expected[i], within)
    assert at_once.length == by_steps.length == ids.shape[1]


def test_a_prompt_starts_from_an_empty_cache(small):
    used, fresh = Decoder(small), Decoder(small)
    used.generate(range(20, 40), 10)
    assert used.length == 29
    for decoder in (used, fresh):
        decoder.prefill(torch.tensor([5, 6, 7]))
        assert decoder.length == 3
    assert np.array_equal(used.step(8), fresh.step(8))
    assert used.generate([1, 2], 8) == fresh.generate([1, 2], 8)


def test_the_model_is_left_as_it_was(small):
    state = copy.deepcopy(small.state_dict())
    Decoder(small).generate([1, 2, 3], 5)
    assert all(torch.equal(x, state[name]) for name, x in small.state_dict().items())


def test_perplexity_scores_a_decoder():
    model, tokenizer = lk.load_model("tiny", device="cpu")
    ids = lk.windows(tokenizer, "reference-judge", 4, 64)
    reference = lk.perplexity(model, ids).perplexity
    assert lk.perplexity(Decoder(model), ids).perplexity == pytest.approx(reference, rel=1e-4)
    eight = Decoder(packed(model, all_layers(model, 8), 64))
    assert lk.perplexity(eight, ids).perplexity == pytest.approx(reference, rel=0.01)


@pytest.mark.parametrize("bits", [32, 8, 4])
def test_nbytes_are_those_of_the_arrays(small, bits):
    model = packed(small, all_layers(small, bits), 16) if bits < 32 else small
    decoder = Decoder(model)
    products = [x for block in decoder.blocks for x in block if isinstance(x, Product)]
    arrays = [array for product in [*products, decoder.head] for array in product.arrays]
    assert decoder.nbytes == sum(array.nbytes for array in arrays)
    # Outputs and inputs of all products; packed ones are filled up to 64 outputs and whole groups.
    shapes = 2 * [(48, 40), (40, 24), (104, 40), (40, 52)] + [(97, 40)]
    if bits == 32:
        assert decoder.nbytes == sum(4 * out * inputs for out, inputs in shapes)
    else:
        groups = [(64 * math.ceil(out / 64), math.ceil(inputs / 16)) for out, inputs in shapes]
        assert decoder.nbytes == sum(out * n * (2 * bits + 5) for out, n in groups)


# Families


@pytest.mark.parametrize("bits", [32, 8, 4])
@pytest.mark.parametrize(
    "options",
    [{}, WINDOW, {"head_dim": 12, "tie_word_embeddings": True}, {"attention_bias": True}],
    ids=["plain", "window", "wide tied", "biases"],
)
@pytest.mark.parametrize("kind", SUPPORTED)
def test_logits_of_other_families_are_those_of_transformers(kind, options, bits):
    model, ids = family(kind, **options), token_ids(2)
    if kind == "llama" and options.get("attention_bias"):
        model = family(kind, **options, mlp_bias=True)
    if bits < 32:
        model = packed(
            model,
            all_layers(model, bits)
            if "head_dim" not in options
            else dict.fromkeys(mixed.layer_names(model), bits),
            16,
        )
    expected, decoder = logits(model, ids), Decoder(model, 24)
    at_once, by_steps = (1e-4, 1e-3) if bits == 32 else (ROUNDED, ROUNDED)
    assert_same_logits(decoder(ids), expected, by_steps)
    for length in (3, 7, 8, 15):  # a prompt shorter and longer than the window, then steps
        assert_same_logits(decoder.prefill(ids[0, :length]), expected[0, length - 1], at_once)
        for i in range(length, 24):
            assert_same_logits(decoder.step(int(ids[0, i])), expected[0, i], by_steps)


def test_biases_norms_and_windows_matter_to_these_models():
    """Else the test above could not fail."""
    ids = token_ids(1)
    changed = {"mistral": family("mistral", **WINDOW), "qwen3": family("qwen3"), "qwen2": None}
    changed["qwen3"].model.layers[0].self_attn.q_norm.weight.data *= 2
    changed["qwen2"] = family("qwen2")
    changed["qwen2"].model.layers[0].self_attn.k_proj.bias.data.zero_()
    changed["qwen2"].model.layers[0].self_attn.v_proj.bias.data.zero_()
    for kind, other in changed.items():
        assert (logits(family(kind), ids) - logits(other, ids)).abs().max() > 0.1


@pytest.mark.parametrize("kind", SUPPORTED)
def test_greedy_text_of_other_families_is_that_of_transformers(kind):
    model, prompt = family(kind, **WINDOW), token_ids(1, 9)
    expected = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        do_sample=False,
        max_new_tokens=20,
        eos_token_id=-1,
        use_cache=False,  # Llama and Mistral ignore layer types, but their caches do not
    )
    assert Decoder(model, 40).generate(prompt[0], 20) == expected[0, 9:].tolist()


# Bad input


def test_other_architectures_are_refused():
    config = transformers.GPT2Config(n_layer=1, n_head=2, n_embd=8, vocab_size=11, n_positions=16)
    with pytest.raises(TypeError, match=f"{KNOWN}, not GPT2"):
        Decoder(transformers.GPT2LMHeadModel(config))
    with pytest.raises(TypeError, match=f"{KNOWN}, not Linear"):
        Decoder(torch.nn.Linear(3, 3))
    with pytest.raises(TypeError, match=f"{KNOWN}, not LlamaForCausalLM gelu"):
        Decoder(small_llama(hidden_act="gelu"))


def test_layers_that_no_kernel_knows_are_named(small):
    q, k = "model.layers.1.self_attn.q_proj", "model.layers.1.self_attn.k_proj"
    v = "model.layers.1.self_attn.v_proj"
    with pytest.raises(
        ValueError, match=r"layers\.1\.self_attn: layers must share bits and groups"
    ):
        Decoder(packed(small, {q: 4, k: 8, v: 8}, 16))
    with pytest.raises(TypeError, match=r"layers\.1\.self_attn: .* not Linear, PackedLinear"):
        Decoder(packed(small, {q: 4}, 16))
    with pytest.raises(ValueError, match=r"lm_head: kernels know .* not 3 bits in groups of 16"):
        Decoder(packed(small, {"lm_head": 3}, 16))
    down = "model.layers.0.mlp.down_proj"
    with pytest.raises(
        ValueError, match=rf"{down}: .* multiple of 4, or a row; not 4 bits in groups of 6"
    ):
        Decoder(packed(small, {down: 4}, 6))


@pytest.mark.parametrize("max_length", [0, -1])
def test_a_cache_of_nothing_is_refused(small, max_length):
    with pytest.raises(ValueError, match=f"max_length must be at least 1, not {max_length}"):
        Decoder(small, max_length)


@pytest.mark.parametrize("ids", [[], torch.zeros(0, dtype=torch.int64), [0.5, 1.0], [[1, 2]], 3])
def test_what_is_no_prompt_is_refused(small, ids):
    decoder = Decoder(small)
    for read in (decoder.prefill, lambda ids: decoder.generate(ids, 2)):
        with pytest.raises(ValueError, match="ids must be a row of 1 token id or more"):
            read(ids)
    assert decoder.length == 0


@pytest.mark.parametrize("token", [-1, 97])
def test_an_unknown_id_is_refused(small, token):
    decoder = Decoder(small)
    with pytest.raises(ValueError, match=rf"ids must be from 0 to 96, not \[1, {token}\]"):
        decoder.prefill([1, token])
    decoder.prefill([1, 2])
    with pytest.raises(ValueError, match="ids must be from 0 to 96"):
        decoder.step(token)
    assert decoder.length == 2


def test_a_full_cache_is_refused(small):
    decoder = Decoder(small, 8)
    with pytest.raises(ValueError, match=r"9 tokens do not fit into a cache of 8; .* max_length"):
        decoder.prefill(range(9))
    with pytest.raises(ValueError, match="9 tokens do not fit into a cache of 8"):
        decoder.generate(range(5), 5)
    with pytest.raises(ValueError, match="9 tokens do not fit into a cache of 8"):
        decoder(torch.ones(1, 9, dtype=torch.int64))
    decoder.prefill(range(7))
    decoder.step(7)
    with pytest.raises(ValueError, match="9 tokens do not fit into a cache of 8"):
        decoder.step(8)
    assert decoder.length == 8
    assert len(decoder.generate(range(5), 4)) == 4


def test_no_tokens_are_refused(small):
    with pytest.raises(ValueError, match="n_tokens must be at least 1, not 0"):
        Decoder(small).generate([1, 2], 0)


def test_models_that_the_decoder_would_read_wrongly_are_refused(small):
    with pytest.raises(TypeError, match=f"{KNOWN}, not LlamaModel"):
        Decoder(small.model)
    with pytest.raises(TypeError, match=r"must be float32, not torch\.bfloat16; call"):
        Decoder(copy.deepcopy(small).bfloat16())
    longer = copy.deepcopy(small)
    longer.config.rope_parameters = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    with pytest.raises(TypeError, match=r"no rotation that depends on length \(dynamic\)"):
        Decoder(longer)
