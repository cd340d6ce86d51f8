"""npz:PATH: real files, read as data and never as code."""

from __future__ import annotations

import io
import zipfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dprandp.data import check_data, hash_set, npz, open_dataset
from dprandp.errors import InputError, UsageError


def arrays(train: int = 6, test: int = 4, shape: tuple[int, ...] = (5, 7, 3)) -> dict[str, np.ndarray]:
    random = np.random.default_rng(0)
    made: dict[str, np.ndarray] = {}
    for split, count in (("train", train), ("test", test)):
        made[f"x_{split}"] = random.integers(0, 256, (count, *shape), dtype=np.uint8)
        made[f"y_{split}"] = np.arange(count) % 3
    return made


def save(path: Path, **changes: object) -> Path:
    """``arrays()`` with some replaced, added, or (None) left out."""
    content = {**arrays(), "num_classes": 3, **changes}
    np.savez(path, **{name: value for name, value in content.items() if value is not None})
    return path


def opened(path: Path, **options: object):
    return open_dataset(f"npz:{path}", path.parent, **options)


@pytest.mark.parametrize("saved", [np.savez, np.savez_compressed])
@pytest.mark.parametrize("order", ["C", "F"])
def test_blocks_of_an_array_are_the_array(tmp_path, saved, order):
    array = np.random.default_rng(0).integers(0, 256, (11, 5, 4), dtype=np.uint8)
    saved(tmp_path / "a.npz", x=np.asarray(array, order=order), none=array[:0])
    for rows in (1, 4, 11, 20):
        blocks = list(npz.array_blocks(tmp_path / "a.npz", "x", rows))
        assert [len(block) for block in blocks] == [min(rows, 11 - start) for start in range(0, 11, rows)]
        np.testing.assert_array_equal(np.concatenate(blocks), array)
    assert list(npz.array_blocks(tmp_path / "a.npz", "none", 4)) == []


def test_blocks_of_a_damaged_array_are_refused(tmp_path):
    array = np.random.default_rng(0).integers(0, 256, (11, 500, 4), dtype=np.uint8)
    np.savez(tmp_path / "a.npz", x=array)
    content = bytearray((tmp_path / "a.npz").read_bytes())
    content[len(content) // 2] ^= 1
    (tmp_path / "a.npz").write_bytes(content)
    with pytest.raises(InputError, match="no readable"):
        list(npz.array_blocks(tmp_path / "a.npz", "x", 4))


@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    train=st.integers(3, 9),
    test=st.integers(1, 5),
    side=st.tuples(st.integers(1, 6), st.integers(1, 6)),
    channels=st.sampled_from([(), (1,), (3,)]),
    label_type=st.sampled_from(["u1", "i1", "<i2", ">i4", "i8", "u8"]),
    column=st.booleans(),
    fortran=st.booleans(),
    compressed=st.booleans(),
)
def test_npz_comes_back_as_it_was(tmp_path, train, test, side, channels, label_type, column, fortran, compressed):
    made = arrays(train, test, (*side, *channels))
    stored = {}
    for name, array in made.items():
        if name.startswith("x"):
            stored[name] = np.array(array, order="F" if fortran else "C")
        else:
            stored[name] = array.astype(label_type).reshape(-1, 1) if column else array.astype(label_type)
    path = tmp_path / "set.npz"
    (np.savez_compressed if compressed else np.savez)(path, **stored, classes=np.array(["a", "b", "c"]))
    dataset = opened(path)
    assert dataset.spec.classes == ("a", "b", "c")
    assert (dataset.spec.train_examples, dataset.spec.test_examples) == (train, test)
    assert dataset.spec.image_shape == (*side, *(channels or (1,)))
    for name, split in (("train", dataset.train()), ("test", dataset.test())):
        assert split.images.dtype == np.uint8
        assert split.images.flags.c_contiguous
        assert split.labels.dtype == np.int64
        np.testing.assert_array_equal(split.images, made[f"x_{name}"].reshape(split.images.shape))
        np.testing.assert_array_equal(split.labels, made[f"y_{name}"])


