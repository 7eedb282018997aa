"""Judge functions of dicts and strings, which `judge` cannot compare; shared in chapter 6."""

import copy
import sys
from collections.abc import Callable, Iterable

from labkit.exercises.judge import Wrong, judge, same


def judge_on_dicts(
    name: str,
    function: Callable,
    cases: Iterable[tuple],
    examine: Callable[..., str | None],
    wrong_answers: tuple[tuple[Callable, str], ...],
    write: Callable[..., str],
) -> None:
    """As `judge`; `write` says briefly what the arguments of a case are."""

    def examine_result(case, result):
        if not same(_plain(result.given), _plain(case.arguments)):
            raise Wrong(f"{name} changes its input in place: work on copies of lists and dicts")
        return examine(*case.arguments, result.got)

    judge(
        name,
        _on_plain_values(function),
        [(_Case(case, write(*case)),) for case in cases],
        examine_result,
        tuple((_on_plain_values(mistake), message) for mistake, message in wrong_answers),
    )


class _Case:
    """The arguments of a call; `text` says what they are."""

    def __init__(self, arguments: tuple, text: str):
        self.arguments, self.text = arguments, text

    def __deepcopy__(self, memo):
        return self

    def __repr__(self):
        return self.text


class _Result(tuple):
    """A result for `same` to compare; `got` as it came, `given` what is left of the input."""


def _plain(value):
    # Lists and numbers stay, dicts become sorted pairs, and equal strings become the same object.
    if isinstance(value, dict):
        return [[_plain(key), _plain(value[key])] for key in sorted(value, key=repr)]
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return sys.intern(str(value)) if isinstance(value, str) else value


def _on_plain_values(function):
    def answer(case: _Case) -> _Result:
        given = copy.deepcopy(case.arguments)
        got = function(*given)
        result = _Result([_plain(got)])
        result.got, result.given = got, given
        return result

    return answer
