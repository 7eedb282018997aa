"""Exercise 7.5, a bug hunt: `distillation_loss` should mix labels with a teacher's soft answers.

The reference is the loss and its gradient in numpy, in float64, by the definition.
"""

import math

import numpy as np
import torch
from torch import nn

from labkit.exercises.judge import Exercise, call, is_precise_scalar, judge, kind, show


class _Outcome(tuple):
    """What `same` compares of a loss; `loss`, `student` and `teacher` (gradients) as they came."""


def _with_gradients(function, summary):
    def answer(student, teacher, labels, temperature, hard):
        with torch.enable_grad():
            logits = student.requires_grad_(), teacher.requires_grad_()
            loss = function(*logits, labels, temperature, hard)
            if not is_precise_scalar(loss):
                return loss
            if loss.requires_grad:
                loss.backward()
        gradients = [np.zeros(x.shape) if x.grad is None else x.grad.numpy() for x in logits]
        outcome = _Outcome(summary(loss.item(), *gradients))
        outcome.loss, (outcome.student, outcome.teacher) = loss.item(), gradients
        return outcome

    return answer


def _loss_and_its_slope(loss, student, teacher):
    return loss, float(np.linalg.norm(student))


def _reaches_the_teacher(loss, student, teacher):
    return (bool(teacher.any()),)


def _cases():
    even, sure = torch.zeros(1, 1, 2), torch.tensor([[[2 * math.log(3.0), 0.0]]])
    first = torch.zeros(1, 1, dtype=torch.int64)
    yield even, sure, first, 2.0, 0.5
    yield even, sure, first, 2.0, 0.0
    random = torch.Generator().manual_seed(75)
    for batch, time, words, temperature, hard, size in (
        (2, 3, 5, 2.0, 0.25, 1), (3, 2, 4, 4.0, 0.0, 3), (1, 6, 7, 1.0, 0.75, 2),
        (4, 5, 3, 3.0, 0.5, 1), (2, 1, 6, 0.5, 0.25, 1), (2, 4, 9, 2.0, 1.0, 2),
        (3, 7, 11, 2.0, 0.9, 4), (5, 3, 8, 1.5, 0.125, 2), (2, 8, 16, 1.0, 0.25, 70),
        (3, 4, 6, 2.5, 0.0, 2), (2, 3, 4, 4.0, 0.25, 70),
    ):  # fmt: skip
        student, teacher = size * torch.randn(2, batch, time, words, generator=random)
        labels = torch.randint(words, (batch, time), generator=random)
        yield student, teacher, labels, temperature, hard
    yield student, student.clone(), labels, 3.0, 0.0


def _check(function) -> None:
    name = "distillation_loss"
    for summary, examine in (
        (_loss_and_its_slope, _examine_loss),
        (_reaches_the_teacher, _examine_teacher),
    ):
        wrong_answers = tuple((_with_gradients(w, summary), text) for w, text in _WRONG)
        answer = _with_gradients(function, summary)
        judge(name, answer, _cases(), examine, wrong_answers)


def _log_softmax(logits: torch.Tensor, temperature: float = 1.0) -> np.ndarray:
    x = logits.double().numpy() / temperature
    x = x - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


def _examine_loss(student, teacher, labels, temperature, hard, got) -> str | None:
    written = call("distillation_loss", student, teacher, labels, temperature, hard)
    if not isinstance(got, _Outcome):
        return f"{written} returns {kind(got)}, expected a float32 tensor of shape ()"
    right = np.eye(student.shape[-1])[labels.numpy()]
    plain = _log_softmax(student)
    s, t = _log_softmax(student, temperature), _log_softmax(teacher, temperature)
    from_labels = -(right * plain).sum(-1).mean()
    from_teacher = temperature**2 * (np.exp(t) * (t - s)).sum(-1).mean()
    expected = float(hard * from_labels + (1 - hard) * from_teacher)
    if not abs(got.loss - expected) <= 1e-5 * max(1.0, expected):
        return f"{written} gives {show(got.loss)}, expected {show(expected)}"
    slope = hard * (np.exp(plain) - right) + (1 - hard) * temperature * (np.exp(s) - np.exp(t))
    slope /= labels.numel()
    off = ~(np.abs(got.student - slope) <= 1e-6 + 1e-4 * np.abs(slope).max())
    if not off.any():
        return None
    at = tuple(int(i) for i in np.argwhere(off)[0])
    came, wanted = show(float(got.student[at])), show(float(slope[at]))
    return f"{written}: the student's gradient at {at} is {came}, expected {wanted}"


