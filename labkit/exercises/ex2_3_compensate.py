"""Exercise 2.3, a bug hunt: `compensate` should round column by column, as GPTQ does.

The reference is the definition in float64: after each column, the best change of all later ones.
"""

import torch

from labkit.exercises.judge import Exercise, Wrong, call, insist_on_dtype, judge, misfit, show

_CODES = "these are the codes; multiply each by the scale of its row"


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


def _check(function) -> None:
    random = torch.Generator().manual_seed(23)
    hessian = torch.tensor([[1.0, 0.9], [0.9, 1.0]])
    cases = [(torch.tensor([[1.4, 1.4]]), hessian, torch.ones(1, 1))]
    cases += [(torch.tensor([[0.4, 9.0, 2.2]]), torch.eye(3), torch.ones(1, 1))]
    cases += [(torch.tensor([[0.4, 1.142]]), hessian, torch.ones(1, 1))]  # 1.498 if damped again
    hessian = torch.tensor([[2.0, -1.0], [-1.0, 1.5]])
    cases += [(torch.tensor([[1.4, -1.235]]), hessian, torch.ones(1, 1))]
    cases += [(weight, hessian, torch.ones(1, 1)) for weight, hessian in _telling()]
    for rows, inputs in ((2, 3), (4, 8), (8, 24), (16, 40)):
        x = torch.randn(4 * inputs, inputs, generator=random)
        x = x @ torch.randn(inputs, inputs, generator=random)
        hessian = x.T @ x / len(x)
        hessian += 0.05 * hessian.diagonal().mean() * torch.eye(inputs)
        weight = torch.randn(rows, inputs, generator=random)
        cases.append((weight, hessian, weight.abs().amax(1, keepdim=True) / 7))
    judge("compensate", function, cases, _examine, _WRONG)


def _telling():
    # What a factor of the wrong triangle, or an error of the original weight, alone get wrong.
    yield torch.tensor([[0.4, 1.1]]), torch.tensor([[1.0, 0.9], [0.9, 1.0]])
    hessian = torch.tensor([[2.0, 1.0, 0.0], [1.0, 2.0, 1.0], [0.0, 1.0, 2.0]])
    yield torch.tensor([[0.4, 0.8, 0.7]]), hessian


def _examine(weight, hessian, scale, got) -> str | None:
    written = call("compensate", weight, hessian, scale)
    insist_on_dtype(f"{written} returns", got, torch.float32, weight.shape)
    if complaint := misfit(got, torch.float32, weight.shape):
        return f"{written} returns {complaint}"
    whole = torch.equal(got, got.round())
    if whole and 0 < got.abs().max() <= 7 and not torch.equal(scale, scale.round()):
        raise Wrong(f"{_CODES}: {written} returns whole numbers, expected multiples of the scale")
    steps = got / scale
    farthest = steps.abs().max().item()
    if farthest > 7.001 and torch.allclose(steps, steps.round(), atol=1e-3):
        reach = f"{written} uses the code {show(round(farthest, 2))}, expected −7 to 7"
        raise Wrong(f"codes end at 7, which costs a little error: {reach}")
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
    lower = "; a lower one needs another order of columns or other codes" * (errors[0] < errors[1])
    return f"{written} has the output error {show(errors[0])}, expected {show(errors[1])}{lower}"


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


def _factor_of_inverse(hessian):
    return torch.linalg.cholesky(torch.linalg.inv(hessian), upper=True)


def _compensate(
    weight,
    hessian,
    scale,
    spread=_factor_of_inverse,
    current=True,
    error_of=None,
    divided=True,
    to_code=torch.round,
):
    left, rounded = weight.clone(), torch.zeros_like(weight)
    factor, minuend = spread(hessian), left if error_of is None else error_of
    for j in range(weight.shape[1]):
        column = left[:, j] if current else weight[:, j]
        rounded[:, j] = to_code(column / scale[:, 0]).clamp(-7, 7) * scale[:, 0]
        error = (minuend[:, j] - rounded[:, j]) / (factor[j, j] if divided else 1)
        left[:, j + 1 :] -= torch.outer(error, factor[j, j + 1 :])
    return rounded


