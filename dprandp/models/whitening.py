"""Standardise and whiten features with the statistics of *synthetic* images, then scale each to unit norm.

DP-SGD adds the same noise to every coordinate of the head's gradient, so it serves features whose directions carry
signal of like size. Whitening gives them that; the statistics come from images of a random process, which are public,
so it costs no privacy. Nothing in this file may ever be called with private features: ``fit`` is for synthetic ones.

Two statistics are used. Principal components are equalised: by how much features vary from image to image. Then features are
*evened*: by how much they vary between views of one image (crops, other colours), which says nothing of its class.
That is what speech processing calls within-class covariance normalisation (Hatch, Kajarekar & Stolcke 2006,
"Within-Class Covariance Normalization for SVM-Based Speaker Recognition"), with each synthetic image as a class.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

VIEW_RIDGE = 0.3
"""Added to each axis's variance between views, relative to their mean: as much as a few thousand views can tell."""

DEVIATION_FLOOR = 1e-3
"""Relative to the mean deviation: a feature that hardly moves on synthetic images is not blown up."""


class Part(NamedTuple):
    """Features that are whitened by themselves.

    Attributes:
        width: how many.
        share: of the squared length of the whole that this part is given; the shares of all parts sum to 1.
    """

    width: int
    share: float


class Whitener(nn.Module):
    """Each part of the features: a linear map, then division by the Euclidean norm. One image at a time.

    Parts whitened apart and put side by side serve a private head better than one whitening of all: the components with the
    least energy, where one part would be lost in the other's noise, stay with the part that they belong to.

    Args:
        feature_dim: D. dims: components of each part, d.
        parts: widths and shares of the P parts, which sum to D and 1; None: all features are one part.

    Attributes:
        mean: [D] float32, feature means over synthetic images.
        projection: [D, d] float32: 1 / deviation, principal components, and a weight 1 / (s + floor) for each axis. The rows
            of a part are its own map.
    """

    def __init__(self, feature_dim: int, dims: int, parts: Sequence[Part] | None = None) -> None:
        super().__init__()
        self.parts = tuple(parts or [Part(feature_dim, 1.0)])
        self.register_buffer("mean", torch.zeros(feature_dim))
        self.register_buffer("projection", torch.zeros(feature_dim, dims))

    @property
    def components(self) -> int:
        """Dimensions of a part after whitening, d."""
        return self.projection.shape[1]

    @property
    def dims(self) -> int:
        """Dimensions after whitening, P d."""
        return len(self.parts) * self.components

    def rows(self) -> Iterator[tuple[slice, float]]:
        """Of each part: which features are its own, and the length √share that its whitened features have."""
        start = 0
        for part in self.parts:
            yield slice(start, start + part.width), math.sqrt(part.share)
            start += part.width

    def forward(self, features: Tensor) -> Tensor:
        """Float [..., D] to [..., P d] of unit norm (a part equal to its mean stays zero)."""
        return torch.cat(
            [
                length * functional.normalize((features[..., own] - self.mean[own]) @ self.projection[own], dim=-1)
                for own, length in self.rows()
            ],
            dim=-1,
        )

    def cut(self, whitened: Tensor, components: int) -> Tensor:
        """What a whitener of fewer components would have made: its components are the first ones of each part.

        Exactly so without views; with views up to how much each image counted.

        Args:
            whitened: float [N, P d], results of ``forward``.
            components: at most d.

        Returns:
            Float [N, P components] of unit norm.
        """
        if components == self.components:
            return whitened
        lengths = whitened.new_tensor([length for _, length in self.rows()])
        first = whitened.unflatten(-1, (len(self.parts), self.components))[..., :components]
        return (lengths[:, None] * functional.normalize(first, dim=-1)).flatten(-2)


@torch.no_grad()
def fit(
    features: Tensor, dims: int, floor: float = 0.1, parts: Sequence[Part] | None = None, *, views: int = 1
) -> Whitener:
    """Fit a whitener to the features of synthetic images.

    Args:
        features: [n, D] float32 of *synthetic* images (changed in place to save memory).
        dims: components to keep of each part; at most min(n - 1, width), fewer are kept where there are no more.
        floor: added to the standard deviation s of each principal axis before its inverse is taken; components with s far
            below it are damped rather than amplified.
        parts: as for ``Whitener``.
        views: V; the rows are V views of each of n / V images, next to each other. With more than one, features are
            evened by how the views of an image differ.

    Returns:
        The whitener. Deterministic: an eigenvector's sign is that of its product with fixed random numbers.
    """
    count, width = features.shape
    parts = tuple(parts or [Part(width, 1.0)])
    whitener = Whitener(width, min(dims, count - 1, *(part.width for part in parts)), parts)
    for own, _ in whitener.rows():
        mean, scale, components = _principal_components(features[:, own], whitener.components, floor)
        if views > 1:
            whitened = functional.normalize(features[:, own] @ components, dim=1)  # the features are standardised by now
            components = _normalise_within(components, whitened.unflatten(0, (-1, views)))
        whitener.mean[own], whitener.projection[own] = mean, scale[:, None] * components
    return whitener


def _principal_components(features: Tensor, dims: int, floor: float) -> tuple[Tensor, Tensor, Tensor]:
    """Mean and scale [w], weighted components [w, dims] of one part's features [n, w], which are standardised in place."""
    count, width = features.shape
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
    components = features.t() @ vectors / (values * count).sqrt() if wide else vectors
    # not the sign of the largest entry: it often has a rival of the other sign, and rounding would choose between them
    fixed = torch.randn(len(components), generator=torch.Generator().manual_seed(0)).to(components)
    signs = (fixed @ components).sign()
    return mean, scale, components * signs / (values.sqrt() + floor)


def _normalise_within(components: Tensor, whitened: Tensor) -> Tensor:
    """Let features vary equally in all directions from view to view of one image.

    With C the covariance within images, features go through L⁻¹, C + ridge = L Lᵀ. L is triangular, so axis k still
    depends on the first k components alone, and a whitener can be cut to fewer.

    Args:
        components: [w, d], standardised features to components.
        whitened: float32 [n, V, d], features along the components, of unit norm.

    Returns:
        Axes like those given.
    """
    apart = (whitened - whitened.mean(dim=1, keepdim=True)).flatten(0, 1).double()
    covariance = apart.t() @ apart / (len(whitened) * (whitened.shape[1] - 1))
    variances = covariance.diagonal()
    variances += VIEW_RIDGE * variances.mean() + torch.finfo(torch.float32).tiny
    lower = torch.linalg.cholesky(covariance / variances.mean())
    return torch.linalg.solve_triangular(lower.t(), components.double(), upper=True, left=False).float()


class PooledOnly(nn.Module):
    """No whitening: the features as they are, for a network trained from scratch (De et al. 2022)."""

    def __init__(self, feature_dim: int) -> None:
        super().__init__()
        self.dims = feature_dim

    def forward(self, features: Tensor) -> Tensor:
        """Float [..., D], unchanged."""
        return features
