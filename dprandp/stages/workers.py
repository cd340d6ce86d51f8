"""Processes that make images beside this one."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import get_context, parent_process

from dprandp.errors import StorageError


def worker_pool(workers: int) -> ProcessPoolExecutor:
    """So many processes, which end with this one, however it ends."""
    # spawn: a fork of a process whose torch has started threads may hang
    return ProcessPoolExecutor(workers, get_context("spawn"), initializer=_begin)


@contextmanager
def interrupts_left_to_us() -> Iterator[None]:
    """Workers start at a submission and inherit this mask: Ctrl-C reaches them too, but it is for us to obey."""
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


def lost_worker() -> StorageError:
    """What to say when a worker has died."""
    return StorageError(
        "a worker process died while it made images, most likely for want of memory",
        fix="run the same command again with fewer --workers; whole shards are kept",
    )


def _begin() -> None:
    """Start of a worker: end it when its parent is gone, even by kill -9; it would wait for work for ever."""

    def watch() -> None:
        parent_process().join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
