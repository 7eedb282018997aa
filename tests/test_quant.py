"""The quantizers and packed layers, against torch's own, float64 and properties."""

import itertools
import math
import warnings

import pytest
import torch
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from torch import nn

from labkit import kernels, quant

BITS = (2, 3, 4, 5, 6, 7, 8)

hardest = [0.0, -0.0, 1e38, -1e38, 1e-38, -1e-38, 1e-45, 0.5, 1.0, 127.5]
numbers = st.one_of(st.sampled_from(hardest), st.floats(-1e4, 1e4, width=32))
shapes = st.lists(st.integers(1, 5), min_size=1, max_size=3)


@st.composite
def tensors(draw, values=numbers):
    shape = draw(shapes)
    flat = draw(st.lists(values, min_size=math.prod(shape), max_size=math.prod(shape)))
    return torch.tensor(flat, dtype=torch.float32).view(shape)


def random(*shape: int, seed: int = 0, spread: float = 1.0, shift: float = 0.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator) * spread + shift


# Property tests


@given(tensors(), st.sampled_from(BITS), st.booleans(), st.sampled_from([None, 0, -1]))
@example(torch.zeros(3), 8, False, None)
@example(torch.tensor([5.0]), 4, False, None)
@example(torch.tensor([-5.0]), 4, True, -1)
@example(torch.tensor([3.0, 4.0]), 2, False, None)
@example(torch.tensor([-3.0, -4.0]), 2, False, None)
@example(torch.tensor([1e38, -1e38]), 8, False, None)
@example(torch.tensor([1e-38, 1e-45]), 8, True, None)
@settings(max_examples=300)
def test_quantizer_properties(x, bits, symmetric, dim):
    scale, zero_point = quant.choose_qparams(x, bits, symmetric, dim)
    codes = quant.quantize(x, scale, zero_point, bits, symmetric)
    restored = quant.dequantize(codes, scale, zero_point)
    qmin, qmax = quant.integer_range(bits, symmetric)

    expected_shape = [1] * x.ndim if dim is None else list(x.shape)
    if dim is not None:
        expected_shape[dim] = 1
    assert list(scale.shape) == list(zero_point.shape) == expected_shape
    assert scale.dtype == zero_point.dtype == torch.float32
    assert (scale > 0).all()
    assert torch.isfinite(scale).all()
    assert torch.equal(zero_point, zero_point.round())
    assert ((zero_point >= qmin) & (zero_point <= qmax)).all()
    if symmetric:
        assert (zero_point == 0).all()

    assert codes.shape == x.shape
    assert codes.dtype == (torch.int8 if symmetric else torch.uint8)
    assert codes.int().min() >= qmin
    assert codes.int().max() <= qmax
    assert restored.dtype == torch.float32

    zero_codes = quant.quantize(torch.zeros_like(x), scale, zero_point, bits, symmetric)
    assert (quant.dequantize(zero_codes, scale, zero_point) == 0).all()

    # Every value lies inside the grid, less the up to half a step by which rounding the zero
    # point shifts it: so the error is at most half a step, at the end of the grid one step.
    steps = (restored.double() - x.double()).abs() / scale.double()
    assert steps.max() <= (0.5 if symmetric else 1.0) * (1 + 1e-5) + 1e-5 * qmax
    inside = (x.double() / scale.double() + zero_point.double() >= qmin - 0.5) & (
        x.double() / scale.double() + zero_point.double() <= qmax + 0.5
    )
    assert (steps[inside] <= 0.5 * (1 + 1e-5) + 1e-5 * qmax).all()


@given(tensors(st.floats(-1e4, 1e4, width=32)), st.sampled_from(BITS), st.booleans())
@settings(max_examples=100)
def test_the_grid_is_fixed_under_a_second_pass(x, bits, symmetric):
    scale, zero_point = quant.choose_qparams(x, bits, symmetric)
    once = quant.quantize(x, scale, zero_point, bits, symmetric)
    again = quant.quantize(
        quant.dequantize(once, scale, zero_point), scale, zero_point, bits, symmetric
    )
    assert torch.equal(once, again)


