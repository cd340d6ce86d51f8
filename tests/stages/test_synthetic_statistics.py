"""The whitener that a probe makes of synthetic images: of which views, kept for whom."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny_run import PROBE, context, make_public, write_blobs

from dprandp.config import schema
from dprandp.data import open_dataset
from dprandp.dpsgd import features
from dprandp.dpsgd.features import PUBLIC_FOLDER, public_whitener
from dprandp.models import whitening
from dprandp.models.extractor import build_extractor, load_weights
from dprandp.models.whitening import Whitener
from dprandp.pretrain import load_extractor


@pytest.fixture
def run(tmp_path: Path) -> Path:
    make_public(tmp_path / "run")
    return tmp_path / "run"


def whitener_of(run: Path, change_extractor: float = 0.0, stride: int | None = None, **changes) -> Whitener:
    settings = schema.build("probe", PROBE | {"data": write_blobs(run.parent / "blobs.npz")} | changes)
    with context(run) as given:
        extractor, _ = load_extractor(given, "rgb")
        if change_extractor:
            next(extractor.parameters()).data.mul_(change_extractor)
        if stride:
            weights, extractor = extractor.state_dict(), build_extractor(replace(extractor.built_from, stride=stride))
            load_weights(extractor, weights)
        spec = open_dataset(settings.data, given.data_dir).spec
        return public_whitener(settings, given, extractor, False, spec)


def folders(run: Path) -> set[str]:
    return {path.name for path in (run / PUBLIC_FOLDER).iterdir()}


def test_views_of_each_image_normalise_its_features(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    real = whitening._normalise_within
    monkeypatch.setattr(whitening, "_normalise_within", lambda made, views: seen.append(views) or real(made, views))
    whitener_of(run)
    (views,) = seen
    assert views.shape == (25, 2, 32)
    within = (views - views.mean(dim=1, keepdim=True)).norm(dim=-1)
    between = (views.mean(dim=1) - views.mean(dim=(0, 1))).norm(dim=-1)
    assert within.min() > 0.01  # different views ...
    assert within.mean() < 1.2 * between.mean()  # ... of the same image, not of images at random
    whitener_of(run, statistics_views=1)
    assert len(seen) == 1


def test_views_are_random_but_repeat(run: Path) -> None:
    with context(run) as given:
        settings = schema.build("probe", PROBE)
        first, second = (features.synthetic_views(given, settings, 32) for _ in range(2))
        other = features.synthetic_views(given, schema.build("probe", PROBE | {"seed": 1}), 32)
        crops = features.synthetic_views(given, schema.build("probe", PROBE | {"statistics_views": 1}), 32)
    assert first.shape == (50, 3, 32, 32)
    assert crops.shape == (25, 3, 32, 32)
    assert first.dtype == crops.dtype == torch.uint8
    assert torch.equal(first, second)
    assert not torch.equal(first, other)
    colour = [images.float().mean(dim=(2, 3)) for images in (first.unflatten(0, (25, 2))[:, 0], crops)]
    apart = (colour[0] - colour[1]).abs().mean()
    assert 1 < apart < (colour[0].roll(1, 0) - colour[1]).abs().mean()  # row i shows crop i, in other colours


def test_a_whitener_is_kept_for_the_same_extractor_alone(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = whitener_of(run)
    assert len(folders(run)) == 1
    # other weights, and the same weights read otherwise: a stride is no tensor
    for number, change in enumerate(({"change_extractor": 1.5}, {"stride": 2}), 2):
        other = whitener_of(run, **change)
        assert len(folders(run)) == number
        assert not torch.allclose(other.projection, first.projection)
    monkeypatch.setattr(features, "extract_by_ranks", lambda *given: pytest.fail("computed anew"))
    assert torch.equal(whitener_of(run).projection, first.projection)
