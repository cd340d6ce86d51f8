"""Hostile inputs by the thousand: each is refused in words or accepted; nothing crashes, hangs, bloats or is left over.

A *case* is one call on one damaged input. Whatever it does, these hold:

* it returns, or raises a ``DprandpError`` with an exit code of 2 to 6, a problem and a way on;
* it ends within ``SECONDS`` and without reserving ``MEMORY`` bytes beyond what the process had before;
* a refused command leaves the files as they were.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import io
import json
import math
import os
import random
import resource
import signal
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import typer.main
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from dprandp import cli
from dprandp.cli import session
from dprandp.errors import DprandpError
from dprandp.runs.console import Console

SECONDS = 20.0
"""A case that computes longer hangs; ordinary ones take milliseconds. So does one that waits ten times as long."""

MEMORY = 2**30
"""Bytes of address space a case may add: an image of the largest size taken needs 400 MB."""

JUNK: list[Any] = [
    None, True, False, 0, -1, 1, 2, 7, 2**31, 2**63, -(2**63) - 1, 10**30, 10**400, 0.0, -0.0, 0.5, 1.5, -3.25, 1e-320,
    1e308, math.nan, math.inf, -math.inf, "", " ", "x", "0", "8", "inf", "nan", "tiny", "small", "paper", "probe",
    "../../../etc/passwd", "/etc/passwd", "~nobody-of-this-name/x", "a\0b", "\x1b[2J", "é" * 300, "a" * 5000, "\ud800",
    [], [1], ["a", None], [[]], {}, {"a": 1}, {"": {}}, {"format": 1}, "2026-13-45T99:99", "2026-01-01T00:00:00",
    "sha256:zz", "0" * 64, "done", "partial", "stale", "os-entropy",
]  # fmt: skip


class Hang(BaseException):
    """A case took too long. Not an Exception, which a reader might take for damage of the file."""


@dataclass(frozen=True)
class Told:
    """How a command ended that ran in this process."""

    code: int
    out: str
    err: str


@contextlib.contextmanager
def limits() -> Iterator[None]:
    """Time and memory of one case."""

    def late(signum: int, frame: object) -> None:
        raise Hang(f"longer than {SECONDS:g} s")

    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_AS)
    handlers = {signum: signal.signal(signum, late) for signum in (signal.SIGALRM, signal.SIGPROF)}
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, before[1]))
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    signal.setitimer(signal.ITIMER_REAL, 10 * SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.setitimer(signal.ITIMER_REAL, 0)
        resource.setrlimit(resource.RLIMIT_AS, before)
        for signum, before_it in handlers.items():
            signal.signal(signum, before_it)
        torch.set_flush_denormal(False)  # a stage sets it for its process; hypothesis draws such numbers


def attempt(call: Callable[[], object]) -> DprandpError | None:
    """Call a loader. Returns the refusal, if it was one; anything but a result or a refusal goes on as an error."""
    refusal: DprandpError | None = None
    with limits():
        try:
            call()
        except DprandpError as error:
            refusal = error
    if refusal is not None:
        assert refusal.exit_code in (2, 3, 4, 5, 6), repr(refusal)
        assert refusal.problem.strip(), repr(refusal)
        assert refusal.fix.strip(), repr(refusal)
    return refusal


@functools.cache
def _parser() -> Any:
    """The command line, built once: typer would build it anew at each call, which takes longer than most cases."""
    return typer.main.get_command(cli.app)


def command(*arguments: object) -> Told:
    """``dprandp ARGUMENTS`` in this process, with the promises about refusals held."""
    app = _parser()
    out, err, code = io.StringIO(), io.StringIO(), 0
    handlers = {signum: signal.getsignal(signum) for signum in (signal.SIGINT, signal.SIGTERM)}
    kept = sys.argv, session.current, cli.app
    sys.argv = ["dprandp", *map(str, arguments)]
    session.current, cli.app = Console(), app
    try:
        with limits(), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                cli.main()
            except SystemExit as end:
                code = end.code if isinstance(end.code, int) else 0 if end.code is None else 1
    finally:
        sys.argv, session.current, cli.app = kept
        for signum, before in handlers.items():
            signal.signal(signum, before)
    told = Told(code, out.getvalue(), err.getvalue())
    assert told.code in (0, 2, 3, 4, 5, 6), told
    assert "Traceback" not in told.err, told
    if told.code:
        assert not told.out or json.loads(told.out)["error"]["exit_code"] == told.code, told  # with --json
        assert "fix: " in told.err or "--help" in told.err or "-h" in told.err, told
    return told


def tree(folder: Path) -> dict[str, bytes | str | None]:
    """Every name below a folder with what it holds; the lock file, which says nothing, is left out."""
    found: dict[str, bytes | str | None] = {}
    for path in sorted(folder.rglob("*")):
        if path.name != ".lock":
            name = str(path.relative_to(folder))
            found[name] = os.readlink(path) if path.is_symlink() else path.read_bytes() if path.is_file() else None
    return found


def explore(strategy: st.SearchStrategy, check: Callable[[Any], None], cases: int, fast: bool) -> int:
    """Run ``check``, which raises when a promise is broken, on that many drawn values; returns how many there were.

    Fast draws the same values every time, for the suite that decides about a change; else there are new ones each time.
    """
    tried = 0
    phases = [Phase.explicit, Phase.generate] if fast else [Phase.explicit, Phase.generate, Phase.shrink]

    @settings(
        max_examples=cases, deadline=None, derandomize=fast, database=None, phases=phases,
        suppress_health_check=list(HealthCheck), report_multiple_bugs=False,
    )  # fmt: skip
    @given(strategy)
    def run(value: Any) -> None:
        nonlocal tried
        tried += 1
        check(value)

    run()
    return tried


def sizes(fast: int, slow: int) -> pytest.MarkDecorator:
    """The number of cases as a parameter: few in the fast suite, many in the slow one."""
    return pytest.mark.parametrize("cases", [fast, pytest.param(slow, marks=pytest.mark.slow)])


dice = st.integers(0, 2**63 - 1).map(random.Random)  # hypothesis shows the seed of a failing case
"""For mutations that need many small choices: thousands of times as quick as to let hypothesis make each."""


def mutated_bytes(draw: random.Random, content: bytes) -> bytes:
    """Bits flipped, bytes set, runs removed, doubled, zeroed or made up, or an end cut off; one to four of these."""
    data = bytearray(content)
    for _ in range(draw.randint(1, 4)):
        size = len(data)
        start = draw.randrange(size + 1)
        end = min(size, start + draw.choice([1, 2, 4, 8, 64, 1000]))
        kind = draw.randrange(8)
        if kind == 0 and start < size:
            data[start] ^= 1 << draw.randrange(8)
        elif kind == 1 and start < size:
            data[start] = draw.choice([0, 1, 10, 34, 127, 128, 255, draw.randrange(256)])
        elif kind == 2:
            del data[start:end]
        elif kind == 3:
            data[start:start] = data[start:end]
        elif kind == 4:
            data[start:end] = bytes(end - start)
        elif kind == 5:
            data[start:end] = draw.randbytes(end - start)
        elif kind == 6:
            del data[start:]
        else:
            data += draw.randbytes(draw.choice([1, 8, 100]))
    return bytes(data)


def mutated(draw: random.Random, document: Any, times: int = 2) -> Any:
    """A copy of a JSON value with entries removed, added, renamed, swapped or replaced by ``JUNK``."""
    document = copy.deepcopy(document)
    for _ in range(draw.randint(1, times)):
        places = list(_places(document))
        if not places:
            return draw.choice(JUNK)
        holder, key = draw.choice(places)
        kind = draw.randrange(7)
        if kind <= 2:
            holder[key] = copy.deepcopy(draw.choice(JUNK))
        elif kind == 3:
            del holder[key]
        elif kind == 4 and isinstance(holder, dict):
            holder[draw.choice(["", "unknown", "format", f"{key}s", "\x1b[31m"])] = holder.pop(key)
        elif kind == 5:
            other, place = draw.choice(places)
            holder[key], other[place] = copy.deepcopy(other[place]), copy.deepcopy(holder[key])
        elif isinstance(holder, dict):
            holder[draw.choice(["unknown", "stages", "x" * 300])] = copy.deepcopy(draw.choice(JUNK))
        else:
            holder.append(copy.deepcopy(draw.choice(JUNK)))
    return document


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    if isinstance(value, dict | list):
        for key in list(value) if isinstance(value, dict) else range(len(value)):
            yield value, key
            yield from _places(value[key])
