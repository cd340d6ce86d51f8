"""Standardise and whiten features with the statistics of *synthetic* images, then scale each to unit norm.

DP-SGD adds the same noise to every coordinate of the head's gradient, so it works best with features whose directions
carry signal of similar size. The statistics come from public images of a random process, so they cost no privacy.
Never call ``fit`` with private features.

There are two statistics: the covariance over images, for the principal components, and the covariance between views of
one image (crops, other colours), which carries no information about its class: within-class covariance normalisation
(Hatch, Kajarekar & Stolcke 2006), with each synthetic image as a class.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

VIEW_RIDGE = 0.3
"""Added to each component's variance between views, relative to their mean: the precision of a few thousand views."""

DEVIATION_FLOOR = 1e-3
"""Relative to the mean deviation, so that a feature which hardly varies on synthetic images is not amplified."""


class Part(NamedTuple):
    """Features that are whitened together, apart from all others."""

    width: int  # how many
    share: float  # of this part in the squared length of the whole; the shares of all parts sum to 1


class Whitener(nn.Module):
    """Each part of the features: a linear map, then division by the Euclidean norm. One image at a time.

    Separate whitening of the parts is better for a private head than one whitening of all, which would mix the
    components of least energy of one part with the noise of another.

    Args:
        feature_dim: D. dims: components of each part, d. parts: widths and shares of the P parts; None: one part.
        kind: float32, or bfloat16 for the projection and the features that it multiplies (not for sums and results).

    Attributes:
        mean: [D] float32, over synthetic images.
        projection: [D, d] of ``kind``: 1 / deviation, principal components, and a weight 1 / (s + floor) for each. The
            rows of a part are its own map.
    """

    def __init__(
        self, feature_dim: int, dims: int, parts: Sequence[Part] | None = None, kind: torch.dtype = torch.float32
    ) -> None:
        super().__init__()
        self.parts = tuple(parts or [Part(feature_dim, 1.0)])
        self.register_buffer("mean", torch.zeros(feature_dim))
        self.register_buffer("projection", torch.zeros(feature_dim, dims, dtype=kind))

    @property
    def components(self) -> int:
        """Dimensions of a part after whitening, d."""
        return self.projection.shape[1]

    @property
    def dims(self) -> int:
        """Dimensions after whitening, P d."""
        return len(self.parts) * self.components

    def rows(self) -> Iterator[tuple[slice, float]]:
        """For each part, the slice of its features, and the length √share of its whitened features."""
        start = 0
        for part in self.parts:
            yield slice(start, start + part.width), math.sqrt(part.share)
            start += part.width

    def forward(self, features: Tensor) -> Tensor:
        """Float [..., D] to [..., P d] of unit norm (a part equal to its mean stays zero)."""
        parts = [length * functional.normalize(self.mapped(features, own), dim=-1) for own, length in self.rows()]
        return torch.cat(parts, dim=-1)

    def mapped(self, features: Tensor, own: slice) -> Tensor:
        """The features [..., D] of one part under its linear map, [..., d], before they are scaled."""
        centred = features[..., own] - self.mean[own]
        projection = self.projection[own]
        return (centred.to(projection.dtype) @ projection).to(centred.dtype)

    def cut(self, whitened: Tensor, components: int) -> Tensor:
        """The result [N, P components] of a whitener with fewer components, which are the first ones of each part.

        Of results [N, P d] of ``forward``. Exact without views; with views, up to the weight of each image.
        """
        if components == self.components:
            return whitened
        lengths = whitened.new_tensor([length for _, length in self.rows()])
        first = whitened.unflatten(-1, (len(self.parts), self.components))[..., :components]
        return (lengths[:, None] * functional.normalize(first, dim=-1)).flatten(-2)


@torch.no_grad()
def fit(
    features: Tensor,
    dims: int,
    floor: float = 0.1,
    parts: Sequence[Part] | None = None,
    *,
    views: int = 1,
    kind: torch.dtype = torch.float32,
    fitted: Callable[[int], None] = lambda parts: None,
) -> Whitener:
    """Fit a whitener to the features of synthetic images.

    Args:
        features: [n, D] float32 of *synthetic* images (changed in place to save memory).
        dims: components to keep of each part; at most min(n - 1, width) are kept.
        floor: added to the standard deviation of each principal component before its inverse is taken, so that
            components with far less are damped rather than amplified.
        parts, kind: as for ``Whitener``; statistics are computed in float32.
        views: V; the rows are V views of each of n / V images, next to each other.
        fitted: called with 1 after each part: a wide one takes a minute.

    Returns:
        The whitener. Deterministic: an eigenvector's sign is that of its product with fixed random numbers.
    """
    count, width = features.shape
    parts = tuple(parts or [Part(width, 1.0)])
    whitener = Whitener(width, min(dims, count - 1, *(part.width for part in parts)), parts, kind)
    for own, _ in whitener.rows():
        mean, scale, components, projected = _principal_components(features[:, own], whitener.components, floor)
        if views > 1:
            whitened = functional.normalize(projected, dim=1)
            components = _normalise_within(components, whitened.unflatten(0, (-1, views)))
        whitener.mean[own], whitener.projection[own] = mean, scale[:, None] * components
        fitted(1)
    return whitener


def _principal_components(features: Tensor, dims: int, floor: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Mean and scale [w], weighted components [w, dims] of a part's features [n, w]; standardises these in place.

    And what the components make of the standardised features, [n, dims].
    """
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
    lengths = (values * count).sqrt()  # singular values
    components = features.t() @ (vectors / lengths) if wide else vectors
    # not the sign of the largest entry: it often has a rival of the other sign, and rounding would choose between them
    fixed = torch.randn(len(components), generator=torch.Generator().manual_seed(0)).to(components)
    signs = (fixed @ components).sign()
    weights = signs / (values.sqrt() + floor)
    projected = vectors * (lengths * weights) if wide else features @ (vectors * weights)
    return mean, scale, components * weights, projected


def _normalise_within(components: Tensor, whitened: Tensor) -> Tensor:
    """Components [w, d] after which the views of an image vary equally in all directions.

    With C the covariance within images, features are multiplied by L⁻¹, C + ridge = L Lᵀ. L is triangular, so
    component k still depends on the first k alone, and a whitener can be cut to fewer.

    Args:
        components: [w, d], maps standardised features to components.
        whitened: float32 [n, V, d], components of the features, of unit norm.
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