def _examine_teacher(student, teacher, labels, temperature, hard, got) -> str | None:
    if not got.teacher.any():
        return None
    written = call("distillation_loss", student, teacher, labels, temperature, hard)
    largest = float(np.abs(got.teacher).max())
    return f"{written} gives the teacher a gradient of up to {show(largest)}, expected none"


def broken_distillation_loss(student, teacher, labels, temperature, hard):
    """Return the loss of a student on labels and on its teacher's answers."""
    p = (teacher / temperature).softmax(dim=1)
    log_q = (student / temperature).log_softmax(dim=1)
    soft = nn.functional.kl_div(log_q, p, reduction="batchmean")
    hard_loss = nn.functional.cross_entropy(student.flatten(0, 1), labels.flatten())
    return hard * hard_loss + (1 - hard) * soft


def _from_labels(student, labels):
    return nn.functional.cross_entropy(student.flatten(0, 1), labels.flatten())


def _divergence(teacher, student, dim=-1, dim_of_student=None):
    log_p = teacher.detach().log_softmax(dim)
    log_q = student.log_softmax(dim if dim_of_student is None else dim_of_student)
    return log_p.exp() * (log_p - log_q)


def _soft(student, teacher, temperature, dim=-1, dim_of_student=None):
    """Return the divergence of each token."""
    t = temperature
    return _divergence(teacher / t, student / t, dim, dim_of_student).sum(-1)


def _mixed(student, labels, hard, soft):
    return hard * _from_labels(student, labels) + (1 - hard) * soft


def only_the_axis_left(student, teacher, labels, temperature, hard):
    """Mends scale and mean; the softmax still runs along the tokens."""
    soft = temperature**2 * _soft(student, teacher, temperature, dim=1).mean()
    return _mixed(student, labels, hard, soft)


def only_the_square_left(student, teacher, labels, temperature, hard):
    """Mends axis and mean; temperature² is missing."""
    return _mixed(student, labels, hard, _soft(student, teacher, temperature).mean())


def only_the_mean_left(student, teacher, labels, temperature, hard):
    """Mends axis and scale; still divides by the batch alone."""
    soft = temperature**2 * _soft(student, teacher, temperature).sum() / len(student)
    return _mixed(student, labels, hard, soft)


def only_the_mean_mended(student, teacher, labels, temperature, hard):
    """Mends the mean; axis and scale are left."""
    soft = _soft(student, teacher, temperature, dim=1).mean()
    return _mixed(student, labels, hard, soft)


def only_the_square_mended(student, teacher, labels, temperature, hard):
    """Mends the scale; axis and mean are left."""
    soft = temperature**2 * _soft(student, teacher, temperature, dim=1).sum() / len(student)
    return _mixed(student, labels, hard, soft)


def only_the_axis_mended(student, teacher, labels, temperature, hard):
    """Mends the axis; scale and mean are left."""
    soft = _soft(student, teacher, temperature).sum() / len(student)
    return _mixed(student, labels, hard, soft)


def only_detached(student, teacher, labels, temperature, hard):
    """Detaches the teacher; axis, scale and mean are left."""
    return broken_distillation_loss(student, teacher.detach(), labels, temperature, hard)


def teacher_along_time(student, teacher, labels, temperature, hard):
    """Mends the axis of the student alone."""
    soft = _soft(student, teacher, temperature, dim=1, dim_of_student=-1).mean()
    return _mixed(student, labels, hard, temperature**2 * soft)


def student_along_time(student, teacher, labels, temperature, hard):
    """Mends the axis of the teacher alone."""
    soft = _soft(student, teacher, temperature, dim_of_student=1).mean()
    return _mixed(student, labels, hard, temperature**2 * soft)


def mean_over_the_vocabulary(student, teacher, labels, temperature, hard):
    """Averages over the vocabulary as well (reduction="mean")."""
    soft = _soft(student, teacher, temperature).mean() / student.shape[-1]
    return _mixed(student, labels, hard, temperature**2 * soft)


def vocabulary_mean_without_square(student, teacher, labels, temperature, hard):
    """Mends the axis, and averages over the vocabulary as well."""
    soft = _soft(student, teacher, temperature).mean() / student.shape[-1]
    return _mixed(student, labels, hard, soft)


def sum_over_all(student, teacher, labels, temperature, hard):
    """Adds up the tokens (reduction="sum")."""
    soft = temperature**2 * _soft(student, teacher, temperature).sum()
    return _mixed(student, labels, hard, soft)


