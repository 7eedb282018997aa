"""Exercise 4.1: `loss_scale` is the largest power of two that keeps gradients finite in FP16.

The reference is numpy's float16, asked about one power after another.
"""

import math

import numpy as np
import torch

from labkit.exercises.judge import Exercise, call, judge, kind, show


def _cases():
    yield (torch.tensor([1.0, -3.0]),)
    yield (torch.tensor([-1e-6, 2e-7]),)
    yield (torch.tensor([65504.0]),)
    yield (torch.tensor([65519.0]),)  # rounds to 65504, still finite
    yield (torch.tensor([-1e6, 5.0]),)
    random = torch.Generator().manual_seed(41)
    for power in range(-30, 12, 3):
        yield (torch.randn(4, 5, generator=random) * 2.0**power,)


def _check(function) -> None:
    judge("loss_scale", function, _cases(), _examine, _WRONG)


def _examine(gradients, got) -> str | None:
    written = call("loss_scale", gradients)
    if not isinstance(got, float | int | np.floating):
        return f"{written} returns {kind(got)}, expected a float"
    values = gradients.double().numpy()
    powers = [2.0**k for k in range(-60, 80)]
    with np.errstate(over="ignore"):
        fits = [p for p in powers if np.isfinite((values * p).astype(np.float16)).all()]
    if float(got) == max(fits):
        return None
    return f"{written} gives {show(float(got))}, expected {show(max(fits))}"


def loss_scale_loop(gradients):
    """Doubles until the next step would overflow."""
    scale = 2.0**-60
    while torch.isfinite((gradients.double() * scale * 2).half()).all():
        scale *= 2
    return scale


def not_a_power(gradients):
    """Returns the exact ratio, whose product rounds."""
    return 65504 / float(gradients.abs().max())


def signed_maximum(gradients):
    """Forgets negative gradients."""
    top = float(gradients.max().clamp(min=1e-30))
    return 2.0 ** math.floor(math.log2(65504 / top))


def rounded_up(gradients):
    """Rounds the exponent up, one step too far."""
    return 2.0 ** math.ceil(math.log2(65504 / float(gradients.abs().max())))


def by_the_smallest(gradients):
    """Lifts the smallest gradient, and lets the largest overflow."""
    return 2.0 ** math.ceil(math.log2(6.1e-5 / float(gradients.abs().min().clamp(min=1e-30))))


_WRONG = (
    (not_a_power, "only a power of two changes no digit of the gradients"),
    (signed_maximum, "negative gradients overflow too: take magnitudes"),
    (rounded_up, "one step too far, the largest gradient becomes infinite"),
    (by_the_smallest, "the largest gradient decides: an infinite one spoils the step"),
)


EXERCISE = Exercise(
    id="4.1",
    title="How far can the loss be scaled?",
    stars=1,
    minutes=10,
    function_names=("loss_scale",),
    check=_check,
    takeaway=(
        "The largest gradient sets the limit; real scalers find it by trial and keep a margin."
    ),
    wrong_answers=_WRONG,
    variants=(loss_scale_loop,),
)
