"""Kernels in Numba: a packed weight times one token, and what a decoder does between two of them.

Compiled at the first call, for the types that come. They check nothing, and an array that is too
short is read past its end: `labkit.decoder` checks at its door. All are in one file, since Numba
compiles what it kept on disk again only if the file of a function has changed.
"""

import functools
from types import FunctionType

import numpy as np
from llvmlite import ir
from numba import prange, types
from numba.core import cgutils
from numba.extending import intrinsic

from labkit.compiling import njit

TILE = 64
SPAN = 256  # inputs whose sum of products fits in 32 bits: 256 · 255 · 32767 is just below 2³¹
AHEAD = 4096  # how many bytes before it needs them a kernel asks the memory for words
_INT32 = ir.IntType(32)


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


def _filled(kind: ir.VectorType, value: int) -> ir.Constant:
    return ir.Constant(kind, [value] * kind.count)


def _pair_products(builder, a, b):
    # int16 (2n,) times int16 (2n,), neighbors added in int32: one instruction of AVX2 or VNNI.
    wide, half = ir.VectorType(_INT32, 2 * TILE), ir.VectorType(_INT32, TILE)
    products = builder.mul(builder.sext(a, wide), builder.sext(b, wide))
    sides = [ir.Constant(half, list(range(side, 2 * TILE, 2))) for side in (0, 1)]
    return builder.add(*(builder.shuffle_vector(products, products, side) for side in sides))


def _ask_for(builder, pointer, ahead: int, nbytes: int = 4 * TILE) -> None:
    # Bring later bytes into the caches: the processor itself stops at the end of a page.
    address = builder.bitcast(pointer, ir.IntType(8).as_pointer())
    kinds = [address.type, _INT32, _INT32, _INT32]
    kind = ir.FunctionType(ir.VoidType(), kinds)
    function = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
    for line in range(ahead, ahead + nbytes, 64):
        place = builder.gep(address, [ir.Constant(ir.IntType(64), line)])
        builder.call(function, [place, *(_INT32(value) for value in (0, 3, 1))])


@intrinsic(prefer_literal=True)
def tile_dots(typing_context, dots, words, pairs, bits, ahead):
    """Multiply words of 64 rows with the activations of their codes, all in integers.

    What Python says in two loops, a processor does 64 rows at once; so the loop over rows is
    written out in LLVM's language, of vectors. In Python it would be

        for word in range(len(words)):
            for place in range(16 // bits):
                two = words[word] >> bits * place & mask  # codes place and place + 16 // bits
                low, high = pairs[word, place] & 0xFFFF, pairs[word, place] >> 16
                dots += (two & 0xFFFF) * low + (two >> 16) * high

    Args:
        dots: int32 `(64,)`, written; the sums must fit.
        words: uint32 `(n_words, 64)`, contiguous.
        pairs: int32 `(n_words, 16 / bits)`: two int16 activations each, see `in_pairs`.
        bits: 8 or 4, a constant.
        ahead: how many bytes further on memory is asked for words, a constant; 0: it is not.
    """

    def generate(context, builder, signature, arguments):
        constants = bits.literal_value, ahead.literal_value
        _write_tile_dots(context, builder, signature.args[:3], arguments[:3], *constants)
        return context.get_dummy_value()

    return types.void(dots, words, pairs, bits, ahead), generate


def _write_tile_dots(context, builder, kinds, arguments, bits: int, ahead: int) -> None:
    rows, halves = ir.VectorType(_INT32, TILE), ir.VectorType(ir.IntType(16), 2 * TILE)
    dots, words, pairs = (
        context.make_array(kind)(context, builder, value)
        for kind, value in zip(kinds, arguments, strict=True)
    )
    n_words = cgutils.unpack_tuple(builder, words.shape, 2)[0]
    mask, per_word = (1 << bits) - 1, 16 // bits
    total = cgutils.alloca_once_value(builder, _filled(rows, 0))
    with cgutils.for_range(builder, n_words) as loop:
        place = builder.bitcast(words.data, rows.as_pointer())
        place = builder.gep(place, [loop.index])
        if ahead:
            _ask_for(builder, place, ahead)
        word, sums = builder.load(place), builder.load(total)
        word.align = 4
        first = builder.mul(loop.index, ir.Constant(n_words.type, per_word))
        for i in range(per_word):
            at = builder.add(first, ir.Constant(n_words.type, i))
            pair = builder.load(builder.gep(pairs.data, [at]))
            pair = builder.insert_element(_filled(rows, 0), pair, _INT32(0))
            pair = builder.shuffle_vector(pair, pair, _filled(rows, 0))
            two = builder.lshr(word, _filled(rows, bits * i))
            two = builder.and_(two, _filled(rows, mask | mask << 16))
            operands = (builder.bitcast(vector, halves) for vector in (two, pair))
            sums = builder.add(sums, _pair_products(builder, *operands))
        builder.store(sums, total)
    written = builder.store(builder.load(total), builder.bitcast(dots.data, rows.as_pointer()))
    written.align = 4


