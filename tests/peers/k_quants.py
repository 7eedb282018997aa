"""Write matrices in llama.cpp's types Q4_K and Q6_K, which the package `gguf` can only read.

Scales come from the smallest and the largest value of a block; llama.cpp's own program searches for
better ones, so its files lose a little less. `gguf.dequantize` must read back what is written here:
`python tests/peers/k_quants.py` tries it.

Source of the layouts: `block_q4_K` and `block_q6_K` in llama.cpp's `ggml-common.h`.
"""

import gguf
import numpy as np

SUPER_BLOCK = 256
_TINY = np.float32(1e-12)


def _over(a, b):
    return np.divide(a, b, out=np.zeros_like(a), where=np.abs(b) > _TINY)


def _half(x: np.ndarray) -> np.ndarray:
    return x.astype(np.float16)


def to_q4_k(weight: np.ndarray) -> np.ndarray:
    """Pack float32 `(out, in)`, `in` a multiple of 256, in Q4_K: uint8 `(out, in / 256 · 144)`."""
    parts = weight.reshape(-1, 8, 32)
    low, high = parts.min(-1).clip(max=0), parts.max(-1).clip(min=0)
    scale, minimum = (high - low) / 15, -low
    d, d_min = (_half(x.max(1, keepdims=True) / 63) for x in (scale, minimum))
    s, m = (
        np.rint(_over(x, np.broadcast_to(unit.astype(np.float32), x.shape))).clip(0, 63)
        for x, unit in ((scale, d), (minimum, d_min))
    )
    step, start = d.astype(np.float32) * s, d_min.astype(np.float32) * m
    codes = _over(parts + start[..., None], np.broadcast_to(step[..., None], parts.shape))
    q, s, m = (x.astype(np.uint8) for x in (np.rint(codes).clip(0, 15), s, m))
    first = s[:, :4] | (s[:, 4:] >> 4) << 6, m[:, :4] | (m[:, 4:] >> 4) << 6
    last = (s[:, 4:] & 15) | (m[:, 4:] & 15) << 4
    pairs = (q[:, 0::2] | q[:, 1::2] << 4).reshape(len(q), -1)
    blocks = np.concatenate([d.view(np.uint8), d_min.view(np.uint8), *first, last, pairs], 1)
    return blocks.reshape(len(weight), -1)


def to_q6_k(weight: np.ndarray) -> np.ndarray:
    """Pack float32 `(out, in)`, `in` a multiple of 256, in Q6_K: uint8 `(out, in / 256 · 210)`."""
    parts = weight.reshape(-1, 16, 16)
    at = np.abs(parts).argmax(-1)[..., None]
    scale = np.take_along_axis(parts, at, -1)[..., 0] / -32  # the largest gets the end −32
    d = _half(np.abs(scale).max(1, keepdims=True) / 127)
    unit = np.broadcast_to(d.astype(np.float32), scale.shape)
    scales = np.rint(_over(scale, unit)).clip(-127, 127)
    step = (unit * scales)[..., None]
    codes = np.rint(_over(parts, np.broadcast_to(step, parts.shape))).clip(-32, 31) + 32
    q = codes.astype(np.uint8).reshape(-1, 2, 4, 32)  # two halves, each of four lines of 32
    low = q[:, :, :2] & 15 | (q[:, :, 2:] & 15) << 4
    upper = q >> 4
    high = upper[:, :, 0] | upper[:, :, 1] << 2 | upper[:, :, 2] << 4 | upper[:, :, 3] << 6
    flat = (x.reshape(len(q), -1) for x in (low, high))
    blocks = np.concatenate([*flat, scales.astype(np.int8).view(np.uint8), d.view(np.uint8)], 1)
    return blocks.reshape(len(weight), -1)


def more_bits(layer: int, n_layers: int) -> bool:
    """Whether Q4_K_M gives this layer's values and down-projection more bits."""
    eighth = n_layers // 8
    return layer < eighth or layer >= 7 * n_layers // 8 or (layer - eighth) % 3 == 2


def q4_k_m(name: str, weight: np.ndarray, n_layers: int) -> tuple[np.ndarray, object]:
    """Pack a matrix of a block as llama.cpp's recipe Q4_K_M does; return bytes and type.

    A row that is no multiple of 256 gets the next larger type of blocks of 32: Q5_0, Q8_0.
    """
    kinds, (_, layer, which) = gguf.GGMLQuantizationType, name.split(".")[:3]
    rich = which in ("attn_v", "ffn_down") and more_bits(int(layer), n_layers)
    if weight.shape[1] % SUPER_BLOCK:
        kind = kinds.Q8_0 if rich else kinds.Q5_0
        return gguf.quantize(weight, kind), kind
    return (to_q6_k(weight), kinds.Q6_K) if rich else (to_q4_k(weight), kinds.Q4_K)


if __name__ == "__main__":
    some = np.random.default_rng(0).standard_normal((8, 1024)).astype(np.float32)
    some[3] = 0
    for pack, kind, bits in ((to_q4_k, "Q4_K", 4), (to_q6_k, "Q6_K", 6)):
        again = gguf.dequantize(pack(some), gguf.GGMLQuantizationType[kind])
        off = np.abs(again - some).max() / np.abs(some).max()
        assert off < 2.0**-bits, (kind, off)
        print(f"{kind}: largest error {off:.4f} of the largest weight")