def reversed_divergence(student, teacher, labels, temperature, hard):
    """Weighs by the student's probabilities."""
    log_p = (teacher / temperature).log_softmax(-1).detach()
    log_q = (student / temperature).log_softmax(-1)
    soft = (log_q.exp() * (log_q - log_p)).sum(-1).mean()
    return _mixed(student, labels, hard, temperature**2 * soft)


def target_in_logs(student, teacher, labels, temperature, hard):
    """Hands kl_div the logarithms of a target, without log_target."""
    log_p = (teacher / temperature).log_softmax(-1).detach().flatten(0, 1)
    log_q = (student / temperature).log_softmax(-1).flatten(0, 1)
    soft = nn.functional.kl_div(log_q, log_p, reduction="batchmean")
    return _mixed(student, labels, hard, temperature**2 * soft)


def input_in_probabilities(student, teacher, labels, temperature, hard):
    """Hands kl_div the student's probabilities, not their logarithms."""
    p = (teacher / temperature).softmax(-1).detach().flatten(0, 1)
    q = (student / temperature).softmax(-1).flatten(0, 1)
    soft = nn.functional.kl_div(q, p, reduction="batchmean")
    return _mixed(student, labels, hard, temperature**2 * soft)


def log_of_the_softmax(student, teacher, labels, temperature, hard):
    """Takes the logarithm of a softmax that has underflowed."""
    p = (teacher / temperature).softmax(-1).detach()
    q = (student / temperature).softmax(-1)
    soft = (p * (p.log() - q.log())).sum(-1).mean()
    return _mixed(student, labels, hard, temperature**2 * soft)


def entropy_missing(student, teacher, labels, temperature, hard):
    """Takes the cross entropy with the teacher for the divergence."""
    p = (teacher / temperature).softmax(-1).detach()
    soft = -(p * (student / temperature).log_softmax(-1)).sum(-1).mean()
    return _mixed(student, labels, hard, temperature**2 * soft)


def only_the_teacher_softened(student, teacher, labels, temperature, hard):
    """Divides the teacher's logits alone by the temperature."""
    soft = _divergence(teacher / temperature, student).sum(-1).mean()
    return _mixed(student, labels, hard, temperature**2 * soft)


def only_the_student_softened(student, teacher, labels, temperature, hard):
    """Divides the student's logits alone by the temperature."""
    soft = _divergence(teacher, student / temperature).sum(-1).mean()
    return _mixed(student, labels, hard, temperature**2 * soft)


def weights_swapped(student, teacher, labels, temperature, hard):
    """Gives the teacher the share of the labels."""
    soft = temperature**2 * _soft(student, teacher, temperature).mean()
    return (1 - hard) * _from_labels(student, labels) + hard * soft


def square_on_both(student, teacher, labels, temperature, hard):
    """Multiplies the whole loss by temperature²."""
    soft = _soft(student, teacher, temperature).mean()
    return temperature**2 * _mixed(student, labels, hard, soft)


def not_squared(student, teacher, labels, temperature, hard):
    """Multiplies by the temperature once."""
    soft = temperature * _soft(student, teacher, temperature).mean()
    return _mixed(student, labels, hard, soft)


def divided_by_the_square(student, teacher, labels, temperature, hard):
    """Divides by temperature²."""
    soft = _soft(student, teacher, temperature).mean() / temperature**2
    return _mixed(student, labels, hard, soft)


def labels_softened(student, teacher, labels, temperature, hard):
    """Uses the temperature for the labels as well."""
    soft = temperature**2 * _soft(student, teacher, temperature).mean()
    return _mixed(student / temperature, labels, hard, soft)


def labels_shifted(student, teacher, labels, temperature, hard):
    """Shifts labels that are shifted already."""
    soft = temperature**2 * _soft(student, teacher, temperature).mean()
    return _mixed(student[:, :-1], labels[:, 1:], hard, soft)


def student_cut_off(student, teacher, labels, temperature, hard):
    """Computes the soft part without gradients."""
    with torch.no_grad():
        soft = temperature**2 * _soft(student, teacher, temperature).mean()
    return _mixed(student, labels, hard, soft)


def teacher_learns(student, teacher, labels, temperature, hard):
    """Mends the value, and leaves the teacher in the graph."""
    log_p, log_q = ((x / temperature).log_softmax(-1) for x in (teacher, student))
    soft = (log_p.exp() * (log_p - log_q)).sum(-1).mean()
    return _mixed(student, labels, hard, temperature**2 * soft)


