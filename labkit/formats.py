"""Number formats bit by bit: encode, decode, and the same state as a sentence and as a figure."""

import math
import re
from decimal import Decimal

import torch

from labkit.microscaling import E2M1, fp4_codes, fp4_decode
from labkit.plotting import COLORS, subplots

# Format: (torch dtype, integer dtype of the same width, exponent bits, fraction bits). torch has a
# dtype for pairs of FP4 codes, and no arithmetic or conversion for it.
FORMATS = {
    "FP32": (torch.float32, torch.int32, 8, 23),
    "FP16": (torch.float16, torch.int16, 5, 10),
    "BF16": (torch.bfloat16, torch.int16, 8, 7),
    "FP8 E4M3": (torch.float8_e4m3fn, torch.int8, 4, 3),
    "FP8 E5M2": (torch.float8_e5m2, torch.int8, 5, 2),
    "FP4 E2M1": (None, None, 2, 1),
    "INT8": (None, None, 0, 7),
    "INT4": (None, None, 0, 3),
}
_HUES = {"sign": "orange", "exponent": "blue", "fraction": "green", "value": "green"}
FIELD_COLORS = {field: COLORS[hue] for field, hue in _HUES.items()}
_LABEL = {"ha": "center", "va": "top", "fontsize": 9}


def fields(number_format: str) -> dict[str, int]:
    """Return the width of each field in bits, the most significant field first."""
    if number_format not in FORMATS:
        raise ValueError(f"number_format must be one of {list(FORMATS)}, not {number_format!r}")
    *_, exponent, fraction = FORMATS[number_format]
    widths = {"sign": 1, "exponent": exponent, "fraction": fraction}
    return widths if exponent else {"sign": 1, "value": fraction}


def format_bits(value: float, number_format: str) -> str:
    """Return the bits that store a number: `"0 01011 1001100110"` for 0.1 in FP16.

    Floating point: what torch's cast gives, by way of FP32; FP4, too, rounds ties to even and cuts
    to its range. Integers: rounded (ties to even), cut to the range, two's complement, scale 1.

    Args:
        value: any number; NaN and infinity only for formats of torch, which have such codes.
        number_format: a key of `FORMATS`.

    Raises:
        ValueError: if the format is unknown, or has no code for NaN or infinity and is given it.
    """
    fields(number_format)
    dtype, carrier, exponent, fraction = FORMATS[number_format]
    if dtype is not None:
        stored = torch.tensor(value, dtype=torch.float64).to(dtype)
        return _spell(int(stored.view(carrier)), number_format)
    if not math.isfinite(value):
        raise ValueError(f"{number_format} has no code for {value}; give a finite number")
    if exponent:
        within = min(max(value, -E2M1[2]), E2M1[2])
        return _spell(int(fp4_codes(torch.tensor(within, dtype=torch.float32))), number_format)
    return _spell(min(max(round(value), -(2**fraction)), 2**fraction - 1), number_format)


def decode(bits: str, number_format: str) -> float:
    """Return the number that a bit pattern stands for, exactly.

    Args:
        bits: the pattern, most significant bit first; spaces do not matter.
        number_format: a key of `FORMATS`.

    Raises:
        ValueError: if the format is unknown, or `bits` is no pattern of its width.
    """
    width = sum(fields(number_format).values())
    digits = bits.replace(" ", "")
    if len(digits) != width or set(digits) - {"0", "1"}:
        raise ValueError(f"bits: {number_format} takes {width} characters 0 or 1, not {bits!r}")
    value = int(digits, 2) - int(digits[0]) * 2**width  # two's complement
    dtype, carrier, exponent, _ = FORMATS[number_format]
    if dtype is None:
        return float(fp4_decode(torch.tensor(int(digits, 2))) if exponent else value)
    return float(torch.tensor(value, dtype=carrier).view(dtype))


def resolve(value: float | str, number_format: str) -> tuple[float, str, float]:
    """Return the number asked for, the bits that store it, and the number these stand for.

    Args, errors: as in `bits_sentence`.
    """
    if isinstance(value, str):
        stored = decode(value, number_format)
        return stored, _spell(int(value.replace(" ", ""), 2), number_format), stored
    bits = format_bits(value, number_format)
    return float(value), bits, decode(bits, number_format)


