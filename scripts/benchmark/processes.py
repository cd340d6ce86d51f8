"""Throughput of generate, pretrain, extract and finetune against the number of processes, under ``torchrun`` with gloo.

Each number of processes is one job in which rank 0 does every piece of work alone and with the others, in turn
(``rank_worker.py``): nothing is compared across jobs. Every process has one thread.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable

from benchmark.cases import Figure, Findings, LeftOut, Limit
from benchmark.memory import environment
from benchmark.timing import ratios, spread

NAME = "ranks"
IMAGES_PER_SECOND = 300.0
"""Target of ``generate`` with stylegan-oriented at 64 pixels on two cores."""


def counts(cores: int) -> list[int]:
    """Numbers of processes worth a job: powers of two up to the cores, at most 8."""
    return [count for count in (2, 4, 8) if count <= cores]


def measure(scale: str, rounds: int, say: Callable[[str], None], cores: int) -> Findings:
    """All figures.

    Raises:
        RuntimeError: a job failed.
    """
    findings = Findings()
    if not counts(cores):
        findings.left_out.append(LeftOut(NAME, "2 processes", f"this machine lends {cores} core"))
    for count in counts(cores):
        say(f"bench: {count} processes")
        for work, result in _job(count, scale, rounds).items():
            alone, together, units = result["alone"], result["together"], result["units"]
            ours, theirs = spread(together).median / units, spread(alone).median / units
            findings.figures.append(
                Figure(
                    f"{NAME}-{work}", "rate", f"1 process, by {count}", "× the rate", ratios(alone, together),
                    ours, theirs, "seconds per unit", "1 thread a process, gloo",
                )
            )
            if work == "generate" and count == 2 and scale == "full":
                rates = [units / seconds for seconds in together]
                findings.figures.append(
                    Figure(
                        f"{NAME}-{work}", "rate", "300 images/s", "× 300 images/s on 2 cores",
                        ratios(rates, [IMAGES_PER_SECOND] * len(rates)), spread(rates).median, IMAGES_PER_SECOND,
                        "images per second", "stylegan-oriented, 64 px, 2 processes", target=Limit(1),
                    )
                )
    return findings


def _job(count: int, scale: str, rounds: int) -> dict[str, dict]:
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}",
        "-m", "benchmark.rank_worker", scale, str(rounds),
    ]  # fmt: skip
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env=environment() | {"OMP_NUM_THREADS": "1"}
    )
    if done.returncode:
        raise RuntimeError(f"the job of {count} processes ended with {done.returncode}: {done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
