"""Peak memory of one side, in a process of its own: what the process holds at most, beyond its libraries.

A peak is a high-water mark of a whole process, so two sides in one process would hide each other. The child loads the
libraries, notes what it holds, prepares the side, and reports the highest mark that the work itself reached: inputs,
model and everything the work needs, without interpreter and libraries.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import dprandp
from benchmark.timing import Work

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


@dataclass(frozen=True)
class Peak:
    """Bytes.

    Attributes:
        bytes: highest resident memory during the work, less what the libraries took before it.
        libraries: what they took.
    """

    bytes: int
    libraries: int


def resident(mark: str = "VmRSS") -> int:
    """Resident memory of this process now, or (``VmHWM``) at most so far; bytes.

    Where the system has no /proc, both are ``ru_maxrss``: the most so far.
    """
    if _STATUS.is_file():
        fields = dict(line.split(":", 1) for line in _STATUS.read_text(encoding="ascii", errors="replace").splitlines())
        return int(fields[mark].split()[0]) * 1024
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024


def forget_peak() -> bool:
    """Begin the high-water mark anew; False where the system cannot, and the mark keeps what came before."""
    try:
        _CLEAR.write_text("5", encoding="ascii")  # Linux: reset VmHWM to what is resident now
    except OSError:
        return False
    return True


def peak_of(make: Callable[[], Work], libraries: int) -> Peak:
    """Prepare a side and run it once, in this process.

    Args:
        make: of the side.
        libraries: resident bytes before anything was prepared.
    """
    work = make()
    forget_peak()
    work()
    return Peak(max(0, resident("VmHWM") - libraries), libraries)


def peak_in_child(*what: str) -> Peak:
    """``child.py`` for one side.

    Args:
        what: the child's arguments.

    Raises:
        RuntimeError: it failed; with the end of what it said.
    """
    done = subprocess.run(
        [sys.executable, "-m", "benchmark.child", *what],
        capture_output=True, text=True, check=False, env=environment(),
    )  # fmt: skip
    if done.returncode:
        raise RuntimeError(f"the process that measures {' '.join(what)} ended with {done.returncode}: {done.stderr}")
    return Peak(**json.loads(done.stdout.splitlines()[-1]))


def environment() -> dict[str, str]:
    """For child processes: they import the same package and benchmark as this one, wherever they were found."""
    homes = [str(Path(dprandp.__file__).parents[1]), str(Path(__file__).parents[1])]
    return os.environ | {"PYTHONPATH": os.pathsep.join([*homes, *filter(None, [os.environ.get("PYTHONPATH")])])}
