"""Exercise 2.6: `hadamard` transforms the last dimension of a tensor, and keeps its length.

The reference is the definition in float64: the sign of an entry is the parity of the bits that the
numbers of its row and its column have in common.
"""

import numpy as np
import torch

from labkit.exercises.judge import Exercise, call, insist_on_dtype, judge, misfit, show
from labkit.exercises.named_errors import Explained, explain_errors

_SIZE_ONE = "a tensor of size 1 is its own transform: end at n = 1"


def _check(function) -> None:
    random = torch.Generator().manual_seed(26)
    cases = [(torch.tensor([3.0, 1.0]),), (torch.tensor([1.0, 0.0, 0.0, 0.0]),)]
    cases += [(torch.tensor([[1.0, 2.0, 3.0, 4.0], [0.0, 1.0, 0.0, -1.0]]),), (torch.ones(1, 8),)]
    for shape in ((8,), (2, 16), (2, 4, 64), (8, 256), (1, 2, 1), (4, 4), (16, 16)):
        cases.append((torch.randn(shape, generator=random),))
    judge("hadamard", explain_errors(function, _explain), cases, _examine, _WRONG)


def _explain(error, x) -> str | None:
    return _SIZE_ONE if x.shape[-1] == 1 else None


def _matrix(n: int) -> np.ndarray:
    shared = np.arange(n)[:, None] & np.arange(n)
    ones = sum(shared >> bit & 1 for bit in range(max(1, n.bit_length())))
    return 1.0 - 2.0 * (ones % 2)


def _examine(x, got) -> str | None:
    written = call("hadamard", x)
    if isinstance(got, Explained):
        return got.complaint(written, "a copy of it")
    insist_on_dtype(f"{written} returns", got, torch.float32, x.shape)
    n = x.shape[-1]
    if complaint := misfit(got, torch.float32, x.shape):
        return f"{_SIZE_ONE}: " * (n == 1) + f"{written} returns {complaint}"
    expected = torch.from_numpy(x.double().numpy() @ _matrix(n) / n**0.5)
    wrong = ~((got - expected).abs() <= 1e-4 * (1 + expected.abs().max()))
    if not wrong.any():
        return None
    if x.numel() <= 4:
        return f"{written} gives {show(got)}, expected {show(expected)}"
    place = tuple(wrong.nonzero()[0].tolist())
    numbers = f"{show(got[place].item())}, expected {show(expected[place].item())}"
    return f"{written} has {numbers} at {list(place)}"


def _transform(x, combine=None, stages=None, dim=-1):
    combine = combine or (lambda a, b: torch.cat([a + b, a - b], dim=-2))
    y = x.transpose(dim, -1).clone()
    n, size = y.shape[-1], 1
    done = 0
    while size < n and (stages is None or done < stages):
        pairs = y.unflatten(-1, (-1, 2, size))
        y = combine(pairs[..., :1, :], pairs[..., 1:, :]).flatten(-3)
        size, done = 2 * size, done + 1
    return y.transpose(dim, -1) / x.shape[dim] ** 0.5


def not_divided(x):
    """Leaves out the division by √n."""
    return _transform(x) * x.shape[-1] ** 0.5


def divided_by_n(x):
    """Divides by n."""
    return _transform(x) / x.shape[-1] ** 0.5


def ends_at_two(x):
    """Ends its recursion at n = 2, which splits a tensor of size 1."""
    first, second = x.split(x.shape[-1] // 2, dim=-1)
    if x.shape[-1] > 2:
        first, second = ends_at_two(first), ends_at_two(second)
    return torch.cat([first + second, first - second], dim=-1) / 2**0.5


def divided_by_the_size_of_each_level(x):
    """Divides by the root of its own size at every level of a recursion."""
    if x.shape[-1] <= 2:
        return _transform(x)
    first, second = map(divided_by_the_size_of_each_level, x.split(x.shape[-1] // 2, dim=-1))
    return torch.cat([first + second, first - second], dim=-1) / x.shape[-1] ** 0.5


def divided_in_every_stage(x):
    """Divides by √n in each of the log₂ n stages."""
    n = x.shape[-1]
    return _transform(x) / n ** ((n.bit_length() - 2) / 2)


def difference_first(x):
    """Puts the difference before the sum."""
    return _transform(x, lambda a, b: torch.cat([a - b, a + b], dim=-2))


def difference_reversed(x):
    """Subtracts the first from the second."""
    return _transform(x, lambda a, b: torch.cat([a + b, b - a], dim=-2))


def one_stage(x):
    """Combines neighbors once and stops."""
    return _transform(x, stages=1)


def first_dimension(x):
    """Transforms the first dimension."""
    return _transform(x, dim=0)


def sum_already_written(x):
    """Takes the new sum where the difference needs the old value."""
    return _transform(x, lambda a, b: torch.cat([a + b, a], dim=-2))


def outputs_out_of_order(x):
    """Lays sums and differences side by side at every stage, so the outputs change places."""
    n = x.shape[-1]
    bits = n.bit_length() - 1
    reverse = [int(f"{i:0{max(bits, 1)}b}"[::-1], 2) if bits else 0 for i in range(n)]
    return _transform(x)[..., reverse]


_WRONG = (
    (not_divided, "divide by √n: a rotation keeps the length of every row"),
    (
        divided_by_n,
        "divide by √n (√2 a stage), not by n (2 a stage): applied twice it must give x back",
    ),
    (ends_at_two, _SIZE_ONE),
    (divided_by_the_size_of_each_level, "a level of a recursion divides by √2, whatever its size"),
    (divided_in_every_stage, "divide by √n once, after the last stage, not in every stage"),
    (difference_first, "the sum comes first, then the difference"),
    (difference_reversed, "the difference is first minus second"),
    (one_stage, "one stage mixes pairs only; go on until the pairs are n / 2 apart"),
    (first_dimension, "the last dimension is transformed; the others are batches"),
    (sum_already_written, "the difference needs the old first value, not the sum just written"),
    (outputs_out_of_order, "the values are right and their order is not: keep pairs in place"),
)


def hadamard_recursively(x):
    """Splits in halves, and transforms their sum and their difference."""
    n = x.shape[-1]
    if n == 1:
        return x.clone()
    first, second = x.split(n // 2, dim=-1)
    halves = [hadamard_recursively(first + second), hadamard_recursively(first - second)]
    return torch.cat(halves, dim=-1) / 2**0.5


def hadamard_by_matrix(x):
    """Builds the matrix by doubling, and multiplies."""
    matrix = torch.ones(1, 1)
    while len(matrix) < x.shape[-1]:
        matrix = torch.cat([torch.cat([matrix, matrix]), torch.cat([matrix, -matrix])], dim=1)
    return x @ matrix / x.shape[-1] ** 0.5


EXERCISE = Exercise(
    id="2.6",
    title="A fast Hadamard transform",
    stars=2,
    minutes=20,
    function_names=("hadamard",),
    check=_check,
    takeaway="A spike comes out as n equal parts, and the same function brings it back.",
    wrong_answers=_WRONG,
    variants=(hadamard_recursively, hadamard_by_matrix),
)
