"""Result on stdout and all else on stderr; bars on a terminal alone; errors that tell no secrets."""

from __future__ import annotations

import json
import logging
import os
import pty
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from dprandp.errors import BudgetError, StorageError
from dprandp.runs import console as console_module
from dprandp.runs.console import PLAIN_INTERVAL, Console, MetricsLog, duration
from dprandp.runs.signals import Interrupted

SCRIPT = """
import sys
from dprandp.runs.console import Console
console = Console(quiet="quiet" in sys.argv, json="json" in sys.argv)
console.say("[bold]starting[/bold]")
with console.progress(20, "probe") as progress:
    for step in range(20):
        progress.advance(note=f"loss {step}")
console.result({"accuracy": 0.5, "epsilon": float("inf")}, "accuracy 50 %")
console.next("dprandp finetune")
"""


def run(*arguments: str, script: str = SCRIPT) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", script, *arguments], capture_output=True, text=True, timeout=60, check=False
    )


def run_on_a_terminal(*arguments: str, **variables: str) -> tuple[str, str]:
    """Run SCRIPT with stderr on a pseudo-terminal.

    Returns:
        what came to stdout (a pipe) and to the terminal.
    """
    ours, theirs = pty.openpty()
    environment = {k: v for k, v in os.environ.items() if k != "NO_COLOR"} | {"TERM": "xterm"} | variables
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT, *arguments], stdout=subprocess.PIPE, stderr=theirs, env=environment
    )
    os.close(theirs)
    seen = b""
    while True:
        try:
            piece = os.read(ours, 65536)
        except OSError:  # EIO: the other side is closed
            break
        if not piece:
            break
        seen += piece
    os.close(ours)
    assert process.stdout is not None
    out = process.stdout.read().decode()
    assert process.wait(timeout=60) == 0
    return out, seen.decode()


def test_pipe_gets_plain_lines_and_stdout_the_result_alone() -> None:
    done = run()
    assert done.stdout == "accuracy 50 %\n"
    assert done.stderr.splitlines() == ["[bold]starting[/bold]", "probe 20/20 in 0 s loss 19", "next: dprandp finetune"]
    done = run("quiet", "json")
    assert done.stderr == ""
    assert json.loads(done.stdout) == {"accuracy": 0.5, "epsilon": "inf"}
    assert done.stdout.count("\n") == 1


def test_a_bar_on_a_terminal_alone_and_where_it_is_wanted() -> None:
    out, seen = run_on_a_terminal()
    assert out == "accuracy 50 %\n"
    assert "\x1b[?25l" in seen  # the cursor is hidden while a bar is live,
    assert seen.rindex("\x1b[?25h") > seen.rindex("\x1b[?25l")  # and comes back
    assert "20/20" in seen
    assert "[bold]starting[/bold]" in seen
    for variables in ({"NO_COLOR": "1"}, {"TERM": "dumb"}):
        _, seen = run_on_a_terminal(**variables)
        assert "\x1b" not in seen
        assert "probe 20/20" in seen
    assert run_on_a_terminal("quiet") == ("accuracy 50 %\n", "")


def test_a_reader_that_leaves_is_no_error() -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", "input()\n" + SCRIPT],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdout is not None
    process.stdout.close()
    process.stdout = None
    _, err = process.communicate(b"\n", timeout=60)
    assert process.returncode == 0, err
    assert b"Broken" not in err


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_under_stdout_is_a_storage_error() -> None:
    script = """
import sys
from dprandp.runs.console import Console
console = Console()
try:
    console.result({}, "line")
except Exception as error:
    sys.exit(console.error(error))
"""
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-c", script], stdout=full, stderr=subprocess.PIPE, text=True, timeout=60
        )
    assert done.returncode == StorageError.exit_code
    assert "error: cannot write stdout: the disk is full" in done.stderr
    assert "Exception ignored" not in done.stderr