@given(tensors(st.floats(-1e4, 1e4, width=32)), st.sampled_from(BITS), st.booleans())
@settings(max_examples=200)
def test_fake_quantize_is_idempotent(x, bits, symmetric):
    once = quant.fake_quantize(x, bits, symmetric)
    # The zero point may fall between two codes with equal right; then the grid may lose its end.
    scale, _ = quant.choose_qparams(x, bits, symmetric)
    ideal = x.double().min().clamp(max=0).abs() / scale.double().flatten()[0]
    assume(symmetric or abs(ideal % 1 - 0.5) > 1e-3)
    again = quant.fake_quantize(once, bits, symmetric)
    torch.testing.assert_close(again, once, rtol=1e-6, atol=0)


@given(
    st.lists(st.integers(0, 15), min_size=0, max_size=40).filter(lambda v: len(v) % 2 == 0),
    st.integers(1, 3),
)
@settings(max_examples=100)
def test_pack_and_unpack_undo_each_other(values, rows):
    codes = torch.tensor([values] * rows, dtype=torch.uint8)
    packed = quant.pack_bits(codes, 4)
    assert packed.dtype == torch.uint8
    assert packed.shape == (rows, len(values) // 2)
    assert torch.equal(quant.unpack_bits(packed, 4, len(values)), codes)


def test_every_byte_survives_unpacking_and_packing():
    every = torch.arange(256, dtype=torch.int32).to(torch.uint8)
    assert torch.equal(quant.pack_bits(quant.unpack_bits(every, 4, 512), 4), every)
    assert quant.pack_bits(torch.tensor([1, 2], dtype=torch.uint8), 4).tolist() == [0x21]


# Against float64 and by hand


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize(("spread", "shift"), [(1, 0), (0.01, 5), (3, -20), (1e-6, 0), (1e6, 1)])
def test_codes_are_the_nearest_grid_points(bits, symmetric, spread, shift):
    x = random(200, spread=spread, shift=shift)
    scale, zero_point = quant.choose_qparams(x, bits, symmetric)
    codes = quant.quantize(x, scale, zero_point, bits, symmetric)
    qmin, qmax = quant.integer_range(bits, symmetric)
    grid = (torch.arange(qmin, qmax + 1).double() - zero_point.double()) * scale.double()
    distance = (x.double().unsqueeze(1) - grid).abs()
    chosen = distance.gather(1, (codes.long() - qmin).unsqueeze(1)).squeeze(1)
    assert (chosen <= distance.amin(1) + 1e-3 * scale.double()).all()


@pytest.mark.parametrize("bits", BITS)
def test_scale_and_zero_point_match_float64(bits):
    for shift in (-30, -1, 0, 0.5, 30):
        x = random(50, shift=shift)
        low, high = min(0.0, x.double().min().item()), max(0.0, x.double().max().item())
        scale, zero_point = quant.choose_qparams(x, bits)
        assert scale.item() == pytest.approx((high - low) / (2**bits - 1), rel=1e-6)
        assert zero_point.item() == pytest.approx(-low * (2**bits - 1) / (high - low), abs=0.501)
        scale, zero_point = quant.choose_qparams(x, bits, symmetric=True)
        assert scale.item() == pytest.approx(max(-low, high) / (2 ** (bits - 1) - 1), rel=1e-6)
        assert zero_point.item() == 0


def test_integer_ranges():
    assert quant.integer_range(8, symmetric=True) == (-127, 127)
    assert quant.integer_range(8, symmetric=False) == (0, 255)
    assert quant.integer_range(2, symmetric=True) == (-1, 1)
    assert quant.integer_range(2, symmetric=False) == (0, 3)


def test_a_range_wider_than_float32_reaches_is_quantized():
    x = torch.tensor([2e38, 0.0, -2e38])  # their difference overflows
    torch.testing.assert_close(quant.fake_quantize(x, 8), x, rtol=0.01, atol=0)


def test_a_worked_example():
    x = torch.tensor([-1.0, 0.0, 0.5, 2.0])
    scale, zero_point = quant.choose_qparams(x, bits=4)
    assert scale.item() == pytest.approx(0.2)
    assert zero_point.item() == 5
    assert quant.quantize(x, scale, zero_point, bits=4).tolist() == [0, 5, 7, 15]  # 2.5 → 2 (even)
    x = torch.tensor([-1.2, 0.0, 0.5, 2.1])
    scale, zero_point = quant.choose_qparams(x, bits=4, symmetric=True)
    assert scale.item() == pytest.approx(0.3)
    assert quant.quantize(x, scale, zero_point, bits=4, symmetric=True).tolist() == [-4, 0, 2, 7]


def test_a_grid_that_is_too_small_clips():
    scale, zero_point = torch.tensor(1.0), torch.tensor(3.0)
    x = torch.tensor([-100.0, -3.0, 0.4, 12.0, 100.0, 3e38])
    codes = quant.quantize(x, scale, zero_point, bits=4)
    assert codes.tolist() == [0, 0, 3, 15, 15, 15]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_float_types_give_what_float32_gives(dtype):
    x = random(4, 8).to(dtype)
    assert torch.equal(quant.fake_quantize(x, 4, dim=-1), quant.fake_quantize(x.float(), 4, dim=-1))


def test_each_channel_token_and_group_gets_its_own_scale():
    weight = random(6, 32) * torch.tensor([1.0, 10, 100, 0.1, 1e-3, 1e4]).unsqueeze(1)
    by_channel = quant.fake_quantize(weight, 8, symmetric=True, dim=1)
    for row, expected in zip(weight, by_channel, strict=True):
        assert torch.equal(quant.fake_quantize(row, 8, symmetric=True), expected)
    groups = weight.unflatten(1, (-1, 8))
    by_group = quant.fake_quantize(groups, 4, dim=-1).flatten(1)
    assert quant.choose_qparams(groups, 4, dim=-1)[0].shape == (6, 4, 1)
    for start in range(0, 32, 8):
        part = weight[:, start : start + 8]
        assert torch.equal(quant.fake_quantize(part, 4, dim=1), by_group[:, start : start + 8])


def test_each_bit_more_buys_6_db():
    x = random(100_000)
    x = x.clamp(-3, 3)
    noise = [(quant.fake_quantize(x, b) - x).pow(2).mean().item() for b in (4, 5, 6, 7, 8)]
    gains = [10 * math.log10(a / b) for a, b in itertools.pairwise(noise)]
    assert all(5.5 < gain < 6.6 for gain in gains), gains


# Against torch's own quantizers

DEPRECATED = pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor:UserWarning")


def same_codes(ours: torch.Tensor, theirs: torch.Tensor, position: torch.Tensor) -> bool:
    """Equal, but for neighbors where x / scale is within 1e-3 of a half."""
    difference = (ours.int() - theirs.int()).abs()
    tie = ((position.double() - position.double().floor()) - 0.5).abs() < 1e-3
    return bool((difference[~tie] == 0).all()) and int(difference.max()) <= 1


@DEPRECATED
@pytest.mark.parametrize("shift", [0.0, 4.0, -4.0])
def test_codes_match_torch_per_tensor(shift):
    x = random(64, 64, shift=shift)
    scale, zero_point = quant.choose_qparams(x)
    ours = quant.quantize(x, scale, zero_point)
    theirs = torch.quantize_per_tensor(x, scale.item(), int(zero_point), torch.quint8)
    assert same_codes(ours, theirs.int_repr(), x / scale)
    torch.testing.assert_close(
        quant.dequantize(theirs.int_repr(), scale, zero_point), theirs.dequantize()
    )


@DEPRECATED
def test_codes_match_torch_per_channel():
    weight = random(16, 64) * torch.logspace(-3, 3, 16).unsqueeze(1)
    scale, zero_point = quant.choose_qparams(weight, symmetric=True, dim=1)
    ours = quant.quantize(weight, scale, zero_point, symmetric=True)
    theirs = torch.quantize_per_channel(
        weight, scale.flatten().double(), torch.zeros(16, dtype=torch.long), 0, torch.qint8
    )
    assert same_codes(ours, theirs.int_repr(), weight / scale)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", BITS)
def test_fake_quantize_matches_torch(bits, symmetric):
    x = random(32, 16, shift=0.3)
    qmin, qmax = quant.integer_range(bits, symmetric)
    scale, zero_point = quant.choose_qparams(x, bits, symmetric)
    ours = quant.quantize(x, scale, zero_point, bits, symmetric)
    theirs = torch.fake_quantize_per_tensor_affine(x, scale.item(), int(zero_point), qmin, qmax)
    assert same_codes(ours, (theirs / scale).round() + zero_point, x / scale)

    scale, zero_point = quant.choose_qparams(x, bits, symmetric, dim=1)
    ours = quant.quantize(x, scale, zero_point, bits, symmetric)
    theirs = torch.fake_quantize_per_channel_affine(
        x, scale.flatten(), zero_point.flatten().int(), 0, qmin, qmax
    )
    assert same_codes(ours, (theirs / scale).round() + zero_point, x / scale)


@pytest.mark.parametrize("shift", [-30.0, -1.0, 0.0, 1.0, 30.0])
def test_scale_and_zero_point_match_torch_observers(shift):
    from torch.ao.quantization import MinMaxObserver, PerChannelMinMaxObserver

    x = random(32, 64, shift=shift)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        whole = MinMaxObserver(dtype=torch.quint8)
        rows = PerChannelMinMaxObserver(ch_axis=0, dtype=torch.quint8)
        for observer in (whole, rows):
            observer(x)
        expected = [observer.calculate_qparams() for observer in (whole, rows)]
    for dim, (scale, zero_point) in zip((None, 1), expected, strict=True):
        ours_scale, ours_zero_point = quant.choose_qparams(x, dim=dim)
        torch.testing.assert_close(ours_scale.flatten(), scale.flatten(), rtol=1e-6, atol=0)
        assert torch.equal(ours_zero_point.flatten(), zero_point.flatten().float())


# Bad input


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_values_that_are_not_finite_are_refused(value):
    x = torch.tensor([1.0, value])
    one, zero = torch.tensor(1.0), torch.tensor(0.0)
    for call in (
        lambda: quant.choose_qparams(x),
        lambda: quant.quantize(x, one, zero),
        lambda: quant.fake_quantize(x),
    ):
        with pytest.raises(ValueError, match=r"x holds 1 NaN or infinite"):
            call()


def test_values_beyond_float32_are_refused():
    with pytest.raises(ValueError, match=r"x holds 1 NaN or infinite"):
        quant.choose_qparams(torch.tensor([1.0, 1e300], dtype=torch.float64))


def test_an_empty_tensor_is_refused():
    with pytest.raises(ValueError, match=r"x is empty \(shape \(0, 3\)\)"):
        quant.choose_qparams(torch.empty(0, 3))


@pytest.mark.parametrize("x", [torch.tensor([1, 2]), torch.tensor([True]), [1.0, 2.0], 1.0, None])
def test_what_is_no_float_tensor_is_refused(x):
    with pytest.raises(TypeError, match="x must be a floating-point tensor, not"):
        quant.choose_qparams(x)


@pytest.mark.parametrize("bits", [4.0, True, "8", None])
def test_bits_that_are_no_integer_are_refused(bits):
    with pytest.raises(TypeError, match="bits must be an integer from 2 to 8"):
        quant.fake_quantize(torch.ones(2), bits)


@pytest.mark.parametrize("bits", [-1, 0, 1, 9, 16])
def test_bits_out_of_range_are_refused(bits):
    with pytest.raises(ValueError, match=f"bits must be from 2 to 8, not {bits}"):
        quant.fake_quantize(torch.ones(2), bits)


@pytest.mark.parametrize("scale", [0.0, -1.0, float("nan")])
def test_a_scale_that_is_not_positive_is_refused(scale):
    with pytest.raises(ValueError, match="scale must be positive"):
        quant.quantize(torch.ones(2), torch.tensor(scale), torch.tensor(0.0))


# Packed layers


def layer(inputs: int = 64, outputs: int = 24, bias: bool = True) -> nn.Linear:
    linear = nn.Linear(inputs, outputs, bias)
    with torch.no_grad():
        linear.weight.copy_(random(outputs, inputs, seed=1))
    return linear


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("bits", "group_size"), [(4, 16), (4, 64), (8, 16), (8, 64), (4, 1)])
def test_packed_layer_computes_with_its_stored_weight(bits, group_size, symmetric, bias):
    linear = layer(bias=bias)
    packed = kernels.PackedLinear(linear, bits, group_size, symmetric)
    x = random(2, 5, 64, seed=2)
    weight = packed.dequantized()
    torch.testing.assert_close(packed(x), nn.functional.linear(x, weight, linear.bias))

    # The stored weight is what fake quantization gives, but for the scale's rounding to float16.
    groups = linear.weight.detach().unflatten(1, (-1, group_size))
    scale, _ = quant.choose_qparams(groups, bits, symmetric, dim=-1)
    error = (weight.unflatten(1, (-1, group_size)) - groups).abs()
    assert (error <= scale * (0.5 if symmetric else 1.0) + 2**-10 * groups.abs() + 1e-6).all()


