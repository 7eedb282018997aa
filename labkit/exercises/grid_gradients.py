"""Inputs of exercises 3.1 and 3.2, gradients at weights on a grid, and where those weights lie."""

from collections.abc import Iterator

import numpy as np
import torch


def gradient_cases(seed: int) -> Iterator[tuple]:
    """Yield (weight, scale, qmin, qmax, upstream), small ones first."""
    yield torch.tensor([0.4, 2.6, -0.9]), 0.5, -3, 3, torch.tensor([1.0, 1.0, 2.0])
    yield torch.tensor([1.6, 1.8, -1.6, -1.8]), 0.5, -3, 3, torch.tensor([1.0, 2.0, 3.0, 4.0])
    yield torch.tensor([-1.0, -0.6, 0.3]), 0.25, -2, 1, torch.tensor([1.0, -1.0, 0.5])
    random = torch.Generator().manual_seed(seed)
    for shape in ((9,), (4, 16), (3, 5, 8)):
        for scale, qmin, qmax in ((0.2, -7, 7), (0.7, -1, 1), (0.02, -127, 127), (0.3, -8, 7)):
            weight = torch.randn(shape, generator=random)
            yield weight, scale, qmin, qmax, torch.randn(shape, generator=random)


def grid_parts(
    weight: torch.Tensor, scale: float, qmin: int, qmax: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return position on the grid, code, and whether it was not clipped, float64."""
    position = weight.double().numpy() / scale
    level = np.round(position)
    return position, np.clip(level, qmin, qmax), (level >= qmin) & (level <= qmax)
