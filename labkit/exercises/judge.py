"""What an exercise is made of, and the judge that says which misconception an answer shows."""

import copy
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from numbers import Integral, Real

import numpy as np
import torch

_ENOUGH_FAILURES = 24
_SHOWN_VALUES = 10


class Wrong(Exception):
    """An answer is wrong; the text says why, in one sentence without a capital or a full stop."""


@dataclass(frozen=True)
class Exercise:
    """One exercise.

    Attributes:
        id: chapter and number, e.g. "1.2".
        title: what the task cell says after the minutes.
        stars: difficulty, 1 to 3.
        minutes: expected time.
        function_names: the functions the learner writes, in the order `check` takes them.
        check: called with the learner's functions; raises `Wrong`.
        takeaway: the sentence printed beside "correct".
        wrong_answers: pairs of a function with a known mistake and a fragment of its message.
        variants: correct functions of different shapes.
        broken: for a bug hunt, the function that the learner repairs.
    """

    id: str
    title: str
    stars: int
    minutes: int
    function_names: tuple[str, ...]
    check: Callable[..., None]
    takeaway: str
    wrong_answers: tuple[tuple[Callable, str], ...]
    variants: tuple[Callable, ...]
    broken: Callable | None = None


def judge(
    name: str,
    function: Callable,
    cases: Iterable[tuple],
    examine: Callable[..., str | None],
    wrong_answers: tuple[tuple[Callable, str], ...],
) -> None:
    """Try an answer on many inputs; if some come out wrong, name the likeliest misconception.

    That is the known wrong answer which agrees with this one on the most failing inputs, if it is
    half of them or more. The first of these becomes the example. Where the dtype is what is wrong,
    a known wrong answer of another dtype explains nothing.

    Args:
        name: how messages call the function.
        function: the learner's answer. It gets copies.
        cases: its inputs, one tuple of arguments each, small ones first.
        examine: called with the arguments and the result; returns None if the result is right,
            else a clause with the input, the result and what was expected. It may raise `Wrong`
            itself where it knows more.
        wrong_answers: the known wrong answers with what to say about each. The first of equals
            wins, so those with one mistake come before those with two.

    Raises:
        Wrong: if any input comes out wrong, raises, or is changed in place.
    """
    failures = []
    for case in cases:
        got = _run(name, function, case)
        if complaint := examine(*case, got):
            failures.append((case, got, complaint))
        if len(failures) == _ENOUGH_FAILURES:
            break
    if not failures:
        return
    needed = (len(failures) + 1) // 2  # fewer are a coincidence, not an explanation
    found, explanation = failures, ""
    for mistake, message in wrong_answers:
        agreeing = _agreeing(mistake, failures, needed, examine)
        if len(agreeing) >= needed:
            found, explanation, needed = agreeing, message + ": ", len(agreeing) + 1
    raise Wrong(explanation + found[0][2])


def _agreeing(
    mistake: Callable, failures: list[tuple], needed: int, examine: Callable
) -> list[tuple]:
    # Stops where the number needed is out of reach, which spares most calls of most mistakes.
    agreeing = []
    for tried, failure in enumerate(failures):
        if len(agreeing) + len(failures) - tried < needed:
            break
        if _agrees(mistake, *failure, examine):
            agreeing.append(failure)
    return agreeing


def _run(name: str, function: Callable, case: tuple):
    given = copy.deepcopy(case)
    try:
        got = function(*given)
    except Exception as error:
        reason = " ".join(str(error).split())[:160]
        raised = type(error).__name__ + (f" ({reason})" if reason else "")
        raise Wrong(f"{call(name, *case)} raises {raised}: what does your code do there?") from None
    if not same(given, case):
        raise Wrong(
            f"{name} changes its input in place: work on a new one, x * 2 not x.mul_(2) or x *= 2"
        )
    return got


def _agrees(mistake: Callable, case: tuple, got, complaint: str, examine: Callable) -> bool:
    try:
        made = mistake(*copy.deepcopy(case))
        return same(made, got) and examine(*case, _with_dtypes_of(made, got)) == complaint
    except Exception:
        return False


def _with_dtypes_of(like, value):
    if isinstance(like, torch.Tensor) and isinstance(value, torch.Tensor):
        return value.to(like.dtype)
    if type(value) in (tuple, list):
        return type(value)(map(_with_dtypes_of, like, value))
    return value


