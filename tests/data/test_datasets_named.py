"""The named sets: declared facts, local files in their publishers' formats, and no network without being asked."""

from __future__ import annotations

import numpy as np
import pytest

from dprandp.data import KNOWN, open_dataset
from dprandp.data.known import FLIP_OK, REFUSED, digits_test_positions
from dprandp.errors import UsageError

# --- facts ------------------------------------------------------------------------------------------------------------


def test_facts_are_complete_and_cost_no_file(tmp_path):
    for name in KNOWN:
        spec = open_dataset(name, tmp_path / "absent").spec
        assert spec.name == name
        assert len(set(spec.classes)) == len(spec.classes) >= 2
        assert spec.channels in (1, 3)
        assert min(spec.train_examples, spec.test_examples, spec.height, spec.width) > 0
        assert all((spec.title, spec.source, spec.licence, spec.citation))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("name", "train", "test", "classes", "shape", "flip"),
    [("digits", 1440, 357, 10, (8, 8, 1), False), ("cifar10", 50000, 10000, 10, (32, 32, 3), True),
     ("cifar100", 50000, 10000, 100, (32, 32, 3), True), ("mnist", 60000, 10000, 10, (28, 28, 1), False),
     ("fashion-mnist", 60000, 10000, 10, (28, 28, 1), True), ("svhn", 73257, 26032, 10, (32, 32, 3), False),
     ("eurosat", 21600, 5400, 10, (64, 64, 3), True), ("pneumoniamnist", 4708, 624, 2, (28, 28, 1), False),
     ("pathmnist", 89996, 7180, 9, (28, 28, 3), True), ("retinamnist", 1080, 400, 5, (28, 28, 3), True),
     ("organamnist", 34561, 17778, 11, (28, 28, 1), False)],
)  # fmt: skip
def test_declared_facts(name, train, test, classes, shape, flip):
    spec = KNOWN[name].spec()
    assert (spec.train_examples, spec.test_examples, len(spec.classes)) == (train, test, classes)
    assert spec.image_shape == shape
    assert spec.flip_ok is flip


def test_every_two_dimensional_medmnist_flag_is_known_or_refused():
    import medmnist

    flat = {flag for flag, info in medmnist.INFO.items()
            if issubclass(getattr(medmnist, info["python_class"]), medmnist.dataset.MedMNIST2D)}  # fmt: skip
    assert flat == set(FLIP_OK) | set(REFUSED)
    for flag in FLIP_OK:  # several labels per image would be silently wrong
        assert "multi-label" not in medmnist.INFO[flag]["task"]


def test_class_names_agree_with_torchvision():
    from torchvision import datasets

    assert list(KNOWN["fashion-mnist"].spec().classes) == datasets.FashionMNIST.classes
    names = KNOWN["cifar100"].spec().classes  # numbered in alphabetical order
    assert list(names) == sorted(names)


@pytest.mark.parametrize(
    ("name", "says"),
    [("cifar", "'cifar10'"), ("Digits", "'digits'"), ("pnuemoniamnist", "'pneumoniamnist'"), ("xyz", "known: ")],
)
def test_unknown_name(name, says, tmp_path):
    with pytest.raises(UsageError, match=f"no data set '{name}'") as caught:
        open_dataset(name, tmp_path)
    assert says in caught.value.fix


@pytest.mark.parametrize(("name", "says"), [("chestmnist", "14 yes-or-no labels"), ("organmnist3d", "volumes")])
def test_unsupported_medmnist(name, says, tmp_path):
    with pytest.raises(UsageError, match=says):
        open_dataset(name, tmp_path)


@pytest.mark.parametrize(
    ("name", "option"),
    [("digits", {"num_classes": 10}), ("digits", {"image_size": 32}), ("mnist", {"flip_ok": True}),
     ("folder:x", {"num_classes": 3}), ("npz:x", {"image_size": 32})],
)  # fmt: skip
def test_option_that_does_not_apply_is_refused(name, option, tmp_path):
    with pytest.raises(UsageError, match="does not apply"):
        open_dataset(name, tmp_path, **option)


def test_prefix_without_a_path(tmp_path):
    for name in ("npz:", "folder:"):
        with pytest.raises(UsageError, match="names no path"):
            open_dataset(name, tmp_path)


# --- digits -----------------------------------------------------------------------------------------------------------


def test_digits_split_is_by_position_and_balanced(tmp_path):
    from sklearn.datasets import load_digits

    bunch = load_digits()
    test_positions = [i for i in range(1797) if (i // 10) % 5 == 4]
    dataset = open_dataset("digits", tmp_path)
    train, test = dataset.train(), dataset.test()
    assert len(test.labels) == len(test_positions) == digits_test_positions().sum() == 357
    assert len(train.labels) == 1440
    for row, position in enumerate(test_positions):
        np.testing.assert_array_equal(test.images[row, :, :, 0], np.round(bunch.images[position] * 255 / 16))
        assert test.labels[row] == bunch.target[position]
    rest = np.setdiff1d(np.arange(1797), test_positions)
    np.testing.assert_array_equal(train.labels, bunch.target[rest])
    assert (train.images.min(), train.images.max()) == (0, 255)
    assert np.bincount(test.labels).min() >= 33
    assert np.bincount(test.labels).max() <= 39


def test_digits_fingerprint_is_stable_and_notices_a_change(tmp_path):
    dataset = open_dataset("digits", tmp_path)
    before = dataset.fingerprint()
    assert before == open_dataset("digits", tmp_path).fingerprint()
    assert len(before) == 64
    train = dataset.train()
    train.images[0, 0, 0, 0] ^= 1
    assert dataset.fingerprint() != before
    train.images[0, 0, 0, 0] ^= 1
    assert dataset.fingerprint() == before
    train.labels[-1] = (train.labels[-1] + 1) % 10
    assert dataset.fingerprint() != before


def test_test_split_is_not_kept(tmp_path):
    dataset = open_dataset("digits", tmp_path)
    assert dataset.train() is dataset.train()
    assert dataset.test() is not dataset.test()
