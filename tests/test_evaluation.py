"""Loss, divergence and agreement against independent formulas; intervals by Student's t."""

import copy

import pytest
import torch
from scipy import stats

import labkit as lk
from labkit import evaluation as q


@pytest.fixture(scope="module")
def tiny():
    return lk.load_model("tiny", device="cpu")


@pytest.fixture(scope="module")
def reference(tiny):
    return lk.reference(*tiny, n_windows=3, length=48)


def noisy(model, size):
    torch.manual_seed(0)
    other = copy.deepcopy(model)
    with torch.no_grad():
        for p in other.model.layers.parameters():
            p += size * p.std() * torch.randn_like(p)
    return other


def test_a_model_is_no_distance_from_itself(tiny, reference):
    found = lk.quality(tiny[0], reference)
    assert list(found) == ["news", "docs"]
    for on in found.values():
        assert abs(on.loss.value) < 1e-6
        assert abs(on.kl.value) < 1e-6
        assert on.same.value == 1


def test_the_reference_scores_as_perplexity_does(tiny, reference):
    for name, ids in reference.ids.items():
        wanted, found = lk.perplexity(tiny[0], ids), reference.perplexity[name]
        torch.testing.assert_close(found.token_nats, wanted.token_nats, rtol=1e-4, atol=1e-5)
        assert found.perplexity == pytest.approx(wanted.perplexity, rel=1e-4)


def test_three_numbers_are_what_the_formulas_say(tiny, reference):
    other = noisy(tiny[0], 0.3)
    found = lk.quality(other, reference)
    for name, ids in reference.ids.items():
        with torch.no_grad():
            p, r = (net(ids).logits[:, :-1].double() for net in (tiny[0], other))
        categorical = [torch.distributions.Categorical(logits=x) for x in (p, r)]
        kl = torch.distributions.kl_divergence(*categorical).mean(1)
        nats = [-c.log_prob(ids[:, 1:]).mean(1) for c in categorical]
        same = (p.argmax(-1) == r.argmax(-1)).double().mean(1)
        on = found[name]
        torch.testing.assert_close(on.kl.by_window, kl, rtol=1e-3, atol=1e-5)
        torch.testing.assert_close(on.loss.by_window, nats[1] - nats[0], rtol=1e-3, atol=1e-5)
        torch.testing.assert_close(on.same.by_window, same)


def test_the_reference_stays_when_the_model_changes(tiny, reference):
    model = copy.deepcopy(tiny[0])
    kept = lk.reference(model, tiny[1], n_windows=2, length=32)
    with torch.no_grad():
        model.lm_head.weight *= 0.5
    assert lk.quality(model, kept)["news"].kl.value > 0.01
    assert lk.quality(tiny[0], kept)["news"].kl.value < 1e-6


def test_training_mode_is_given_back(tiny, reference):
    model = copy.deepcopy(tiny[0]).train()
    model.model.layers[0].eval()
    lk.quality(model, reference)
    assert model.training
    assert not model.model.layers[0].training


def test_intervals_are_students():
    values = torch.tensor([0.1, 0.4, 0.2, 0.3], dtype=torch.float64)
    found = q.Estimate(values)
    low, high = stats.t.interval(0.95, 3, loc=values.mean(), scale=stats.sem(values))
    assert found.value - found.margin == pytest.approx(low)
    assert found.value + found.margin == pytest.approx(high)
    assert found.sign == 1
    assert q.Estimate(values - 0.2).sign == 0
    assert q.Estimate(values - 0.9).sign == -1
    assert str(found) == f"+0.250 ± {high - 0.25:.3f}"


def made(**losses):
    return q.Quality(
        {
            name: q.TextQuality(*(q.Estimate(torch.tensor(x).double()) for x in (values,) * 3))
            for name, values in losses.items()
        }
    )


