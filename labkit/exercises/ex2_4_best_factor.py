"""Exercise 2.4: `best_factor` searches the factor by which AWQ scales the inputs of a layer.

The reference is the definition in float64: every exponent is tried on the products themselves.
"""

import torch

from labkit.exercises.judge import Exercise, insist_on_dtype, judge, misfit, show
from labkit.exercises.named_errors import Explained, explain_errors

_CLAMP = "clamp at 1e-5: a dead channel makes every error NaN, and then none is the least"


def round_rows(weight):
    """Round to 4 bits, one symmetric scale a row: the `quantize` that answers are called with."""
    scale = weight.abs().amax(1, keepdim=True).clamp(min=1e-30) / 7
    return (weight / scale).round().clamp(-7, 7) * scale


def round_to_halves(weight):
    """Round to multiples of one half."""
    return (weight * 2).round() / 2


def _check(function) -> None:
    random = torch.Generator().manual_seed(24)
    weight, x = torch.tensor([[0.3, 1.4], [0.2, -1.4]]), torch.tensor([[8.0, 0.5], [-8.0, 0.5]])
    cases = [(weight, x, [0.0, 0.5, 1.0], round_to_halves)]
    for pair, tokens in (  # each comparison with another product takes another exponent here
        ([0.8, -0.1], [[-3.5, -0.5], [0.25, 0.75]]),
        ([0.1, 0.6], [[5.5, 0.0], [1.5, 0.5]]),
        ([0.6, 0.4], [[-1.25, -0.25], [0.25, -0.5]]),
    ):
        alphas = [0.0, 0.25, 0.5, 0.75, 1.0]
        cases.append((torch.tensor([pair]), torch.tensor(tokens), alphas, round_to_halves))
    x = torch.tensor([[16.0, 0.0625], [-16.0, 0.0625]])  # powers of two: x / s and weight * s exact
    cases.append((weight, x, [0.25, 0.5, 0.75], torch.zeros_like))  # all errors are equal
    for rows, inputs, tokens in ((3, 8, 20), (8, 32, 40), (16, 48, 64), (24, 64, 96)):
        for quantize in (round_rows, round_to_halves):
            weight = torch.randn(rows, inputs, generator=random)
            x = torch.randn(tokens, inputs, generator=random)
            x = x * torch.logspace(-1.5, 1.5, inputs)[torch.randperm(inputs, generator=random)]
            x = x + x.abs().mean(0) * torch.randn(inputs, generator=random)
            x[0] *= 8
            if rows == 8:
                x[:, 3] = 0
            alphas = [1.0, 0.75, 0.5, 0.25, 0.0] if rows == 3 else [0.2, 0.4, 0.6, 0.8, 1.0]
            cases.append((weight, x, alphas if rows <= 8 else alphas[::-1], quantize))
    judge("best_factor", explain_errors(function, _never_set), cases, _examine, _WRONG)


def _dead(x) -> bool:
    return bool((x == 0).all(0).any())


def _never_set(error, weight, x, alphas, quantize) -> str | None:
    return _CLAMP if isinstance(error, UnboundLocalError) and _dead(x) else None


