"""Several processes decode the same pixels as one, find the same problems, and the kept images follow content."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dprandp.config.declared import Decoding
from dprandp.data import Reading, UnusableData, files, open_dataset
from dprandp.data.files import ALONE_BELOW


@pytest.fixture
def many(tmp_path: Path) -> Path:
    root = tmp_path / "many"
    for split, count in (("train", ALONE_BELOW + 50), ("test", 2)):
        for index in range(count):
            folder = root / split / ("a", "b")[index % 2]
            folder.mkdir(parents=True, exist_ok=True)
            pixels = np.random.default_rng(index).integers(0, 256, (9, 7, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / f"{index}.png")
    return root


def opened(root: Path, rules: Decoding = Decoding(), **reading):  # noqa: B008
    dataset = open_dataset(f"folder:{root}", root, decoding=rules)
    dataset.read_with(lambda: Reading(**reading))
    return dataset


@pytest.mark.slow
def test_two_processes_and_one_agree(many: Path) -> None:
    for bad in ("train/a/0.png", "train/b/201.png", "train/a/90.png"):
        (many / bad).write_bytes(b"?")
    found = []
    for workers in (1, 2):
        with pytest.raises(UnusableData) as caught:
            opened(many, workers=workers).train()
        found.append(caught.value.private_detail)
    assert found[0] == found[1]
    assert len(found[0].splitlines()) == 3
    for bad in ("train/a/0.png", "train/b/201.png", "train/a/90.png"):
        Image.new("RGB", (9, 9)).save(many / bad)
    alone, together = (opened(many, workers=workers).train() for workers in (1, 2))
    np.testing.assert_array_equal(alone.images, together.images)
    assert len(set(map(bytes, alone.images))) > ALONE_BELOW


def test_kept_images_are_used_for_the_same_files_and_rules_alone(root: Path, tmp_path: Path) -> None:
    kept = tmp_path / "private"
    kept.mkdir()
    before = opened(root, folder=kept, writable=True).train().images
    rows = np.load(kept / "images-train.npy")
    rows["pixels"][0] = 7  # the mark by which the kept ones are known
    np.save(kept / "images-train.npy", rows)
    again = opened(root, folder=kept).train().images
    assert (again[0] == 7).all()
    again[0] = 8  # in memory alone
    assert (np.load(kept / "images-train.npy")["pixels"][0] == 7).all()
    for other in (opened(root, Decoding(orientation="apply"), folder=kept), opened(root)):
        np.testing.assert_array_equal(other.train().images, before)
    Image.fromarray(before[1]).save(root / "train/owl/2.png")  # another content of the last owl
    changed = opened(root, folder=kept).train().images
    np.testing.assert_array_equal(changed[:2], before[:2])
    np.testing.assert_array_equal(changed[2], before[1])
    (kept / "images-train.npy").write_bytes(b"?")
    np.testing.assert_array_equal(opened(root, folder=kept).train().images, changed)


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 2])
def test_decoding_that_was_stopped_goes_on_and_still_finds_every_problem(
    many: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, workers: int
) -> None:
    """Stopped after three blocks of 64; the files of these are not decoded again, and a bad one is named each time."""
    monkeypatch.setattr(files, "BLOCK", 64)
    kept, whole, seen = tmp_path / "private", opened(many).train(), []
    kept.mkdir()

    class Stopping:
        def __init__(self, total: int, label: str, done: int = 0) -> None:
            self.done = done
            seen.append(done)

        def advance(self, count: int = 1) -> None:
            self.done += count
            if self.done > 200 and len(seen) == 1:
                raise KeyboardInterrupt

    @contextlib.contextmanager
    def progress(*args: object, **named: object) -> Iterator[Stopping]:
        yield Stopping(*args, **named)

    how = {"folder": kept, "writable": True, "workers": workers, "progress": progress}
    with pytest.raises(KeyboardInterrupt):
        opened(many, **how).train()
    made = opened(many, **how).train()
    assert seen == [0, 192]
    np.testing.assert_array_equal(made.images, whole.images)
    np.testing.assert_array_equal(opened(many, **how).hashes(), opened(many).hashes())

    (many / "train/a/100.png").write_bytes(b"?")
    for _ in range(2):
        with pytest.raises(UnusableData) as caught:
            opened(many, **how).train()
        assert len(caught.value.private_detail.splitlines()) == 1
