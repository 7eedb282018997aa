"""Chapter 3: checks, known wrong answers and correct variants.

Each wrong answer's docstring names the misconception; the text beside it is what a learner reads.
References are numpy in float64 by the definition, never labkit.
"""

import math

import numpy as np
import torch

from labkit.exercises import Exercise, call, judge, kind, misfit, show

# 3.1 and 3.2 ----------------------------------------------------------------------------------


def _gradient_cases(seed: int):
    yield torch.tensor([0.4, 2.6, -0.9]), 0.5, -3, 3, torch.tensor([1.0, 1.0, 2.0])
    yield torch.tensor([1.6, 1.8, -1.6, -1.8]), 0.5, -3, 3, torch.tensor([1.0, 2.0, 3.0, 4.0])
    yield torch.tensor([-1.0, -0.6, 0.3]), 0.25, -2, 1, torch.tensor([1.0, -1.0, 0.5])
    random = torch.Generator().manual_seed(seed)
    for shape in ((9,), (4, 16), (3, 5, 8)):
        for scale, qmin, qmax in ((0.2, -7, 7), (0.7, -1, 1), (0.02, -127, 127), (0.3, -8, 7)):
            weight = torch.randn(shape, generator=random)
            yield weight, scale, qmin, qmax, torch.randn(shape, generator=random)


def _parts(weight, scale, qmin, qmax):
    """Return position on the grid, code, and whether it was not clipped, float64."""
    position = weight.double().numpy() / scale
    level = np.round(position)
    return position, np.clip(level, qmin, qmax), (level >= qmin) & (level <= qmax)


def _check_weight_gradient(function) -> None:
    cases = _gradient_cases(31)
    judge("weight_gradient", function, cases, _examine_weight_gradient, _WRONG_WEIGHT_GRADIENT)


def _examine_weight_gradient(weight, scale, qmin, qmax, upstream, got) -> str | None:
    written = call("weight_gradient", weight, scale, qmin, qmax, upstream)
    if complaint := misfit(got, torch.float32, tuple(weight.shape)):
        return f"{written} returns {complaint}"
    expected = upstream.double().numpy() * _parts(weight, scale, qmin, qmax)[2]
    bad = ~np.isclose(got.double().numpy(), expected, rtol=1e-4, atol=1e-6)
    if not bad.any():
        return None
    at = tuple(np.argwhere(bad)[0])
    return (
        f"the weight {float(weight[at]):.4g} on a grid of {scale} from {qmin} to {qmax} gets the "
        f"gradient {float(got[at]):.4g} of {float(upstream[at]):.4g}, expected {expected[at]:.4g}"
    )


def true_derivative(weight, scale, qmin, qmax, upstream):
    """Takes the derivative of rounding, which is zero."""
    return torch.zeros_like(weight)


def gradient_for_all(weight, scale, qmin, qmax, upstream):
    """Lets the gradient through for clipped weights too."""
    return upstream.clone()


def cut_at_the_last_level(weight, scale, qmin, qmax, upstream):
    """Compares the weight, not its code, with the ends of the range."""
    return upstream * ((weight >= qmin * scale) & (weight <= qmax * scale))


def only_the_clipped(weight, scale, qmin, qmax, upstream):
    """Has the mask the wrong way round."""
    level = (weight / scale).round()
    return upstream * ((level < qmin) | (level > qmax))


def without_the_ends(weight, scale, qmin, qmax, upstream):
    """Takes the two outermost codes for clipped."""
    level = (weight / scale).round()
    return upstream * ((level > qmin) & (level < qmax))


def magnitude_against_qmax(weight, scale, qmin, qmax, upstream):
    """Tests |code| against qmax alone, on a range that need not be symmetric."""
    return upstream * ((weight / scale).round().abs() <= qmax)


def divided_by_the_scale(weight, scale, qmin, qmax, upstream):
    """Differentiates w/s, and forgets that the result is multiplied by s again."""
    level = (weight / scale).round()
    return upstream / scale * ((level >= qmin) & (level <= qmax))


_WRONG_WEIGHT_GRADIENT = (
    (true_derivative, "the true derivative of rounding is zero; the estimator pretends it is 1"),
    (gradient_for_all, "a clipped weight gets no gradient: moving it changes nothing"),
    (cut_at_the_last_level, "judge the code: up to half a step beyond an end is only rounded"),
    (only_the_clipped, "the mask is the wrong way round"),
    (without_the_ends, "the codes qmin and qmax themselves are in range"),
    (magnitude_against_qmax, "the range need not be symmetric: test both ends"),
    (divided_by_the_scale, "dividing by the scale and multiplying by it cancel"),
)