def _examine(weight, x, alphas, quantize, got) -> str | None:
    written = f"for a weight of shape {tuple(weight.shape)} and alphas {show(alphas)}, best_factor"
    if isinstance(got, Explained):
        return got.complaint(written, "a factor")
    insist_on_dtype(f"{written} returns", got, torch.float32, (weight.shape[1],))
    if complaint := misfit(got, torch.float32, (weight.shape[1],)):
        why = f"{_CLAMP}: " if got is None and _dead(x) else ""
        return f"{why}{written} returns {complaint}"
    mean = x.double().abs().mean(0).clamp(min=1e-5)
    factors = [mean**alpha for alpha in alphas]
    errors = [_error(weight, x, factor, quantize) for factor in factors]
    least = min(errors)
    first = errors.index(least)
    for place, (factor, error) in enumerate(zip(factors, errors, strict=True)):
        ratio = got.double() / factor
        if torch.allclose(ratio, ratio[:1].expand_as(ratio), rtol=1e-3) and (got > 0).all():
            late = error == least and place > first
            if error <= least * (1 + 1e-4) and not late:
                times = ratio.mean().item()
                if abs(times - 1) <= 1e-3:
                    return None
                wanted = f"the factor of the exponent {show(alphas[place])}"
                return f"{written} returns {show(times)} times {wanted}, expected {wanted} as it is"
            why = ", the first of equals" * late
            best, yours = alphas[first], alphas[place]
            return f"{written} takes the exponent {show(yours)}, expected {show(best)}{why}"
    wanted = factors[first]
    wrong = int((got.double() / wanted - 1).abs().nan_to_num(9e9).argmax())
    numbers = f"{show(got[wrong].item())}, expected {show(wanted[wrong].item())}"
    return f"{written} has the factor {numbers} for channel {wrong}"


def _error(weight, x, factor, quantize) -> float:
    rounded = quantize((weight.double() * factor).float()).double()
    return (x.double() @ weight.double().T - x.double() / factor @ rounded.T).square().mean().item()


def _search(
    weight, x, alphas, quantize, mean=None, error=None, power=lambda m, a: m**a, worst=False
):
    mean = x.abs().mean(0).clamp(min=1e-5) if mean is None else mean
    factors = [power(mean, alpha) for alpha in alphas]
    error = error or (lambda s: (x @ weight.T - x / s @ quantize(weight * s).T).square().mean())
    errors = torch.stack([error(factor) for factor in factors])
    return factors[int(errors.argmax() if worst else errors.argmin())]


def peak_magnitude(weight, x, alphas, quantize):
    """Takes the largest magnitude of each channel, as SmoothQuant does."""
    return _search(weight, x, alphas, quantize, x.abs().amax(0).clamp(min=1e-5))


def signed_mean(weight, x, alphas, quantize):
    """Takes the mean of the values, not of their magnitudes."""
    return _search(weight, x, alphas, quantize, x.mean(0).clamp(min=1e-5))


def magnitude_of_the_mean(weight, x, alphas, quantize):
    """Takes the mean of the values, and then its magnitude."""
    return _search(weight, x, alphas, quantize, x.mean(0).abs().clamp(min=1e-5))


def root_mean_square(weight, x, alphas, quantize):
    """Takes the root mean square of each channel."""
    return _search(weight, x, alphas, quantize, x.square().mean(0).sqrt().clamp(min=1e-5))


def _by_product(weight, x, alphas, quantize, product):
    def error(s):
        return (x @ weight.T - product(s)).square().mean()

    return _search(weight, x, alphas, quantize, error=error)


def over_the_weights(weight, x, alphas, quantize):
    """Divides by the weight's largest magnitude to the power 1 − alpha."""
    reach = weight.abs().amax(0).clamp(min=1e-5)
    return _search(weight, x, alphas, quantize, power=lambda m, a: m**a / reach ** (1 - a))


def smoothquant_formula(weight, x, alphas, quantize):
    """Takes SmoothQuant's factor, with the peaks of the activations and of the weight."""
    peak, reach = x.abs().amax(0).clamp(min=1e-5), weight.abs().amax(0).clamp(min=1e-5)
    return _search(weight, x, alphas, quantize, peak, power=lambda m, a: m**a / reach ** (1 - a))


def divided_twice(weight, x, alphas, quantize):
    """Divides both the activations and the rounded weight."""
    return _by_product(weight, x, alphas, quantize, lambda s: x / s @ (quantize(weight * s) / s).T)


def weight_not_multiplied(weight, x, alphas, quantize):
    """Divides the activations and rounds the weight as it is."""
    return _by_product(weight, x, alphas, quantize, lambda s: x / s @ quantize(weight).T)


