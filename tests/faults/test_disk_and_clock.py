"""A disk that fills up, a folder nobody may write to, two processes at once, SIGTERM, a clock gone mad."""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from cli_process import Dprandp, refused, state_of
from tiny_run import ledger_of, plans_of
from victims import KILLED, RECORD, Victim, Work

from dprandp.runs import directory

# The n-th fsync of the process fails: of a whole file under its temporary name, of a folder, of the ledger.
FULL = """
import errno, os
real, count = os.fsync, 0
def fsync(descriptor):
    global count
    count += 1
    if count >= {number}:
        raise OSError(errno.ENOSPC, "No space left on device")
    real(descriptor)
os.fsync = fsync
"""


def disk_full_at(made: Victim, number: int) -> bool:
    """Run the stage on a disk that is full from its n-th fsync on, then with space again; False when it got through."""
    before = FULL.format(number=number) + RECORD
    done = made.dprandp(*made.arguments(), before=before, **made.environment("", 0))
    made.count_updates(done)
    made.assert_charged()
    assert not list(made.run.rglob("*.partial*"))
    if done.code == 0:
        return False
    refused(done, 6, "disk is full" if "ledger" not in done.err else "ledger")
    done = made.command()
    assert done.code == 0, done.err
    made.assert_charged()
    made.assert_nothing_repeated()
    for name, entry in plans_of(made.run).items():
        assert ledger_of(made.run).charged_steps(name, entry["attempt"]) == entry["plan"]["steps"]
    return True


@pytest.mark.parametrize(("stage", "number"), [("probe", 17), ("finetune", 25)])
def test_15_the_disk_fills_up(victim: Callable[..., Victim], stage: str, number: int) -> None:
    assert disk_full_at(victim(stage), number)


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["probe", "finetune"])
@pytest.mark.parametrize("offset", range(5))
def test_15_the_disk_fills_up_at_every_moment(victim: Callable[..., Victim], stage: str, offset: int) -> None:
    """Every fifth fsync of the stage, from five beginnings."""
    number = 1 + offset
    while disk_full_at(victim(stage), number):
        number += 15
    assert number > 60


READ_ONLY = """
import builtins, errno, os
def refuse(*arguments, **options): raise OSError(errno.EROFS, "Read-only file system")
real_open, real_os_open = builtins.open, os.open
def open_(file, mode="r", *rest, **options):
    if isinstance(file, (str, os.PathLike)) and set(mode) & set("wax+") and str(file) != os.devnull:
        refuse()
    return real_open(file, mode, *rest, **options)
def os_open(path, flags, *rest, **options):
    if flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT) and str(path) != os.devnull:
        refuse()
    return real_os_open(path, flags, *rest, **options)
builtins.open, os.open, os.replace, os.mkdir, os.unlink = open_, os_open, refuse, refuse, refuse
"""


@pytest.mark.parametrize("command", ["generate", "pretrain", "probe", "finetune", "report", "run", "status"])
def test_15_a_read_only_file_system(dprandp: Dprandp, work: Work, command: str) -> None:
    """Also where root runs the tests, whom permissions do not stop."""
    run = work.runs["finetune"]
    before = state_of(run)
    done = dprandp(command, "--run", run, before=READ_ONLY)
    if command == "status":
        assert done.code == 0, done.err
    else:
        refused(done, 6, "read-only", "choose a folder that can be written")
    assert state_of(run) == before


def test_15_two_processes_on_one_run(victim: Callable[..., Victim]) -> None:
    """Started together: one works, the other is refused, and the budget is charged once."""
    made = victim("probe")
    running = [made.start(pause=0.1) for _ in range(3)]
    ends = sorted((process.end() for process in running), key=lambda done: done.code)
    assert [done.code for done in ends] == [0, 6, 6], [done.err for done in ends]
    for done in ends[1:]:
        refused(done, 6, "another dprandp process (pid")
    assert ledger_of(made.run).charged_steps("probe", 1) == plans_of(made.run)["probe"]["plan"]["steps"]
    made.assert_charged()


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["probe", "finetune"])
def test_15_sigterm_at_any_time(victim: Callable[..., Victim], stage: str) -> None:
    """Before, in and after the training loop: exit 143, nothing torn, no step lost that was taken."""
    begun = time.monotonic()
    first = victim(stage)
    first.assert_finished(first.command(pause=0.02))
    seconds = time.monotonic() - begun
    for part in (0.05, 0.2, 0.35, 0.5, 0.65, 0.8):
        made = victim(stage)
        running = made.start(pause=0.02)
        time.sleep(part * seconds)
        running.signal(signal.SIGTERM)
        done = running.end()
        made.count_updates(done)
        assert done.code in (0, 143), done.err
        assert "Traceback" not in done.err
        assert not list(made.run.rglob("*.partial*"))
        if done.code:
            assert made.assert_finished(made.command())["lost_steps"] == 0


