"""Exercise 3.5: `distillation_loss` is how far a student is from its teacher, in nats per token.

The reference is the definition in numpy, in float64.
"""

import math

import numpy as np
import torch

from labkit.exercises.judge import Exercise, call, is_precise_scalar, judge, kind, show


def _check(function) -> None:
    random = torch.Generator().manual_seed(33)
    even = torch.zeros(1, 1, 2)
    cases = [(even, torch.tensor([[[math.log(3.0), 0.0]]])), (even, even.clone())]
    for shape in ((2, 3, 5), (1, 7, 11), (4, 2, 3), (3, 16, 20)):
        for size in (1.0, 4.0, 60.0):
            pair = [size * torch.randn(shape, generator=random) for _ in range(2)]
            cases.append(tuple(pair))
    judge("distillation_loss", function, cases, _examine, _WRONG)


def _log_softmax(logits: torch.Tensor) -> np.ndarray:
    x = logits.double().numpy()
    x = x - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


def _examine(student, teacher, got) -> str | None:
    written = call("distillation_loss", student, teacher)
    if not is_precise_scalar(got):
        return f"{written} returns {kind(got)}, expected a float32 tensor of shape ()"
    s, t = _log_softmax(student), _log_softmax(teacher)
    expected = float((np.exp(t) * (t - s)).sum(-1).mean())
    if abs(float(got) - expected) <= 1e-4 * max(0.1, expected):
        return None
    return f"{written} gives {show(float(got))}, expected {show(expected)}"


def _kl(student, teacher, dim=-1):
    s, t = student.log_softmax(dim), teacher.log_softmax(dim)
    return t.exp() * (t - s)


def reversed_divergence(student, teacher):
    """Swaps the two distributions."""
    return _kl(teacher, student).sum(-1).mean()


def mean_over_the_vocabulary(student, teacher):
    """Averages over the vocabulary as well (reduction="mean")."""
    return _kl(student, teacher).mean()


def mean_over_windows_only(student, teacher):
    """Divides by the windows, not by the tokens (reduction="batchmean")."""
    return _kl(student, teacher).sum() / len(student)


def softmax_over_time(student, teacher):
    """Normalizes along the tokens."""
    return _kl(student, teacher, dim=1).sum(-1).mean()


def probabilities_as_logs(student, teacher):
    """Hands probabilities of the student to a function that expects their logarithms."""
    t = teacher.log_softmax(-1)
    return (t.exp() * (t - student.softmax(-1))).sum(-1).mean()


def squared_logits(student, teacher):
    """Compares logits, whose common offset means nothing."""
    return (student - teacher).square().mean()


def cross_entropy_with_the_teacher(student, teacher):
    """Leaves out the teacher's own entropy: not 0 for equal models."""
    return -(teacher.softmax(-1) * student.log_softmax(-1)).sum(-1).mean()


def log_of_the_softmax(student, teacher):
    """Takes the logarithm of a softmax that has underflowed."""
    s, t = student.softmax(-1), teacher.softmax(-1)
    return (t * (t.log() - s.log())).sum(-1).mean()


_WRONG = (
    (reversed_divergence, "the teacher's probabilities are the weights; you took the student's"),
    (mean_over_the_vocabulary, "sum over the vocabulary; average over the tokens only"),
    (mean_over_windows_only, "average over all tokens, not only over the windows"),
    (softmax_over_time, "the softmax runs over the vocabulary, the last dimension"),
    (probabilities_as_logs, "the student enters by its log-probabilities"),
    (squared_logits, "compare distributions, not logits: a constant added to all means nothing"),
    (cross_entropy_with_the_teacher, "equal models must give 0: the teacher's entropy is missing"),
    (log_of_the_softmax, "the softmax underflows to 0, whose logarithm is -inf: use log_softmax"),
)


def distillation_with_torch(student, teacher):
    """Torch's own divergence, on tokens in one row."""
    s, t = (x.flatten(0, 1).log_softmax(-1) for x in (student, teacher))
    return torch.nn.functional.kl_div(s, t, reduction="batchmean", log_target=True)


def distillation_by_two_entropies(student, teacher):
    """Cross-entropy minus entropy, in float64."""
    s, t = student.double().log_softmax(-1), teacher.double().log_softmax(-1)
    return (t.exp() * t).sum(-1).mean().float() - (t.exp() * s).sum(-1).mean().float()


EXERCISE = Exercise(
    id="3.5",
    title="A loss that listens to the teacher",
    stars=2,
    minutes=15,
    function_names=("distillation_loss",),
    check=_check,
    takeaway="A teacher answers with a whole distribution at each token, not with one right word.",
    wrong_answers=_WRONG,
    variants=(distillation_with_torch, distillation_by_two_entropies),
)
