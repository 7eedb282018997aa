"""Exercise 7.2: `wanda_mask` keeps in each row the weights with the largest |weight| times norm.

The reference is numpy's `argsort` of the scores in float64.
"""

import math

import numpy as np
import torch

from labkit.exercises.judge import Exercise, call, judge, show_indices
from labkit.exercises.mask_misfit import mask_misfit


def _cases():
    weight = torch.tensor([[1.0, -2.0, 3.0, 0.5], [4.0, 1.0, -1.5, 2.0]])
    norm = torch.tensor([8.0, 2.0, 1.0, 3.0])
    yield weight, norm, 0.5
    yield weight, norm, 0.25
    yield weight, norm, 0.75
    yield torch.tensor([[-3.0, 1.0, 2.0, 0.5, -0.75]]), torch.tensor([0.5, 3.0, 4.0, 2.5, 1.0]), 0.5
    yield weight, norm, 0.0
    random = torch.Generator().manual_seed(71)
    for out, inputs in ((3, 5), (4, 8), (6, 7), (8, 8), (5, 16), (12, 30)):
        for sparsity in (0.75, 0.25, 0.5, 0.0):
            weight = torch.randn(out, inputs, generator=random)
            weight *= 4.0 ** torch.randn(out, 1, generator=random)
            norm = 3.0 ** torch.randn(inputs, generator=random)
            yield weight, norm, sparsity


def _check(function) -> None:
    judge("wanda_mask", function, _cases(), _examine, _WRONG)


def _examine(weight, norm, sparsity, got) -> str | None:
    written = call("wanda_mask", weight, norm, sparsity)
    scores = np.abs(weight.double().numpy()) * norm.double().numpy()
    order = np.argsort(scores, axis=1)[:, int(sparsity * weight.shape[1]) :]
    expected = torch.zeros(weight.shape, dtype=torch.bool).scatter(1, torch.from_numpy(order), True)
    if complaint := mask_misfit(written, got, expected):
        return complaint
    for row, (kept, wanted) in enumerate(zip(got, expected, strict=True)):
        if not kept.equal(wanted):
            came, due = (
                show_indices(places.nonzero().flatten().tolist()) for places in (kept, wanted)
            )
            return f"{written} keeps the places {came} of row {row}, expected {due}"
    return None


def _all_but_smallest(score, n_dropped, dim=1):
    smallest = score.argsort(dim).narrow(dim, 0, n_dropped)
    return torch.ones(score.shape, dtype=torch.bool).scatter(dim, smallest, False)


def _n_dropped(weight, sparsity):
    return int(sparsity * weight.shape[1])


def norm_forgotten(weight, norm, sparsity):
    """Prunes by magnitude."""
    return _all_but_smallest(weight.abs(), _n_dropped(weight, sparsity))


def one_threshold(weight, norm, sparsity):
    """Compares all weights of the matrix with each other."""
    score = (weight.abs() * norm).flatten()[None]
    return _all_but_smallest(score, int(sparsity * score.numel())).view(weight.shape)


def within_columns(weight, norm, sparsity):
    """Drops a share of each column."""
    return _all_but_smallest(weight.abs() * norm, int(sparsity * len(weight)), dim=0)


def smallest_kept(weight, norm, sparsity):
    """Drops the largest scores."""
    return _all_but_smallest(-weight.abs() * norm, _n_dropped(weight, sparsity))


def mask_of_the_dropped(weight, norm, sparsity):
    """Marks what is dropped."""
    return ~_all_but_smallest(weight.abs() * norm, _n_dropped(weight, sparsity))


def share_kept(weight, norm, sparsity):
    """Takes the sparsity for the share that stays."""
    n_dropped = weight.shape[1] - _n_dropped(weight, sparsity)
    return _all_but_smallest(weight.abs() * norm, n_dropped)


