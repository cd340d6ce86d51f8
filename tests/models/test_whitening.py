"""Whitening, of parts and by views of one image, against definitions; and that a whitener can still be cut."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional

from dprandp.models import whitening
from dprandp.models.whitening import Part, Whitener

PARTS = (Part(10, 0.6), Part(20, 0.4))
VIEW_PARTS = (Part(9, 0.3), Part(7, 0.7))
COMPONENTS = 5
VIEWS = 3


def correlated_features(count, width, seed=0):
    generator = torch.Generator().manual_seed(seed)
    scales = torch.logspace(1, -1, width)
    mixing = torch.randn(width, width, generator=generator)
    return (torch.randn(count, width, generator=generator) * scales) @ mixing + 5


@pytest.mark.parametrize(("count", "width"), [(400, 30), (40, 90)])
def test_whitener_equals_an_svd(count, width):
    features, dims = correlated_features(count, width), 20
    whitener = whitening.fit(features.clone(), dims, floor=0.1)
    x = features.double()
    mean, deviation = x.mean(0), x.std(0, correction=0)
    standard = (x - mean) / (deviation + whitening.DEVIATION_FLOOR * deviation.mean())
    _, s, v = torch.linalg.svd(standard, full_matrices=False)
    expected = functional.normalize(standard @ (v[:dims].T / (s[:dims] / math.sqrt(count) + 0.1)), dim=1)
    got = whitener(features).double()
    torch.testing.assert_close(got.norm(dim=1), torch.ones(count, dtype=torch.float64), rtol=1e-4, atol=1e-4)
    # components are unique up to sign: inner products between images are what must agree
    torch.testing.assert_close(got @ got.T, expected @ expected.T, rtol=2e-3, atol=2e-3)
    torch.testing.assert_close(whitener(features)[3], whitener(features[3:4])[0])  # of one image


def test_whitening_in_bfloat16_multiplies_rounded_factors_and_keeps_everything_else():
    """Against the product in float64 of the factors rounded to bfloat16; the statistics are those of float32."""
    features, other = correlated_features(200, 30), correlated_features(7, 30, seed=1)
    exact = whitening.fit(features.clone(), 8, parts=PARTS)
    rounded = whitening.fit(features.clone(), 8, parts=PARTS, kind=torch.bfloat16)
    assert (rounded.projection.dtype, rounded.mean.dtype) == (torch.bfloat16, torch.float32)
    assert torch.equal(rounded.projection, exact.projection.bfloat16())
    assert torch.equal(rounded.mean, exact.mean)
    expected = [
        length * functional.normalize((other[:, own] - exact.mean[own]).bfloat16().double()
                                      @ exact.projection[own].bfloat16().double(), dim=-1)
        for own, length in exact.rows()
    ]  # fmt: skip
    got = rounded(other)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), torch.cat(expected, dim=1), rtol=0, atol=2**-7)
    assert 1e-5 < (got - exact(other)).abs().max() < 0.05


def test_no_more_components_are_kept_than_there_are():
    assert whitening.fit(correlated_features(9, 30), 100).dims == 8
    assert whitening.fit(correlated_features(200, 30), 25, parts=PARTS).components == 10


def test_parts_are_whitened_apart_and_put_side_by_side():
    features, other = correlated_features(200, 30), correlated_features(7, 30, seed=1)
    whitener = whitening.fit(features.clone(), 8, parts=PARTS)
    apart = [whitening.fit(features[:, own].clone(), 8) for own in (slice(10), slice(10, 30))]
    expected = torch.cat([math.sqrt(0.6) * apart[0](other[:, :10]), math.sqrt(0.4) * apart[1](other[:, 10:])], dim=1)
    assert (whitener.components, whitener.dims) == (8, 16)
    torch.testing.assert_close(whitener(other), expected)
    torch.testing.assert_close(whitener(other).norm(dim=1), torch.ones(7))
    together = whitening.fit(features.clone(), 16)(other)
    assert (whitener(other) @ whitener(other).T - together @ together.T).abs().max() > 0.05


@pytest.mark.parametrize("parts", [None, PARTS])
def test_cut_features_are_those_of_a_whitener_of_fewer_components(parts):
    features, other = correlated_features(200, 30), correlated_features(7, 30, seed=1)
    many, few = (whitening.fit(features.clone(), components, parts=parts) for components in (9, 4))
    torch.testing.assert_close(many.cut(many(other), 4), few(other))
    assert many.cut(many(other), 9).equal(many(other))


def test_a_feature_that_never_moves_stays_finite():
    features = correlated_features(100, 6)
    features[:, 2] = 1.0
    assert whitening.fit(features.clone(), 4)(features).isfinite().all()


def test_rounding_does_not_choose_the_sign_of_a_component():
    generator = torch.Generator().manual_seed(5)
    strength = torch.randn(200, 4, generator=generator) * torch.tensor([4.0, 3.0, 2.0, 1.0])
    features = torch.cat([strength, -strength], dim=1)  # every component has two largest entries, +x and -x
    first = whitening.fit(features.clone(), 4).projection
    for _ in range(20):
        rounded = features * (1 + 1e-6 * torch.randn(features.shape, generator=generator))
        torch.testing.assert_close(whitening.fit(rounded, 4).projection, first, rtol=1e-3, atol=1e-3)


# -------------------------------------------------------------------------------------------------- views of one image


def views_of(images: int = 400) -> Tensor:
    """Features of three views of each image, [images · 3, 16]: they differ most along the first features."""
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(images, 1, 16, generator=generator) @ torch.randn(16, 16, generator=generator)
    moves = torch.randn(images, VIEWS, 16, generator=generator) * torch.linspace(4, 0.1, 16)
    return (features + moves).flatten(0, 1)


def fitted(features: Tensor, views: int, components: int = COMPONENTS) -> Whitener:
    return whitening.fit(features.clone(), components, 0.1, VIEW_PARTS, views=views)


def within(part: Tensor) -> np.ndarray:
    """Covariance within images, image by image: [n V, d] -> [d, d]."""
    return np.mean([np.cov(views.double().numpy().T) for views in part.unflatten(0, (-1, VIEWS))], axis=0)


def unit(part: Tensor) -> Tensor:
    return functional.normalize(part, dim=-1)


def test_features_vary_equally_between_views(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(whitening, "VIEW_RIDGE", 0.0)
    features = views_of()
    plain, normalised = fitted(features, 1), fitted(features, VIEWS)
    parts = (made(features).split(COMPONENTS, 1) for made in (plain, normalised))
    for (own, length), old, new in zip(plain.rows(), *parts, strict=True):
        old = old / length
        assert np.linalg.cond(within(old)) > 2  # there was something to do
        # the map of a part, from its components without views, found from the two projections
        turn = torch.linalg.lstsq(plain.projection[own], normalised.projection[own]).solution
        assert (turn.tril(-1).abs() < 1e-4 * turn.abs().max()).all()
        assert np.linalg.cond(within(old @ turn)) < 1.01
        assert torch.allclose(new, length * unit(old @ turn), atol=1e-4)
    assert torch.allclose(normalised(features).norm(dim=1), torch.ones(len(features)), atol=1e-5)
    assert torch.equal(normalised.mean, plain.mean)


def test_a_ridge_keeps_few_views_from_blowing_up_a_component() -> None:
    features = views_of(4)[:8]  # eight views of "one" image, and four pairs of equal ones
    turned = torch.linalg.lstsq(fitted(features, 1).projection[:9], fitted(features, 8).projection[:9]).solution
    gains = torch.linalg.svdvals(turned)
    assert 1 < gains[0] / gains[-1] < 1.01 * np.sqrt((COMPONENTS + whitening.VIEW_RIDGE) / whitening.VIEW_RIDGE)
    same = views_of(20)[::VIEWS].repeat_interleave(2, dim=0)  # views that do not differ
    assert torch.allclose(fitted(same, 2)(same), fitted(same, 1)(same), atol=1e-4)


def test_fewer_components_by_views_are_the_first_ones() -> None:
    features = views_of()
    normalised, few = fitted(features, VIEWS), fitted(features, VIEWS, components=3)(features)
    cut = normalised.cut(normalised(features), 3)
    assert cut.shape == few.shape
    assert (cut * few).sum(dim=1).mean() > 0.98
    last = torch.cat([part[:, 2:] for part in normalised(features).split(COMPONENTS, dim=1)], dim=1)
    assert (unit(last) * few).sum(dim=1).mean() < 0.8  # other components would not be alike


@pytest.mark.parametrize(("rows", "width"), [(30, 80), (80, 30)])
def test_what_components_make_of_the_features_is_known_without_a_product(rows: int, width: int) -> None:
    features = torch.randn(rows, width, generator=torch.Generator().manual_seed(0)) * torch.arange(1, width + 1)
    mean, scale, components, projected = whitening._principal_components(features.clone(), 12, 0.1)
    expected = ((features - mean) * scale).double() @ components.double()
    torch.testing.assert_close(projected.double(), expected, rtol=1e-3, atol=1e-4)
