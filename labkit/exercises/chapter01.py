"""Chapter 1: checks, known wrong answers and correct variants.

Each wrong answer's docstring names the misconception; the text beside it is what a learner reads.
References are torch's own quantizers and observers, `struct` and numpy, never labkit.
"""

import math
import struct

import numpy as np
import torch

from labkit.exercises import Exercise, Wrong, call, judge, kind, misfit, show

# 1.1 ------------------------------------------------------------------------------------------


def _check_decode(function) -> None:
    small = (0x3C00, 0xC000, 0x3E00, 0x0000, 0x0001, 0x0200, 0x7C00, 0xFC00, 0x7E00, 0x7BFF)
    cases = ((pattern,) for pattern in (*small, *range(2**16)))
    judge("decode_fp16", function, cases, _examine_decode, _WRONG_DECODE)


def _examine_decode(pattern, got) -> str | None:
    expected = struct.unpack("<e", struct.pack("<H", pattern))[0]
    if isinstance(got, int | float | np.floating) and not isinstance(got, bool):
        if got == expected or (math.isnan(expected) and math.isnan(got)):
            return None
        return f"decode_fp16(0x{pattern:04X}) gives {got:.6g}, expected {expected:.6g}"
    return f"decode_fp16(0x{pattern:04X}) returns {kind(got)}, expected a float"


def _fp16(pattern, bias=15, implicit=1, subnormals=True, specials=True, lowest=1) -> float:
    sign = -1 if pattern >> 15 else 1
    exponent, fraction = pattern >> 10 & 31, pattern & 1023
    if specials and exponent == 31:
        return math.nan if fraction else sign * math.inf
    if subnormals and exponent == 0:
        return sign * fraction / 1024 * 2.0 ** (lowest - bias)
    return sign * (implicit + fraction / 1024) * 2.0 ** (exponent - bias)


def fp32_bias(pattern):
    """Uses FP32's exponent bias, 127."""
    return _fp16(pattern, bias=127)


def no_implicit_one(pattern):
    """Reads the fraction as it stands, without the 1 in front of it."""
    return _fp16(pattern, implicit=0)


def subnormals_as_normal(pattern):
    """Treats exponent field 0 like any other."""
    return _fp16(pattern, subnormals=False)


def subnormals_halved(pattern):
    """Drops the implicit 1 of a subnormal but keeps the exponent 0 − 15."""
    return _fp16(pattern, lowest=0)


def exponent_31_as_normal(pattern):
    """Treats exponent field 31 like any other."""
    return _fp16(pattern, specials=False)


def nan_as_infinity(pattern):
    """Takes every pattern with exponent field 31 for an infinity."""
    return _fp16(pattern & 0xFC00) if pattern >> 10 & 31 == 31 else _fp16(pattern)


def sign_ignored(pattern):
    """Never looks at bit 15."""
    return _fp16(pattern & 0x7FFF)


_WRONG_DECODE = (
    (fp32_bias, "127 is the exponent bias of FP32; a 5-bit exponent has the bias 15"),
    (no_implicit_one, "the fraction of a normal number has an implicit 1 in front of it"),
    (subnormals_as_normal, "exponent field 0 marks zero and the subnormals, without implicit 1"),
    (subnormals_halved, "the exponent of a subnormal is 1 − 15 = −14, not 0 − 15"),
    (exponent_31_as_normal, "exponent field 31 marks infinity and NaN, not ordinary numbers"),
    (nan_as_infinity, "exponent field 31 is an infinity only when the fraction is 0, else NaN"),
    (sign_ignored, "bit 15 is the sign"),
)


def decode_through_numpy(pattern):
    """Lets numpy reinterpret the two bytes."""
    return np.array(pattern, dtype=np.uint16).view(np.float16).item()


def decode_from_text(pattern):
    """Cuts the sixteen binary digits apart."""
    bits = f"{pattern:016b}"
    sign, exponent, fraction = 1 - 2 * int(bits[0]), int(bits[1:6], 2), int(bits[6:], 2)
    if exponent == 31:
        return math.nan if fraction else math.copysign(math.inf, sign)
    return sign * math.ldexp(fraction + 1024 * (exponent > 0), max(exponent, 1) - 25)


