"""Say what is wrong with a result that should be a mask; shared by exercises of chapter 7."""

import torch

from labkit.exercises.judge import Wrong, misfit, same


def mask_misfit(written: str, got, expected: torch.Tensor) -> str | None:
    """Return a clause about the dtype or the shape of a mask; None if it has both right.

    Args:
        written: the call, with which the clause begins.
        got: the result.
        expected: the right mask, of bool.

    Raises:
        Wrong: if only the dtype is wrong: no misconception explains it.
    """
    complaint = misfit(got, torch.bool, tuple(expected.shape))
    if complaint is None:
        return None
    if same(got, expected):
        raise Wrong(f"{written} returns {complaint}")
    return f"{written} returns {complaint}"
