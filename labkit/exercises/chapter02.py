"""Chapter 2: checks, known wrong answers and correct variants.

Each wrong answer's docstring names the misconception; the text beside it is what a learner reads.
References are numpy and float64 linear algebra by the definition, never labkit.
"""

import math

import numpy as np
import torch

from labkit.exercises import Exercise, call, judge, kind, misfit, show

# 2.1 ------------------------------------------------------------------------------------------


def _check_percentile(function) -> None:
    random = torch.Generator().manual_seed(21)
    cases = [(torch.arange(101.0), 90.0), (torch.arange(-100.0, 1), 90.0), (-torch.ones(1), 99.0)]
    cases += [(torch.tensor([5.0, 6.0, 9.0]), 50.0), (torch.tensor([-4.0, 2.0, 1.0, -3.0]), 50.0)]
    for percent, shape in ((100.0, (7,)), (99.0, (4, 50)), (99.9, (30, 200)), (80.0, (2, 3, 40))):
        for shift in (0.0, 3.0, -2.0):
            cases.append((torch.randn(shape, generator=random) ** 3 + shift, percent))
    judge("percentile_range", function, cases, _examine_percentile, _WRONG_PERCENTILE)


def _examine_percentile(x, percent, got) -> str | None:
    written = call("percentile_range", x, percent)
    pair = isinstance(got, tuple | list) and len(got) == 2
    if not pair or not all(isinstance(end, float | np.floating) for end in got):
        came = f"({', '.join(map(kind, got))})" if pair else kind(got)
        return f"{written} returns {came}, expected a pair of floats (low, high)"
    low, high = np.percentile(x.double().numpy(), [50 - percent / 2, 50 + percent / 2])
    expected = min(low, 0.0), max(high, 0.0)
    close = 1e-4 * max(1e-30, expected[1] - expected[0])
    if all(abs(a - b) <= close for a, b in zip(got, expected, strict=True)):
        return None
    return f"{written} gives {show(tuple(got))}, expected {show(expected)}"


def _ends(x, low, high, zero=True):
    low, high = (float(np.quantile(x.double().numpy(), q)) for q in (low, high))
    return (min(low, 0.0), max(high, 0.0)) if zero else (low, high)


def whole_tail_at_each_end(x, percent):
    """Cuts 100 − percent off each end."""
    tail = min(0.5, 1 - percent / 100)
    return _ends(x, tail, 1 - tail)


def upper_end_only(x, percent):
    """Keeps the minimum and cuts at the top."""
    return _ends(x, 0, percent / 100)


def percentile_without_zero(x, percent):
    """Leaves zero outside where all values have one sign."""
    return _ends(x, 0.5 - percent / 200, 0.5 + percent / 200, zero=False)


def magnitudes(x, percent):
    """Takes the percentile of |x| and mirrors it."""
    high = float(np.quantile(x.abs().double().numpy(), percent / 100))
    return -high, high


def minimum_and_maximum(x, percent):
    """Ignores the percentage."""
    return _ends(x, 0, 1)


def share_of_the_range(x, percent):
    """Shrinks the range by the percentage, whatever the values in it."""
    low, high = _ends(x, 0, 1)
    return low * percent / 100, high * percent / 100


_WRONG_PERCENTILE = (
    (whole_tail_at_each_end, "what is left out is shared by two ends: (100 − percent) / 2 each"),
    (upper_end_only, "the lower end has a tail too"),
    (percentile_without_zero, "zero must be inside the range: it has to be a grid point"),
    (magnitudes, "a range of |x| is symmetric; cut the two ends of x itself"),
    (minimum_and_maximum, "this is min-max: the percentage has no effect"),
    (share_of_the_range, "a percentile counts values; this shrinks the range instead"),
)


def percentile_by_sorting(x, percent):
    """Sorts, and interpolates between neighbors."""
    values, ends = sorted(x.flatten().tolist()), []
    for fraction in (0.5 - percent / 200, 0.5 + percent / 200):
        place = min(max(fraction, 0.0), 1.0) * (len(values) - 1)
        below, above = values[math.floor(place)], values[math.ceil(place)]
        ends.append(below + (place - math.floor(place)) * (above - below))
    return min(0.0, ends[0]), max(0.0, ends[1])


