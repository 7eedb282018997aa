"""Exercise 7.3: `n_of_m_mask` keeps the n largest scores in every m neighbors of a row.

The reference is Python's `sorted`, group by group.
"""

import itertools
import math

import numpy as np
import torch
from torch import nn

from labkit.exercises.judge import Exercise, call, show
from labkit.exercises.judge_with_errors import judge_with_errors, not_a_value_error
from labkit.exercises.mask_misfit import mask_misfit


def _cases():
    yield torch.tensor([[2.0, 5.0, 2.0, 2.0, -1.0, -4.0, -2.0, -3.0]]), 2, 4
    yield torch.tensor([[3.0, 4.0, -1.0, 1.0]]), 1, 2
    yield torch.tensor([[1.0, 1.0, 1.0, 1.0], [0.0, -7.0, 0.0, 4.0]]), 3, 4
    yield torch.tensor([[0.5, -2.0, 0.25, 1.0, 3.0, -0.5]]), 2, 4
    yield torch.tensor([[0.5, -2.0, 0.25, 1.0]]), 0, 4
    yield torch.tensor([[0.5, -2.0, 0.25, 1.0]]), 5, 4
    random = torch.Generator().manual_seed(73)
    for out, inputs, n, m in (
        (4, 8, 1, 4), (4, 16, 3, 4), (8, 16, 2, 8), (6, 12, 1, 3), (8, 24, 2, 4), (10, 10, 5, 5),
        (16, 8, 1, 2), (8, 32, 5, 8), (4, 12, 4, 4),
    ):  # fmt: skip
        yield torch.randn(out, inputs, generator=random), n, m
        yield torch.randint(-3, 4, (out, inputs), generator=random).float(), n, m
    yield torch.randn(4, 10, generator=random), 1, 4
    yield torch.randn(6, 9, generator=random), 4, 3


def _impossible(score, n, m) -> bool:
    return score.shape[1] % m > 0 or n not in range(1, m + 1)


def _check(function) -> None:
    judge_with_errors("n_of_m_mask", function, _cases(), _examine, _WRONG, Exception, _impossible)


def _examine(score, n, m, got) -> str | None:
    written = call("n_of_m_mask", score, n, m)
    if _impossible(score, n, m):
        return not_a_value_error(written, got)
    expected = torch.zeros(score.shape, dtype=torch.bool)
    groups = list(itertools.product(range(len(score)), range(0, score.shape[1], m)))
    for row, start in groups:
        values = score[row, start : start + m].tolist()
        ranked = sorted(range(m), key=lambda i, values=values: (-values[i], i))
        expected[row, [start + i for i in ranked[:n]]] = True
    if complaint := mask_misfit(written, got, expected):
        return complaint
    for row, start in groups:
        group = score[row, start : start + m]
        came, due = (mask[row, start : start + m] for mask in (got, expected))
        if not came.equal(due):
            places = [show(mask.nonzero().flatten()) for mask in (came, due)]
            alike = group[came].sort().values.equal(group[due].sort().values)
            return (
                f"{written}: of the scores {show(group)} it keeps the places {places[0]}, expected "
                f"{places[1]}{', the first of equals' * alike}"
            )
    return None


def _raise_if_impossible(score, n, m):
    if _impossible(score, n, m):
        raise ValueError(f"no {n} of {m} in {score.shape[1]} inputs")


def _first_n(groups, n):
    """Return the mask of the n largest in the last dimension; of equals the earlier one stays."""
    order = groups.sort(stable=True, dim=-1, descending=True).indices[..., :n]
    return torch.zeros(groups.shape, dtype=torch.bool).scatter(-1, order, True)


def _by_groups(score, n, m, choose=_first_n):
    _raise_if_impossible(score, n, m)
    return choose(score.unflatten(1, (-1, m)), n).flatten(1)


def _in_pieces(score, n, m):
    return torch.cat([_first_n(piece, n) for piece in score.split(m, 1)], 1)


def n_dropped_of_m(score, n, m):
    """Takes n for the number that is dropped."""
    return _by_groups(score, n, m, lambda groups, n: _first_n(groups, m - n))


def smallest_of_the_group(score, n, m):
    """Keeps the n smallest."""
    return _by_groups(-score, n, m)


def largest_magnitude(score, n, m):
    """Takes magnitudes of what is a score already."""
    return _by_groups(score.abs(), n, m)


def groups_down_the_column(score, n, m):
    """Groups the outputs."""
    _raise_if_impossible(score, n, m)
    return _in_pieces(score.T, n, m).T


def groups_of_every_mth(score, n, m):
    """Puts inputs into a group that lie apart."""
    _raise_if_impossible(score, n, m)
    return _first_n(score.unflatten(1, (m, -1)).mT, n).mT.flatten(1)