@pytest.mark.parametrize(
    ("one", "other", "said"),
    [
        (((1.0, 1.1, 0.9), (2.0, 2.1, 1.9)), ((2.0, 2.1, 1.8), (3.0, 3.2, 2.9)), "better"),
        (((2.0, 2.1, 1.8), (3.0, 3.2, 2.9)), ((1.0, 1.1, 0.9), (2.0, 2.1, 1.9)), "worse"),
        (((1.0, 1.1, 0.9), (2.0, 2.1, 1.9)), ((1.1, 0.9, 1.0), (1.9, 2.2, 2.0)), "tie"),
        (((1.0, 1.1, 0.9), (3.0, 3.1, 2.9)), ((2.0, 2.1, 1.8), (2.0, 2.2, 1.9)), "depends"),
        (((1.0, 1.1, 0.9), (2.0, 2.1, 1.9)), ((2.0, 2.1, 1.8), (1.9, 2.2, 2.0)), "depends"),
    ],
)
def test_a_winner_wins_on_both_texts(one, other, said):
    one, other = (made(news=values[0], docs=values[1]) for values in (one, other))
    assert q.verdict(one, other).startswith(said)
    opposite = {"better": "worse", "worse": "better"}.get(said, said)
    assert q.verdict(one, other, by="same").startswith(opposite)


def test_bad_input_is_refused(tiny, reference):
    with pytest.raises(ValueError, match="n_windows must be at least 2"):
        lk.reference(*tiny, n_windows=1)
    with pytest.raises(ValueError, match="name must be one of"):
        lk.reference(*tiny, texts=["newspaper"])
    with pytest.raises(ValueError, match="by must be"):
        q.verdict(made(a=(1.0, 2.0)), made(a=(1.0, 2.0)), by="nats")
    with pytest.raises(ValueError, match="same texts"):
        q.verdict(made(a=(1.0, 2.0)), made(b=(1.0, 2.0)))
    with pytest.raises(ValueError, match="same windows"):
        q.verdict(made(a=(1.0, 2.0)), made(a=(1.0, 2.0, 3.0)))
    scaled = copy.deepcopy(tiny[0])
    scaled.lm_head.register_forward_hook(lambda module, x, logits: logits * 0.5)
    with pytest.raises(TypeError, match="not those of its head alone"):
        lk.reference(scaled, tiny[1], n_windows=2, length=16)


def test_windows_in_a_batch_count_as_they_do_alone(tiny, reference):
    other = noisy(tiny[0], 0.3)
    alone, together = lk.quality(other, reference), lk.quality(other, reference, batch_size=2)
    for name, on in alone.items():
        for kind in ("loss", "kl", "same"):
            pair = (getattr(each[name], kind).by_window for each in (alone, together))
            torch.testing.assert_close(*pair, rtol=1e-4, atol=1e-5)
        assert on.kl.by_window.std() > 0  # so a mix-up of windows would show
    batched = lk.reference(*tiny, n_windows=3, length=48, batch_size=3)
    for name, answers in reference.answers.items():
        torch.testing.assert_close(batched.answers[name], answers, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("batch_size", [0, -1])
def test_a_batch_without_windows_is_refused(tiny, reference, batch_size):
    with pytest.raises(ValueError, match="batch_size must be at least 1"):
        lk.quality(tiny[0], reference, batch_size)
    with pytest.raises(ValueError, match="batch_size must be at least 1"):
        lk.reference(*tiny, n_windows=2, length=16, batch_size=batch_size)


def test_answers_too_large_to_keep_are_computed_anew(monkeypatch):
    model, tokenizer = lk.load_model("tiny", device="cpu")
    other = copy.deepcopy(model)
    other.lm_head.weight.data = other.lm_head.weight + 0.01
    kept = lk.reference(model, tokenizer, 3, 20)
    monkeypatch.setattr(q, "_KEPT", 0)
    anew = lk.reference(model, tokenizer, 3, 20)
    assert kept.head is None
    assert anew.answers["news"].shape == (3, 19, model.config.hidden_size)
    model.lm_head.weight.data.zero_()  # what is kept is a copy
    expected = lk.quality(other, kept)
    assert str(lk.quality(other, anew)) == str(expected)
    assert expected["news"].kl.value > 1e-3