def multiplied_after_rounding(weight, x, alphas, quantize):
    """Multiplies the rounded weight by the factor, which x / s undoes."""
    return _by_product(weight, x, alphas, quantize, lambda s: x / s @ (quantize(weight) * s).T)


def error_without_the_factor(weight, x, alphas, quantize):
    """Measures plain rounding for every exponent."""
    return _by_product(weight, x, alphas, quantize, lambda s: x @ quantize(weight).T)


def compared_with_the_divided(weight, x, alphas, quantize):
    """Compares with x / s times the weight, in place of x times the weight."""
    return _search(
        weight,
        x,
        alphas,
        quantize,
        error=lambda s: (x / s @ (weight - quantize(weight * s)).T).norm(),
    )


def sides_exchanged(weight, x, alphas, quantize):
    """Multiplies the activations and divides the weight."""
    return _by_product(weight, x, alphas, quantize, lambda s: x * s @ quantize(weight / s).T)


def error_of_weights(weight, x, alphas, quantize):
    """Searches for the least error of the weights."""
    return _search(
        weight, x, alphas, quantize, error=lambda s: (quantize(weight * s) / s - weight).norm()
    )


def activations_not_divided(weight, x, alphas, quantize):
    """Scales the weights and forgets to divide the activations."""
    return _search(
        weight, x, alphas, quantize, error=lambda s: (x @ (weight - quantize(weight * s)).T).norm()
    )


def _by_difference(weight, x, alphas, quantize, measure):
    def error(s):
        return measure(x @ weight.T - x / s @ quantize(weight * s).T)

    return _search(weight, x, alphas, quantize, error=error)


def signed_error(weight, x, alphas, quantize):
    """Averages the differences with their signs."""
    return _by_difference(weight, x, alphas, quantize, torch.mean)


def absolute_error(weight, x, alphas, quantize):
    """Averages the magnitudes of the differences."""
    return _by_difference(weight, x, alphas, quantize, lambda d: d.abs().mean())


def exponent_exchanged(weight, x, alphas, quantize):
    """Raises to 1 − alpha."""
    return _search(weight, x, alphas, quantize, power=lambda m, a: m ** (-a))


def _centered(mean, alpha):
    factor = mean**alpha
    return factor / (factor.max() * factor.min()).sqrt()


def searched_when_centered(weight, x, alphas, quantize):
    """Centers each factor before it rounds, as AWQ's code does."""
    return _search(weight, x, alphas, quantize, power=_centered)


def centered_at_the_end(weight, x, alphas, quantize):
    """Centers the factor that it returns on 1, as AWQ's code does."""
    return _centered(_search(weight, x, alphas, quantize), 1)


def divided_by_its_mean(weight, x, alphas, quantize):
    """Divides the factor that it returns by its mean."""
    factor = _search(weight, x, alphas, quantize)
    return factor / factor.mean()


def largest_error(weight, x, alphas, quantize):
    """Keeps the exponent with the largest error."""
    return _search(weight, x, alphas, quantize, worst=True)


def last_of_equals(weight, x, alphas, quantize):
    """Lets a later exponent replace one that is as good."""
    return _search(weight, x, alphas[::-1], quantize)


def reciprocal_returned(weight, x, alphas, quantize):
    """Returns what x is multiplied by."""
    return 1 / _search(weight, x, alphas, quantize)


def dead_channel_divides(weight, x, alphas, quantize):
    """Leaves out the clamp, and takes the place of the least error."""
    return _search(weight, x, alphas, quantize, x.abs().mean(0))


def dead_channel_compares(weight, x, alphas, quantize):
    """Leaves out the clamp, and compares each error with the best so far."""
    mean, least = x.abs().mean(0), float("inf")
    for alpha in alphas:
        factor = mean**alpha
        error = (x @ weight.T - x / factor @ quantize(weight * factor).T).square().mean().item()
        if error < least:
            best, least = factor, error
    return best