def share_of_the_row(score, n, m):
    """Keeps n / m of a row, wherever they lie."""
    _raise_if_impossible(score, n, m)
    return _first_n(score, score.shape[1] * n // m)


def n_of_the_row(score, n, m):
    """Keeps n in the whole row."""
    _raise_if_impossible(score, n, m)
    return _first_n(score, n)


def all_equals_stay(score, n, m):
    """Compares with the n-th largest, which several may equal."""
    return _by_groups(
        score, n, m, lambda groups, n: groups >= groups.sort(-1, True).values[..., n - 1 : n]
    )


def all_equals_go(score, n, m):
    """Keeps what is larger than the next largest, and so drops those equal to it."""

    def choose(groups, n):
        ranked = nn.functional.pad(groups.sort(-1, True).values, (0, 1), value=-math.inf)
        return groups > ranked[..., n : n + 1]

    return _by_groups(score, n, m, choose)


def later_of_equals(score, n, m):
    """Keeps the last of equal scores."""
    return _by_groups(score, n, m, lambda groups, n: _first_n(groups.flip(-1), n).flip(-1))


def scores_in_place_of_a_mask(score, n, m):
    """Returns the scores with zeros in them."""
    return score * _by_groups(score, n, m)


def nothing_checked(score, n, m):
    """Leaves the errors to torch, which knows nothing of n."""
    return _first_n(score.unflatten(1, (-1, m)), n).flatten(1)


def n_unchecked(score, n, m):
    """Tests whether m divides the inputs, and takes any n."""
    _raise_if_impossible(score, 1, m)
    return nothing_checked(score, n, m)


def m_unchecked(score, n, m):
    """Tests n, and leaves the error about m to torch."""
    if not 1 <= n <= m:
        raise ValueError("n")
    return nothing_checked(score, n, m)


def shorter_last_group(score, n, m):
    """Takes what is left at the end for a group."""
    if not 1 <= n <= m:
        raise ValueError("n")
    return _in_pieces(score, n, m)


def zero_of_m(score, n, m):
    """Allows n = 0."""
    _raise_if_impossible(score, max(n, 1), m)
    return nothing_checked(score, n, m)


def more_than_m_of_m(score, n, m):
    """Allows n > m."""
    _raise_if_impossible(score, min(n, m), m)
    return nothing_checked(score, n, m)


_WRONG = (
    (n_dropped_of_m, "in each group n scores stay; yours drops n"),
    (smallest_of_the_group, "the largest scores stay, not the smallest"),
    (largest_magnitude, "the scores are given: a negative one is small, so take no magnitudes"),
    (groups_down_the_column, "a group lies along a row, in the inputs, not down a column"),
    (groups_of_every_mth, "a group is m neighbors: with m = 4, the places 0, 1, 2 and 3"),
    (share_of_the_row, "every group keeps n: the share of the row alone is not enough"),
    (n_of_the_row, "this keeps n in a row; each group of the row keeps n"),
    (all_equals_stay, "with equal scores more than n stay: of those only the earlier ones may"),
    (all_equals_go, "with equal scores fewer than n stay: the earlier ones must"),
    (later_of_equals, "of equal scores the earlier one stays"),
    (scores_in_place_of_a_mask, "return the mask, not the scores under it"),
    (zero_of_m, "an n of 0 would keep nothing at all: that is a ValueError too"),
    (more_than_m_of_m, "more than m of m cannot stay: that is a ValueError too"),
    (n_unchecked, "an n that is not from 1 to m must raise ValueError"),
    (m_unchecked, "torch raises RuntimeError for such an m: test it before, and raise ValueError"),
    (shorter_last_group, "if m does not divide the inputs, raise ValueError, whatever is left"),
    (nothing_checked, "test n and m yourself, and raise ValueError before anything else"),
)


def groups_by_sorting(score, n, m):
    """Sorts the places of each group in Python."""
    rows = score.tolist()
    if len(rows[0]) % m or not 0 < n <= m:
        raise ValueError("groups do not fit")
    mask = np.zeros(score.shape, bool)
    for row, scores in enumerate(rows):
        for start in range(0, len(scores), m):
            places = range(start, start + m)
            mask[row, sorted(places, key=scores.__getitem__, reverse=True)[:n]] = True
    return torch.from_numpy(mask)


def groups_by_rivals(score, n, m):
    """Counts for each score how many of its group go before it."""
    groups = score.reshape(len(score), score.shape[1] // m, m) if score.shape[1] % m == 0 else None
    if groups is None or n < 1 or n > m:
        raise ValueError("groups do not fit")
    other, mine = groups[..., None, :], groups[..., :, None]
    earlier = torch.ones(m, m).tril(-1).bool()
    n_before = ((other > mine) | ((other == mine) & earlier)).sum(-1)
    return (n_before < n).reshape(score.shape)


EXERCISE = Exercise(
    id="7.3",
    title="Two of four",
    stars=2,
    minutes=15,
    function_names=("n_of_m_mask",),
    check=_check,
    takeaway=(
        "Every group keeps as many, which hardware can use, and which free choice would not do."
    ),
    wrong_answers=_WRONG,
    variants=(groups_by_sorting, groups_by_rivals),
)
