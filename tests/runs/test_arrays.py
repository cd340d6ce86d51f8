"""Arrays on the disk: whole or not believed, resumed where they stopped, and never all in memory."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from dprandp.errors import StorageError
from dprandp.runs.arrays import ArrayFile

ROWS, CUT = 10, 4


class Source:
    """Blocks of four rows; stops after some of them, and remembers where it was asked to begin."""

    def __init__(self, rows: np.ndarray, stop_after: int | None = None) -> None:
        self.rows, self.stop_after, self.begun = rows, stop_after, []

    def __call__(self, begun: int) -> Iterator[np.ndarray]:
        self.begun.append(begun)
        for number, start in enumerate(range(begun, ROWS, CUT)):
            if number == self.stop_after:
                raise KeyboardInterrupt
            yield self.rows[start : start + CUT]


PAIR = np.dtype([("pixels", "u1", (2, 2, 3)), ("hash", "u1", 16)])


@pytest.fixture(params=[((3,), np.float16), ((2, 3), np.float32), ((), PAIR)], ids=["half", "two views", "structured"])
def rows(request: pytest.FixtureRequest) -> np.ndarray:
    shape, kind = request.param
    size = ROWS * int(np.prod(shape)) * np.dtype(kind).itemsize
    made = np.random.default_rng(0).integers(1, 100, size, dtype=np.uint8)  # no NaN in any of the types
    return made.view(kind).reshape(ROWS, *shape)


def test_what_is_written_is_read_and_nothing_else(tmp_path: Path, rows: np.ndarray) -> None:
    file, source = ArrayFile(tmp_path, "features", ROWS, rows.dtype), Source(rows)
    assert file.read("key", pytest.fail) is None
    file.write("key", source)
    assert np.array_equal(file.read("key", pytest.fail), rows)
    assert np.array_equal(np.load(tmp_path / "features.npy", allow_pickle=False), rows)
    assert file.read("another", pytest.fail) is None
    assert ArrayFile(tmp_path, "test-features", ROWS, rows.dtype).read("key", pytest.fail) is None
    assert source.begun == [0]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["features.key", "features.npy"]


def test_a_key_that_is_no_text_is_another_key(tmp_path: Path, rows: np.ndarray) -> None:
    file = ArrayFile(tmp_path, "features", ROWS, rows.dtype)
    file.write("key", Source(rows))
    (tmp_path / "features.key").write_bytes(b"k\xe5y")  # a byte that the disk lost
    assert file.read("key", pytest.fail) is None


@pytest.mark.parametrize("tail", [b"", b"\xff" * 7, b"\xff" * 10**4], ids=["as synced", "torn", "more"])
def test_a_stopped_writing_goes_on_after_its_last_synced_block(tmp_path: Path, rows: np.ndarray, tail: bytes) -> None:
    file = ArrayFile(tmp_path, "features", ROWS, rows.dtype)
    with pytest.raises(KeyboardInterrupt):
        file.write("key", Source(rows, stop_after=2))
    assert file.read("key", pytest.fail) is None
    assert (file.begun("key"), file.begun("another")) == (2 * CUT, 0)
    with open(tmp_path / "features.partial", "ab") as partial:
        partial.write(tail)
    source = Source(rows)
    file.write("key", source)
    assert source.begun == [2 * CUT]
    assert np.array_equal(file.read("key", pytest.fail), rows)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["features.key", "features.npy"]


def _shorten(folder: Path) -> None:
    os.truncate(folder / "features.partial", (folder / "features.partial").stat().st_size - 1)


def _lie(**changes: object) -> callable:
    def change(folder: Path) -> None:
        journal = folder / "features.partial.json"
        journal.write_text(json.dumps(json.loads(journal.read_text()) | changes))

    return change


@pytest.mark.parametrize(
    "harm",
    [_shorten, _lie(key="x"), _lie(rows=-4), _lie(rows=ROWS), _lie(rows="4"), _lie(shape=[0]), _lie(shape=[99]),
     lambda folder: (folder / "features.partial.json").write_text("{"),
     lambda folder: (folder / "features.partial").write_bytes(b"no array at all" * 99),
     lambda folder: (folder / "features.partial").unlink()],
)  # fmt: skip
def test_half_an_extraction_that_is_in_doubt_is_begun_again(tmp_path: Path, harm: callable) -> None:
    rows = np.arange(30.0).reshape(ROWS, 3)
    file, source = ArrayFile(tmp_path, "features", ROWS, rows.dtype), Source(rows)
    with pytest.raises(KeyboardInterrupt):
        file.write("key", Source(rows + 1, stop_after=2))
    harm(tmp_path)
    file.write("key", source)
    assert source.begun == [0]
    assert np.array_equal(file.read("key", pytest.fail), rows)


def test_the_last_extraction_makes_room_for_another(tmp_path: Path) -> None:
    """Two of them need not fit on the disk, and what is half done is not taken for what was there."""
    rows = np.arange(30.0).reshape(ROWS, 3)
    file = ArrayFile(tmp_path, "features", ROWS, rows.dtype)
    file.write("old", Source(rows))
    mapped = file.read("old", pytest.fail)
    with pytest.raises(KeyboardInterrupt):
        file.write("new", Source(-rows, stop_after=0))
    assert not list(tmp_path.iterdir())  # what nobody could go on from is not left
    assert file.read("old", pytest.fail) is None
    assert np.array_equal(mapped, rows)  # whoever still has it mapped keeps it


@pytest.mark.parametrize("harm", [lambda data: data[:-1], lambda data: b"", lambda data: data.replace(b"<f8", b"<i8")])
def test_a_damaged_file_is_not_believed(tmp_path: Path, harm: callable) -> None:
    said, rows = [], np.ones((ROWS, 3))
    file = ArrayFile(tmp_path, "features", ROWS, rows.dtype)
    file.write("key", Source(rows))
    path = tmp_path / "features.npy"
    path.write_bytes(harm(path.read_bytes()))
    assert file.read("key", said.append) is None
    assert ArrayFile(tmp_path, "features", ROWS + 1, rows.dtype).read("key", said.append) is None
    assert all("features.npy is damaged" in line for line in said)


def test_a_disk_without_room_is_refused_at_the_first_block(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = np.ones((ROWS, 3))
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: type("Usage", (), {"free": 239}))
    source = Source(rows)
    with pytest.raises(StorageError, match=r"features\.npy, of 10 images, takes 2\.4e-07 GB"):
        ArrayFile(tmp_path, "features", ROWS, rows.dtype).write("key", source)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: type("Usage", (), {"free": 240}))
    ArrayFile(tmp_path, "features", ROWS, rows.dtype).write("key", source)


def test_what_is_written_to_a_private_map_stays_in_memory(tmp_path: Path) -> None:
    rows = np.arange(30.0).reshape(ROWS, 3)
    file = ArrayFile(tmp_path, "features", ROWS, rows.dtype)
    mapped = file.written("key", Source(rows), pytest.fail, "c")
    mapped[0] = -1
    assert np.array_equal(file.read("key", pytest.fail), rows)
    with pytest.raises(ValueError, match="read-only"):
        file.read("key", pytest.fail)[0] = -1