def weight_gradient_by_autograd(weight, scale, qmin, qmax, upstream):
    """Lets autograd differentiate the clipping, half a step beyond each end."""
    position = (weight / scale).requires_grad_()
    position.clamp(qmin - 0.5, qmax + 0.5).backward(upstream)
    return position.grad


def weight_gradient_elementwise(weight, scale, qmin, qmax, upstream):
    """Decides for one weight after another."""
    pairs = zip(weight.flatten().tolist(), upstream.flatten().tolist(), strict=True)
    kept = [g if qmin <= round(w / scale) <= qmax else 0.0 for w, g in pairs]
    return torch.tensor(kept).view(weight.shape)


def _check_scale_gradient(function) -> None:
    cases = _gradient_cases(32)
    judge("scale_gradient", function, cases, _examine_scale_gradient, _WRONG_SCALE_GRADIENT)


def _examine_scale_gradient(weight, scale, qmin, qmax, upstream, got) -> str | None:
    written = call("scale_gradient", weight, scale, qmin, qmax, upstream)
    if not isinstance(got, float | np.floating):
        return f"{written} returns {kind(got)}, expected a float"
    position, code, inside = _parts(weight, scale, qmin, qmax)
    terms = upstream.double().numpy() * (code - inside * position)
    if abs(got - terms.sum()) <= 1e-4 * max(1.0, np.abs(terms).sum()):
        return None
    return f"{written} gives {show(float(got))}, expected {show(float(terms.sum()))}"


def _scale_terms(weight, scale, qmin, qmax):
    position = (weight / scale).double()
    level = position.round()
    return position, level.clamp(qmin, qmax), (level >= qmin) & (level <= qmax)


def codes_only(weight, scale, qmin, qmax, upstream):
    """Holds the codes fixed: forgets that they move with the scale."""
    return float((upstream * _scale_terms(weight, scale, qmin, qmax)[1]).sum())


def clipped_only(weight, scale, qmin, qmax, upstream):
    """Counts only the clipped weights."""
    _, code, inside = _scale_terms(weight, scale, qmin, qmax)
    return float((upstream * code * ~inside).sum())


def inside_only(weight, scale, qmin, qmax, upstream):
    """Leaves the clipped weights out, which pull the scale up."""
    position, code, inside = _scale_terms(weight, scale, qmin, qmax)
    return float((upstream * (code - position) * inside).sum())


def position_everywhere(weight, scale, qmin, qmax, upstream):
    """Subtracts w/s for clipped weights too."""
    position, code, _ = _scale_terms(weight, scale, qmin, qmax)
    return float((upstream * (code - position)).sum())


def sign_turned(weight, scale, qmin, qmax, upstream):
    """Subtracts the wrong way round."""
    position, code, inside = _scale_terms(weight, scale, qmin, qmax)
    return -float((upstream * (code - inside * position)).sum())


def mean_of_the_terms(weight, scale, qmin, qmax, upstream):
    """Averages where a shared parameter needs the sum."""
    position, code, inside = _scale_terms(weight, scale, qmin, qmax)
    return float((upstream * (code - inside * position)).mean())


_WRONG_SCALE_GRADIENT = (
    (codes_only, "a larger scale also moves each code inside the range: subtract w/s there"),
    (clipped_only, "weights inside the range count as well: code minus w/s"),
    (inside_only, "a clipped weight counts too: its value is the last code times the scale"),
    (position_everywhere, "subtract w/s only inside: a clipped code does not move"),
    (sign_turned, "the sign is turned: it is the code minus w/s"),
    (mean_of_the_terms, "all weights share the scale: their terms are added, not averaged"),
)


def scale_gradient_by_autograd(weight, scale, qmin, qmax, upstream):
    """Passes the rounding straight through and lets autograd do the rest."""
    learned = torch.tensor(scale, dtype=torch.float64, requires_grad=True)
    position = (weight.double() / learned).clamp(qmin - 0.5, qmax + 0.5)
    position = torch.where((position > qmin - 0.5) & (position < qmax + 0.5), position, 0.0)
    fixed = (weight.double() / scale).round().clamp(qmin, qmax)
    codes = position + (fixed - position).detach()
    (codes * learned).backward(upstream.double())
    return learned.grad.item()


