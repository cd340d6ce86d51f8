"""Alignment and uniformity on the unit sphere: the contrastive loss of DP-RandP's Phase I (Wang & Isola 2020).

arXiv 2005.10242. Everything is computed in float32, under autocast too: the losses are small differences of products,
which eight bits of mantissa cannot hold.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from dprandp.errors import UsageError


def alignment(x: Tensor, y: Tensor) -> Tensor:
    """mean ‖x_i - y_i‖² over the pairs of unit vectors.

    Args:
        x, y: [B, D] of any floating dtype and any length; they are scaled to unit length here.

    Returns:
        float32 scalar in [0, 4]; 0 when both views of every image agree.
    """
    _check_pair(x, y)
    with torch.autocast(x.device.type, enabled=False):
        return (_unit(x) - _unit(y)).square().sum(dim=1).mean()


def uniformity(x: Tensor) -> Tensor:
    """log mean_{i<j} exp(-2 ‖x_i - x_j‖²) over the pairs of unit vectors.

    Args:
        x: [B, D] with B >= 2, of any floating dtype and any length; scaled to unit length here.

    Returns:
        float32 scalar in [-8, 0]; 0 when all vectors coincide, about -4 when they cover a sphere of many dimensions.

    Raises:
        UsageError: fewer than two vectors, or not a matrix.
    """
    _check_two(x)
    with torch.autocast(x.device.type, enabled=False):
        unit = _unit(x)
        # ‖a - b‖² = 2 - 2 a·b for unit vectors, so -2‖a - b‖² = 4 a·b - 4. The pairs i > j repeat the pairs i < j and
        # leave the mean as it is; the diagonal is taken out.
        exponents = (4 * (unit @ unit.T) - 4).fill_diagonal_(-math.inf)
        return torch.logsumexp(exponents.flatten(), dim=0) - math.log(len(x) * (len(x) - 1))


def align_uniformity(x: Tensor, y: Tensor) -> Tensor:
    """The contrastive loss of Phase I: alignment(x, y) + (uniformity(x) + uniformity(y)) / 2.

    Args:
        x, y: embeddings [B, D] of the two views of the same B >= 2 images, normalised or not.

    Returns:
        float32 scalar with a gradient.

    Raises:
        UsageError: shapes that differ, fewer than two pairs.
    """
    return alignment(x, y) + (uniformity(x) + uniformity(y)) / 2


def _unit(x: Tensor) -> Tensor:
    # The floor makes a zero vector stay zero with a zero gradient of finite size, where 0/0 would poison the batch.
    return F.normalize(x.float(), dim=1, eps=1e-8)


def _check_pair(x: Tensor, y: Tensor) -> None:
    if x.shape != y.shape or x.ndim != 2 or len(x) < 1:
        raise UsageError(
            f"the two views' embeddings have shapes {tuple(x.shape)} and {tuple(y.shape)}",
            fix="pass two matrices [B, D] of the same shape",
        )


def _check_two(x: Tensor) -> None:
    if x.ndim != 2 or len(x) < 2:
        raise UsageError(
            f"uniformity needs at least two vectors [B, D], got shape {tuple(x.shape)}",
            fix="use a batch of 2 or more",
        )
