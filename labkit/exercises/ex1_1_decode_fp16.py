"""Exercise 1.1: `decode_fp16` reads sixteen bits as an FP16 number, field by field.

The reference is Python's `struct`, on all 65,536 patterns. Answers that let a library read the
bits are refused.
"""

import math
import struct

import numpy as np

from labkit.exercises.forbidden import library_in
from labkit.exercises.judge import Exercise, Wrong, judge, kind

_FORBIDDEN = ("struct", "numpy", "torch", "array", "ctypes", "labkit", "ml_dtypes")


def _check(function) -> None:
    if library := library_in(function, _FORBIDDEN):
        raise Wrong(
            f"decode_fp16 lets {library} read the bits, expected arithmetic on the three fields: "
            "cut sign, exponent and fraction out of the pattern yourself"
        )
    small = (0x3C00, 0xC000, 0x3E00, 0x0000, 0x0001, 0x0200, 0x7C00, 0xFC00, 0x7E00, 0x7BFF)
    mixed = (place * 40503 % 2**16 for place in range(2**16))  # so that failures are of all kinds
    cases = ((pattern,) for pattern in (*small, *mixed))
    judge("decode_fp16", function, cases, _examine, _WRONG)


def _examine(pattern, got) -> str | None:
    expected = struct.unpack("<e", struct.pack("<H", pattern))[0]
    if isinstance(got, int | float | np.floating) and not isinstance(got, bool):
        same_zero = got != 0 or math.copysign(1, got) == math.copysign(1, expected)
        if (got == expected and same_zero) or (math.isnan(expected) and math.isnan(got)):
            return None
        return f"decode_fp16(0x{pattern:04X}) gives {got:.6g}, expected {expected:.6g}"
    return f"decode_fp16(0x{pattern:04X}) returns {kind(got)}, expected a float"


def _fp16(pattern, bias=15, implicit=1, subnormals=True, specials=True, lowest=1) -> float:
    sign = -1.0 if pattern >> 15 else 1.0
    exponent, fraction = pattern >> 10 & 31, pattern & 1023
    if specials and exponent == 31:
        return math.nan if fraction else sign * math.inf
    if subnormals and exponent == 0:
        return sign * fraction / 1024 * 2.0 ** (lowest - bias)
    return sign * (implicit + fraction / 1024) * 2.0 ** (exponent - bias)


def zero_without_sign(pattern):
    """Gives 0x8000 as 0.0: an integer 0 has no sign."""
    return _fp16(pattern) or 0.0


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


def subnormals_with_implicit_one(pattern):
    """Keeps the implicit 1 where the exponent is 1 − 15."""
    sign, fraction = -1.0 if pattern >> 15 else 1.0, pattern & 1023
    return _fp16(pattern) if pattern >> 10 & 31 else sign * (1 + fraction / 1024) * 2.0**-14


def subnormals_as_zero(pattern):
    """Takes every pattern with exponent field 0 for a zero."""
    return _fp16(pattern) if pattern >> 10 & 31 else _fp16(pattern & 0x8000)


def exponent_unmasked(pattern):
    """Leaves the sign bit above the exponent."""
    sign, exponent, fraction = -1.0 if pattern >> 15 else 1.0, pattern >> 10, pattern & 1023
    return sign * (1 + fraction / 1024) * 2.0 ** (exponent - 15) if sign < 0 else _fp16(pattern)


def exponent_31_as_normal(pattern):
    """Treats exponent field 31 like any other."""
    return _fp16(pattern, specials=False)


def nan_as_infinity(pattern):
    """Takes every pattern with exponent field 31 for an infinity."""
    return _fp16(pattern & 0xFC00) if pattern >> 10 & 31 == 31 else _fp16(pattern)


def infinity_as_nan(pattern):
    """Takes every pattern with exponent field 31 for NaN."""
    return math.nan if pattern >> 10 & 31 == 31 else _fp16(pattern)


def bias_of_16(pattern):
    """Takes half the number of exponents, 2^4, for the bias."""
    return _fp16(pattern, bias=16)


def bf16_layout(pattern):
    """Cuts the fields as BF16 has them: 8 exponent bits, 7 fraction bits, bias 127."""
    sign, exponent, fraction = -1.0 if pattern >> 15 else 1.0, pattern >> 7 & 255, pattern & 127
    if exponent == 255:
        return math.nan if fraction else sign * math.inf
    return sign * math.ldexp(fraction + 128 * (exponent > 0), max(exponent, 1) - 134)


def sign_ignored(pattern):
    """Never looks at bit 15."""
    return _fp16(pattern & 0x7FFF)


def read_by_numpy(pattern):
    """Lets numpy reinterpret the two bytes, which the task forbids."""
    return np.array(pattern, dtype=np.uint16).view(np.float16).item()


_WRONG = (
    (zero_without_sign, "0x8000 is −0.0: the sign must be a float, since −1 · 0 is 0 in integers"),
    (fp32_bias, "127 is the exponent bias of FP32; a 5-bit exponent has the bias 15"),
    (no_implicit_one, "the fraction of a normal number has an implicit 1 in front of it"),
    (subnormals_as_normal, "exponent field 0 marks zero and the subnormals, without implicit 1"),
    (subnormals_halved, "the exponent of a subnormal is 1 − 15 = −14, not 0 − 15"),
    (subnormals_with_implicit_one, "a subnormal has no implicit 1, only its fraction"),
    (subnormals_as_zero, "exponent field 0 with a fraction is a subnormal, not zero"),
    (exponent_unmasked, "mask the exponent with & 31: after >> 10 the sign bit is still there"),
    (exponent_31_as_normal, "exponent field 31 marks infinity and NaN, not ordinary numbers"),
    (nan_as_infinity, "exponent field 31 is an infinity only when the fraction is 0, else NaN"),
    (infinity_as_nan, "exponent field 31 is NaN only when the fraction is not 0, else an infinity"),
    (bias_of_16, "the bias is 2^(5−1) − 1 = 15, one less than half of the 32 exponent fields"),
    (bf16_layout, "these are the fields of BF16; FP16 has 5 exponent bits and 10 fraction bits"),
    (sign_ignored, "bit 15 is the sign"),
    (read_by_numpy, "cut sign, exponent and fraction out of the pattern yourself"),
)


def decode_by_fields(pattern):
    """Counts in units of the smallest subnormal, with integers."""
    field, sign = pattern >> 10 & 31, -1 if pattern & 0x8000 else 1
    if field == 31:
        return float("nan") if pattern & 1023 else sign * float("inf")
    units = (pattern & 1023) + (1024 if field else 0) << max(field - 1, 0)
    return sign * (units / 2**24)


def decode_from_text(pattern):
    """Cuts the sixteen binary digits apart."""
    bits = f"{pattern:016b}"
    sign, exponent, fraction = 1 - 2 * int(bits[0]), int(bits[1:6], 2), int(bits[6:], 2)
    if exponent == 31:
        return math.nan if fraction else math.copysign(math.inf, sign)
    return sign * math.ldexp(fraction + 1024 * (exponent > 0), max(exponent, 1) - 25)


EXERCISE = Exercise(
    id="1.1",
    title="Read sixteen bits as FP16",
    stars=1,
    minutes=10,
    function_names=("decode_fp16",),
    check=_check,
    takeaway=(
        "FP16 spends five bits on range and ten on precision, so its steps grow with the number."
    ),
    wrong_answers=_WRONG,
    variants=(decode_by_fields, decode_from_text),
)
