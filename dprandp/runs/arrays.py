"""Arrays on the disk that need not fit in memory: written block by block, resumed after a stop, read through a map.

    NAME.npy            the whole array
    NAME.key            hash of what it is made from, written after it: an array without its key is not used
    NAME.partial        rows so far, of a writing that was stopped
    NAME.partial.json   the number of them that are on the disk, and the key
"""

from __future__ import annotations

import io
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from dprandp.errors import StorageError
from dprandp.runs.files import atomic_write, from_json, move_into_place, storage_errors, to_json

Blocks = Callable[[int], Iterator[np.ndarray]]
"""From a first row to the blocks from there on, each [b, ...], b ≥ 1."""


class ArrayFile:
    """An array of N ≥ 1 rows.

    Args:
        folder, name: where it is kept.
        rows: N.
        dtype: of the numbers, or of a whole row (a structured one).
    """

    def __init__(self, folder: Path, name: str, rows: int, dtype: np.dtype | type) -> None:
        self.path, self._tag = folder / f"{name}.npy", folder / f"{name}.key"
        self._partial, self._journal = folder / f"{name}.partial", folder / f"{name}.partial.json"
        self._rows, self._dtype = rows, np.dtype(dtype)

    def read(self, key: str, warn: Callable[[str], None], mode: str = "r") -> np.ndarray | None:
        """The whole array if its key is ``key``, else None; a damaged one is None with a warning.

        Args:
            mode: of the map: "r", read-only (torch writes anyway, which ends the process), or "c": what is written
                stays in memory.
        """
        if not self.path.exists() or not self._tag.exists() or self._tag.read_bytes() != key.encode():
            return None
        try:
            mapped = np.load(self.path, mmap_mode=mode, allow_pickle=False)
            if mapped.dtype == self._dtype and len(mapped) == self._rows:
                return mapped
        except (OSError, ValueError, TypeError, EOFError):
            pass
        warn(f"{self.path} is damaged; it is computed again")
        return None

    def begun(self, key: str) -> int:
        """Rows that a stopped ``write`` with this key has left on the disk."""
        return self._resumable(key)[0]

    def write(self, key: str, blocks: Blocks) -> None:
        """Compute and store the missing rows, in order; one block is in memory.

        A process killed anywhere leaves rows that the next call goes on from. Raises StorageError where the disk has
        too little room, or refuses.
        """
        done, shape = self._resumable(key)
        with storage_errors(self.path, "replace"):  # remove another array's file, to free its space
            for path in (self._tag, self.path, *(() if done else (self._journal, self._partial))):
                path.unlink(missing_ok=True)
        try:
            self._append(key, blocks, done, shape)
        except BaseException:
            if not self.begun(key):  # remove rows that no later call can use
                with storage_errors(self._partial, "remove"):
                    self._partial.unlink(missing_ok=True)
            raise
        with storage_errors(self._journal, "remove"):
            self._journal.unlink(missing_ok=True)
        atomic_write(self._tag, key)

    def written(self, key: str, blocks: Blocks, warn: Callable[[str], None], mode: str = "r") -> np.ndarray:
        """``write``, then what ``read`` gives; StorageError where it cannot be read."""
        self.write(key, blocks)
        found = self.read(key, warn, mode)
        if found is None:
            raise StorageError(f"{self.path} cannot be read back", fix="check the disk, then run the command again")
        return found

    def _append(self, key: str, blocks: Blocks, done: int, shape: list[int]) -> None:
        source = blocks(done)
        with storage_errors(self._partial), open(self._partial, "r+b" if done else "wb") as file:
            if done:
                file.seek(self._bytes(done, shape))
                file.truncate()
            for block in source:
                if not done:
                    shape = list(block.shape[1:])
                    self._require_room(shape)
                    file.write(self._header(shape))
                file.write(np.ascontiguousarray(block, self._dtype).reshape(-1).view(np.uint8).data)
                done += len(block)
                if done < self._rows:
                    file.flush()
                    os.fsync(file.fileno())
                    atomic_write(self._journal, to_json({"key": key, "rows": done, "shape": shape}))
        if done != self._rows:
            raise RuntimeError(f"{done} rows were computed instead of {self._rows}")
        move_into_place(self._partial, self.path)

    def _resumable(self, key: str) -> tuple[int, list[int]]:
        """Rows with this key that are on the disk, and the shape of one; (0, []) if in doubt."""
        try:
            journal = from_json(self._journal.read_bytes())
            rows, shape = journal["rows"], journal["shape"]
            sound = journal["key"] == key and type(rows) is int and 0 < rows < self._rows
            sound = sound and all(type(side) is int and side > 0 for side in shape)
            if sound and self._partial.stat().st_size >= self._bytes(rows, shape):
                header = self._header(shape)
                with open(self._partial, "rb") as file:
                    if file.read(len(header)) == header:
                        return rows, shape
        except (OSError, ValueError, KeyError, TypeError):
            pass  # nothing usable was begun
        return 0, []

    def _header(self, shape: list[int]) -> bytes:
        header = io.BytesIO()
        kind = np.lib.format.dtype_to_descr(self._dtype)
        facts = {"descr": kind, "fortran_order": False, "shape": (self._rows, *shape)}
        np.lib.format.write_array_header_1_0(header, facts)
        return header.getvalue()

    def _bytes(self, rows: int, shape: list[int]) -> int:
        return len(self._header(shape)) + rows * self._row_bytes(shape)

    def _row_bytes(self, shape: list[int]) -> int:
        return int(np.prod(shape, dtype=np.int64)) * self._dtype.itemsize

    def _require_room(self, shape: list[int]) -> None:
        needed, free = self._rows * self._row_bytes(shape), shutil.disk_usage(self.path.parent).free
        if needed > free:
            raise StorageError(
                f"{self.path.name}, of {self._rows} images, takes {needed / 1e9:.3g} GB, and only {free / 1e9:.3g} GB "
                f"are free in {self.path.parent}",
                fix="free some space, or choose another --run folder",
            )
