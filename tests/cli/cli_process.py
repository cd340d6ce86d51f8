"""Commands of ``dprandp`` in real processes, without paying for the import of torch each time.

A server imports the package once for all tests of this process, and forks a child per command. A child is a process
like any other: it has its own exit code, gets signals, can be given a limit on file sizes, and dies alone.
"""

from __future__ import annotations

import atexit
import functools
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

STAGES = Path(__file__).resolve().parents[1] / "stages"
TIMEOUT = 400.0
"""Seconds after which a command is taken to hang."""

RunAfter = Callable[[str], Path]
"""The fixture ``run_after``."""

NO_PIXELS = """
from dprandp.data import Dataset
def read(*arguments): raise SystemExit("private pixels were read")
Dataset.train = Dataset.test = Dataset.fingerprint = read
"""
"""Run before a command that must not read private data."""

ENVIRONMENT = {"OMP_NUM_THREADS": "1", "COLUMNS": "110", "NO_COLOR": "1", "TERM": "dumb"}

# A request is a line of JSON: a command to start (answered by the child's process id), or a process id to ask after
# (answered by how it ended, or null while it runs).
SERVER = """
import contextlib, functools, gc, hashlib, json, os, pickle, resource, signal, sys, tempfile
import torch
from dprandp.privacy import accounting, adaptive
from dprandp.privacy import opinions as others
import dprandp.privacy.pld, dprandp.privacy.opinions, dprandp.report.page, dprandp.inspection.overview, dprandp.pipeline
import dprandp.audit, dprandp.tune, dprandp.release, dprandp.inspection.check, dprandp.inspection.verify
import opacus.accountants.analysis.rdp, torch.nn.functional, medmnist
import torch._dynamo, torchvision.datasets, matplotlib.figure, matplotlib.backends.backend_svg  # 3 s in every child
from dprandp.cli import main

torch.set_num_threads(1)
sys.path.append(sys.argv[1])
import compiled_loops
sys.path.pop()
sys.argv = ["dprandp", "status", "--run", os.devnull]  # once for nothing: loads what is only loaded on use
try:
    with open(os.devnull, "w") as nothing, contextlib.redirect_stderr(nothing):
        main()
except SystemExit:
    pass

known = tempfile.TemporaryDirectory()

def kept(function):
    # a pure function of values: what one child computed, the others read
    @functools.wraps(function)
    def found(*arguments):
        key = hashlib.sha256(repr((function.__name__, arguments)).encode()).hexdigest()
        path = os.path.join(known.name, key)
        if not os.path.exists(path):
            value = function(*arguments)
            with open(f"{path}.{os.getpid()}", "wb") as file:
                pickle.dump(value, file)
            os.replace(file.name, path)
        with open(path, "rb") as file:
            return pickle.load(file)
    return found

def share_accounting():
    # hundreds of commands ask for the epsilon of the same few plans, each of which takes up to two seconds
    cached = {accounting: ("_calibrate", "_cached_curve", "_compose_sampled"), adaptive: ("_cover",),
              others: ("_opinions",)}
    for module, names in cached.items():
        for name in names:
            setattr(module, name, kept(getattr(module, name)))

gc.collect()
gc.freeze()  # the children then share the memory of what was loaded

def child(request):
    signal.signal(signal.SIGINT, signal.default_int_handler)  # also where the tests run in the background
    os.chdir(request["folder"])
    os.environ.update(request["environment"])
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for descriptor, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(request[name], os.O_WRONLY | os.O_CREAT | os.O_TRUNC), descriptor)
    if request["largest_file"] is not None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (request["largest_file"],) * 2)
    exec(request["before"], {})
    if not request["before"] and request["largest_file"] is None:
        share_accounting()
    sys.argv = ["dprandp", *request["arguments"]]
    code = 0
    try:
        main()
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 0 if end.code is None else 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)

for line in sys.stdin:
    request = json.loads(line)
    if isinstance(request, int):
        pid, status = os.waitpid(request, os.WNOHANG)
        print(json.dumps(os.waitstatus_to_exitcode(status) if pid else None), flush=True)
        continue
    pid = os.fork()
    if pid == 0:
        try:
            child(request)
        except BaseException as error:
            os.write(2, f"not caught: {error!r}".encode())
            os._exit(99)
    print(pid, flush=True)
"""


