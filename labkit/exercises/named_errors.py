"""Errors that show a misconception, as results which a check can explain; used in chapter 2."""

from collections.abc import Callable


class Explained:
    """An error as a result."""

    def __init__(self, error: Exception, clause: str):
        self._error, self._clause = error, clause

    def complaint(self, written: str, expected: str) -> str:
        """Say what the error shows, then that the call as `written` raises it."""
        reason = " ".join(str(self._error).split())[:90]
        raised = f"{type(self._error).__name__} ({reason})"
        return f"{self._clause}: {written} raises {raised}, expected {expected}"


def explain_errors(function: Callable, explain: Callable[..., str | None]) -> Callable:
    """Return an answer that, in place of an error which can be explained, returns `Explained`.

    Known wrong answers stay unwrapped: they raise, so they never explain such a result again.

    Args:
        function: the learner's answer.
        explain: called with the error and the arguments; returns what the error shows, or None.
    """

    def answer(*arguments):
        try:
            return function(*arguments)
        except Exception as error:
            clause = explain(error, *arguments)
            if clause is None:
                raise
            return Explained(error, clause)

    return answer
