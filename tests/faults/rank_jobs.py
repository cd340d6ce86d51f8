"""A command on several ranks: processes of the command line that meet as torchrun would have them meet, or torchrun."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import torch.distributed as dist
from cli_process import ENVIRONMENT, TIMEOUT, Done, Dprandp, Running

STORES: list[dist.Store] = []
"""Where the jobs meet: with torchrun it is torchrun's process, which outlives the ranks; here this one."""


def start_ranks(
    dprandp: Dprandp, size: int, *arguments: object, before: Mapping[int, str] | None = None, **environment: str
) -> list[Running]:
    """Start a command on ``size`` ranks; ``before`` is Python for some of them (rank -> source)."""
    STORES.append(dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False))
    job = {"WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(STORES[-1].port)}
    job |= {"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "0"}
    return [
        dprandp.start(
            *arguments, before=(before or {}).get(rank, ""), RANK=str(rank), LOCAL_RANK=str(rank), **job, **environment
        )
        for rank in range(size)
    ]


def ranks_of(dprandp: Dprandp, size: int, *arguments: object, **options) -> list[Done]:
    """Run a command on several ranks to its end."""
    return [running.end() for running in start_ranks(dprandp, size, *arguments, **options)]


def torchrun(folder: Path, size: int, *arguments: object, flags: tuple[str, ...] = (), **environment: str) -> Done:
    """``torchrun`` as a user starts it."""
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={size}", *flags,
        "-m", "--", "dprandp", *map(str, arguments),
    ]  # fmt: skip
    process = subprocess.Popen(
        command, cwd=folder, env=os.environ | ENVIRONMENT | environment, text=True, start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    try:
        out, err = process.communicate(timeout=2 * TIMEOUT)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        raise
    return Done(process.returncode, out, err)