def test_plain_progress_speaks_every_ten_seconds(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 0.0
    monkeypatch.setattr(console_module.time, "monotonic", lambda: now)
    with Console().progress(100, "pretrain", done=50) as progress:
        for _ in range(50):
            now += 1.0
            progress.advance()
    lines = capsys.readouterr().err.splitlines()
    assert lines == [
        f"pretrain {50 + 10 * k}/100 1/s, {50 - 10 * k} s left" for k in range(1, int(50 / PLAIN_INTERVAL) + 1)
    ] + ["pretrain 100/100 in 50 s"]


def test_plain_progress_claims_no_end_that_was_not_reached(capsys: pytest.CaptureFixture[str]) -> None:
    def failing() -> None:
        with Console().progress(2, "probe") as progress:
            progress.advance()
            raise KeyError

    with pytest.raises(KeyError):
        failing()
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (BudgetError("epsilon 2 exceeds 1", fix="raise --eps", private_detail="row 7"), 5),
        (Interrupted(15), 143),
        (KeyboardInterrupt(), 130),
        (KeyError("patient-0042.png"), 1),
    ],
)
def test_errors_are_shown_even_when_quiet_and_tell_no_secret(
    error: BaseException, code: int, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(type(error)) as raised:
        raise error
    assert Console(quiet=True).error(raised.value) == code
    plain = capsys.readouterr()
    assert plain.out == ""
    assert plain.err.startswith("error: ")
    assert Console(quiet=True, json=True).error(raised.value) == code
    told = capsys.readouterr()
    public = json.loads(told.out)["error"]
    assert (told.err, list(public), public["exit_code"]) == (plain.err, ["exit_code", "problem", "fix"], code)
    for said in (plain.err, told.out):
        assert "row 7" not in said
        assert "patient" not in said
        assert "Traceback" not in said


def test_debug_shows_the_traceback_and_the_private_detail(capsys: pytest.CaptureFixture[str]) -> None:
    secret_local = "-".join(["pixels", "1", "2", "3"])
    try:
        raise BudgetError("over", fix="less", private_detail="row 7") from KeyError("patient-0042.png")
    except BudgetError as error:
        Console(debug=True).error(error)
    err = capsys.readouterr().err
    assert "Traceback" in err
    assert "patient-0042.png" in err
    assert "row 7" in err
    assert secret_local not in err.replace('secret_local = "-".join(["pixels", "1", "2", "3"])', "")


@pytest.fixture
def package_logger() -> Iterator[logging.Logger]:
    """The package's logger, put back afterwards as it was."""
    logger = logging.getLogger("dprandp")
    before = list(logger.handlers), logger.propagate, logger.level
    yield logger
    logger.handlers[:], logger.propagate = before[:2]
    logger.setLevel(before[2])


def test_log_warnings_arrive_once(capsys: pytest.CaptureFixture[str], package_logger: logging.Logger) -> None:
    for quiet in (False, False, True, False):
        Console(quiet=quiet).route_logging()
    logging.getLogger("dprandp.runs.checkpoint").warning("step-%d is damaged", 2)
    logging.getLogger("dprandp.runs.checkpoint").info("not shown")
    assert capsys.readouterr().err == "warning: step-2 is damaged\n"


LIBRARIES = (
    pytest.param("import opacus.utils.module_utils", marks=pytest.mark.slow),  # does what the next one does
    "logging.basicConfig(format='%(asctime)s %(message)s', level=logging.INFO)",
    "[logging.getLogger().addHandler(logging.StreamHandler()) for _ in range(2)]",
    "logging.getLogger().setLevel(logging.CRITICAL)",
    "logging.basicConfig(force=True)",
)
SCRIPT_THAT_WARNS = """
import logging, sys
from dprandp.runs.console import Console
def route():
    Console().route_logging()
{}
logging.getLogger('dprandp.runs.checkpoint').warning('step-2 is damaged')
logging.getLogger('dprandp.runs.checkpoint').info('not shown')
"""


@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize("before", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_a_warning_arrives_once_whatever_a_library_does_to_the_root_logger(library: str, before: bool) -> None:
    """In a process of its own; the library is imported before the console routes the log, or after."""
    steps = [library, "route()"] if before else ["route()", library]
    done = run(script=SCRIPT_THAT_WARNS.format("\n".join(steps)))
    assert (done.returncode, done.stderr) == (0, "warning: step-2 is damaged\n")


def test_metrics_resume_drops_what_will_be_written_again(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    log = MetricsLog(path)
    for step in range(5):
        log.write(step, loss=step / 2, rate=float("inf"))
    whole = path.read_bytes()
    with open(path, "a") as file:
        file.write('{"step": 1, "los')  # torn by a crash
    log = MetricsLog(path, resume_at=3)
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [0, 1, 2]
    log.write(3, loss=1.5, rate=float("inf"))
    log.write(4, loss=2.0, rate=float("inf"))
    assert path.read_bytes() == whole
    MetricsLog(path)
    assert path.read_bytes() == b""


def test_metrics_of_a_missing_folder_is_a_storage_error(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path / "metrics.jsonl")
    log.path = tmp_path / "absent" / "metrics.jsonl"
    with pytest.raises(StorageError, match="absent"):
        log.write(1)


def test_durations_are_for_people() -> None:
    assert [duration(seconds) for seconds in (1.25, 14, 200, 7500)] == ["1.25 s", "14 s", "3 min 20 s", "2 h 05 min"]
