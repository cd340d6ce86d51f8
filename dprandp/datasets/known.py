"""What a named data set has to offer, and the one place where a download can happen."""

from __future__ import annotations

import contextlib
import errno
import http.client
import socket
import sys
import tarfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dprandp.datasets.base import Dataset, DataSpec
from dprandp.errors import InputError, StorageError

#: Seconds without an answer after which a download gives up.
NETWORK_TIMEOUT_S = 30.0
_DISK_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EFBIG, errno.ENOTDIR}


@dataclass(frozen=True)
class KnownSet:
    """A named data set: a row of the registry.

    Attributes:
        spec: makes the declared facts (a function, because MedMNIST's are looked up in its package, which is slow to
            import).
        missing: ``(data_dir) -> `` paths of files that are absent, relative to ``data_dir``; empty when all are there.
        read: ``(data_dir, spec, split) -> (images, labels)``.
        download: fetches the files with the library's own downloader; None where nothing has to be fetched.
        put: one sentence for somebody without a network: which files, and who publishes them.
    """

    spec: Callable[[], DataSpec]
    missing: Callable[[Path], list[str]]
    read: Callable[[Path, DataSpec, str], tuple[np.ndarray, np.ndarray]]
    download: Callable[[Path], None] | None
    put: str

    def open(self, data_dir: Path, *, download: bool) -> Dataset:
        """Name the data set; touches no file until something is asked of it."""
        spec = self.spec()
        return Dataset(
            spec,
            read=lambda split: self.read(data_dir, spec, split),
            require=lambda: self.require(spec, data_dir, download=download),
        )

    def require(self, spec: DataSpec, data_dir: Path, *, download: bool) -> None:
        """Raise InputError when files are missing; fetch them first if ``download``."""
        if self.missing(data_dir) and download and self.download is not None:
            _fetch(spec.name, lambda: self.download(data_dir), data_dir, self.put)
        missing = self.missing(data_dir)
        if missing:
            shown = ", ".join(missing[:4]) + (f" and {len(missing) - 4} more" if len(missing) > 4 else "")
            raise InputError(
                f"{spec.name} is not in {data_dir}: {shown} missing",
                fix=f"into {data_dir}, put {self.put}; or add --download where there is a network",
            )


def files_missing(*names: str) -> Callable[[Path], list[str]]:
    """A ``KnownSet.missing`` for a fixed list of files."""
    return lambda data_dir: [name for name in names if not (data_dir / name).is_file()]


def damaged(spec: DataSpec, error: BaseException, files: str) -> InputError:
    """The error for a file that is there but is not what its publisher made."""
    return InputError(
        f"the files of {spec.name} ({files}) are damaged or incomplete",
        fix="delete them and put the originals there again",
        private_detail=f"{type(error).__name__}: {error}",
    )


def _fetch(name: str, download: Callable[[], None], data_dir: Path, put: str) -> None:
    """Run a library's downloader: its chatter to stderr, no network to InputError, a full disk to StorageError."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(NETWORK_TIMEOUT_S)  # the libraries set none and would wait for ever
    try:
        with contextlib.redirect_stdout(sys.stderr):  # stdout carries results only
            data_dir.mkdir(parents=True, exist_ok=True)
            download()
    except (OSError, RuntimeError, http.client.HTTPException, zipfile.BadZipFile, tarfile.TarError, EOFError) as error:
        if isinstance(error, OSError) and error.errno in _DISK_ERRORS:
            raise StorageError(
                f"{name} could not be written to {data_dir}: {error.strerror}",
                fix="make room, or name another data folder that may be written to",
            ) from error
        raise InputError(
            f"{name} could not be downloaded ({type(error).__name__})",
            fix=f"check the network and try again, or without one: into {data_dir}, put {put}",
        ) from error
    finally:
        socket.setdefaulttimeout(before)
