"""Texts are the same everywhere, of documents of their own, and a mix-up is refused."""

import hashlib
import zipfile

import pytest
import torch

import labkit as lk
from labkit import models, texts
from labkit.authoring import self_written


@pytest.mark.parametrize("name", texts.SHA256)
def test_a_text_is_the_one_whose_hash_is_known(name):
    text = lk.text(name)
    assert hashlib.sha256(text.encode()).hexdigest() == texts.SHA256[name]
    assert len(texts.paragraphs(text)) > 80


def test_each_text_is_for_one_purpose():
    assert set(texts.EVALUATION) | set(texts.CALIBRATION) == set(texts.SHA256)
    assert not set(texts.EVALUATION) & set(texts.CALIBRATION)


@pytest.mark.parametrize("name", texts.CALIBRATION)
def test_no_paragraph_is_both_fitted_and_judged(name):
    texts.refuse_judged(lk.text(name))


def test_a_judged_paragraph_among_others_is_refused_and_named():
    judged = texts.paragraphs(lk.text("news"))[100]
    mixed = "\n\n".join(["A paragraph that nobody judges anything on.", f"  {judged}\n"])
    with pytest.raises(ValueError, match="evaluation text 'news'") as caught:
        texts.refuse_judged(mixed)
    assert judged[:50] in str(caught.value)


def test_an_unknown_text_is_told_which_exist():
    for name in ("eval", "", None, 3):
        with pytest.raises(ValueError, match="name must be one of 'news', 'docs', 'encyclopedia'"):
            lk.text(name)


def test_a_short_cut_of_a_text_holds_many_documents():
    articles = [[f"{i} " + "x" * 600 for _ in range(9)] for i in range(5)]
    cut = texts._in_turn(articles, run=1500).split("\n\n")[:15]
    assert [p[0] for p in cut] == [str(i) for i in range(5) for _ in range(3)]
    assert sorted(texts._in_turn(articles, run=500).split("\n\n")) == sorted(
        p for a in articles for p in a
    )


def test_markup_is_left_out_of_articles():
    page = (
        "'''Albedo''' is the [[ratio|share]] of light{{cite|{{x}}}} that a [[surface]] "
        "reflects.&lt;ref name=&quot;a&quot;&gt;A note.&lt;/ref&gt; " + "It is a number. " * 20
    )
    assert texts._plain(f"* a list\n\n{page.strip()}\n== Head ==\n{{| table |}}") == [
        "Albedo is the share of light that a surface reflects. " + ("It is a number. " * 20).strip()
    ]


def test_another_wheel_is_refused(tmp_path, monkeypatch):
    wheel = tmp_path / "gensim.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(texts._NEWS, "Something else.\n")
        archive.writestr(texts._WIKI, b"BZh9\x17rE8P\x90\x00\x00\x00\x00")  # nothing, compressed
    with pytest.raises(texts.GENSIM.error, match="SHA-256"):
        texts._make(wheel, tmp_path / "texts")


def test_the_self_written_text_is_smollm2s():
    """Of sampled text, the mean nats a token are the mean entropy of the model's own answers."""
    model, tokenizer = lk.load_model("smollm2")
    ids = lk.windows(tokenizer, "self-written", 12, 128)
    with torch.no_grad():
        rows = [model(row).logits[0, :-1] for row in ids.split(1)]
    entropy = torch.stack(
        [torch.distributions.Categorical(logits=r).entropy().mean() for r in rows]
    )
    apart = lk.perplexity(model, ids).window_nats - entropy
    assert abs(apart.mean()) < 3 * apart.std() / len(apart) ** 0.5
    assert abs(apart.mean()) < 0.1 * entropy.mean()
    again = self_written.write(model, n_samples=1, length=12)
    assert again.shape == (3, 12)


def test_unfit_samples_are_left_out():
    _, tokenizer = models.load_model("tiny")
    rows = [tokenizer(text)["input_ids"] for text in ("A sexy thing.", "A fine thing.")]
    assert self_written.as_text(tokenizer, rows) == "A fine thing."
