"""Stop at a signal without losing work.

The first SIGINT or SIGTERM only sets a flag; the training loop checks it between two steps, saves a checkpoint and
raises ``Interrupted``, which becomes exit code 130 or 143. The second signal ends the process at once.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from dprandp.errors import DprandpError

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupted(DprandpError):
    """A signal stopped the run, after its state was saved (exit code 128 + signal number: 130 or 143)."""

    def __init__(self, signum: int) -> None:
        self.signum = signal.Signals(signum)
        self.exit_code = 128 + int(signum)
        super().__init__(
            f"stopped by {self.signum.name}; the state was saved",
            fix="run the same command again to continue from there",
        )


class Stop:
    """The flag between the signal handler and the loop: ``requested`` is None, or the first signal received."""

    def __init__(self) -> None:
        self.requested: signal.Signals | None = None
        self._process = os.getpid()

    def raise_if_requested(self) -> None:
        """Raise ``Interrupted`` if a signal came. Call it only once the checkpoint is saved."""
        if self.requested is not None:
            raise Interrupted(self.requested)

    def end_step(self, due: bool, save: Callable[[], object]) -> None:
        """At the end of a step: save where it is due or a signal came, and raise ``Interrupted`` if one came."""
        requested = self.requested  # read once: a later signal waits for the next step
        if due or requested is not None:
            save()
        if requested is not None:
            raise Interrupted(requested)

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        forked = os.getpid() != self._process
        if forked and signum == signal.SIGINT:
            return  # Ctrl-C reaches the whole process group; a worker continues until its parent ends it
        if self.requested is None and not forked:
            self.requested = signal.Signals(signum)
            message = f"\n{self.requested.name}: stopping after this step and saving; once more to stop at once\n"
            # os.write: a handler may run in the middle of a print, whose buffer cannot be entered twice.
            os.write(2, message.encode())
            return
        if os.isatty(2) and not forked:
            os.write(2, b"\x1b[?25h")  # a progress bar has hidden the cursor
        signal.signal(signum, signal.SIG_DFL)
        os.kill(os.getpid(), signum)


_active: Stop | None = None
_ended: int | None = None


def ended_by() -> int | None:
    """The signal that is ending this program outside of a ``graceful_stop``; None while there is none.

    Another exception on the way out is then no bug: a library written in C may have made it of the ``SystemExit``
    (pydantic does, while it builds a validator).
    """
    return _ended


def end_on_signals() -> None:
    """Outside a ``graceful_stop``, let SIGINT and SIGTERM end the program with a message and exit code 130 or 143.

    Ends by ``SystemExit``, so that temporary files are removed and locks released.
    """
    for signum in _SIGNALS:
        if signal.getsignal(signum) is not signal.SIG_IGN:
            signal.signal(signum, _end)
    sys.unraisablehook = _not_raised


def _not_raised(unraisable) -> None:
    """A signal came while Python removed an object: nothing can be raised there, so it is raised a little later."""
    if _ended is None or not isinstance(unraisable.exc_value, SystemExit):
        sys.__unraisablehook__(unraisable)
        return
    signal.signal(signal.SIGALRM, _end_after_all)
    signal.setitimer(signal.ITIMER_REAL, 0.01)


def _end_after_all(signum: int, frame: FrameType | None) -> None:
    raise SystemExit(128 + (_ended or signum))


def _end(signum: int, frame: FrameType | None) -> None:
    global _ended
    _ended = signum
    for held in _SIGNALS:
        if signal.getsignal(held) is _end:
            signal.signal(held, signal.SIG_DFL)  # a second one ends the process at once
    name = signal.Signals(signum).name
    message = f"error: stopped by {name}; what was saved before is safe\n  fix: run the same command again to go on\n"
    os.write(2, message.encode())
    raise SystemExit(128 + signum)


def leave_to_rank_0() -> None:
    """On a rank other than rank 0, ignore the first SIGINT or SIGTERM, which reaches all processes of a job: rank 0
    saves and ends them all. A second signal ends this process."""
    global _active
    _active = Stop()
    for signum in _SIGNALS:
        if signal.getsignal(signum) is not signal.SIG_IGN:
            signal.signal(signum, lambda signum, frame: signal.signal(signum, signal.SIG_DFL))


@contextmanager
def graceful_stop() -> Iterator[Stop]:
    """Delay SIGINT and SIGTERM until the next step boundary.

    ::

        with graceful_stop() as stop:
            for step in ...:
                ...
                stop.end_step(due, lambda: checkpoint.save(...))

    Nested blocks share the outermost one's flag, so a command of several stages cannot lose a signal that arrives
    between two of them. A signal that the parent process ignores (``nohup``, a background job) stays ignored.
    Outside the main thread Python delivers no signals: the flag is then never set.
    """
    global _active
    if _active is not None or threading.current_thread() is not threading.main_thread():
        yield _active or Stop()
        return
    stop = Stop()
    previous = {signum: signal.getsignal(signum) for signum in _SIGNALS}
    held = [signum for signum in _SIGNALS if previous[signum] is not signal.SIG_IGN]
    _active = stop
    try:
        for signum in held:
            signal.signal(signum, stop._handle)
        yield stop
    finally:
        _active = None
        for signum in held:
            signal.signal(signum, previous[signum] if previous[signum] is not None else signal.SIG_DFL)
