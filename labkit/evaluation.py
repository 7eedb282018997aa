"""How far a model is from a reference on several texts: loss, KL divergence, same next token."""

from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import nn

from labkit.data import windows
from labkit.measure import Perplexity, check_ids, evaluating, summarize, t_margin
from labkit.texts import EVALUATION

_CHUNK = 128  # tokens whose logits of two models are in memory at once
_KEPT = 2**28  # bytes of the reference's own answers that are worth their memory


@dataclass(frozen=True, eq=False)
class Estimate:
    """A mean over windows and half the width of its 95 % interval (Student's t).

    Attributes:
        by_window: float64 `(n_windows,)`, what it is the mean of.
    """

    by_window: torch.Tensor = field(repr=False)

    @property
    def value(self) -> float:
        return self.by_window.mean().item()

    @property
    def margin(self) -> float:
        return t_margin(self.by_window)

    @property
    def sign(self) -> int:
        """1 or −1 if the interval lies above or below 0, else 0."""
        return 0 if abs(self.value) <= self.margin else (1 if self.value > 0 else -1)

    def __str__(self) -> str:
        return f"{self.value:+.3f} ± {self.margin:.3f}"

    def __sub__(self, other: "Estimate") -> "Estimate":
        """Return the difference, paired by window."""
        if self.by_window.shape != other.by_window.shape:
            shapes = tuple(self.by_window.shape), tuple(other.by_window.shape)
            raise ValueError(f"estimates must be over the same windows, not {shapes}")
        return Estimate(self.by_window - other.by_window)


@dataclass(frozen=True)
class TextQuality:
    """Distance of a model from its reference on one text.

    Attributes:
        loss: nats per token above the reference; below 0 the model predicts better.
        kl: Kullback–Leibler divergence of the model from the reference, nats per token.
        same: share of places where both hold the same token most likely.
    """

    loss: Estimate
    kl: Estimate
    same: Estimate


class Quality(dict[str, TextQuality]):
    """`TextQuality` by the name of the text; printed, a line for each text."""

    def __str__(self) -> str:
        lines = [f"{'':14}{'loss, nats':>18}{'KL, nats':>18}{'same token':>18}"]
        for name, on in self.items():
            same = f"{on.same.value:.1%} ± {on.same.margin:.1%}"
            lines.append(f"{name:14}{on.loss!s:>18}{on.kl!s:>18}{same:>18}")
        return "\n".join(lines)


@dataclass(frozen=True, eq=False)
class Reference:
    """What a model answers on the evaluation texts, kept so that it runs only once.

    Attributes:
        ids: int64 `(n_windows, length)` by the name of the text.
        perplexity: the model's own, by text.
        answers: by text, log-probabilities, float32 `(n_windows, length − 1, vocabulary)`. Where
            these would take more than 256 MB: what its head reads, `(…, hidden)`.
        head: in this second case a copy of its head's weight, `(vocabulary, hidden)`; else None.
    """

    ids: dict[str, torch.Tensor]
    perplexity: dict[str, Perplexity]
    answers: dict[str, torch.Tensor] = field(repr=False)
    head: torch.Tensor | None = field(repr=False)


@torch.inference_mode()
def reference(
    model: nn.Module,
    tokenizer,
    n_windows: int = 8,
    length: int = 256,
    texts: Iterable[str] = EVALUATION,
    batch_size: int = 1,
    spread: bool = False,
) -> Reference:
    """Run a model on the evaluation texts, to compare others with it by `quality`.

    Args:
        model: a causal LM of transformers whose logits are `lm_head` of its last hidden states.
        tokenizer: its tokenizer.
        n_windows, length: how many windows of each text, of how many tokens.
        texts: their names, see `labkit.texts.text`.
        batch_size: windows a call, see `quality`.
        spread: windows from all over each text, see `windows`.

    Raises:
        TypeError: if the model's logits come from elsewhere.
        ValueError: see `windows`; with fewer than 2 windows there is no interval.
    """
    if n_windows < 2:
        raise ValueError(f"n_windows must be at least 2, for an interval, not {n_windows}")
    ids = {name: windows(tokenizer, name, n_windows, length, spread) for name in texts}
    ids = {name: rows.to(model.device) for name, rows in ids.items()}
    some = next(iter(ids))
    with evaluating(model):
        hidden = {name: _hidden(model, rows, batch_size) for name, rows in ids.items()}
        expected = model(ids[some][:1]).logits
    logits = nn.functional.linear(hidden[some][:1], model.lm_head.weight)
    if (expected - logits).norm() > 0.01 * logits.norm():  # a batch rounds unlike a window alone
        raise TypeError(f"{type(model).__name__}: its logits are not those of its head alone")
    head = model.lm_head.weight.detach()
    keep = 4 * len(head) * sum(rows.numel() for rows in ids.values()) <= _KEPT
    found = {
        name: _answers(states[:, :-1], ids[name], head, keep) for name, states in hidden.items()
    }
    scores, answers = ({name: pair[i] for name, pair in found.items()} for i in range(2))
    return Reference(ids, scores, answers, None if keep else head.clone())