def percentile_with_numpy(x, percent):
    """Asks numpy for percentiles, with a zero clamped in."""
    low, high = np.percentile(x.numpy().astype(np.float64), [50 - percent / 2, 50 + percent / 2])
    return np.minimum(low, 0.0), np.maximum(high, 0.0)


# 2.2 ------------------------------------------------------------------------------------------


def _check_smooth(function) -> None:
    random = torch.Generator().manual_seed(22)
    x = torch.tensor([[8.0, -1.0], [-2.0, 0.5]])
    cases = [(x, torch.tensor([[2.0, 4.0]]), torch.tensor([[0.5, -9.0]]), 0.5)]
    cases += [(x, torch.tensor([[2.0, 0.0]]), torch.tensor([[-0.5, 0.0]]), 0.75)]
    cases += [(torch.tensor([[0.0, 3.0]]), torch.tensor([[1.0, 2]]), torch.tensor([[4.0, 1]]), 1.0)]
    for tokens, inputs, rows, alpha in ((6, 4, 4, 0.5), (9, 16, 3, 0.8), (40, 32, 24, 0.3)):
        x = torch.randn(tokens, inputs, generator=random)
        x[:, 1] *= 60
        weights = (torch.randn(n, inputs, generator=random) for n in (rows, rows + 2))
        cases.append((x, *weights, alpha))
    judge("smooth_pair", function, cases, _examine_smooth, _WRONG_SMOOTH)


def _examine_smooth(x, first, second, alpha, got) -> str | None:
    written = call("smooth_pair", x, first, second, alpha)
    if not isinstance(got, tuple | list) or len(got) != 3:
        return f"{written} returns {kind(got)}, expected the triple (x, first, second)"
    names = ("x", "first", "second")
    for name, value, like in zip(names, got, (x, first, second), strict=True):
        if complaint := misfit(value, torch.float32, like.shape):
            return f"in {written}, {name} is {complaint}"
    rows = np.concatenate([first.numpy(), second.numpy()]).astype(np.float64)
    peak, reach = (np.maximum(np.abs(a).max(0), 1e-5) for a in (x.double().numpy(), rows))
    s = torch.from_numpy(peak**alpha / reach ** (1 - alpha))
    wanted = x.double() / s, first.double() * s, second.double() * s
    for name, value, true in zip(names, got, wanted, strict=True):
        wrong = ~((value - true).abs() <= 1e-3 * true.abs() + 1e-9)
        if wrong.any():
            place = tuple(wrong.nonzero()[0].tolist())
            numbers = f"{show(value[place].item())}, expected {show(true[place].item())}"
            return f"in {written}, {name}{list(place)} is {numbers}"
    return None


def _smooth(x, first, second, alpha, peak=None, reach=None, floor=1e-5):
    peak = x.abs().amax(0) if peak is None else peak
    reach = torch.cat([first, second]).abs().amax(0) if reach is None else reach
    s = peak.clamp(min=floor) ** alpha / reach.clamp(min=floor) ** (1 - alpha)
    return x / s, first * s, second * s


def weights_of_the_first_only(x, first, second, alpha):
    """Takes the reach of the first weight alone."""
    return _smooth(x, first, second, alpha, reach=first.abs().amax(0))


def a_factor_for_each_weight(x, first, second, alpha):
    """Gives each weight its own factor, so the second product changes."""
    own = _smooth(x, second, second, alpha)
    return *_smooth(x, first, first, alpha)[:2], own[1]


def alpha_swapped(x, first, second, alpha):
    """Exchanges alpha and 1 − alpha."""
    return _smooth(x, first, second, 1 - alpha)


def multiplied_instead(x, first, second, alpha):
    """Multiplies the activations and divides the weights."""
    divided, *_ = _smooth(x, first, second, alpha)
    s = _smooth(torch.ones_like(x), first, second, alpha, peak=x.abs().amax(0))[0][:1].reciprocal()
    return x * x / divided, first / s, second / s


def signed_maximum(x, first, second, alpha):
    """Forgets the absolute values."""
    return _smooth(x, first, second, alpha, x.amax(0), torch.cat([first, second]).amax(0))


def mean_magnitude(x, first, second, alpha):
    """Takes mean magnitudes, as AWQ does."""
    return _smooth(x, first, second, alpha, peak=x.abs().mean(0))