@pytest.mark.parametrize(
    ("change", "images"),
    [
        (lambda a: a["x_train"].__setitem__((3, 2, 1, 0), a["x_train"][3, 2, 1, 0] ^ 64), True),
        (lambda a: a["y_train"].__setitem__(4, (a["y_train"][4] + 1) % 3), False),
        (lambda a: a.update(y_train=np.roll(a["y_train"], 1)), False),
        (lambda a: a.update(x_train=a["x_train"][::-1].copy()), False),
        (lambda a: a.update(x_train=a["x_train"].transpose(0, 2, 1, 3).copy(),
                            x_test=a["x_test"].transpose(0, 2, 1, 3).copy()), True),
        (lambda a: a.update(p_train=np.array([0, 0, 1, 1, 2, 3])), False),
    ],
    ids=["one bit of a pixel", "one label", "labels moved", "images moved", "another shape", "another unit"],
)  # fmt: skip
def test_the_fingerprint_is_of_pixels_labels_units_and_their_order(tmp_path, change, images):
    """And that of the images is of their pixels alone."""
    made = arrays(shape=(5, 7, 3)) | {"p_train": np.array([0, 0, 1, 1, 2, 2]), "num_classes": np.array(3)}
    made["y_train"] = np.array([0, 1, 2, 0, 1, 2])
    prints = []
    for name in ("before", "same", "after"):
        if name == "after":
            change(made)
        np.savez(tmp_path / f"{name}.npz", **made)
        dataset = open_dataset(f"npz:{tmp_path / name}.npz", tmp_path, unit_column="p")
        prints.append((dataset.fingerprint(), sorted(hash_set(dataset.hashes()))))
    assert prints[0] == prints[1]
    assert prints[0][0] != prints[2][0]
    assert (prints[0][1] != prints[2][1]) == images


def test_opening_reads_no_image_and_no_label(tmp_path, monkeypatch):
    path = save(tmp_path / "set.npz", num_classes=None, classes=np.array(["x", "y", "z"]))
    read: list[str] = []
    original = npz.read_array
    monkeypatch.setattr(npz, "read_array", lambda where, name: read.append(name) or original(where, name))
    dataset = opened(path)
    assert read == ["classes"]
    dataset.train()
    assert read == ["classes", "x_train", "y_train"]
    dataset.test()
    assert read == ["classes", "x_train", "y_train", "x_test", "y_test"]


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"y_test": None}, "lacks y_test"),
        ({"x_train": np.full((6, 5, 7, 3), np.nan, np.float32)}, "uint8"),
        ({"x_train": np.zeros((6, 5, 7, 3), bool)}, "uint8"),
        ({"x_train": np.zeros((6, 3, 5, 7), np.uint8)}, r"\[N, H, W\]"),
        ({"x_train": np.zeros((6, 35), np.uint8)}, r"\[N, H, W\]"),
        ({"x_train": np.zeros((0, 5, 7, 3), np.uint8), "y_train": np.zeros(0, int)}, "holds no image"),
        ({"x_test": np.zeros((4, 5, 8, 3), np.uint8)}, "x_test"),
        ({"x_test": np.zeros((4, 5, 7), np.uint8)}, "x_test"),
        ({"y_train": np.zeros(5, int)}, "y_train"),
        ({"y_train": np.zeros((6, 2), int)}, "y_train"),
        ({"y_train": np.zeros(6)}, "y_train"),
        ({"y_train": np.zeros(6, bool)}, "y_train"),
        ({"num_classes": -3}, "declares -3 classes"),
        ({"num_classes": 10**12}, "declares 1000000000000 classes"),
        ({"num_classes": 3.0}, "not one integer"),
        ({"num_classes": np.array([3, 3])}, "not one integer"),
        ({"classes": np.array(["a", "b"])}, "contradictory"),
        ({"classes": np.array([["a", "b", "c"]])}, "list of names"),
        ({"classes": np.arange(3)}, "list of names"),
        ({"classes": np.array(["a", "a", "b"])}, "repeated"),
        ({"classes": np.array(["a", "b\x1b[2J", "c"])}, "not printable"),
        ({"num_classes": None}, "does not say how many classes"),
    ],
)
def test_refused_from_the_headers_alone(tmp_path, changes, says):
    path = save(tmp_path / "set.npz", **changes)
    with pytest.raises(InputError, match=says) as caught:
        opened(path)
    assert caught.value.exit_code == 3
    assert caught.value.fix


def test_number_of_classes_can_be_declared_by_the_caller(tmp_path):
    path = save(tmp_path / "set.npz", num_classes=None)
    assert opened(path, num_classes=3).spec.classes == ("0", "1", "2")
    with pytest.raises(UsageError, match="number of classes is 1"):
        opened(path, num_classes=1)
    with pytest.raises(InputError, match="contradictory"):
        opened(save(path), num_classes=4)


