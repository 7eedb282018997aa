"""Exercise 3.1: `weight_gradient` passes a gradient straight through rounding, but not clipping.

The reference is the definition in numpy, in float64.
"""

import numpy as np
import torch

from labkit.exercises.grid_gradients import gradient_cases, grid_parts
from labkit.exercises.judge import Exercise, call, judge, misfit


def _check(function) -> None:
    cases = gradient_cases(31)
    judge("weight_gradient", function, cases, _examine, _WRONG)


def _examine(weight, scale, qmin, qmax, upstream, got) -> str | None:
    written = call("weight_gradient", weight, scale, qmin, qmax, upstream)
    if complaint := misfit(got, torch.float32, tuple(weight.shape)):
        return f"{written} returns {complaint}"
    expected = upstream.double().numpy() * grid_parts(weight, scale, qmin, qmax)[2]
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


_WRONG = (
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


EXERCISE = Exercise(
    id="3.1",
    title="What reaches the weight",
    stars=1,
    minutes=10,
    function_names=("weight_gradient",),
    check=_check,
    takeaway="Inside the range the gradient passes, outside it stops.",
    wrong_answers=_WRONG,
    variants=(weight_gradient_by_autograd, weight_gradient_elementwise),
)
