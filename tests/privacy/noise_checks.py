"""Noise of many tensors of mixed sizes, looked at tensor by tensor and coordinate by coordinate: none may have less."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import numpy as np
import torch
from scipy import stats

SHAPES = {"wide": (40, 12), "gain": (), "bias": (5,), "filter": (3, 2, 2, 2), "one": (1,), "row": (1, 16), "last": (2,)}
"""The large ones first, scalars and small ones after them: where a slip in a loop would show."""

CALLS = 400
ALPHA = 1e-7

Noisy = Callable[[Mapping[str, torch.Tensor]], Mapping[str, torch.Tensor]]


def sums_of(value: float = 0.0) -> dict[str, torch.Tensor]:
    """Tensors of ``SHAPES``, all of one value."""
    return {name: torch.full(shape, value, dtype=torch.float64) for name, shape in SHAPES.items()}


def draws_of(noisy: Noisy) -> dict[str, np.ndarray]:
    """What is added to zeros, [calls, numbers] for each tensor."""
    calls = [noisy(sums_of()) for _ in range(CALLS)]
    return {name: np.stack([call[name].double().flatten().numpy() for call in calls]) for name in SHAPES}


def complaints(draws: Mapping[str, np.ndarray], std: float) -> list[str]:
    """What is wrong with independent normal values of this standard deviation, by name of the tensor."""
    found = []
    for name, values in draws.items():
        squares = (values / std) ** 2
        if two_sided(squares.sum(), squares.size) < ALPHA:
            found.append(f"{name} has the standard deviation {values.std():.4g}, not {std:.4g}")
        if two_sided(squares.sum(axis=0), len(squares)).min() < 1e-3 * ALPHA:
            found.append(f"a coordinate of {name} has another standard deviation than {std:.4g}")
        if abs(float(values.mean())) * math.sqrt(values.size) > 6 * std:
            found.append(f"{name} has a mean")
    columns = np.concatenate(list(draws.values()), axis=1) / std  # coordinates of one call, and of the call before
    for shifted, what in ((columns[1:].T @ columns[:-1], "calls"), (columns.T @ columns, "coordinates")):
        apart = shifted / math.sqrt(len(columns))
        if what == "coordinates":
            np.fill_diagonal(apart, 0)
        if float(np.abs(apart).max()) > 9:
            found.append(f"{what} are correlated")
    return found


def two_sided(statistics: np.ndarray, freedom: int) -> np.ndarray:
    """p-values of χ² statistics, too large or too small."""
    return 2 * np.minimum(stats.chi2.cdf(statistics, freedom), stats.chi2.sf(statistics, freedom))
