"""One command on several processes: ``torchrun --nproc-per-node N -m dprandp ...``.

Rank 0 runs the command; the others serve it (``runs/parallel.py``), whatever flags they were given. What several
processes cannot do is refused.
"""

from __future__ import annotations

import os
import signal
import sys
from types import FrameType
from typing import TYPE_CHECKING

from dprandp.errors import DprandpError, UsageError
from dprandp.runs.console import Console

if TYPE_CHECKING:
    from dprandp.runs.parallel import Leader

COMMANDS = ("generate", "pretrain", "probe", "finetune", "run")
"""That several processes can do."""

leader: Leader | None = None
"""This process, if it leads others."""


def join() -> None:
    """Under ``torchrun``: meet the others. Rank 0 returns; another rank serves it and exits with its exit code.

    Raises:
        UsageError, RankLostError: the processes do not find together.
    """
    global leader
    if "RANK" not in os.environ or os.environ.get("WORLD_SIZE", "1") == "1":
        return  # without the import of torch
    from dprandp.runs.parallel import Leader
    from dprandp.runs.parallel import join as join_others

    met = join_others()
    if isinstance(met, Leader):
        leader = met
        return
    from dprandp.dpsgd.followers import serve

    # A signal reaches all processes of a job. It is for rank 0 to obey, at the end of a step; a second one is final.
    for signum in (signal.SIGINT, signal.SIGTERM):
        if signal.getsignal(signum) is not signal.SIG_IGN:
            signal.signal(signum, _carry_on)
    console = Console(quiet=True, debug="--debug" in sys.argv)
    try:
        code = serve(met, console)
    except DprandpError as error:
        code = console.error(error)
    sys.stderr.flush()
    os._exit(code)  # without the goodbyes of libraries to processes that may be gone


def end(code: object) -> None:
    """Let the other ranks go, with this exit code."""
    if leader is not None:
        leader.end(code if isinstance(code, int) else int(code is not None))


def refuse_command(command: str | None) -> None:
    """Raise UsageError for a command that is one process's work."""
    if leader is not None and command is not None and command not in COMMANDS:
        raise UsageError(
            f"`dprandp {command}` is the work of one process, not of {leader.size}",
            fix=f"run it without torchrun; several processes can do: {', '.join(COMMANDS)}",
        )


def refuse_flags(device: str, workers: int | None) -> None:
    """Raise UsageError for a flag that contradicts several processes."""
    if device.startswith("cuda:"):
        raise UsageError(
            f"--device {device} names one device for several processes",
            fix="give --device cuda: each process takes the device of its own number on its machine",
        )
    if workers is not None and workers > 1:
        raise UsageError(
            f"--workers {workers} and several processes", fix="leave --workers out: the processes are the workers"
        )


def _carry_on(signum: int, frame: FrameType | None) -> None:
    signal.signal(signum, signal.SIG_DFL)