def norm_squared(weight, norm, sparsity):
    """Squares the norm, but not the weight."""
    return _all_but_smallest(weight.abs() * norm**2, _n_dropped(weight, sparsity))


def weight_squared(weight, norm, sparsity):
    """Squares the weight, but not the norm."""
    return _all_but_smallest(weight**2 * norm, _n_dropped(weight, sparsity))


def dropped_rounded_up(weight, norm, sparsity):
    """Rounds the number of dropped weights up, or that of kept ones down."""
    return _all_but_smallest(weight.abs() * norm, math.ceil(sparsity * weight.shape[1]))


def signed_score(weight, norm, sparsity):
    """Takes a large negative weight for a small one."""
    return _all_but_smallest(weight * norm, _n_dropped(weight, sparsity))


def pruned_weight(weight, norm, sparsity):
    """Returns the weight with zeros in it."""
    return weight * mask_by_ranks(weight, norm, sparsity)


def above_the_quantile(weight, norm, sparsity):
    """Drops the score that equals the quantile."""
    score = weight.abs() * norm
    return score > score.quantile(sparsity, dim=1, keepdim=True)


def all_after_minus_zero(weight, norm, sparsity):
    """Drops the last n of a sorted row with [-n:], which is the whole row for n = 0."""
    score, n_dropped = weight.abs() * norm, _n_dropped(weight, sparsity)
    dropped = score.argsort(1, descending=True)[:, -n_dropped:]
    return torch.ones(score.shape, dtype=torch.bool).scatter(1, dropped, False)


_WRONG = (
    (norm_forgotten, "this is the magnitude alone: multiply it by the norm of the input channel"),
    (one_threshold, "every row drops as many; do not compare across rows"),
    (within_columns, "the weights of a row compete with each other, not those of a column"),
    (smallest_kept, "the smallest scores are dropped, not the largest"),
    (all_after_minus_zero, "sparsity 0 drops nothing, but [-0:] is the whole row"),
    (mask_of_the_dropped, "the mask is turned: True means kept"),
    (share_kept, "the sparsity is the share that is dropped, not the share that stays"),
    (norm_squared, "square both factors or neither; here it is the norm alone"),
    (weight_squared, "the score is |weight| · norm, without a square on the weight"),
    (dropped_rounded_up, "the number to drop is cut off, not rounded up: int(0.5 * 5) is 2"),
    (signed_score, "a large negative weight is large: take its magnitude"),
    (pruned_weight, "the mask itself is asked for, not the pruned weight"),
    (above_the_quantile, "the score at the quantile itself stays: >= in place of >"),
)


def mask_by_ranks(weight, norm, sparsity):
    """Sorts twice: the second sort gives each score its rank."""
    ranks = (weight * norm).square().argsort(1).argsort(1)
    return ranks >= int(sparsity * weight.shape[1])


def mask_by_rows(weight, norm, sparsity):
    """Compares each row with the smallest score that stays."""
    rows = []
    for row in (weight.abs().double() * norm.double()).tolist():
        smallest = sorted(row)[int(sparsity * len(row))]
        rows.append([score >= smallest for score in row])
    return torch.tensor(rows)


def mask_by_largest(weight, norm, sparsity):
    """Asks for the largest scores."""
    score = torch.einsum("oi,i->oi", weight.abs(), norm)
    largest = score.topk(weight.shape[1] - int(sparsity * weight.shape[1])).indices
    mask = torch.zeros_like(score, dtype=torch.bool)
    mask[torch.arange(len(mask))[:, None], largest] = True
    return mask


EXERCISE = Exercise(
    id="7.2",
    title="Wanda's mask",
    stars=1,
    minutes=10,
    function_names=("wanda_mask",),
    check=_check,
    takeaway=(
        "A small weight on a loud channel can matter more than a large one on a quiet channel."
    ),
    wrong_answers=_WRONG,
    variants=(mask_by_ranks, mask_by_rows, mask_by_largest),
)
