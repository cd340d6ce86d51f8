"""A part of the training split that is declared public, and the private rest."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from dprandp.data import open_dataset, public_part, without_public_part
from dprandp.data.base import public_positions
from dprandp.errors import UsageError


def test_the_two_parts_are_the_whole(tmp_path: Path) -> None:
    dataset = open_dataset("digits", tmp_path)
    rest, (public, hashes) = without_public_part(dataset, 0.1, 3), public_part(dataset, 0.1, 3)
    assert (rest.spec.train_examples, len(public.labels)) == (1296, 144)
    whole = sorted(image.tobytes() for image in dataset.train().images)
    assert sorted(image.tobytes() for image in [*rest.train().images, *public.images]) == whole
    assert np.array_equal(np.sort([*rest.train().labels, *public.labels]), np.sort(dataset.train().labels))
    assert np.array_equal(rest.test().images, dataset.test().images)
    assert rest.fingerprint() != dataset.fingerprint()
    both = [*map(bytes, rest.hashes()), *map(bytes, hashes)]
    assert sorted(both) == sorted(map(bytes, dataset.hashes()))


def test_naming_the_rest_reads_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset = open_dataset("digits", tmp_path)
    monkeypatch.setattr(type(dataset), "train", lambda self: pytest.fail("pixels were read"))
    assert without_public_part(dataset, 0.25, 0).spec.train_examples == 1080


def test_the_part_is_random_by_seed_and_of_the_declared_size() -> None:
    one, again, other = public_positions(1000, 0.1, 0), public_positions(1000, 0.1, 0), public_positions(1000, 0.1, 1)
    assert len(one) == len(set(one)) == 100
    assert np.array_equal(one, again)
    assert not np.array_equal(one, other)
    assert 350 < one.mean() < 650  # not a block at one end
    for fraction in (0.01, 0.99):  # nothing is left on a side
        with pytest.raises(UsageError, match="of 20 training images"):
            public_positions(20, fraction, 0)


def test_units_of_several_images_are_refused(tmp_path: Path) -> None:
    images = np.random.default_rng(0).integers(0, 255, (20, 8, 8, 3)).astype(np.uint8)
    labels = np.arange(20) % 2
    np.savez(
        tmp_path / "units.npz", x_train=images, y_train=labels, x_test=images, y_test=labels, num_classes=np.array(2),
        groups_train=np.arange(20) // 4,
    )  # fmt: skip
    dataset = open_dataset(f"npz:{tmp_path / 'units.npz'}", tmp_path)
    for refused in (without_public_part, public_part):
        with pytest.raises(UsageError, match="split units"):
            refused(dataset, 0.5, 0)