def test_10_a_ledger_in_another_order_is_refused(victim: Callable[..., Victim]) -> None:
    made = victim("finetune")
    path = made.run / "privacy/ledger.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([*lines[:2], lines[3], lines[2], *lines[4:]]))
    before = state_of(made.run)
    for command in (["status", "--run", made.run], made.arguments(), ["report", "--run", made.run]):
        refused(made.dprandp(*command), 4, "Line 3 of the privacy ledger")
    assert state_of(made.run) == before


# ------------------------------------------------------------------------------------------------------------ the clock

# Every look at the clock shows an earlier time than the one before; or always the same.
CLOCK = """
import datetime as module, time
now = [{start}]
def tick():
    now[0] -= {step}
    return now[0]
class Clock(module.datetime):
    @classmethod
    def now(cls, tz=None): return module.datetime.fromtimestamp(tick(), tz)
    @classmethod
    def utcnow(cls): return module.datetime.fromtimestamp(tick(), module.UTC).replace(tzinfo=None)
time.time = tick
import dprandp.runs.directory, dprandp.privacy.ledger
for place in (dprandp.runs.directory, dprandp.privacy.ledger):
    place.datetime = Clock
"""
CLOCKS = {"backwards": (2_000_000_000, 3600), "standing still": (1_000_000_000, 0), "before 1980": (10, 1e-3)}


@pytest.mark.slow
@pytest.mark.parametrize("clock", CLOCKS)
def test_10_no_decision_rests_on_the_clock(victim: Callable[..., Victim], clock: str) -> None:
    """Killed, resumed, made again and killed in its beginning, on a clock that cannot be trusted; then looked at."""
    start, step = CLOCKS[clock]
    before = CLOCK.format(start=start, step=step) + RECORD

    def command(made: Victim, *flags: object, fault: str = ""):
        done = made.dprandp(*made.arguments(*flags), before=before, **made.environment(fault, 0))
        made.count_updates(done)
        return done

    made = victim("probe")
    assert command(made, fault="update-applied:5").code == KILLED
    made.assert_finished(command(made))
    assert command(made, "--overwrite", fault="renamed:2").code == KILLED  # begun again, its plan not yet written
    done = command(made)
    assert done.code == 0, done.err
    assert done.json["lost_steps"] == 0  # it was not taken for the first attempt, whose steps are all charged
    ledger = ledger_of(made.run)
    assert (ledger.charged_steps("probe", 1), ledger.charged_steps("probe", 2)) == (16, 16)
    made.assert_charged()
    for look in (["status", "--json"], ["report"]):
        done = made.dprandp(*look, "--run", made.run, before=CLOCK.format(start=start, step=step))
        assert done.code == 0, done.err


def test_10_no_two_beginnings_share_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also on a clock that stands still or goes back: by its time a beginning knows its plan."""
    days = iter([5, 5, 4, 9, 1, 9])

    class Clock(directory.datetime):
        @classmethod
        def now(cls, tz=None):
            return directory.datetime(2026, 1, next(days), 17, 4, 3, tzinfo=tz)

    monkeypatch.setattr("dprandp.runs.directory.datetime", Clock)
    table, seen = directory.Table(), []
    for _ in range(6):
        table.begin("probe", {}, {})
        seen.append(table.stages["probe"].started)
        path = tmp_path / "run.json"
        path.write_text(table.to_json())
        assert json.loads(path.read_text())["stages"]["probe"]["started"] == seen[-1]
    assert sorted(set(seen)) == seen
    assert {stamp[10:22] for stamp in seen} == {"T00:00:00.00"}  # a day: a time would tell how long tuning took