def activations_left_alone(x, first, second, alpha):
    """Scales the weights and forgets the activations."""
    return x.clone(), *_smooth(x, first, second, alpha)[1:]


def dead_channel_divides(x, first, second, alpha):
    """Leaves out the clamp."""
    return _smooth(x, first, second, alpha, floor=0.0)


_WRONG_SMOOTH = (
    (weights_of_the_first_only, "the maximum runs over the rows of both weights"),
    (a_factor_for_each_weight, "both layers read the same x, so they share one factor"),
    (alpha_swapped, "alpha is the exponent of the activations, 1 − alpha that of the weights"),
    (multiplied_instead, "the activations are divided and the weights multiplied"),
    (signed_maximum, "take the largest magnitude: a channel may peak below zero"),
    (mean_magnitude, "SmoothQuant takes the peak of a channel; the mean is AWQ's choice"),
    (activations_left_alone, "divide the activations too, or the products change"),
    (dead_channel_divides, "a channel of zeros gives a factor of 0 or infinity: clamp the maxima"),
)


def smooth_channel_by_channel(x, first, second, alpha):
    """Goes through the channels in float64."""
    parts = [t.double().clone() for t in (x, first, second)]
    for j in range(x.shape[1]):
        peak = max(1e-5, x[:, j].abs().max().item())
        reach = max(1e-5, first[:, j].abs().max().item(), second[:, j].abs().max().item())
        s = peak**alpha * reach ** (alpha - 1)
        parts[0][:, j] /= s
        parts[1][:, j] *= s
        parts[2][:, j] *= s
    return [part.float() for part in parts]


def smooth_by_logarithms(x, first, second, alpha):
    """Works with logarithms and a diagonal matrix."""
    reach = torch.maximum(first.abs().max(0).values, second.abs().max(0).values)
    peak = x.abs().max(0).values
    s = alpha * torch.log(peak.clamp_min(1e-5)) - (1 - alpha) * torch.log(reach.clamp_min(1e-5))
    return x @ torch.diag(torch.exp(-s)), first @ torch.diag(s.exp()), second @ torch.diag(s.exp())


# 2.3 ------------------------------------------------------------------------------------------


def broken_compensate(weight, hessian, scale):
    """Round column by column; later columns make up for each error. Two bugs."""
    left = weight.clone()
    rounded = torch.zeros_like(weight)
    factor = torch.linalg.cholesky(hessian, upper=True)
    limit = 2**3 - 1
    for j in range(weight.shape[1]):
        codes = (weight[:, j] / scale[:, 0]).round().clamp(-limit, limit)
        rounded[:, j] = codes * scale[:, 0]
        error = (left[:, j] - rounded[:, j]) / factor[j, j]
        left[:, j + 1 :] -= torch.outer(error, factor[j, j + 1 :])
    return rounded


def _check_compensate(function) -> None:
    random = torch.Generator().manual_seed(23)
    hessian = torch.tensor([[1.0, 0.9], [0.9, 1.0]])
    cases = [(torch.tensor([[1.4, 1.4]]), hessian, torch.ones(1, 1))]
    cases += [(torch.tensor([[0.4, 9.0, 2.2]]), torch.eye(3), torch.ones(1, 1))]
    for rows, inputs in ((2, 3), (4, 8), (8, 24), (16, 40)):
        x = torch.randn(4 * inputs, inputs, generator=random)
        x = x @ torch.randn(inputs, inputs, generator=random)
        hessian = x.T @ x / len(x)
        hessian += 0.05 * hessian.diagonal().mean() * torch.eye(inputs)
        weight = torch.randn(rows, inputs, generator=random)
        cases.append((weight, hessian, weight.abs().amax(1, keepdim=True) / 7))
    judge("compensate", function, cases, _examine_compensate, _WRONG_COMPENSATE)


def _examine_compensate(weight, hessian, scale, got) -> str | None:
    written = call("compensate", weight, hessian, scale)
    if complaint := misfit(got, torch.float32, weight.shape):
        return f"{written} returns {complaint}"
    expected = compensate_by_definition(weight, hessian, scale)
    off = (got - expected).abs() > 1e-3 * scale
    if off.double().mean() <= 0.02:  # a tie may fall to either side, and moves what follows
        return None
    if weight.numel() <= 4:
        return f"{written} gives {show(got)}, expected {show(expected)}"
    errors = []
    for rounded in (got, expected):
        difference = (rounded - weight).double()
        errors.append(((difference @ hessian.double()) * difference).sum().item())
    return f"{written} has the output error {show(errors[0])}, expected {show(errors[1])}"


