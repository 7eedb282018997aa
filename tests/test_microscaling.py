"""Small floats and block formats, against torch's casts, torchao's conversions and definitions."""

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from labkit import microscaling as mx

FP8 = {"E4M3": (mx.E4M3, torch.float8_e4m3fn), "E5M2": (mx.E5M2, torch.float8_e5m2)}
FORMATS = ("MXFP8", "MXFP4", "NVFP4")
SIZE = {"MXFP8": 32, "MXFP4": 32, "NVFP4": 16}
EMAX = {"MXFP8": 8, "MXFP4": 2}


def bits_equal(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Compare numbers, the sign of zero included."""
    return torch.equal(a, b) and torch.equal(a.signbit(), b.signbit())


def finite_values(dtype: torch.dtype) -> torch.Tensor:
    every = torch.arange(256, dtype=torch.uint8).view(dtype).float()
    return every[every.isfinite()].unique()


def weights(*shape: int, spread: float = 3.0, seed: int = 0) -> torch.Tensor:
    """Draw weights whose rows and blocks have very different sizes; some blocks are zero."""
    random = torch.Generator().manual_seed(seed)
    w = torch.randn(shape, generator=random)
    blocks = w.view(*shape[:-1], -1, 16)
    blocks *= torch.exp(spread * torch.randn(blocks[..., :1].shape, generator=random))
    blocks[torch.rand(blocks.shape[:-1], generator=random) < 0.1] = 0
    return w


# Single numbers


@pytest.mark.parametrize(("form", "dtype"), FP8.values(), ids=FP8)
def test_rounding_agrees_with_torchs_cast_everywhere_ties_too(form, dtype):
    values = finite_values(dtype).double()
    ties = (values[1:] + values[:-1]) / 2
    near = torch.cat([ties, ties * (1 + 2**-20), ties * (1 - 2**-20), values]).float()
    wild = torch.randn(100_000) * torch.exp(4 * torch.randn(100_000))
    for x in (near, wild, torch.tensor([0.0, -0.0, 1e-30, -1e-30, 1e30, -1e30, 2**-149])):
        expected = x.clamp(-form[2], form[2]).to(dtype).float()
        assert bits_equal(mx.round_to_float(x, *form), expected)


def test_fp4_is_the_nearest_of_its_values_and_ties_go_to_the_even_code():
    x = torch.cat([torch.arange(-4608, 4609) / 512, torch.randn(1000) * 1e-3, torch.tensor([1e30])])
    codes = mx.fp4_codes(x)
    distance = (x.abs()[:, None].double() - mx.FP4_VALUES.double()).abs()
    nearest = distance == distance.amin(1, keepdim=True)
    chosen = codes.long() % 8
    assert nearest.gather(1, chosen[:, None]).all()
    assert (chosen[nearest.sum(1) == 2] % 2 == 0).all()
    assert (nearest.sum(1) == 2).sum() >= 14, "the test must see ties"
    assert torch.equal(codes >= 8, x.signbit())
    assert bits_equal(mx.fp4_decode(codes).abs(), mx.FP4_VALUES[chosen])
    assert codes.dtype == torch.uint8


def test_fp4_codes_agree_with_torchao():
    from torchao.prototype.mx_formats.kernels import f4_unpacked_to_f32, f32_to_f4_unpacked

    patterns = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(torch.bfloat16).float()
    x = patterns[patterns.isfinite()]
    assert torch.equal(mx.fp4_codes(x), f32_to_f4_unpacked(x))
    every = torch.arange(16, dtype=torch.uint8)
    assert bits_equal(mx.fp4_decode(every), f4_unpacked_to_f32(every))


# Blocks


@pytest.mark.parametrize("shape", [(32,), (4, 64), (3, 2, 96), (64, 576)])
@pytest.mark.parametrize("name", ["MXFP4", "MXFP8"])
def test_mx_agrees_with_torchao_byte_for_byte(name, shape):
    from torchao.prototype.mx_formats.mx_tensor import MXTensor, to_mx

    kind = torch.float4_e2m1fn_x2 if name == "MXFP4" else torch.float8_e4m3fn
    for seed in range(3):
        w = weights(*shape, seed=seed)
        quantize = mx.quantize_mxfp4 if name == "MXFP4" else mx.quantize_mxfp8
        codes, scale = quantize(w)
        their_scale, theirs = to_mx(w, kind, 32)
        assert torch.equal(scale, their_scale.view(torch.uint8))
        assert torch.equal(codes.view(torch.uint8), theirs.view(torch.uint8))
        dense = MXTensor.to_mx(w, kind, 32).dequantize(torch.float32)
        assert torch.equal(mx.round_to_blocks(w, name), dense)


def nvfp4_of_torchao(w: torch.Tensor):
    from torchao.prototype.mx_formats.nvfp4_tensor import NVFP4Tensor, per_tensor_amax_to_scale

    scale = per_tensor_amax_to_scale(w.abs().max())
    return NVFP4Tensor.to_nvfp4(w, per_tensor_scale=scale)


@pytest.mark.parametrize("shape", [(4, 64), (64, 576), (16, 1536)])
def test_nvfp4_agrees_with_torchao(shape):
    w = weights(*shape, spread=0.7)
    theirs = nvfp4_of_torchao(w)
    packed, scale, tensor_scale = mx.quantize_nvfp4(w)
    assert torch.equal(tensor_scale, theirs.per_tensor_scale)
    normal = scale.float() >= 2**-6  # torchao has no smaller scale; E4M3 has, down to 2^-9
    assert torch.equal(scale.float()[normal], theirs.scale.view_as(scale).float()[normal])
    assert normal.float().mean() > 0.8
    ours = mx.dequantize_nvfp4(packed, scale, tensor_scale).unflatten(-1, (-1, 16))
    dense = theirs.dequantize(torch.float32).unflatten(-1, (-1, 16))
    differ = (ours != dense) & normal[..., None]
    assert differ.float().mean() < 1e-3
    # They multiply by a reciprocal: a number in the middle of two neighbors may go the other way.
    step = (scale.double() * tensor_scale.double())[..., None]
    middle = (ours.double() + dense.double()) / 2
    off = (w.unflatten(-1, (-1, 16)).double() - middle).abs() / step
    assert (off[differ] < 1e-5).all()


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.floats(-1, 1, width=32), min_size=32, max_size=32),
    st.integers(-148, 127),
    st.sampled_from(["MXFP4", "MXFP8"]),
)
def test_mx_keeps_its_definition_over_the_whole_range_of_fp32(numbers, power, name):
    w = torch.tensor([x * 2.0**power for x in numbers], dtype=torch.float64).float()
    quantize = mx.quantize_mxfp4 if name == "MXFP4" else mx.quantize_mxfp8
    codes, (scale,) = quantize(w)
    largest = w.abs().max().item()
    wanted = math.frexp(largest)[1] - 1 - EMAX[name] if largest else -127
    assert scale == max(wanted, -127) + 127
    elements = codes.float() if name == "MXFP8" else mx.fp4_decode(mx.unpack_bits(codes, 4, 32))
    values = mx.FP4_VALUES if name == "MXFP4" else finite_values(torch.float8_e4m3fn)
    grid = {Fraction(sign * x) for x in values.tolist() for sign in (1, -1)}
    for x, element in zip(w.tolist(), elements.tolist(), strict=True):
        exact = Fraction(x) / Fraction(2) ** (int(scale) - 127)
        best = min(abs(exact - g) for g in grid)
        assert abs(exact - Fraction(element)) == best
    assert torch.equal(
        mx.round_to_blocks(w, name), mx.round_to_blocks(mx.round_to_blocks(w, name), name)
    )


@settings(deadline=None, max_examples=60)
@given(st.lists(st.floats(-1, 1, width=32), min_size=64, max_size=64), st.integers(-120, 120))
def test_nvfp4_keeps_its_definition(numbers, power):
    w = torch.tensor([x * 2.0**power for x in numbers], dtype=torch.float64).float()
    packed, scale, tensor_scale = mx.quantize_nvfp4(w)
    assert (scale.float() > 0).all()
    assert scale.float().isfinite().all()
    assert scale.dtype == torch.float8_e4m3fn
    largest = w.abs().max()
    if largest / 2688 > torch.finfo(torch.float32).tiny:
        assert tensor_scale == largest / 2688
        assert scale.float().max() == 448
    step = (scale.double() * tensor_scale.double())[:, None]
    elements = mx.fp4_decode(mx.unpack_bits(packed, 4, 64)).double().view(-1, 16)
    error = (elements * step - w.double().view(-1, 16)).abs()
    nearest = (w.double().view(-1, 16, 1).abs() - mx.FP4_VALUES.double() * step[..., None]).abs()
    assert (error <= nearest.amin(-1) + 1e-5 * step).all()


@pytest.mark.parametrize("name", FORMATS)
def test_zeros_come_back_as_zeros_and_their_signs_stay(name):
    w = torch.zeros(2, 64)
    w[0, 1] = -0.0
    rounded = mx.round_to_blocks(w, name)
    assert bits_equal(rounded, w)
    w[1, :16] = 3.0  # the other blocks are still zero
    assert torch.equal(mx.round_to_blocks(w, name) == 0, w == 0)


@pytest.mark.parametrize("name", FORMATS)
def test_bytes_are_what_the_bits_per_weight_promise(name):
    w = weights(8, 576)
    parts = getattr(mx, f"quantize_{name.lower()}")(w)
    bits = 8 * sum(part.nbytes for part in parts)
    if name == "NVFP4":
        bits -= 32
    assert bits == w.numel() * mx.BITS_PER_WEIGHT[name]


@pytest.mark.parametrize("largest", [1.0, 1e-42, 1e-30, 1e30, 3e38])
@pytest.mark.parametrize("name", FORMATS)
def test_to_round_is_to_pack_and_unpack(name, largest):
    quantize, dequantize = (getattr(mx, f"{way}quantize_{name.lower()}") for way in ("", "de"))
    w = weights(16, 96)
    w = w / w.abs().max() * largest
    w[3] = 0
    w[4] *= 1e-6
    assert bits_equal(mx.round_to_blocks(w, name), dequantize(*quantize(w)))


def test_the_largest_of_a_block_saturates_by_the_rule_of_mx():
    w = torch.full((32,), 0.1)
    w[0] = 7.99  # floor(log2 7.99) = 2, so the scale is 1 and 6 is the largest there is
    assert mx.round_to_blocks(w, "MXFP4")[0] == 6
    w[0] = 8.0
    assert mx.round_to_blocks(w, "MXFP4")[0] == 8


@pytest.mark.parametrize("name", FORMATS)
def test_dtypes_and_batches(name):
    w = weights(2, 3, 64)
    rounded = mx.round_to_blocks(w, name)
    assert rounded.shape == w.shape
    assert rounded.dtype == torch.float32
    assert torch.equal(
        mx.round_to_blocks(w.bfloat16(), name), mx.round_to_blocks(w.bfloat16().float(), name)
    )
    assert torch.equal(mx.round_to_blocks(w.double(), name), rounded)
    if name != "NVFP4":
        assert torch.equal(torch.stack([mx.round_to_blocks(x, name) for x in w]), rounded)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        assert torch.equal(mx.round_to_blocks(w, name), rounded)
    finally:
        torch.set_default_dtype(before)


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize(
    ("bad", "error", "words"),
    [
        (lambda size: torch.ones(3, size + 1), ValueError, "multiple of"),
        (lambda size: torch.tensor(1.0), ValueError, "multiple of"),
        (lambda size: torch.full((size,), math.nan), ValueError, "NaN or infinite"),
        (lambda size: torch.full((size,), math.inf), ValueError, "NaN or infinite"),
        (lambda size: torch.zeros(0, size), ValueError, "empty"),
        (lambda size: torch.ones(size, dtype=torch.int32), TypeError, "floating-point"),
        (lambda size: [1.0] * size, TypeError, "floating-point"),
    ],
)
def test_what_has_no_blocks_is_refused(name, bad, error, words):
    with pytest.raises(error, match=words):
        mx.round_to_blocks(bad(SIZE[name]), name)


def test_an_unknown_format_is_refused():
    with pytest.raises(ValueError, match=r"number_format must be one of .*'NVFP4'.*, not 'FP3'"):
        mx.round_to_blocks(torch.ones(32), "FP3")
