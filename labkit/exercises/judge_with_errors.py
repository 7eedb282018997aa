"""Judge functions for which an error can be the right result; shared by exercises of chapter 7."""

from collections.abc import Callable, Iterable

from labkit.exercises.judge import judge, kind


class Raised(tuple):
    """An error as a result that `same` can compare: a tuple with its class in it."""


def judge_with_errors(
    name: str,
    function: Callable,
    cases: Iterable[tuple],
    examine: Callable[..., str | None],
    wrong_answers: tuple[tuple[Callable, str], ...],
    kinds: type[Exception],
    may_raise: Callable[..., bool],
) -> None:
    """As `judge`; an error of these kinds is a result wherever `may_raise` holds."""
    function, *mistakes = (
        _errors_as_results(answer, kinds, may_raise)
        for answer in (function, *(mistake for mistake, _ in wrong_answers))
    )
    messages = (message for _, message in wrong_answers)
    judge(name, function, cases, examine, tuple(zip(mistakes, messages, strict=True)))


def not_a_value_error(written: str, got) -> str | None:
    """Return a clause that begins with the call as `written`; None if it raised ValueError."""
    if not isinstance(got, Raised):
        return f"{written} returns {kind(got)}, expected a ValueError"
    if issubclass(got[0], ValueError):
        return None
    return f"{written} raises {got[0].__name__}, expected a ValueError"


def _errors_as_results(function, kinds, may_raise):
    def answer(*case):
        if not may_raise(*case):
            return function(*case)
        try:
            return function(*case)
        except kinds as error:
            return Raised([type(error)])

    return answer