# 1.2 ------------------------------------------------------------------------------------------


def _check_symmetric(function) -> None:
    random = torch.Generator().manual_seed(12)
    cases = [
        (torch.tensor([1.0, -3.0, 0.5]), 4),
        (torch.tensor([0.3, 2.0, -1.1]), 3),
        (torch.tensor([-0.7]), 8),
        (torch.zeros(3), 8),
        (torch.zeros(2, 2), 4),
    ]
    for bits, shape in ((2, (9,)), (3, (4, 5)), (4, (2, 3, 4)), (5, ()), (6, (64,)), (8, (16, 64))):
        cases.append((torch.randn(shape, generator=random) * 10 ** (bits - 5), bits))
    judge("symmetric_fake_quantize", function, cases, _examine_symmetric, _WRONG_SYMMETRIC)


def _examine_symmetric(x, bits, got) -> str | None:
    written = call("symmetric_fake_quantize", x, bits)
    if complaint := misfit(got, torch.float32, x.shape):
        return f"{written} returns {complaint}"
    limit = 2 ** (bits - 1) - 1
    step = x.abs().max().item() / limit
    if step == 0:
        expected = allowed = torch.zeros_like(x)
    else:
        expected = torch.fake_quantize_per_tensor_affine(x, step, 0, -limit, limit)
        tie = ((x.double() / step).frac().abs() - 0.5).abs() < 1e-3
        allowed = step * (1e-3 + tie)
    if ((got - expected).abs() <= allowed).all():
        return None
    if x.numel() <= 3:
        return f"{written} gives {show(got)}, expected {show(expected)}"
    worst = ((got - expected).abs() - allowed).nan_to_num(math.inf).argmax()
    values = [show(t.flatten()[worst].item()) for t in (x, got, expected)]
    return "{} turns {} into {}, expected {}".format(written, *values)


def _to_grid(x, scale, low, high, rounding=torch.round):
    return torch.nan_to_num(rounding(x / scale)).clamp(low, high) * scale


def largest_x(x, bits):
    """Takes the scale from max x, so a large negative value is clipped."""
    limit = 2 ** (bits - 1) - 1
    return _to_grid(x, x.max() / limit, -limit, limit)


def cut_off(x, bits):
    """Truncates toward zero where it should round to nearest."""
    limit = 2 ** (bits - 1) - 1
    return _to_grid(x, x.abs().max() / limit, -limit, limit, rounding=torch.trunc)


def all_levels_on_each_side(x, bits):
    """Divides by 2^b − 1 and clips there too: that grid needs b + 1 bits."""
    limit = 2**bits - 1
    return _to_grid(x, x.abs().max() / limit, -limit, limit)


def scale_of_the_unsigned_range(x, bits):
    """Divides by 2^b − 1 but clips at 2^(b−1) − 1, so the larger half is clipped."""
    limit = 2 ** (bits - 1) - 1
    return _to_grid(x, x.abs().max() / (2**bits - 1), -limit, limit)


def full_negative_range(x, bits):
    """Divides by 2^(b−1), a code that only the negative side has."""
    limit = 2 ** (bits - 1)
    return _to_grid(x, x.abs().max() / limit, -limit, limit - 1)


def codes_only(x, bits):
    """Stops at the codes and never multiplies by the scale."""
    limit = 2 ** (bits - 1) - 1
    return torch.nan_to_num(x / (x.abs().max() / limit)).round()


def zero_divided_by_zero(x, bits):
    """Divides by a scale of 0 when the whole tensor is 0."""
    scale = x.abs().max() / (2 ** (bits - 1) - 1)
    return (x / scale).round() * scale


def largest_x_unclipped(x, bits):
    """Takes the scale from max x and does not clip, so large negative values get more codes."""
    scale = x.max() / (2 ** (bits - 1) - 1)
    return torch.nan_to_num(x / scale).round() * scale


def min_to_max(x, bits):
    """Stretches an asymmetric grid from min x to max x."""
    scale = (x.max() - x.min()) / (2**bits - 1)
    return x.min() + torch.nan_to_num((x - x.min()) / scale).round() * scale