@pytest.mark.parametrize(
    ("labels", "detail"),
    [
        (np.array([0, 1, 2, 0, 1, 3]), "position 5 is 3"),
        (np.array([0, 1, -9, 0, 1, 2]), "position 2 is -9"),
        (np.array([0, 1, 2, 0, 2**64 - 1, 2], np.uint64), "position 4 is 18446744073709551615"),
    ],
)
def test_label_out_of_range_is_refused_and_not_told(tmp_path, labels, detail):
    with pytest.raises(InputError, match=r"outside 0…2") as caught:
        opened(save(tmp_path / "set.npz", y_train=labels)).train()
    assert detail in caught.value.private_detail
    assert "position" not in str(caught.value)
    assert str(labels[int(np.argmax((labels < 0) | (labels > 2)))]) not in str(caught.value).replace(str(tmp_path), "")


def test_an_empty_class_is_no_reason_to_refuse(tmp_path):
    """Whether a class is empty is decided by single records, so it is told to the owner alone, when they ask."""
    path = save(tmp_path / "set.npz", num_classes=None, classes=np.array(["anna", "berta", "clara", "dora"]))
    assert opened(path).train().labels.max() == 2
    assert opened(path).test().labels.max() == 2
    assert check_data(opened(path)).empty_classes == ["dora"]


class Payload:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self):
        return (Path.touch, (self.target,))


@pytest.mark.parametrize("name", ["x_train", "classes", "something_else"])
def test_pickle_is_refused_and_not_run(tmp_path, name):
    mark = tmp_path / "executed"
    content = {**arrays(), "num_classes": 3, name: np.array([Payload(mark)] * 6, dtype=object)}
    np.savez(tmp_path / "set.npz", **content)
    with pytest.raises(InputError, match="which is a pickle and could run code"):
        opened(tmp_path / "set.npz")
    assert not mark.exists()
    np.load(tmp_path / "set.npz", allow_pickle=True)[name]  # positive control: the payload does work
    assert mark.exists()


def member(shape: tuple[int, ...], body: bytes = b"") -> bytes:
    stream = io.BytesIO()
    np.lib.format.write_array_header_1_0(stream, {"descr": "|u1", "fortran_order": False, "shape": shape})
    return stream.getvalue() + body


def test_header_that_promises_terabytes_is_refused(tmp_path):
    path = save(tmp_path / "set.npz", x_train=None)
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("x_train.npy", member((10**9, 64, 64, 3)))
    with pytest.raises(InputError, match="does not fit its length"):
        opened(path)


def test_decompression_bomb_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(npz, "BOMB_BYTES", 2**20)
    path = tmp_path / "set.npz"
    flat = np.zeros((3000, 32, 32), np.uint8)
    np.savez_compressed(path, **{**arrays(), "num_classes": 3, "x_train": flat, "y_train": np.arange(3000) % 3})
    with pytest.raises(InputError, match=r"\(a decompression bomb\)"):
        opened(path)
    np.savez(path, **{**arrays(shape=(32, 32)), "num_classes": 3, "x_train": flat, "y_train": np.arange(3000) % 3})
    assert opened(path).train().images.shape == (3000, 32, 32, 1)  # the same arrays, stored plainly, are no bomb


def test_two_arrays_of_one_name_are_refused(tmp_path):
    path = save(tmp_path / "set.npz")
    with zipfile.ZipFile(path, "a") as archive, pytest.warns(UserWarning, match="Duplicate"):
        archive.writestr("x_train.npy", member((1, 1, 1), b"\0"))
    with pytest.raises(InputError, match="two of the same name"):
        opened(path)


def test_no_npz_at_all(tmp_path):
    path = tmp_path / "set.npz"
    for content in (b"", b"PK\x03\x04", b"\x93NUMPY\x01\x00", b"not a zip" * 100):
        path.write_bytes(content)
        with pytest.raises(InputError, match="no readable"):
            opened(path)
    content = save(path).read_bytes()
    for length in range(0, len(content), 137):  # nor any that breaks off
        path.write_bytes(content[:length])
        with pytest.raises(InputError):
            opened(path)
    for name in ("absent.npz", "."):
        with pytest.raises(InputError, match="there is no file"):
            opened(tmp_path / name)


@pytest.mark.parametrize("name", ["x_train", "y_train"])
def test_bit_flip_in_the_data_is_always_noticed(tmp_path, name):
    path = save(tmp_path / "set.npz")
    content = bytearray(path.read_bytes())
    start = content.index(arrays()[name].tobytes())
    content[start + 3] ^= 1
    path.write_bytes(content)
    with pytest.raises(InputError, match="no readable"):
        opened(path).train()


def test_file_that_vanishes_or_changes_after_opening(tmp_path):
    path = save(tmp_path / "set.npz")
    dataset = opened(path)
    save(path, **arrays(train=9))
    with pytest.raises(InputError, match=r"not uint8 \[6, 5, 7, 3\]"):
        dataset.train()
    path.unlink()
    with pytest.raises(InputError, match="there is no file"):
        dataset.test()
