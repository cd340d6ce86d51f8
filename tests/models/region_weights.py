"""The weights of regions over positions, one by one: the oracle of ``dprandp.models.patchnet``."""

from __future__ import annotations

import math

import numpy as np


def weight_by_hand(region: int, row: int, column: int, positions: int) -> float:
    """Of one position in one region, before the weights of a region are made to sum to 1."""
    x, y = (column + 0.5) / positions, (row + 0.5) / positions
    if region == 4:
        return math.exp(-((x - 0.5) ** 2 + (y - 0.5) ** 2) / (2 * 0.25**2))

    def left(place: float) -> float:
        if place < 0.25:
            return 1.0
        return math.cos(math.pi * (place - 0.25)) ** 2 if place < 0.75 else 0.0

    across = 1 - left(x) if region % 2 else left(x)
    down = 1 - left(y) if region >= 2 else left(y)
    return across * down


def weights_by_hand(positions: int) -> np.ndarray:
    """float64 [5, positions, positions], each region of sum 1."""
    weights = np.array(
        [
            [[weight_by_hand(region, row, column, positions) for column in range(positions)]
             for row in range(positions)]
            for region in range(5)
        ]
    )  # fmt: skip
    return weights / weights.sum(axis=(1, 2), keepdims=True)
