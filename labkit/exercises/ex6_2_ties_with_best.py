"""Exercise 6.2: `ties_with_best` names the models that tie with the best one, paired by window.

The reference is the mean and the standard error of the differences, in numpy by the definition.
"""

import itertools
import math
from statistics import fmean

import numpy as np
import torch

from labkit.exercises.judge import Exercise, Wrong, kind, show
from labkit.exercises.judge_on_dicts import judge_on_dicts


def _cases():
    # Each model lies a known number of standard errors above the best one, never about two.
    random = np.random.default_rng(62)
    for n, above in (
        (4, {"FP32": 0, "INT8": 1.5, "INT4": 9}),
        (9, {"INT4": 3, "FP32": 0}),
        (20, {"INT8": 0.7, "FP32": 0}),
        (4, {"INT4": 9, "copy": 0, "FP32": 0}),
        (3, {"FP32": 0, "INT8": 1.8, "QAT": 1.3, "INT4": 2.4}),
        (2, {"INT8": 1.7, "FP32": 0}),
        (25, {"INT4": 8, "INT8": 1.3, "FP32": 0}),
        (12, {"INT4": 3.4, "GPTQ": 2.6, "FP32": 0, "INT8": 1.6, "QAT": 0.8}),
        (16, {"INT8": 1.5, "INT4": 3, "FP32": 0, "NF4": 4.5, "INT3": 30}),
        (100, {"INT3": 40, "INT4": 12, "INT8": 0.3, "GPTQ": 2.3, "FP32": 0}),
        (32, {"QAT": 1.7, "FP32": 0, "copy": 0, "INT8": 0.6, "NF4": 2.5}),
    ):
        base = 3 + 0.5 * random.standard_normal(n)
        yield ({name: _above(base, errors, random) for name, errors in above.items()},)


def _above(base: np.ndarray, errors: float, random: np.random.Generator) -> torch.Tensor:
    noise = random.standard_normal(len(base))
    noise = (noise - noise.mean()) / noise.std(ddof=1)
    raised = 0.03 * (noise + errors / len(base) ** 0.5) if errors else 0 * noise
    return torch.tensor(base + raised)


def _check(function) -> None:
    name = "ties_with_best"
    judge_on_dicts(name, function, _cases(), _examine, _WRONG, _write_models)


def _write_models(window_nats) -> str:
    return f"{len(window_nats)} models, {len(next(iter(window_nats.values())))} windows"


def _examine(window_nats, got) -> str | None:
    written = f"ties_with_best({_write_models(window_nats)})"
    if not isinstance(got, list) or not all(isinstance(name, str) for name in got):
        raise Wrong(f"{written} returns {kind(got)}, expected a list of names")
    table = {name: nats.numpy() for name, nats in window_nats.items()}
    best = min(table, key=lambda name: table[name].mean())
    above = {name: _mean_and_error(nats - table[best]) for name, nats in table.items()}
    expected = [name for name, (mean, error) in above.items() if mean <= 2 * error]
    if got == expected:
        return None
    complaint = f"{written} gives {show(got)}, expected {show(expected)}"
    odd = [name for name in table if (name in got) != (name in expected)]
    mean, error = above[odd[0]] if odd else (0, 0)
    return f"{complaint}; {odd[0]} − {best} is {mean:.4f} ± {error:.4f}" if mean else complaint


def _mean_and_error(differences: np.ndarray) -> tuple[float, float]:
    n = len(differences)
    mean = differences.sum() / n
    return mean, math.sqrt(((differences - mean) ** 2).sum() / (n - 1) / n)


def _best_of(window_nats):
    return min(window_nats, key=lambda name: float(window_nats[name].mean()))


def _paired_error(nats, best):
    return (nats - best).std() / len(nats) ** 0.5


def _within(window_nats, allowed, best=None):
    best = window_nats[best or _best_of(window_nats)]
    return [
        name
        for name, nats in window_nats.items()
        if (nats - best).mean().abs() <= allowed(nats, best)
    ]


def errors_added(window_nats):
    """Adds the errors of the two means, as if each model had windows of its own."""
    return _within(window_nats, lambda a, b: 2 * (a.var() / len(a) + b.var() / len(b)) ** 0.5)


def spread_of_a_window(window_nats):
    """Takes the standard deviation of one window for the error of the mean."""
    return _within(window_nats, lambda a, b: 2 * (a - b).std())


