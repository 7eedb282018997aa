"""Exercise 2.5: `nf4` stores a weight in blocks, as the nearest of 16 levels and two codes a byte.

The reference is numpy: the distance of each value from every level, in float64.
"""

import numpy as np
import torch

from labkit.exercises.judge import Exercise, Wrong, insist_on_dtype, judge, kind, misfit, show

# Dettmers et al., "QLoRA", arXiv 2305.14314, appendix E, to six digits.
_POSITIVE = (0.079580, 0.160930, 0.246112, 0.337915, 0.440710, 0.562617, 0.722957, 1.0)


_NEGATIVE = (-1.0, -0.696193, -0.525073, -0.394917, -0.284441, -0.184773, -0.091050)


_SWAPPED = "the pair is swapped: the packed codes come first, then the scale"
_ZERO_SCALE = "a block of zeros keeps the scale 0: guard the division, not the scale returned"
NF4_LEVELS = torch.tensor((*_NEGATIVE, 0.0, *_POSITIVE))


def _check(function) -> None:
    random = torch.Generator().manual_seed(24)
    cases = [
        (torch.tensor([[0.0, 2.0, -2.0, 0.1]]), NF4_LEVELS, 4),
        (torch.tensor([[0.6, 1.0, -8.0, 3.0]]), NF4_LEVELS, 2),
        (torch.zeros(1, 4), NF4_LEVELS, 2),
        (torch.tensor([[-3.0, -1.0, 0.0, 0.0]]), NF4_LEVELS, 2),
    ]
    for rows, inputs, size in ((1, 8, 8), (4, 32, 8), (6, 128, 64), (16, 192, 32)):
        weight = torch.randn(rows, inputs, generator=random)
        weight *= torch.logspace(-3, 1, rows)[:, None] if rows > 1 else 1
        cases.append((weight, NF4_LEVELS, size))
    judge("nf4", function, cases, _examine, _WRONG)


