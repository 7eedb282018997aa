"""Measurements against independent computations: float64, transformers, safetensors, the disk."""

import dataclasses
import math
import os
import platform
import subprocess
import sys
import time
import warnings
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import labkit as lk
from labkit import ledger, machine, measure
from labkit.kernels import PackedLinear

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*quantized tensor creation functions.*:UserWarning",
    "ignore:.*torch.ao.quantization is deprecated.*:DeprecationWarning",
)
VOCABULARY, HIDDEN, LAYERS = 160, 64, 2


def language_model(tied=True, seed=0):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        intermediate_size=128,
        num_hidden_layers=LAYERS,
        num_attention_heads=2,
        num_key_value_heads=1,
        tie_word_embeddings=tied,
        initializer_range=0.2,
    )
    return randomized(LlamaForCausalLM(config).eval())


def randomized(model):
    """Move what starts at 0 or 1 in every model: norms, biases, running means."""
    for tensor in model.state_dict().values():
        if tensor.ndim == 1 and tensor.is_floating_point():
            tensor += 0.1 * torch.rand_like(tensor)
    return model


def mlp(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10)).eval()


def dynamic(model, per_channel=False, dtype=torch.qint8):
    quantization = torch.ao.quantization
    layers = {nn.Linear, nn.LSTM}
    if per_channel:
        layers = {nn.Linear: quantization.per_channel_dynamic_qconfig}
    torch.backends.quantized.engine = machine.quantized_engine()
    return quantization.quantize_dynamic(model, layers, dtype=dtype)


def static(seed=0):
    quantization = torch.ao.quantization
    torch.backends.quantized.engine = machine.quantized_engine()
    model = nn.Sequential(quantization.QuantStub(), *mlp(seed), quantization.DeQuantStub()).eval()
    model = quantization.fuse_modules(model, [["1", "2"]])
    model.qconfig = quantization.get_default_qconfig(machine.quantized_engine())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        prepared = quantization.prepare(model)
        prepared(torch.rand(50, 64, generator=torch.Generator().manual_seed(seed)))
        return quantization.convert(prepared)


def torchao(config_name, seed):
    import torchao.quantization as ao

    model = language_model(seed=seed)
    ao.quantize_(model, getattr(ao, config_name)())
    return model


def packed(model, bits, symmetric):
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and name != "lm_head":
            model.set_submodule(name, PackedLinear(module, bits, 32, symmetric))
    return model


def convolution(seed=0):
    torch.manual_seed(seed)
    return randomized(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)))


MODELS = {
    "float tied": language_model,
    "float untied": lambda seed=0: language_model(tied=False, seed=seed),
    "float half": lambda seed=0: language_model(seed=seed).half(),
    "dynamic per tensor": lambda seed=0: dynamic(language_model(seed=seed)),
    "dynamic per channel": lambda seed=0: dynamic(language_model(seed=seed), per_channel=True),
    "dynamic float16": lambda seed=0: dynamic(language_model(seed=seed), dtype=torch.float16),
    "dynamic lstm": lambda seed=0: dynamic(nn.Sequential(nn.LSTM(8, 16, 2))),
    "static mlp": static,
    "batch norm": convolution,
    "torchao weight only": lambda seed=0: torchao("Int8WeightOnlyConfig", seed),
    "torchao dynamic": lambda seed=0: torchao("Int8DynamicActivationInt8WeightConfig", seed),
    "torchao float8": lambda seed=0: torchao("Float8WeightOnlyConfig", seed),
    "packed 4 symmetric": lambda seed=0: packed(language_model(seed=seed), 4, True),
    "packed 4 asymmetric": lambda seed=0: packed(language_model(seed=seed), 4, False),
    "packed 8 symmetric": lambda seed=0: packed(language_model(seed=seed), 8, True),
    "packed 8 asymmetric": lambda seed=0: packed(language_model(seed=seed), 8, False),
}
RELOADABLE = [name for name in MODELS if not name.startswith(("dynamic", "static"))]


@pytest.fixture
def ids():
    return torch.randint(VOCABULARY, (5, 300), generator=torch.Generator().manual_seed(0))


