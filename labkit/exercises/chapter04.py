"""Chapter 4: checks, known wrong answers and correct variants.

Each wrong answer's docstring names the misconception; the text beside it is what a learner reads.
References are numpy by the definition, or the definition itself step by step, never labkit.
"""

import math

import numpy as np
import torch

from labkit.exercises import Exercise, call, judge, kind, misfit, show

# 4.1 ------------------------------------------------------------------------------------------


def _scale_cases():
    yield (torch.tensor([1.0, -3.0]),)
    yield (torch.tensor([-1e-6, 2e-7]),)
    yield (torch.tensor([65504.0]),)
    yield (torch.tensor([65519.0]),)  # rounds to 65504, still finite
    yield (torch.tensor([-1e6, 5.0]),)
    random = torch.Generator().manual_seed(41)
    for power in range(-30, 12, 3):
        yield (torch.randn(4, 5, generator=random) * 2.0**power,)


def _check_loss_scale(function) -> None:
    judge("loss_scale", function, _scale_cases(), _examine_loss_scale, _WRONG_LOSS_SCALE)


def _examine_loss_scale(gradients, got) -> str | None:
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


_WRONG_LOSS_SCALE = (
    (not_a_power, "only a power of two changes no digit of the gradients"),
    (signed_maximum, "negative gradients overflow too: take magnitudes"),
    (rounded_up, "one step too far, the largest gradient becomes infinite"),
    (by_the_smallest, "the largest gradient decides: an infinite one spoils the step"),
)


# 4.2 ------------------------------------------------------------------------------------------


def _outlier_cases():
    # No code lies half-way between two integers, where rounding may go either way.
    x = torch.tensor([[1.0, -20.0, 0.6], [0.25, 8.0, -1.0]])
    yield x, torch.tensor([[1.0, 0.6, -1.0], [0.3, -0.2, 0.7]]), 6.0
    yield x, torch.tensor([[1.0, 0.6, -1.0]]), math.inf
    yield torch.tensor([[0.0, -20.0], [1.0, 2.0]]), torch.tensor([[1.0, 0.5]]), 6.0
    random = torch.Generator().manual_seed(42)
    for n, inputs, outputs in ((1, 8, 4), (5, 16, 3), (7, 64, 10), (12, 33, 5)):
        for threshold in (2.5, 6.0, math.inf):
            x = torch.randn(n, inputs, generator=random)
            x[:, ::7] *= 10
            yield x, torch.randn(outputs, inputs, generator=random), threshold


def _check_outliers(function) -> None:
    judge("outlier_product", function, _outlier_cases(), _examine_outliers, _WRONG_OUTLIERS)


