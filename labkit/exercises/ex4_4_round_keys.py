"""Exercise 4.4: `round_keys` rounds cached keys, with one scale per channel and group of tokens.

The reference is numpy, group by group.
"""

import numpy as np
import torch

from labkit.exercises.judge import Exercise, call, judge, misfit, show


def _cases():
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


def _check(function) -> None:
    judge("round_keys", function, _cases(), _examine, _WRONG)


def _examine(keys, bits, group, got) -> str | None:
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


_WRONG = (
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


EXERCISE = Exercise(
    id="4.4",
    title="Keys by the channel",
    stars=2,
    minutes=15,
    function_names=("round_keys",),
    check=_check,
    takeaway="Channels of keys differ in size for the whole text, so a scale for each pays.",
    wrong_answers=_WRONG,
    variants=(keys_by_reshaping, keys_channel_by_channel),
)
