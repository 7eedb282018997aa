"""Exercise 1.4: `file_bytes` counts the bytes of a group-wise quantized weight on disk.

The reference is one row, written out for real with numpy.
"""

import numpy as np

from labkit.exercises.judge import Exercise, call, judge, kind, show


def _check(function) -> None:
    cases = [(2, 64, 4, 32), (2, 64, 8, 32), (1, 32, 4, 32), (3, 96, 4, 96), (5, 256, 8, 64)]
    cases += [(192, 576, 4, 64), (576, 1536, 4, 32), (576, 192, 8, 192), (49152, 576, 4, 576)]
    judge("file_bytes", function, cases, _examine, _WRONG)


def _examine(rows, columns, bits, group_size, got) -> str | None:
    # One row is written out for real; the rows are alike.
    codes = np.packbits(np.zeros(columns * bits, dtype=bool)).tobytes()
    groups = columns // group_size
    scales, zero_points = np.zeros(groups, np.float16).tobytes(), bytes(groups)
    expected = rows * len(codes + scales + zero_points)
    written = call("file_bytes", rows, columns, bits, group_size)
    if not isinstance(got, int | float | np.number) or isinstance(got, bool):
        return f"{written} returns {kind(got)}, expected an int"
    if got != expected:
        if isinstance(got, float) and got.is_integer():
            got = int(got)
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


def one_grid_in_all(rows, columns, bits, group_size):
    """Stores one scale and one zero point for the whole file."""
    return rows * columns * bits // 8 + 3


def bytes_a_code_cut_off(rows, columns, bits, group_size):
    """Rounds half a byte down to none."""
    return rows * columns * (bits // 8) + 3 * rows * columns // group_size


def few_bit_zero_points(rows, columns, bits, group_size):
    """Stores zero points in as few bits as codes."""
    groups = rows * columns // group_size
    return rows * columns * bits // 8 + 2 * groups + groups * bits // 8


def float16_zero_points(rows, columns, bits, group_size):
    """Stores zero points in two bytes, as the scales."""
    return rows * columns * bits // 8 + 4 * rows * columns // group_size


def one_row_of_scales(rows, columns, bits, group_size):
    """Counts the groups of one row only."""
    return rows * columns * bits // 8 + 3 * columns // group_size


def groups_down_columns(rows, columns, bits, group_size):
    """Lets groups run down the columns and drops what is left at the end of each."""
    return rows * columns * bits // 8 + 3 * columns * (rows // group_size)


def short_groups_down_columns(rows, columns, bits, group_size):
    """Lets groups run down the columns, the last of each shorter."""
    return rows * columns * bits // 8 + 3 * columns * -(-rows // group_size)


def float32_scales(rows, columns, bits, group_size):
    """Stores the scales in four bytes each."""
    return rows * columns * bits // 8 + 5 * rows * columns // group_size


def bits_not_bytes(rows, columns, bits, group_size):
    """Adds up bits and forgets to divide by 8."""
    return rows * columns * bits + 24 * rows * columns // group_size


_WRONG = (
    (scales_forgotten, "the scales are in the file too, two bytes a group"),
    (zero_points_forgotten, "an asymmetric grid needs its zero points, one byte a group"),
    (codes_alone, "codes alone cannot be read back; each group also stores scale and zero point"),
    (byte_per_code, "packed 4-bit codes lie two to a byte"),
    (one_grid_in_all, "one grid for the whole file is too coarse here: each group stores its own"),
    (bytes_a_code_cut_off, "for 4 bits, bits // 8 is 0: multiply first and divide last"),
    (few_bit_zero_points, "only codes are packed: a zero point takes a whole byte, at 4 bits too"),
    (float16_zero_points, "a uint8 zero point takes one byte, only the scale takes two"),
    (scale_per_row, "a scale and a zero point are stored per group, not per row"),
    (one_row_of_scales, "every row has columns / group_size groups; these are one row's"),
    (groups_down_columns, "a group runs along a row; these run down the columns"),
    (
        short_groups_down_columns,
        "these groups run down the columns, and some are cut short; let them run along the rows",
    ),
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


EXERCISE = Exercise(
    id="1.4",
    title="What does the file weigh?",
    stars=2,
    minutes=10,
    function_names=("file_bytes",),
    check=_check,
    takeaway="Small groups cost bytes: at groups of 32, 4-bit codes take 4.75 bits a weight.",
    wrong_answers=_WRONG,
    variants=(bytes_group_by_group, bytes_of_arrays),
)
