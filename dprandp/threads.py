"""Parallel work on a CPU without barriers: as many threads as torch is allowed, each doing single-threaded tensor work.

torch splits every operation over its threads and waits for the slowest, which wastes time if operations are short or a
core is busy. Threads that each work through their own part wait only once.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

Result = TypeVar("Result")


def in_parts(work: Callable[[int, int], Result], parts: int | None = None) -> list[Result]:
    """Call ``work(part, parts)`` for every part at once; results in the order of the parts.

    torch uses one thread inside. Gradient mode and CPU autocast, which it keeps per thread, are those of the caller in
    every part. ``parts`` is by default torch's number of threads.
    """
    threads = torch.get_num_threads()
    parts = parts or threads
    if parts == 1:
        return [work(0, 1)]
    gradients = torch.is_grad_enabled()
    low, kind = torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu")

    def alike(part: int) -> Result:
        with torch.set_grad_enabled(gradients), torch.autocast("cpu", dtype=kind, enabled=low):
            return work(part, parts)

    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(parts) as pool:
            return [job.result() for job in [pool.submit(alike, part) for part in range(parts)]]
    finally:
        torch.set_num_threads(threads)
