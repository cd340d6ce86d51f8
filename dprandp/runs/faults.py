"""Named points at which a test may kill the process, to make crashes reproducible.

With ``DPRANDP_FAULT=name:n`` in the environment, the process kills itself with SIGKILL the n-th time (from 1) that it
passes the point of that name: no cleanup, no ``finally``, no buffer flushed. The disk then holds what a power cut or
the kernel's out-of-memory killer would leave.
"""

from __future__ import annotations

import os
import re
import signal
import sys
from collections import Counter

from dprandp.errors import UsageError, nearest

VARIABLE = "DPRANDP_FAULT"

POINTS: tuple[str, ...] = (
    "shard-written",  # a shard of synthetic images is whole and has its name
    "temp-written",  # a file is whole and on the disk, still under its temporary name
    "renamed",  # the file has replaced its predecessor
    "pointer-moved",  # LATEST names the new checkpoint; the oldest is not removed yet
    "ledger-appended",  # the charge is in the kernel's hands, not surely on the disk
    "ledger-fsynced",  # the charge is on the disk, nothing was computed with it yet
    "update-applied",  # the noisy update is in the parameters, no checkpoint holds it yet
    "report-written",  # report.html is whole
)

_hits: Counter[str] = Counter()


def point(name: str) -> None:
    """Kill the process here if ``DPRANDP_FAULT`` says so; otherwise do nothing.

    Raises:
        UsageError: ``DPRANDP_FAULT`` is malformed or names no known point; a crash test that never crashes would pass.
        ValueError: ``name`` is not one of ``POINTS``.
    """
    if name not in POINTS:
        raise ValueError(f"{name!r} is not a fault point; known: {', '.join(POINTS)}")
    request = os.environ.get(VARIABLE)
    if not request:
        return
    wanted, hit = _parse(request)
    _hits[name] += 1
    if name == wanted and _hits[name] == hit:
        # os.write, not print: SIGKILL would lose whatever sys.stderr still buffers.
        os.write(2, f"warning: {VARIABLE}={request}: killing this process now\n".encode())
        os.kill(os.getpid(), signal.SIGKILL)


def announce() -> None:
    """Warn on stderr, once at the start of a program, that a fault is armed (and refuse a malformed request)."""
    request = os.environ.get(VARIABLE)
    if request:
        name, hit = _parse(request)
        print(f"warning: {VARIABLE} is set: this process will be killed at hit {hit} of {name!r}", file=sys.stderr)


def _parse(request: str) -> tuple[str, int]:
    match = re.fullmatch(r"([a-z-]+):([1-9][0-9]*)", request)
    if match is None or match[1] not in POINTS:
        why = f"names no known point; {nearest(match[1], POINTS)}" if match else "is not of the form NAME:N with N >= 1"
        fix = f"unset it, or use one of: {', '.join(POINTS)}"
        raise UsageError(f"the environment variable {VARIABLE}={request!r} {why}", fix=fix)
    return match[1], int(match[2])