_WRONG = (
    (only_the_axis_left, "each softmax must run over the vocabulary, the last dimension"),
    (
        only_the_square_left,
        "without temperature² the teacher's share fades as the temperature grows",
    ),
    (
        only_the_mean_left,
        "divided by the batch alone, the soft part grows with time: average over all tokens",
    ),
    (only_the_mean_mended, "the mean is mended; the axis and the scale of the soft part are not"),
    (only_the_square_mended, "temperature² is there; the axis and the mean are still wrong"),
    (only_the_axis_mended, "the axis is mended; the scale of the soft part and its mean are not"),
    (only_detached, "the soft part is as broken as it was: look at axis, scale and mean"),
    (teacher_along_time, "the student's softmax is mended, the teacher's still runs along time"),
    (student_along_time, "the teacher's softmax is mended, the student's still runs along time"),
    (mean_over_the_vocabulary, "the divergence of a token is a sum over the vocabulary, no mean"),
    (
        vocabulary_mean_without_square,
        "the vocabulary is summed, only tokens are averaged; and where is temperature²",
    ),
    (sum_over_all, "the soft part grows with the number of tokens: take their mean"),
    (reversed_divergence, "the divergence is turned: the teacher's probabilities are the weights"),
    (target_in_logs, "to give kl_div a target in logarithms, set log_target=True"),
    (input_in_probabilities, "the first argument of kl_div is logarithms: use log_softmax there"),
    (log_of_the_softmax, "a softmax may underflow to 0, whose logarithm is -inf: use log_softmax"),
    (entropy_missing, "a student equal to its teacher has a soft part of 0: subtract the entropy"),
    (only_the_teacher_softened, "the student's logits are divided by the temperature too"),
    (only_the_student_softened, "the teacher's logits are divided by the temperature too"),
    (weights_swapped, "the part of the labels has the weight hard, that of the teacher 1 − hard"),
    (square_on_both, "temperature² belongs to the soft part alone"),
    (not_squared, "the factor is the temperature squared, not the temperature"),
    (divided_by_the_square, "multiply by temperature²: the divergence is too small, not too large"),
    (labels_softened, "the labels meet the plain logits, without a temperature"),
    (labels_shifted, "the labels are already the next tokens: do not shift them again"),
    (student_cut_off, "the student must learn from the soft part: keep it in the graph"),
    (teacher_learns, "no gradient may flow into the teacher: detach it"),
)


def loss_with_kl_div(student, teacher, labels, temperature, hard):
    """Puts all tokens into one row, so that batchmean divides by their number."""
    student, teacher = student.flatten(0, 1), teacher.detach().flatten(0, 1)
    soft = nn.functional.kl_div(
        (student / temperature).log_softmax(1),
        (teacher / temperature).log_softmax(1),
        reduction="batchmean",
        log_target=True,
    )
    from_labels = nn.functional.cross_entropy(student, labels.flatten())
    return torch.lerp(soft * temperature * temperature, from_labels, hard)


def loss_by_entropies(student, teacher, labels, temperature, hard):
    """Cross entropy minus entropy, in float64."""
    student, teacher = student.double(), teacher.detach().double()
    log_p = (teacher / temperature).log_softmax(-1)
    log_q = (student / temperature).log_softmax(-1)
    entropy, cross = (-(log_p.exp() * x).sum(-1).mean() for x in (log_p, log_q))
    right = student.log_softmax(-1).gather(-1, labels[..., None])
    return (-hard * right.mean() + (1 - hard) * temperature**2 * (cross - entropy)).float()


def loss_token_by_token(student, teacher, labels, temperature, hard):
    """Goes through the tokens, with soft targets for the cross entropy."""
    losses, tokens = [], (x.flatten(0, 1) for x in (student, teacher, labels[..., None]))
    for s, t, label in zip(*tokens, strict=True):
        with torch.no_grad():
            p = torch.softmax(t / temperature, 0)
            entropy = torch.special.entr(p).sum()
        soft = nn.functional.cross_entropy(s / temperature, p) - entropy
        losses.append(hard * (s.logsumexp(0) - s[label[0]]) + (1 - hard) * temperature**2 * soft)
    return torch.stack(losses).mean()


EXERCISE = Exercise(
    id="7.5",
    title="Bug hunt: the popular distillation loss",
    stars=3,
    minutes=25,
    function_names=("distillation_loss",),
    check=_check,
    takeaway=(
        "None of the four mistakes raises an error: test a loss on a value worked out by hand."
    ),
    wrong_answers=_WRONG,
    variants=(loss_with_kl_div, loss_by_entropies, loss_token_by_token),
    broken=broken_distillation_loss,
)
