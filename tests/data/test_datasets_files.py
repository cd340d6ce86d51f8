"""Named sets read from local files in their publishers' formats: small ones made here, real ones where present."""

from __future__ import annotations

import dataclasses
import hashlib
import pickle
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dprandp.data import KNOWN, DataSpec, open_dataset
from dprandp.errors import InputError

DATA = Path(__file__).resolve().parents[2] / "data"


def write_npz(small_sets, path: Path, spec: DataSpec, names: str) -> None:
    content = {}
    for split in ("train", "test"):
        images, labels = small_sets.made(spec, split)
        x, y = (pattern.format(split) for pattern in names.split())
        content |= {x: images[..., 0] if spec.channels == 1 else images, y: labels[:, None].astype(np.uint8)}
    np.savez(path, **content, lossy_train=np.arange(3))


@pytest.mark.parametrize(("name", "names"), [("cifar10", "x_{} y_{}"), ("pneumoniamnist", "{}_images {}_labels"),
                                             ("retinamnist", "{}_images {}_labels")])  # fmt: skip
def test_npz_of_a_known_set(tmp_path, name, names, small_sets):
    spec = small_sets.register(name)
    write_npz(small_sets, tmp_path / f"{name}.npz", spec, names)
    small_sets.check(open_dataset(name, tmp_path), spec)


def test_npz_of_a_known_set_with_other_arrays(tmp_path, small_sets):
    spec = small_sets.register("cifar10")
    write_npz(small_sets, tmp_path / "cifar10.npz", dataclasses.replace(spec, train_examples=30), "x_{} y_{}")
    with pytest.raises(InputError, match=r"not uint8 \[20, 32, 32, 3\]") as caught:
        open_dataset("cifar10", tmp_path).train()
    assert "npz:PATH" in caught.value.fix
    np.savez(tmp_path / "cifar10.npz", unrelated=np.zeros(3))
    with pytest.raises(InputError, match="no readable"):
        open_dataset("cifar10", tmp_path).train()
    (tmp_path / "pathmnist.npz").write_bytes(b"<html>404</html>")
    with pytest.raises(InputError, match="no readable") as caught:
        open_dataset("pathmnist", tmp_path).train()
    assert "medmnist.com" in caught.value.fix


@pytest.mark.parametrize(("name", "folder"), [("mnist", "MNIST"), ("fashion-mnist", "FashionMNIST")])
def test_idx_files(tmp_path, name, folder, small_sets):
    spec = small_sets.register(name)
    small_sets.write_idx(tmp_path / folder / "raw", spec)
    small_sets.check(open_dataset(name, tmp_path), spec)
    path = tmp_path / folder / "raw/train-images-idx3-ubyte"
    content = path.read_bytes()
    changed = [b"\1" + content[1:], content[:7] + b"\7" + content[8:]]
    for bad in (b"", content[:10], content[:-1], content + b"x", *changed):
        path.write_bytes(bad)
        with pytest.raises(InputError, match="damaged or incomplete"):
            open_dataset(name, tmp_path).train()


def test_cifar_batches(tmp_path, monkeypatch, small_sets):
    """Batches whose checksums are the publisher's are read; any other bytes never reach the unpickler."""
    from torchvision import datasets

    spec = small_sets.register("cifar10")
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()

    def write(name: str, value: object) -> list[str]:
        (folder / name).write_bytes(pickle.dumps(value))
        return [name, hashlib.md5((folder / name).read_bytes()).hexdigest()]

    rows = {}
    for split in ("train", "test"):
        images, labels = small_sets.made(spec, split)
        rows[split] = {"data": images.transpose(0, 3, 1, 2).reshape(len(images), -1), "labels": labels.tolist()}
    half = [{key: value[start : start + 10] for key, value in rows["train"].items()} for start in (0, 10)]
    batches = [write("data_batch_1", half[0]), write("data_batch_2", half[1])]
    monkeypatch.setattr(datasets.CIFAR10, "train_list", batches)
    monkeypatch.setattr(datasets.CIFAR10, "test_list", [write("test_batch", rows["test"])])
    meta = write("batches.meta", {"label_names": list(spec.classes)})
    monkeypatch.setattr(datasets.CIFAR10, "meta", {"filename": meta[0], "key": "label_names", "md5": meta[1]})
    small_sets.check(open_dataset("cifar10", tmp_path), spec)

    mark = tmp_path / "executed"

    class Payload:
        def __reduce__(self):
            return (Path.touch, (mark,))

    for name in ("data_batch_2", "test_batch", "batches.meta"):
        original = (folder / name).read_bytes()
        (folder / name).write_bytes(pickle.dumps(Payload()))
        with pytest.raises(InputError, match="damaged"):
            open_dataset("cifar10", tmp_path).train()
        assert not mark.exists()
        (folder / name).write_bytes(original)
    pickle.loads(pickle.dumps(Payload()))  # positive control
    assert mark.exists()

    write_npz(small_sets, tmp_path / "cifar10.npz", dataclasses.replace(spec, train_examples=20), "y_{} x_{}")
    with pytest.raises(InputError, match="images of cifar10"):  # the npz is preferred, even to good batches
        open_dataset("cifar10", tmp_path).train()