@intrinsic
def ask_for(typing_context, some):
    """Bring an array `(64,)` into the caches, without waiting for it."""

    def generate(context, builder, signature, arguments):
        (kind,) = signature.args
        array = context.make_array(kind)(context, builder, arguments[0])
        _ask_for(builder, array.data, 0, TILE * kind.dtype.bitwidth // 8)
        return context.get_dummy_value()

    return types.void(some), generate


# By themselves: in a parallel function each line on arrays would wake all cores, and compile long.
@njit(cache=True)
def to_int16(x):
    """Round x `(in,)` to 16 bits, with one scale, a power of two; NaN if a value is not finite."""
    largest, scale = np.abs(x).max(), np.float32(1)
    if not np.isfinite(largest):
        return np.zeros(x.size, np.int16), np.float32(np.nan)
    if largest > 0:
        scale = np.float32(2.0 ** max(-126, np.ceil(np.log2(largest / np.float32(32767)))))
    codes = np.empty(x.size, np.int16)
    for i in range(x.size):
        codes[i] = np.int16(np.rint(x[i] / scale))
    return codes, scale


@njit(cache=True)
def in_pairs(x, bits):
    """Lay int16 x `(in,)` out as its codes lie in words: int32 `(n_words, 16 / bits)`.

    A shifted and masked word holds two codes, 16 bits apart; so do the activations of a pair."""
    places = 16 // bits
    pairs = np.empty((x.size // (2 * places), places, 2), np.int16)
    for word in range(len(pairs)):
        for place in range(places):
            pairs[word, place, 0] = x[2 * places * word + place]
            pairs[word, place, 1] = x[2 * places * word + place + places]
    return pairs.view(np.int32)[:, :, 0]


@njit(cache=True)
def span_sums(x, group_size):
    """Return the sums of spans of x `(in,)`: groups, cut where 256 inputs are full; int32."""
    per_group = (group_size + SPAN - 1) // SPAN
    sums = np.zeros((x.size // group_size, per_group), np.int32)
    for group in range(len(sums)):
        some = x[group * group_size : (group + 1) * group_size]
        for span in range(per_group):
            for code in some[span * SPAN : (span + 1) * SPAN]:
                sums[group, span] += np.int32(code)
    return sums


@njit(fastmath={"contract"}, cache=True)
def tile_product(y, words, bits, scale, zero_point, pairs, sums, group_size):
    """Write the products of the 64 rows of one tile to y `(64,)`, for activations of scale 1."""
    dots, per_word = np.empty(TILE, np.int32), 32 // bits
    y[:] = 0
    for group in range(len(sums)):
        ask_for(scale[group])  # both are needed when the words of the group are done
        ask_for(zero_point[group])
        for span in range(sums.shape[1]):
            first = group * group_size + span * SPAN
            last = min(first + SPAN, (group + 1) * group_size)
            some = slice(first // per_word, last // per_word)
            if bits == 8:
                tile_dots(dots, words[some], pairs[some], 8, AHEAD)
            else:
                tile_dots(dots, words[some], pairs[some], 4, AHEAD)
            for row in range(TILE):
                shift = np.int32(np.int32(zero_point[group, row]) * sums[group, span])
                y[row] += scale[group, row] * np.float32(np.int32(dots[row] - shift))


@njit(parallel=True, cache=True)
def matvec_packed(words, bits, scale, zero_point, x, group_size):
    """Multiply a weight of 8 or 4 bits with x: the 64 rows of a tile at once, in integers.

    Args:
        words: uint32 `(n_tiles, n_groups · group_size · bits / 32, 64)`, see `to_tiles`: 4 or 8
            consecutive inputs, the first in the lowest bits.
        bits: 8 or 4.
        scale, zero_point: float32 and uint8 `(n_tiles, n_groups, 64)`.
        x: float32 `(n_groups · group_size,)`, filled up with zeros; rounded to 16 bits.
        group_size: inputs that share a scale, a multiple of 32 / bits.

    Returns:
        float32 `(n_tiles · 64,)`.
    """
    y = np.empty((len(words), TILE), np.float32)
    codes, step = to_int16(x)
    pairs, sums = in_pairs(codes, bits), span_sums(codes, group_size)
    for tile in prange(len(words)):
        grid = scale[tile], zero_point[tile]
        tile_product(y[tile], words[tile], bits, *grid, pairs, sums, group_size)
        for row in range(TILE):
            y[tile, row] *= step
    return y.reshape(-1)


@njit(parallel=True, cache=True)
def dequantize_rows(codes, bits, scale, zero_point, group_size, inputs):
    """Write a packed weight out: uint8 `(out, bytes)` of 8 or 4 bits to float32 `(out, inputs)`."""
    weight = np.empty((len(codes), inputs), np.float32)
    for row in prange(len(codes)):
        some = codes[row]
        if bits == 4:
            some = np.empty(2 * codes.shape[1], np.uint8)
            for i in range(codes.shape[1]):
                some[2 * i], some[2 * i + 1] = codes[row, i] & 15, codes[row, i] >> 4
        for group in range(scale.shape[1]):
            zero, step = np.float32(zero_point[row, group]), scale[row, group]
            first, last = group * group_size, min((group + 1) * group_size, inputs)
            some_codes, some_weights = some[first:last], weight[row, first:last]
            for i in range(some_weights.size):
                some_weights[i] = (np.float32(some_codes[i]) - zero) * step
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
def attend(rows, cos, sin, keys, values, first, position):
    """Rotate queries and keys, put the new key and value into the cache, and mix the values.

    Args:
        rows: float32 `(heads + 2 · kv_heads, width)`: queries, keys, values; changed in place.
        cos, sin: float32 `(width,)`, the rotation at this position.
        keys, values: float32 `(kv_heads, max_length, width)`, filled before `position`.
        first: the earliest position that is looked at.
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
        scores = np.empty(position + 1 - first, np.float32)
        for t in range(scores.size):
            key, dot = keys[shared, first + t], np.float32(0)
            for i in range(width):
                dot += query[i] * key[i]
            scores[t] = dot
        scores = np.exp(scores - scores.max())
        scores /= scores.sum()
        for t in range(scores.size):
            value, share = values[shared, first + t], scores[t]
            for i in range(width):
                mixed[head, i] += share * value[i]
    return mixed.reshape(-1)


@njit(cache=True)
def norm_rows(rows, weight, epsilon):
    """Divide rows by their root mean squares, and multiply by weight `(n, width)`; in place."""
    for row in range(len(weight)):
        rows[row] = rms_norm(rows[row], weight[row], epsilon)


def multiply(x, layer):
    """Return the product of a linear layer with x `(in,)`; for `one_block` as Python runs it."""
    return layer(x)


def one_block(x, block, epsilon, cos, sin, keys, values, first, position):
    """Take one token through a decoder block; return float32 `(n,)`, as x.

    Args:
        x: float32 `(n,)`, the hidden state.
        block: the norm before attention; the layer that makes queries, keys and values; the norms
            on queries and keys, `(heads + kv_heads, width)`, or no row; the output layer; the norm
            before the MLP; the layer that makes gate and up; down. `multiply` knows layers.
        epsilon, cos, sin: of the norms; float32 `(max_length, width)`; the others: see `attend`.
    """
    norm, qkv, head_norm, out, mlp_norm, gate_up, down = block
    rows = multiply(rms_norm(x, norm, epsilon), qkv).reshape(-1, cos.shape[1])
    norm_rows(rows, head_norm, epsilon)
    mixed = attend(rows, cos[position], sin[position], keys, values, first, position)
    x = x + multiply(mixed, out)
    return x + multiply(swiglu(multiply(rms_norm(x, mlp_norm, epsilon), gate_up)), down)


@functools.cache
def compiled_block(kernel):
    """Return `one_block` compiled as a whole, with a kernel that is called as `matvec_packed`.

    Its layers are `(words, bits, scale, zero_point, group_size, inputs, out, bias)`; x is filled up
    to `inputs`, and `bias` is `(out,)` or empty.
    """

    @njit  # as `Product` does it; a kernel that came as an argument would keep Numba from caching
    def by_kernel(x, layer):
        words, bits, scale, zero_point, group_size, inputs, out, bias = layer
        if x.size < inputs:
            x = np.concatenate((x, np.zeros(inputs - x.size, np.float32)))
        y = kernel(words, bits, scale, zero_point, x, group_size)[:out]
        return y + bias if bias.size else y

    same = FunctionType(one_block.__code__, globals() | {"multiply": by_kernel})
    return njit(cache=kernel is matvec_packed)(same)
