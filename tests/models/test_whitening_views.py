"""Whitening by views of one image: against the definition, and the guarantee that a whitener can still be cut."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from dprandp.models import whitening
from dprandp.models.whitening import Part, Whitener

PARTS = [Part(9, 0.3), Part(7, 0.7)]
COMPONENTS = 5
VIEWS = 3


def views_of(images: int = 400) -> Tensor:
    """Features of three views of each image, [images · 3, 16]: they differ most along the first features."""
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(images, 1, 16, generator=generator) @ torch.randn(16, 16, generator=generator)
    moves = torch.randn(images, VIEWS, 16, generator=generator) * torch.linspace(4, 0.1, 16)
    return (features + moves).flatten(0, 1)


def fitted(features: Tensor, views: int, components: int = COMPONENTS) -> Whitener:
    return whitening.fit(features.clone(), components, 0.1, PARTS, views=views)


def within(part: Tensor) -> np.ndarray:
    """Covariance within images, image by image: [n V, d] -> [d, d]."""
    return np.mean([np.cov(views.double().numpy().T) for views in part.unflatten(0, (-1, VIEWS))], axis=0)


def unit(part: Tensor) -> Tensor:
    return torch.nn.functional.normalize(part, dim=-1)


def test_features_vary_equally_between_views(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(whitening, "VIEW_RIDGE", 0.0)
    features = views_of()
    plain, normalised = fitted(features, 1), fitted(features, VIEWS)
    old, new = plain(features).split(COMPONENTS, 1), normalised(features).split(COMPONENTS, 1)
    rows = zip(plain.rows(), old, new, strict=True)
    for (own, length), old, new in rows:
        old = old / length
        assert np.linalg.cond(within(old)) > 2  # there was something to do
        # the map of a part, from its components without views, found from the two projections
        turn = torch.linalg.lstsq(plain.projection[own], normalised.projection[own]).solution
        assert (turn.tril(-1).abs() < 1e-4 * turn.abs().max()).all()
        assert np.linalg.cond(within(old @ turn)) < 1.01
        assert torch.allclose(new, length * unit(old @ turn), atol=1e-4)
    assert torch.allclose(normalised(features).norm(dim=1), torch.ones(len(features)), atol=1e-5)
    assert torch.equal(normalised.mean, plain.mean)


def test_a_ridge_keeps_few_views_from_blowing_up_an_axis() -> None:
    features = views_of(4)[:8]  # eight views of "one" image, and four pairs of equal ones
    turned = torch.linalg.lstsq(fitted(features, 1).projection[:9], fitted(features, 8).projection[:9]).solution
    gains = torch.linalg.svdvals(turned)
    assert 1 < gains[0] / gains[-1] < 1.01 * np.sqrt((COMPONENTS + whitening.VIEW_RIDGE) / whitening.VIEW_RIDGE)
    same = views_of(20)[::VIEWS].repeat_interleave(2, dim=0)  # views that do not differ
    assert torch.allclose(fitted(same, 2)(same), fitted(same, 1)(same), atol=1e-4)


def test_fewer_axes_are_the_first_ones() -> None:
    features = views_of()
    normalised, few = fitted(features, VIEWS), fitted(features, VIEWS, components=3)(features)
    cut = normalised.cut(normalised(features), 3)
    assert cut.shape == few.shape
    assert (cut * few).sum(dim=1).mean() > 0.98
    last = torch.cat([part[:, 2:] for part in normalised(features).split(COMPONENTS, dim=1)], dim=1)
    assert (unit(last) * few).sum(dim=1).mean() < 0.8  # other components would not be alike


def test_it_helps_a_head_that_cannot_tell_views_apart() -> None:
    """Classes differ along a quiet axis, views and images along another; nearest class means of unit vectors."""
    generator = torch.Generator().manual_seed(3)
    moves = torch.tensor([8.0, 0.2, 0.2, 0.2, 0.2, 0.2])
    images = torch.randn(500, 1, 6, generator=generator)
    synthetic = (images + torch.randn(500, 4, 6, generator=generator) * moves).flatten(0, 1)
    labels = torch.arange(2000) % 2
    real = torch.randn(2000, 6, generator=generator) * moves
    real[:, 3] += labels.float()

    def accuracy(views: int) -> float:
        whitener = whitening.fit(synthetic[:: 4 // views].clone(), 6, 0.1, views=views)
        features = whitener(real)
        means = torch.stack([features[labels == which].mean(dim=0) for which in (0, 1)])
        return float((torch.cdist(features, means).argmin(dim=1) == labels).float().mean())

    plain = whitening.fit(images.flatten(0, 1).clone(), 6, 0.1)(real)
    means = torch.stack([plain[labels == which].mean(dim=0) for which in (0, 1)])
    before = float((torch.cdist(plain, means).argmin(dim=1) == labels).float().mean())
    assert accuracy(4) > before + 0.05


def test_rounding_does_not_choose_the_sign_of_an_axis() -> None:
    generator = torch.Generator().manual_seed(5)
    strength = torch.randn(200, 4, generator=generator) * torch.tensor([4.0, 3.0, 2.0, 1.0])
    odd = torch.eye(4)
    features = torch.cat([strength @ odd, strength @ -odd], dim=1)  # every axis has two largest entries, +x and -x
    first = whitening.fit(features.clone(), 4).projection
    for _ in range(20):
        rounded = features * (1 + 1e-6 * torch.randn(features.shape, generator=generator))
        torch.testing.assert_close(whitening.fit(rounded, 4).projection, first, rtol=1e-3, atol=1e-3)
