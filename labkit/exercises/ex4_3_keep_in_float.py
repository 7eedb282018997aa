"""Exercise 4.3, a bug hunt: `keep_in_float` should choose one layer at a time, and measure anew.

The reference is that definition, spelled out: after each choice, the loss with each layer left.
"""

import numpy as np

from labkit.exercises.judge import Exercise, judge, kind, show


def _joint_loss(weights: dict[str, float], repairs: dict[frozenset, float]):
    """Return a loss of the layers kept in float; some repair the same damage, so gains overlap."""

    def loss_of(kept):
        gained = sum(weights[layer] for layer in set(kept))
        overlap = sum(cost for pair, cost in repairs.items() if pair <= set(kept))
        return 3 + sum(weights.values()) - gained + overlap

    return loss_of


def _cases():
    twins = {frozenset({"down 28", "down 29"}): 0.55}
    damage = {"down 28": 0.7, "down 29": 0.6, "up 29": 0.4, "query 3": 0.1}
    for n_kept in (1, 2, 3):
        yield _joint_loss(damage, twins), list(damage), n_kept
    random = np.random.default_rng(43)
    for n in (4, 5, 6, 7):
        for n_kept in (2, 3):
            names = [f"layer {i}" for i in range(n)]
            weights = dict(zip(names, random.uniform(0.2, 1, n).tolist(), strict=True))
            pairs = [frozenset({a, b}) for a in names for b in names if a < b]
            shares = {p: 0.8 * min(weights[layer] for layer in p) for p in pairs}
            overlaps = {p: share for p, share in shares.items() if random.random() < 0.5}
            yield _joint_loss(weights, overlaps), names, n_kept


def _check(function) -> None:
    judge("keep_in_float", function, _cases(), _examine, _WRONG)


def _examine(loss_of, layers, n_kept, got) -> str | None:
    written = f"keep_in_float(loss_of, {len(layers)} layers, {n_kept})"
    if not isinstance(got, list) or not set(got) <= set(layers):
        return f"{written} returns {kind(got)}, expected a list of layers"
    expected = []
    for _ in range(n_kept):
        losses = {x: loss_of([*expected, x]) for x in layers if x not in expected}
        expected.append(min(losses, key=losses.get))
    if sorted(got) == sorted(expected):
        return None
    ours, theirs = show(loss_of(expected)), show(loss_of(got))
    return f"{written} keeps {', '.join(got)} (loss {theirs}), expected a loss of {ours}"


def broken_keep_in_float(loss_of, layers, n_kept):
    """Choose the layers to keep in float, one after another; return their names."""
    kept = []
    alone = {layer: loss_of([layer]) for layer in layers}
    while len(kept) <= n_kept - 1:
        rest = [layer for layer in layers if layer not in kept]
        kept.append(min(rest, key=alone.get))
    return kept


def measured_alone_again(loss_of, layers, n_kept):
    """Measures in each round, but each layer alone."""
    kept = []
    while len(kept) < n_kept:
        rest = [layer for layer in layers if layer not in kept]
        kept.append(min(rest, key=lambda layer: loss_of([layer])))
    return kept


def one_too_few(loss_of, layers, n_kept):
    """Stops one round early."""
    kept = []
    while len(kept) < n_kept - 1:
        rest = [layer for layer in layers if layer not in kept]
        kept.append(min(rest, key=lambda layer: loss_of([*kept, layer])))
    return kept


def worst_kept(loss_of, layers, n_kept):
    """Keeps the layer that leaves the largest loss."""
    kept = []
    while len(kept) < n_kept:
        rest = [layer for layer in layers if layer not in kept]
        kept.append(max(rest, key=lambda layer: loss_of([*kept, layer])))
    return kept


def one_too_many(loss_of, layers, n_kept):
    """Goes on for one round more."""
    kept = []
    while len(kept) <= n_kept:
        rest = [layer for layer in layers if layer not in kept]
        kept.append(min(rest, key=lambda layer: loss_of([*kept, layer])))
    return kept


def only_the_first_corrected(loss_of, layers, n_kept):
    """Measures once more after the first choice, then never again."""
    first = min(layers, key=lambda layer: loss_of([layer]))
    rest = [layer for layer in layers if layer != first]
    return [first, *sorted(rest, key=lambda layer: loss_of([first, layer]))[: n_kept - 1]]


_WRONG = (
    (measured_alone_again, "measure a layer together with those already kept, not alone"),
    (one_too_few, "keep n_kept layers, no fewer"),
    (worst_kept, "keep the layer that leaves the smallest loss, not the largest"),
    (one_too_many, "keep n_kept layers, no more"),
    (only_the_first_corrected, "measure again after every choice, not only after the first"),
)


def keep_recursively(loss_of, layers, n_kept):
    """Chooses one, then the others given that one."""
    if n_kept == 0:
        return []
    best = min(layers, key=lambda layer: loss_of([layer]))
    rest = [layer for layer in layers if layer != best]
    return [best, *keep_recursively(lambda kept: loss_of([best, *kept]), rest, n_kept - 1)]


def keep_by_gain(loss_of, layers, n_kept):
    """Takes the largest gain against the loss so far."""
    kept, left = [], list(layers)
    for _ in range(n_kept):
        gains = [loss_of(kept) - loss_of([*kept, layer]) for layer in left]
        kept.append(left.pop(int(np.argmax(gains))))
    return kept


EXERCISE = Exercise(
    id="4.3",
    title="Bug hunt: sums of sensitivities",
    stars=2,
    minutes=10,
    function_names=("keep_in_float",),
    check=_check,
    takeaway="What a layer gains depends on the company it is in; only measuring tells.",
    wrong_answers=_WRONG,
    variants=(keep_recursively, keep_by_gain),
    broken=broken_keep_in_float,
)
