"""Kernels in Numba: a packed weight times one token, and what a decoder does between two of them.

Compiled at the first call, for the types that come, and kept on disk where there is a place. They
check nothing, and an array that is too short is read past its end: `labkit.decoder` checks at its
door.
"""

import os
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numba
import numpy as np
from numba import prange

from labkit.downloads import cache_folder

TILE = 64


_UID = getattr(os, "getuid", int)()
TEMPORARY = Path(tempfile.gettempdir()) / f"labkit-numba-{_UID}"
"""Where kernels are kept if no better place can be written."""


def _places() -> Iterator[str]:
    """Yield where Numba may keep kernels, the usual place first (empty: it looks for one)."""
    yield numba.config.CACHE_DIR
    yield str(cache_folder() / "numba")
    try:
        TEMPORARY.mkdir(mode=0o700, exist_ok=True)
        facts = TEMPORARY.lstat()
    except OSError:
        return
    # Others could leave code for us in a folder of theirs: this one must be ours alone.
    alone = facts.st_uid == _UID and not facts.st_mode & 0o077
    if stat.S_ISDIR(facts.st_mode) and (alone or os.name == "nt"):
        yield str(TEMPORARY)


def _can_keep() -> bool:
    usual = numba.config.CACHE_DIR
    for numba.config.CACHE_DIR in _places():
        try:
            numba.njit(cache=True)(_can_keep)
        except RuntimeError:  # nothing there can be written
            continue
        return True
    numba.config.CACHE_DIR = usual
    return False


KEPT = _can_keep()
"""Whether compiled kernels are kept on disk; if not, each process compiles them again."""


def njit(*arguments, cache: bool = False, **options):
    """Compile as `numba.njit` does, and do without a cache where there is no place for one."""
    return numba.njit(*arguments, cache=cache and KEPT, **options)


@njit(parallel=True, fastmath={"reassoc", "contract"}, cache=True)
def matvec_fp32(weight, x):
    """Return weight `(out, in)` times x `(in,)`, all float32."""
    y = np.empty(len(weight), np.float32)
    for row in prange(len(weight)):
        dot = np.float32(0)
        for i in range(x.size):
            dot += weight[row, i] * x[i]
        y[row] = dot
    return y


def to_tiles(rows: np.ndarray) -> np.ndarray:
    """Lay 64 rows side by side: `(out, n)` to `(n_tiles, n, 64)`, filled up with zeros."""
    padded = np.pad(rows, ((0, -len(rows) % TILE), (0, 0)))
    return np.ascontiguousarray(padded.reshape(-1, TILE, rows.shape[1]).transpose(0, 2, 1))


@njit(cache=True)
def part(word, mask):
    """Return what the mask leaves of a word of 32 bits, as float32; the mask is below 2^31."""
    return np.float32(np.int32(word & np.uint32(mask)))


@njit(fastmath={"reassoc", "contract"}, cache=True)
def add_8_bits(dots, word, x):
    """Add a word of 4 codes a row, times x `(4,)`, to the dots `(64,)`."""
    x0, x1, x2, x3 = x[0], x[1], x[2], x[3]
    for row in range(TILE):
        w = word[row]
        dots[row] += part(w, 0xFF) * x0 + part(w, 0xFF00) * x1
        dots[row] += part(w, 0xFF0000) * x2 + part(w >> np.uint32(24), 0xFF) * x3


@njit(fastmath={"reassoc", "contract"}, cache=True)
def add_4_bits(dots, word, x):
    """Add a word of 8 codes a row, times x `(8,)`, to the dots `(64,)`."""
    x0, x1, x2, x3, x4, x5, x6, x7 = x[0], x[1], x[2], x[3], x[4], x[5], x[6], x[7]
    for row in range(TILE):
        w = word[row]
        dots[row] += part(w, 0xF) * x0 + part(w, 0xF0) * x1
        dots[row] += part(w, 0xF00) * x2 + part(w, 0xF000) * x3
        dots[row] += part(w, 0xF0000) * x4 + part(w, 0xF00000) * x5
        dots[row] += part(w, 0xF000000) * x6 + part(w >> np.uint32(28), 0xF) * x7


