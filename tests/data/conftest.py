"""What several data-set tests share."""

from __future__ import annotations

import dataclasses
import urllib.error
import urllib.request
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dprandp.data import KNOWN, Dataset, DataSpec


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    """Any attempt to reach out fails as on a machine without a network."""

    def refuse(*args, **kwargs):
        raise urllib.error.URLError("no route to host")

    monkeypatch.setattr(urllib.request, "urlopen", refuse)


class SmallSets:
    """Named sets with few examples, so that whole files in their publishers' formats can be written in a test."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.monkeypatch = monkeypatch

    def register(self, name: str, train: int = 20, test: int = 10) -> DataSpec:
        """Declare fewer examples for ``name`` while the test runs."""
        spec = dataclasses.replace(KNOWN[name].spec(), train_examples=train, test_examples=test)
        self.monkeypatch.setitem(KNOWN, name, dataclasses.replace(KNOWN[name], spec=lambda: spec))
        return spec

    def made(self, spec: DataSpec, split: str) -> tuple[np.ndarray, np.ndarray]:
        """The images and labels that the files are to hold."""
        count = spec.examples(split)
        images = np.random.default_rng(count).integers(0, 256, (count, *spec.image_shape), dtype=np.uint8)
        return images, np.arange(count) % len(spec.classes)

    def check(self, dataset: Dataset, spec: DataSpec) -> None:
        """What was read is what was written."""
        for split in ("train", "test"):
            images, labels = self.made(spec, split)
            got = getattr(dataset, split)()
            np.testing.assert_array_equal(got.images, images)
            np.testing.assert_array_equal(got.labels, labels)
            assert got.labels.dtype == np.int64

    def write_idx(self, folder: Path, spec: DataSpec) -> None:
        """The four files of MNIST."""
        folder.mkdir(parents=True)
        for split, part in (("train", "train"), ("test", "t10k")):
            images, labels = self.made(spec, split)
            head = bytes([0, 0, 8, 3]) + b"".join(n.to_bytes(4, "big") for n in images.shape[:3])
            (folder / f"{part}-images-idx3-ubyte").write_bytes(head + images.tobytes())
            head = bytes([0, 0, 8, 1]) + len(labels).to_bytes(4, "big")
            (folder / f"{part}-labels-idx1-ubyte").write_bytes(head + labels.astype(np.uint8).tobytes())


@pytest.fixture
def small_sets(monkeypatch) -> SmallSets:
    return SmallSets(monkeypatch)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Two classes, three training images and one test image each, as lossless 32×32 PNG."""
    folder = tmp_path / "birds"
    seed = 0
    for split, count in (("train", 3), ("test", 1)):
        for name in ("owl", "wren"):
            (folder / split / name).mkdir(parents=True)
            for index in range(count):
                pixels = np.random.default_rng(seed).integers(0, 256, (32, 32, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / split / name / f"{index}.png")
                seed += 1
    return folder