def _examine(weight, levels, block_size, got) -> str | None:
    of = show(weight) if weight.numel() <= 8 else f"a weight of shape {tuple(weight.shape)}"
    if not isinstance(got, tuple | list) or len(got) != 2:
        return f"nf4 returns {kind(got)}, expected the pair (packed, scale)"
    floating = [isinstance(part, torch.Tensor) and part.is_floating_point() for part in got]
    if floating == [True, False] and isinstance(got[1], torch.Tensor):
        came = " and ".join(map(kind, got))
        raise Wrong(
            f"{_SWAPPED}: for {of} in blocks of {block_size}, nf4 returns {came}, expected "
            "(packed, scale)"
        )
    rows, inputs = weight.shape
    wanted = (torch.uint8, (rows, inputs // 2)), (torch.float32, (rows, inputs // block_size))
    for name, value, form in zip(("packed", "scale"), got, wanted, strict=True):
        insist_on_dtype(f"for {of} in blocks of {block_size}, {name} is", value, *form)
        if complaint := misfit(value, *form):
            kept = isinstance(value, torch.Tensor) and value.shape == (*form[1], 1)
            hint = ": squeeze its last dimension" if kept else ""
            return f"for {of} in blocks of {block_size}, {name} is {complaint}{hint}"
    blocks = weight.double().numpy().reshape(rows, -1, block_size)
    true_scale, scale = np.abs(blocks).max(2), got[1].double().numpy()
    if complaint := _scale_misfit(scale, true_scale):
        return f"for {of} in blocks of {block_size}, {complaint}"
    packed = got[0].numpy()
    codes = np.stack([packed % 16, packed // 16], axis=-1).reshape(blocks.shape)
    relative = blocks / np.where(true_scale == 0, 1, true_scale)[:, :, None]
    distances = np.abs(relative[..., None] - levels.double().numpy())
    chosen = np.take_along_axis(distances, codes[..., None].astype(int), axis=-1)[..., 0]
    bad = chosen > distances.min(-1) + 1e-5  # either side of a tie will do
    if not bad.any():
        return None
    at = tuple(np.argwhere(bad)[0])
    values = show(float(blocks[at])), int(codes[at]), int(distances[at].argmin())
    return "for {} in blocks of {}, {} gets the code {}, expected {}".format(
        of, block_size, *values
    )


def _scale_misfit(scale, expected) -> str | None:
    same = np.isclose(scale, expected, rtol=1e-4, atol=1e-30)
    if same.all():
        return None
    at = tuple(np.argwhere(~same)[0])
    guard = expected[at] == 0 and (0 < scale[at] < 1e-3 or scale[at] == 1)
    why = f": {_ZERO_SCALE}" if guard else ""
    numbers = f"{show(float(scale[at]))}, expected {show(float(expected[at]))}"
    return f"the scale of block {at[1]} is {numbers}{why}"


def _nf4(weight, levels, block_size, scale=None, nearest=None, pack=None, guard=True):
    blocks = weight.unflatten(1, (-1, block_size))
    scale = blocks.abs().amax(-1, keepdim=True) if scale is None else scale
    relative = blocks / (torch.where(scale == 0, 1.0, scale) if guard else scale)
    if nearest is None:
        codes = (relative.unsqueeze(-1) - levels).abs().argmin(-1)
    else:
        codes = nearest(relative)
    codes = codes.flatten(1).to(torch.uint8)
    packed = codes[:, 0::2] | codes[:, 1::2] << 4 if pack is None else pack(codes)
    return packed, scale.squeeze(-1)


def even_grid(weight, levels, block_size):
    """Rounds on 16 even levels from −1 to 1."""
    return _nf4(weight, levels, block_size, nearest=lambda r: ((r + 1) * 7.5).round().clamp(0, 15))


def level_below(weight, levels, block_size):
    """Takes the level below each value, not the nearest."""
    below = lambda r: torch.searchsorted(levels, r.contiguous(), right=True) - 1  # noqa: E731
    return _nf4(weight, levels, block_size, nearest=lambda r: below(r).clamp(0, 15))


def level_above(weight, levels, block_size):
    """Calls `torch.bucketize` with the levels, not with the midpoints between them."""
    above = lambda r: torch.bucketize(r, levels).clamp(max=15)  # noqa: E731
    return _nf4(weight, levels, block_size, nearest=above)


def farthest_level(weight, levels, block_size):
    """Writes `argmax` for `argmin`."""
    farthest = lambda r: (r.unsqueeze(-1) - levels).abs().argmax(-1)  # noqa: E731
    return _nf4(weight, levels, block_size, nearest=farthest)


def signed_distance(weight, levels, block_size):
    """Takes the least difference, not the least distance: always the highest level."""
    least = lambda r: (r.unsqueeze(-1) - levels).argmin(-1)  # noqa: E731
    return _nf4(weight, levels, block_size, nearest=least)


def row_folded(weight, levels, block_size):
    """Packs the first half of the row with the second."""
    half = weight.shape[1] // 2
    return _nf4(weight, levels, block_size, pack=lambda c: c[:, :half] | c[:, half:] << 4)


def nf4_halves_swapped(weight, levels, block_size):
    """Puts the first of a pair in the high half."""
    return _nf4(weight, levels, block_size, pack=lambda c: c[:, 0::2] << 4 | c[:, 1::2])


def nf4_one_a_byte(weight, levels, block_size):
    """Leaves each code in a byte of its own."""
    return _nf4(weight, levels, block_size, pack=lambda c: c)


def scale_before_codes(weight, levels, block_size):
    """Returns the scale first, and the packed codes second."""
    return _nf4(weight, levels, block_size)[::-1]


def scale_of_the_row(weight, levels, block_size):
    """Takes one largest magnitude for the whole row."""
    blocks = weight.unflatten(1, (-1, block_size))
    scale = weight.abs().amax(1)[:, None, None].expand(-1, blocks.shape[1], 1)
    return _nf4(weight, levels, block_size, scale=scale)


def scale_of_the_largest(weight, levels, block_size):
    """Takes the largest value, not the largest magnitude."""
    return _nf4(
        weight, levels, block_size, scale=weight.unflatten(1, (-1, block_size)).amax(-1, True)
    )


def scale_with_a_sign(weight, levels, block_size):
    """Takes the value of the largest magnitude with its sign."""
    blocks = weight.unflatten(1, (-1, block_size))
    scale = blocks.gather(-1, blocks.abs().argmax(-1, keepdim=True))
    return _nf4(weight, levels, block_size, scale=scale)


def scale_in_half(weight, levels, block_size):
    """Rounds the scale to float16."""
    blocks = weight.unflatten(1, (-1, block_size))
    scale = blocks.abs().amax(-1, keepdim=True).half().float()
    return _nf4(weight, levels, block_size, scale=scale)


def zero_block_gets_a_scale(weight, levels, block_size):
    """Adds a little to every scale, and returns that."""
    blocks = weight.unflatten(1, (-1, block_size))
    return _nf4(weight, levels, block_size, scale=blocks.abs().amax(-1, keepdim=True) + 1e-8)


def zero_block_divides(weight, levels, block_size):
    """Divides a block of zeros by its scale of 0."""
    return _nf4(weight, levels, block_size, guard=False)


def standard_deviations(weight, levels, block_size):
    """Divides by the standard deviation, since the levels come from a normal distribution."""
    blocks = weight.unflatten(1, (-1, block_size))
    return _nf4(weight, levels, block_size, scale=blocks.std(-1, keepdim=True))


_WRONG = (
    (even_grid, "the levels of NF4 are not evenly spaced: compare with each of the 16"),
    (level_below, "take the nearest level, not the one below"),
    (
        level_above,
        "sort by the midpoints between levels: bucketize on the levels themselves rounds up",
    ),
    (farthest_level, "the nearest level has the least distance: argmin, not argmax"),
    (signed_distance, "take abs() of the differences: the least of all is the most negative"),
    (
        row_folded,
        "a byte holds two neighbors, c[:, 0::2] and c[:, 1::2], not two halves of the row",
    ),
    (nf4_halves_swapped, "the first of each pair belongs in the low half of the byte"),
    (nf4_one_a_byte, "these are 4-bit codes in 8-bit boxes; pack two into each byte"),
    (scale_before_codes, _SWAPPED),
    (scale_of_the_row, "every block has a scale of its own"),
    (scale_of_the_largest, "the scale is the largest magnitude: the block may peak below zero"),
    (scale_with_a_sign, "the scale is a magnitude: abs() before the largest is taken"),
    (scale_in_half, "the scale stays in float32: float16 keeps 11 bits of it"),
    (zero_block_divides, "a block of zeros has the scale 0, and 0 / 0 is NaN"),
    (standard_deviations, "the levels reach from −1 to 1: divide by the largest magnitude"),
)


def nf4_by_boundaries(weight, levels, block_size):
    """Sorts values between the midpoints of the levels, in float64."""
    rows, inputs = weight.shape
    blocks = weight.double().reshape(rows, inputs // block_size, block_size)
    scale = blocks.abs().max(dim=2).values
    edges = (levels[1:].double() + levels[:-1].double()) / 2
    relative = blocks / scale.clamp(min=1e-300).unsqueeze(2)
    codes = torch.bucketize(relative, edges).reshape(rows, inputs // 2, 2)
    return (codes[..., 0] + 16 * codes[..., 1]).to(torch.uint8), scale.float()


EXERCISE = Exercise(
    id="2.5",
    title="Store a weight in NF4",
    stars=3,
    minutes=20,
    function_names=("nf4",),
    check=_check,
    takeaway="Codes are only names: any 16 levels can stand behind four bits.",
    wrong_answers=(*_WRONG, (zero_block_gets_a_scale, _ZERO_SCALE)),  # `_examine` names the last
    variants=(nf4_by_boundaries,),
)