@pytest.mark.parametrize("symmetric", [True, False])
def test_packed_layer_rounds_to_the_nearest_point_of_the_grid_it_stores(symmetric):
    linear = layer(outputs=200, bias=False)
    packed = kernels.PackedLinear(linear, 4, 64, symmetric)
    zero = torch.full((200, 1), 8.0) if symmetric else packed.zero_point.squeeze(-1)
    codes = torch.arange(1 if symmetric else 0, 16)
    grid = (codes - zero.double()) * packed.scale.squeeze(-1).double()
    distance = (linear.weight.detach().double().unsqueeze(-1) - grid.unsqueeze(1)).abs().amin(-1)
    error = (linear.weight.detach().double() - packed.dequantized().double()).abs()
    assert (error <= distance * (1 + 1e-6) + 1e-9).all()


@pytest.mark.parametrize("bits", [4, 8])
def test_packed_layer_stores_the_bytes_it_should(bits):
    linear = layer(128, 10)
    for symmetric in (True, False):
        packed = kernels.PackedLinear(linear, bits, 32, symmetric)
        state = packed.state_dict()
        assert state["codes"].dtype == torch.uint8
        assert state["codes"].nbytes == 128 * 10 * bits // 8
        assert state["scale"].nbytes == 10 * 4 * 2
        if symmetric:
            assert "zero_point" not in state
        else:
            assert state["zero_point"].nbytes == 10 * 4
        assert state["bias"].nbytes == 10 * 4


