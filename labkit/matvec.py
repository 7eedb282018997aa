"""Kernels in Numba: a packed weight times one token, and what a decoder does between two of them.

Compiled at the first call, for the types that come, and kept on disk. They check nothing, and an
array that is too short is read past its end: `labkit.decoder` checks at its door.
"""

import numpy as np
from numba import njit, prange

TILE = 64


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


def to_tiles(rows: np.ndarray, columns: int) -> np.ndarray:
    """Lay 64 rows side by side: `(out, n)` to `(n_tiles, columns, 64)`, filled up with zeros."""
    out, n = rows.shape
    padded = np.pad(rows, ((0, -out % TILE), (0, columns - n)))
    return np.ascontiguousarray(padded.reshape(-1, TILE, columns).transpose(0, 2, 1))


@njit(parallel=True, fastmath={"reassoc", "contract"}, cache=True)
def matvec_packed(codes, bits, scale, zero_point, x, group_size):
    """Multiply a weight of 8 or 4 bits with x: the 64 rows of a tile at once, 4 inputs at a time.

    Args:
        codes: uint8 `(n_tiles, n_groups · group_size · bits / 8, 64)`, see `to_tiles`.
        bits: 8, or 4: two inputs a byte, the first in the low half.
        scale, zero_point: float32 and uint8 `(n_tiles, n_groups, 64)`.
        x: float32 `(n_groups · group_size,)`, filled up with zeros.
        group_size: inputs that share a scale, a multiple of 4.

    Returns:
        float32 `(n_tiles · 64,)`.
    """
    y = np.empty((len(codes), TILE), np.float32)
    sums = x.reshape(-1, group_size).sum(1)  # of each group: what a zero point multiplies
    for tile in prange(len(codes)):
        total, dots = np.zeros(TILE, np.float32), np.empty(TILE, np.float32)
        for group in range(sums.size):
            dots[:] = 0
            for i in range(group * group_size, (group + 1) * group_size, 4):
                x0, x1, x2, x3 = x[i], x[i + 1], x[i + 2], x[i + 3]
                first = i * bits // 8
                a, b = codes[tile, first], codes[tile, first + 1]
                if bits == 8:
                    c, d = codes[tile, first + 2], codes[tile, first + 3]
                    for row in range(TILE):
                        dots[row] += np.float32(a[row]) * x0 + np.float32(b[row]) * x1
                        dots[row] += np.float32(c[row]) * x2 + np.float32(d[row]) * x3
                else:
                    for row in range(TILE):
                        low, high = np.uint8(a[row] & 15), np.uint8(a[row] >> 4)
                        dots[row] += np.float32(low) * x0 + np.float32(high) * x1
                        low, high = np.uint8(b[row] & 15), np.uint8(b[row] >> 4)
                        dots[row] += np.float32(low) * x2 + np.float32(high) * x3
            for row in range(TILE):
                shift = np.float32(zero_point[tile, group, row]) * sums[group]
                total[row] += scale[tile, group, row] * (dots[row] - shift)
        y[tile] = total
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
    keys[:, position] = rows[heads : heads + kv_heads]
    values[:, position] = rows[heads + kv_heads :]
    mixed = np.zeros((heads, width), np.float32)
    for head in prange(heads):
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
