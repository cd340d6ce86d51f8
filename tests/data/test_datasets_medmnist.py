"""MedMNIST's own names of arrays in any npz, and its files of larger images."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from dprandp.config.schema import same_data_name
from dprandp.data import KNOWN, open_dataset
from dprandp.data import known as known_sets
from dprandp.errors import InputError, UsageError


def arrays(side: int, train: int = 6, test: int = 4) -> dict[str, np.ndarray]:
    random, made = np.random.default_rng(0), {}
    for split, count in (("train", train), ("val", 2), ("test", test)):
        made[f"{split}_images"] = random.integers(0, 256, (count, side, side), dtype=np.uint8)
        made[f"{split}_labels"] = np.arange(count)[:, None] % 2
    return made


def test_names_of_arrays_in_any_file(tmp_path: Path) -> None:
    theirs = arrays(20)
    np.savez(tmp_path / "theirs.npz", **theirs)
    ours = {f"{part}_{split}": theirs[f"{split}_{name}"] for split in ("train", "test")
            for part, name in (("x", "images"), ("y", "labels"))}  # fmt: skip
    np.savez(tmp_path / "ours.npz", **ours)
    one, other = (open_dataset(f"npz:{tmp_path}/{name}.npz", tmp_path, num_classes=2) for name in ("theirs", "ours"))
    assert one.fingerprint() == other.fingerprint()
    np.testing.assert_array_equal(one.test().images, other.test().images)
    assert (one.spec.split_rule, other.spec.split_rule) == ("the array val_images is not used", "")
    del theirs["test_labels"]
    np.savez(tmp_path / "theirs.npz", **theirs)
    with pytest.raises(InputError, match="lacks y_test"):
        open_dataset(f"npz:{tmp_path}/theirs.npz", tmp_path, num_classes=2)


@pytest.mark.parametrize("side", [64, 128, 224])
def test_larger_files_by_name(tmp_path: Path, side: int, monkeypatch: pytest.MonkeyPatch) -> None:
    name = f"pneumoniamnist_{side}"
    spec = open_dataset(name, tmp_path).spec
    assert (spec.name, spec.image_shape, spec.title) == (name, (side, side, 1), f"PneumoniaMNIST ({side}×{side})")
    assert spec.classes == KNOWN["pneumoniamnist"].spec().classes
    with pytest.raises(InputError, match=f"{name}.npz missing"):
        open_dataset(name, tmp_path).require()
    info = known_sets._medmnist("pneumoniamnist") | {"n_samples": {"train": 6, "test": 4}}
    monkeypatch.setattr(known_sets, "_medmnist", lambda flag: info)
    known_sets._medical_spec.cache_clear()
    np.savez(tmp_path / f"{name}.npz", **arrays(side))
    dataset = open_dataset(name, tmp_path)
    np.testing.assert_array_equal(dataset.train().images[..., 0], arrays(side)["train_images"])
    assert dataset.train().labels.tolist() == [0, 1] * 3
    known_sets._medical_spec.cache_clear()


def test_other_sizes_and_sets_are_not_known(tmp_path: Path) -> None:
    for name in ("pneumoniamnist_28", "pneumoniamnist_32", "chestmnist_32", "digits_64"):
        with pytest.raises(UsageError):
            open_dataset(name, tmp_path)


def test_a_set_in_two_sizes_holds_the_same_images(tmp_path: Path) -> None:
    """Nothing is read for it. The control: another set."""
    one, larger, other = (open_dataset(name, tmp_path) for name in ("breastmnist", "breastmnist_64", "pneumoniamnist"))
    assert one.shares_images_with(larger)
    assert larger.shares_images_with(one)
    assert not one.shares_images_with(other)
    assert same_data_name("breastmnist", "breastmnist_224")
    assert not same_data_name("breastmnist", "pneumoniamnist")
    assert not same_data_name("npz:a/breastmnist", "npz:a/breastmnist_224")