def test_svhn_files(tmp_path, monkeypatch, small_sets):
    from scipy.io import savemat
    from torchvision import datasets

    spec = small_sets.register("svhn")
    table = {}
    for split in ("train", "test"):
        images, labels = small_sets.made(spec, split)
        path = tmp_path / f"{split}_32x32.mat"
        ten_for_zero = np.where(labels == 0, 10, labels).astype(np.uint8)
        savemat(path, {"X": images.transpose(1, 2, 3, 0), "y": ten_for_zero[:, None]})
        table[split] = ["http://localhost/", path.name, hashlib.md5(path.read_bytes()).hexdigest()]
    monkeypatch.setattr(datasets.SVHN, "split_list", table)
    small_sets.check(open_dataset("svhn", tmp_path), spec)
    (tmp_path / "train_32x32.mat").write_bytes(b"MATLAB 5.0 MAT-file")
    with pytest.raises(InputError, match="damaged"):
        open_dataset("svhn", tmp_path).train()


def test_eurosat_files(tmp_path, small_sets):
    spec = small_sets.register("eurosat", 80, 20)
    root = tmp_path / "eurosat" / "2750"
    for label, name in enumerate(spec.classes):
        (root / name).mkdir(parents=True)
        for index in range(10):
            colour = (label * 20, index * 20, 100)
            Image.new("RGB", (64, 64), colour).save(root / name / f"{name}_{index}.jpg", quality=95)
    train, test = (getattr(open_dataset("eurosat", tmp_path), split)() for split in ("train", "test"))
    assert np.bincount(train.labels).tolist() == [8] * 10
    assert np.bincount(test.labels).tolist() == [2] * 10
    green = test.images[:, 32, 32, 1].reshape(10, 2)
    assert abs(green.astype(int) - [80, 180]).max() <= 3  # the fifth and the tenth of each class
    (root / "Forest" / "Forest_3.jpg").unlink()
    with pytest.raises(InputError, match="holds 99 images"):
        open_dataset("eurosat", tmp_path).train()
    (root / "Unknown").mkdir()
    with pytest.raises(InputError, match="damaged"):
        open_dataset("eurosat", tmp_path).train()


# --- real files, where they are ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("split", ["train", "test"])
@pytest.mark.parametrize("name", ["fashion-mnist", "pneumoniamnist"])
def test_real_files_against_their_own_library(name, split):
    if KNOWN[name].missing(DATA):
        pytest.skip(f"{name} is not in the data root")
    import medmnist
    from torchvision import datasets

    got = getattr(open_dataset(name, DATA), split)()
    if name == "fashion-mnist":
        expected = datasets.FashionMNIST(str(DATA), train=split == "train", download=False)
        images, labels = expected.data.numpy(), expected.targets.numpy()
    else:
        expected = medmnist.PneumoniaMNIST(root=str(DATA), split=split, download=False)
        images, labels = expected.imgs, expected.labels[:, 0]
    np.testing.assert_array_equal(got.images[..., 0], images)
    np.testing.assert_array_equal(got.labels, labels)
