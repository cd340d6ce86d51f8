"""folder:PATH: layouts, order, links, and nothing private in a message."""

from __future__ import annotations

import os
import random
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dprandp.data import open_dataset
from dprandp.errors import InputError

SECRET = "patient-4711"


def picture(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (32, 32, 3), dtype=np.uint8)


def opened(root: Path):
    return open_dataset(f"folder:{root}", root)


def test_pixels_labels_and_order(root):
    dataset = opened(root)
    assert dataset.spec.classes == ("owl", "wren")
    assert (dataset.spec.train_examples, dataset.spec.test_examples) == (6, 2)
    assert dataset.spec.image_shape == (32, 32, 3)
    assert not dataset.spec.flip_ok
    train, test = dataset.train(), dataset.test()
    np.testing.assert_array_equal(train.images, [picture(seed) for seed in range(6)])
    np.testing.assert_array_equal(test.images, [picture(seed) for seed in (6, 7)])
    assert train.labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert test.labels.tolist() == [0, 1]


def test_order_is_that_of_the_names_not_of_the_disk(root, monkeypatch):
    before = opened(root).fingerprint()
    original = os.scandir

    class Shuffled:
        def __init__(self, folder):
            self.entries = list(original(folder))
            random.Random(5).shuffle(self.entries)

        def __enter__(self):
            return iter(self.entries)

        def __exit__(self, *exc):
            return None

    monkeypatch.setattr(os, "scandir", Shuffled)
    assert opened(root).fingerprint() == before


def test_opening_decodes_nothing(root, monkeypatch):
    monkeypatch.setattr(Image, "open", lambda *args, **kwargs: pytest.fail("an image was opened"))
    dataset = opened(root)
    dataset.require()
    monkeypatch.undo()
    dataset.train()


def test_what_is_no_image_by_its_listing(root):
    for name, make, said in (
        ("x.npy", lambda path: path.write_text("?"), "no image by its name"),
        ("x", lambda path: path.write_text("?"), "no image by its name"),
        (".png.part", lambda path: path.write_text("?"), "no image by its name"),
        (".png", Path.touch, "0 bytes"),
        ("0.png", Path.mkdir, "no file"),
        ("1.png", os.mkfifo, "no file"),  # and does not hang
    ):
        path = root / "train/owl" / f"{SECRET}{name}"
        make(path)
        with pytest.raises(InputError, match=said) as caught:
            opened(root)
        assert SECRET not in str(caught.value)
        assert SECRET in caught.value.private_detail
        path.rmdir() if path.is_dir() else path.unlink()


@pytest.mark.parametrize("where", ["train/owl/link.png", "train/link", "test.txt", "dangling"])
def test_link_that_leaves_the_folder(root, where):
    outside = root.parent / SECRET
    outside.mkdir()
    Image.fromarray(picture(1)).save(outside / "a.png")
    (outside / "list.txt").write_text("")
    if where == "dangling":
        (root / "train/owl/gone.png").symlink_to(root / "nowhere.png")
    else:
        target = {"train/owl/link.png": outside / "a.png", "train/link": outside, "test.txt": outside / "list.txt"}
        (root / where).symlink_to(target[where])
        if where == "test.txt":
            (root / "test").rename(root / "other")
    with pytest.raises(InputError, match="symbolic link") as caught:
        opened(root)
    assert SECRET not in str(caught.value).replace(str(root), "")


def test_link_within_the_folder_and_link_to_the_folder_are_fine(root):
    (root / "train/wren/again.png").symlink_to(root / "train/owl/0.png")
    link = root.parent / "link"
    link.symlink_to(root)
    dataset = opened(link)
    np.testing.assert_array_equal(dataset.train().images[6], picture(0))


def test_layout_errors(root, tmp_path):
    with pytest.raises(InputError, match="there is no folder"):
        opened(tmp_path / "absent")
    (tmp_path / "bare").mkdir()
    with pytest.raises(InputError, match="neither"):
        opened(tmp_path / "bare")
    (root / "test.txt").write_text("")
    with pytest.raises(InputError, match="both"):
        opened(root)
    (root / "test.txt").unlink()
    (root / "train/stray.png").write_bytes(b"x")
    with pytest.raises(InputError, match="beside the class folders"):
        opened(root)
    (root / "train/stray.png").unlink()
    (root / "test/emu").mkdir()
    with pytest.raises(InputError, match="1 class folders that train/ has not"):
        opened(root)
    (root / "test/emu").rmdir()
    for path in (root / "test").glob("*/*"):
        path.unlink()
    with pytest.raises(InputError, match=r"test split .* holds no image"):
        opened(root)


def test_one_class_and_odd_names(root):
    for name in ("a\nb", "\x1b[31m"):
        (root / "train" / name).mkdir()
        with pytest.raises(InputError, match="not printable"):
            opened(root)
        (root / "train" / name).rmdir()
    for split in ("train", "test"):
        for path in (root / split / "wren").iterdir():
            path.unlink()
        (root / split / "wren").rmdir()
    with pytest.raises(InputError, match="declares 1 classes"):
        opened(root)


def test_class_folder_without_training_images(root):
    (root / "train/kiwi").mkdir()
    dataset = opened(root)
    assert dataset.spec.classes == ("kiwi", "owl", "wren")
    assert sorted(set(dataset.train().labels.tolist())) == [1, 2]


def test_unreadable_file(root):
    dataset = opened(root)
    (root / "train/wren/1.png").unlink()
    with pytest.raises(InputError, match="1 of the train images: damaged") as caught:
        dataset.train()
    assert "1.png" not in str(caught.value)


def test_declared_split(root):
    expected_train, expected_test = opened(root).train(), opened(root).test()
    flat = root.parent / "flat"
    lines = []
    for split in ("train", "test"):
        for path in sorted((root / split).glob("*/*")):
            target = flat / path.parent.name / f"{split}-{path.name}"
            target.parent.mkdir(parents=True, exist_ok=True)
            path.rename(target)
            if split == "test":
                lines.append(f"{target.parent.name}/{target.name}")
    (flat / "test.txt").write_text("\n".join(reversed(lines)) + "\n\n")
    dataset = opened(flat)
    for got, expected in ((dataset.train(), expected_train), (dataset.test(), expected_test)):
        np.testing.assert_array_equal(got.images, expected.images)
        np.testing.assert_array_equal(got.labels, expected.labels)
    (flat / "test.txt").write_text(f"owl/{SECRET}.png\n../birds/x.png\n")
    with pytest.raises(InputError, match="lists 2 files that do not exist") as caught:
        opened(flat)
    assert SECRET not in str(caught.value)
    (flat / "test.txt").write_bytes(b"\xff\xfe")
    with pytest.raises(InputError, match="UTF-8"):
        opened(flat)
