"""Standardise and whiten features with the statistics of *synthetic* images, then scale each to unit norm.

DP-SGD adds the same noise to every coordinate of the head's gradient, so it serves features whose directions carry
signal of like size. Whitening gives them that; the statistics come from images of a random process, which are public,
so it costs no privacy. Nothing in this file may ever be called with private features: ``fit`` is for synthetic ones.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

DEVIATION_FLOOR = 1e-3
"""Relative to the mean deviation: a feature that hardly moves on synthetic images is not blown up."""


class Whitener(nn.Module):
    """Linear map followed by division by the Euclidean norm, one image at a time.

    Attributes:
        mean: [D] float32, feature means over synthetic images.
        projection: [D, d] float32: 1 / deviation, principal axes, and a weight 1 / (s + floor) for each axis.
    """

    def __init__(self, feature_dim: int, dims: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(feature_dim))
        self.register_buffer("projection", torch.zeros(feature_dim, dims))

    @property
    def dims(self) -> int:
        """Dimensions after whitening."""
        return self.projection.shape[1]

    def forward(self, features: Tensor) -> Tensor:
        """Float [..., D] to [..., d] of unit norm (a feature vector equal to the mean stays zero)."""
        whitened = (features - self.mean) @ self.projection
        return functional.normalize(whitened, dim=-1)


@torch.no_grad()
def fit(features: Tensor, dims: int, floor: float = 0.1) -> Whitener:
    """Fit a whitener to the features of synthetic images.

    Args:
        features: [n, D] float32 of *synthetic* images (changed in place to save memory).
        dims: dimensions to keep; at most min(n - 1, D), fewer are kept where there are no more.
        floor: added to the standard deviation s of each principal axis before its inverse is taken; axes with s far
            below it are damped rather than amplified.

    Returns:
        The whitener. Deterministic: eigenvectors' signs are fixed by making their largest entry positive.
    """
    count, width = features.shape
    dims = min(dims, count - 1, width)
    mean = features.mean(dim=0)
    features -= mean
    deviation = features.square().mean(dim=0).sqrt()
    scale = 1 / (deviation + DEVIATION_FLOOR * deviation.mean())
    features *= scale
    # the smaller of the two Gram matrices holds the same spectrum
    wide = width > count
    gram = (features @ features.t() if wide else features.t() @ features) / count
    values, vectors = torch.linalg.eigh(gram)
    values, vectors = values[-dims:].flip(0).clamp(min=1e-12), vectors[:, -dims:].flip(1)
    axes = features.t() @ vectors / (values * count).sqrt() if wide else vectors
    signs = axes.gather(0, axes.abs().argmax(dim=0, keepdim=True)).sign()
    whitener = Whitener(width, dims)
    whitener.mean.copy_(mean)
    whitener.projection.copy_(scale[:, None] * axes * signs / (values.sqrt() + floor))
    return whitener


class PooledOnly(nn.Module):
    """No whitening: the features as they are, for a network trained from scratch (De et al. 2022)."""

    def __init__(self, feature_dim: int) -> None:
        super().__init__()
        self.dims = feature_dim

    def forward(self, features: Tensor) -> Tensor:
        """Float [..., D], unchanged."""
        return features
