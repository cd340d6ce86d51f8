"""One process at a time in a run directory.

Two processes that spend one privacy budget at the same time would each see what the other has not yet written, so the
lock is part of the privacy argument and there is no way to run without it. It is an advisory ``flock`` on the file
``.lock``: the kernel lets go of it when the holder dies, however it dies, so no stale lock needs removing.

Imports nothing of the package but ``errors`` and ``files``.
"""

from __future__ import annotations

import errno
import fcntl
import os
from pathlib import Path

from dprandp.errors import StorageError
from dprandp.files import storage_errors

_held: set[int] = set()


def _let_go_in_child() -> None:
    # A forked worker that outlives a killed parent would keep the lock through its inherited descriptor.
    for descriptor in _held:
        os.close(descriptor)
    _held.clear()


os.register_at_fork(after_in_child=_let_go_in_child)


def acquire(path: Path, owner: Path) -> int:
    """Take the lock file ``path`` without waiting.

    Args:
        path: the lock file; created if missing, never removed (removing it would let two holders in).
        owner: the run directory, for the message.

    Returns:
        The descriptor for ``release``.

    Raises:
        StorageError: another process holds it (the message names its process id), or the file system has no locks.
    """
    with storage_errors(path, "open"):
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        holder = os.pread(descriptor, 32, 0).decode("ascii", errors="replace").strip() or "unknown"
        os.close(descriptor)
        if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
            raise StorageError(
                f"another dprandp process (pid {holder}) is at work in {owner}",
                fix="wait until it has finished or stop it, or choose another folder with --run",
            ) from error
        raise StorageError(
            f"the file system of {owner} cannot lock files ({error.strerror}), so the privacy budget cannot be guarded",
            fix="choose a folder on a local disk with --run",
        ) from error
    with storage_errors(path):
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
    _held.add(descriptor)
    return descriptor


def release(descriptor: int) -> None:
    """Give the lock back (in a forked child, where it is already gone: do nothing)."""
    if descriptor in _held:
        _held.discard(descriptor)
        os.close(descriptor)
