"""The texts do not overlap, the digits are what they seem, and the tiny LM has learned."""

import json

import numpy as np
import pytest
import torch

import labkit as lk
from labkit import data, models, texts
from labkit.authoring import pretrain


@pytest.fixture(scope="module")
def train_text():
    return lk.text("train")


def test_python_texts_share_no_paragraph():
    fit, judge, train = (
        set(texts.paragraphs(lk.text(name))) for name in (*data.REFERENCE, "train")
    )
    assert min(map(len, (fit, judge, train))) > 500
    assert not fit & judge
    assert not train & (fit | judge)


def test_held_out_docstrings_are_not_trained_on():
    kept, held = data.docstrings(["stdlib"]), data.docstrings(["stdlib"], held_out=True)
    assert len(held) > 30
    assert not set(kept) & set(held)


def test_windows_are_the_text_in_order():
    _, tokenizer = lk.load_model("tiny")
    rows = lk.windows(tokenizer, "news", 3, 64)
    assert rows.shape == (3, 64)
    assert rows.dtype == torch.int64
    assert lk.text("news").startswith(tokenizer.decode(rows.flatten()))


@pytest.mark.parametrize(("n_windows", "length"), [(1, 2), (7, 64), (240, 128)])
def test_windows_of_docstrings_are_those_of_the_whole_text(train_text, n_windows, length):
    _, tokenizer = lk.load_model("tiny")
    rows = lk.windows(tokenizer, "train", n_windows, length)
    ids = tokenizer(train_text, verbose=False, add_special_tokens=False)["input_ids"]
    assert rows.flatten().tolist() == ids[: n_windows * length]


def test_spread_windows_come_from_all_over_the_text():
    _, tokenizer = lk.load_model("tiny")
    rows, text = lk.windows(tokenizer, "news", 6, 48, spread=True), lk.text("news")
    assert rows.shape == (6, 48)
    at = [text.index("\n\n" + tokenizer.decode(row)) / len(text) for row in rows]
    assert at == pytest.approx([(2 * i + 1) / 12 for i in range(6)], abs=0.02)


@pytest.mark.parametrize(
    ("name", "n", "said"), [("train", 2, "spread does not go"), ("news", 10**4, "has only [0-9]+$")]
)
def test_windows_that_cannot_be_spread_are_refused(name, n, said):
    _, tokenizer = lk.load_model("tiny")
    with pytest.raises(ValueError, match=said):
        lk.windows(tokenizer, name, n, 48, spread=True)


def test_calibration_windows_take_every_kind_in_turn():
    _, tokenizer = lk.load_model("tiny")
    rows = lk.windows(tokenizer, "calibration", 7, 64)
    kinds = len(texts.CALIBRATION)
    for i, kind in enumerate(texts.CALIBRATION):
        of_kind = lk.windows(tokenizer, kind, len(rows[i::kinds]), 64)
        assert torch.equal(rows[i::kinds], of_kind)
    assert torch.equal(lk.windows(tokenizer, "calibration", 5, 64), rows[:5])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("test", 1, 8), "name must be one of 'news'"),
        (("news", 0, 8), "n_windows must be at least 1"),
        (("news", 1, 0), "length must be at least 1"),
        (("news", 100_000, 512), "the text 'news' has only"),
        (("calibration", 100_000, 512), "the text '[a-z-]+' has only"),
    ],
)
def test_bad_windows_are_refused(arguments, message):
    _, tokenizer = lk.load_model("tiny")
    with pytest.raises(ValueError, match=message):
        lk.windows(tokenizer, *arguments)


def test_own_text_is_cut_alike_and_refused_where_it_is_judged():
    _, tokenizer = lk.load_model("tiny")
    rows = lk.own_windows(tokenizer, lk.text("encyclopedia"), 3, 64)
    assert torch.equal(rows, lk.windows(tokenizer, "encyclopedia", 3, 64))
    with pytest.raises(ValueError, match="shares a paragraph with the evaluation text 'docs'"):
        lk.own_windows(tokenizer, lk.text("code") + "\n\n" + lk.text("docs")[5000:9000], 1, 8)
    with pytest.raises(ValueError, match="the text of your own has only"):
        lk.own_windows(tokenizer, "Too short.", 3, 64)


