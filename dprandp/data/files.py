"""The images of a data set that is a list of files: decoded in parallel, once, with every problem found.

    images-train.npy         uint8 [N, side, side, 3 or 1], in a run's private folder; and images-test.npy
    images-train.hashes.npy  uint8 [N, 16], of the pixels before they were resized
    images-train.key         hash of the files' bytes and of the rules by which they were decoded, written after them
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import signal
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing import get_context, parent_process
from pathlib import Path
from typing import Any

import numpy as np

from dprandp.config.decoding import Decoding
from dprandp.config.presets import INPUT_SIZE
from dprandp.data.decode import decode_all
from dprandp.data.problems import Problem, UnusableData
from dprandp.errors import InputError
from dprandp.runs.files import atomic_path, atomic_write, storage_errors

CHUNK = 32
"""Files that a process decodes at a time."""
ALONE_BELOW = 200
"""Fewer files than this are decoded before further processes would have started."""


@dataclass(frozen=True)
class Listing:
    """Files of one split with their classes, or 0 and 1 for each label, in a fixed order."""

    paths: tuple[Path, ...]
    labels: tuple[int | tuple[int, ...], ...]


class _Silent:
    def advance(self, count: int = 1) -> None:
        """Tell nobody."""


@dataclass(frozen=True)
class Reading:
    """How files are read; it changes no pixel.

    Attributes:
        folder: where decoded images are kept, private to their owner; None: nowhere.
        writable: whether they may be written there, or only found.
        workers: processes that decode.
        progress: (images, label) -> something whose ``advance`` is called.
    """

    folder: Path | None = None
    writable: bool = False
    workers: int = 1
    progress: Callable[[int, str], contextlib.AbstractContextManager[Any]] = lambda total, label: (
        contextlib.nullcontext(_Silent())
    )


class ImageFiles:
    """The image files of both splits.

    Args:
        name: of the data set, for messages.
        listings: of "train" and "test".
        rules: for ambiguous files.

    Attributes:
        side: pixels that the sides of each image's centre square are resized to.
    """

    def __init__(self, name: str, listings: Mapping[str, Listing], rules: Decoding) -> None:
        self.name, self.listings, self.side, self._rules = name, listings, INPUT_SIZE, rules
        self.reading = Reading()
        self._grey_hashes: dict[str, np.ndarray] = {}

    def read(self, split: str) -> tuple[np.ndarray, np.ndarray]:
        """Images, uint8 [N, side, side, 3 or 1], and labels, int64 [N].

        Raises:
            UnusableData: with a problem for every file that cannot be read.
        """
        paths = self.listings[split].paths
        labels = np.array(self.listings[split].labels, np.int64)
        folder, shape = self.reading.folder, (len(paths), self.side, self.side, self._rules.channels)
        key = None if folder is None else self._key(paths)
        if folder is not None and (kept := _kept(folder, split, key, shape)) is not None:
            images, self._grey_hashes[split] = kept
            return images, labels
        images, hashes, problems = np.empty(shape, np.uint8), np.empty((len(paths), 16), np.uint8), []
        with self.reading.progress(len(paths), f"{split} images decoded") as progress:
            for start, decoded, grey, found in self._chunks(paths):
                images[start : start + len(decoded)], hashes[start : start + len(decoded)] = decoded, grey
                problems += [Problem(f"{split} images", *each) for each in found]
                progress.advance(len(decoded))
        if problems:
            raise UnusableData(self.name, problems)
        self._grey_hashes[split] = hashes
        if folder is not None and self.reading.writable:
            _keep(folder, split, key, images, hashes)
        return images, labels

    def hashes(self, split: str) -> np.ndarray:
        """``Dataset.hashes`` of a split that was read."""
        files = [np.frombuffer(_digest_of(path)[:16], np.uint8) for path in self.listings[split].paths]
        return np.stack([self._grey_hashes[split], np.stack(files)], axis=1)

    def _chunks(
        self, paths: Sequence[Path]
    ) -> Iterator[tuple[int, np.ndarray, np.ndarray, list[tuple[str, str, str]]]]:
        starts = range(0, len(paths), CHUNK)
        jobs = [(paths[start : start + CHUNK], self.side, self._rules) for start in starts]
        if self.reading.workers == 1 or len(paths) < ALONE_BELOW:
            yield from ((start, *decode_all(*job)) for start, job in zip(starts, jobs, strict=True))
            return
        # Processes: threads were no faster, since of a small image more than half the time is Python's. Spawned: a fork
        # of a process whose torch has started threads may hang.
        context = get_context("spawn")
        with ProcessPoolExecutor(min(self.reading.workers, len(jobs)), context, initializer=_begin) as pool:
            try:
                yield from ((start, *done) for start, done in zip(starts, pool.map(_decode, jobs), strict=True))
            except BrokenProcessPool as error:
                raise InputError(
                    "a process that decodes images was ended from outside, perhaps for lack of memory",
                    fix="close other programs and run the same command again",
                ) from error
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise

    def _key(self, paths: Sequence[Path]) -> str:
        digest = hashlib.sha256(f"dprandp-decoded-2 {self.side} {self._rules.as_dict()}".encode())
        for path in paths:
            digest.update(_digest_of(path))
        return digest.hexdigest()


def _digest_of(path: Path) -> bytes:
    """SHA-256 of a file; random bytes where it cannot be read, of which decoding tells."""
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").digest()
    except OSError:
        return os.urandom(32)


def _decode(job: tuple[Sequence[Path], int, Decoding]) -> tuple[np.ndarray, np.ndarray, list[tuple[str, str, str]]]:
    return decode_all(*job)


def _begin() -> None:
    """Start of a worker: leave Ctrl-C to its parent, and end when that is gone, even by kill -9."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def watch() -> None:
        parent_process().join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _files(folder: Path, split: str) -> tuple[Path, Path, Path]:
    return tuple(folder / f"images-{split}.{end}" for end in ("npy", "hashes.npy", "key"))


def _kept(folder: Path, split: str, key: str, shape: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray] | None:
    """The kept images, mapped (what is written to them stays in memory), and hashes. None where none of these are."""
    path, hashes, tag = _files(folder, split)
    try:
        if tag.read_bytes() == key.encode():
            kept = np.load(path, mmap_mode="c", allow_pickle=False), np.load(hashes, allow_pickle=False)
            if [(each.dtype, each.shape) for each in kept] == [(np.uint8, shape), (np.uint8, (shape[0], 16))]:
                return kept
    except (OSError, ValueError, EOFError):
        pass  # decoded again
    return None


def _keep(folder: Path, split: str, key: str, images: np.ndarray, hashes: np.ndarray) -> None:
    path, hashes_path, tag = _files(folder, split)
    with storage_errors(tag, "remove"):
        tag.unlink(missing_ok=True)
    for place, array in ((path, images), (hashes_path, hashes)):
        with atomic_path(place) as temporary:
            np.save(temporary, array, allow_pickle=False)
    atomic_write(tag, key)
