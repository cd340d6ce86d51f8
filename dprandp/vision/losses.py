"""What may be asked of embeddings: alignment and uniformity (DP-RandP's Phase I), VICReg, two classical losses.

Alignment and uniformity on the unit sphere are those of Wang & Isola 2020, arXiv 2005.10242. Everything is computed in
float32, under autocast too: the losses are small differences of products, which eight bits of mantissa cannot hold.
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


INVARIANCE, VARIANCE, COVARIANCE = 25.0, 25.0, 1.0
"""Weights of the three terms of VICReg, as published."""

_VARIANCE_FLOOR = 1e-4  # under the root, whose slope at zero is infinite


def vicreg(x: Tensor, y: Tensor) -> Tensor:
    """Variance, invariance, covariance (Bardes, Ponce, LeCun 2022, arXiv 2105.04906, equations 1 to 6).

    25 · mean (x_ij - y_ij)² + 25 · (V(x) + V(y)) + C(x) + C(y), where V is the mean over dimensions of
    max(0, 1 - √(variance + 1e-4)) and C the sum of squares of the covariance matrix off its diagonal, over D; variances
    and covariances divide by B - 1.

    Args:
        x, y: embeddings [B, D] of the two views of the same B >= 2 images, of any floating dtype; not normalised.

    Returns:
        float32 scalar, at least 0, with a gradient.

    Raises:
        UsageError: shapes that differ, fewer than two pairs.
    """
    _check_pair(x, y)
    _check_two(x)
    with torch.autocast(x.device.type, enabled=False):
        x, y = x.float(), y.float()
        loss = INVARIANCE * (x - y).square().mean()
        for z in (x, y):
            centred = z - z.mean(dim=0)
            covariance = centred.T @ centred / (len(z) - 1)
            variances = covariance.diagonal()
            spread = F.relu(1 - (variances + _VARIANCE_FLOOR).sqrt()).mean()
            redundant = (covariance.square().sum() - variances.square().sum()) / z.shape[1]
            loss = loss + VARIANCE * spread + COVARIANCE * redundant
        return loss


TEMPERATURE = 0.1
"""Of the softmax over cosines, in ``instance_loss``."""


def instance_loss(x: Tensor, classes: Tensor, labels: Tensor) -> Tensor:
    """Which image a view was made from, as a classification (Dosovitskiy et al. 2014, exemplar networks), by cosines.

    Args:
        x: embeddings [B, D]. classes: [M, D], a trained vector for each image. Both are scaled to unit length here.
        labels: int64 [B] in 0..M-1.

    Returns:
        float32 scalar: mean over the views of the cross-entropy, nats, of softmax(cosines / ``TEMPERATURE``).
    """
    with torch.autocast(x.device.type, enabled=False):
        return F.cross_entropy(_unit(x) @ _unit(classes).T / TEMPERATURE, labels)


def cosine_distance(x: Tensor, targets: Tensor) -> Tensor:
    """mean (1 - cos(x_i, t_i)).

    Args:
        x: predictions [B, D]. targets: [B, D]. Scaled to unit length here.

    Returns:
        float32 scalar in [0, 2].

    Raises:
        UsageError: shapes that differ.
    """
    _check_pair(x, targets)
    with torch.autocast(x.device.type, enabled=False):
        return 1 - (_unit(x) * _unit(targets)).sum(dim=1).mean()


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
            f"uniformity and spread need at least two vectors [B, D], got shape {tuple(x.shape)}",
            fix="use a batch of 2 or more",
        )