def _codes(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    scale = np.abs(values).max(1, keepdims=True) / np.float32(127)
    scale[scale == 0] = 1
    return np.round(values / scale), scale


def _examine_outliers(x, weight, threshold, got) -> str | None:
    written = call("outlier_product", x, weight, threshold)
    if complaint := misfit(got, torch.float32, (len(x), len(weight))):
        return f"{written} returns {complaint}"
    x, weight = x.numpy(), weight.numpy()
    out = (np.abs(x) > threshold).any(0)
    (codes, scale), (rows, steps) = _codes(np.where(out, np.float32(0), x)), _codes(weight)
    expected = (codes.astype(np.float64) @ rows.T) * scale * steps.T + x[:, out] @ weight[:, out].T
    bad = ~np.isclose(got.numpy(), expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max())
    if not bad.any():
        return None
    at = tuple(int(i) for i in np.argwhere(bad)[0])
    return f"{written} gives {show(float(got[at]))} at {at}, expected {show(float(expected[at]))}"


def _int8(values):
    scale = (values.abs().amax(1, keepdim=True) / 127).clamp(min=1e-30)
    return (values / scale).round(), scale


def _product(x, weight, rest, floats):
    (codes, scale), (rows, steps) = _int8(rest), _int8(weight)
    return codes @ rows.T * scale * steps.T + floats @ weight.T


def single_values(x, weight, threshold):
    """Takes single values out, not whole columns."""
    out = x.abs() > threshold
    return _product(x, weight, x.masked_fill(out, 0), x * out)


def positive_outliers(x, weight, threshold):
    """Compares x, not its magnitude."""
    out = (x > threshold).any(0)
    return _product(x, weight, x.masked_fill(out, 0), x * out)


def whole_rows(x, weight, threshold):
    """Takes tokens out instead of features."""
    out = (x.abs() > threshold).any(1, keepdim=True)
    return _product(x, weight, x.masked_fill(out, 0), x * out)


def counted_twice(x, weight, threshold):
    """Adds the float part, but leaves it in the integer part."""
    out = (x.abs() > threshold).any(0)
    return _product(x, weight, x, x * out)


def left_out(x, weight, threshold):
    """Forgets to add the float part."""
    out = (x.abs() > threshold).any(0)
    return _product(x, weight, x.masked_fill(out, 0), torch.zeros_like(x))


def scale_with_outliers(x, weight, threshold):
    """Chooses the scales before the outliers are gone."""
    out = (x.abs() > threshold).any(0)
    _, scale = _int8(x)
    rows, steps = _int8(weight)
    codes = (x.masked_fill(out, 0) / scale).round()
    return codes @ rows.T * scale * steps.T + (x * out) @ weight.T


def one_scale(x, weight, threshold):
    """Uses one scale for all tokens."""
    out = (x.abs() > threshold).any(0)
    rest = x.masked_fill(out, 0)
    scale = (rest.abs().amax() / 127).clamp(min=1e-30)
    rows, steps = _int8(weight)
    return (rest / scale).round() @ rows.T * scale * steps.T + (x * out) @ weight.T


def scale_of_zero(x, weight, threshold):
    """Divides a token of zeros by a scale of zero."""
    out = (x.abs() > threshold).any(0)
    rest = x.masked_fill(out, 0)
    scale = rest.abs().amax(1, keepdim=True) / 127
    rows, steps = _int8(weight)
    return (rest / scale).round() @ rows.T * scale * steps.T + (x * out) @ weight.T


def sums_in_int8(x, weight, threshold):
    """Adds the products up in 8 bits, where they overflow."""
    out = (x.abs() > threshold).any(0)
    (codes, scale), (rows, steps) = _int8(x.masked_fill(out, 0)), _int8(weight)
    sums = (codes.long() @ rows.long().T).to(torch.int8)
    return sums * scale * steps.T + (x * out) @ weight.T


_WRONG_OUTLIERS = (
    (scale_of_zero, "a token without anything left has scale 0, and 0/0 is NaN: clamp the scale"),
    (positive_outliers, "outliers have two signs: compare magnitudes"),
    (single_values, "a column goes to float as a whole, for all tokens"),
    (whole_rows, "outliers sit in features: take columns of x, not rows"),
    (counted_twice, "the outlier columns count twice: set them to 0 in the integer part"),
    (left_out, "the float part is missing from the sum"),
    (scale_with_outliers, "choose the scales when the outliers are gone; that is the whole point"),
    (one_scale, "each token has a scale of its own"),
    (sums_in_int8, "add up in 32 bits: a single product already exceeds int8"),
)


def outliers_by_columns(x, weight, threshold):
    """Cuts the columns out, in float64."""
    out = (x.abs() > threshold).any(0)
    rows, steps = _int8(weight)
    total = x[:, out].double() @ weight[:, out].double().T
    if not out.all():
        codes, scale = _int8(x[:, ~out])
        total += codes.double() @ rows[:, ~out].double().T * scale * steps.T
    return total.float()


def outliers_in_integers(x, weight, threshold):
    """Multiplies real integers, a token at a time."""
    out = (x.abs() > threshold).any(0)
    rows, steps = _int8(weight)
    lines = []
    for token in x:
        codes, scale = _int8(token.masked_fill(out, 0)[None])
        sums = rows.int() @ codes[0].int()
        lines.append(sums * scale[0] * steps[:, 0] + weight[:, out] @ token[out])
    return torch.stack(lines)


# 4.3 ------------------------------------------------------------------------------------------


def _joint_loss(weights: dict[str, float], repairs: dict[frozenset, float]):
    """Return a loss of the layers kept in float; some repair the same damage, so gains overlap."""

    def loss_of(kept):
        gained = sum(weights[layer] for layer in set(kept))
        overlap = sum(cost for pair, cost in repairs.items() if pair <= set(kept))
        return 3 + sum(weights.values()) - gained + overlap

    return loss_of


def _kept_cases():
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


def _check_kept(function) -> None:
    judge("keep_in_float", function, _kept_cases(), _examine_kept, _WRONG_KEPT)


def _examine_kept(loss_of, layers, n_kept, got) -> str | None:
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


_WRONG_KEPT = (
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


# 4.4 ------------------------------------------------------------------------------------------


def _key_cases():
    # No value lies half-way between two grid points, where rounding may go either way.
    keys = torch.tensor([[[0.55, 40.0], [2.0, 44.0], [-1.0, 41.0], [0.45, 47.0], [0.35, 43.0]]])
    yield keys, 2, 2
    yield keys, 4, 5
    yield keys[:, :3], 2, 4
    yield torch.tensor([[[1.1, -1.0], [2.0, -3.0]], [[0.12, 5.0], [0.2, 4.0]]]), 3, 2
    random = torch.Generator().manual_seed(44)
    for heads, tokens, width in ((1, 8, 4), (3, 21, 8), (2, 32, 5)):
        for bits, group in ((2, 4), (4, 8), (8, 7)):
            keys = torch.randn(heads, tokens, width, generator=random)
            yield keys + 9 * torch.randn(heads, 1, width, generator=random), bits, group


def _check_keys(function) -> None:
    judge("round_keys", function, _key_cases(), _examine_keys, _WRONG_KEYS)


def _examine_keys(keys, bits, group, got) -> str | None:
    written = call("round_keys", keys, bits, group)
    if complaint := misfit(got, torch.float32, tuple(keys.shape)):
        return f"{written} returns {complaint}"
    expected = keys.numpy().copy()
    for start in range(0, keys.shape[1] - group + 1, group):
        part = expected[:, start : start + group]
        low, high = (np.minimum(part.min(1), 0), np.maximum(part.max(1), 0))
        scale = ((high - low) / np.float32(2**bits - 1))[:, None]
        zero = np.round(-low[:, None] / scale)
        part[:] = (np.clip(np.round(part / scale) + zero, 0, 2**bits - 1) - zero) * scale
    bad = ~np.isclose(got.numpy(), expected, rtol=1e-3, atol=1e-4)
    if not bad.any():
        return None
    at = tuple(int(i) for i in np.argwhere(bad)[0])
    value, wanted = show(float(got[at])), show(float(expected[at]))
    return f"{written}: the key {show(float(keys[at]))} at {at} becomes {value}, expected {wanted}"


def _round(part, bits, dim):
    low, high = part.amin(dim, keepdim=True).clamp(max=0), part.amax(dim, keepdim=True).clamp(min=0)
    scale = ((high - low) / (2**bits - 1)).clamp(min=1e-30)
    zero = (-low / scale).round()
    return (((part / scale).round() + zero).clamp(0, 2**bits - 1) - zero) * scale


def _in_groups(keys, group, rounding):
    parts = [rounding(p) if p.shape[1] == group else p for p in keys.split(group, 1)]
    return torch.cat(parts, 1)


def scale_a_token(keys, bits, group):
    """Gives each token a scale, shared by its channels."""
    return _in_groups(keys, group, lambda part: _round(part, bits, 2))


def scale_a_group(keys, bits, group):
    """Shares one scale among all channels of a group."""
    return _in_groups(keys, group, lambda part: _round(part, bits, (1, 2)))


def scale_for_all_heads(keys, bits, group):
    """Shares a channel's scale among heads."""
    return _in_groups(keys, group, lambda part: _round(part, bits, (0, 1)))


def no_groups(keys, bits, group):
    """Gives each channel one scale for all tokens."""
    return _round(keys, bits, 1)


def rest_rounded(keys, bits, group):
    """Rounds the last, unfinished group as well."""
    return torch.cat([_round(part, bits, 1) for part in keys.split(group, 1)], 1)


def rest_dropped(keys, bits, group):
    """Loses the tokens of the unfinished group."""
    whole = keys[:, : keys.shape[1] // group * group]
    return rest_rounded(whole, bits, group) if whole.numel() else whole


def symmetric_keys(keys, bits, group):
    """Uses a symmetric grid."""

    def rounding(part):
        limit = 2 ** (bits - 1) - 1
        scale = (part.abs().amax(1, keepdim=True) / limit).clamp(min=1e-30)
        return (part / scale).round() * scale

    return _in_groups(keys, group, rounding)


def range_without_zero(keys, bits, group):
    """Lets the range begin at the smallest key."""

    def rounding(part):
        low = part.amin(1, keepdim=True)
        scale = ((part.amax(1, keepdim=True) - low) / (2**bits - 1)).clamp(min=1e-30)
        return ((part - low) / scale).round() * scale + low

    return _in_groups(keys, group, rounding)


_WRONG_KEYS = (
    (scale_a_token, "a scale belongs to a channel; yours belongs to a token"),
    (scale_a_group, "each channel has a scale of its own"),
    (scale_for_all_heads, "heads do not share scales"),
    (rest_dropped, "the tokens of an unfinished group are lost; keep them as they are"),
    (rest_rounded, "an unfinished group stays in float until it is full"),
    (no_groups, "a scale serves one group of tokens, not the whole text"),
    (symmetric_keys, "the grid is asymmetric: it has a zero point"),
    (range_without_zero, "the range must include 0, as everywhere in this book"),
)


def keys_by_reshaping(keys, bits, group):
    """Puts the groups into a dimension of their own."""
    whole = keys.shape[1] // group * group
    grouped = keys[:, :whole].unflatten(1, (-1, group)) if whole else keys[:, None, :0]
    rounded = _round(grouped, bits, 2).flatten(1, 2) if whole else keys[:, :0]
    return torch.cat([rounded, keys[:, whole:]], 1)


def keys_channel_by_channel(keys, bits, group):
    """Loops over heads, groups and channels."""
    result = keys.clone()
    for head in result:
        for start in range(0, len(head) - group + 1, group):
            for channel in range(head.shape[1]):
                part = head[start : start + group, channel]
                part.copy_(_round(part, bits, 0))
    return result


EXERCISES = (
    Exercise(
        "4.1", "How far can the loss be scaled?", 1, 10, ("loss_scale",), _check_loss_scale,
        "The largest gradient sets the limit; real scalers find it by trial and keep a margin.",
        _WRONG_LOSS_SCALE, (loss_scale_loop,),
    ),
    Exercise(
        "4.2", "A product in two arithmetics", 2, 20, ("outlier_product",), _check_outliers,
        "A few columns in float, and the scales of all others become fine.",
        _WRONG_OUTLIERS, (outliers_by_columns, outliers_in_integers),
    ),
    Exercise(
        "4.3", "Bug hunt: sums of sensitivities", 2, 10, ("keep_in_float",), _check_kept,
        "What a layer gains depends on the company it is in; only measuring tells.",
        _WRONG_KEPT, (keep_recursively, keep_by_gain),
        broken=broken_keep_in_float,
    ),
    Exercise(
        "4.4", "Keys by the channel", 2, 15, ("round_keys",), _check_keys,
        "Channels of keys differ in size for the whole text, so a scale for each pays.",
        _WRONG_KEYS, (keys_by_reshaping, keys_channel_by_channel),
    ),
)  # fmt: skip
