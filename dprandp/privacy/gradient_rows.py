"""Per-example gradients as rows of numbers, and the norms of the rows.

Imports nothing of the package.
"""

from __future__ import annotations

import math

import torch

NORM_PIECE = 128
"""Numbers of a gradient whose squares are added in float32."""


def as_rows(gradients: torch.Tensor) -> torch.Tensor:
    """[B, ...] as [B, numbers] in the order of memory: no copy where each row is dense, whatever its layout."""
    return gradients.permute(0, *_order(gradients)).reshape(len(gradients), math.prod(gradients.shape[1:]))


def like_one(total: torch.Tensor, gradients: torch.Tensor) -> torch.Tensor:
    """One row of ``as_rows(gradients)``, [numbers], in the shape of one gradient."""
    order = _order(gradients)
    inverse = [order.index(axis) for axis in range(1, gradients.ndim)]
    return total.view([gradients.shape[axis] for axis in order]).permute(inverse)


def squared_norms(rows: torch.Tensor) -> torch.Tensor:
    """Squared norms of [B, numbers], float64 [B]; infinite where a float32 number is above about 1e19.

    float32 norms of short pieces, added up in float64: a tenth of the time of float64 throughout. Even in the worst
    order of additions a piece's norm is off by 128 roundings of 3e-8, less than half of ``clipping.ROUNDING_SLACK``.
    Numbers below 1e-19, whose squares vanish, are too short to matter for any clip norm from 1e-8 on.
    """
    if rows.dtype != torch.float32 or rows.shape[1] < 2 * NORM_PIECE:
        return torch.linalg.vector_norm(rows, dim=1, dtype=torch.float64).square()
    whole = rows.shape[1] // NORM_PIECE * NORM_PIECE
    pieces = torch.linalg.vector_norm(rows[:, :whole].unflatten(1, (-1, NORM_PIECE)), dim=2).to(torch.float64)
    rest = torch.linalg.vector_norm(rows[:, whole:], dim=1, dtype=torch.float64)
    return pieces.square().sum(1) + rest.square()


def _order(gradients: torch.Tensor) -> list[int]:
    """The dimensions after the first in the order of memory, slowest first."""
    return sorted(range(1, gradients.ndim), key=gradients.stride, reverse=True)