def divided_by_n(window_nats):
    """Divides by n where √n is due."""
    return _within(window_nats, lambda a, b: 2 * (a - b).std() / len(a))


def one_standard_error(window_nats):
    """Allows one standard error."""
    return _within(window_nats, _paired_error)


def deviation_over_n(window_nats):
    """Divides by n in the standard deviation."""
    return _within(window_nats, lambda a, b: 2 * (a - b).std(correction=0) / len(a) ** 0.5)


def compared_with_the_first(window_nats):
    """Takes the first model for the best one."""
    return _within(window_nats, lambda a, b: 2 * _paired_error(a, b), next(iter(window_nats)))


def most_nats_for_best(window_nats):
    """Takes the model with the largest loss for the best one."""
    worst = max(window_nats, key=lambda name: float(window_nats[name].mean()))
    return _within(window_nats, lambda a, b: 2 * _paired_error(a, b), worst)


def best_left_out(window_nats):
    """Returns the others only."""
    best = _best_of(window_nats)
    return [name for name in ties_in_numpy(window_nats) if name != best]


def less_than_two_errors(window_nats):
    """Writes < for ≤, and 0 < 0 does not hold."""
    best = window_nats[_best_of(window_nats)]
    return [
        name
        for name, nats in window_nats.items()
        if (nats - best).mean() < 2 * _paired_error(nats, best)
    ]


def only_the_best(window_nats):
    """Returns the best model alone."""
    return [_best_of(window_nats)]


def handed_on(window_nats):
    """Compares each model with the one before it in rank."""
    ranked = sorted(window_nats, key=lambda name: float(window_nats[name].mean()))
    tied = ranked[:1]
    for before, name in itertools.pairwise(ranked):
        nats = window_nats[name] - window_nats[before]
        if nats.mean() > 2 * nats.std() / len(nats) ** 0.5:
            break
        tied.append(name)
    return [name for name in window_nats if name in tied]


def best_first(window_nats):
    """Returns the names by rank."""
    return sorted(ties_in_numpy(window_nats), key=lambda name: float(window_nats[name].mean()))


_WRONG = (
    (errors_added, "the windows are the same: take the error of the differences, not of two means"),
    (spread_of_a_window, "that is the spread of one window; its mean over n has 1/√n of it"),
    (divided_by_n, "the standard error is the deviation over √n, not over n"),
    (one_standard_error, "a tie reaches to two standard errors, not to one"),
    (deviation_over_n, "few windows: divide by n − 1 in the standard deviation"),
    (compared_with_the_first, "the best model is the one with the least mean, wherever it stands"),
    (most_nats_for_best, "the best model has the fewest nats"),
    (less_than_two_errors, "a difference of 0 with an error of 0 is a tie too: use <="),
    (best_left_out, "the best model belongs to the answer"),
    (only_the_best, "models that the best one does not clearly beat belong to it as well"),
    (handed_on, "ties are not handed on: compare each with the best, not with the next"),
    (best_first, "keep the order of the dict"),
)


def ties_in_numpy(window_nats):
    """Divides the mean by its error, where there is one."""
    table = np.stack([nats.numpy() for nats in window_nats.values()])
    differences = table - table[table.mean(1).argmin()]
    mean, error = differences.mean(1), differences.std(1, ddof=1) / table.shape[1] ** 0.5
    with np.errstate(invalid="ignore", divide="ignore"):
        tied = ~(mean / error > 2)
    return list(itertools.compress(window_nats, tied.tolist()))


def ties_by_squares(window_nats):
    """Squares both sides, and adds up by hand."""
    ranked = sorted(window_nats, key=lambda name: sum(window_nats[name].tolist()))
    lost, best = set(), window_nats[ranked[0]].tolist()
    for name in ranked[1:]:
        d = [x - y for x, y in zip(window_nats[name].tolist(), best, strict=True)]
        mean = fmean(d)
        if mean**2 * len(d) * (len(d) - 1) > 4 * sum((x - mean) ** 2 for x in d):
            lost.add(name)
    return [name for name in window_nats if name not in lost]


EXERCISE = Exercise(
    id="6.2",
    title="Who ties with the best?",
    stars=2,
    minutes=15,
    function_names=("ties_with_best",),
    check=_check,
    takeaway="The winner of a table is a group, and within it something else may decide.",
    wrong_answers=_WRONG,
    variants=(ties_in_numpy, ties_by_squares),
)
