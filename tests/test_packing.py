"""What is stored: codes of any width, FP16 scales of any magnitude, and what is refused."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from labkit import kernels, quant
from labkit.arguments import SMALLEST_FP16

GRIDS = [(bits, symmetric) for bits in (8, 4, 3, 2) for symmetric in (False, True)]
each_grid = pytest.mark.parametrize(("bits", "symmetric"), GRIDS)


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def relative_error(weight, bits, symmetric, group_size=64, **options) -> float:
    grid = quant.group_qparams(weight, group_size, bits, symmetric, **options)
    codes = quant.quantize_groups(weight, *grid, group_size, bits, symmetric)
    back = quant.dequantize_groups(codes, *grid, group_size)
    return float((back - weight).double().norm() / weight.double().norm())


def finest_error(weight, bits, symmetric) -> float:
    """The error in groups of 64 with the scales as they are, in float32."""
    groups = weight.unflatten(1, (-1, 64))
    back = quant.fake_quantize(groups, bits, symmetric, dim=-1)
    return float((back - groups).double().norm() / groups.double().norm())


# Scales


@each_grid
@pytest.mark.parametrize("skew", [0.0, 2.0, -2.0])
def test_the_error_does_not_depend_on_the_magnitude_of_the_weights(bits, symmetric, skew):
    base, searched = random(32, 256) + skew, {"importance": torch.rand(256) + 0.1}
    promised = finest_error(base, bits, symmetric)
    promised_after_search = relative_error(base, bits, symmetric, **searched)
    for magnitude in np.logspace(4, -7, 34):
        weight = base * float(magnitude)
        ideal = quant.choose_qparams(weight.unflatten(1, (-1, 64)), bits, symmetric, dim=-1)[0]
        if not torch.isfinite(ideal.half()).all():
            with pytest.raises(ValueError, match="too large for FP16"):
                quant.group_qparams(weight, 64, bits, symmetric)
            continue
        # Above 6.1e-5 FP16 is as good as float32; below, its steps are a share of the scale.
        coarse = SMALLEST_FP16 / float(ideal.min())
        slack = 1.03 if ideal.min() > 6.2e-5 else 1.05 + coarse
        found = relative_error(weight, bits, symmetric)
        assert found <= promised * slack, (magnitude, found)
        if coarse < 0.1:
            again = relative_error(weight, bits, symmetric, **searched)
            assert again <= promised_after_search * 1.1, (magnitude, again)


@given(
    st.lists(st.floats(-8, 0), min_size=4, max_size=4),
    st.sampled_from(GRIDS),
    st.integers(0, 9),
    st.sampled_from([-3.0, 0.0, 3.0]),
)
@settings(max_examples=150)
def test_the_zero_point_fits_the_scale_that_is_stored(magnitudes, grid, seed, shift):
    bits, symmetric = grid
    weight = (random(4, 32, seed=seed) + shift) * 10.0 ** torch.tensor(magnitudes)[:, None]
    if weight.abs().max() < SMALLEST_FP16:
        return
    scale, zero_point = quant.group_qparams(weight, 16, bits, symmetric)
    assert torch.equal(scale.half().float(), scale)
    assert scale.min() >= SMALLEST_FP16
    groups = weight.unflatten(1, (-1, 16))
    low, high = groups.amin(-1, keepdim=True).clamp(max=0), groups.amax(-1, keepdim=True)
    if symmetric:
        assert (zero_point == 0).all()
    else:
        exact = (-low.double() / scale.double()).clamp(0, 2**bits - 1)
        assert ((zero_point - exact).abs() <= 0.5 + 1e-4).all()
        assert ((zero_point >= 0) & (zero_point <= 2**bits - 1)).all()
    # Nothing is off by more than the rounding of the value, of the zero point, and of the scale.
    codes = quant.quantize_groups(weight, scale, zero_point, 16, bits, symmetric)
    off = (quant.dequantize_groups(codes, scale, zero_point, 16) - weight).unflatten(1, (-1, 16))
    ideal = quant.choose_qparams(groups, bits, symmetric, dim=-1)[0]
    assert (off.abs() <= scale * (1.0 + 0.51) + 1e-6 * high.abs() + ideal * 0.07).all()


@each_grid
def test_a_packed_layer_keeps_small_weights(bits, symmetric):
    linear = torch.nn.Linear(256, 32, bias=False)
    linear.weight = torch.nn.Parameter(random(32, 256) * 1e-5, requires_grad=False)
    packed = kernels.PackedLinear(linear, bits, 64, symmetric).dequantized()
    error = float((packed - linear.weight).norm() / linear.weight.norm())
    assert error <= 1.3 * finest_error(linear.weight, bits, symmetric)


def test_weights_too_small_for_any_scale_are_refused_and_rows_among_larger_ones_are_not():
    weight = random(8, 64)
    for magnitude in (1e-9, 1e-20, 1e-38, 1e-44):
        with pytest.raises(ValueError, match=r"weight: its largest magnitude, .*e-.* all would be"):
            quant.group_qparams(weight * magnitude, 32, 4)
        few = weight.clone()
        few[1:] *= magnitude
        scale, zero_point = quant.group_qparams(few, 32, 4)
        codes = quant.quantize_groups(few, scale, zero_point, 32)
        off = quant.dequantize_groups(codes, scale, zero_point, 32) - few
        assert off[1:].abs().max() <= SMALLEST_FP16 / 2
    assert (quant.group_qparams(torch.zeros(2, 8), 4)[0] == SMALLEST_FP16).all()


def test_to_fp16_reaches_from_the_smallest_to_the_largest():
    every = torch.arange(1, 0x7C00, dtype=torch.int16).view(torch.float16).float()
    for bits in (None, 2, 4, 8):
        assert torch.equal(quant.to_fp16(every, bits), every)
    between = every[:-1] * 0.7 + every[1:] * 0.3
    assert torch.equal(quant.to_fp16(between), between.half().float())
    rounded = quant.to_fp16(between, 8)
    assert ((rounded == every[:-1]) | (rounded == every[1:])).all()
    coarse = between < 2**-14  # there a scale goes down only where that clips half a scale
    down = coarse & (rounded < between)
    assert ((between - rounded)[down] * 255 <= rounded[down] * (1 + 1e-5)).all()
    assert (rounded[:100] > between[:100]).sum() >= 76
    assert quant.to_fp16(torch.tensor([0.0, 1e-30])).tolist() == [SMALLEST_FP16] * 2
    assert quant.to_fp16(torch.tensor(65519.0)).item() == 65504
    for bad in (65520.0, math.inf, math.nan):
        with pytest.raises(ValueError, match=r"scale: .* is too large for FP16"):
            quant.to_fp16(torch.tensor([1.0, bad]))


# Codes


def reference_bytes(codes: list[int], bits: int) -> list[int]:
    number = sum(code << (bits * i) for i, code in enumerate(codes))
    return list(number.to_bytes(-(-len(codes) * bits // 8), "little"))


@given(st.data(), st.integers(1, 8), st.integers(0, 3), st.integers(0, 19))
@settings(max_examples=200)
def test_packing_is_what_big_integers_say_and_is_undone(data, bits, rows, n):
    values = data.draw(
        st.lists(
            st.lists(st.integers(0, 2**bits - 1), min_size=n, max_size=n),
            min_size=rows,
            max_size=rows,
        )
    )
    codes = torch.tensor(values, dtype=torch.uint8).view(rows, n)
    packed = quant.pack_bits(codes, bits)
    assert packed.dtype == torch.uint8
    assert packed.tolist() == [reference_bytes(row, bits) for row in values]
    assert torch.equal(quant.unpack_bits(packed, bits, n), codes)


OTHER_DTYPES = [torch.int8, torch.int16, torch.int32, torch.int64, torch.bool]
OTHER_DTYPES += [torch.float16, torch.bfloat16, torch.float32, torch.float64]


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("dtype", OTHER_DTYPES, ids=str)
def test_codes_of_another_dtype_are_refused(dtype, bits):
    codes = torch.tensor([0, 1, 1, 0]).to(dtype)
    with pytest.raises(ValueError, match=f"codes must be a uint8 tensor .*{dtype}"):
        quant.pack_bits(codes, bits)
    with pytest.raises(ValueError, match=f"packed must be a uint8 tensor .*{dtype}"):
        quant.unpack_bits(codes, bits, 4)


def test_signed_codes_are_told_what_to_add():
    codes = torch.tensor([-7, 3], dtype=torch.int8)
    with pytest.raises(ValueError, match=r"codes must be .*; add 8 to signed codes first"):
        quant.pack_bits(codes, 4)
    shifted = (codes + 8).to(torch.uint8)
    back = quant.unpack_bits(quant.pack_bits(shifted, 4), 4, 2).to(torch.int8) - 8
    assert torch.equal(back, codes)


@given(st.integers(1, 7), st.integers(1, 255), st.integers(1, 9), st.integers(0, 8))
@settings(max_examples=200)
def test_a_code_over_the_width_is_refused(bits, code, n, place):
    codes = torch.zeros(2, n, dtype=torch.uint8)
    codes[1, place % n] = code
    if code < 2**bits:
        assert torch.equal(quant.unpack_bits(quant.pack_bits(codes, bits), bits, n), codes)
        return
    message = f"codes must be from 0 to {2**bits - 1} at bits={bits}, not {code}"
    with pytest.raises(ValueError, match=message):
        quant.pack_bits(codes, bits)


@pytest.mark.parametrize("codes", [None, [1, 2], 3, "12", torch.tensor(3, dtype=torch.uint8)])
def test_what_is_no_row_of_codes_is_refused(codes):
    with pytest.raises(ValueError, match="codes must be a uint8 tensor of one dimension or more"):
        quant.pack_bits(codes, 4)
    with pytest.raises(ValueError, match="packed must be a uint8 tensor of one dimension or more"):
        quant.unpack_bits(codes, 4, 2)


@pytest.mark.parametrize("bits", [0, -1, 9, 4.0, True, None, "4"])
def test_other_widths_are_refused(bits):
    codes = torch.zeros(4, dtype=torch.uint8)
    for call in (lambda: quant.pack_bits(codes, bits), lambda: quant.unpack_bits(codes, bits, 4)):
        with pytest.raises(ValueError, match="bits must be an integer from 1 to 8, not"):
            call()


@given(st.integers(1, 8), st.integers(0, 12), st.integers(0, 30))
@settings(max_examples=200)
def test_only_the_size_that_packing_gives_is_unpacked(bits, nbytes, n):
    packed = torch.arange(2 * nbytes, dtype=torch.uint8).view(2, nbytes)
    if nbytes == -(-n * bits // 8):
        assert quant.unpack_bits(packed, bits, n).shape == (2, n)
        return
    with pytest.raises(ValueError, match=rf"packed must have \d+ bytes a row for n={n}"):
        quant.unpack_bits(packed, bits, n)


@pytest.mark.parametrize("n", [-1, 2.0, True, None])
def test_other_counts_are_refused(n):
    with pytest.raises(ValueError, match="n must be an integer from 0 up, not"):
        quant.unpack_bits(torch.zeros(1, dtype=torch.uint8), 4, n)
