"""Output for people: progress and advice on stderr, the result on stdout, metrics in metrics.jsonl.

stdout carries only the result, so that ``dprandp probe --json | jq`` always works. Bars appear only on a
terminal; in a log file there is a plain line every ten seconds.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import rich.console
import rich.progress
from rich.text import Text

from dprandp.errors import DprandpError, StorageError
from dprandp.runs.files import atomic_write, from_json, storage_errors, to_json

PLAIN_INTERVAL = 10.0
"""Seconds between two lines of plain progress."""

SHOW_WARNING = warnings.showwarning
"""As Python shows warnings."""


class Console:
    """Everything a command prints.

    Args:
        quiet: stderr carries nothing but errors.
        json: the result is one JSON object instead of one line.
        debug: errors come with a traceback (without local variables) and the private detail of the error.
    """

    def __init__(self, quiet: bool = False, json: bool = False, debug: bool = False) -> None:
        self.quiet = quiet
        self.json = json
        self.debug = debug
        on_terminal = sys.stderr.isatty() and os.environ.get("TERM") != "dumb"
        self.bars = not quiet and on_terminal and not os.environ.get("NO_COLOR")
        self._stderr = rich.console.Console(stderr=True, highlight=False, soft_wrap=True)

    def say(self, text: str) -> None:
        """Print to stderr, unless quiet."""
        if self.quiet:
            return
        if self.bars:
            # Through rich, so that a live bar moves down instead of being torn. Brackets are not markup.
            self._stderr.print(Text(text))
        else:
            print(text, file=sys.stderr, flush=True)

    def warn(self, text: str) -> None:
        """Print ``warning: text`` to stderr, unless quiet."""
        self.say(f"warning: {text}")

    def next(self, command: str) -> None:
        """Print the next command, unless quiet."""
        self.say(f"next: {command}")

    def result(self, payload: Any, line: str) -> None:
        """Print the result to stdout: ``payload`` (a dict or dataclass) as one JSON object (see ``to_json``) with
        ``--json``, else ``line``.

        Raises:
            StorageError: stdout is a file on a full disk, or the like.
        """
        text = to_json(payload) if self.json else line
        with storage_errors("stdout"):
            try:
                print(text, flush=True)
            except OSError as error:
                # Python would try again when it closes stdout at exit, and change the exit code.
                os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
                if not isinstance(error, BrokenPipeError):  # the reader (``head``) has stopped: not an error
                    raise

    def error(self, error: BaseException) -> int:
        """Print an error to stderr, even if quiet, and with ``--json`` its public facts to stdout as well.

        Without ``--debug`` a bug is reported only by its type and place: the message of an arbitrary exception may
        contain a private value (the key of a KeyError, a file name).

        Returns:
            The exit code: the error's own, 6 for an OSError, 130 for a KeyboardInterrupt, else 1.
        """
        told = self.described(error)
        if self.json:
            with contextlib.suppress(StorageError):  # stdout itself has failed: stderr says what has to be said
                self.result({"error": told}, "")
        print(f"error: {told['problem']}", file=sys.stderr)
        if isinstance(error, KeyboardInterrupt):
            return 130
        if isinstance(error, DprandpError) or not self.debug or told["exit_code"] == 6:
            print(f"  fix: {told['fix']}", file=sys.stderr)
        if self.debug and isinstance(error, DprandpError) and error.private_detail:
            print(f"  private detail, do not publish: {error.private_detail}", file=sys.stderr)
        return told["exit_code"]

    def described(self, error: BaseException) -> dict[str, Any]:
        """The public facts of an error: exit_code, problem, fix. With ``--debug`` the traceback goes to stderr."""
        if self.debug:
            sys.stderr.write("".join(traceback.format_exception(error)))
        if isinstance(error, KeyboardInterrupt):
            return {"exit_code": 130, "problem": "interrupted; the last checkpoint is safe", "fix": "run it again"}
        if isinstance(error, DprandpError):
            return {"exit_code": error.exit_code, "problem": error.problem, "fix": error.fix}
        if isinstance(error, OSError) and error.errno:
            # The system's text for the number: the error's own may name a private file.
            problem = f"the system could not read or write: {os.strerror(error.errno)}"
            fix = "check the paths, permissions and the disk; --debug shows the place"
            return {"exit_code": 6, "problem": problem, "fix": fix}
        frames = traceback.extract_tb(error.__traceback__)
        place = f" in {Path(frames[-1].filename).name}, line {frames[-1].lineno}" if frames else ""
        problem = f"this is a bug in dprandp: {type(error).__name__}{place}"
        fix = "run again with --debug for the traceback; it may show private values"
        return {"exit_code": 1, "problem": problem, "fix": fix}

    def route_logging(self) -> None:
        """Send the package's log records of level WARNING and above to ``warn`` (once, however often it is called).

        Handlers and level of the root logger have no effect: ``opacus`` adds one on import. A Python warning of a
        library is shown only by its type and place, like a bug: its text may contain a private value. With ``--debug``
        it is shown in full.
        """
        warnings.showwarning = SHOW_WARNING if self.debug else self._show_warning
        logger = logging.getLogger("dprandp")
        for handler in [handler for handler in logger.handlers if isinstance(handler, _ToConsole)]:
            logger.removeHandler(handler)
        logger.addHandler(_ToConsole(self))
        logger.propagate = False
        logger.setLevel(logging.WARNING)

    def _show_warning(
        self, message: Warning | str, category: type[Warning], filename: str, lineno: int, *rest: object
    ) -> None:
        self.warn(f"{category.__name__} in {Path(filename).name}, line {lineno}; --debug shows it")

    @contextlib.contextmanager
    def progress(
        self, total: int, label: str, done: int = 0, note: Callable[[], str] = str
    ) -> Iterator[_Bar | _Lines]:
        """Show the progress of a loop over ``total`` units, ``done`` of them before a resumed run.

        ``note`` is asked for a short remark at the beginning, at the end, and once a second at most.
        """
        if self.bars:
            columns = (
                rich.progress.TextColumn("{task.description}"),
                rich.progress.BarColumn(),
                rich.progress.MofNCompleteColumn(),
                _Rate(),
                rich.progress.TimeRemainingColumn(),
                rich.progress.TextColumn("{task.fields[note]}", markup=False),
            )
            with rich.progress.Progress(*columns, console=self._stderr) as bars:
                bar = _Bar(bars, bars.add_task(label, total=total, completed=done, note=note()), note)
                yield bar
                bar.advance(0)
        else:
            plain = _Lines(self, total, label, done, note)
            yield plain
            plain.end()


class _Rate(rich.progress.ProgressColumn):
    """Units per second; nothing before the first one."""

    def render(self, task: rich.progress.Task) -> Text:
        rate = task.finished_speed or task.speed
        return Text(f"{rate:.3g}/s" if rate else "")


class _Bar:
    def __init__(self, bars: rich.progress.Progress, task: rich.progress.TaskID, note: Callable[[], str]) -> None:
        self._bars, self._task, self._note, self._noted = bars, task, note, time.monotonic()

    def advance(self, count: int = 1, note: str = "") -> None:
        """Report ``count`` more finished units; ``note`` is a short remark such as ``loss 2.31``."""
        now = time.monotonic()
        if count == 0 or now - self._noted >= 1:
            note, self._noted = note or self._note(), now
        self._bars.update(self._task, advance=count, **({"note": note} if note else {}))


class _Lines:
    """A line every ``PLAIN_INTERVAL`` seconds, and one at the end."""

    def __init__(self, console: Console, total: int, label: str, done: int, note: Callable[[], str]) -> None:
        self._console, self._total, self._label, self._ask = console, total, label, note
        self._before = self._done = done
        self._started = self._spoke = time.monotonic()
        self._note = ""

    def advance(self, count: int = 1, note: str = "") -> None:
        self._done += count
        self._note = note
        now = time.monotonic()
        if now - self._spoke >= PLAIN_INTERVAL:
            self._spoke = now
            rate = (self._done - self._before) / (now - self._started)
            left = f", {duration(round((self._total - self._done) / rate))} left" if rate > 0 else ""
            self._say(f"{rate:.3g}/s{left}")

    def end(self) -> None:
        self._say(f"in {duration(round(time.monotonic() - self._started))}")

    def _say(self, tail: str) -> None:
        if not self._console.quiet:
            note = self._note or self._ask()
            self._console.say(f"{self._label} {self._done}/{self._total} {tail} {note}".rstrip())


class _ToConsole(logging.Handler):
    def __init__(self, console: Console) -> None:
        super().__init__(logging.WARNING)
        self._console = console

    def emit(self, record: logging.LogRecord) -> None:
        self._console.warn(record.getMessage())


def duration(seconds: float) -> str:
    """Seconds for people: ``1.25 s``, ``14 s``, ``3 min 20 s``, ``2 h 05 min``."""
    whole = round(seconds)
    if whole < 60:
        return f"{seconds:.3g} s" if seconds < 10 else f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


class MetricsLog:
    """metrics.jsonl: one JSON object per line, each with its ``step``.

    A run that resumes writes the line of ``resume_at``, the first step still to be done, again. So opening the log
    removes the lines from there on, and a torn last line of a crash.

    Raises:
        StorageError: the disk refuses (here and in ``write``).
    """

    def __init__(self, path: Path | str, resume_at: int = 0) -> None:
        self.path = Path(path)
        kept: list[str] = []
        if resume_at > 0 and self.path.exists():
            with storage_errors(self.path, "read"):
                text = self.path.read_bytes().decode("utf-8", errors="replace")
            kept = [line for line in text.split("\n") if _step(line, resume_at) < resume_at]
        atomic_write(self.path, "".join(line + "\n" for line in kept))

    def write(self, step: int, **values: Any) -> None:
        """Append ``{"step": step, ...values}``. Values are public JSON values."""
        line = to_json({"step": step, **values}) + "\n"
        # Opened for each line, so that readers of the file see every line at once.
        with storage_errors(self.path), open(self.path, "a", encoding="utf-8") as file:
            file.write(line)


def _step(line: str, otherwise: int) -> float:
    """The step of a line of metrics.jsonl; ``otherwise`` for an invalid line."""
    try:
        record = from_json(line)
    except ValueError:
        return otherwise
    step = record.get("step") if isinstance(record, dict) else None
    return step if isinstance(step, int | float) else otherwise