def last_exponent(weight, x, alphas, quantize):
    """Returns the factor of the last exponent tried."""
    return x.abs().mean(0).clamp(min=1e-5) ** alphas[-1]


_WRONG = (
    (last_of_equals, "of equal errors the first counts: replace the best only by a smaller one"),
    (peak_magnitude, "AWQ takes the mean magnitude of a channel; the peak is SmoothQuant's choice"),
    (signed_mean, "the mean of the magnitudes: positive and negative values must not cancel"),
    (
        magnitude_of_the_mean,
        "mean of |x|, not |mean of x|: take the magnitudes first, then their mean",
    ),
    (root_mean_square, "the mean of |x|, not the root of the mean square"),
    (over_the_weights, "AWQ's factor comes from the activations alone: no power of the weights"),
    (
        smoothquant_formula,
        "this is SmoothQuant's formula: here the mean |x| to the power alpha is all",
    ),
    (divided_twice, "divide once: x / s already undoes the factor of the weight"),
    (weight_not_multiplied, "multiply the weight by the factor before it is rounded"),
    (
        multiplied_after_rounding,
        "multiply before rounding, quantize(weight * s): after it, x / s undoes the factor",
    ),
    (
        error_without_the_factor,
        "always the first exponent: if each has the same error, round weight * s, not weight",
    ),
    (
        compared_with_the_divided,
        "compare with x @ weight.T, the whole product: x is not divided there",
    ),
    (sides_exchanged, "the factor multiplies the weight and divides x, not the other way round"),
    (error_of_weights, "compare the outputs; the error of the weights does not know the inputs"),
    (activations_not_divided, "divide x by the factor too, or the product is another one"),
    (signed_error, "square the differences: positive and negative ones cancel in a mean"),
    (
        absolute_error,
        "square the differences: the task asks for the mean square, not the mean magnitude",
    ),
    (exponent_exchanged, "channels with large activations get the larger factor, not the smaller"),
    (centered_at_the_end, "return the factor that was searched: this one is centered afterwards"),
    (divided_by_its_mean, "return the factor that was searched, not divided by its mean"),
    (
        searched_when_centered,
        "round with the factor as it is: a grid of fixed steps sees a centered one",
    ),
    (largest_error, "keep the exponent with the least error, not the largest"),
    (reciprocal_returned, "return s, by which the weight is multiplied, not 1 / s"),
    (dead_channel_divides, "the mean of a dead channel is 0, and 0 / 0 is NaN: clamp at 1e-5"),
    (dead_channel_compares, _CLAMP),
    (last_exponent, "this is the last exponent; remember the best one so far"),
)


def factor_channel_by_channel(weight, x, alphas, quantize):
    """Walks through channels and tokens in Python."""
    best, least = None, None
    mean = [max(1e-5, sum(map(abs, column)) / len(column)) for column in x.T.tolist()]
    for alpha in alphas:
        factor = torch.tensor([m**alpha for m in mean])
        rounded = quantize(weight * factor) / factor
        error = sum(((row @ (rounded - weight).T) ** 2).sum().item() for row in x)
        if least is None or error < least:
            best, least = factor, error
    return best


def factor_by_hessian(weight, x, alphas, quantize):
    """Measures by the Hessian, as the chapter does."""
    hessian, mean = x.T @ x, x.abs().mean(0).clamp_min(1e-5)
    found = []
    for alpha in alphas:
        factor = mean.pow(alpha)
        error = quantize(weight * factor) / factor - weight
        found.append((((error @ hessian) * error).sum().item(), factor))
    return min(found, key=lambda pair: pair[0])[1]


EXERCISE = Exercise(
    id="2.4",
    title="Search AWQ's factor",
    stars=2,
    minutes=20,
    function_names=("best_factor",),
    check=_check,
    takeaway="One number is searched, so there is little that a text could teach wrongly.",
    wrong_answers=_WRONG,
    variants=(factor_channel_by_channel, factor_by_hessian),
)
