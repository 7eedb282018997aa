"""Exercise 1.3, a bug hunt: `quantize_rows` should quantize each row asymmetrically.

The references are torch's `PerChannelMinMaxObserver` and, for the codes, the definition in float64.
"""

import functools

import torch

from labkit.exercises.judge import Exercise, Wrong, insist_on_dtype, judge, kind, misfit, show


def broken_quantize_rows(w, bits):
    """Quantize each row asymmetrically. Three bugs."""
    low = w.amin(dim=1, keepdim=True)
    high = w.amax(dim=1, keepdim=True)
    scale = ((high - low) / 2**bits).clamp(min=1e-8)
    zero_point = (-low / scale).round().clamp(0, 2**bits - 1)
    codes = (w / scale).round().int() + zero_point.int()
    codes = codes.to(torch.uint8).clamp(0, 2**bits - 1)
    return codes, scale, zero_point


def _check(function) -> None:
    random = torch.Generator().manual_seed(15)
    rows = [[-3.0, 0.9, 3.0]], [[5.0, 5.5, 6.0]], [[-6.0, -5.2, -5.0]], [[-1.0, 0.0, 2.6]]
    rows = [(row, bits) for row in rows for bits in (8, 4)]
    rows += ([[-1.0, 0.3], [-9.0, 30.0]], 8), ([[0.0, 0.0]], 8)
    cases = [(torch.tensor(row, dtype=torch.float32), bits) for row, bits in rows]
    for bits, shape in ((8, (4, 33)), (4, (5, 16)), (3, (2, 7)), (2, (3, 9)), (8, (16, 256))):
        w = torch.randn(shape, generator=random, dtype=torch.float32)
        w *= torch.logspace(-2, 1, shape[0], dtype=torch.float32)[:, None]
        w[0], w[1, ::3] = w[0].abs() + 1, 0
        cases.append((w, bits))
    judge("quantize_rows", function, cases, _examine, (*_WRONG, *_OTHER_FORMS))


def _examine(w, bits, got) -> str | None:
    if not isinstance(got, tuple | list) or len(got) != 3:
        return f"quantize_rows returns {kind(got)}, expected (codes, scale, zero_point)"
    one_a_row = (len(w), 1)
    wanted = (torch.uint8, w.shape), (torch.float32, one_a_row), (None, one_a_row)
    for name, value, form in zip(("codes", "scale", "zero_point"), got, wanted, strict=True):
        where = f"for weights of shape {tuple(w.shape)}, {name} is"
        if form[0]:
            insist_on_dtype(where, value, *form)
        if complaint := misfit(value, *form):
            return f"{where} {complaint}"
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
            which = show(w[row]) if w.shape[1] <= 10 else f"{row} of {kind(w)}"
            at = f"in the row {which} at {bits} bits"
            if name == "zero point" and value[row, column] % 1:
                at = f"a zero point is an integer, so round it and add the rounded one: {at}"
                raise Wrong(f"{at} the {name} is {numbers[0]}, expected {numbers[1]}")
            return f"{at} the {name}{of} is {numbers[0]}, expected {numbers[1]}"
    return None


def _rows(w, bits, zero="both", clip_first=True, steps=True, dim=1):
    low, high = w.amin(dim, keepdim=True), w.amax(dim, keepdim=True)
    low = low.clamp(max=0) if zero in ("both", "low") else low
    high = high.clamp(min=0) if zero in ("both", "high") else high
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
    return _rows(w, bits, zero=None, steps=False)


def only_steps_mended(w, bits):
    """Divides by 2^b − 1; the range leaves out zero and the cast comes first as before."""
    return _rows(w, bits, zero=None, clip_first=False)


def zero_still_outside(w, bits):
    """Mends all but the range, which still leaves out zero."""
    return _rows(w, bits, zero=None)


def high_below_zero(w, bits):
    """Mends all but the upper end of the range, which lies below 0 in an all-negative row."""
    return _rows(w, bits, zero="low")


def low_above_zero(w, bits):
    """Mends all but the lower end of the range, which lies above 0 in an all-positive row."""
    return _rows(w, bits, zero="high")


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


def zero_point_unrounded(w, bits):
    """Leaves a fraction in the zero point and cuts it off in the codes."""
    codes, scale, _ = zero_point_cut_off(w, bits)
    return codes, scale, -w.amin(1, keepdim=True).clamp(max=0) / scale


def zero_point_cut_off(w, bits):
    """Cuts the fraction of the zero point off, as int() does."""
    _, scale, _ = _rows(w, bits)
    zero_point = (-w.amin(1, keepdim=True).clamp(max=0) / scale).floor()
    return ((w / scale).round() + zero_point).clamp(0, 2**bits - 1).byte(), scale, zero_point


def zero_point_unclipped(w, bits):
    """Saves the all-positive row with a zero point that does not fit into the codes."""
    low, high = w.amin(1, keepdim=True), w.amax(1, keepdim=True)
    scale = ((high - low) / (2**bits - 1)).clamp(min=1e-8)
    zero_point = (-low / scale).round()
    return ((w / scale).round() + zero_point).clamp(0, 2**bits - 1).byte(), scale, zero_point


_WRONG = (
    (high_below_zero, "hold high at 0 or above: zero has no code in an all-negative row"),
    (low_above_zero, "hold low at 0 or below: zero has no code in an all-positive row"),
    (zero_still_outside, "one bug left, in the range: where all signs agree, zero has no code"),
    (still_wrapping, "one bug left, in a cast: a uint8 cannot hold 256, it wraps before the clip"),
    (still_one_step_too_many, "one bug left, in the scale: 2^b codes have 2^b − 1 steps"),
    (only_zero_mended, "zero is in the range now; the number of steps and a cast are still wrong"),
    (only_clip_mended, "codes clip before the cast now; the range and its steps are still wrong"),
    (only_steps_mended, "the steps are right now; the range and a cast are still wrong"),
    (one_range_for_all_rows, "this is one range for the whole tensor; each row needs its own"),
    (range_per_column, "this reduces over the rows; take minimum and maximum within each row"),
    (zero_point_unrounded, "a zero point is an integer, so round it and add the rounded one"),
    (zero_point_cut_off, "round the zero point to the nearest integer; this one is cut off"),
    (zero_point_unclipped, "a zero point is itself a code, so it must fit in 0 … 2^b − 1"),
)
_MESSAGES = dict(_WRONG)
_OTHER_FORMS = (
    (broken_quantize_rows, "all three bugs are still there"),
    *(
        (functools.partial(_rows, zero=zero, clip_first=clip_first, steps=steps), message)
        for zero in ("low", "high")  # one end of the range is mended
        for clip_first, steps, message in (
            (True, False, _MESSAGES[only_clip_mended]),
            (False, True, _MESSAGES[only_steps_mended]),
            (False, False, "one end of the range is mended, but nothing else"),
        )
    ),
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
    return torch.stack(codes), scale.float()[:, None], zero_point[:, None]


EXERCISE = Exercise(
    id="1.3",
    title="Bug hunt: three bugs in a quantizer",
    stars=2,
    minutes=15,
    function_names=("quantize_rows",),
    check=_check,
    takeaway="Put zero in the range, count steps rather than codes, and clip before you cast.",
    wrong_answers=_WRONG,
    variants=(rows_in_double, rows_through_torch),
    broken=broken_quantize_rows,
)