def compensate_by_definition(weight, hessian, scale):
    """After each column, solves for the best change of all columns still to come, in float64."""
    left, scale = weight.double().clone(), scale.double()
    hessian, rounded = hessian.double(), torch.zeros_like(left)
    for j in range(weight.shape[1]):
        rounded[:, j] = (left[:, j] / scale[:, 0]).round().clamp(-7, 7) * scale[:, 0]
        error = (rounded[:, j] - left[:, j])[:, None]
        later = slice(j + 1, None)
        left[:, later] -= (
            error @ torch.linalg.solve(hessian[later, later], hessian[later, j : j + 1]).T
        )
    return rounded.float()


def _compensate(weight, hessian, scale, current=True, sign=1.0, spread=lambda h: h, whole=True):
    left, rounded = weight.clone(), torch.zeros_like(weight)
    factor = spread(hessian)
    for j in range(weight.shape[1]):
        column = left[:, j] if current else weight[:, j]
        rounded[:, j] = (column / scale[:, 0]).round().clamp(-7, 7) * scale[:, 0]
        error = (left[:, j] - rounded[:, j]) / (factor[j, j] if whole else 1)
        left[:, j + 1 :] -= sign * torch.outer(error, factor[j, j + 1 :])
    return rounded


def _factor_of_inverse(hessian):
    return torch.linalg.cholesky(torch.linalg.inv(hessian), upper=True)


def still_rounding_the_original(weight, hessian, scale):
    """Mends the matrix; still rounds the uncorrected column."""
    return _compensate(weight, hessian, scale, current=False, spread=_factor_of_inverse)


def still_the_hessian_itself(weight, hessian, scale):
    """Rounds the corrected column; still spreads by the factor of the Hessian."""
    factor = torch.linalg.cholesky(hessian, upper=True)
    return _compensate(weight, hessian, scale, spread=lambda h: factor)


def spread_with_the_wrong_sign(weight, hessian, scale):
    """Adds the correction where it should be subtracted."""
    return _compensate(weight, hessian, scale, sign=-1.0, spread=_factor_of_inverse)


def not_divided_by_the_diagonal(weight, hessian, scale):
    """Spreads the plain error, not the error over the diagonal entry."""
    return _compensate(weight, hessian, scale, spread=_factor_of_inverse, whole=False)


def inverse_without_its_factor(weight, hessian, scale):
    """Takes rows of the inverse itself, which still holds the columns already rounded."""
    return _compensate(weight, hessian, scale, spread=torch.linalg.inv)


_WRONG_COMPENSATE = (
    (still_rounding_the_original, "one bug left: it rounds the column as it was, not as corrected"),
    (still_the_hessian_itself, "one bug left: errors spread by the factor of the inverse Hessian"),
    (spread_with_the_wrong_sign, "the correction is subtracted; adding it doubles the error"),
    (
        not_divided_by_the_diagonal,
        "the error of a column is divided by the factor's diagonal entry",
    ),
    (
        inverse_without_its_factor,
        "the inverse still counts finished columns; take its Cholesky factor",
    ),
)


def compensate_by_shrinking_inverse(weight, hessian, scale):
    """Eliminates each finished column from the inverse, as optimal brain surgery does."""
    left, inverse = weight.double().clone(), torch.linalg.inv(hessian.double())
    rounded = torch.zeros_like(weight)
    for j in range(weight.shape[1]):
        value = (left[:, j] / scale[:, 0]).round().clamp(-7, 7) * scale[:, 0].double()
        left -= torch.outer((left[:, j] - value) / inverse[j, j], inverse[j])
        inverse = inverse - torch.outer(inverse[:, j], inverse[j]) / inverse[j, j]
        rounded[:, j] = value.float()
    return rounded


# 2.4 ------------------------------------------------------------------------------------------

