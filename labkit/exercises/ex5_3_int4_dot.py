"""Exercise 5.3: `int4_dot` multiplies a packed 4-bit row by one token.

The reference is Python numbers, value by value.
"""

import math

import torch

from labkit.exercises.judge import Exercise, call, judge
from labkit.exercises.number_misfit import number_misfit


def _cases():
    x = torch.tensor([1.0, 2.0, 3.0, 4.0])
    packed = torch.tensor([0x93, 0x0F], dtype=torch.uint8)
    zeros = torch.tensor([8, 1], dtype=torch.uint8)
    yield packed, torch.tensor([0.5, 2.0]), zeros, x, 2
    yield packed, torch.tensor([0.5, 2.0]), zeros, x, 3
    yield packed[:1], torch.tensor([0.25]), torch.tensor([15], dtype=torch.uint8), x[:2], 2
    random = torch.Generator().manual_seed(53)
    for inputs, group_size in ((10, 4), (12, 5), (16, 16), (64, 32), (70, 32), (96, 32), (128, 24)):
        n_groups = math.ceil(inputs / group_size)
        packed = torch.randint(256, (inputs // 2,), generator=random, dtype=torch.uint8)
        zero_point = torch.randint(16, (n_groups,), generator=random, dtype=torch.uint8)
        scale = torch.rand(n_groups, generator=random) + 0.1
        yield packed, scale, zero_point, torch.randn(inputs, generator=random), group_size


def _check(function) -> None:
    judge("int4_dot", function, _cases(), _examine, _WRONG)


def _examine(packed, scale, zero_point, x, group_size, got) -> str | None:
    terms = []
    for i, value in enumerate(x.tolist()):
        code = packed.tolist()[i // 2] // 16 ** (i % 2) % 16
        group = i // group_size
        terms.append((code - zero_point.tolist()[group]) * scale.tolist()[group] * value)
    written = call("int4_dot", packed, scale, zero_point, x, group_size)
    return number_misfit(written, got, sum(terms), 1e-4 * sum(map(abs, terms)))


def _codes(packed):
    return torch.stack((packed & 15, packed >> 4), 1).flatten().float()


def _spread(values, group_size, inputs):
    return values.float().repeat_interleave(group_size)[:inputs]


def _dot(codes, scale, zero_point, x, group_size):
    zeros = _spread(zero_point, group_size, x.numel())
    return ((codes - zeros) * _spread(scale, group_size, x.numel()) * x).sum().item()


def high_nibble_first(packed, scale, zero_point, x, group_size):
    """Takes the high four bits for the first code."""
    codes = torch.stack((packed >> 4, packed & 15), 1).flatten().float()
    return _dot(codes, scale, zero_point, x, group_size)


def low_nibbles_first(packed, scale, zero_point, x, group_size):
    """Puts all low codes before all high ones."""
    codes = torch.cat((packed & 15, packed >> 4)).float()
    return _dot(codes, scale, zero_point, x, group_size)


def low_nibble_unmasked(packed, scale, zero_point, x, group_size):
    """Leaves the second code above the first."""
    codes = torch.stack((packed, packed >> 4), 1).flatten().float()
    return _dot(codes, scale, zero_point, x, group_size)


def zero_point_forgotten(packed, scale, zero_point, x, group_size):
    """Scales the codes as they are."""
    return _dot(_codes(packed), scale, torch.zeros_like(zero_point), x, group_size)


def zero_point_unscaled(packed, scale, zero_point, x, group_size):
    """Subtracts the zero point after scaling."""
    weight = _codes(packed) * _spread(scale, group_size, x.numel())
    return ((weight - _spread(zero_point, group_size, x.numel())) * x).sum().item()


def wrapped_below_zero(packed, scale, zero_point, x, group_size):
    """Subtracts in uint8."""
    zeros = zero_point.repeat_interleave(group_size)[: x.numel()]
    weight = (_codes(packed).to(torch.uint8) - zeros) * _spread(scale, group_size, x.numel())
    return (weight * x).sum().item()


def first_grid_only(packed, scale, zero_point, x, group_size):
    """Uses the first group's grid for all."""
    return _dot(_codes(packed), scale[:1], zero_point[:1], x, x.numel())


def last_group_dropped(packed, scale, zero_point, x, group_size):
    """Counts whole groups only."""
    whole = x.numel() // group_size * group_size
    return _dot(_codes(packed)[:whole], scale, zero_point, x[:whole], group_size)


def groups_of_bytes(packed, scale, zero_point, x, group_size):
    """Counts groups in bytes, so that each covers twice as many codes."""
    return _dot(_codes(packed), scale, zero_point, x, 2 * group_size)


_WRONG = (
    (high_nibble_first, "the first code of a pair lies in the low four bits"),
    (low_nibbles_first, "the two codes of a byte are neighbors in the row"),
    (low_nibble_unmasked, "mask the low code with & 15: the other one still sits above it"),
    (zero_point_forgotten, "subtract the zero point from the codes"),
    (zero_point_unscaled, "the zero point is a code: subtract it before you scale"),
    (wrapped_below_zero, "in uint8, 3 - 8 wraps to 251: convert before you subtract"),
    (first_grid_only, "each group has its own scale and zero point"),
    (last_group_dropped, "the last group counts too, even a shorter one"),
    (groups_of_bytes, "a group is counted in weights, and a byte holds two of them"),
)


def dot_by_groups(packed, scale, zero_point, x, group_size):
    """Applies the grid once a group."""
    total = 0.0
    parts = zip(_codes(packed).split(group_size), x.split(group_size), strict=True)
    for group, (codes, values) in enumerate(parts):
        dot = codes @ values - zero_point[group].float() * values.sum()
        total += float(scale[group] * dot)
    return total


def dot_by_bytes(packed, scale, zero_point, x, group_size):
    """Loops over bytes, in Python numbers."""
    total = 0.0
    for i, byte in enumerate(packed.tolist()):
        for j, code in ((2 * i, byte % 16), (2 * i + 1, byte // 16)):
            group = j // group_size
            total += (code - int(zero_point[group])) * float(scale[group]) * float(x[j])
    return total


EXERCISE = Exercise(
    id="5.3",
    title="Four bits in a row",
    stars=2,
    minutes=20,
    function_names=("int4_dot",),
    check=_check,
    takeaway="A kernel does the same in registers, and never writes the weights out.",
    wrong_answers=_WRONG,
    variants=(dot_by_groups, dot_by_bytes),
)