def bits_sentence(value: float | str, number_format: str) -> str:
    """Say what a format makes of a number: fields, stored value, error, next number, range.

    Args:
        value: a number, or a bit pattern as in `decode`.
        number_format: a key of `FORMATS`.

    Raises:
        ValueError: see `format_bits` and `decode`.
    """
    typed, bits, stored = resolve(value, number_format)
    low, high = _reach(number_format)
    meanings, formula = _explain(bits, number_format)
    words = ", ".join(f"{a} {b}" for a, b in zip(fields(number_format), meanings, strict=True))
    parts = [f"{number_format} {bits}: {words}; {formula}."]
    if not isinstance(value, str) and (typed < low or typed > high):
        told = f"{number_text(typed)} is out of range and is stored as {number_text(stored)}."
        parts.append(told)
    if not isinstance(value, str) and math.isfinite(off := stored - typed):
        error = f"{off:+.4g} ({_percent_off(typed, stored)})" if off else "none"
        parts.append(f"Error: {error}.")
    if low <= stored < high:
        above = _neighbor(bits, number_format, 1)
        parts.append(f"Next number up: {number_text(above, 9)}, {above - stored:.4g} away.")
    smallest = decode(_spell(1, number_format), number_format)
    parts.append(f"{number_format} reaches from {number_text(low, 9)} to {number_text(high, 9)};")
    parts.append(f"its smallest positive number is {number_text(smallest, 4)}.")
    return minus(" ".join(parts))


def bits_title(value: float | str, number_format: str) -> str:
    """Return the finding in a few words: title of the figure, alt text of the picture."""
    typed, bits, stored = resolve(value, number_format)
    if isinstance(value, str) or math.isnan(typed):
        words = f"{bits} is {number_text(stored, 9)} in {number_format}"
    elif stored == typed:
        words = f"{number_text(typed)} is exact in {number_format}"
    else:
        words = f"{number_text(typed)} becomes {number_text(stored, 9)} in {number_format}"
        if math.isfinite(stored - typed):
            words += f": {_percent_off(typed, stored)} off"
    return minus(words)


def bits_figure(value: float | str, number_format: str):
    """Draw the bits as boxes, and the number between its neighbors, as a matplotlib figure.

    Args, errors: as in `bits_sentence`.
    """
    typed, bits, stored = resolve(value, number_format)
    figure, (top, bottom) = subplots(2, 1, figsize=(7.2, 2.6), height_ratios=(1.9, 1))
    top.set_title(bits_title(value, number_format))
    _draw_boxes(top, bits, number_format)
    bottom.axis("off")
    low, high = _reach(number_format)
    if low <= stored <= high:
        near = [_neighbor(bits, number_format, step) for step in (-1, 0, 1)]
        _draw_neighbors(bottom, typed, stored, [x for x in near if low <= x <= high])
    return figure


def number_text(x: float, digits: int | None = None) -> str:
    """Write a number so that `float` reads it back: in full, or to so many digits."""
    if not math.isfinite(x):
        return "NaN" if math.isnan(x) else "-infinity" if x < 0 else "infinity"
    return f"{x:.{digits}g}" if digits else repr(float(x)).removesuffix(".0")


def parse_number(text: str) -> float:
    """Read what a person typed; ValueError says what is wrong and what would do."""
    try:
        value = float(text.replace("−", "-"))
    except ValueError:
        raise ValueError(f"{text!r} is not a number; type one such as 0.1, -3 or 1e-5") from None
    if math.isinf(value) and "inf" not in text.lower():
        raise ValueError(f"{text} is too large to read; type a number up to 1.7e308")
    if value == 0 and re.search("[1-9]", text.lower().split("e")[0]):
        raise ValueError(f"{text} is too small to read; type 0 or a number from 5e-324 up")
    return value


def minus(text: str) -> str:
    """Put a real minus sign before numbers."""
    return re.sub(r"-(?=[\d(]|infinity)", "−", text)


def _percent_off(typed: float, stored: float) -> str:
    return f"{100 * abs((stored - typed) / typed):.3g} %"


def _spell(pattern: int, number_format: str) -> str:
    *_, exponent_bits, fraction_bits = FORMATS[number_format]
    width = 1 + exponent_bits + fraction_bits
    digits = f"{pattern % 2**width:0{width}b}"
    return " ".join(f"{digits[0]} {digits[1:-fraction_bits]} {digits[-fraction_bits:]}".split())