# Dettmers et al., "QLoRA", arXiv 2305.14314, appendix E, to six digits.
_POSITIVE = (0.079580, 0.160930, 0.246112, 0.337915, 0.440710, 0.562617, 0.722957, 1.0)
_NEGATIVE = (-1.0, -0.696193, -0.525073, -0.394917, -0.284441, -0.184773, -0.091050)
NF4_LEVELS = torch.tensor((*_NEGATIVE, 0.0, *_POSITIVE))


def _check_nf4(function) -> None:
    random = torch.Generator().manual_seed(24)
    cases = [
        (torch.tensor([[0.0, 2.0, -2.0, 0.1]]), NF4_LEVELS, 4),
        (torch.tensor([[0.6, 1.0, -8.0, 3.0]]), NF4_LEVELS, 2),
        (torch.zeros(1, 4), NF4_LEVELS, 2),
        (torch.tensor([[-3.0, -1.0, 0.0, 0.0]]), NF4_LEVELS, 2),
    ]
    for rows, inputs, size in ((1, 8, 8), (4, 32, 8), (6, 128, 64), (16, 192, 32)):
        weight = torch.randn(rows, inputs, generator=random)
        weight *= torch.logspace(-3, 1, rows)[:, None] if rows > 1 else 1
        cases.append((weight, NF4_LEVELS, size))
    judge("nf4", function, cases, _examine_nf4, _WRONG_NF4)