# 3.3 ------------------------------------------------------------------------------------------


def _check_distillation(function) -> None:
    random = torch.Generator().manual_seed(33)
    even = torch.zeros(1, 1, 2)
    cases = [(even, torch.tensor([[[math.log(3.0), 0.0]]])), (even, even.clone())]
    for shape in ((2, 3, 5), (1, 7, 11), (4, 2, 3), (3, 16, 20)):
        for size in (1.0, 4.0, 60.0):
            pair = [size * torch.randn(shape, generator=random) for _ in range(2)]
            cases.append(tuple(pair))
    judge("distillation_loss", function, cases, _examine_distillation, _WRONG_DISTILLATION)


def _log_softmax(logits: torch.Tensor) -> np.ndarray:
    x = logits.double().numpy()
    x = x - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


def _examine_distillation(student, teacher, got) -> str | None:
    written = call("distillation_loss", student, teacher)
    if not isinstance(got, torch.Tensor) or got.ndim or not got.is_floating_point():
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


_WRONG_DISTILLATION = (
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


# 3.4 ------------------------------------------------------------------------------------------


def _check_gain(function) -> None:
    random = torch.Generator().manual_seed(34)
    cases = [([3.0, 3.2, 3.4], [3.1, 3.3, 3.5], [3.6, 3.8, 4.0])]
    cases += [([3.0, 3.4, 3.2], [3.3, 3.5, 3.4], [3.9, 3.8, 4.0])]
    cases += [([3.0, 3.3, 3.1], [3.1, 3.0, 3.3], [3.6, 3.6, 3.6])]
    cases += [([3.5, 3.6, 3.4], [3.1, 3.0, 3.2], [3.6, 3.6, 3.6])]
    for seeds in (3, 3, 4, 5, 8):
        shift = torch.randn(1, generator=random)
        rows = 3 + 0.2 * torch.randn(3, seeds, generator=random) + torch.tensor([[0], [1], [2]]) / 9
        cases.append(tuple((row + shift).tolist() for row in rows))
    judge("qat_gain", function, cases, _examine_gain, _WRONG_GAIN)


def _fair(qat, control_ptq):
    gains = np.array(control_ptq) - np.array(qat)
    error = gains.std(ddof=1) / math.sqrt(len(gains))
    return gains.mean(), error


def _verdict(gain, error):
    return "tie" if abs(gain) <= 2 * error + 1e-9 else "better" if gain > 0 else "worse"


def _examine_gain(qat, control_ptq, ptq, got) -> str | None:
    written = call("qat_gain", qat, control_ptq, ptq)
    shape = isinstance(got, tuple | list) and len(got) == 3 and isinstance(got[2], str)
    if not shape or not all(isinstance(x, float | np.floating) for x in got[:2]):
        return f"{written} returns {kind(got)}, expected (gain, standard error, verdict)"
    gain, error = _fair(qat, control_ptq)
    expected = float(gain), float(error), _verdict(gain, error)
    close = [math.isclose(a, b, abs_tol=1e-6) for a, b in zip(got[:2], expected[:2], strict=True)]
    if all(close) and got[2] == expected[2]:
        return None
    return f"{written} gives {show(tuple(got))}, expected {show(expected)}"


def against_plain_ptq(qat, control_ptq, ptq):
    """Compares with a model that was not trained any further."""
    gain, error = _fair(qat, ptq)
    return float(gain), float(error), _verdict(gain, error)


def loss_not_gain(qat, control_ptq, ptq):
    """Subtracts the wrong way round."""
    gain, error = _fair(control_ptq, qat)
    return float(gain), float(error), _verdict(gain, error)


def unpaired_error(qat, control_ptq, ptq):
    """Adds the errors of the two means, as if the seeds had nothing in common."""
    gain, _ = _fair(qat, control_ptq)
    error = math.sqrt((np.var(qat, ddof=1) + np.var(control_ptq, ddof=1)) / len(qat))
    return float(gain), error, _verdict(gain, error)


def spread_for_error(qat, control_ptq, ptq):
    """Gives the standard deviation of one seed for that of the mean."""
    gain, error = _fair(qat, control_ptq)
    return float(gain), float(error * len(qat) ** 0.5), _verdict(gain, error * len(qat) ** 0.5)


def population_deviation(qat, control_ptq, ptq):
    """Divides by n where n − 1 is due."""
    gain, error = _fair(qat, control_ptq)
    error = error * math.sqrt((len(qat) - 1) / len(qat))
    return float(gain), float(error), _verdict(gain, error)


def never_a_tie(qat, control_ptq, ptq):
    """Calls every difference a win or a loss."""
    gain, error = _fair(qat, control_ptq)
    return float(gain), float(error), "better" if gain > 0 else "worse"


_WRONG_GAIN = (
    (against_plain_ptq, "plain PTQ was not trained: compare with the control, trained as long"),
    (loss_not_gain, "a gain is what QAT has less: control minus QAT"),
    (unpaired_error, "the runs are paired by seed: take the error of the differences"),
    (spread_for_error, "that is the spread of one seed; divide by the root of their number"),
    (population_deviation, "few seeds: divide by n − 1 in the standard deviation"),
    (never_a_tie, "within two standard errors it is a tie"),
)


def gain_with_torch(qat, control_ptq, ptq):
    """The same with tensors."""
    gains = torch.tensor(control_ptq, dtype=torch.float64) - torch.tensor(qat, dtype=torch.float64)
    gain, error = gains.mean().item(), (gains.std() / len(gains) ** 0.5).item()
    if abs(gain) <= 2 * error:
        return gain, error, "tie"
    return gain, error, ("worse", "better")[gain > 0]


# 3.5 ------------------------------------------------------------------------------------------


def broken_train_rounded(weight, scale, x, target, steps, lr):
    """Train a weight through its rounding; return the float weight."""
    latent, limit = weight.clone(), 2**3 - 1
    for _ in range(steps):
        latent.requires_grad_()
        rounded = (latent / scale).round().clamp(-limit, limit) * scale
        loss = (x @ rounded.T - target).square().mean()
        (gradient,) = torch.autograd.grad(loss, latent)
        latent = (rounded - lr * gradient).detach()
    return latent


def _training_cases():
    random = torch.Generator().manual_seed(35)
    yield torch.tensor([[0.9]]), 1.0, torch.ones(1, 1), torch.zeros(1, 1), 1, 0.1
    yield torch.tensor([[0.9]]), 1.0, torch.ones(1, 1), torch.zeros(1, 1), 3, 0.1
    yield torch.tensor([[9.0, 0.6]]), 1.0, torch.ones(1, 2), torch.zeros(1, 1), 2, 0.1
    for rows, inputs, tokens, steps, lr in (
        (2, 3, 4, 1, 0.1),
        (3, 8, 20, 4, 0.05),
        (5, 4, 9, 6, 0.2),
    ):
        weight = torch.randn(rows, inputs, generator=random)
        x = torch.randn(tokens, inputs, generator=random)
        target = torch.randn(tokens, rows, generator=random)
        yield weight, 0.21, x, target, steps, lr


def _check_training(function) -> None:
    judge("train_rounded", function, _training_cases(), _examine_training, _WRONG_TRAINING)


def _examine_training(weight, scale, x, target, steps, lr, got) -> str | None:
    shape = tuple(weight.shape)
    written = f"train_rounded with a weight of shape {shape}, {steps} step(s) and lr={lr}"
    if complaint := misfit(got, torch.float32, shape):
        return f"{written} returns {complaint}"
    latent, inputs, wanted = (t.double().numpy() for t in (weight, x, target))
    for _ in range(steps):
        level = np.round(latent / scale)
        error = inputs @ (np.clip(level, -7, 7) * scale).T - wanted
        gradient = 2 * error.T @ inputs / error.size
        latent = latent - lr * gradient * (np.abs(level) <= 7)
    bad = ~np.isclose(got.detach().double().numpy(), latent, rtol=1e-3, atol=1e-5)
    if not bad.any():
        return None
    at = tuple(np.argwhere(bad)[0])
    return (
        f"{written} moves the weight {float(weight[at]):.4g} to {float(got[at]):.4g}, expected "
        f"{latent[at]:.4g}"
    )


def _trained(weight, scale, x, target, steps, lr, cut=False, snap=False, mask=True, repeat=False):
    latent, total = weight.double(), 0
    for _ in range(steps):
        level = (latent / scale).round()
        rounded = level.clamp(-7, 7) * scale
        error = x.double() @ rounded.T - target.double()
        gradient = 2 * error.T @ x.double() / error.numel()
        gradient = gradient * (level.abs() <= 7) if mask else gradient
        total = total + gradient if repeat else gradient
        latent = (rounded if snap else latent) - (0 if cut else lr * total)
    return latent


def still_cut(weight, scale, x, target, steps, lr):
    """Keeps the float weight, but rounding still stops the gradient."""
    return _trained(weight, scale, x, target, steps, lr, cut=True).float()


def still_snaps(weight, scale, x, target, steps, lr):
    """Passes the gradient, but starts every step from the rounded weight."""
    return _trained(weight, scale, x, target, steps, lr, snap=True).float()


def clipped_weights_move(weight, scale, x, target, steps, lr):
    """Passes the gradient straight through the clipping as well."""
    return _trained(weight, scale, x, target, steps, lr, mask=False).float()


def gradients_pile_up(weight, scale, x, target, steps, lr):
    """Never sets the gradient back to zero."""
    return _trained(weight, scale, x, target, steps, lr, repeat=True).float()


def returns_the_rounded(weight, scale, x, target, steps, lr):
    """Returns the weight rounded."""
    latent = _trained(weight, scale, x, target, steps, lr)
    return ((latent / scale).round().clamp(-7, 7) * scale).float()


def trains_without_rounding(weight, scale, x, target, steps, lr):
    """Lets the loss see the float weight."""
    latent = weight.double()
    for _ in range(steps):
        error = x.double() @ latent.T - target.double()
        latent = latent - lr * 2 * error.T @ x.double() / error.numel()
    return latent.float()


_WRONG_TRAINING = (
    (still_cut, "no weight moves: the derivative of round is zero, pass the gradient around it"),
    (still_snaps, "every step starts from the rounded weight, so small steps are lost"),
    (clipped_weights_move, "a clipped weight must not move: keep the clipping in the gradient"),
    (gradients_pile_up, "the gradient of each step is new: do not add up those before"),
    (returns_the_rounded, "return the float weight, which holds what was learned"),
    (trains_without_rounding, "the loss must see the rounded weight"),
)


def train_with_detach(weight, scale, x, target, steps, lr):
    """Clip first, then round around the gradient, half a step of play at each end."""
    latent = weight.clone().requires_grad_()
    optimizer = torch.optim.SGD([latent], lr)
    for _ in range(steps):
        position = latent / scale
        inside = position.round().abs() <= 7
        position = torch.where(inside, position, 7.0 * position.sign())
        rounded = (position + (position.round() - position).detach()) * scale
        optimizer.zero_grad()
        (x @ rounded.T - target).square().mean().backward()
        optimizer.step()
    return latent.detach()


EXERCISES = (
    Exercise(
        "3.1", "What reaches the weight", 1, 10, ("weight_gradient",), _check_weight_gradient,
        "Inside the range the gradient passes, outside it stops.",
        _WRONG_WEIGHT_GRADIENT, (weight_gradient_by_autograd, weight_gradient_elementwise),
    ),
    Exercise(
        "3.2", "What reaches the step size", 2, 15, ("scale_gradient",), _check_scale_gradient,
        "Clipped weights pull the step up, rounding errors push it either way: a learned trade.",
        _WRONG_SCALE_GRADIENT, (scale_gradient_by_autograd,),
    ),
    Exercise(
        "3.3", "Bug hunt: training that trains nothing", 2, 15, ("train_rounded",),
        _check_training,
        "The loss sees the rounded weight, the float weight collects the small steps.",
        _WRONG_TRAINING, (train_with_detach,),
        broken=broken_train_rounded,
    ),
    Exercise(
        "3.4", "What did QAT add?", 1, 10, ("qat_gain",), _check_gain,
        "Against a control that was trained as long, a gain is a gain of quantization in the loop.",
        _WRONG_GAIN, (gain_with_torch,),
    ),
    Exercise(
        "3.5", "A loss that listens to the teacher", 2, 15, ("distillation_loss",),
        _check_distillation,
        "A teacher answers with a whole distribution at each token, not with one right word.",
        _WRONG_DISTILLATION, (distillation_with_torch, distillation_by_two_entropies),
    ),
)  # fmt: skip
