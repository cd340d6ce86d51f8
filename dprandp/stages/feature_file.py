"""Rows of features in a file: written block by block, resumed after a stop, read as a memory-mapped tensor.

    NAME.npy            float32 [N, ...], whole
    NAME.key            what it was computed from, written after it: a file without its key is not believed
    NAME.partial        rows so far, of an extraction that was stopped
    NAME.partial.json   how many of them are surely on the disk, and of what extraction

The operating system keeps in memory as much of a mapped file as there is room for, and gives that up for other uses.
So features that fit in memory are read at its speed, and those that do not are a matter of disk.
"""

from __future__ import annotations

import io
import math
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from dprandp.errors import StorageError
from dprandp.files import atomic_write, from_json, move_into_place, storage_errors, to_json

Blocks = Callable[[int], Iterator[Tensor]]
"""From a row on: the blocks that follow, each float32 [b, ...], b ≥ 1."""


class FeatureFile:
    """One named array of rows in a folder.

    Args:
        folder: private to the user.
        name: of the files.
        rows: N ≥ 1.
    """

    def __init__(self, folder: Path, name: str, rows: int) -> None:
        self.path, self._tag = folder / f"{name}.npy", folder / f"{name}.key"
        self._partial, self._journal = folder / f"{name}.partial", folder / f"{name}.partial.json"
        self._rows = rows

    def read(self, key: str, warn: Callable[[str], None]) -> Tensor | None:
        """The whole array, if it was computed from what ``key`` is a hash of.

        Returns:
            float32 [N, ...], memory-mapped and read-only (writing to it ends the process), or None.
        """
        if not self.path.exists() or not self._tag.exists() or self._tag.read_text(encoding="utf-8") != key:
            return None
        try:
            mapped = np.load(self.path, mmap_mode="r", allow_pickle=False)
            if mapped.dtype == np.float32 and mapped.ndim > 1 and len(mapped) == self._rows:
                return torch.from_dlpack(mapped)
        except (OSError, ValueError, EOFError):
            pass
        warn(f"{self.path} is damaged; the features are computed again")
        return None

    def begun(self, key: str) -> int:
        """Rows that a stopped ``write`` with this key has left on the disk."""
        return self._resumable(key)[0]

    def write(self, key: str, blocks: Blocks) -> None:
        """Compute and store the rows that are missing, in order; ``read`` finds them afterwards.

        Memory: one block. A process killed anywhere leaves rows that the next call goes on from.

        Raises:
            StorageError: too little room on the disk, or another refusal of it.
        """
        done, shape = self._resumable(key)
        with storage_errors(self.path, "replace"):  # what was there is of another extraction: its room is wanted
            self._tag.unlink(missing_ok=True)
            self.path.unlink(missing_ok=True)
            if not done:
                self._journal.unlink(missing_ok=True)
                self._partial.unlink(missing_ok=True)
        try:
            self._append(key, blocks, done, shape)
        except BaseException:
            if not self.begun(key):  # rows that no later call could go on from only take room
                with storage_errors(self._partial, "remove"):
                    self._partial.unlink(missing_ok=True)
            raise
        with storage_errors(self._journal, "remove"):
            self._journal.unlink(missing_ok=True)
        atomic_write(self._tag, key)

    def _append(self, key: str, blocks: Blocks, done: int, shape: list[int]) -> None:
        source = blocks(done)
        with storage_errors(self._partial), open(self._partial, "r+b" if done else "wb") as file:
            if done:
                file.truncate(self._bytes(done, shape))
                file.seek(0, os.SEEK_END)
            for block in source:
                if not done:
                    shape = list(block.shape[1:])
                    self._require_room(shape)
                    np.lib.format.write_array_header_1_0(file, self._header(shape))
                file.write(memoryview(block.detach().to("cpu", torch.float32).contiguous().numpy()).cast("B"))
                done += len(block)
                if done < self._rows:
                    file.flush()
                    os.fsync(file.fileno())
                    atomic_write(self._journal, to_json({"key": key, "rows": done, "shape": shape}))
        if done != self._rows:
            raise RuntimeError(f"{done} rows were computed instead of {self._rows}")
        move_into_place(self._partial, self.path)

    def _resumable(self, key: str) -> tuple[int, list[int]]:
        try:
            journal = from_json(self._journal.read_bytes())
            rows, shape = journal["rows"], journal["shape"]
            sound = journal["key"] == key and type(rows) is int and 0 < rows < self._rows
            sound = sound and all(type(side) is int and side > 0 for side in shape)
            if sound and self._partial.stat().st_size >= self._bytes(rows, shape):
                with open(self._partial, "rb") as file:
                    np.lib.format.read_magic(file)
                    if np.lib.format.read_array_header_1_0(file)[0] == (self._rows, *shape):
                        return rows, shape
        except (OSError, ValueError, KeyError, TypeError):
            pass  # nothing usable was begun
        return 0, []

    def _header(self, shape: list[int]) -> dict:
        return {"descr": "<f4", "fortran_order": False, "shape": (self._rows, *shape)}

    def _bytes(self, rows: int, shape: list[int]) -> int:
        header = io.BytesIO()
        np.lib.format.write_array_header_1_0(header, self._header(shape))
        return header.tell() + 4 * rows * math.prod(shape)

    def _require_room(self, shape: list[int]) -> None:
        needed, free = 4 * self._rows * math.prod(shape), shutil.disk_usage(self.path.parent).free
        if needed > free:
            raise StorageError(
                f"the features of {self._rows} images take {needed / 1e9:.3g} GB and {self.path.parent} has "
                f"{free / 1e9:.3g} GB free",
                fix="free some space, choose another --run folder, or give the probe fewer dims",
            )
