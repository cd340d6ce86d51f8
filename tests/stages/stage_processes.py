"""Public stages in processes of their own, so that a test can kill them; imports are done once."""

from __future__ import annotations

import os
import traceback
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from rank_processes import process_of

from dprandp import generate, pretrain
from dprandp.config.schema import build
from dprandp.errors import DprandpError
from dprandp.runs import faults
from dprandp.runs.console import Console
from dprandp.runs.context import Context
from dprandp.runs.directory import RunDir, frozen


@dataclass(frozen=True)
class Outcome:
    """How a stage ended: its exit code (minus the signal that killed it), and its result or its error."""

    code: int
    result: Any


class Stages:
    """Runs public stages in forked processes, with one thread of torch each."""

    def run(self, stage: str, folder: Path, config: dict[str, Any], **options: Any) -> Outcome:
        """A stage in a process of its own. Options: workers, fault, resume, overwrite."""
        process, receiver = process_of(_answer, stage, folder, config, options)
        try:
            result = receiver.recv()
        except EOFError:  # it was killed
            result = None
        process.join()
        return Outcome(process.exitcode, result)

    def must(self, stage: str, folder: Path, config: dict[str, Any], **options: Any) -> dict[str, Any]:
        """The same, and it must succeed."""
        outcome = self.run(stage, folder, config, **options)
        assert outcome.code == 0, outcome
        return outcome.result


def _answer(sender: Connection, stage: str, folder: Path, config: dict[str, Any], options: dict[str, Any]) -> None:
    try:
        result, code = _run(stage, folder, config, **options), 0
    except DprandpError as error:
        result, code = {"problem": error.problem, "fix": error.fix}, error.exit_code
    except BaseException:
        result, code = {"problem": traceback.format_exc()}, 1
    sender.send(result)
    os._exit(code)


def _run(
    stage: str, folder: Path, config: dict[str, Any], workers: int = 1, fault: str | None = None, **flags: Any
) -> dict[str, Any]:
    torch.set_num_threads(1)
    os.environ |= {"OMP_NUM_THREADS": "1", faults.VARIABLE: fault or ""}
    rundir = RunDir.open(folder, create=True)
    with rundir.lock():
        context = Context(rundir, Console(quiet=True), torch.device("cpu"), folder, workers=workers, **flags)
        return frozen({"generate": generate, "pretrain": pretrain}[stage].run(build(stage, config), context))