@dataclass(frozen=True)
class Done:
    """How a command ended: exit code (negative: killed by that signal), stdout, stderr."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> dict[str, Any]:
        """The one JSON object that stdout has to be."""
        document = json.loads(self.out)
        assert isinstance(document, dict)
        assert self.out.count("\n") == 1
        return document


class Running:
    """A command under way."""

    def __init__(self, ask: Callable[[Any], Any], pid: int, out: Path, err: Path) -> None:
        self._ask, self.pid, self._out, self._err = ask, pid, out, err

    def wait_until(self, condition: Callable[[], bool]) -> None:
        """Return once the condition holds; fail if the command ends or the time is up before that."""
        end = time.monotonic() + TIMEOUT
        while not condition():
            code = self._ask(self.pid)
            assert code is None, f"ended with {code} before the moment that was waited for:\n{self._err.read_text()}"
            if time.monotonic() > end:
                os.kill(self.pid, signal.SIGKILL)
                raise AssertionError(f"the moment never came:\n{self._err.read_text()}")
            time.sleep(0.005)

    def signal(self, signum: signal.Signals) -> None:
        os.kill(self.pid, signum)

    def end(self, timeout: float = TIMEOUT) -> Done:
        end = time.monotonic() + timeout
        while (code := self._ask(self.pid)) is None:
            if time.monotonic() > end:
                os.kill(self.pid, signal.SIGKILL)
                raise AssertionError(f"the command hangs:\n{self._err.read_text()}")
            time.sleep(0.005)
        return Done(code, self._out.read_text(), self._err.read_text())


@functools.cache
def _server() -> subprocess.Popen[str]:
    """Started once; it ends with this process."""
    pipe = subprocess.PIPE
    server = subprocess.Popen(
        [sys.executable, "-c", SERVER, str(STAGES)], stdin=pipe, stdout=pipe, text=True, env=os.environ | ENVIRONMENT
    )

    def end() -> None:
        server.stdin.close()
        server.wait(TIMEOUT)

    atexit.register(end)
    return server


class Dprandp:
    """``dprandp(*arguments)`` runs a command to its end, in a working directory; ``scratch`` is for its output."""

    def __init__(self, scratch: Path, folder: Path) -> None:
        self._scratch, self._folder, self._count = scratch, folder, 0
        _server()  # now, and not with what a test changes in the environment

    def close(self) -> None:
        """Nothing is left open: the server is everybody's."""

    def start(
        self,
        *arguments: object,
        folder: Path | None = None,
        largest_file: int | None = None,
        before: str = "",
        **environment: str,
    ) -> Running:
        """Start a command in a folder.

        A write beyond ``largest_file`` bytes fails with EFBIG. ``before`` is Python to execute before the command, to
        make something in the package fail.
        """
        self._count += 1
        out, err = (self._scratch / f"{self._count}.{kind}" for kind in ("out", "err"))
        for path in (out, err):  # for a command that is killed before it opens them
            path.touch()
        request = {
            "arguments": [str(argument) for argument in arguments],
            "folder": str(folder or self._folder),
            "environment": environment,
            "largest_file": largest_file,
            "before": before,
            "out": str(out),
            "err": str(err),
        }
        return Running(self._ask, self._ask(request), out, err)

    def __call__(self, *arguments: object, **options: Any) -> Done:
        return self.start(*arguments, **options).end()

    def _ask(self, request: Any) -> Any:
        server = _server()
        server.stdin.write(json.dumps(request) + "\n")
        server.stdin.flush()
        return json.loads(server.stdout.readline())


def subprocess_dprandp(*arguments: object, folder: Path, before: str = "") -> Done:
    """``python -m dprandp``, as a user starts it; or its entry point, after some Python."""
    start = ["-c", f"{before}\nfrom dprandp.cli import main\nmain()"] if before else ["-m", "dprandp"]
    done = subprocess.run(
        [sys.executable, *start, *map(str, arguments)], cwd=folder, env=os.environ | ENVIRONMENT, capture_output=True,
        text=True, timeout=TIMEOUT, check=False,
    )  # fmt: skip
    return Done(done.returncode, done.stdout, done.stderr)


def refused(done: Done, code: int, *fragments: str) -> None:
    """The command was refused with this exit code, in words: what was wrong, what to do, and no traceback."""
    said = f"exit code {done.code}\n{done.out}\n{done.err}"
    assert done.code == code, said
    assert not done.out or json.loads(done.out)["error"]["exit_code"] == code, said  # with --json
    assert "Traceback" not in done.err, said
    flat = " ".join(done.err.replace("│", " ").split())
    for fragment in fragments:
        assert fragment in flat, f"{fragment!r} is missing in: {said}"
    if not flat.startswith("Usage:"):  # typer's own errors point to --help instead
        assert "error: " in flat, said
        assert "fix: " in flat, said


def good(done: Done) -> dict[str, Any]:
    """The JSON of a command that succeeded."""
    assert done.code == 0, done.err
    return done.json


def state_of(run: Path) -> dict[str, bytes]:
    """Every file of a run that counts: the lock file, which says nothing, is left out."""
    return {
        str(path.relative_to(run)): path.read_bytes()
        for path in sorted(run.rglob("*"))
        if path.is_file() and path.name != ".lock"
    }


def arrays(train: int = 120, test: int = 30, side: int = 12) -> dict[str, np.ndarray]:
    """Noise whose brightness tells the class, of three."""
    random = np.random.default_rng(0)
    made: dict[str, np.ndarray] = {"classes": np.array(["dark", "grey", "bright"])}
    for split, count in (("train", train), ("test", test)):
        labels = np.arange(count) % 3
        noise = random.integers(0, 100, (count, side, side))
        made |= {f"x_{split}": (noise + 50 * labels[:, None, None]).astype(np.uint8), f"y_{split}": labels}
    return made
