"""The named sets: declared facts, and the digits, which come with the package."""

from __future__ import annotations

import numpy as np
import pytest

from dprandp.data import KNOWN, open_dataset
from dprandp.data.known import FLIP_OK, digits_test_positions
from dprandp.errors import UsageError


def test_facts_are_complete_and_cost_no_file(tmp_path):
    for name in KNOWN:
        spec = open_dataset(name, tmp_path / "absent").spec
        assert spec.name == name
        assert len(set(spec.classes)) == len(spec.classes) >= 2
        assert spec.channels in (1, 3)
        assert min(spec.train_examples, spec.test_examples, spec.height, spec.width) > 0
        assert spec.title
    assert not list(tmp_path.iterdir())


def test_every_two_dimensional_medmnist_flag_is_known():
    import medmnist

    flat = {flag for flag, info in medmnist.INFO.items()
            if issubclass(getattr(medmnist, info["python_class"]), medmnist.dataset.MedMNIST2D)}  # fmt: skip
    assert flat == set(FLIP_OK)
    for flag in FLIP_OK:  # several labels of an image, taken for a class, would be silently wrong
        assert KNOWN[flag].spec().multi_label == ("multi-label" in medmnist.INFO[flag]["task"])


def test_class_names_agree_with_torchvision():
    from torchvision import datasets

    assert list(KNOWN["fashion-mnist"].spec().classes) == datasets.FashionMNIST.classes
    names = KNOWN["cifar100"].spec().classes  # numbered in alphabetical order
    assert list(names) == sorted(names)


@pytest.mark.parametrize(
    ("name", "options", "says"),
    [("Digits", {}, "'digits'"), ("pnuemoniamnist", {}, "'pneumoniamnist'"), ("xyz", {}, "known: "),
     ("organmnist3d", {}, "volumes"), ("npz:", {}, "names no path"),
     ("digits", {"num_classes": 10}, "does not apply"), ("mnist", {"unit_column": "p"}, "does not apply"),
     ("folder:x", {"num_classes": 3}, "does not apply")],
)  # fmt: skip
def test_what_names_no_data_set_or_does_not_apply_is_refused(name, options, says, tmp_path):
    with pytest.raises(UsageError, match=says):
        open_dataset(name, tmp_path, **options)


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
    assert 33 <= np.bincount(test.labels).min() <= np.bincount(test.labels).max() <= 39
    assert dataset.train() is dataset.train()
    assert dataset.test() is not dataset.test()  # the test split is not kept
