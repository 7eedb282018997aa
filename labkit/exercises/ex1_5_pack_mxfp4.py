"""Exercise 1.5: `pack_mxfp4` turns blocks of 32 numbers into MXFP4: a scale byte and 16 bytes each.

The reference decodes what comes back with numpy, from the sixteen values of E2M1, and compares it
with the nearest that the format can hold under the scale that OCP MX 1.0 asks for.
"""

import functools
import math

import numpy as np
import torch

from labkit.exercises.forbidden import library_in
from labkit.exercises.judge import Exercise, Wrong, insist_on_dtype, judge, kind, misfit, show

_VALUES = np.array([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
_CODED = np.concatenate([_VALUES, -_VALUES])


def _check(function) -> None:
    if library := library_in(function, ("labkit.microscaling", "torchao")):
        raise Wrong(f"pack_mxfp4 lets {library} do the work, expected operations of torch")
    random = torch.Generator().manual_seed(15)
    ladder = torch.tensor([*_VALUES, *-_VALUES], dtype=torch.float32)[torch.arange(32) * 7 % 16]
    small = [ladder, 0.125 * ladder, ladder * 5 / 6, ladder / 6 * 7.9, torch.zeros(32)]
    cases = [(block.float()[None],) for block in small]
    nearly = torch.full((1, 32), 0.75, dtype=torch.float32)
    nearly[0, 3] = torch.tensor(8 - 2**-21, dtype=torch.float32)
    cases.append((nearly,))
    for first in ((8.0, -2.0), (-8.0, 2.0), (0.5, 0.125)):  # powers of two; the largest below 0
        cases.append((torch.zeros(1, 32, dtype=torch.float32),))
        cases[-1][0][0, :2] = torch.tensor(first)
    for blocks, spread in ((1, 0), (2, 1), (5, 8), (64, 2)):
        w = torch.randn(blocks, 32, generator=random, dtype=torch.float32)
        size = torch.randn(blocks, 1, generator=random, dtype=torch.float32)
        w *= torch.exp2(spread * size)
        if blocks > 5:
            w[1] = 0
        cases.append((w,))
    judge("pack_mxfp4", function, cases, _examine, _WRONG)
    judge("pack_mxfp4", function, _tiny_cases(), _examine, (*_WRONG, *_OTHER_FLOORS))


def _tiny_cases():
    # Only here do the bounds of the exponent matter, and FP32 is subnormal.
    for exponent in (-126, -125, -130, -124):
        block = torch.zeros(1, 32, dtype=torch.float64)
        block[0, :4] = torch.tensor([1.75, -0.75, 0.5, -1.0]) * 2.0**exponent
        yield (block.float(),)


def _examine(blocks, got) -> str | None:
    if not isinstance(got, tuple | list) or len(got) != 2:
        return f"pack_mxfp4 returns {kind(got)}, expected the two tensors (scale, packed)"
    forms = {"scale": (len(blocks),), "packed": (len(blocks), 16)}
    for value, (name, shape) in zip(got, forms.items(), strict=True):
        where = f"for blocks of shape {tuple(blocks.shape)}, {name} is"
        insist_on_dtype(where, value, torch.uint8, shape)
        if complaint := misfit(value, torch.uint8, shape):
            return f"{where} {complaint}"
    scale, packed = (part.detach().numpy() for part in got)
    for row, byte, pairs in zip(blocks.double().numpy(), scale, packed, strict=True):
        if complaint := _examine_block(row, int(byte), pairs):
            return complaint
    return None


def _examine_block(row, byte: int, pairs) -> str | None:
    largest = np.abs(row).max()
    of = f"in a block whose largest magnitude is {largest:.9g}"
    if largest > 0:
        expected = max(math.frexp(largest)[1] - 1 - 2, -127) + 127
        if byte != expected:
            return f"{of} the scale byte is {byte}, expected {expected} (2^{expected - 127})"
    step = 2.0 ** (byte - 127)
    codes = np.stack([pairs % 16, pairs // 16], axis=-1).reshape(32)
    off = np.abs(_CODED[codes] * step - row)
    best = np.abs(_CODED[:, None] * step - row).min(0)
    bad = ~(off <= best + 1e-6 * step)  # of two equally near, either will do
    if not bad.any():
        return None
    i = int(bad.argmax())
    nearest = _CODED[np.abs(_CODED * step - row[i]).argmin()]
    came = f"comes back as {show(float(_CODED[codes[i]] * step))}"
    wanted = show(float(nearest * step))
    return f"{of} the number {show(float(row[i]))} at place {i} {came}, expected {wanted}"


def _pack(blocks, rule=None, emax=2, bias=127, values=_VALUES, invert=False, sign=True, wrap=False):
    exponent = _exponent(blocks, rule, emax).clamp(-127, 127)
    return _with_exponent(blocks, exponent, bias, values, invert, sign, wrap)


def _exponent(blocks, rule=None, emax=2):
    largest = blocks.double().abs().amax(1)
    return torch.where(largest > 0, (rule or _floor)(largest) - emax, -127.0)


def _with_exponent(blocks, exponent, bias=127, values=_VALUES, invert=False, sign=True, wrap=False):
    scaled = blocks.double() * 2.0 ** (exponent if invert else -exponent)[:, None]
    codes = (scaled.abs()[..., None] - torch.from_numpy(values)).abs().argmin(-1)
    if wrap:  # saturation forgotten: 7 and more runs into the sign bit
        codes = torch.where(scaled.abs() >= 7, 8, codes)
    codes = (codes + 8 * ((scaled < 0) & sign)) % 16
    return ((exponent + bias).int() % 256).to(torch.uint8), codes.to(torch.uint8)


def _floor(largest):
    return torch.frexp(largest).exponent.double() - 1


def _pairs(codes):
    return codes[:, 0::2] | codes[:, 1::2] << 4


def _packed(blocks, **options):
    scale, codes = _pack(blocks, **options)
    return scale, _pairs(codes)


def halves_swapped(blocks):
    """Puts the first of a pair into the high half."""
    scale, codes = _pack(blocks)
    return scale, codes[:, 1::2] | codes[:, 0::2] << 4


def packed_before_scale(blocks):
    """Returns the packed codes first, and the scale second."""
    return _packed(blocks)[::-1]


def far_pairs(blocks):
    """Pairs number i with number i + 16, as GGUF does."""
    scale, codes = _pack(blocks)
    return scale, codes[:, :16] | codes[:, 16:] << 4


def one_code_a_byte(blocks):
    """Leaves each code in a byte of its own."""
    return _pack(blocks)


def emax_forgotten(blocks):
    """Takes the exponent of the largest number itself, so that nothing exceeds 2."""
    return _packed(blocks, emax=0)


def emax_of_e4m3(blocks):
    """Subtracts 8, the largest exponent of FP8 E4M3."""
    return _packed(blocks, emax=8)


def exponent_rounded_up(blocks):
    """Rounds the exponent up, so that nothing is cut off."""
    return _packed(blocks, rule=lambda largest: torch.log2(largest).ceil())


def frexp_as_floor(blocks):
    """Takes torch.frexp's exponent for the floor of log2, one too high."""
    return _packed(blocks, rule=lambda largest: torch.frexp(largest).exponent.double())


def exponent_of_largest_x(blocks):
    """Takes the exponent from max x, so a block that reaches further below 0 is cut off."""
    positive = blocks.clamp(min=0)
    scale, _ = _pack(positive.where(positive.amax(1, keepdim=True) > 0, blocks))
    step = 2.0 ** (scale.double() - 127)[:, None]
    _, codes = _pack((blocks / step).clamp(-6, 6), rule=lambda x: torch.full_like(x, 2.0))
    return scale, _pairs(codes)


def multiplied_by_the_scale(blocks):
    """Multiplies by 2^exponent to find the codes."""
    return _packed(blocks, invert=True)


def six_rounded_up(blocks):
    """Takes the smallest power of two that brings the largest number to 6 or less (RCEIL)."""
    return _packed(blocks, rule=lambda largest: torch.log2(largest / 6).ceil(), emax=0)


def six_rounded_down(blocks):
    """Takes the floor of log2 of a sixth of the largest number."""
    return _packed(blocks, rule=lambda largest: torch.log2(largest / 6).floor(), emax=0)


def exponent_to_nearest(blocks):
    """Rounds the exponent to the nearest."""
    return _packed(blocks, rule=lambda largest: torch.log2(largest).round())


def log2_in_float32(blocks):
    """Takes log2 in float32, which is 3 for a number just below 8."""
    return _packed(blocks, rule=lambda largest: torch.log2(largest.float()).floor().double())


def scale_to_six(blocks):
    """Maps the largest number to 6 by a scale that is no power of two, and stores its exponent."""
    largest = blocks.double().abs().amax(1, keepdim=True)
    scale = torch.where(largest > 0, largest / 6, 1.0)
    _, codes = _pack(blocks / scale * 4, rule=lambda x: torch.full_like(x, 4.0))
    return (torch.log2(scale[:, 0]).floor() + 127).clamp(0, 255).to(torch.uint8), _pairs(codes)


def bias_forgotten(blocks):
    """Stores the exponent without adding 127."""
    scale, packed = _packed(blocks)
    return (scale.int() - 127).to(torch.uint8), packed


def fp8_bias(blocks):
    """Adds the bias of E4M3, 7."""
    scale, packed = _packed(blocks)
    return (scale.int() - 120).to(torch.uint8), packed


def bias_of_128(blocks):
    """Adds 128, half of 256."""
    return _packed(blocks, bias=128)


def sign_in_low_bit(blocks):
    """Puts the sign below the magnitude."""
    scale, codes = _pack(blocks, sign=False)
    return scale, _pairs(2 * codes + (blocks < 0))


def sign_forgotten(blocks):
    """Stores magnitudes only."""
    return _packed(blocks, sign=False)


def twos_complement(blocks):
    """Stores negative numbers as 16 minus the code, as integers are."""
    scale, codes = _pack(blocks, sign=False)
    return scale, _pairs(torch.where(blocks < 0, (16 - codes.int()) % 16, codes.int()).byte())


def evenly_spaced(blocks):
    """Takes the codes for the integers 0 to 7."""
    return _packed(blocks, values=np.arange(8.0))


def no_saturation(blocks):
    """Lets numbers beyond 6 run into the sign bit."""
    return _packed(blocks, wrap=True)


def always_down(blocks):
    """Takes the largest value that is not above the number."""
    scale, _ = _pack(blocks)
    step = 2.0 ** (scale.double() - 127)[:, None]
    below = (
        torch.bucketize((blocks.double() / step).abs(), torch.from_numpy(_VALUES), right=True) - 1
    )
    return scale, _pairs((below + 8 * (blocks < 0)).byte())


def exponent_unbounded(blocks):
    """Does not clamp the exponent, so that the byte of a tiny block wraps around."""
    scale, codes = _with_exponent(blocks, _exponent(blocks))
    return scale, _pairs(codes)


def exponent_from_minus_126(blocks):
    """Clamps the exponent at −126, the smallest of normal FP32 numbers."""
    scale, codes = _with_exponent(blocks, _exponent(blocks).clamp(min=-126))
    return scale, _pairs(codes)


def floored_largest(blocks, least=1e-12):
    """Keeps the largest number above a floor that tiny blocks lie below."""
    return _packed(blocks, rule=lambda largest: _floor(largest.clamp(min=least)))


def scale_of_all_blocks(blocks):
    """Takes one scale for all blocks."""
    both = _pack(blocks.reshape(1, -1))
    return both[0].repeat(len(blocks)), _pairs(both[1].view(len(blocks), 32))


_WRONG = (
    (packed_before_scale, "the scale comes first, then the packed codes"),
    (halves_swapped, "the first of each pair of neighbors belongs in the low half of the byte"),
    (far_pairs, "this pairs number i with number i + 16; pair neighbors here"),
    (one_code_a_byte, "these are 4-bit codes in 8-bit boxes; pack two into each byte"),
    (
        emax_forgotten,
        "subtract emax, the exponent of 6, the largest element: codes up to 6 stay idle",
    ),
    (emax_of_e4m3, "8 is the emax of FP8 E4M3; the largest FP4 number, 6 = 1.5 · 2^2, has 2"),
    (log2_in_float32, "log2 in float32 rounds up just below a power of two: torch.frexp is exact"),
    (
        exponent_rounded_up,
        "the rule of MX rounds the exponent down (floor), and lets the top saturate",
    ),
    (
        frexp_as_floor,
        "the exponent of torch.frexp is one more than the floor of log2 (its m lies below 1)",
    ),
    (exponent_of_largest_x, "the exponent comes from the largest |x|, not from the largest x"),
    (
        multiplied_by_the_scale,
        "the numbers are divided by 2^exponent; this multiplies them",
    ),
    (
        six_rounded_up,
        "this rounds max |x| / 6 up to a power of two; MX takes the floor of log2, less 2",
    ),
    (six_rounded_down, "take log2 of max |x| itself and subtract 2, not log2 of max |x| / 6"),
    (exponent_to_nearest, "the exponent is the floor of log2, not the nearest integer"),
    (
        scale_to_six,
        "an MX scale is a power of two, and the codes must be found with that very scale",
    ),
    (bias_forgotten, "the scale byte is the exponent plus 127; this one has no bias"),
    (bias_of_128, "the bias of E8M0 is 127, as in FP32: 2^7 − 1, not 128"),
    (sign_in_low_bit, "the sign stands above the three bits of the magnitude, not below them"),
    (fp8_bias, "7 is the bias inside an E4M3 number; the scale byte (E8M0) has the bias 127"),
    (sign_forgotten, "the sign is the highest bit of the code: add 8 for a negative number"),
    (
        twos_complement,
        "FP4 stores sign and magnitude, not a two's complement: −x is the code of x plus 8",
    ),
    (evenly_spaced, "the codes 0 to 7 stand for 0, 0.5, 1, 1.5, 2, 3, 4, 6, not for 0 to 7"),
    (no_saturation, "what lies beyond 6 saturates: it becomes 6, never another code"),
    (always_down, "take the nearest value, not the next one below"),
    (scale_of_all_blocks, "each block of 32 has a scale of its own"),
    (exponent_unbounded, "once 2 is subtracted, clamp the exponent at −127, or the byte wraps"),
    (exponent_from_minus_126, "the exponent may go down to −127, byte 0, not only to −126"),
    (
        floored_largest,
        "a floor under max |x| changes the scale of tiny blocks: clamp the exponent at −127",
    ),
)
_OTHER_FLOORS = tuple(
    (functools.partial(floored_largest, least=least), _WRONG[-1][1])
    for least in (2**-23, 1e-5, 1e-6, 1e-7, 1e-8, 1e-9, 1e-10, 1e-15, 1e-20, 1e-30)
)


def pack_block_by_block(blocks):
    """Plain Python over single numbers, exponents from math.frexp."""
    scales, rows = [], []
    for block in blocks.tolist():
        largest = max(map(abs, block))
        exponent = max(math.frexp(largest)[1] - 3, -127) if largest else -127
        codes = []
        for x in block:
            distance = [abs(abs(x) / 2.0**exponent - v) for v in (0, 0.5, 1, 1.5, 2, 3, 4, 6)]
            codes.append(distance.index(min(distance)) + 8 * (x < 0))
        scales.append(exponent + 127)
        rows.append([codes[i] + 16 * codes[i + 1] for i in range(0, 32, 2)])
    return torch.tensor(scales).to(torch.uint8), torch.tensor(rows).to(torch.uint8)


def pack_by_borders(blocks):
    """Finds codes by the borders between neighbors; a block of zeros gets the scale 1."""
    largest = blocks.abs().amax(1)
    exponent = (torch.frexp(largest.where(largest > 0, 4.0)).exponent - 3).clamp(min=-127)
    borders = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0], dtype=torch.float32)
    codes = torch.bucketize(torch.ldexp(blocks, -exponent[:, None]).abs(), borders)
    codes = (codes | (blocks < 0).int() << 3).view(-1, 16, 2)
    packed = (codes * torch.tensor([1, 16])).sum(-1)
    return (exponent + 127).to(torch.uint8), packed.to(torch.uint8)


EXERCISE = Exercise(
    id="1.5",
    title="Pack blocks of MXFP4",
    stars=2,
    minutes=20,
    function_names=("pack_mxfp4",),
    check=_check,
    takeaway="Thirty-two weights in 17 bytes: 4.25 bits per weight, and no zero point anywhere.",
    wrong_answers=_WRONG,
    variants=(pack_block_by_block, pack_by_borders),
)
