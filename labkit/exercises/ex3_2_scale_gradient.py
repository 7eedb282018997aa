"""Exercise 3.2: `scale_gradient` is LSQ's gradient of the step size that all weights share.

The reference is the sum of its terms in numpy, in float64.
"""

import numpy as np
import torch

from labkit.exercises.grid_gradients import gradient_cases, grid_parts
from labkit.exercises.judge import Exercise, call, judge, kind, show


def _check(function) -> None:
    cases = gradient_cases(32)
    judge("scale_gradient", function, cases, _examine, _WRONG)


def _examine(weight, scale, qmin, qmax, upstream, got) -> str | None:
    written = call("scale_gradient", weight, scale, qmin, qmax, upstream)
    if not isinstance(got, float | np.floating):
        return f"{written} returns {kind(got)}, expected a float"
    position, code, inside = grid_parts(weight, scale, qmin, qmax)
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


_WRONG = (
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


EXERCISE = Exercise(
    id="3.2",
    title="What reaches the step size",
    stars=2,
    minutes=15,
    function_names=("scale_gradient",),
    check=_check,
    takeaway=(
        "Clipped weights pull the step up, rounding errors push it either way: a learned trade."
    ),
    wrong_answers=_WRONG,
    variants=(scale_gradient_by_autograd,),
)
