"""Exercise 7.1: `stored_nbytes` counts the bytes of a pruned weight, dense, as a bitmap or as CSR.

The reference is numpy: each part is written out for real, in whole bytes.
"""

import itertools
import math
from numbers import Integral

import numpy as np
import torch

from labkit.exercises.judge import Exercise, Wrong, call, kind, show
from labkit.exercises.judge_with_errors import judge_with_errors, not_a_value_error

_LAYOUTS = ("dense", "bitmap", "csr")


def _cases():
    mask = torch.tensor([[1, 0, 0, 1, 0], [0, 0, 1, 0, 0]]).bool()
    for bits in (4, 8):
        yield from ((mask, bits, layout) for layout in _LAYOUTS)
    yield mask, 4, "coo"
    random = torch.Generator().manual_seed(72)
    for out, inputs, share in ((3, 7, 0.4), (7, 3, 0.7), (5, 5, 0.0), (3, 3, 1.0), (9, 21, 0.3)):
        mask = torch.rand(out, inputs, generator=random) < share
        for bits, layout in itertools.product((4, 16), _LAYOUTS[::-1]):
            yield mask, bits, layout
    yield mask, 16, "values"
    for out, inputs, share in ((31, 17, 0.5), (64, 96, 0.1), (13, 300, 0.75)):
        mask = torch.rand(out, inputs, generator=random) < share
        for bits, layout in itertools.product((4, 8, 32), _LAYOUTS):
            yield mask, bits, layout


def _unknown_layout(mask, bits, layout) -> bool:
    return layout not in _LAYOUTS


def _check(function) -> None:
    judge_with_errors(
        "stored_nbytes", function, _cases(), _examine, _WRONG, Exception, _unknown_layout
    )


def _examine(mask, bits, layout, got) -> str | None:
    written = call("stored_nbytes", mask, bits, layout)
    if _unknown_layout(mask, bits, layout):
        return not_a_value_error(written, got)
    # The parts are written out for real; packbits fills up each to whole bytes.
    rows, columns = mask.numpy().nonzero()
    places = mask.numel() if layout == "dense" else len(columns)
    parts = [np.packbits(np.zeros(places * bits, bool))]
    if layout == "bitmap":
        parts.append(np.packbits(mask.numpy().flatten()))
    if layout == "csr":
        starts = np.searchsorted(rows, np.arange(len(mask) + 1))
        parts += [columns.astype(np.uint16), starts.astype(np.uint32)]
    expected = sum(part.nbytes for part in parts)
    if isinstance(got, bool) or not isinstance(got, Integral | float | np.floating):
        raise Wrong(f"{written} returns {kind(got)}, expected an int")
    of = f" for {len(columns)} kept values"
    if got != expected:
        return f"{written} gives {show(got)}{of}, expected {expected}"
    if not isinstance(got, Integral):
        raise Wrong(f"{written} returns {kind(got)} ({got}), expected an int")
    return None


def _whole_bytes(parts):
    return sum(math.ceil(bits / 8) for bits in parts)


def _stored(
    mask,
    bits,
    layout,
    n_kept=None,
    n_dense=None,
    n_in_bitmap=None,
    map_bits=1,
    column_bits=16,
    n_columns=None,
    pointer_bits=32,
    n_pointers=None,
    add_up=_whole_bytes,
):
    """Return the bytes, right unless something is given."""
    n_kept = int(mask.sum()) if n_kept is None else n_kept
    if layout == "dense":
        return add_up([bits * (mask.numel() if n_dense is None else n_dense)])
    if layout == "bitmap":
        values = n_kept if n_in_bitmap is None else n_in_bitmap
        return add_up([map_bits * mask.numel(), bits * values])
    if layout == "csr":
        columns = column_bits * (n_kept if n_columns is None else n_columns)
        n_pointers = len(mask) + 1 if n_pointers is None else n_pointers
        return add_up([bits * n_kept, columns, pointer_bits * n_pointers])
    raise ValueError(f"no layout {layout!r}")


def map_forgotten(mask, bits, layout):
    """Stores the kept values without their places."""
    return _stored(mask, bits, layout, map_bits=0)


def map_of_bytes(mask, bits, layout):
    """Stores a byte a place, as a bool tensor does."""
    return _stored(mask, bits, layout, map_bits=8)


def map_by_rows(mask, bits, layout):
    """Begins a new byte of the map for each row."""
    if layout != "bitmap":
        return _stored(mask, bits, layout)
    out, inputs = mask.shape
    return out * math.ceil(inputs / 8) + math.ceil(int(mask.sum()) * bits / 8)


def zeros_in_the_bitmap(mask, bits, layout):
    """Stores all values beside the map."""
    return _stored(mask, bits, layout, n_in_bitmap=mask.numel())


def kept_only_in_dense(mask, bits, layout):
    """Leaves the zeros out where nothing says where they were."""
    return _stored(mask, bits, layout, n_dense=int(mask.sum()))


def columns_forgotten(mask, bits, layout):
    """Stores no column numbers."""
    return _stored(mask, bits, layout, n_columns=0)


def columns_in_bits(mask, bits, layout):
    """Gives a column number as many bits as a value."""
    return _stored(mask, bits, layout, column_bits=bits)


