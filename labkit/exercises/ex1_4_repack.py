"""Exercise 1.4: `repack` finds the 4-bit grid that a row was once rounded to, and packs its codes.

The reference is the row itself: what comes back is unpacked and put together with numpy.
"""

import numpy as np
import torch

from labkit.exercises.judge import Exercise, Wrong, judge, kind, misfit, show

_ONE_STEP_LOW = "(x − minimum) / scale is rarely a whole number in floats: round it, do not cut it"


def _check(function) -> None:
    random = torch.Generator().manual_seed(14)
    ladder = torch.arange(32).mul(7).remainder(16)  # each code twice, neighbors far apart
    cases = [(-1 + 0.125 * ladder,), (0.5 + 0.25 * ladder,), (-3 - 0.5 * ladder,)]
    cases += [(torch.full((32,), 0.25),), (torch.zeros(32),)]
    for blocks in (1, 2, 8, 32):
        codes = torch.randint(0, 16, (blocks, 32), generator=random)
        codes[:, 0:32:5], codes[:, 3:32:5] = 0, 15
        scale = torch.rand(blocks, 1, generator=random).add(0.01) * 10.0 ** -(blocks % 3)
        low = torch.randn(blocks, 1, generator=random) * 8 * scale
        if blocks > 2:  # as a GGUF file stores them; the other grids are known to float rounding
            low, scale = low.half().float(), scale.half().float()
        cases.append(((low + scale * codes).flatten(),))
    judge("repack", function, cases, _examine, _WRONG)


def _examine(row, got) -> str | None:
    blocks = len(row) // 32
    if not isinstance(got, tuple | list) or len(got) != 3:
        return f"repack returns {kind(got)}, expected the three tensors (packed, scale, minimum)"
    wanted = {"packed": (torch.uint8, (blocks, 16))}
    wanted |= dict.fromkeys(("scale", "minimum"), (torch.float32, (blocks,)))
    for value, (name, (dtype, shape)) in zip(got, wanted.items(), strict=True):
        if complaint := misfit(value, dtype, shape):
            return f"for a row of {len(row)}, {name} is {complaint}"
    packed, scale, minimum = (part.detach().numpy().astype(np.float64) for part in got)
    codes = np.stack([packed % 16, packed // 16], axis=-1).reshape(blocks, 32)
    rebuilt = minimum[:, None] + scale[:, None] * codes
    true = row.double().numpy().reshape(blocks, 32)
    step = np.ptp(true, axis=1, keepdims=True) / 15
    error = rebuilt - true
    bad = ~(np.abs(error) <= 0.02 * step + 1e-6 * np.abs(true))  # `~` catches NaN
    if not bad.any():
        return None
    block, i = np.argwhere(bad)[0]
    low, high = true[block].min(), true[block].max()
    clause = f"in a block from {show(low)} to {show(high)}, {show(true[block, i])} at place {i} "
    clause += f"comes back as {show(rebuilt[block, i])}"
    if (np.abs(error + step)[bad] < np.broadcast_to(0.05 * step, bad.shape)[bad]).all():
        raise Wrong(f"{_ONE_STEP_LOW}: {clause}")
    return clause


def _to_blocks(row, low, high, rounding=torch.round):
    blocks = row.view(-1, 32)
    scale = (high - low) / 15
    codes = rounding(torch.nan_to_num((blocks - low[:, None]) / scale[:, None]))
    return codes.clamp(0, 15).to(torch.uint8), scale, low


def _extremes(row):
    return row.view(-1, 32).amin(1), row.view(-1, 32).amax(1)


def _pairs(codes):
    return codes[:, 0::2] | codes[:, 1::2] << 4


def zero_forced_in(row):
    """Widens the range to hold zero, as a zero point would need; Q4_1 stores a minimum instead."""
    low, high = _extremes(row)
    codes, scale, low = _to_blocks(row, low.clamp(max=0), high.clamp(min=0))
    return _pairs(codes), scale, low


def one_code_a_byte(row):
    """Leaves each 4-bit code in a byte of its own."""
    return _to_blocks(row, *_extremes(row))


def halves_swapped(row):
    """Puts the first of a pair in the high half."""
    codes, scale, low = _to_blocks(row, *_extremes(row))
    return codes[:, 0::2] << 4 | codes[:, 1::2], scale, low


def order_of_gguf(row):
    """Pairs element i with i + 16, as the GGUF file does."""
    codes, scale, low = _to_blocks(row, *_extremes(row))
    return codes[:, :16] | codes[:, 16:] << 4, scale, low


def one_scale_for_the_row(row):
    """Takes minimum and maximum over the whole row."""
    blocks = len(row) // 32
    codes, scale, low = _to_blocks(row, row.min().repeat(blocks), row.max().repeat(blocks))
    return _pairs(codes), scale, low


def codes_cut_off(row):
    """Truncates, so a code of 6.9999 becomes 6."""
    codes, scale, low = _to_blocks(row, *_extremes(row), rounding=torch.trunc)
    return _pairs(codes), scale, low


def symmetric_blocks(row):
    """Centers the grid on zero."""
    peak = row.view(-1, 32).abs().amax(1)
    codes, scale, low = _to_blocks(row, -peak * 8 / 7, peak)
    return _pairs(codes), scale, low


def sixteen_steps(row):
    """Divides the range by 16, though 16 codes have 15 steps between them."""
    low, high = _extremes(row)
    codes, scale, low = _to_blocks(row, low, low + (high - low) * 15 / 16)
    return _pairs(codes), scale, low


_WRONG = (
    (zero_forced_in, "this grid stores its minimum, so zero need not be in the range"),
    (one_code_a_byte, "these are 4-bit codes in 8-bit boxes; pack two into each byte"),
    (halves_swapped, "the first of each pair belongs in the low half of the byte"),
    (order_of_gguf, "this is the order of the GGUF file, i beside i + 16; pair neighbors here"),
    (one_scale_for_the_row, "every block of 32 has its own scale and minimum"),
    (codes_cut_off, _ONE_STEP_LOW),
    (symmetric_blocks, "a grid centered on zero is not the one these values lie on"),
    (sixteen_steps, "16 codes have 15 steps between them"),
)


def repack_with_numpy(row):
    """Loops over blocks and pairs with numpy, and guards the scale."""
    packed, scale, low = [], [], []
    for block in row.numpy().reshape(-1, 32).astype(np.float64):
        low.append(block.min())
        scale.append(np.ptp(block) / 15)
        codes = np.rint((block - low[-1]) / (scale[-1] or 1.0)).astype(int)
        packed.append([codes[i] + 16 * codes[i + 1] for i in range(0, 32, 2)])
    return torch.tensor(packed).byte(), torch.tensor(scale).float(), torch.tensor(low).float()


def repack_downward(row):
    """Counts from the maximum with a negative scale: another grid through the same points."""
    blocks = row.unflatten(0, (-1, 32))
    high = blocks.max(dim=1).values
    scale = (blocks.min(dim=1).values - high) / 15
    steps = torch.where(scale == 0, -1.0, scale)
    codes = torch.floor((blocks - high[:, None]) / steps[:, None] + 0.5).int().view(-1, 16, 2)
    return (codes * torch.tensor([1, 16])).sum(-1).to(torch.uint8), scale, high


EXERCISE = Exercise(
    id="1.4",
    title="Find the old grid and pack it",
    stars=3,
    minutes=25,
    function_names=("repack",),
    check=_check,
    takeaway="Values that were rounded once are free to store on the same grid again.",
    wrong_answers=_WRONG,
    variants=(repack_with_numpy, repack_downward),
)
