"""Exercise 2.2: `smooth_pair` moves the difficulty from activations into two weights (SmoothQuant).

The reference is the formula in numpy, in float64.
"""

import numpy as np
import torch

from labkit.exercises.judge import Exercise, call, insist_on_dtype, judge, kind, misfit, show


def _check(function) -> None:
    random = torch.Generator().manual_seed(22)
    x = torch.tensor([[8.0, -1.0], [-2.0, 0.5]])
    cases = [(x, torch.tensor([[2.0, 4.0]]), torch.tensor([[0.5, -9.0]]), 0.5)]
    cases += [(x, torch.tensor([[2.0, 0.0]]), torch.tensor([[-0.5, 0.0]]), 0.75)]
    cases += [(torch.tensor([[0.0, 3.0]]), torch.tensor([[1.0, 2]]), torch.tensor([[4.0, 1]]), 1.0)]
    for tokens, inputs, *rows, alpha in (
        *((2, 2, 1, 1, alpha) for alpha in (0.25, 0.6, 0.9)),  # a wrong dimension fits here as well
        *((6, 4, 4, 6, 0.5), (9, 16, 3, 5, 0.8), (40, 32, 24, 26, 0.3)),
    ):
        x = torch.randn(tokens, inputs, generator=random)
        x[:, 1] *= 60
        weights = (torch.randn(n, inputs, generator=random) for n in rows)
        cases.append((x, *weights, alpha))
    for part in (cases[:6], cases[6:]):
        judge("smooth_pair", function, part, _examine, _WRONG)


def _examine(x, first, second, alpha, got) -> str | None:
    written = call("smooth_pair", x, first, second, alpha)
    if not isinstance(got, tuple | list) or len(got) != 3:
        return f"{written} returns {kind(got)}, expected the triple (x, first, second)"
    names = ("x", "first", "second")
    for name, value, like in zip(names, got, (x, first, second), strict=True):
        insist_on_dtype(f"in {written}, {name} is", value, torch.float32, like.shape)
        if complaint := misfit(value, torch.float32, like.shape):
            return f"in {written}, {name} is {complaint}"
    rows = np.concatenate([first.numpy(), second.numpy()]).astype(np.float64)
    peak, reach = (np.maximum(np.abs(a).max(0), 1e-5) for a in (x.double().numpy(), rows))
    s = torch.from_numpy(peak**alpha / reach ** (1 - alpha))
    wanted = x.double() / s, first.double() * s, second.double() * s
    for name, value, true in zip(names, got, wanted, strict=True):
        wrong = ~((value - true).abs() <= 1e-3 * true.abs() + 1e-9)
        if wrong.any():
            place = tuple(wrong.nonzero()[0].tolist())
            numbers = f"{show(value[place].item())}, expected {show(true[place].item())}"
            return f"in {written}, {name}{list(place)} is {numbers}"
    return None


def _smooth(x, first, second, alpha, peak=None, reach=None, floor=1e-5, factor=None):
    peak = x.abs().amax(0) if peak is None else peak
    reach = torch.cat([first, second]).abs().amax(0) if reach is None else reach
    factor = factor or (lambda peak, reach: peak**alpha / reach ** (1 - alpha))
    s = factor(peak.clamp(min=floor), reach.clamp(min=floor))
    return x / s, first * s, second * s


def weights_of_the_first_only(x, first, second, alpha):
    """Takes the reach of the first weight alone."""
    return _smooth(x, first, second, alpha, reach=first.abs().amax(0))


def weights_of_the_second_only(x, first, second, alpha):
    """Takes the reach of the second weight alone."""
    return _smooth(x, first, second, alpha, reach=second.abs().amax(0))


def reaches_added(x, first, second, alpha):
    """Adds the reaches of the two weights."""
    reach = first.abs().amax(0) + second.abs().amax(0)
    return _smooth(x, first, second, alpha, reach=reach)


def peak_of_each_token(x, first, second, alpha):
    """Takes the maximum over the channels: a number for each token."""
    return _smooth(x, first, second, alpha, peak=x.abs().amax(1))


def peak_of_each_token_kept(x, first, second, alpha):
    """Takes a peak for each token and keeps its dimension: a factor for each value of x."""
    return _smooth(x, first, second, alpha, peak=x.abs().amax(1, keepdim=True))


def reach_of_each_row(x, first, second, alpha):
    """Takes the maximum over the channels of each row of the weights."""
    return _smooth(x, first, second, alpha, reach=torch.cat([first, second]).abs().amax(1))


def a_factor_for_each_weight(x, first, second, alpha):
    """Gives each weight its own factor, so the second product changes."""
    own = _smooth(x, second, second, alpha)
    return *_smooth(x, first, first, alpha)[:2], own[1]


def alpha_swapped(x, first, second, alpha):
    """Exchanges alpha and 1 − alpha."""
    return _smooth(x, first, second, 1 - alpha)