def test_an_unknown_package_is_named():
    with pytest.raises(ValueError, match="no_such_package"):
        data.docstrings(["no_such_package"])


def test_digits_are_split_scaled_and_the_same_each_time():
    x, y, x_test, y_test = lk.digits(28)
    assert (x.shape, x_test.shape) == ((1347, 784), (450, 784))
    assert x.min() >= 0
    assert x.max() <= 1
    assert sorted(y.unique().tolist()) == list(range(10))
    assert not {tuple(row) for row in x_test.tolist()} & {tuple(row) for row in x.tolist()}
    assert torch.equal(lk.digits(28)[0], x)
    assert lk.digits(8)[0].shape == (1347, 64)
    with pytest.raises(ValueError, match="size must be at least 1"):
        lk.digits(0)
    assert len(y) + len(y_test) == 1797


def ngram_perplexity(train: np.ndarray, test: np.ndarray, vocabulary: int) -> tuple[float, float]:
    """Unigram and trigram perplexity, Witten-Bell smoothing (Chen and Goodman 1996)."""
    train, test = train.astype(np.int64), test.astype(np.int64)

    def count(keys):
        values, counts = np.unique(keys, return_counts=True)
        return lambda asked: np.where(
            values[(at := np.searchsorted(values, asked).clip(max=len(values) - 1))] == asked,
            counts[at],
            0,
        ).astype(float)

    pairs = train[:-1] * vocabulary + train[1:]
    triples = pairs[:-1] * vocabulary + train[2:]
    one, two, three = count(train), count(pairs), count(triples)
    kinds_two = count(np.unique(pairs) // vocabulary)
    kinds_three = count(np.unique(triples) // vocabulary)
    a, b, c = test[:-2], test[1:-1], test[2:]
    p1 = (one(c) + 1) / (len(train) + vocabulary)
    p2 = (two(b * vocabulary + c) + kinds_two(b) * p1) / (one(b) + kinds_two(b))
    ab = a * vocabulary + b
    seen = two(ab) + kinds_three(ab)
    p3 = (three(ab * vocabulary + c) + kinds_three(ab) * p2) / np.maximum(seen, 1)
    p3 = np.where(seen > 0, p3, p2)
    return tuple(float(np.exp(-np.log(p).mean())) for p in (p1, p3))


def test_tiny_beats_a_unigram_and_a_trigram_of_its_own_training_text():
    model, tokenizer = lk.load_model("tiny", device="cpu")
    train = pretrain.encode_stream(tokenizer, data.docstrings(pretrain.PACKAGES)).numpy()
    windows = lk.windows(tokenizer, "reference-judge", 32, 250)
    unigram, trigram = ngram_perplexity(train, windows.flatten().numpy(), 2048)
    tiny = lk.perplexity(model, windows).perplexity
    assert tiny < trigram / 2, (tiny, trigram)
    assert tiny < unigram / 10, (tiny, unigram)


def test_a_greedy_sample_reads_like_documentation():
    model, tokenizer = lk.load_model("tiny")
    sample = lk.generate(model, tokenizer, "Return the number of", 60)
    assert "Parameters\n----------" in sample or "Returns" in sample


def test_the_log_is_of_these_weights():
    facts, *steps = map(
        json.loads, (models.TINY_FOLDER / "train_log.jsonl").read_text().split("\n")[:-1]
    )
    model, _ = lk.load_model("tiny")
    assert facts["parameters"] == sum(p.numel() for p in model.parameters())
    assert steps[-1]["held_out_nats_per_token"] < steps[0]["held_out_nats_per_token"] - 2


def test_pretraining_learns_in_a_few_steps(tmp_path, monkeypatch):
    monkeypatch.setattr(pretrain, "PACKAGES", ("platformdirs", "matplotlib"))
    pretrain.pretrain(tmp_path, n_steps=100, batch_size=4, length=64)
    records = [json.loads(line) for line in (tmp_path / "train_log.jsonl").read_text().splitlines()]
    assert records[-1]["step"] == 100
    assert records[-1]["held_out_nats_per_token"] < 7.3  # ln 2048 = 7.62 is knowing nothing
    assert (tmp_path / "model.safetensors").exists()
