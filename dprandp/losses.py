"""Losses of a classifier's scores, and their gradients with respect to the scores.

The labels' shape says which: of one class an image, the softmax cross-entropy of its scores; of several labels an
image (multi-label), the sum of the binary cross-entropies of its labels, each with a sigmoid.

Weights come from declared shares alone, and none is above 1: a clipped gradient cannot grow with its weight, so the
rarest class keeps its weight and the others get less.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional


def residual(scores: Tensor, labels: Tensor, weights: Tensor | None = None) -> Tensor:
    """The gradient of each row's loss with respect to its scores.

    Args:
        scores: floating [..., C].
        labels: int64 [...] in 0 … C-1, one class a row; or [..., C] of 0 and 1.
        weights: ``class_weights``, on the scores' device.

    Returns:
        As the scores: w_y (softmax(s) − onehot(y)), or w_jy (σ(s_j) − y_j) for each label j; a row is a function of
        its own scores and labels.
    """
    if labels.ndim == scores.ndim:
        apart = torch.sigmoid(scores) - labels
        return apart if weights is None else apart * _of_labels(labels, weights)
    apart = torch.softmax(scores, dim=-1)
    chosen = labels[..., None]
    apart.scatter_add_(-1, chosen, apart.new_full((1,) * apart.ndim, -1.0).expand_as(chosen))
    return apart if weights is None else apart * weights.to(apart.dtype)[labels][..., None]


def through_head(
    unit: Tensor, head: Tensor, labels: Tensor, views: int, weights: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The gradients of each record's mean loss over its views, with respect to the scores and to the features.

    In float64: a library adds up a row of a float32 product in another order at another place of the batch, which other
    records decide. Where the result is rounded to bfloat16 afterwards, that difference of 1e-7 becomes one of 4e-3.

    Args:
        unit: floating [B · K, D], the features of a record's K views next to each other. head: [D, C].
        labels: int64 [B], or [B, C] of 0 and 1. views: K. weights: ``class_weights``.

    Returns:
        [B · K, C] and [B · K, D], of the features' type; row by row a function of that view, its label and the head.
    """
    precise = head.double()
    scores = unit.double() @ precise
    apart = residual(scores, labels.repeat_interleave(views, dim=0), weights) / views
    return apart.to(unit.dtype), (apart @ precise.t()).to(unit.dtype)


def loss(scores: Tensor, labels: Tensor, weights: Tensor | None = None) -> Tensor:
    """The loss of each row, [N], whose gradient is ``residual``; scores [N, C], labels [N] or [N, C]."""
    if labels.ndim == scores.ndim:
        each = functional.binary_cross_entropy_with_logits(scores, labels.to(scores.dtype), reduction="none")
        return (each if weights is None else each * _of_labels(labels, weights)).sum(dim=-1)
    each = functional.cross_entropy(scores, labels, reduction="none")
    return each if weights is None else each * weights.to(each.dtype)[labels]


def probabilities(scores: Tensor, multi_label: bool) -> Tensor:
    """Of scores [N, C]: rows of the softmax, which sum to 1, or each label's own."""
    return scores.sigmoid() if multi_label else scores.softmax(dim=-1)


def class_weights(shares: Sequence[float] | None, multi_label: bool) -> Tensor | None:
    """Weights by which all classes count alike; None without shares.

    Args:
        shares: declared, in (0, 1): of the images of each class, or of those that have each label.

    Returns:
        float32, 1 at most. Of one class an image [C]: the smallest share over the class's own. Of several labels
        [2, C], of images without and with the label: the smaller of both shares over their own.
    """
    if shares is None:
        return None
    having = torch.tensor(shares, dtype=torch.float64)
    if not multi_label:
        return (having.min() / having).float()
    both = torch.stack([1 - having, having])
    return (both.amin(dim=0) / both).float()


def _of_labels(labels: Tensor, weights: Tensor) -> Tensor:
    return torch.where(labels > 0, weights[1], weights[0])