def still_rounding_the_original(weight, hessian, scale):
    """Rounds the uncorrected column, or takes a lower factor: both are plain rounding."""
    return _compensate(weight, hessian, scale, current=False)


def still_the_hessian_itself(weight, hessian, scale):
    """Rounds the corrected column; still spreads by the factor of the Hessian."""
    return _compensate(weight, hessian, scale, lambda h: torch.linalg.cholesky(h, upper=True))


def inverse_of_the_factor(weight, hessian, scale):
    """Inverts the factor of the Hessian instead of factoring the inverse."""
    return _compensate(
        weight, hessian, scale, lambda h: torch.linalg.inv(torch.linalg.cholesky(h, upper=True))
    )


def damped_again(weight, hessian, scale):
    """Adds 1 % of the mean diagonal to a Hessian that is damped already."""
    more = 0.01 * hessian.diagonal().mean() * torch.eye(len(hessian))
    return _compensate(weight, hessian + more, scale)


def spread_with_the_wrong_sign(weight, hessian, scale):
    """Adds the correction where it should be subtracted."""

    def opposite(hessian):
        factor = _factor_of_inverse(hessian)
        return 2 * torch.diag(factor.diagonal()) - factor

    return _compensate(weight, hessian, scale, opposite)


def not_divided_by_the_diagonal(weight, hessian, scale):
    """Spreads the plain error, not the error over the diagonal entry."""
    return _compensate(weight, hessian, scale, divided=False)


def digits_cut_off(weight, hessian, scale):
    """Truncates where it should round."""
    return _compensate(weight, hessian, scale, to_code=torch.trunc)


def error_of_the_original(weight, hessian, scale):
    """Rounds the corrected column, and takes the error from the original one."""
    return _compensate(weight, hessian, scale, error_of=weight)


def inverse_without_its_factor(weight, hessian, scale):
    """Takes rows of the inverse itself, which still holds the columns already rounded."""
    return _compensate(weight, hessian, scale, torch.linalg.inv)


def codes_returned(weight, hessian, scale):
    """Returns the codes, without their scale."""
    return (_compensate(weight, hessian, scale) / scale).round()


def left_returned(weight, hessian, scale):
    """Returns the corrected columns, which are not rounded yet."""
    rounded, left = _compensate(weight, hessian, scale), weight.clone()
    factor = _factor_of_inverse(hessian)
    for j in range(weight.shape[1]):
        error = (left[:, j] - rounded[:, j]) / factor[j, j]
        left[:, j + 1 :] -= torch.outer(error, factor[j, j + 1 :])
    return left


_WRONG = (
    (
        still_rounding_the_original,
        "this is plain rounding: columns are rounded as they were, or the factor is a lower one",
    ),
    (still_the_hessian_itself, "one bug left: errors spread by the factor of the inverse Hessian"),
    (damped_again, "the Hessian is damped already: do not damp it again"),
    (
        inverse_of_the_factor,
        "the inverse of H's factor is not the factor of H's inverse: invert first, then factor",
    ),
    (spread_with_the_wrong_sign, "the correction is subtracted; adding it doubles the error"),
    (
        not_divided_by_the_diagonal,
        "the error of a column is divided by the factor's diagonal entry",
    ),
    (digits_cut_off, "round to the nearest code: a cast to integers, or trunc, cuts digits off"),
    (error_of_the_original, "the error is what rounding does to `left`, not to the original"),
    (
        inverse_without_its_factor,
        "the inverse still counts finished columns; take its Cholesky factor",
    ),
    (codes_returned, _CODES),
    (left_returned, "return `rounded`; `left` holds the corrected values before rounding"),
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


EXERCISE = Exercise(
    id="2.3",
    title="Bug hunt: a GPTQ worse than rounding",
    stars=2,
    minutes=20,
    function_names=("compensate",),
    check=_check,
    takeaway=(
        "GPTQ is rounding that keeps its books: each error is handed on by the inverse Hessian."
    ),
    wrong_answers=_WRONG,
    variants=(compensate_by_definition, compensate_by_shrinking_inverse),
    broken=broken_compensate,
)
