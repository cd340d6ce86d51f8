"""Whitening by views of one image: against the definition, and the guarantee that a whitener can still be cut."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import Tensor

from dprandp.vision import whitening
from dprandp.vision.whitening import Part, Whitener

PARTS = [Part(9, 0.3), Part(7, 0.7)]
AXES = 5


def fitted(images: int = 400) -> tuple[Whitener, Tensor]:
    """A whitener, and what it makes of three views of each image: they differ most along the first features."""
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(images, 16, generator=generator) @ torch.randn(16, 16, generator=generator)
    whitener = whitening.fit(features.clone(), AXES, 0.1, PARTS)
    shift = torch.randn(images, 3, 16, generator=generator) * torch.linspace(4, 0.1, 16)
    return whitener, features[:, None] + shift


def within(part: Tensor) -> np.ndarray:
    """Covariance within images, image by image: [n, V, d] -> [d, d]."""
    return np.mean([np.cov(views.double().numpy().T) for views in part], axis=0)


def unit(part: Tensor) -> Tensor:
    return torch.nn.functional.normalize(part, dim=-1)


def test_features_vary_equally_between_views(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(whitening, "VIEW_RIDGE", 0.0)
    whitener, features = fitted()
    before = whitener(features)
    evened = whitening.even_views(whitener, before)
    rows = zip(PARTS, whitener.rows(), before.split(AXES, dim=-1), strict=True)
    for part, (own, length), old in rows:
        old = old / length
        assert np.linalg.cond(within(old)) > 2  # there was something to do
        # the map of a part, from its axes of before: found from the two projections
        turn = torch.linalg.lstsq(whitener.projection[own], evened.projection[own]).solution
        assert (turn.tril(-1).abs() < 1e-4 * turn.abs().max()).all()
        assert np.linalg.cond(within(old @ turn)) < 1.01
        new = evened(features)[..., PARTS.index(part) * AXES :][..., :AXES]
        assert torch.allclose(new, length * unit(old @ turn), atol=1e-4)
    assert torch.allclose(evened(features).norm(dim=-1), torch.ones(400, 3), atol=1e-5)
    assert torch.equal(evened.mean, whitener.mean)


def test_a_ridge_keeps_few_views_from_blowing_up_an_axis() -> None:
    whitener, features = fitted()
    two = whitener(features[:1, :2])  # a covariance of rank one
    evened = whitening.even_views(whitener, two)
    gains = torch.linalg.svdvals(torch.linalg.lstsq(whitener.projection[:9], evened.projection[:9]).solution)
    assert gains.isfinite().all()
    assert gains[0] / gains[-1] < 1.01 * np.sqrt((AXES + whitening.VIEW_RIDGE) / whitening.VIEW_RIDGE)
    same = whitening.even_views(whitener, whitener(features[:3, :1]).expand(-1, 2, -1))  # views that do not differ
    assert torch.allclose(same(features), whitener(features), atol=1e-5)


def test_fewer_axes_are_the_first_ones() -> None:
    whitener, features = fitted()
    evened = whitening.even_views(whitener, whitener(features))
    few = copy.deepcopy(whitener)
    few.projection = few.projection[:, :3].clone()
    few = whitening.even_views(few, few(features))
    cut = evened.cut(evened(features), 3)
    assert cut.shape == few(features).shape
    alike = (cut * few(features)).sum(dim=-1)
    assert alike.mean() > 0.98
    last = torch.cat([part[..., 2:] for part in evened(features).split(AXES, dim=-1)], dim=-1)
    assert (unit(last) * few(features)).sum(dim=-1).mean() < 0.8  # other axes would not be alike


def test_it_helps_a_head_that_cannot_tell_views_apart() -> None:
    """Two classes a little apart along a quiet axis, and views that move a lot along another: nearest class means."""
    generator = torch.Generator().manual_seed(3)
    noise = torch.randn(2000, 6, generator=generator) * torch.tensor([1.0, 1, 1, 1, 1, 1])
    whitener = whitening.fit(noise.clone(), 6, 0.1)
    moves = torch.tensor([8.0, 0.2, 0.2, 0.2, 0.2, 0.2])
    views = noise[:500, None] + torch.randn(500, 4, 6, generator=generator) * moves
    evened = whitening.even_views(whitener, whitener(views))
    labels = torch.arange(2000) % 2
    real = torch.randn(2000, 6, generator=generator) * moves
    real[:, 3] += labels.float()

    def accuracy(features: Tensor) -> float:
        means = torch.stack([features[labels == which].mean(dim=0) for which in (0, 1)])
        return float((torch.cdist(features, means).argmin(dim=1) == labels).float().mean())

    assert accuracy(evened(real)) > accuracy(whitener(real)) + 0.05