def linear_sizes(head=False):
    model = language_model()
    layers = [m for n, m in model.named_modules() if isinstance(m, nn.Linear)]
    return [tuple(m.weight.shape) for m in layers if head or m is not model.lm_head]


# Perplexity


def test_perplexity_agrees_with_float64(ids):
    model = language_model()
    with torch.no_grad():
        log_p = model.double()(ids).logits.log_softmax(-1)
    nats = -log_p[:, :-1].gather(2, ids[:, 1:, None]).squeeze(2)
    found = measure.perplexity(model.float(), ids, batch_size=2)
    torch.testing.assert_close(found.token_nats, nats, atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(found.window_nats, nats.mean(1), atol=1e-5, rtol=1e-6)
    assert found.nats_per_token == pytest.approx(nats.mean().item(), rel=1e-6)
    assert found.perplexity == pytest.approx(nats.mean().exp().item(), rel=1e-5)
    by_hand = sum((w - nats.mean()) ** 2 for w in nats.mean(1)) / 4 / 5
    assert found.standard_error == pytest.approx(math.sqrt(by_hand), rel=1e-4)
    assert f"{found.perplexity:.2f}" in str(found)
    assert "5 windows" in str(found)


def test_perplexity_agrees_with_the_loss_of_transformers(ids):
    model = language_model()
    with torch.no_grad():
        losses = [model(input_ids=row[None], labels=row[None]).loss.item() for row in ids]
    found = measure.perplexity(model, ids, batch_size=3)
    assert found.window_nats.tolist() == pytest.approx(losses, rel=1e-5)


def test_perplexity_does_not_depend_on_the_batch(ids):
    one, four = (measure.perplexity(language_model(), ids, batch_size=n) for n in (1, 4))
    torch.testing.assert_close(one.token_nats, four.token_nats, atol=1e-4, rtol=0)


class Uniform(nn.Module):
    """Predicts every token alike, returns bare logits, and would drop inputs while training."""

    def __init__(self):
        super().__init__()
        self.drop, self.frozen = nn.Dropout(0.5), nn.Dropout(0.5).eval()

    def forward(self, ids):
        noise = torch.randn(*ids.shape, 8) if self.drop.training else torch.zeros(*ids.shape, 8)
        return noise


def test_a_uniform_model_has_the_perplexity_of_its_vocabulary():
    model = Uniform().train()
    model.frozen.eval()
    found = measure.perplexity(model, torch.randint(8, (1, 9)))
    assert found.perplexity == pytest.approx(8)
    assert math.isnan(found.standard_error)
    assert model.training
    assert model.drop.training
    assert not model.frozen.training
    assert not found.token_nats.is_inference()


def test_perplexity_runs_on_every_kind_of_model(ids):
    reference = measure.perplexity(language_model(), ids[:2, :32])
    for kind in ("dynamic per channel", "torchao weight only", "torchao dynamic"):
        found = measure.perplexity(MODELS[kind](), ids[:2, :32])
        assert found.nats_per_token == pytest.approx(reference.nats_per_token, rel=0.05), kind
        assert not torch.equal(found.token_nats, reference.token_nats), kind


@pytest.mark.parametrize(
    ("bad", "error", "words"),
    [
        (torch.zeros(2, 5), TypeError, "int64"),
        (torch.zeros(2, 5, dtype=torch.int32), TypeError, "int32"),
        ([[1, 2]], TypeError, "list"),
        (torch.zeros(5, dtype=torch.int64), ValueError, "length"),
        (torch.zeros(2, 1, dtype=torch.int64), ValueError, r"\(2, 1\)"),
        (torch.zeros(0, 5, dtype=torch.int64), ValueError, r"\(0, 5\)"),
        (torch.full((2, 5), VOCABULARY), ValueError, "159"),
        (torch.full((2, 5), -1), ValueError, "-1"),
    ],
)
def test_perplexity_refuses_bad_ids(bad, error, words):
    with pytest.raises(error, match=words):
        measure.perplexity(language_model(), bad)


def test_perplexity_refuses_a_bad_batch_size(ids):
    with pytest.raises(ValueError, match="batch_size"):
        measure.perplexity(language_model(), ids, batch_size=0)


# Paired differences


def scored(rows):
    token_nats = torch.tensor(rows, dtype=torch.float64)
    return measure.Perplexity(0.0, 0.0, 0.0, token_nats.mean(1), token_nats)


def test_paired_difference_by_hand():
    reference = scored([[1.0, 3.0], [4.0, 6.0], [0.0, 2.0]])  # window means 2, 5, 1
    other = scored([[1.5, 3.5], [4.6, 6.6], [0.7, 2.7]])  # 0.5, 0.6, 0.7 more
    found = measure.paired_difference(other, reference)
    assert found.nats == pytest.approx(0.6)
    assert found.standard_error == pytest.approx(0.1 / math.sqrt(3))
    assert found.margin == pytest.approx(4.302653 * found.standard_error)  # t for three windows
    assert found.ratio == pytest.approx(math.exp(0.6))
    assert found.verdict == "worse"
    assert measure.paired_difference(reference, other).verdict == "better"
    assert "worse: +0.6000 ± 0.0577 nats" in str(found)


def test_a_difference_inside_the_error_bar_is_a_tie():
    reference = scored([[1.0], [1.0], [1.0]])
    assert measure.paired_difference(reference, reference).verdict == "tie"
    wobbly = measure.paired_difference(scored([[1.3], [0.9], [1.1]]), reference)
    assert wobbly.nats == pytest.approx(0.1)
    assert wobbly.verdict == "tie"
    between = measure.paired_difference(scored([[1.3], [1.1], [1.2]]), reference)
    assert 2 < between.nats / between.standard_error < 4.3  # two standard errors would not do
    assert between.verdict == "tie"
    edge = dataclasses.replace(wobbly, nats=0.1, margin=0.1)
    assert edge.verdict == "tie"
    assert dataclasses.replace(edge, nats=0.11).verdict == "worse"


def test_a_broken_model_is_worse_not_a_tie():
    works, broken = scored([[1.0], [2.0]]), scored([[math.nan], [math.inf]])
    assert measure.paired_difference(broken, works).verdict == "worse"
    with pytest.raises(ValueError, match="reference"):
        measure.paired_difference(works, broken)


def test_a_huge_difference_has_an_infinite_ratio():
    found = measure.paired_difference(scored([[900.0], [901.0]]), scored([[1.0], [1.0]]))
    assert found.ratio == math.inf


def test_paired_difference_needs_the_same_two_windows():
    one, two, three = scored([[1.0]]), scored([[1.0], [2.0]]), scored([[1.0], [2.0], [3.0]])
    with pytest.raises(ValueError, match="at least 2"):
        measure.paired_difference(one, one)
    with pytest.raises(ValueError, match="share their windows"):
        measure.paired_difference(two, three)


# Bytes


@pytest.mark.parametrize("kind", MODELS)
def test_the_ledger_adds_up_to_the_file(kind, tmp_path):
    model = MODELS[kind]()
    path = ledger.save_weights(model, tmp_path / "model.safetensors")
    found = ledger.byte_ledger(path)
    assert sum(found.values()) == path.stat().st_size
    assert list(found) == [*ledger.CATEGORIES, ledger.OVERHEAD]
    tensors = sum(t.nbytes for t in load_file(path).values())
    assert found[ledger.OVERHEAD] == path.stat().st_size - tensors
    assert ledger.byte_ledger(model) == found
    assert [p.name for p in tmp_path.iterdir()] == ["model.safetensors"]


def check_ledger(model, **expected):
    found = ledger.byte_ledger(model)
    del found[ledger.OVERHEAD]
    assert found == dict.fromkeys(ledger.CATEGORIES, 0) | {
        name.replace("_", " "): nbytes for name, nbytes in expected.items()
    }


WEIGHTS, WEIGHTS_AND_HEAD = (sum(o * i for o, i in linear_sizes(head)) for head in (False, True))
ROWS_AND_HEAD = sum(o for o, _ in linear_sizes(head=True))
EMBEDDING, NORMS = VOCABULARY * HIDDEN * 4, (2 * LAYERS + 1) * HIDDEN * 4


def test_ledger_of_float_models_counts_a_tied_head_once():
    check_ledger(
        language_model(), embeddings=EMBEDDING, float_weights=4 * WEIGHTS, norms_and_biases=NORMS
    )
    check_ledger(
        language_model(tied=False),
        embeddings=EMBEDDING,
        float_weights=4 * WEIGHTS_AND_HEAD,
        norms_and_biases=NORMS,
    )


def test_dynamic_quantization_breaks_the_tie_and_stores_the_head_twice():
    rest = {"embeddings": EMBEDDING, "norms_and_biases": NORMS}
    n = len(linear_sizes(head=True))
    per_tensor, per_channel = MODELS["dynamic per tensor"](), MODELS["dynamic per channel"]()
    check_ledger(per_tensor, quantized_codes=WEIGHTS_AND_HEAD, scales=4 * n, zero_points=n, **rest)
    check_ledger(
        per_channel,
        quantized_codes=WEIGHTS_AND_HEAD,
        scales=4 * ROWS_AND_HEAD,
        zero_points=ROWS_AND_HEAD,
        **rest,
    )


@pytest.mark.parametrize("kind", ["torchao weight only", "torchao dynamic"])
def test_ledger_of_torchao_models(kind):
    check_ledger(
        MODELS[kind](),
        quantized_codes=WEIGHTS_AND_HEAD,
        scales=4 * ROWS_AND_HEAD,
        zero_points=ROWS_AND_HEAD,
        embeddings=EMBEDDING,
        norms_and_biases=NORMS,
    )


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
def test_ledger_of_packed_models(bits, symmetric):
    check_ledger(
        packed(language_model(), bits, symmetric),
        quantized_codes=WEIGHTS * bits // 8,
        scales=2 * WEIGHTS // 32,
        zero_points=0 if symmetric else WEIGHTS // 32,
        embeddings=EMBEDDING,
        norms_and_biases=NORMS,
    )


def test_ledger_of_a_static_network():
    per_channel = static()[1].weight().qscheme() == torch.per_channel_affine
    n = 42 if per_channel else 2  # one scale an output, or one a layer
    check_ledger(
        static(),
        quantized_codes=64 * 32 + 32 * 10,
        scales=4 * n + 3 * 4,  # and one for each of the three activations
        zero_points=n + 3 * 8,
        norms_and_biases=4 * 42,
    )


def test_a_head_listed_before_the_embedding_is_still_an_embedding():
    model = nn.ModuleDict({"a_head": nn.Linear(8, 20, bias=False), "embed": nn.Embedding(20, 8)})
    model["a_head"].weight = model["embed"].weight
    check_ledger(model, embeddings=20 * 8 * 4)


def test_a_module_used_in_two_places_is_stored_once():
    layer = dynamic(nn.Sequential(nn.Linear(16, 8, bias=False)))[0]
    found = ledger.byte_ledger(nn.ModuleDict({"first": layer, "second": layer}))
    assert found["quantized codes"] == 16 * 8


def test_buffers_that_are_not_persistent_are_not_stored(tmp_path):
    model = language_model()
    assert any("inv_freq" in name for name, _ in model.named_buffers())
    names = load_file(ledger.save_weights(model, tmp_path / "m")).keys()
    assert names == {name for name in model.state_dict() if name != "lm_head.weight"}


def test_views_of_one_storage_are_stored_for_what_they_show():
    model, whole = nn.Module(), torch.arange(12.0).view(3, 4)
    model.register_buffer("top", whole[:1])
    model.register_buffer("turned", whole.T)
    check_ledger(model, float_weights=4 * 4 + 12 * 4)


@pytest.mark.parametrize("kind", ["dynamic per tensor", "dynamic per channel", "static mlp"])
def test_the_file_holds_the_weights_that_torch_hides(kind, tmp_path):
    model = MODELS[kind]()
    stored = load_file(ledger.save_weights(model, tmp_path / "m"))
    layers = [(n, m) for n, m in model.named_modules() if callable(getattr(m, "weight", None))]
    assert layers
    for name, layer in layers:
        codes, scale, zero_point = (
            stored[f"{name}.weight.{key}"].double() for key in ("codes", "scale", "zero_point")
        )
        weight = (codes - zero_point.view(-1, 1)) * scale.view(-1, 1)
        torch.testing.assert_close(weight, layer.weight().dequantize().double())
        if layer.bias() is not None:
            assert torch.equal(stored[f"{name}.bias"], layer.bias())


def test_saving_asks_before_overwriting(tmp_path):
    path = ledger.save_weights(mlp(), tmp_path / "m")
    before = path.read_bytes()
    with pytest.raises(FileExistsError, match="overwrite=True"):
        ledger.save_weights(language_model(), path)
    assert path.read_bytes() == before
    ledger.save_weights(language_model(), path, overwrite=True)
    assert path.read_bytes() != before


def test_a_failed_save_leaves_nothing_behind(tmp_path, monkeypatch):
    def interrupted(tensors, path, metadata):
        path.write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr("safetensors.torch.save_file", interrupted)
    with pytest.raises(KeyboardInterrupt):
        ledger.save_weights(mlp(), tmp_path / "m")
    assert list(tmp_path.iterdir()) == []


def test_what_cannot_be_stored_is_named(tmp_path):
    class Odd(nn.Linear):
        def get_extra_state(self):
            return {"secret": 1}

    with pytest.raises(TypeError, match=r"0\._extra_state"):
        ledger.save_weights(nn.Sequential(Odd(2, 2)), tmp_path / "m")
    with pytest.raises(TypeError, match="meta"):
        ledger.byte_ledger(nn.Linear(2, 2, device="meta"))
    assert list(tmp_path.iterdir()) == []


def test_files_of_others_have_no_ledger(tmp_path):
    foreign, text, short = (tmp_path / name for name in ("foreign", "text", "short"))
    save_file({"a": torch.zeros(3)}, foreign)
    text.write_text("no safetensors file at all, but long enough to be one\n" * 9)
    short.write_bytes(b"123")
    for path in (foreign, text, short):
        with pytest.raises(ValueError, match="not written by labkit"):
            ledger.byte_ledger(path)
    with pytest.raises(FileNotFoundError):
        ledger.byte_ledger(tmp_path / "none")


# Loading


@pytest.mark.parametrize("kind", RELOADABLE)
def test_load_is_the_inverse_of_save(kind, tmp_path):
    first = ledger.save_weights(MODELS[kind](), tmp_path / "first")
    model = MODELS[kind](seed=1)
    one = load_file(first)
    other = load_file(ledger.save_weights(model, tmp_path / "other"))
    same = {name for name in one if torch.equal(one[name], other[name])}
    assert all("zero_point" in name or "num_batches" in name for name in same)
    ledger.load_weights(model, first)
    again = ledger.save_weights(model, tmp_path / "again")
    two = load_file(again)
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.parametrize("kind", ["float tied", "packed 4 asymmetric"])
def test_a_loaded_model_computes_the_same(kind, tmp_path, ids):
    saved, model = MODELS[kind](), MODELS[kind](seed=1)
    ledger.load_weights(model, ledger.save_weights(saved, tmp_path / "m"))
    with torch.no_grad():
        assert torch.equal(model(ids[:1]).logits, saved(ids[:1]).logits)


def test_loading_ties_again(tmp_path):
    path = ledger.save_weights(language_model(tied=True), tmp_path / "m")
    model = language_model(tied=False)
    assert model.lm_head.weight is not model.model.embed_tokens.weight
    ledger.load_weights(model, path)
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_loading_is_strict_and_changes_nothing_when_it_fails(tmp_path):
    path = ledger.save_weights(language_model(tied=False), tmp_path / "m")
    tied = language_model(seed=1)
    before = {name: tensor.clone() for name, tensor in tied.state_dict().items()}
    with pytest.raises(ValueError, match=r"1 unknown to the model \(lm_head\.weight"):
        ledger.load_weights(tied, path)
    with pytest.raises(ValueError, match="missing in the file"):
        ledger.load_weights(mlp(), path)
    with pytest.raises(ValueError, match="another shape or dtype"):
        ledger.load_weights(language_model(tied=False).half(), path)
    assert all(torch.equal(tensor, before[name]) for name, tensor in tied.state_dict().items())


def test_what_cannot_be_loaded_is_named(tmp_path):
    model = MODELS["dynamic lstm"]()
    path = ledger.save_weights(model, tmp_path / "m")
    with pytest.raises(TypeError, match=r"cannot fill '0', a layer of torch\.ao"):
        ledger.load_weights(model, path)


# Time


def time_of(function, **options) -> measure.Latency:
    return measure.alternate({"function": function}, **options)["function"]


def test_latency_orders_and_counts():
    calls = []
    quick = time_of(lambda: calls.append(0), repeats=5, warmup=3)
    slow = time_of(lambda: time.sleep(0.05), repeats=3, warmup=0)
    assert len(calls) == 8
    assert quick.seconds < slow.seconds
    assert slow.low >= 0.045
    assert slow.low <= slow.seconds <= slow.high
    assert (slow.runs, slow.threads) == (3, torch.get_num_threads())
    assert "ms" in str(slow)
    assert "3 runs" in str(slow)


def test_latency_is_a_median_with_quartiles(monkeypatch):
    times = iter([9.0, 1.0, 2.0, 3.0, 4.0, 50.0])
    monkeypatch.setattr("labkit.measure._seconds", lambda function: next(times))
    found = time_of(lambda: None, repeats=5, warmup=1)
    assert (found.low, found.seconds, found.high) == (2.0, 3.0, 4.0)


def test_alternate_takes_turns():
    calls = []
    found = measure.alternate(
        {"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, repeats=3, warmup=2
    )
    assert "".join(calls) == "ab" * 5
    assert list(found) == ["a", "b"]
    assert found["a"].runs == 3


def test_timing_refuses_bad_input():
    with pytest.raises(ValueError, match="repeats"):
        time_of(int, repeats=0)
    with pytest.raises(ValueError, match="warmup"):
        time_of(int, warmup=-1)
    with pytest.raises(TypeError, match="function"):
        time_of(3)
    with pytest.raises(ValueError, match="empty"):
        measure.alternate({})


# Memory


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="keeps nothing")
def test_released_memory_goes_back_to_the_system():
    code = (
        "import torch; from labkit import machine\n"
        "a = torch.ones(10_000_000); del a\n"  # from here on glibc takes such blocks from its heap
        "kept = [torch.ones(1_000_000) for _ in range(100)]; last = torch.ones(1_000_000)\n"
        "full = machine.resident_memory(); del kept; freed = machine.resident_memory()\n"
        "machine.release_memory(); print(full, freed, machine.resident_memory())"
    )
    printed = subprocess.check_output([sys.executable, "-c", code], text=True)
    full, freed, released = map(int, printed.split())
    assert full - released > 300e6  # of 400
    assert released <= freed


def test_resident_memory_sees_what_is_allocated():
    machine.release_memory()  # or the block takes the room of what other tests have freed
    before = machine.resident_memory()
    block = torch.ones(25_000_000)
    assert machine.resident_memory() - before == pytest.approx(block.nbytes, rel=0.1)


def test_peak_memory_sees_the_child_and_not_its_parent():
    block = torch.ones(75_000_000)  # 300 MB here
    small = machine.peak_memory("result = 1")
    assert block.sum() > 0
    assert 3e6 < small.nbytes < 60e6
    code = """
        block = bytearray(200_000_000)
        block[::4096] = b"x" * len(block[::4096])
        del block
        result = {"note": "größer", "numbers": [1, 2.5, None]}
        print("something else")
    """
    large = machine.peak_memory(code)
    assert 0.95 * 200e6 < large.nbytes - small.nbytes < 1.2 * 200e6
    assert small.result == 1
    assert large.result == {"note": "größer", "numbers": [1, 2.5, None]}
    assert machine.peak_memory("pass").result is None


@pytest.mark.parametrize(
    ("code", "words"),
    [
        ("1 / 0", "ZeroDivisionError"),
        ("result = object()", "not JSON serializable"),
        ("import sys; sys.exit(0)", "did it leave early"),
        ("import time; time.sleep(60)", "timeout=1"),
    ],
)
def test_peak_memory_reports_failures(code, words):
    with pytest.raises(RuntimeError, match=words):
        machine.peak_memory(code, timeout=1 if "sleep" in code else 60)


# The machine


def test_hardware_facts_agree_with_what_torch_and_the_disk_say():
    found = machine.hardware()
    assert found["torch"] == torch.__version__
    assert found["logical cores"] >= (found["physical cores"] or 1) >= 1
    assert found["memory bytes"] > 2**30
    assert found["cpu"]
    assert ("AVX2" in found["instruction sets"]) == torch.cpu._is_avx2_supported()
    assert ("AVX-512 VNNI" in found["instruction sets"]) == torch.cpu._is_vnni_supported()
    assert ("AMX INT8" in found["instruction sets"]) == torch.cpu._is_amx_tile_supported()
    assert machine.quantized_engine() in found["quantized engines"]


@pytest.mark.parametrize(
    ("processor", "engines", "expected"),
    [
        ("x86_64", ["qnnpack", "onednn", "x86", "fbgemm"], "x86"),
        ("AMD64", ["none", "fbgemm", "qnnpack"], "fbgemm"),
        ("arm64", ["qnnpack", "none"], "qnnpack"),
        ("aarch64", ["qnnpack", "onednn", "x86"], "qnnpack"),
    ],
)
def test_quantized_engine(monkeypatch, processor, engines, expected):
    monkeypatch.setattr("platform.machine", lambda: processor)
    monkeypatch.setattr(torch.backends, "quantized", SimpleNamespace(supported_engines=engines))
    assert machine.quantized_engine() == expected


def test_no_quantized_engine(monkeypatch):
    monkeypatch.setattr(torch.backends, "quantized", SimpleNamespace(supported_engines=["none"]))
    with pytest.raises(RuntimeError, match="no INT8 engine"):
        machine.quantized_engine()


# Ratios of times


def seconds_of(*rounds):
    """Return a function that says it took these seconds, one a call."""
    left = iter(rounds)
    return lambda: next(left)


def test_a_ratio_is_the_median_of_rounds_and_not_the_ratio_of_medians():
    clocks = {"one": seconds_of(9, 1, 4, 6), "other": seconds_of(9, 1, 1, 3)}
    times = lk.alternate(clocks, repeats=3, warmup=1, own_clock=True)
    found = lk.ratio(times["one"], times["other"])
    assert (found.value, found.low, found.high) == (2, 1.5, 3)
    assert found.origin == "quartiles 1.5 to 3 over 3 rounds in turn"
    assert lk.ratio(times["one"], times["other"], factor=10).value == 20


def test_times_taken_apart_have_no_ratio():
    one, other = (lk.alternate({"f": seconds_of(1, 1, 1)}, 2, 1, own_clock=True)["f"] for _ in "ab")
    single, _ = lk.once(lambda: None)
    for pair in ((one, other), (one, single), (single, one)):
        with pytest.raises(ValueError, match="were timed apart; time both"):
            lk.ratio(*pair)


def test_one_call_is_timed_and_its_result_kept():
    latency, result = lk.once(lambda: time.sleep(0.05) or "kept")
    assert result == "kept"
    assert latency.runs == 1
    assert 0.05 <= latency.seconds < 5
    assert lk.ratio(latency, latency).value == 1
    assert lk.ratio(latency, latency).origin.startswith("one run each")


def test_a_busy_machine_is_said(monkeypatch):
    monkeypatch.setattr(measure._OtherPrograms, "share", lambda self: 0.5)
    times = lk.alternate({"a": lambda: None, "b": lambda: None})
    assert times["a"].busy
    assert str(times["a"]).endswith(", on a busy machine)")
    assert lk.ratio(times["a"], times["b"]).origin.endswith("in turn, on a busy machine")


def test_other_programs_are_told_from_this_one():
    def burn(seconds: float) -> None:
        end = time.perf_counter() + seconds
        while time.perf_counter() < end:
            pass

    others = measure._OtherPrograms()
    burn(0.5)
    own = others.share()
    code = "import time; end = time.perf_counter() + 60\nwhile time.perf_counter() < end: pass"
    children = [subprocess.Popen([sys.executable, "-c", code]) for _ in range(os.cpu_count())]
    try:
        time.sleep(0.5)  # until they run
        others = measure._OtherPrograms()
        time.sleep(1)
        assert others.share() > max(0.5, own)
    finally:
        for child in children:
            child.kill()
            child.wait()
