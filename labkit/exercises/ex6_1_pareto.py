"""Exercise 6.1: `pareto` returns the entries of a table that no other entry dominates.

The reference is brute force in numpy, by the definition.
"""

import math
from numbers import Integral

import numpy as np
import torch

from labkit.exercises.judge import Exercise, Wrong, call, judge, kind, show_indices


def _cases():
    yield [400.0, 100.0], [3.0, 3.2]
    yield [400.0, 100.0], [3.0, 3.0]
    yield [100.0, 100.0], [3.0, 3.0]
    yield [100.0, 100.0], [3.1, 3.0]
    yield [100.0], [3.0]
    yield [55.0, 400.0, 100.0], [3.4, 3.0, 3.1]
    yield [100.0, 55.0, 120.0, 400.0], [3.0, 3.4, 3.1, 2.9]
    yield [400.0, 55.0, 100.0, 100.0, 120.0], [3.0, 3.4, 3.1, 3.1, 3.2]
    random = np.random.default_rng(61)
    for n, steps in ((5, 4), (6, 4), (8, 6), (9, 5), (12, 9), (20, 12), (30, 500), (60, 1000)):
        nbytes, losses = random.integers(1, steps, (2, n))
        yield (10.0 * nbytes).tolist(), (3 + losses / 8).tolist()


def _check(function) -> None:
    judge("pareto", function, _cases(), _examine, _WRONG)


def _examine(nbytes, nats, got) -> str | None:
    written = call("pareto", nbytes, nats)
    if len(nbytes) > 6:
        written = f"pareto({len(nbytes)} numbers, {len(nats)} numbers)"
    if not isinstance(got, list) or not all(isinstance(i, Integral) for i in got):
        odd = [kind(i) for i in got if not isinstance(i, Integral)] if isinstance(got, list) else []
        came = f"a list with {odd[0]} in it" if odd else kind(got)
        raise Wrong(f"{written} returns {came}, expected a list of indices")
    entries = np.array([nbytes, nats]).T
    expected = []
    for index, entry in enumerate(entries):
        never_larger, once_smaller = (entries <= entry).all(1), (entries < entry).any(1)
        if not (never_larger & once_smaller).any():
            expected.append(index)
    if got == expected:
        return None
    return f"{written} gives {show_indices(got)}, expected {show_indices(expected)}"


def _not_dominated(nbytes, nats, dominates):
    entries = list(zip(nbytes, nats, strict=True))
    return [
        i
        for i, mine in enumerate(entries)
        if not any(dominates(other, mine) for j, other in enumerate(entries) if j != i)
    ]


def _dominates(other, mine):
    return other != mine and other[0] <= mine[0] and other[1] <= mine[1]


def smaller_in_both(nbytes, nats):
    """Lets an entry dominate only if it is smaller in both numbers."""
    return _not_dominated(nbytes, nats, lambda a, b: a[0] < b[0] and a[1] < b[1])


def equals_drop_each_other(nbytes, nats):
    """Lets equal entries dominate each other."""
    return _not_dominated(nbytes, nats, lambda a, b: a[0] <= b[0] and a[1] <= b[1])


def smaller_in_either(nbytes, nats):
    """Lets an entry dominate if it is smaller in one number, whatever the other."""
    return _not_dominated(nbytes, nats, lambda a, b: a[0] < b[0] or a[1] < b[1])


def first_of_equals(nbytes, nats):
    """Keeps one of several equal entries."""
    entries = list(zip(nbytes, nats, strict=True))
    return [i for i in pareto_by_sorting(nbytes, nats) if entries[i] not in entries[:i]]


def most_nats(nbytes, nats):
    """Takes more nats for better."""
    return pareto_by_sorting(nbytes, [-x for x in nats])


def two_ends(nbytes, nats):
    """Takes the smallest and the best, and nothing between."""
    front = pareto_by_sorting(nbytes, nats)
    smallest, best = min(nbytes), min(nats)
    return [i for i in front if nbytes[i] == smallest or nats[i] == best]


def in_order_of_bytes(nbytes, nats):
    """Returns the indices in the order of the bytes."""
    return sorted(pareto_by_sorting(nbytes, nats), key=lambda i: nbytes[i])


def earlier_entries_only(nbytes, nats):
    """Compares an entry with those before it."""
    entries = list(zip(nbytes, nats, strict=True))
    return [
        i for i, mine in enumerate(entries) if not any(_dominates(a, mine) for a in entries[:i])
    ]


_WRONG = (
    (smaller_in_both, "an entry with as many bytes and fewer nats dominates as well"),
    (equals_drop_each_other, "equal entries do not dominate each other, so they stay"),
    (smaller_in_either, "smaller in one number is not enough if it is larger in the other"),
    (first_of_equals, "of equal entries all stay, not only the first"),
    (most_nats, "fewer nats are better"),
    (two_ends, "the front has more than its two ends"),
    (in_order_of_bytes, "sort the indices themselves, not the entries"),
    (earlier_entries_only, "compare each entry with all others, later ones too"),
)


def pareto_by_sorting(nbytes, nats):
    """Goes from few bytes to many, and keeps what lowers the nats, or repeats the last one kept."""
    front = []
    for i in sorted(range(len(nbytes)), key=lambda i: (nbytes[i], nats[i])):
        last = (nbytes[front[-1]], nats[front[-1]]) if front else (0, math.inf)
        if nats[i] < last[1] or (nbytes[i], nats[i]) == last:
            front.append(i)
    return sorted(front)


def pareto_by_broadcasting(nbytes, nats):
    """Compares all pairs at once."""
    table = torch.tensor([nbytes, nats], dtype=torch.float64)
    other, mine = table[:, :, None], table[:, None, :]
    dominated = (other <= mine).all(0) & (other < mine).any(0)
    return (~dominated.any(0)).nonzero().flatten().tolist()


EXERCISE = Exercise(
    id="6.1",
    title="The front",
    stars=1,
    minutes=10,
    function_names=("pareto",),
    check=_check,
    takeaway="What is not on the front has a better choice beside it, whatever you weigh more.",
    wrong_answers=_WRONG,
    variants=(pareto_by_sorting, pareto_by_broadcasting),
)
