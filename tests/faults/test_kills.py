"""kill -9 in every stage: at every hit of every fault point that the stage passes, and at random times.

Public stages and the report end with the bytes of an uninterrupted run (promise 11), private ones with every update
charged and nothing used twice (promise 10).
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from cli_process import Dprandp
from victims import KILLED, Victim, Work

from dprandp.runs import faults

PUBLIC = """
[generate]
process = "dead-leaves"
count = 250
resolution = 32
[pretrain]
{pretrain}
"""
RECIPES = {
    "patchnet": "filters = 16\nlayers = 1\ndictionary_patches = 2000\ndictionary_iterations = 2\n",
    "wrn": 'arch = "wrn-10-1"\nsteps = 9\nbatch_size = 2\nprojection_hidden = 16\nprojection_dim = 4\n'
    "checkpoint_every = 2\n",
}

# (name, command, folder whose bytes count, points, recipe)
STAGES = {
    "generate": (["generate", "--workers", 1], "1-generate", "patchnet"),
    "patchnet": (["pretrain"], "2-pretrain", "patchnet"),
    "wrn": (["pretrain"], "2-pretrain", "wrn"),
    "report": (["report"], "report.html", "patchnet"),
}
POINTS = {
    "generate": ("shard-written", "temp-written", "renamed"),
    "patchnet": ("temp-written", "renamed", "pointer-moved"),
    "wrn": ("temp-written", "renamed", "pointer-moved"),
    "report": ("temp-written", "renamed", "report-written"),
}
FAST = {("report", "report-written")}


class Bystander:
    """A stage that costs no privacy: the run it starts from, and what an uninterrupted one leaves."""

    def __init__(self, dprandp: Dprandp, work: Work, base: Path, name: str) -> None:
        command, self.place, recipe = STAGES[name]
        self.dprandp, self.base, self.count = dprandp, base, 0
        settings = base / "settings.toml"
        settings.write_text(PUBLIC.format(pretrain=RECIPES[recipe]))
        self.flags = [] if name == "report" else ["--config", settings]
        self.command = command
        self.start = base / "start" / "run"
        if name == "report":
            shutil.copytree(work.runs["finetune"], self.start)
        elif name != "generate":
            self.must("generate", "--workers", 1, "--config", settings, "--run", self.start)
        else:
            self.start.mkdir(parents=True)
        run = self.fresh()
        begun = time.monotonic()
        self.must(*self.arguments(run))
        self.seconds = time.monotonic() - begun
        self.expected = self.bytes_of(run)

    def must(self, *arguments: object) -> None:
        done = self.dprandp(*arguments)
        assert done.code == 0, done.err

    def fresh(self) -> Path:
        """A new copy of the run before the stage; always of the same name, which the report shows."""
        self.count += 1
        return Path(shutil.copytree(self.start, self.base / str(self.count) / "run"))

    def arguments(self, run: Path) -> list[object]:
        return [*self.command, *self.flags, "--run", run]

    def bytes_of(self, run: Path) -> dict[str, bytes]:
        place = run / self.place
        files = [place] if place.is_file() else [path for path in place.rglob("*") if path.is_file()]
        return {str(path.relative_to(run)): path.read_bytes() for path in files}

    def assert_as_uninterrupted(self, run: Path) -> None:
        """The same command once more, and nothing tells that there was a kill."""
        self.must(*self.arguments(run))
        assert self.bytes_of(run) == self.expected
        assert not list(run.rglob("*.partial*"))


@pytest.fixture
def bystander(dprandp: Dprandp, work: Work, tmp_path: Path) -> Callable[[str], Bystander]:
    return lambda name: Bystander(dprandp, work, tmp_path, name)


@pytest.mark.parametrize(
    ("name", "point"),
    [
        pytest.param(name, point, marks=() if (name, point) in FAST else pytest.mark.slow)
        for name, points in POINTS.items()
        for point in points
    ],
)
def test_11_public_stage_killed_at_every_hit(
    bystander: Callable[[str], Bystander], name: str, point: str, record_property
) -> None:
    made, hit = bystander(name), 1
    while True:
        run = made.fresh()
        done = made.dprandp(*made.arguments(run), **{faults.VARIABLE: f"{point}:{hit}"})
        if done.code == 0:
            break
        assert done.code == KILLED, done.err
        made.assert_as_uninterrupted(run)
        hit += 1
    assert hit > 1, f"{name} does not pass {point}"
    record_property("kills survived", hit - 1)


PRIVATE_POINTS = ("temp-written", "renamed", "pointer-moved", "ledger-appended", "ledger-fsynced", "update-applied")


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["probe", "finetune"])
@pytest.mark.parametrize("name", PRIVATE_POINTS)
def test_10_killed_at_every_hit_of_every_point(
    victim: Callable[..., Victim], stage: str, name: str, record_property
) -> None:
    hit = 1
    while True:
        made = victim(stage)
        done = made.command(fault=f"{name}:{hit}")
        if done.code == 0:
            break
        assert done.code == KILLED
        made.assert_charged()
        made.assert_finished(made.command())
        shutil.rmtree(made.run)
        hit += 1
    assert hit > 4
    record_property("kills survived", hit - 1)


def killed_at_random(running, seconds: float, dice: random.Random) -> int:
    """Wait a random part of the time that the command needs, kill it, and return how it ended."""
    time.sleep(dice.uniform(0.02, seconds))
    running.signal(signal.SIGKILL)
    return running.end().code


@pytest.mark.slow
@pytest.mark.parametrize(("name", "kills"), [("generate", 10), ("patchnet", 5), ("wrn", 10), ("report", 5)])
def test_11_public_stage_killed_at_random_times(
    bystander: Callable[[str], Bystander], name: str, kills: int, record_property
) -> None:
    """One run is killed up to three times before it may finish: a kill in the repair of a kill, too."""
    dice, made, survived = random.Random(os.urandom(8)), bystander(name), 0
    while survived < kills:
        run = made.fresh()
        for _ in range(3):
            survived += killed_at_random(made.dprandp.start(*made.arguments(run)), made.seconds, dice) == KILLED
        made.assert_as_uninterrupted(run)
    record_property("kills survived", survived)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stage", "settings", "kills"),
    [("probe", "full.toml", 20), ("finetune", "full.toml", 20), ("probe", "poisson.toml", 4),
     ("finetune", "poisson.toml", 4)],
)  # fmt: skip
def test_10_killed_at_random_times(
    victim: Callable[..., Victim], stage: str, settings: str, kills: int, record_property
) -> None:
    """One run is killed up to four times before it may finish; with Poisson batches all draws are compared."""
    dice, survived = random.Random(os.urandom(8)), 0
    begun = time.monotonic()
    first = victim(stage, settings)
    first.assert_finished(first.command(pause=0.05))
    seconds = time.monotonic() - begun
    while survived < kills:
        made = victim(stage, settings)
        for _ in range(4):
            running = made.start(pause=0.05)
            time.sleep(dice.uniform(0.05, seconds))
            running.signal(signal.SIGKILL)
            done = running.end()
            made.count_updates(done)
            made.assert_charged()
            if done.code == 0:
                break
            assert done.code == KILLED
            survived += 1
        made.assert_finished(made.command())
    record_property("kills survived", survived)