_WRONG_SYMMETRIC = (
    (largest_x, "the scale comes from the largest |x|, not from the largest x"),
    (largest_x_unclipped, "take the scale from the largest |x|, or codes leave the range"),
    (cut_off, "round to the nearest code instead of cutting the fraction off"),
    (all_levels_on_each_side, "2^b − 1 codes on each side of 0 need b + 1 bits"),
    (scale_of_the_unsigned_range, "a scale of max |x| / (2^b − 1) is too small: large values clip"),
    (full_negative_range, "divide by 2^(b−1) − 1: the code 2^(b−1) exists only as a negative"),
    (codes_only, "these are the codes; multiply them by the scale to come back to real values"),
    (zero_divided_by_zero, "an all-zero tensor has the scale 0, and 0 / 0 is NaN"),
    (min_to_max, "a symmetric grid is centered on 0; this one is laid from min x to max x"),
)


def symmetric_one_by_one(x, bits):
    """Plain Python over single values."""
    limit = 2 ** (bits - 1) - 1
    scale = max((abs(value) for value in x.flatten().tolist()), default=0.0) / limit or 1.0
    return torch.tensor([round(v / scale) * scale for v in x.flatten().tolist()]).view(x.shape)


def symmetric_in_double(x, bits):
    """Works in float64, ties away from zero, and floors the scale at a tiny value."""
    limit = 2 ** (bits - 1) - 1
    scale = torch.clamp(x.double().abs().max() / limit, min=1e-30)
    codes = torch.floor(x.double().abs() / scale + 0.5).clamp(0, limit)
    return (x.sign() * codes * scale).float()


# 1.3 ------------------------------------------------------------------------------------------


def _check_bytes(function) -> None:
    cases = [(2, 64, 4, 32), (2, 64, 8, 32), (1, 32, 4, 32), (3, 96, 4, 96), (5, 256, 8, 64)]
    cases += [(192, 576, 4, 64), (576, 1536, 4, 32), (576, 192, 8, 192), (49152, 576, 4, 576)]
    judge("file_bytes", function, cases, _examine_bytes, _WRONG_BYTES)


def _examine_bytes(rows, columns, bits, group_size, got) -> str | None:
    # One row is written out for real; the rows are alike.
    codes = np.packbits(np.zeros(columns * bits, dtype=bool)).tobytes()
    groups = columns // group_size
    scales, zero_points = np.zeros(groups, np.float16).tobytes(), bytes(groups)
    expected = rows * len(codes + scales + zero_points)
    written = call("file_bytes", rows, columns, bits, group_size)
    if not isinstance(got, int | float | np.number) or isinstance(got, bool):
        return f"{written} returns {kind(got)}, expected an int"
    if got != expected:
        return f"{written} gives {show(got)}, expected {expected}"
    if not isinstance(got, int | np.integer):
        return f"{written} returns {kind(got)} ({got}), expected an int: divide with //, not /"
    return None


def scales_forgotten(rows, columns, bits, group_size):
    """Counts codes and zero points only."""
    return rows * columns * bits // 8 + rows * columns // group_size


def zero_points_forgotten(rows, columns, bits, group_size):
    """Counts codes and scales only."""
    return rows * columns * bits // 8 + 2 * rows * columns // group_size


def codes_alone(rows, columns, bits, group_size):
    """Counts the codes as if they could be read without a grid."""
    return rows * columns * bits // 8


def byte_per_code(rows, columns, bits, group_size):
    """Stores each 4-bit code in a byte of its own."""
    return rows * columns + 3 * rows * columns // group_size


def scale_per_row(rows, columns, bits, group_size):
    """Stores one scale and zero point per row, whatever the group size."""
    return rows * columns * bits // 8 + 3 * rows


def one_row_of_scales(rows, columns, bits, group_size):
    """Counts the groups of one row only."""
    return rows * columns * bits // 8 + 3 * columns // group_size


def float32_scales(rows, columns, bits, group_size):
    """Stores the scales in four bytes each."""
    return rows * columns * bits // 8 + 5 * rows * columns // group_size


def bits_not_bytes(rows, columns, bits, group_size):
    """Adds up bits and forgets to divide by 8."""
    return rows * columns * bits + 24 * rows * columns // group_size


