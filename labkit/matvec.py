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


@njit(cache=True)
def group_sums(x, n_groups, group_size):
    """Return the sum of x over each group of inputs: what a zero point is multiplied by."""
    sums = np.empty(n_groups, np.float32)
    for group in range(n_groups):
        sums[group] = x[group * group_size : (group + 1) * group_size].sum()
    return sums


@njit(parallel=True, fastmath={"reassoc", "contract"}, cache=True)
def matvec_int8(codes, scale, zero_point, x, group_size):
    """Multiply an INT8 weight with x, and never write the weight out in float.

    Args:
        codes: uint8 `(out, in)`.
        scale, zero_point: float32 and uint8 `(out, n_groups)`; the last group may be shorter.
        x: float32 `(in,)`.
        group_size: inputs that share a scale.

    Returns:
        float32 `(out,)`.
    """
    sums = group_sums(x, scale.shape[1], group_size)
    y = np.empty(len(codes), np.float32)
    for row in prange(len(codes)):
        total = np.float32(0)
        for group in range(sums.size):
            some_codes = codes[row, group * group_size : (group + 1) * group_size]
            some_x = x[group * group_size : (group + 1) * group_size]
            dot = np.float32(0)
            for i in range(some_codes.size):
                dot += np.float32(some_codes[i]) * some_x[i]
            total += scale[row, group] * (dot - np.float32(zero_point[row, group]) * sums[group])
        y[row] = total
    return y


def to_tiles(rows: np.ndarray, columns: int) -> np.ndarray:
    """Lay 64 rows side by side: `(out, n)` to `(n_tiles, columns, 64)`, filled up with zeros."""
    out, n = rows.shape
    padded = np.pad(rows, ((0, -out % TILE), (0, columns - n)))
    return np.ascontiguousarray(padded.reshape(-1, TILE, columns).transpose(0, 2, 1))


@njit(parallel=True, fastmath={"reassoc", "contract"}, cache=True)
def matvec_int4(codes, scale, zero_point, x, group_size):
    """Multiply an INT4 weight with x: the 64 rows of a tile at once, four inputs at a time.

    Args:
        codes: uint8 `(n_tiles, n_groups · group_size / 2, 64)`: two inputs a byte, `to_tiles`.
        scale, zero_point: float32 and uint8 `(n_tiles, n_groups, 64)`.
        x: float32 `(n_groups · group_size,)`, filled up with zeros.
        group_size: a multiple of 4.

    Returns:
        float32 `(n_tiles · 64,)`.
    """
    sums = group_sums(x, scale.shape[1], group_size)
    y = np.empty((len(codes), TILE), np.float32)
    for tile in prange(len(codes)):
        total, dots = np.zeros(TILE, np.float32), np.empty(TILE, np.float32)
        for group in range(sums.size):
            dots[:] = 0
            for i in range(group * group_size, (group + 1) * group_size, 4):
                first, second = codes[tile, i // 2], codes[tile, i // 2 + 1]
                for row in range(TILE):
                    dots[row] += (
                        np.float32(np.uint8(first[row] & 15)) * x[i]
                        + np.float32(np.uint8(first[row] >> 4)) * x[i + 1]
                        + np.float32(np.uint8(second[row] & 15)) * x[i + 2]
                        + np.float32(np.uint8(second[row] >> 4)) * x[i + 3]
                    )
            for row in range(TILE):
                shift = np.float32(zero_point[tile, group, row]) * sums[group]
                total[row] += scale[tile, group, row] * (dots[row] - shift)
        y[tile] = total
    return y.reshape(-1)


@njit(parallel=True, cache=True)
def dequantize_rows(codes, bits, scale, zero_point, group_size, inputs):
    """Write a packed weight out: uint8 `(out, bytes)` of 8 or 4 bits to float32 `(out, inputs)`."""
    weight = np.empty((len(codes), inputs), np.float32)
    per_byte = 8 // bits
    for row in prange(len(codes)):
        for i in range(inputs):
            group = i // group_size
            code = (codes[row, i // per_byte] >> (i % per_byte * 4)) & (2**bits - 1)
            weight[row, i] = (np.float32(np.uint8(code)) - zero_point[row, group]) * scale[
                row, group
            ]
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
        position: of this token.

    Returns:
        float32 `(heads · width,)`.
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
