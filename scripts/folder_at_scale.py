#!/usr/bin/env python3
"""A folder of many JPEG files from the first file to the model, under a memory limit, with two kills on the way.

    python scripts/folder_at_scale.py --images 100000 --classes 1000 --side 224 --limit 4 --folder /tmp/scale

It makes the files (a coarse pattern of each class, under noise), and a tenth as many for the test split, and
runs ``dprandp run`` on them with a shipped prior. No process may take more than ``--limit`` GiB of memory of its own
(RLIMIT_DATA: everything but mapped files). The command is killed (kill -9) when half of the images are decoded, and
again when half of their features are computed; the last call goes on from there and ends. Prints JSON: seconds of each
part, how many rows the kills have left, the largest memory that any process had, and the result.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shlex
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image

PATTERN = 7
"""Pixels of a side of a class's pattern, before it is enlarged."""


def main() -> None:
    """Make what is missing of the files, run, kill, run again, and print what was measured."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=100_000, help="files of the training split")
    parser.add_argument("--classes", type=int, default=1000)
    parser.add_argument("--side", type=int, default=224)
    parser.add_argument("--limit", type=float, default=4.0, help="GiB of memory of each process, beside mapped files")
    parser.add_argument("--folder", type=Path, required=True, help="for the files and the run; kept")
    parser.add_argument("--flags", default="--eps 8 --prior patchnet-tiny --share 1", help="of dprandp run")
    parser.add_argument("--config", type=Path, help="of dprandp run")
    args = parser.parse_args()
    made = timed(lambda: make_files(args))
    found = {"images": args.images, "classes": args.classes, "side": args.side, "files_s": made}
    found["folder_gb"] = sum(path.stat().st_size for path in args.folder.rglob("*.jpg")) / 1e9
    private = args.folder / "run/private"
    for name, watched in (("decoding", "images-train"), ("features", "features")):
        call = Call(args)
        journal = private / f"{watched}.partial.json"
        found[f"half_of_{name}_s"] = call.killed_when(partial(half_done, journal, args.images))
        found[f"rows_kept_of_{name}"] = rows_of(journal)
    call = Call(args)
    result, found["rest_s"] = call.end()
    found["peak_gb"] = Call.peak / 1e9
    found["result"] = {key: result[key] for key in ("accuracy", "majority_accuracy", "epsilon", "steps")}
    print(json.dumps({key: rounded(value) for key, value in found.items()}, indent=1))


def make_files(args: argparse.Namespace) -> None:
    """Training and test files, in folders of classes; a split that is there is left alone."""
    for split, count in (("train", args.images), ("test", args.images // 10)):
        root, done = args.folder / "data" / split, args.folder / f"{split}.made"
        if done.exists():
            continue
        with ProcessPoolExecutor() as pool:
            jobs = [(root, label, range(label, count, args.classes), args.side) for label in range(args.classes)]
            list(pool.map(make_class, *zip(*jobs, strict=True), chunksize=8))
        done.touch()


def make_class(root: Path, label: int, numbers: range, side: int) -> None:
    """The files of one class."""
    folder = root / f"c{label:04d}"
    folder.mkdir(parents=True, exist_ok=True)
    pattern = np.random.default_rng(label).integers(0, 256, (PATTERN, PATTERN, 3))
    for number in numbers:
        random = np.random.default_rng((1 if root.name == "train" else 2, number))
        noisy = np.clip(pattern + random.normal(0, 60, pattern.shape), 0, 255).astype(np.uint8)
        Image.fromarray(noisy).resize((side, side), Image.Resampling.BICUBIC).save(folder / f"{number}.jpg", quality=85)


class Call:
    """``dprandp run`` in a group of processes of its own, whose memory is watched."""

    peak = 0
    """The largest resident memory, in bytes, that one process of any call has had."""

    def __init__(self, args: argparse.Namespace) -> None:
        limit = int(args.limit * 2**30)
        command = [sys.executable, "-m", "dprandp", "run", "--run", args.folder / "run", "--json"]
        command += ["--data", f"folder:{args.folder / 'data'}", *shlex.split(args.flags)]
        command += [] if args.config is None else ["--config", args.config]
        self._started = time.perf_counter()
        self._process = subprocess.Popen(
            list(map(str, command)), stdout=subprocess.PIPE, start_new_session=True, text=True,
            preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_DATA, (limit, limit)),
        )  # fmt: skip
        threading.Thread(target=self._watch, daemon=True).start()

    def _watch(self) -> None:
        while self._process.poll() is None:
            for status in Path("/proc").glob("[0-9]*/status"):
                try:
                    lines = dict(line.split(":", 1) for line in status.read_text().splitlines())
                    if os.getpgid(int(status.parent.name)) == self._process.pid and "VmHWM" in lines:
                        Call.peak = max(Call.peak, 1024 * int(lines["VmHWM"].split()[0]))
                except (OSError, ValueError):
                    continue  # it has ended meanwhile
            time.sleep(0.5)

    def killed_when(self, reached) -> float:
        """Kill all its processes once ``reached`` holds; seconds until then."""
        while not reached():
            if self._process.poll() is not None:
                sys.exit(f"dprandp run ended with {self._process.returncode} before it was killed")
            time.sleep(0.05)
        os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        return time.perf_counter() - self._started

    def end(self) -> tuple[dict, float]:
        """Its result, and seconds."""
        out, _ = self._process.communicate()
        if self._process.returncode:
            sys.exit(f"dprandp run ended with {self._process.returncode}")
        return json.loads(out), time.perf_counter() - self._started


def rows_of(journal: Path) -> int:
    """Rows that a stopped stage has left, by its journal; 0 where there is none."""
    try:
        return json.loads(journal.read_bytes())["rows"]
    except (OSError, ValueError):
        return 0


def half_done(journal: Path, rows: int) -> bool:
    """Whether at least half of the rows are on the disk."""
    return 2 * rows_of(journal) >= rows


def timed(work) -> float:
    """Seconds of one call."""
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def rounded(value):
    """Three significant digits of a number."""
    return float(f"{value:.3g}") if isinstance(value, float) else value


if __name__ == "__main__":
    main()
