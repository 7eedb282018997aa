"""Exercise 3.4: `qat_gain` says what QAT gained over its control, with an error paired by seed.

The reference is numpy, by the definition.
"""

import math

import numpy as np
import torch

from labkit.exercises.judge import Exercise, call, judge, kind, show


def _check(function) -> None:
    random = torch.Generator().manual_seed(34)
    cases = [([3.0, 3.2, 3.4], [3.1, 3.3, 3.5], [3.6, 3.8, 4.0])]
    cases += [([3.0, 3.4, 3.2], [3.3, 3.5, 3.4], [3.9, 3.8, 4.0])]
    cases += [([3.0, 3.3, 3.1], [3.1, 3.0, 3.3], [3.6, 3.6, 3.6])]
    cases += [([3.5, 3.6, 3.4], [3.1, 3.0, 3.2], [3.6, 3.6, 3.6])]
    for seeds in (3, 3, 4, 5, 8):
        shift = torch.randn(1, generator=random)
        rows = 3 + 0.2 * torch.randn(3, seeds, generator=random) + torch.tensor([[0], [1], [2]]) / 9
        cases.append(tuple((row + shift).tolist() for row in rows))
    judge("qat_gain", function, cases, _examine, _WRONG)


def _fair(qat, control_ptq):
    gains = np.array(control_ptq) - np.array(qat)
    error = gains.std(ddof=1) / math.sqrt(len(gains))
    return gains.mean(), error


def _verdict(gain, error):
    return "tie" if abs(gain) <= 2 * error + 1e-9 else "better" if gain > 0 else "worse"


def _examine(qat, control_ptq, ptq, got) -> str | None:
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


_WRONG = (
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


EXERCISE = Exercise(
    id="3.4",
    title="What did QAT add?",
    stars=1,
    minutes=10,
    function_names=("qat_gain",),
    check=_check,
    takeaway=(
        "Against a control that was trained as long, a gain is a gain of quantization in the loop."
    ),
    wrong_answers=_WRONG,
    variants=(gain_with_torch,),
)