def _log_p(hidden: torch.Tensor, head: torch.Tensor) -> torch.Tensor:
    return nn.functional.linear(hidden, head).log_softmax(-1)


def _answers(
    hidden: torch.Tensor, ids: torch.Tensor, head: torch.Tensor, keep: bool
) -> tuple[Perplexity, torch.Tensor]:
    # The model's own perplexity, and its log-probabilities, or what they come from.
    nats, kept = [], []
    for states, window in zip(hidden, ids, strict=True):
        log_p = _log_p(states, head)
        nats.append(nn.functional.nll_loss(log_p, window[1:], reduction="none").double())
        kept.append(log_p if keep else states)
    return summarize(torch.stack(nats).cpu()), torch.stack(kept)


def _hidden(model: nn.Module, ids: torch.Tensor, batch_size: int) -> torch.Tensor:
    check_ids(model, ids, batch_size)
    return torch.cat(
        [model.model(part).last_hidden_state.float() for part in ids.split(batch_size)]
    )


def quality(model: nn.Module, reference: Reference, batch_size: int = 1) -> Quality:
    """Compare a model with a reference on the texts that the reference holds, in eval mode.

    Args:
        model: called as `model(ids)`; returns logits `(batch, length, vocabulary)`, bare or as
            `.logits`. For errors see `measure.check_ids`.
        reference: from `reference`, with the same tokenizer.
        batch_size: windows a call. More are faster, but one at a time is right for a model whose
            windows are not independent, such as one that rounds a whole batch with one scale.
    """
    with evaluating(model):
        return Quality(
            {name: _on_text(model, reference, name, batch_size) for name in reference.ids}
        )


@torch.inference_mode()
def _on_text(model: nn.Module, reference: Reference, name: str, batch_size: int) -> TextQuality:
    ids = reference.ids[name]
    check_ids(model, ids, batch_size)
    expected, found = reference.answers[name], []
    for rows, answers in zip(ids.split(batch_size), expected.split(batch_size), strict=True):
        output = model(rows)
        logits = getattr(output, "logits", output)[:, :-1]
        tokens = (x.flatten(0, 1).split(_CHUNK) for x in (logits, answers, rows[:, 1:]))
        for own, log_p, targets in zip(*tokens, strict=True):
            if reference.head is not None:
                log_p = _log_p(log_p, reference.head)
            found.append(_compare(own, log_p, targets))
    nats, kl, same = torch.cat(found, dim=1).unflatten(1, (len(ids), -1)).mean(-1).cpu()
    return TextQuality(
        Estimate(nats - reference.perplexity[name].window_nats), Estimate(kl), Estimate(same)
    )


def _compare(logits: torch.Tensor, log_p: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    # By token, float64: its nats, the divergence, and 1 where both hold the same token most likely.
    log_q = logits.float().log_softmax(-1)
    nats = nn.functional.nll_loss(log_q, targets, reduction="none")
    same = log_q.max(-1).indices == log_p.max(-1).indices  # faster than argmax
    kl = nn.functional.kl_div(log_q, log_p, log_target=True, reduction="none").sum(-1)
    return torch.stack([nats.double(), kl.double(), same.double()])


def verdict(one: Quality, other: Quality, by: str = "loss") -> str:
    """Say whether the first of two models is better, on every text.

    Args:
        one, other: from `quality` with the same reference.
        by: `"loss"`, `"kl"` or `"same"`.

    Returns:
        `"better"` or `"worse"` if it is so on each text beyond its interval; `"tie"` if it is on
        none; else `"depends on the text"`.
    """
    if by not in ("loss", "kl", "same"):
        raise ValueError(f'by must be "loss", "kl" or "same", not {by!r}')
    if list(one) != list(other):
        raise ValueError(f"one and other must be on the same texts, not {[*one]} and {[*other]}")
    better = 1 if by == "same" else -1
    signs = {better * (getattr(one[t], by) - getattr(other[t], by)).sign for t in one}
    names = {1: "better", -1: "worse", 0: "tie"}
    return names[signs.pop()] if len(signs) == 1 else "depends on the text"
