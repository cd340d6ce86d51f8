"""One command on several processes: ``torchrun --nproc-per-node N -m dprandp ...``.

Rank 0 reads the flags and the run, and announces each stage, with its configuration; every rank then runs it. What
several processes cannot do is refused.
"""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING, NoReturn

from dprandp.errors import DprandpError, UsageError
from dprandp.runs import signals
from dprandp.runs.console import Console

if TYPE_CHECKING:
    from dprandp.runs.parallel import Ranks

COMMANDS = ("generate", "pretrain", "probe", "finetune", "run")
"""Commands that several processes can share."""

ranks: Ranks | None = None
"""The processes, as rank 0 sees them; None for a single process."""


def join() -> None:
    """Under ``torchrun``, join the other processes. Rank 0 returns; any other rank runs the stages, and exits."""
    global ranks
    if "RANK" not in os.environ or os.environ.get("WORLD_SIZE", "1") == "1":
        return  # without the import of torch
    from dprandp.runs.parallel import join as join_others

    met = join_others()
    if not met.is_first:
        _run_stages(met)
    ranks = met
    met.stage_done()


def end(code: object) -> None:
    """Under ``torchrun``, end rank 0 with an exit code, which the other ranks will have too."""
    if ranks is None:
        return
    code = code if isinstance(code, int) else int(code is not None)
    try:
        if code == 0:
            ranks.announce(None)
        else:
            ranks.leave_words({"exit_code": code, "problem": None, "fix": None})
    except DprandpError as error:
        code = Console().error(error)
    _exit(code)


def refuse_command(command: str | None) -> None:
    """Raise UsageError for a command of one process."""
    if ranks is not None and command is not None and command not in COMMANDS:
        raise UsageError(
            f"`dprandp {command}` runs in one process, not in {ranks.size}",
            fix=f"run it without torchrun; several processes can run {', '.join(COMMANDS)}",
        )


def refuse_flags(device: str, workers: int | None) -> None:
    """Raise UsageError for a flag that contradicts several processes."""
    if device.startswith("cuda:"):
        raise UsageError(
            f"--device {device} names one device for several processes",
            fix="give --device cuda: each process takes the device with its own number",
        )
    if workers is not None and workers > 1:
        raise UsageError(f"--workers {workers} does not go with several processes", fix="leave --workers out")


def _run_stages(met: Ranks) -> NoReturn:
    """On another rank, run each stage that rank 0 announces; print nothing unless the others are lost."""
    from dprandp import pipeline
    from dprandp.runs.parallel import RankError, RankLostError

    signals.leave_to_rank_0()
    console = Console(quiet=True, debug="--debug" in sys.argv)
    console.route_logging()
    code = 0
    try:
        while (stage := met.announced()) is not None:
            pipeline.run_announced(stage, met, console)
    except RankError as error:
        code = error.exit_code
    except RankLostError as error:
        code = console.error(error)
    except BaseException as error:
        told = console.described(error)
        met.leave_words(told)
        code = told["exit_code"]
    _exit(code)


def _exit(code: int) -> NoReturn:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # no shutdown hooks of libraries: they may wait for lost processes