def columns_in_32_bits(mask, bits, layout):
    """Gives column numbers the bits of row pointers."""
    return _stored(mask, bits, layout, column_bits=32)


def columns_of_the_matrix(mask, bits, layout):
    """Stores each column once, not each kept value's."""
    return _stored(mask, bits, layout, n_columns=mask.shape[1])


def pointers_forgotten(mask, bits, layout):
    """Stores no row pointers."""
    return _stored(mask, bits, layout, n_pointers=0)


def pointer_too_few(mask, bits, layout):
    """Stores where each row begins, but not where the last one ends."""
    return _stored(mask, bits, layout, n_pointers=len(mask))


def pointers_of_columns(mask, bits, layout):
    """Stores a pointer for each column, as CSC does."""
    return _stored(mask, bits, layout, n_pointers=mask.shape[1] + 1)


def pointers_in_16_bits(mask, bits, layout):
    """Gives row pointers the bits of column numbers."""
    return _stored(mask, bits, layout, pointer_bits=16)


def dropped_counted(mask, bits, layout):
    """Takes True for dropped."""
    return _stored(~mask, bits, layout)


def cut_to_whole_bytes(mask, bits, layout):
    """Divides with //."""
    return _stored(mask, bits, layout, add_up=lambda parts: sum(part // 8 for part in parts))


def sum_filled_up(mask, bits, layout):
    """Adds the bits of all parts before it fills up."""
    return _stored(mask, bits, layout, add_up=lambda parts: math.ceil(sum(parts) / 8))


def bits_for_bytes(mask, bits, layout):
    """Adds up bits and does not divide by 8."""
    return _stored(mask, bits, layout, add_up=sum)


def otherwise_csr(mask, bits, layout):
    """Ends with an else that takes any other layout for CSR."""
    return _stored(mask, bits, "csr" if layout not in _LAYOUTS else layout)


def otherwise_dense(mask, bits, layout):
    """Stores any other layout densely."""
    return _stored(mask, bits, "dense" if layout not in _LAYOUTS else layout)


def otherwise_none(mask, bits, layout):
    """Ends without a result if the layout is none of the three."""
    return None if layout not in _LAYOUTS else _stored(mask, bits, layout)


_WRONG = (
    (map_forgotten, "nobody could tell where the values belong: a bitmap takes one bit a place"),
    (map_of_bytes, "the map takes one bit a place, not a whole byte"),
    (map_by_rows, "the map is filled up once, at its end, not in every row"),
    (zeros_in_the_bitmap, "beside the map, only the kept values are stored"),
    (kept_only_in_dense, "a dense layout stores the zeros as well"),
    (columns_forgotten, "CSR also stores the column of each kept value"),
    (columns_in_bits, "a column number takes 16 bits, whatever the values take"),
    (columns_in_32_bits, "columns take 16 bits each; only row pointers take 32"),
    (columns_of_the_matrix, "a column number is stored for each kept value, not once a column"),
    (pointers_forgotten, "CSR also stores row pointers: where each row begins"),
    (pointer_too_few, "there is one row pointer more than rows: the end of the last"),
    (pointers_of_columns, "CSR has pointers for rows; these are as many as columns need"),
    (pointers_in_16_bits, "a row pointer takes 32 bits: there may be many values before it"),
    (dropped_counted, "True marks a kept value; these are the dropped ones"),
    (cut_to_whole_bytes, "a byte that is begun counts in full: round up"),
    (sum_filled_up, "each part is filled up by itself, before the parts are added"),
    (bits_for_bytes, "these are bits; eight of them make a byte"),
    (otherwise_csr, "any other layout must raise ValueError; yours is taken for CSR"),
    (otherwise_dense, "any other layout must raise ValueError; yours is stored densely"),
    (otherwise_none, "any other layout must raise ValueError; yours ends without a result"),
)


def stored_by_counting(mask, bits, layout):
    """Counts values one after another, in whole numbers."""
    n_kept = sum(map(sum, mask.tolist()))
    values = (n_kept * bits + 7) // 8
    if layout == "csr":
        return values + 2 * n_kept + 4 * len(mask) + 4
    if layout == "bitmap":
        return values + (mask.numel() + 7) // 8
    if layout != "dense":
        raise ValueError("unknown layout")
    return (mask.shape[0] * mask.shape[1] * bits + 7) // 8


def stored_in_a_table(mask, bits, layout):
    """Lists the bits of all parts of all layouts; a list has no item of another name."""
    n_kept, places = mask.count_nonzero().item(), mask.numel()
    csr = n_kept * bits, n_kept * 16, 32 * (mask.shape[0] + 1)
    parts = ((places * bits,), (places, n_kept * bits), csr)
    chosen = parts[["dense", "bitmap", "csr"].index(layout)]
    return int(np.ceil(np.array(chosen) / 8).sum())


EXERCISE = Exercise(
    id="7.1",
    title="What zeros cost",
    stars=2,
    minutes=15,
    function_names=("stored_nbytes",),
    check=_check,
    takeaway=(
        "To leave a zero out you must store where it was, and that can cost more than the zero."
    ),
    wrong_answers=_WRONG,
    variants=(stored_by_counting, stored_in_a_table),
)