def _reach(number_format: str) -> tuple[float, float]:
    dtype, _, exponent_bits, fraction_bits = FORMATS[number_format]
    if dtype is None and exponent_bits:
        return -E2M1[2], E2M1[2]
    if dtype is None:
        return -(2.0**fraction_bits), 2.0**fraction_bits - 1
    return torch.finfo(dtype).min, torch.finfo(dtype).max


def _neighbor(bits: str, number_format: str, step: int) -> float:
    """Return the number `step` places up from a finite one; it may be out of reach."""
    *_, exponent_bits, fraction_bits = FORMATS[number_format]
    if not exponent_bits:
        return decode(bits, number_format) + step
    # Without the sign bit, patterns are in the order of their magnitudes.
    sign_bit = 2 ** (exponent_bits + fraction_bits)
    sign, magnitude = divmod(int(bits.replace(" ", ""), 2), sign_bit)
    rank = (-magnitude if sign else magnitude) + step
    return decode(_spell(abs(rank) + sign_bit * (rank < 0), number_format), number_format)


def _explain(bits: str, number_format: str) -> tuple[list[str], str]:
    """Return what each field holds, and how the number follows from them."""
    stored = decode(bits, number_format)
    *_, exponent_bits, fraction_bits = FORMATS[number_format]
    exact = f"{Decimal(stored):f}"
    result = f"= {exact}" if len(exact) <= 45 else f"≈ {stored:.9g}"
    sign, *middle, fraction = [int(field, 2) for field in bits.split()]
    if not middle:
        meanings = [str(-sign * 2**fraction_bits), str(fraction)]
        return meanings, f"{' + '.join(meanings)} {result}"
    exponent, bias = middle[0], 2 ** (exponent_bits - 1) - 1
    share = f"{fraction}/{2**fraction_bits}"
    power = f"{exponent} − {bias} = {exponent - bias}" if exponent else "0: no leading 1"
    lead = f"{'-' * sign}({min(exponent, 1)} + {share})"
    formula = f"{lead} × 2^{max(exponent, 1) - bias} {result}"
    if not math.isfinite(stored):
        power, formula = f"{exponent}: special", number_text(stored)
    return ["−" if sign else "+", power, share], formula


def _draw_boxes(axes, bits: str, number_format: str) -> None:
    from matplotlib.patches import Rectangle

    meanings, formula = _explain(bits, number_format)
    left = 0.0
    for name, field, meaning in zip(fields(number_format), bits.split(), meanings, strict=True):
        color = FIELD_COLORS[name]
        for digit in field:
            face, ink = (color, "white") if digit == "1" else ("white", color)
            axes.add_patch(Rectangle((left, 0), 1, 1, facecolor=face, edgecolor=color))
            axes.text(left + 0.5, 0.48, digit, color=ink, ha="center", va="center", weight="bold")
            left += 1
        axes.text(left - len(field) / 2, -0.12, minus(f"{name}\n{meaning}"), color=color, **_LABEL)
        left += 0.7
    formula = minus(re.sub(r"\^(-?\d+)", r"$^{\1}$", formula))
    middle, half = (left - 0.7) / 2, max(left - 0.7, 20) / 2 + 0.3
    axes.text(middle, -1.45, formula, ha="center", va="top", fontsize=11)
    axes.set(xlim=(middle - half, middle + half), ylim=(-2.1, 1.1))
    axes.axis("off")


def _draw_neighbors(axes, typed: float, stored: float, near: list[float]) -> None:
    gap = max(abs(x - stored) for x in near)
    axes.axhline(0, color=COLORS["gray"], linewidth=1)
    for x in near:
        name, weight, marker = ("stored", "bold", "o") if x == stored else ("next", "normal", "|")
        axes.plot((x - stored) / gap, 0, marker, color="black", markersize=9)
        label = minus(f"{number_text(x, 9)}\n{name}")
        axes.text((x - stored) / gap, -0.42, label, weight=weight, **_LABEL)
    axes.set(xlim=(-1.5, 1.5), ylim=(-1.9, 1.1))
    if typed == stored:
        return
    place, label = (typed - stored) / gap, f"typed {number_text(typed)}"
    if abs(place) <= 1.1:
        axes.plot(place, 0, "v", color=COLORS["pink"], markersize=9)
    else:
        label, place = (f"{label} →", 1.25) if place > 0 else (f"← {label}", -1.25)
    axes.text(place, 0.4, minus(label), ha="center", fontsize=9)
