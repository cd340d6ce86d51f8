"""Features from a feature map: averages over the cells of one or more square grids."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from dprandp.errors import UsageError

_SIDES = {str(side * side): side for side in range(1, 9)}


class Pooling:
    """Average pooling over the grids of ``"1+4"``, say: the whole map, then its four quarters.

    Args:
        grids: different square numbers of cells between 1 and 64, joined by ``+``.

    Attributes:
        cells: of all grids together; a map of C channels has C times as many features.

    Raises:
        UsageError: a part is not such a number, or occurs twice.
    """

    def __init__(self, grids: str) -> None:
        parts = grids.split("+")
        if len(set(parts)) != len(parts) or not _SIDES.keys() >= set(parts):
            raise UsageError(
                f"pooling {grids!r} is not a sum of different square numbers of cells",
                fix="write for example 1 (global average), 4 (a 2×2 grid) or 1+4 (both)",
            )
        self._sides = [_SIDES[part] for part in parts]
        self.cells = sum(side * side for side in self._sides)

    def __call__(self, feature_map: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, C · cells]: grid after grid, within a grid by channel, row, column."""
        return torch.cat([F.adaptive_avg_pool2d(feature_map, side).flatten(1) for side in self._sides], dim=1)