def alpha_on_both(x, first, second, alpha):
    """Raises the quotient of the two maxima to alpha."""
    return _smooth(x, first, second, alpha, factor=lambda p, r: (p / r) ** alpha)


def reach_multiplied(x, first, second, alpha):
    """Multiplies by the power of the weights."""
    return _smooth(x, first, second, alpha, factor=lambda p, r: p**alpha * r ** (1 - alpha))


def multiplied_instead(x, first, second, alpha):
    """Multiplies the activations and divides the weights."""
    divided, *_ = _smooth(x, first, second, alpha)
    s = _smooth(torch.ones_like(x), first, second, alpha, peak=x.abs().amax(0))[0][:1].reciprocal()
    return x * x / divided, first / s, second / s


def signed_maximum(x, first, second, alpha):
    """Forgets the absolute values."""
    return _smooth(x, first, second, alpha, x.amax(0), torch.cat([first, second]).amax(0))


def mean_magnitude(x, first, second, alpha):
    """Takes mean magnitudes, as AWQ does."""
    return _smooth(x, first, second, alpha, peak=x.abs().mean(0))


def activations_left_alone(x, first, second, alpha):
    """Scales the weights and forgets the activations."""
    return x.clone(), *_smooth(x, first, second, alpha)[1:]


def weights_divided_too(x, first, second, alpha):
    """Divides the weights by the factor as well."""
    smooth, *scaled = _smooth(x, first, second, alpha)
    return smooth, *(w * w / s for w, s in zip((first, second), scaled, strict=True))


def minus_after_the_power(x, first, second, alpha):
    """Writes `reach ** 1 - alpha`, which subtracts alpha at the end."""
    return _smooth(x, first, second, alpha, factor=lambda p, r: p**alpha / r**1 - alpha)


def dead_channel_divides(x, first, second, alpha):
    """Leaves out the clamp."""
    return _smooth(x, first, second, alpha, floor=0.0)


_WRONG = (
    (weights_of_the_first_only, "the maximum runs over the rows of both weights"),
    (weights_of_the_second_only, "the first weight counts too: the maximum runs over both"),
    (reaches_added, "the maximum over both weights is the larger of the two, not their sum"),
    (peak_of_each_token, "the peak of a channel runs over the tokens, which are dimension 0"),
    (peak_of_each_token_kept, "one factor for each channel, not for each token too: amax(0)"),
    (reach_of_each_row, "the maximum of a channel runs over the rows of a weight, dimension 0"),
    (a_factor_for_each_weight, "both layers read the same x, so they share one factor"),
    (alpha_swapped, "alpha is the exponent of the activations, 1 − alpha that of the weights"),
    (alpha_on_both, "each maximum has its own exponent: (peak / reach) ** alpha gives both alpha"),
    (reach_multiplied, "the power of the weights divides: peak ** alpha / reach ** (1 - alpha)"),
    (multiplied_instead, "the activations are divided and the weights multiplied"),
    (signed_maximum, "take the largest magnitude: a channel may peak below zero"),
    (mean_magnitude, "SmoothQuant takes the peak of a channel; the mean is AWQ's choice"),
    (activations_left_alone, "divide the activations too, or the products change"),
    (weights_divided_too, "x is divided by the factor, so the weights are multiplied by it"),
    (minus_after_the_power, "a power binds before a minus: write reach ** (1 - alpha)"),
    (dead_channel_divides, "a channel of zeros gives a factor of 0 or infinity: clamp the maxima"),
)


def smooth_channel_by_channel(x, first, second, alpha):
    """Goes through the channels in float64."""
    parts = [t.double().clone() for t in (x, first, second)]
    for j in range(x.shape[1]):
        peak = max(1e-5, x[:, j].abs().max().item())
        reach = max(1e-5, first[:, j].abs().max().item(), second[:, j].abs().max().item())
        s = peak**alpha * reach ** (alpha - 1)
        parts[0][:, j] /= s
        parts[1][:, j] *= s
        parts[2][:, j] *= s
    return [part.float() for part in parts]


def smooth_by_logarithms(x, first, second, alpha):
    """Works with logarithms and a diagonal matrix."""
    reach = torch.maximum(first.abs().max(0).values, second.abs().max(0).values)
    peak = x.abs().max(0).values
    s = alpha * torch.log(peak.clamp_min(1e-5)) - (1 - alpha) * torch.log(reach.clamp_min(1e-5))
    return x @ torch.diag(torch.exp(-s)), first @ torch.diag(s.exp()), second @ torch.diag(s.exp())


EXERCISE = Exercise(
    id="2.2",
    title="Smooth a pair of layers",
    stars=2,
    minutes=15,
    function_names=("smooth_pair",),
    check=_check,
    takeaway="The product is the same, yet both factors now fit a grid of eight bits.",
    wrong_answers=_WRONG,
    variants=(smooth_channel_by_channel, smooth_by_logarithms),
)