def same(a, b) -> bool:
    """Whether two results agree up to float rounding; NaN agrees with NaN.

    Args:
        a, b: numbers, tensors, arrays, or tuples and lists of them. Dtypes may differ, shapes may
            not.
    """
    if isinstance(a, np.ndarray) and isinstance(b, np.ndarray):
        close = dict(rtol=1e-4, atol=1e-30, equal_nan=True)
        return a.shape == b.shape and np.allclose(a, b, **close)
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        if a.shape != b.shape:
            return False
        return torch.allclose(a.double(), b.double(), rtol=1e-4, atol=1e-30, equal_nan=True)
    if isinstance(a, tuple | list) and isinstance(b, tuple | list):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    if isinstance(a, Real) and isinstance(b, Real):
        return a == b or math.isclose(a, b, rel_tol=1e-4) or (a != a and b != b)
    return a is b


def call(name: str, *arguments) -> str:
    """Write a call out as text, e.g. `file_bytes(2, 64, 4, 32)`."""
    return f"{name}({', '.join(show(argument) for argument in arguments)})"


def show(value) -> str:
    """Write a value out briefly: numbers to four digits, a large tensor as its dtype and shape."""
    if isinstance(value, torch.Tensor | np.ndarray):
        return kind(value) if math.prod(value.shape) > _SHOWN_VALUES else show(value.tolist())
    if isinstance(value, list | tuple):
        inside = ", ".join(show(item) for item in value)
        return f"[{inside}]" if isinstance(value, list) else f"({inside})"
    if isinstance(value, Real) and not isinstance(value, Integral):
        return f"{float(value):.4g}"
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def show_indices(indices: list) -> str:
    """Write a list of indices out, and of a long one only the first eight."""
    return show(indices) if len(indices) <= 8 else show(indices[:8])[:-1] + ", …]"


def kind(value) -> str:
    """Name what sort of thing a value is, e.g. `a float32 tensor of shape (2, 3)` or `None`."""
    if value is None:
        return "None"
    if isinstance(value, np.ndarray):
        article = "an" if value.dtype.name.startswith("int") else "a"
        return f"{article} {value.dtype} array of shape {value.shape}"
    if not isinstance(value, torch.Tensor):
        name = type(value).__name__
        return f"an {name}" if name[0] in "aeiou" else f"a {name}"
    dtype = str(value.dtype).removeprefix("torch.")
    return f"{'an' if dtype.startswith('int') else 'a'} {dtype} tensor of shape {show_shape(value)}"


def show_shape(tensor: torch.Tensor) -> str:
    """Write a shape out as a tuple."""
    return str(tuple(tensor.shape))


def is_precise_scalar(value) -> bool:
    """Whether a value is a tensor of shape () in float32 or float64: less would lose digits."""
    precise = (torch.float32, torch.float64)
    return isinstance(value, torch.Tensor) and not value.ndim and value.dtype in precise


def insist_on_dtype(where: str, value, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    """Raise `Wrong` for a tensor of the right shape in another dtype, whatever its values show.

    Args:
        where: what the value is, e.g. `f(2.0) returns`.
    """
    of_shape = isinstance(value, torch.Tensor) and tuple(value.shape) == tuple(shape)
    if of_shape and value.dtype != dtype:
        raise Wrong(f"{where} {misfit(value, dtype, shape)}: mind the dtype")


def misfit(value, dtype: torch.dtype | None, shape: tuple[int, ...]) -> str | None:
    """Say what is wrong with the type, dtype or shape of a result.

    Args:
        value: the result.
        dtype: what it must have; None for any number.
        shape: what it must have.

    Returns:
        A clause such as `a list, expected a float32 tensor of shape (3,)`; None if all is well.
    """
    if isinstance(value, torch.Tensor) and tuple(value.shape) == tuple(shape):
        if value.dtype == dtype:
            return None
        if dtype is None and not value.is_complex() and value.dtype != torch.bool:
            return None
    wanted = "" if dtype is None else str(dtype).removeprefix("torch.") + " "
    return f"{kind(value)}, expected a {wanted}tensor of shape {tuple(shape)}"