# By themselves: in a parallel function each line on arrays would wake all cores, and compile long.
@njit(cache=True)
def group_sums(x, group_size):
    """Return the sums of the groups of x `(n_groups · group_size,)`: what zero points multiply."""
    sums = np.zeros(x.size // group_size, np.float32)
    for i in range(group_size):
        for group in range(sums.size):
            sums[group] += x[group * group_size + i]
    return sums


@njit(cache=True)
def at_places(x, bits):
    """Divide x `(in,)` by the places of its codes in their words; `(words, codes a word)`."""
    scaled = x.copy().reshape(-1, 32 // bits)
    for codes in scaled:
        for place in range(codes.size - 1):  # the last code is shifted down
            codes[place] /= np.float32(1 << (bits * place))
    return scaled


@njit(parallel=True, fastmath={"reassoc", "contract"}, cache=True)
def matvec_packed(words, bits, scale, zero_point, x, group_size):
    """Multiply a weight of 8 or 4 bits with x: the 64 rows of a tile at once, a word at a time.

    Args:
        words: uint32 `(n_tiles, n_groups · group_size · bits / 32, 64)`, see `to_tiles`: 4 or 8
            consecutive inputs, the first in the lowest bits.
        bits: 8 or 4.
        scale, zero_point: float32 and uint8 `(n_tiles, n_groups, 64)`.
        x: float32 `(n_groups · group_size,)`, filled up with zeros.
        group_size: inputs that share a scale, a multiple of 32 / bits.

    Returns:
        float32 `(n_tiles · 64,)`.
    """
    y, per_word = np.empty((len(words), TILE), np.float32), 32 // bits
    sums, x = group_sums(x, group_size), at_places(x, bits)
    for tile in prange(len(words)):
        total, dots = np.zeros(TILE, np.float32), np.empty(TILE, np.float32)
        for group in range(sums.size):
            dots[:] = 0
            for i in range(group * group_size // per_word, (group + 1) * group_size // per_word):
                if bits == 8:
                    add_8_bits(dots, words[tile, i], x[i])
                else:
                    add_4_bits(dots, words[tile, i], x[i])
            for row in range(TILE):
                shift = np.float32(zero_point[tile, group, row]) * sums[group]
                total[row] += scale[tile, group, row] * (dots[row] - shift)
        for row in range(TILE):
            y[tile, row] = total[row]
    return y.reshape(-1)


@njit(parallel=True, cache=True)
def dequantize_rows(codes, bits, scale, zero_point, group_size, inputs):
    """Write a packed weight out: uint8 `(out, bytes)` of 8 or 4 bits to float32 `(out, inputs)`."""
    weight = np.empty((len(codes), inputs), np.float32)
    for row in prange(len(codes)):
        for group in range(scale.shape[1]):
            zero, step = np.float32(zero_point[row, group]), scale[row, group]
            first, last = group * group_size, min((group + 1) * group_size, inputs)
            some_codes, some_weights = codes[row, first:last], weight[row, first:last]
            for i in range(some_weights.size):
                if bits == 8:
                    code = some_codes[i]
                else:
                    code = (codes[row, (first + i) >> 1] >> (4 * ((first + i) & 1))) & 15
                some_weights[i] = (np.float32(np.uint8(code)) - zero) * step
    return weight


@njit(fastmath={"reassoc", "contract"}, cache=True)
def rms_norm(x, weight, epsilon):
    """Divide x `(n,)` by its root mean square, and multiply by weight `(n,)`."""
    mean_square = (x * x).sum() / np.float32(x.size)
    return x * weight / np.sqrt(mean_square + np.float32(epsilon))


@njit(cache=True)
def swiglu(gate_and_up):
    """Return SiLU(gate) · up of the two halves of a vector."""
    half = gate_and_up.size // 2
    gate, up = gate_and_up[:half], gate_and_up[half:]
    return gate / (np.float32(1) + np.exp(-gate)) * up


@njit(parallel=True, fastmath={"reassoc", "contract"}, cache=True)
def attend(rows, cos, sin, keys, values, position):
    """Rotate queries and keys, put the new key and value into the cache, and mix all values.

    Args:
        rows: float32 `(heads + 2 · kv_heads, width)`: queries, keys, values; changed in place.
        cos, sin: float32 `(width,)`, the rotation at this position.
        keys, values: float32 `(kv_heads, max_length, width)`, filled before `position`.
    """
    kv_heads, _, width = keys.shape
    heads, half = len(rows) - 2 * kv_heads, width // 2
    for row in rows[: heads + kv_heads]:
        for i in range(half):
            a, b = row[i], row[i + half]
            row[i] = a * cos[i] - b * sin[i]
            row[i + half] = b * cos[i + half] + a * sin[i + half]
    for head in range(kv_heads):
        for i in range(width):
            keys[head, position, i] = rows[heads + head, i]
            values[head, position, i] = rows[heads + kv_heads + head, i]
    mixed = np.empty((heads, width), np.float32)
    for head in prange(heads):
        mixed[head] = 0
        shared, query = head // (heads // kv_heads), rows[head] / np.float32(np.sqrt(width))
        scores = np.empty(position + 1, np.float32)
        for t in range(position + 1):
            key, dot = keys[shared, t], np.float32(0)
            for i in range(width):
                dot += query[i] * key[i]
            scores[t] = dot
        scores = np.exp(scores - scores.max())
        scores /= scores.sum()
        for t in range(position + 1):
            value, share = values[shared, t], scores[t]
            for i in range(width):
                mixed[head, i] += share * value[i]
    return mixed.reshape(-1)