def _examine_nf4(weight, levels, block_size, got) -> str | None:
    of = show(weight) if weight.numel() <= 8 else f"a weight of shape {tuple(weight.shape)}"
    if not isinstance(got, tuple | list) or len(got) != 2:
        return f"nf4 returns {kind(got)}, expected the pair (packed, scale)"
    rows, inputs = weight.shape
    wanted = (torch.uint8, (rows, inputs // 2)), (torch.float32, (rows, inputs // block_size))
    for name, value, form in zip(("packed", "scale"), got, wanted, strict=True):
        if complaint := misfit(value, *form):
            return f"for {of} in blocks of {block_size}, {name} is {complaint}"
    blocks = weight.double().numpy().reshape(rows, -1, block_size)
    true_scale, scale = np.abs(blocks).max(2), got[1].double().numpy()
    if not np.allclose(scale, true_scale, rtol=1e-4, atol=1e-30):
        at = tuple(np.argwhere(~np.isclose(scale, true_scale, rtol=1e-4))[0])
        numbers = f"{show(float(scale[at]))}, expected {show(float(true_scale[at]))}"
        return f"for {of} in blocks of {block_size}, the scale of block {at[1]} is {numbers}"
    packed = got[0].numpy()
    codes = np.stack([packed % 16, packed // 16], axis=-1).reshape(blocks.shape)
    relative = blocks / np.where(true_scale == 0, 1, true_scale)[:, :, None]
    distances = np.abs(relative[..., None] - levels.double().numpy())
    chosen = np.take_along_axis(distances, codes[..., None].astype(int), axis=-1)[..., 0]
    bad = chosen > distances.min(-1) + 1e-5  # either side of a tie will do
    if not bad.any():
        return None
    at = tuple(np.argwhere(bad)[0])
    values = show(float(blocks[at])), int(codes[at]), int(distances[at].argmin())
    return "for {} in blocks of {}, {} gets the code {}, expected {}".format(
        of, block_size, *values
    )


def _nf4(weight, levels, block_size, scale=None, nearest=None, pack=None, guard=True):
    blocks = weight.unflatten(1, (-1, block_size))
    scale = blocks.abs().amax(-1, keepdim=True) if scale is None else scale
    relative = blocks / (torch.where(scale == 0, 1.0, scale) if guard else scale)
    if nearest is None:
        codes = (relative.unsqueeze(-1) - levels).abs().argmin(-1)
    else:
        codes = nearest(relative)
    codes = codes.flatten(1).to(torch.uint8)
    packed = codes[:, 0::2] | codes[:, 1::2] << 4 if pack is None else pack(codes)
    return packed, scale.squeeze(-1)


def even_grid(weight, levels, block_size):
    """Rounds on 16 even levels from −1 to 1."""
    return _nf4(weight, levels, block_size, nearest=lambda r: ((r + 1) * 7.5).round().clamp(0, 15))


def level_below(weight, levels, block_size):
    """Takes the level below each value, not the nearest."""
    below = lambda r: torch.searchsorted(levels, r.contiguous(), right=True) - 1  # noqa: E731
    return _nf4(weight, levels, block_size, nearest=lambda r: below(r).clamp(0, 15))


def nf4_halves_swapped(weight, levels, block_size):
    """Puts the first of a pair in the high half."""
    return _nf4(weight, levels, block_size, pack=lambda c: c[:, 0::2] << 4 | c[:, 1::2])


def nf4_one_a_byte(weight, levels, block_size):
    """Leaves each code in a byte of its own."""
    return _nf4(weight, levels, block_size, pack=lambda c: c)


def scale_of_the_row(weight, levels, block_size):
    """Takes one largest magnitude for the whole row."""
    blocks = weight.unflatten(1, (-1, block_size))
    scale = weight.abs().amax(1)[:, None, None].expand(-1, blocks.shape[1], 1)
    return _nf4(weight, levels, block_size, scale=scale)


def scale_of_the_largest(weight, levels, block_size):
    """Takes the largest value, not the largest magnitude."""
    return _nf4(
        weight, levels, block_size, scale=weight.unflatten(1, (-1, block_size)).amax(-1, True)
    )


def zero_block_divides(weight, levels, block_size):
    """Divides a block of zeros by its scale of 0."""
    return _nf4(weight, levels, block_size, guard=False)


def standard_deviations(weight, levels, block_size):
    """Divides by the standard deviation, since the levels come from a normal distribution."""
    blocks = weight.unflatten(1, (-1, block_size))
    return _nf4(weight, levels, block_size, scale=blocks.std(-1, keepdim=True))


_WRONG_NF4 = (
    (even_grid, "the levels of NF4 are not evenly spaced: compare with each of the 16"),
    (level_below, "take the nearest level, not the one below"),
    (nf4_halves_swapped, "the first of each pair belongs in the low half of the byte"),
    (nf4_one_a_byte, "these are 4-bit codes in 8-bit boxes; pack two into each byte"),
    (scale_of_the_row, "every block has a scale of its own"),
    (scale_of_the_largest, "the scale is the largest magnitude: the block may peak below zero"),
    (zero_block_divides, "a block of zeros has the scale 0, and 0 / 0 is NaN"),
    (standard_deviations, "the levels reach from −1 to 1: divide by the largest magnitude"),
)


def nf4_by_boundaries(weight, levels, block_size):
    """Sorts values between the midpoints of the levels, in float64."""
    rows, inputs = weight.shape
    blocks = weight.double().reshape(rows, inputs // block_size, block_size)
    scale = blocks.abs().max(dim=2).values
    edges = (levels[1:].double() + levels[:-1].double()) / 2
    relative = blocks / scale.clamp(min=1e-300).unsqueeze(2)
    codes = torch.bucketize(relative, edges).reshape(rows, inputs // 2, 2)
    return (codes[..., 0] + 16 * codes[..., 1]).to(torch.uint8), scale.float()


EXERCISES = (
    Exercise(
        "2.1", "A percentile observer", 1, 10, ("percentile_range",), _check_percentile,
        "A percentile trades a large error on few values for a small one on all the others.",
        _WRONG_PERCENTILE, (percentile_by_sorting, percentile_with_numpy),
    ),
    Exercise(
        "2.2", "Smooth a pair of layers", 2, 15, ("smooth_pair",), _check_smooth,
        "The product is the same, yet both factors now fit a grid of eight bits.",
        _WRONG_SMOOTH, (smooth_channel_by_channel, smooth_by_logarithms),
    ),
    Exercise(
        "2.3", "Bug hunt: a GPTQ worse than rounding", 2, 20, ("compensate",), _check_compensate,
        "GPTQ is rounding that keeps its books: each error is handed on by the inverse Hessian.",
        _WRONG_COMPENSATE, (compensate_by_definition, compensate_by_shrinking_inverse),
        broken=broken_compensate,
    ),
    Exercise(
        "2.4", "Store a weight in NF4", 3, 20, ("nf4",), _check_nf4,
        "Codes are only names: any 16 levels can stand behind four bits.",
        _WRONG_NF4, (nf4_by_boundaries,),
    ),
)  # fmt: skip
