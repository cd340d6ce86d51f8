"""The images of a data set that is a list of files: decoded in parallel, once, with every problem found.

In a run's private folder they are the arrays (``runs/arrays.py``) images-train and images-test, with rows of pixels and
of a hash of those before they were resized. The key is a hash of the files' bytes and of the rules of decoding.

All that is wrong with a data set is found and told together: kinds and counts in public, names in private.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import signal
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing import get_context, parent_process
from pathlib import Path
from typing import Any

import numpy as np

from dprandp.config.declared import Decoding
from dprandp.config.presets import INPUT_SIZE
from dprandp.data.decode import decode_all
from dprandp.errors import InputError
from dprandp.runs.arrays import ArrayFile

# ------------------------------------------------------------------------------------------------------------- problems


@dataclass(frozen=True)
class Problem:
    """One file, or one list, that cannot be used.

    Attributes:
        what: "train images", say. kind: what is wrong, such as "16-bit". fix: what to do.
        where: the file's name and more; private.
    """

    what: str
    kind: str
    fix: str
    where: str

    @classmethod
    def of(cls, error: InputError) -> Problem:
        """An error that was raised for a data set as a whole."""
        return cls("", error.problem, error.fix, error.private_detail or "")


class UnusableData(InputError):
    """Raised with every problem of a data set.

    Args:
        name: of the data set. problems: at least one.
        names_in: the private file that lists the names, if there is one.
    """

    def __init__(self, name: str, problems: Sequence[Problem], names_in: str | None = None) -> None:
        self.name, self.problems = name, tuple(problems)
        kinds = Counter((each.what, each.kind, each.fix) for each in problems)
        lines = []
        for (what, kind, fix), count in kinds.most_common():
            lines.append(f"  {f'{count} of the {what}: ' if what else ''}{kind}\n      {fix}")
        names = f"{names_in} names the files" if names_in else "--debug names the files"
        super().__init__(
            f"{name} cannot be used as it is\n" + "\n".join(lines),
            fix=f"mend what is listed, all at once; {names} (keep that private)",
            private_detail=listed(problems),
        )


def listed(problems: Sequence[Problem]) -> str:
    """A line for each problem, with the private name first."""
    return "\n".join(f"{each.where}: {f'{each.what}: ' if each.what else ''}{each.kind}" for each in problems)


# ---------------------------------------------------------------------------------------------------------------- files

CHUNK = 32
"""Files that a process decodes at a time."""
BLOCK = 4096
"""Files whose images are in memory before they are written to the disk, or fewer, of ``BLOCK_BYTES``."""
BLOCK_BYTES = 2**26
ALONE_BELOW = 200
"""Fewer files than this are decoded before further processes would have started."""


@dataclass(frozen=True)
class Listing:
    """Files of one split with their classes, or 0 and 1 for each label, in a fixed order."""

    paths: tuple[Path, ...]
    labels: tuple[int | tuple[int, ...], ...]


def _silent(_: str) -> None:
    """Tell nobody: damaged images are decoded again from their files."""


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
    progress: Callable[..., contextlib.AbstractContextManager[Any]] = lambda total, label, done=0: (
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
        row = np.dtype([("pixels", "u1", (self.side, self.side, self._rules.channels)), ("hash", "u1", 16)])
        rows, folder = None, self.reading.folder
        if folder is not None and paths:
            file, key = ArrayFile(folder, f"images-{split}", len(paths), row), self._key(paths)
            rows = file.read(key, _silent, "c")
            if rows is None and self.reading.writable:
                rows = file.written(key, lambda begun: self._rows(split, row, begun), _silent, "c")
        if rows is None:
            rows, start = np.empty(len(paths), row), 0
            for block in self._rows(split, row):
                rows[start : start + len(block)] = block
                start += len(block)
        self._grey_hashes[split] = rows["hash"]
        return rows["pixels"], labels

    def hashes(self, split: str) -> np.ndarray:
        """``Dataset.hashes`` of a split that was read."""
        files = [np.frombuffer(_digest_of(path)[:16], np.uint8) for path in self.listings[split].paths]
        return np.stack([self._grey_hashes[split], np.stack(files)], axis=1)

    def _rows(self, split: str, row: np.dtype, begun: int = 0) -> Iterator[np.ndarray]:
        """Blocks of decoded images from the first that is not ``begun``; all problems once everything was read."""
        paths = self.listings[split].paths
        block, filled = np.empty(min(len(paths), max(CHUNK, min(BLOCK, BLOCK_BYTES // row.itemsize))), row), 0
        problems: list[Problem] = []
        with self.reading.progress(len(paths), f"{split} images decoded", done=begun) as progress:
            for images, hashes, found in self._decoded(paths[begun:]):
                problems += [Problem(f"{split} images", *each) for each in found]
                progress.advance(len(images))
                if problems:
                    continue  # nothing is kept from here on, but every problem is named
                both = block[filled : filled + len(images)]
                both["pixels"], both["hash"] = images, hashes
                filled += len(images)
                if filled + CHUNK > len(block):
                    yield block[:filled]
                    filled = 0
        if problems:
            raise UnusableData(self.name, problems)
        if filled:
            yield block[:filled]

    def _decoded(
        self, paths: Sequence[Path]
    ) -> Iterator[tuple[np.ndarray, np.ndarray, list[tuple[str, str, str]]]]:
        """``decode_all`` of ``CHUNK`` files at a time."""
        starts = range(0, len(paths), CHUNK)
        jobs = [(paths[start : start + CHUNK], self.side, self._rules) for start in starts]
        if self.reading.workers == 1 or len(paths) < ALONE_BELOW:
            yield from (decode_all(*job) for job in jobs)
            return
        # Processes: threads were no faster, since of a small image more than half the time is Python's. Spawned: a fork
        # of a process whose torch has started threads may hang.
        context = get_context("spawn")
        with ProcessPoolExecutor(min(self.reading.workers, len(jobs)), context, initializer=_begin) as pool:
            try:
                yield from pool.map(_decode, jobs)
            except BrokenProcessPool as error:
                raise InputError(
                    "a process that decodes images was ended from outside, perhaps for lack of memory",
                    fix="close other programs and run the same command again",
                ) from error
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise

    def _key(self, paths: Sequence[Path]) -> str:
        digest = hashlib.sha256(f"dprandp-decoded-3 {self.side} {self._rules.as_dict()}".encode())
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
