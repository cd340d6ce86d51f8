"""Public stages in processes of their own, so that a test can kill them; imports are done once."""

from __future__ import annotations

import atexit
import functools
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Forks a child per request: [stage, run folder, configuration, options]. The child answers with one JSON line; the
# server adds how it ended: an exit code, or minus a signal. Torch has one thread and was never used before the fork.
SERVER = """
import json, os, sys, traceback
import torch
import torch._dynamo  # the first optimizer imports it: 3 seconds, once here instead of once in every child
from pathlib import Path
from dprandp.runs import faults
from dprandp.config.schema import build
from dprandp.runs.console import Console
from dprandp.errors import DprandpError
from dprandp.runs.directory import RunDir, frozen
from dprandp import generate, pretrain
from dprandp.runs.context import Context

torch.set_num_threads(1)

def run(stage, folder, config, workers=1, fault=None, **flags):
    os.environ[faults.VARIABLE] = fault or ""
    rundir = RunDir.open(Path(folder), create=True)
    with rundir.lock():
        context = Context(rundir, Console(quiet=True), torch.device("cpu"), Path(folder), workers=workers, **flags)
        return frozen({"generate": generate, "pretrain": pretrain}[stage].run(build(stage, config), context))

def answer(request):
    if request == "modules":
        return sorted(sys.modules), 0
    try:
        stage, folder, config, options = request
        return run(stage, folder, config, **options), 0
    except DprandpError as error:
        return {"problem": error.problem, "fix": error.fix}, error.exit_code
    except BaseException:
        return {"problem": traceback.format_exc()}, 1

for line in sys.stdin:
    child = os.fork()
    if child == 0:
        result, code = answer(json.loads(line))
        print(json.dumps(result), flush=True)
        os._exit(code)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    print("ended", code, flush=True)
"""


@dataclass(frozen=True)
class Outcome:
    """How a stage ended: its exit code (minus the signal that killed it), and its result or its error."""

    code: int
    result: Any


class Stages:
    """Runs public stages in forked processes."""

    def __init__(self) -> None:
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-c", SERVER]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
        atexit.register(self.close)

    def close(self) -> None:
        if self._process.stdin is not None and not self._process.stdin.closed:
            self._process.stdin.close()
            self._process.wait(timeout=60)
            self._process.stdout.close()

    def _ask(self, request: Any) -> Outcome:
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        result = None
        while not (line := self._process.stdout.readline()).startswith("ended"):
            if not line:
                raise RuntimeError("the server of the stages died")
            result = json.loads(line)
        return Outcome(int(line.split()[1]), result)

    def run(self, stage: str, folder: Path, config: dict[str, Any], **options: Any) -> Outcome:
        """A stage in a process of its own. Options: workers, fault, resume, overwrite."""
        return self._ask([stage, str(folder), config, options])

    def must(self, stage: str, folder: Path, config: dict[str, Any], **options: Any) -> dict[str, Any]:
        """The same, and it must succeed."""
        outcome = self.run(stage, folder, config, **options)
        assert outcome.code == 0, outcome
        return outcome.result

    def modules(self) -> list[str]:
        """What importing the stages has loaded."""
        return self._ask("modules").result


@functools.cache
def stage_server() -> Stages:
    """One server for all test files."""
    return Stages()
