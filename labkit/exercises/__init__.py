"""Exercise checks: is an answer right, and if not, which misconception does it show?

Each exercise is a file here, `ex<chapter>_<number>_<function>.py`. To add one, write the file; it
is found by its name. Its docstring says in a line or two what the exercise asks and what the
reference is: numpy, torch's own functions or the definition spelled out, never labkit, since a
check must not trust what it checks. The file holds

- `_check`, which hands `judge` the learner's function and many inputs, small ones first: the first
  that goes wrong becomes the example in the message;
- `_examine`, which compares one result with the reference and says what is wrong with it;
- the wrong answers, functions with a known mistake. The docstring of each names the misconception;
  the text beside it in `_WRONG` is what a learner reads;
- the variants, right answers of other shapes, which the check must accept;
- for a bug hunt, the broken function that the learner repairs;
- at its end `EXERCISE = Exercise(...)`, which names all of these.

`judge.py` has the judge and the words of its messages. The other files hold what several exercises
of a chapter share. Tests give each wrong answer to its check and expect its own message back, try
the variants, and compare the exercise with its cells in the notebook.
"""

import ast
import contextlib
import dis
import importlib
import inspect
import io
import pkgutil
import re
import textwrap
import types
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch

from labkit.exercises.judge import Exercise, Wrong

__all__ = ["Exercise", "Verdict", "Wrong", "check", "registry", "verdict"]

_FILE = re.compile(r"ex(\d+)_(\d+)_")


@dataclass(frozen=True)
class Verdict:
    """What a check found: `status` is "not attempted", "wrong" or "correct"; `message` says why."""

    status: str
    message: str


def check(id: str, *answers: Callable) -> None:
    """Check the answer to an exercise and print one line about it.

    What the answer itself prints or warns about is swallowed: it may be called thousands of times.

    Args:
        id: the exercise, e.g. "1.2".
        answers: the function or functions that the exercise asks for, not their results.

    Raises:
        TypeError: if `id` is no string, or `answers` are not the functions asked for.
        ValueError: if there is no such exercise.
    """
    found = verdict(id, *answers)
    if found.status == "not attempted":
        print(f"Exercise {id}: not attempted yet")
    elif found.status == "wrong":
        print(f"Exercise {id}: not yet. {found.message}")
    else:
        print(f"Exercise {id}: correct. {found.message}")


def verdict(id: str, *answers: Callable) -> Verdict:
    """Judge the answer to an exercise without printing anything.

    Args, errors: as in `check`.

    Returns:
        The verdict; its message is empty when nothing was attempted.
    """
    exercise = _find(id)
    names = exercise.function_names
    if len(answers) != len(names) or not all(callable(answer) for answer in answers):
        came = ", ".join(type(answer).__name__ for answer in answers) or "nothing"
        how = f'lk.check("{id}", {", ".join(names)})'
        raise TypeError(f"exercise {id} takes functions, not their results: {how}; got {came}")
    if any(_untouched(answer, exercise.broken) for answer in answers):
        return Verdict("not attempted", "")
    quiet = io.StringIO()
    try:
        with (
            contextlib.redirect_stdout(quiet),
            contextlib.redirect_stderr(quiet),
            warnings.catch_warnings(action="ignore"),
            _torch_as_it_starts(),
        ):
            exercise.check(*answers)
    except Wrong as wrong:
        message = str(wrong)
        if not message.startswith(names):
            message = message[0].upper() + message[1:]
        return Verdict("wrong", message if message.endswith("?") else message + ".")
    return Verdict("correct", exercise.takeaway)


@contextlib.contextmanager
def _torch_as_it_starts():
    # A notebook may have set another default; an answer is right or wrong in spite of it.
    dtype, device = torch.get_default_dtype(), torch.get_default_device()
    elsewhere = torch.device("cpu") if device.type != "cpu" else contextlib.nullcontext()
    torch.set_default_dtype(torch.float32)
    try:
        with torch.inference_mode(False), torch.enable_grad(), elsewhere:
            yield
    finally:
        torch.set_default_dtype(dtype)


@cache
def registry() -> types.MappingProxyType[str, Exercise]:
    """Return all exercises by id, in reading order."""
    found = (_FILE.match(module.name) for module in pkgutil.iter_modules(__path__))
    files = sorted(filter(None, found), key=lambda file: tuple(map(int, file.groups())))
    exercises = [importlib.import_module(f"{__name__}.{file.string}").EXERCISE for file in files]
    return types.MappingProxyType({exercise.id: exercise for exercise in exercises})


def _find(id: str) -> Exercise:
    if not isinstance(id, str):
        raise TypeError(f'id must be a string such as "1.2", not {id!r}')
    if id not in registry():
        raise ValueError(f"there is no exercise {id!r}; there are {', '.join(registry())}")
    return registry()[id]


def _untouched(answer: Callable, broken: Callable | None) -> bool:
    answer = inspect.unwrap(answer)
    if not isinstance(answer, types.FunctionType):
        return False
    if broken is not None and _instructions(answer) in map(_instructions, _both_forms(broken)):
        return True
    return _returns_only_none(answer) and _is_blank(answer)


def _both_forms(function: types.FunctionType) -> tuple[Callable, Callable]:
    # Python compiles `torch.zeros()` differently where it does not see the import, as in a cell.
    namespace = {}
    exec(inspect.getsource(function), namespace)
    return function, namespace[function.__name__]


def _instructions(function: types.FunctionType | types.CodeType) -> list[tuple]:
    # What runs: comments, docstrings, annotations, line numbers and the name do not count.
    return [
        (step.opname, _instructions(step.argval))  # a lambda or a comprehension
        if isinstance(step.argval, types.CodeType)
        else (step.opname, repr(step.argval))
        for step in dis.get_instructions(function)
    ]


def _returns_only_none(function: types.FunctionType) -> bool:
    # An `...` leaves no trace in the bytecode; instruction names vary between Python versions.
    harmless = {"RESUME", "NOP", "CACHE", "LOAD_CONST", "RETURN_VALUE", "RETURN_CONST"}
    steps = list(dis.get_instructions(function))
    return all(step.opname in harmless for step in steps) and all(
        step.argval is None for step in steps if step.opname.endswith("CONST")
    )


def _is_blank(function: types.FunctionType) -> bool:
    # `return None` and `...` compile alike; only the source, where there is one, tells.
    try:
        definition = ast.parse(textwrap.dedent(inspect.getsource(function))).body[0]
    except (OSError, TypeError, SyntaxError, IndexError):
        return True
    body = definition.body if isinstance(definition, ast.FunctionDef) else []
    return all(isinstance(s, ast.Expr) and isinstance(s.value, ast.Constant) for s in body)
