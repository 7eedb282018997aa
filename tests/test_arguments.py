"""What the quantizers refuse: grids, Hessians and weights of errors that do not belong together."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from labkit import quant


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def rounders(weight, hessian):
    """Every way to put a weight on a grid in groups, as functions of the grid and its terms."""
    return {
        "gptq": lambda grid, size, bits, symmetric: quant.gptq(
            weight, hessian, *grid, size, bits, symmetric
        ),
        "quantize_groups": lambda grid, size, bits, symmetric: quant.quantize_groups(
            weight, *grid, size, bits, symmetric
        ),
    }


@given(
    st.integers(1, 40),
    st.integers(1, 40),
    st.sampled_from([2, 3, 4, 8]),
    st.booleans(),
    st.booleans(),
)
@settings(max_examples=150)
def test_a_grid_of_other_groups_or_another_symmetry_is_refused(own, other, bits, sym, other_sym):
    weight = random(6, 40)
    grid = quant.group_qparams(weight, own, bits, sym)
    fits = -(-40 // own) == -(-40 // other) and sym == other_sym
    for name, rounder in rounders(weight, torch.eye(40)).items():
        if fits:
            assert rounder(grid, other, bits, other_sym).shape == (6, 40), name
            continue
        with pytest.raises(ValueError, match=r"group_size|symmetric"):
            rounder(grid, other, bits, other_sym)
    codes = torch.zeros(6, 40, dtype=torch.uint8)
    single = quant.dequantize_groups(codes, grid[0], torch.tensor(8.0), own)
    assert torch.equal(single, -8 * grid[0].repeat_interleave(own, 1)[:, :40, 0])
    if -(-40 // own) != -(-40 // other):
        with pytest.raises(ValueError, match="group_size"):
            quant.dequantize_groups(codes, *grid, other)


def test_the_grid_of_a_weight_of_one_sign_is_taken_for_either_symmetry():
    weight = random(4, 8).abs()
    grid = quant.group_qparams(weight, 4, 4, symmetric=True)
    for symmetric in (True, False):
        codes = quant.quantize_groups(weight, *grid, 4, 4, symmetric)
        back = quant.dequantize_groups(codes, *grid, 4)
        assert (back - weight).abs().max() <= grid[0].max()


@pytest.mark.parametrize(
    "shape", [(8,), (8, 1), (1, 8), (8, 8), (8, 1, 1), (1, 2, 1), (8, 2, 8), (8, 2), (1, 1, 1), ()]
)
def test_a_grid_of_another_shape_is_refused_for_a_square_weight(shape):
    weight, hessian = random(8, 8), torch.eye(8)
    scale, zero_point = quant.group_qparams(weight, 4)
    assert scale.shape == (8, 2, 1)
    for rounder in rounders(weight, hessian).values():
        for grid in ((torch.ones(shape), zero_point), (scale, torch.zeros(shape))):
            with pytest.raises(ValueError, match=r"(scale|zero_point) must be \(8, 2, 1\)"):
                rounder(grid, 4, 4, False)
    codes = torch.zeros(8, 8, dtype=torch.uint8)
    with pytest.raises(ValueError, match=r"scale must be \(8, 2, 1\)"):
        quant.dequantize_groups(codes, torch.ones(shape), zero_point, 4)


def right_for(x: torch.Tensor, shape: tuple[int, ...]) -> bool:
    if math.prod(shape) == 1:
        return len(shape) <= x.ndim
    return len(shape) == x.ndim and all(a in (1, b) for a, b in zip(shape, x.shape, strict=True))


@given(
    st.lists(st.integers(1, 3), min_size=1, max_size=3),
    st.lists(st.integers(1, 3), min_size=0, max_size=3),
)
@settings(max_examples=200)
def test_scale_and_zero_point_have_the_dimensions_of_the_values(shape, part):
    x, part = random(*shape), tuple(part)
    one, codes = torch.tensor(1.0), torch.zeros(shape, dtype=torch.uint8)
    for scale, zero_point in ((torch.ones(part), one), (one, torch.ones(part))):
        calls = (
            lambda s=scale, z=zero_point: quant.quantize(x, s, z, 4),
            lambda s=scale, z=zero_point: quant.dequantize(codes, s, z),
            lambda s=scale, z=zero_point: quant.round_to_grid(x, s, z, 4),
        )
        for call in calls:
            if right_for(x, part):
                call()
                continue
            with pytest.raises(ValueError, match=r"(scale|zero_point) of shape .* does not fit"):
                call()


def test_the_scales_of_rows_do_not_broadcast_along_the_columns():
    weight = random(8, 8)
    scale, zero_point = quant.choose_qparams(weight, 4, dim=1)
    with pytest.raises(ValueError, match=r"scale of shape \(8,\) does not fit .*\(8, 8\)"):
        quant.quantize(weight, scale[:, 0], zero_point[:, 0], 4)


@pytest.mark.parametrize("bad", [0.0, -1.0, math.nan, math.inf])
def test_scales_must_be_positive_and_finite(bad):
    weight, (scale, zero_point) = random(4, 8), quant.group_qparams(random(4, 8), 4)
    scale[2, 1] = bad
    for rounder in rounders(weight, torch.eye(8)).values():
        with pytest.raises(ValueError, match="scale must be positive and finite"):
            rounder((scale, zero_point), 4, 4, False)
    with pytest.raises(ValueError, match="scale must be positive and finite"):
        quant.quantize(weight, torch.tensor(bad), torch.tensor(0.0))


@pytest.mark.parametrize("bad", [-1.0, 16.0, 2.5, math.nan, math.inf])
def test_zero_points_must_be_codes_of_the_grid(bad):
    weight, (scale, zero_point) = random(4, 8), quant.group_qparams(random(4, 8), 4)
    zero_point[2, 1] = bad
    for rounder in rounders(weight, torch.eye(8)).values():
        with pytest.raises(ValueError, match="zero_point must hold integers from 0 to 15"):
            rounder((scale, zero_point), 4, 4, False)
    with pytest.raises(ValueError, match="zero_point must hold integers from 0 to 0 on a sym"):
        quant.quantize(weight, torch.tensor(1.0), torch.tensor(3.0), 4, symmetric=True)


def test_a_grid_of_more_bits_is_refused():
    weight = random(6, 40)
    for rounder in rounders(weight, torch.eye(40)).values():
        with pytest.raises(ValueError, match="zero_point must hold integers from 0 to 7"):
            rounder(quant.group_qparams(weight, 8, 4), 8, 3, False)


@pytest.mark.parametrize("scale", [1.0, None, [1.0]])
def test_a_scale_that_is_no_tensor_is_refused(scale):
    with pytest.raises(TypeError, match="scale and zero_point must be tensors"):
        quant.quantize(random(3), scale, torch.tensor(0.0))
    for rounder in rounders(random(4, 8), torch.eye(8)).values():
        with pytest.raises(ValueError, match=r"scale must be \(4, 2, 1\)"):
            rounder((scale, torch.zeros(4, 2, 1)), 4, 4, False)


def test_gptq_takes_the_grid_in_the_dtypes_it_is_stored_in():
    weight, x = random(8, 48), random(200, 48, seed=1)
    scale, zero_point = grid = quant.group_qparams(weight, 16)
    expected = quant.gptq(weight, x.T @ x, *grid, 16)
    stored = scale.half(), zero_point.to(torch.uint8)
    assert torch.equal(quant.gptq(weight, x.T @ x, *stored, 16), expected)


@pytest.mark.parametrize("symmetric", [True, False])
def test_importance_is_one_value_an_input(symmetric):
    weight = random(8, 8)
    for wrong in (torch.ones(7), torch.ones(9), torch.ones(1), torch.ones(8, 1), torch.ones(1, 8)):
        with pytest.raises(ValueError, match=r"importance must be a tensor \(8,\)"):
            quant.group_qparams(weight, 4, 4, symmetric, wrong)
    with pytest.raises(ValueError, match=r"importance must be a tensor \(8,\).*not list"):
        quant.group_qparams(weight, 4, 4, symmetric, [1.0] * 8)
    for bad in (math.nan, math.inf, -1e-9):
        importance = torch.ones(8)
        importance[5] = bad
        with pytest.raises(ValueError, match="importance must be finite and not negative"):
            quant.group_qparams(weight, 4, 4, symmetric, importance)
    full = quant.group_qparams(weight, 4, 4, symmetric)
    for a, b in zip(
        full, quant.group_qparams(weight, 4, 4, symmetric, torch.zeros(8)), strict=True
    ):
        assert torch.equal(a, b)


@pytest.mark.parametrize("steps", [0, -1, 1.5, True, None])
def test_steps_of_the_search_are_counted(steps):
    with pytest.raises(ValueError, match="steps must be an integer from 1 up, not"):
        quant.group_qparams(random(4, 8), 4, importance=torch.ones(8), steps=steps)


@pytest.mark.parametrize("size", [4.0, True, None, "4"])
def test_group_sizes_are_integers(size):
    weight, grid = random(4, 8), quant.group_qparams(random(4, 8), 4)
    for call in (
        lambda: quant.to_groups(weight, size),
        lambda: quant.group_qparams(weight, size),
        lambda: quant.quantize_groups(weight, *grid, size),
        lambda: quant.dequantize_groups(weight, *grid, size),
        lambda: quant.gptq(weight, torch.eye(8), *grid, size),
    ):
        with pytest.raises(TypeError, match="group_size must be an integer"):
            call()


@pytest.mark.parametrize("shape", [(8,), (1, 8), (8, 1), (7, 7), (9, 9), (4, 8), (8, 8, 8), (1, 1)])
def test_a_hessian_of_another_shape_is_refused(shape):
    weight = random(4, 8)
    with pytest.raises(ValueError, match=r"hessian must be \(8, 8\) and finite"):
        quant.gptq(weight, torch.ones(shape), *quant.group_qparams(weight, 4), 4)
    if len(shape) != 2 or shape[0] != shape[1]:
        with pytest.raises(ValueError, match="hessian must be"):
            quant.inverse_factor(torch.ones(shape), 0.01)


@pytest.mark.parametrize(
    ("at", "bad"),
    [((0, 1), math.nan), ((3, 3), math.inf), ((2, 2), -1.0), ((0, 1), 1.0), ((5, 2), -0.01)],
)
def test_a_hessian_that_is_no_mean_of_squares_is_refused(at, bad):
    weight, hessian = random(4, 8), torch.eye(8)
    hessian[at] = bad
    with pytest.raises(ValueError, match="hessian must"):
        quant.gptq(weight, hessian, *quant.group_qparams(weight, 4), 4)
    with pytest.raises(ValueError, match="hessian must"):
        quant.inverse_factor(hessian, 0.01)


@pytest.mark.parametrize("damping", [0, -0.1, math.nan, math.inf])
def test_damping_is_above_zero(damping):
    with pytest.raises(ValueError, match="damping must be above 0"):
        quant.inverse_factor(torch.eye(4), damping)


def test_a_weight_that_is_no_matrix_is_refused():
    grid = torch.ones(8, 1, 1), torch.zeros(8, 1, 1)
    for weight in (random(8), random(2, 4, 8)):
        for rounder in rounders(weight, torch.eye(8)).values():
            with pytest.raises(ValueError, match=r"weight must be \(out, in\)"):
                rounder(grid, 8, 4, False)


def test_nothing_is_changed_by_what_is_refused():
    weight, hessian = random(8, 8), torch.eye(8)
    before = weight.clone()
    for rounder in rounders(weight, hessian).values():
        with pytest.raises(ValueError, match="group_size"):
            rounder(quant.group_qparams(weight, 4), 8, 4, False)
    assert torch.equal(weight, before)
    assert torch.equal(hessian, torch.eye(8))