_WRONG_BYTES = (
    (scales_forgotten, "the scales are in the file too, two bytes a group"),
    (zero_points_forgotten, "an asymmetric grid needs its zero points, one byte a group"),
    (codes_alone, "codes alone cannot be read back; each group also stores scale and zero point"),
    (byte_per_code, "packed 4-bit codes lie two to a byte"),
    (scale_per_row, "a scale and a zero point are stored per group, not per row"),
    (one_row_of_scales, "every row has columns / group_size groups; these are one row's"),
    (float32_scales, "a float16 scale takes two bytes, not four"),
    (bits_not_bytes, "this counts bits; a byte holds 8"),
)


def bytes_group_by_group(rows, columns, bits, group_size):
    """Adds up one group after another."""
    return sum(group_size * bits // 8 + 2 + 1 for _ in range(rows * (columns // group_size)))


def bytes_of_arrays(rows, columns, bits, group_size):
    """Asks empty arrays for their size."""
    groups = (rows, columns // group_size)
    codes = np.empty((rows, columns * bits // 8), np.uint8)
    return codes.nbytes + np.empty(groups, np.float16).nbytes + np.empty(groups, np.uint8).nbytes


# 1.4 ------------------------------------------------------------------------------------------

_ONE_STEP_LOW = "(x − minimum) / scale is rarely a whole number in floats: round it, do not cut it"


def _check_repack(function) -> None:
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
    judge("repack", function, cases, _examine_repack, _WRONG_REPACK)


def _examine_repack(row, got) -> str | None:
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


_WRONG_REPACK = (
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


# 1.5 ------------------------------------------------------------------------------------------


def broken_quantize_rows(w, bits):
    """Quantize each row asymmetrically. Three bugs."""
    low = w.amin(dim=1, keepdim=True)
    high = w.amax(dim=1, keepdim=True)
    scale = ((high - low) / 2**bits).clamp(min=1e-8)
    zero_point = (-low / scale).round().clamp(0, 2**bits - 1)
    codes = (w / scale).round().int() + zero_point.int()
    codes = codes.to(torch.uint8).clamp(0, 2**bits - 1)
    return codes, scale, zero_point


def _check_rows(function) -> None:
    random = torch.Generator().manual_seed(15)
    rows = [[-3.0, 0.9, 3.0]], [[5.0, 5.5, 6.0]], [[-6.0, -5.2, -5.0]], [[-1.0, 0.0, 2.6]]
    cases = [(torch.tensor(row), bits) for row in rows for bits in (8, 4)]
    cases += [(torch.tensor([[-1.0, 0.3], [-9.0, 30.0]]), 8), (torch.tensor([[0.0, 0.0]]), 8)]
    for bits, shape in ((8, (4, 33)), (4, (5, 16)), (3, (2, 7)), (2, (3, 9)), (8, (16, 256))):
        w = torch.randn(shape, generator=random)
        w *= torch.logspace(-2, 1, shape[0])[:, None]
        w[0], w[1, ::3] = w[0].abs() + 1, 0
        cases.append((w, bits))
    judge("quantize_rows", function, cases, _examine_rows, _WRONG_ROWS)


def _examine_rows(w, bits, got) -> str | None:
    if not isinstance(got, tuple | list) or len(got) != 3:
        return f"quantize_rows returns {kind(got)}, expected (codes, scale, zero_point)"
    one_a_row = (len(w), 1)
    wanted = (torch.uint8, w.shape), (torch.float32, one_a_row), (None, one_a_row)
    for name, value, form in zip(("codes", "scale", "zero_point"), got, wanted, strict=True):
        if complaint := misfit(value, *form):
            return f"for weights of shape {tuple(w.shape)}, {name} is {complaint}"
    codes, scale, zero_point = (part.detach().double() for part in got)
    top = 2**bits - 1
    observed = torch.ao.quantization.PerChannelMinMaxObserver(
        dtype=torch.quint8, qscheme=torch.per_channel_affine, quant_min=0, quant_max=top
    )
    observed(w)
    true_scale, true_zero = (part.double()[:, None] for part in observed.calculate_qparams())
    low, empty = w.double().amin(1, keepdim=True).clamp(max=0), (w == 0).all(1, keepdim=True)
    ideal = (w.double() / scale + zero_point).clamp(0, top)
    tests = (
        ("scale", scale, true_scale, ((scale / true_scale - 1).abs() < 1e-4) | empty & (scale > 0)),
        ("zero point", zero_point, true_zero, (zero_point + low / scale).abs() < 0.501),
        ("zero point", zero_point, true_zero, zero_point == zero_point.round().clamp(0, top)),
        ("code", codes, ideal.round(), (codes - ideal).abs() < 0.51),
    )
    for name, value, expected, right in tests:
        if not right.all():
            row, column = (~right).nonzero()[0].tolist()
            numbers = show(value[row, column].item()), show(expected[row, column].item())
            of = f" of {show(w[row, column].item())}" if name == "code" else ""
            at = f"in the row {show(w[row])} at {bits} bits"
            return f"{at} the {name}{of} is {numbers[0]}, expected {numbers[1]}"
    return None


def _rows(w, bits, zero=True, clip_first=True, steps=True, dim=1):
    low, high = w.amin(dim, keepdim=True), w.amax(dim, keepdim=True)
    if zero:
        low, high = low.clamp(max=0), high.clamp(min=0)
    top = 2**bits - 1
    scale = ((high - low) / (top if steps else 2**bits)).clamp(min=1e-8)
    zero_point = (-low / scale).round().clamp(0, top)
    codes = (w / scale).round().int() + zero_point.int()
    codes = codes.clamp(0, top).to(torch.uint8) if clip_first else codes.to(torch.uint8)
    return codes.clamp(0, top), scale, zero_point


def only_zero_mended(w, bits):
    """Puts zero into the range; casts before clipping and divides by 2^b as before."""
    return _rows(w, bits, clip_first=False, steps=False)


def only_clip_mended(w, bits):
    """Clips before casting; the range leaves out zero and the scale is divided by 2^b as before."""
    return _rows(w, bits, zero=False, steps=False)


def only_steps_mended(w, bits):
    """Divides by 2^b − 1; the range leaves out zero and the cast comes first as before."""
    return _rows(w, bits, zero=False, clip_first=False)


def zero_still_outside(w, bits):
    """Mends all but the range, which still leaves out zero."""
    return _rows(w, bits, zero=False)


def still_wrapping(w, bits):
    """Mends all but the order of cast and clip."""
    return _rows(w, bits, clip_first=False)


def still_one_step_too_many(w, bits):
    """Mends all but the number of steps."""
    return _rows(w, bits, steps=False)


def one_range_for_all_rows(w, bits):
    """Takes minimum and maximum over the whole tensor."""
    codes, scale, zero_point = _rows(w, bits, dim=(0, 1))
    return codes, scale.repeat(len(w), 1), zero_point.repeat(len(w), 1)


def range_per_column(w, bits):
    """Reduces over the rows instead of within each."""
    return _rows(w, bits, dim=0)


def zero_point_unclipped(w, bits):
    """Saves the all-positive row with a zero point that does not fit into the codes."""
    low, high = w.amin(1, keepdim=True), w.amax(1, keepdim=True)
    scale = ((high - low) / (2**bits - 1)).clamp(min=1e-8)
    zero_point = (-low / scale).round()
    return ((w / scale).round() + zero_point).clamp(0, 2**bits - 1).byte(), scale, zero_point


_WRONG_ROWS = (
    (zero_still_outside, "one bug left, in the range: zero has no code in an all-positive row"),
    (still_wrapping, "one bug left, in a cast: a uint8 cannot hold 256, it wraps before the clip"),
    (still_one_step_too_many, "one bug left, in the scale: 2^b codes have 2^b − 1 steps"),
    (only_zero_mended, "zero is in the range now; the number of steps and a cast are still wrong"),
    (only_clip_mended, "codes clip before the cast now; the range and its steps are still wrong"),
    (only_steps_mended, "the steps are right now; the range and a cast are still wrong"),
    (one_range_for_all_rows, "this is one range for the whole tensor; each row needs its own"),
    (range_per_column, "this reduces over the rows; take minimum and maximum within each row"),
    (zero_point_unclipped, "a zero point is itself a code, so it must fit in 0 … 2^b − 1"),
)


def rows_in_double(w, bits):
    """Works in float64, rounds once, and returns integer zero points."""
    low, high = torch.aminmax(torch.nn.functional.pad(w.double(), (0, 1)), dim=1, keepdim=True)
    scale = (high - low) / (2**bits - 1)
    scale[scale == 0] = 1
    zero_point = torch.round(-low / scale).int()
    codes = torch.round(w / scale + zero_point).clamp(0, 2**bits - 1)
    return codes.to(torch.uint8), scale.float(), zero_point


def rows_through_torch(w, bits):
    """Asks torch's own observer, then works row by row."""
    top = 2**bits - 1
    observer = torch.ao.quantization.PerChannelMinMaxObserver(
        dtype=torch.quint8, qscheme=torch.per_channel_affine, quant_min=0, quant_max=top
    )
    observer(w)
    scale, zero_point = observer.calculate_qparams()
    rows = zip(w, scale, zero_point, strict=True)
    codes = [(row / s + z).round().clamp(0, top).to(torch.uint8) for row, s, z in rows]
    return torch.stack(codes), scale[:, None], zero_point[:, None]


# 1.6 ------------------------------------------------------------------------------------------


def _check_calibrate(function) -> None:
    random = torch.Generator().manual_seed(16)
    lists = [[[-1.0, 2.0], [5.0, 0.0], [1.0]], [[2.0, 3.0], [4.0]], [[-4.0], [-2.0, -3.0]]]
    cases = [([torch.tensor(batch) for batch in batches],) for batches in lists]
    cases.append(([torch.tensor([[-0.5, 1.0], [0.25, 0.0]])],))
    for shapes in (((4, 8), (2, 8), (7, 8)), ((3,), (2, 5), (1, 2, 3)), ((64, 32),) * 5):
        for shift in (0.0, 9.0):
            draws = [torch.randn(shape, generator=random) for shape in shapes]
            cases.append(([draw * (1 + i % 3) + shift for i, draw in enumerate(draws)],))
    judge("calibrate", function, cases, _examine_calibrate, _WRONG_CALIBRATE)


def _examine_calibrate(batches, got) -> str | None:
    small = sum(batch.numel() for batch in batches) <= 6
    of = show(batches) if small else f"{len(batches)} random batches"
    if not isinstance(got, tuple | list) or len(got) != 2:
        return f"calibrate returns {kind(got)}, expected the pair (scale, zero_point)"
    scale, zero_point = got
    if not isinstance(scale, float | np.floating):
        return f"for {of} the scale is {kind(scale)}, expected a float (tensors have .item())"
    if isinstance(zero_point, bool) or not isinstance(zero_point, int | np.integer):
        return f"for {of} the zero point is {kind(zero_point)}, expected an int"
    observer = torch.ao.quantization.MinMaxObserver(
        dtype=torch.quint8, qscheme=torch.per_tensor_affine
    )
    for batch in batches:
        observer(batch)
    true_scale, true_zero = (part.item() for part in observer.calculate_qparams())
    if not abs(scale / true_scale - 1) < 1e-4:
        return f"for {of} the scale is {show(scale)}, expected {show(true_scale)}"
    exact = -min(0.0, observer.min_val.item()) / true_scale
    if zero_point != true_zero and abs(zero_point - exact) > 0.501:  # either side of a tie will do
        return f"for {of} the zero point is {zero_point}, expected {true_zero}"
    return None


def _grid(low, high, zero=True, steps=255):
    low, high = float(low), float(high)
    if zero:
        low, high = min(low, 0.0), max(high, 0.0)
    scale = (high - low) / steps
    return scale, round(-low / scale)


def last_batch_only(batches):
    """Overwrites the range with each batch."""
    return _grid(batches[-1].min(), batches[-1].max())


def first_batch_only(batches):
    """Looks at one batch and stops."""
    return _grid(batches[0].min(), batches[0].max())


def average_of_extremes(batches):
    """Averages the minima and the maxima: no longer a bound."""
    lows, highs = [b.min().item() for b in batches], [b.max().item() for b in batches]
    return _grid(sum(lows) / len(lows), sum(highs) / len(highs))


def zero_left_out(batches):
    """Covers the data but not zero."""
    return _grid(min(b.min() for b in batches), max(b.max() for b in batches), zero=False)


def range_of_means(batches):
    """Takes the range of the batch means."""
    means = [batch.mean() for batch in batches]
    return _grid(min(means), max(means))


def steps_256(batches):
    """Divides the range by 256, though 256 codes have 255 steps."""
    return _grid(min(b.min() for b in batches), max(b.max() for b in batches), steps=256)


def symmetric_activations(batches):
    """Centers the grid on zero, with the zero point in the middle."""
    return max(b.abs().max().item() for b in batches) / 127, 128


def zero_point_sign(batches):
    """Rounds low / scale without the minus sign."""
    scale, zero_point = _grid(min(b.min() for b in batches), max(b.max() for b in batches))
    return scale, -zero_point


_WRONG_CALIBRATE = (
    (last_batch_only, "each batch overwrites the range of the ones before it"),
    (first_batch_only, "this is the range of the first batch; later ones reach further"),
    (average_of_extremes, "an average of minima and maxima bounds nothing: larger values clip"),
    (zero_left_out, "zero must be a grid point even if no batch holds it: padding needs it"),
    (range_of_means, "batch means lie well inside the data; the range needs the extreme values"),
    (steps_256, "256 codes have 255 steps between them"),
    (symmetric_activations, "this grid is symmetric; an asymmetric one reaches from low to high"),
    (zero_point_sign, "low + zero_point · scale must be 0, so the zero point is −low / scale"),
)


def calibrate_at_once(batches):
    """Joins the batches into one vector, with a zero beside them."""
    values = torch.cat([torch.zeros(1), *(batch.reshape(-1) for batch in batches)]).double()
    scale = (values.max() - values.min()) / 255
    return scale.item(), int((-values.min() / scale).round())


def calibrate_running(batches):
    """Keeps a running range, value by value."""
    low = high = 0.0
    for batch in batches:
        for value in batch.flatten().tolist():
            low, high = min(low, value), max(high, value)
    scale = (high - low) / 255
    return scale, min(255, max(0, math.floor(0.5 - low / scale)))


EXERCISES = (
    Exercise(
        "1.1", "Read sixteen bits as FP16", 1, 10, ("decode_fp16",), _check_decode,
        "FP16 spends five bits on range and ten on precision, so its steps grow with the number.",
        _WRONG_DECODE, (decode_through_numpy, decode_from_text),
    ),
    Exercise(
        "1.2", "Symmetric fake quantization", 1, 10, ("symmetric_fake_quantize",), _check_symmetric,
        "One number, the largest |x|, sets the step for all the others.",
        _WRONG_SYMMETRIC, (symmetric_one_by_one, symmetric_in_double),
    ),
    Exercise(
        "1.3", "What does the file weigh?", 2, 10, ("file_bytes",), _check_bytes,
        "Small groups cost bytes: at groups of 32, 4-bit codes take 4.75 bits a weight.",
        _WRONG_BYTES, (bytes_group_by_group, bytes_of_arrays),
    ),
    Exercise(
        "1.4", "Find the old grid and pack it", 3, 25, ("repack",), _check_repack,
        "Values that were rounded once are free to store on the same grid again.",
        _WRONG_REPACK, (repack_with_numpy, repack_downward),
    ),
    Exercise(
        "1.5", "Bug hunt: three bugs in a quantizer", 2, 15, ("quantize_rows",), _check_rows,
        "Put zero in the range, count steps rather than codes, and clip before you cast.",
        _WRONG_ROWS, (rows_in_double, rows_through_torch), broken=broken_quantize_rows,
    ),
    Exercise(
        "1.6", "A static grid from calibration batches", 2, 15, ("calibrate",), _check_calibrate,
        "A static grid is as good as its calibration data: what lies outside will be clipped.",
        _WRONG_CALIBRATE, (calibrate_at_once, calibrate_running),
    ),
)  # fmt: skip