def test_packed_layer_is_close_to_the_float_layer():
    linear, x = layer(256, 32), random(64, 256, seed=3)
    expected = linear(x).detach()
    errors = {}
    for bits, group_size in ((8, 64), (4, 64), (4, 256)):
        got = kernels.PackedLinear(linear, bits, group_size)(x)
        errors[bits, group_size] = ((got - expected).norm() / expected.norm()).item()
    assert errors[8, 64] < 0.01
    assert errors[4, 64] < 0.12
    assert errors[8, 64] < errors[4, 64] < errors[4, 256]


def test_packed_layer_survives_saving(tmp_path):
    packed = kernels.PackedLinear(layer(), 4, 16)
    torch.save(packed.state_dict(), tmp_path / "layer.pt")
    other = kernels.PackedLinear(nn.Linear(64, 24), 4, 16)
    other.load_state_dict(torch.load(tmp_path / "layer.pt"))
    x = random(3, 64)
    assert torch.equal(packed(x), other(x))


@pytest.mark.parametrize("symmetric", [True, False])
def test_packed_layer_takes_extreme_weights(symmetric):
    linear = nn.Linear(64, 4, bias=False)
    rows = [torch.zeros(64), torch.full((64,), 1e-30), torch.full((64,), 3.0), -torch.ones(64)]
    linear.weight = nn.Parameter(torch.stack(rows))
    weight = kernels.PackedLinear(linear, 4, 32, symmetric).dequantized()
    assert (weight[0] == 0).all()
    assert weight[1].abs().max() < 1e-4
    torch.testing.assert_close(weight[2:], linear.weight[2:].detach(), rtol=1e-3, atol=0)


