#!/usr/bin/env python3
"""The probe's step on features that memory does not hold: time and memory against N x d, under a memory limit.

    python scripts/probe_at_scale.py --gigabytes 0.5 1 2 4 --dims 1024 --limit 0.3 --folder /tmp
    python scripts/probe_at_scale.py --rows 1281167 --dims 4096 --classes 1000 --steps 20 --limit 0.5

For each size a child process, which may take no more than ``--limit`` gigabytes of memory of its own (RLIMIT_DATA:
everything but mapped files), writes features of unit norm block by block, as a stage stores them (float16), drops them
from the operating system's cache, and takes full-batch steps and one on a Poisson sample. The first step reads from the
disk, the others from what of the file the operating system keeps; beside them stands the time of reading every byte of
the map once (``read``). The files are removed.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional

from dprandp.privacy.clipping import clipped_softmax_sum
from dprandp.runs.arrays import ArrayFile

BLOCK = 2048


def main() -> None:
    """Measure every size in a process of its own; print a table, or JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gigabytes", type=float, nargs="+", default=[0.5, 1, 2, 4])
    parser.add_argument("--rows", type=int, nargs="+", help="images, in place of gigabytes")
    parser.add_argument("--dims", type=int, default=1024)
    parser.add_argument("--classes", type=int, default=10)
    parser.add_argument("--limit", type=float, default=0.3, help="gigabytes of memory beside mapped files")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--child", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        print(json.dumps(measure(args.child, args)))
        return
    found = []
    for rows in args.rows or [round(size * 1e9 / (2 * args.dims)) for size in args.gigabytes]:
        shape = ("--dims", args.dims, "--classes", args.classes)
        options = ("--limit", args.limit, "--steps", args.steps, "--folder", args.folder)
        command = [sys.executable, __file__, "--child", rows, *shape, *options]
        done = subprocess.run([str(word) for word in command], check=True, capture_output=True, text=True)
        found.append(json.loads(done.stdout))
        if not args.json:
            print("  ".join(f"{name} {value:g}" for name, value in found[-1].items()), flush=True)
    if args.json:
        print(json.dumps({"limit_gb": args.limit, "cores": len(os.sched_getaffinity(0)), "sizes": found}, indent=1))


def measure(rows: int, args: argparse.Namespace) -> dict[str, float]:
    """One size, in this process, which is limited from here on."""
    torch.set_flush_denormal(True)
    weight = torch.randn(args.dims, args.classes, generator=torch.Generator().manual_seed(1))
    labels = torch.randint(args.classes, (rows,), generator=torch.Generator().manual_seed(2))
    clipped_softmax_sum(torch.ones(4 * BLOCK, args.dims), labels[: 4 * BLOCK], weight, 1.0)  # libraries load here
    resource.setrlimit(resource.RLIMIT_DATA, (memory("VmData") + int(args.limit * 1e9), resource.RLIM_INFINITY))
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        file = ArrayFile(Path(folder), "features", rows, np.float16)
        writing = timed(lambda: file.write("", lambda begun: blocks(rows, args.dims)))
        with open(file.path, "rb") as stored:
            os.posix_fadvise(stored.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        mapped = file.read("", print)
        features = torch.from_dlpack(mapped)
        steps = [timed(lambda: clipped_softmax_sum(features, labels, weight, 1.0)) for _ in range(args.steps)]
        drawn = torch.nonzero(torch.rand(rows) < 0.1)[:, 0]
        reading = timed(lambda: read(mapped))
        sampled = timed(lambda: clipped_softmax_sum(features, labels, weight, 1.0, rows=drawn))
        return {
            "rows": rows,
            "features_gb": round(2 * rows * args.dims / 1e9, 3),
            "written_s": round(writing, 2),
            "first_step_s": round(steps[0], 2),
            "later_steps_s": round(min(steps[1:], default=steps[0]), 2),
            "median_step_s": round(statistics.median(steps), 2),
            "read_s": round(reading, 2),
            "tenth_s": round(sampled, 2),
            "own_memory_gb": round(memory("RssAnon") / 1e9, 3),
            "peak_with_mapped_gb": round(memory("VmHWM") / 1e9, 3),
        }


def read(mapped: np.ndarray) -> None:
    """Every byte of a map once, in as many threads as torch has."""
    numbers = torch.from_dlpack(mapped).view(-1).view(torch.int16)
    for start in range(0, len(numbers), 2**24):
        numbers[start : start + 2**24].max()


def blocks(rows: int, dims: int) -> Iterator[np.ndarray]:
    """Random features of unit norm."""
    generator = torch.Generator().manual_seed(0)
    for start in range(0, rows, BLOCK):
        drawn = torch.rand(min(BLOCK, rows - start), dims, generator=generator)
        yield functional.normalize(drawn, dim=1).numpy()


def timed(work) -> float:
    """Seconds of one call."""
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def memory(name: str) -> int:
    """Bytes, of a line of /proc/self/status."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))


if __name__ == "__main__":
    main()
