"""Exercise 5.3: `int4_tile` multiplies a tile of packed 4-bit rows by one token.

The reference takes the words apart with Python's integers, and multiplies in float64.
"""

import re

import numpy as np

from labkit.exercises.judge import Exercise, Wrong, call, judge, kind, show

_ROWS = 64


def _cases():
    words = np.array([[0x87654321, 0xFFFFFFFF]], np.uint32)
    scale, zeros = np.array([[0.5, 2.0]], np.float32), np.array([[4, 15]], np.uint8)
    yield words, scale, zeros, np.arange(1, 9, dtype=np.float32), 8
    random = np.random.default_rng(53)
    shapes = ((1, 8, 8), (2, 16, 8), (3, 24, 8), (2, 32, 16), (2, 48, 24), (5, 64, 32), (2, 160, 8))
    for rows, inputs, group_size in (*shapes, (_ROWS, 64, 64), (_ROWS, 128, 64)):
        words = random.integers(0, 2**32, (inputs // 8, rows), np.uint32)
        scale = random.uniform(0.1, 1.1, (inputs // group_size, rows)).astype(np.float32)
        zeros = random.integers(0, 16, scale.shape, np.uint8)
        x = random.standard_normal(inputs).astype(np.float32)
        yield words, scale, zeros, x, group_size


def _check(function) -> None:
    judge("int4_tile", function, _cases(), _examine, _WRONG)
    _compile(function)


def _examine(words, scale, zero_point, x, group_size, got) -> str | None:
    written = call("int4_tile", words, scale, zero_point, x, group_size)
    if words.size <= 8:  # an example to read: in hex
        written = written.replace(show(words), _in_hex(words), 1)
    rows = words.shape[1]
    if not isinstance(got, np.ndarray) or got.shape != (rows,) or got.dtype != np.float32:
        return f"{written} returns {kind(got)}, expected a float32 array of shape ({rows},)"
    terms = _codes(words).astype(np.float64) - _spread(zero_point, group_size)
    terms *= _spread(scale, group_size) * x[:, None].astype(np.float64)
    off = np.abs(got - terms.sum(0)) > 1e-4 * np.abs(terms).sum(0)
    if not off.any() and np.isfinite(got).all():
        return None
    row = int(np.argmax(off | ~np.isfinite(got)))
    expected = float(terms.sum(0)[row])
    return f"{written} gives {show(float(got[row]))} for row {row}, expected {show(expected)}"


def _in_hex(words) -> str:
    lines = (", ".join(f"0x{int(word):08X}" for word in line) for line in words)
    return f"[{', '.join(f'[{line}]' for line in lines)}]"


def _codes(words):
    codes = [[int(word) >> 4 * i & 15 for word in line] for line in words for i in range(8)]
    return np.array(codes)


def _spread(grid, group_size):
    return np.repeat(grid, group_size, 0).astype(np.float64)


def _compile(function) -> None:
    import numba

    words, scale, zero_point, x, group_size = list(_cases())[-1]
    plain = getattr(function, "py_func", function)
    try:
        got = numba.njit(plain)(words, scale, zero_point, x, group_size)
    except Exception as error:  # not all that Numba raises is a NumbaError
        raise Wrong(
            f"int4_tile is right in Python, but Numba cannot compile it ({_reason(error)}): "
            "it knows only a part of NumPy and of Python, so write loops over single numbers"
        ) from None
    if complaint := _examine(words, scale, zero_point, x, group_size, got):
        raise Wrong(
            "int4_tile is right in Python but not compiled, where integers of different types are "
            f"converted by other rules; write np.float32(code): {complaint}"
        )


def _reason(error: Exception) -> str:
    # Numba writes a page, with addresses and paths in it; one line says what is missing.
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    lines = lines or [type(error).__name__]
    said = next((line for line in lines[1:] if not line.startswith("File")), lines[0])
    if missing := re.search(r"implementation of function Function\(<\D*?function (\w+)", said):
        return f"no implementation of {missing[1]} for these arguments"
    return re.sub(r" at 0x[0-9a-fA-F]+| from '[^']*'| Raised from .*", "", said).rstrip(".:")[:120]


def _product(codes, scale, zero_point, x, group_size):
    weight = (codes - _spread(zero_point, group_size)) * _spread(scale, group_size)
    return (weight * x[:, None]).sum(0).astype(np.float32)


def high_code_first(words, scale, zero_point, x, group_size):
    """Takes the highest four bits for the first code."""
    codes = _codes(words).reshape(-1, 8, words.shape[1])[:, ::-1].reshape(len(x), -1)
    return _product(codes, scale, zero_point, x, group_size)


def halves_swapped(words, scale, zero_point, x, group_size):
    """Takes low codes of each byte first, then the high ones."""
    codes = _codes(words).reshape(-1, 4, 2, words.shape[1]).swapaxes(1, 2).reshape(len(x), -1)
    return _product(codes, scale, zero_point, x, group_size)


def words_side_by_side(words, scale, zero_point, x, group_size):
    """Takes the first code of all words, then the second: i % n_words for i // 8."""
    codes = _codes(words).reshape(-1, 8, words.shape[1]).swapaxes(0, 1).reshape(len(x), -1)
    return _product(codes, scale, zero_point, x, group_size)


def unmasked(words, scale, zero_point, x, group_size):
    """Leaves the later codes above the one it wants."""
    codes = np.array([[int(word) >> 4 * i for word in line] for line in words for i in range(8)])
    return _product(codes, scale, zero_point, x, group_size)


def shifted_by_place(words, scale, zero_point, x, group_size):
    """Shifts by the place of a code, not by its bits."""
    codes = [[int(word) >> i & 15 for word in line] for line in words for i in range(8)]
    return _product(np.array(codes), scale, zero_point, x, group_size)


def zero_point_forgotten(words, scale, zero_point, x, group_size):
    """Scales the codes as they are."""
    return _product(_codes(words), scale, np.zeros_like(zero_point), x, group_size)


def zero_point_of_the_middle(words, scale, zero_point, x, group_size):
    """Subtracts 8, as for symmetric codes."""
    return _product(_codes(words), scale, np.full_like(zero_point, 8), x, group_size)


def zero_point_unscaled(words, scale, zero_point, x, group_size):
    """Subtracts the zero point after scaling."""
    weight = _codes(words) * _spread(scale, group_size) - _spread(zero_point, group_size)
    return (weight * x[:, None]).sum(0).astype(np.float32)


def zero_point_once(words, scale, zero_point, x, group_size):
    """Subtracts the zero point from a group's sum, without its sum of x."""
    parts = (_codes(words) * x[:, None]).reshape(len(scale), group_size, -1).sum(1)
    return ((parts - zero_point) * scale).sum(0).astype(np.float32)


def wrapped_below_zero(words, scale, zero_point, x, group_size):
    """Subtracts in unsigned integers."""
    zeros = np.repeat(zero_point, group_size, 0).astype(np.uint32)
    weight = (_codes(words).astype(np.uint32) - zeros) * _spread(scale, group_size)
    return (weight * x[:, None]).sum(0).astype(np.float32)


def wrapped_in_a_byte(words, scale, zero_point, x, group_size):
    """Subtracts in uint8."""
    zeros = np.repeat(zero_point, group_size, 0)
    weight = (_codes(words).astype(np.uint8) - zeros) * _spread(scale, group_size)
    return (weight * x[:, None]).sum(0).astype(np.float32)


def zero_point_added(words, scale, zero_point, x, group_size):
    """Adds the zero point to the codes."""
    return _product(_codes(words), scale, -zero_point.astype(np.float64), x, group_size)


def codes_with_a_sign(words, scale, zero_point, x, group_size):
    """Reads the codes 8 to 15 as -8 to -1."""
    return _product((_codes(words) ^ 8) - 8, scale, zero_point, x, group_size)


def in_pairs_of_the_book(words, scale, zero_point, x, group_size):
    """Takes the codes in the order of the book's pairs: places 0 and 4, 1 and 5, …."""
    codes = _codes(words).reshape(-1, 2, 4, words.shape[1]).swapaxes(1, 2).reshape(len(x), -1)
    return _product(codes, scale, zero_point, x, group_size)


def sum_goes_on(words, scale, zero_point, x, group_size):
    """Does not start the sum of x anew at each group."""
    parts = (_codes(words) * x[:, None]).reshape(len(scale), group_size, -1).sum(1)
    sums = np.cumsum(x.reshape(-1, group_size).sum(1))[:, None]
    return ((parts - zero_point * sums) * scale).sum(0).astype(np.float32)


def first_grid_only(words, scale, zero_point, x, group_size):
    """Uses the first group's grid for all."""
    return _product(_codes(words), scale[:1], zero_point[:1], x, len(x))


def first_row_for_all(words, scale, zero_point, x, group_size):
    """Takes the grid of the first row for all rows."""
    grid = (np.broadcast_to(part[:, :1], part.shape) for part in (scale, zero_point))
    return _product(_codes(words), *grid, x, group_size)


def groups_of_words(words, scale, zero_point, x, group_size):
    """Counts groups in words, so that the first grid covers eight times as many codes."""
    group = np.minimum(np.arange(len(x)) // (8 * group_size), len(scale) - 1)
    return _product(_codes(words), scale[group], zero_point[group], x, 1)


def last_group_only(words, scale, zero_point, x, group_size):
    """Sets the result in each group instead of adding to it."""
    last = slice(len(x) - group_size, None)
    return _product(_codes(words)[last], scale[-1:], zero_point[-1:], x[last], group_size)


def in_float64(words, scale, zero_point, x, group_size):
    """Returns float64."""
    return _product(_codes(words), scale, zero_point, x, group_size).astype(np.float64)


_WRONG = (
    (high_code_first, "the first code of a word lies in its lowest four bits"),
    (halves_swapped, "the codes of a word go up four bits at a time, one after the other"),
    (words_side_by_side, "a word holds eight neighboring inputs: input i is in word i // 8"),
    (unmasked, "mask the code with & 15: later ones still sit above it"),
    (shifted_by_place, "a code has four bits: shift by 4 * place"),
    (zero_point_forgotten, "subtract the zero point from the codes"),
    (zero_point_of_the_middle, "the zero point is not always 8: each group of a row has its own"),
    (zero_point_unscaled, "the zero point is a code: subtract it before you scale"),
    (zero_point_once, "each code has its zero point subtracted: times the sum of x, not once"),
    (wrapped_below_zero, "unsigned, 3 - 8 wraps to 4294967291: convert before you subtract"),
    (wrapped_in_a_byte, "in uint8, 3 - 8 wraps to 251: convert before you subtract"),
    (zero_point_added, "the zero point is subtracted from the code, not added"),
    (codes_with_a_sign, "codes run from 0 to 15: the sign comes from the zero point"),
    (
        in_pairs_of_the_book,
        "codes go up four bits at a time: no pairs are needed here",
    ),
    (sum_goes_on, "the sum of x starts anew at each group"),
    (first_grid_only, "each group has its own scale and zero point"),
    (first_row_for_all, "each row has its own scale and zero point"),
    (groups_of_words, "a group is counted in inputs, and a word holds eight of them"),
    (last_group_only, "the groups add up: += and not ="),
    (
        in_float64,
        "NumPy computes in float64 unless told otherwise: np.zeros(rows, np.float32), or "
        ".astype(np.float32) at the end",
    ),
)


def tile_by_groups(words, scale, zero_point, x, group_size):
    """Keeps the zero point out of the inner loop."""
    y = np.zeros(words.shape[1], np.float32)
    for group in range(len(scale)):
        dots, total = np.zeros(words.shape[1], np.float32), np.float32(0)
        for i in range(group * group_size, (group + 1) * group_size):
            total += x[i]
            for row in range(words.shape[1]):
                code = (words[i // 8, row] >> np.uint32(4 * (i % 8))) & np.uint32(15)
                dots[row] += np.float32(code) * x[i]
        for row in range(words.shape[1]):
            shift = np.float32(zero_point[group, row]) * total
            y[row] += scale[group, row] * (dots[row] - shift)
    return y


def tile_by_lines(words, scale, zero_point, x, group_size):
    """Takes a line of all rows at a time."""
    y = np.zeros(words.shape[1], np.float32)
    for i in range(x.size):
        group = i // group_size
        codes = (words[i // 8] >> np.uint32(4 * (i % 8))) & np.uint32(15)
        y += (codes.astype(np.float32) - zero_point[group].astype(np.float32)) * scale[group] * x[i]
    return y


def tile_row_by_row(words, scale, zero_point, x, group_size):
    """Goes through the rows, and takes each word apart by division."""
    y = np.zeros(words.shape[1], np.float32)
    for row in range(words.shape[1]):
        total = 0.0
        for word in range(len(words)):
            left = int(words[word, row])
            for i in range(8 * word, 8 * word + 8):
                group = i // group_size
                total += (left % 16 - int(zero_point[group, row])) * scale[group, row] * x[i]
                left //= 16
        y[row] = total
    return y


EXERCISE = Exercise(
    id="5.3",
    title="A tile of four bits",
    stars=3,
    minutes=30,
    function_names=("int4_tile",),
    check=_check,
    takeaway="It reads the codes as they lie in the file; now see how fast.",
    wrong_answers=_WRONG,
    variants=(tile_by_groups, tile_by_lines, tile_row_by_row),
)