def test_packed_layer_keeps_the_type_of_its_input():
    packed = kernels.PackedLinear(layer(bias=False), 4, 16)
    assert packed(random(2, 64).bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize("bits", [1, 9, 16, 0])
def test_packed_layer_refuses_other_bits(bits):
    with pytest.raises(ValueError, match=f"bits must be from 2 to 8, not {bits}"):
        kernels.PackedLinear(layer(), bits, 16)


@pytest.mark.parametrize("group_size", [0, -16, 128])
def test_packed_layer_refuses_other_group_sizes(group_size):
    message = f"group_size must be from 1 to the 64 inputs, not {group_size}"
    with pytest.raises(ValueError, match=message):
        kernels.PackedLinear(layer(), 4, group_size)


def test_packed_layer_takes_a_shorter_last_group():
    linear, x = layer(bias=False), random(3, 64)
    packed = kernels.PackedLinear(linear, 4, 24)
    assert packed.scale.shape == (24, 3, 1)
    tail = kernels.PackedLinear(nn.Linear(16, 24, bias=False), 4, 16)
    assert packed.codes.shape == (24, 32)
    assert tail.codes.shape == (24, 8)
    grid = quant.group_qparams(linear.weight.detach()[:, 48:], 16)
    assert torch.equal(packed.scale[:, 2:].float(), grid[0])
    torch.testing.assert_close(packed(x), x @ packed.dequantized().T)


@pytest.mark.parametrize("symmetric", [True, False])
def test_packed_layer_keeps_a_weight_that_lies_on_the_grid_it_is_given(symmetric):
    linear = layer(bias=False)
    grid = quant.group_qparams(linear.weight.detach(), 24, 4, symmetric, torch.ones(64))
    codes = quant.quantize_groups(linear.weight.detach(), *grid, 24, 4, symmetric)
    codes[:, ::5] = 3  # not the nearest: what GPTQ may choose
    linear.weight = nn.Parameter(quant.dequantize_groups(codes, *grid, 24))
    packed = kernels.PackedLinear(linear, 4, 24, symmetric, grid)
    assert torch.equal(packed.dequantized(), linear.weight.detach())


# Groups and GPTQ


def activations(tokens: int = 400, inputs: int = 48, seed: int = 5) -> torch.Tensor:
    """Return correlated activations with a few large inputs, as a language model has them."""
    x = random(tokens, inputs, seed=seed) @ random(inputs, inputs, seed=seed + 1)
    x[:, ::11] *= 20
    return x


def output_error(weight, approximation, hessian) -> float:
    difference = (approximation - weight).double()
    return ((difference @ hessian.double()) * difference).sum().item()


def both_ways(weight, hessian, group_size, symmetric, **options):
    """Return the weight rounded to nearest and by GPTQ, on the same grid."""
    grid = quant.group_qparams(weight, group_size, 4, symmetric)
    codes = quant.gptq(weight, hessian, *grid, group_size, symmetric=symmetric, **options)
    nearest = quant.quantize_groups(weight, *grid, group_size, 4, symmetric)
    assert codes.dtype == nearest.dtype
    return [quant.dequantize_groups(c, *grid, group_size) for c in (nearest, codes)]


def test_groups_cut_rows_and_the_last_one_is_filled_with_zeros():
    weight = random(3, 10)
    groups = quant.to_groups(weight, 4)
    assert groups.shape == (3, 3, 4)
    assert torch.equal(groups.flatten(1)[:, :10], weight)
    assert (groups[:, 2, 2:] == 0).all()
    tail = quant.choose_qparams(groups, 4, dim=-1)[0][:, 2]
    assert torch.equal(tail, quant.choose_qparams(weight[:, 8:], 4, dim=-1)[0])


@pytest.mark.parametrize("group_size", [0, -4, 11])
def test_groups_refuse_other_sizes(group_size):
    message = f"group_size must be from 1 to the 10 inputs, not {group_size}"
    with pytest.raises(ValueError, match=message):
        quant.to_groups(random(3, 10), group_size)
    with pytest.raises(ValueError, match=r"weight must be \(out, in\), not of shape \(10,\)"):
        quant.to_groups(random(10), 2)


def test_a_weight_in_groups_is_rounded_group_by_group():
    weight = random(6, 20)
    grid = quant.group_qparams(weight, 8)
    codes = quant.quantize_groups(weight, *grid, 8)
    restored = quant.dequantize_groups(codes, *grid, 8)
    assert codes.shape == restored.shape == (6, 20)
    for part, group in ((slice(0, 8), 0), (slice(8, 16), 1), (slice(16, 20), 2)):
        scale, zero_point = (x[:, group] for x in grid)
        expected = quant.quantize(weight[:, part], scale, zero_point, 4)
        assert torch.equal(codes[:, part], expected)
        assert torch.equal(restored[:, part], quant.dequantize(expected, scale, zero_point))


def test_scales_of_groups_are_what_fp16_stores():
    scale, zero_point = quant.group_qparams(random(6, 20), 8)
    exact, expected = quant.choose_qparams(quant.to_groups(random(6, 20), 8), 4, dim=-1)
    assert torch.equal(scale.half().float(), scale)
    torch.testing.assert_close(scale, exact, rtol=5e-4, atol=0)
    assert torch.equal(zero_point, expected)
    assert (quant.group_qparams(torch.zeros(2, 8), 4)[0] > 0).all()
    with pytest.raises(ValueError, match=r"scale: 1\.\d+e\+06 is too large for FP16"):
        quant.group_qparams(torch.tensor([[0.0, 2e7]]), 2)


@pytest.mark.parametrize("symmetric", [True, False])
def test_the_clipping_search_finds_what_brute_force_finds(symmetric):
    weight, importance = random(5, 256), torch.rand(256) + 0.1

    def errors(grid):
        codes = quant.quantize_groups(weight, *grid, 128, 4, symmetric)
        error = quant.dequantize_groups(codes, *grid, 128) - weight
        return (error**2 * importance).unflatten(1, (2, 128)).sum(-1)

    found = errors(quant.group_qparams(weight, 128, 4, symmetric, importance, steps=6))
    shrinks = (1, 0.9, 0.8, 0.7, 0.6, 0.5)
    tried = [errors(quant.group_qparams(weight * r, 128, 4, symmetric)) for r in shrinks]
    torch.testing.assert_close(found, torch.stack(tried).amin(0), rtol=1e-3, atol=0)
    assert (found < tried[0]).any()


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group_size", [16, 20, 48])
def test_gptq_with_an_identity_hessian_is_rounding_to_nearest(group_size, symmetric):
    nearest, got = both_ways(random(8, 48), torch.eye(48), group_size, symmetric)
    assert torch.equal(nearest, got)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group_size", [16, 20, 48])
@pytest.mark.parametrize("seed", range(4))
def test_gptq_lowers_the_output_error(seed, group_size, symmetric):
    x, weight = activations(seed=10 * seed), random(32, 48, seed=seed)
    hessian = x.T @ x / len(x)
    nearest, got = both_ways(weight, hessian, group_size, symmetric)
    assert output_error(weight, got, hessian) < 0.9 * output_error(weight, nearest, hessian)


@pytest.mark.parametrize("order_matters", [False, True])
def test_gptq_equals_the_column_by_column_definition(order_matters):
    # Optimal brain quantization, written out: after each input, the best update of those left.
    weight, x = random(4, 12, seed=3).double(), activations(60, 12).double()
    if order_matters:
        x = x * torch.linspace(1, 3, 12).double()
    hessian = x.T @ x / len(x)
    scale, zero_point = quant.choose_qparams(weight.float().unsqueeze(1), 4, dim=-1)
    got = quant.gptq(weight.float(), hessian.float(), scale, zero_point, 12)
    damped = hessian + 0.01 * hessian.diagonal().mean() * torch.eye(12)
    left, current = hessian.diagonal().argsort(descending=True).tolist(), weight.clone()
    s, z = scale[:, 0, 0].double(), zero_point[:, 0, 0].double()
    while left:
        inverse = torch.linalg.inv(damped[left][:, left])
        code = ((current[:, left[0]] / s).round() + z).clamp(0, 15)
        assert torch.equal(code.to(torch.uint8), got[:, left[0]])
        error = (current[:, left[0]] - (code - z) * s) / inverse[0, 0]
        current[:, left] -= torch.outer(error, inverse[0])
        left = left[1:]


def test_gptq_rounds_dead_inputs_to_nearest():
    x = activations()
    x[:, [3, 30]] = 0
    nearest, got = both_ways(random(8, 48), x.T @ x, 16, False)
    assert torch.equal(got[:, [3, 30]], nearest[:, [3, 30]])
    assert torch.isfinite(got).all()
    nearest, got = both_ways(random(8, 48), torch.zeros(48, 48), 16, False)
    assert torch.equal(got, nearest)


def test_gptq_refuses_what_it_cannot_use():
    weight = random(8, 48)
    bad = torch.eye(48)
    bad[0, 1] = math.nan
    for hessian in (bad, torch.eye(47)):
        with pytest.raises(ValueError, match=r"hessian must be \(48, 48\) and finite"):
            both_ways(weight, hessian, 16, False)
    with pytest.raises(ValueError, match=r"damping must be above 0, for example 0\.01, not 0"):
        both_ways(weight, torch.eye(48), 16, False, damping=0)
    weight[0, 0] = math.nan
    with pytest.raises(ValueError, match="x holds 1 NaN or infinite value"):
        quant.gptq(weight, torch.eye(48), torch.ones(8, 1, 1), torch.zeros(8, 1, 1), 48)
