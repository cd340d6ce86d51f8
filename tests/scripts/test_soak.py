"""The soak test itself: its sequences find nothing, and its observer finds what is broken on purpose."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import soak

from dprandp.privacy.accounting import GaussianEvent, compose

pytestmark = pytest.mark.slow

Make = Callable[..., soak.Sequence]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> soak.World:
    return soak.World(tmp_path_factory.mktemp("soak"))


@pytest.fixture
def make(world: soak.World, tmp_path: Path) -> Make:
    def sequence(patch: str = "") -> soak.Sequence:
        """A run with its public stages made, whose commands are broken by ``patch``."""
        return soak.Sequence(world, tmp_path / "sequence", random.Random(0), patch=patch)

    return sequence


def probe(made: soak.Sequence, *flags: object, **options: object):
    config = made.world.folder / "small.toml"
    return made.command("probe", "--config", config, "--data", f"npz:{made.data}", "--eps", 4, *flags, **options)


def test_a_sequence(world: soak.World, tmp_path: Path) -> None:
    row = soak.run_sequence(world, tmp_path / "sequence", 7, 1, most=3)
    assert row["problems"] == [], row["history"]
    assert row["commands"] > 0


@pytest.mark.parametrize("index", range(100, 130))
def test_many_sequences(world: soak.World, tmp_path: Path, index: int) -> None:
    row = soak.run_sequence(world, tmp_path / "sequence", 7, index)
    assert row["problems"] == [], row["history"]


# ------------------------------------------------------------------------------------------------ what must be flagged

# From the third charge of a process on nothing is written, and the process believes that it was.
UNCHARGED = """
from dprandp.privacy import ledger
real, count = ledger.Ledger._append, [0]
def append(self, charge, **notes):
    count[0] += isinstance(charge, ledger.Charge)
    if isinstance(charge, ledger.Charge) and count[0] > 2:
        return self._take(charge)
    return real(self, charge, **notes)
ledger.Ledger._append = append
"""

HALF = """
from dataclasses import replace
from dprandp.inspection import overview
real = overview.read_budget
def half(rundir):
    found = real(rundir)
    return found and replace(found, spent=found.spent / 2)
overview.read_budget = half
"""

# Each process draws the same numbers.
REPEATED = """
import numpy
from dprandp.privacy import randomness
generator = numpy.random.default_rng(0)
def words(self, count): return generator.integers(0, 2**64, count, dtype=numpy.uint64)
randomness.SystemRandom.words = words
"""

# A ledger that was cut is taken as it is.
TRUSTING = """
import types
from dprandp.privacy import ledger
real = ledger.Ledger.__init__
class Same:
    def __ne__(self, other): return False
class Seals(dict):
    def get(self, stage): return types.SimpleNamespace(digest=Same())
def init(self, *arguments):
    real(self, *arguments)
    self.seals = Seals()
ledger.Ledger.__init__ = init
ledger.Ledger.includes = lambda self, head: True
"""


def test_steps_that_are_not_charged_are_flagged(make: Make) -> None:
    made = make(UNCHARGED)
    assert probe(made).code == 0
    assert any("status shows ε" in problem for problem in made.observer.problems)
    assert any("5 releases of probe, 2 steps in the ledger" in problem for problem in made.observer.problems)


def test_half_of_epsilon_is_flagged(make: Make) -> None:
    made = make(HALF)
    assert probe(made).code == 0
    assert [problem[:14] for problem in made.observer.problems] == ["status shows ε"]


@pytest.mark.parametrize("patch", [REPEATED, ""])
def test_noise_that_is_used_again_after_a_crash_is_flagged(make: Make, patch: str) -> None:
    made = make(patch)
    assert probe(made, fault="update-applied:3", killed=True).code < 0
    assert made.observer.problems == []
    assert probe(made).code == 0
    assert set(made.observer.problems) == ({"words used twice"} if patch else set())


@pytest.mark.parametrize("patch", [TRUSTING, ""])
def test_a_ledger_that_was_cut_may_not_be_believed(make: Make, patch: str) -> None:
    made = make(patch)
    assert probe(made).code == 0
    assert made.observer.problems == []
    made.observer.untouched = False
    ledger = made.run / "privacy" / "ledger.jsonl"
    ledger.write_bytes(b"".join(ledger.read_bytes().splitlines(keepends=True)[:3]))
    made.look()
    assert any("status shows ε" in problem for problem in made.observer.problems) == bool(patch)


def test_only_a_run_that_was_put_back_whole_is_forgiven(make: Make) -> None:
    made = make()
    assert probe(made, "--share", 0.1).code == 0
    shutil.copytree(made.run, made.base / "copy")
    assert probe(made, "--share", 0.3, "--overwrite").code == 0
    spent = made.observer.truth(1e-5)
    made.observer.untouched = False
    for name in ("privacy", "run.json", "model", "3-probe", ".ledger-head"):  # the run refuses until it cannot know
        assert made.observer.truth(1e-5) == spent
        made.restore(made.base / "copy" / name, made.run / name)
        made.look()
    assert made.observer.truth(1e-5) < spent / 2
    assert made.observer.problems == []


@pytest.mark.parametrize("text", ["Traceback (most recent call last)", "this is a bug in dprandp"])
def test_bugs_are_flagged(tmp_path: Path, text: str) -> None:
    observer = soak.Observer(tmp_path)
    observer.ended("probe", soak.Done(2, "", "error: no such flag"), False)
    assert observer.problems == []
    observer.ended("probe", soak.Done(2, "", text), False)
    observer.ended("probe", soak.Done(1, "", ""), False)
    observer.ended("probe", soak.Done(-9, "", ""), False)
    assert len(observer.problems) == 3


def test_a_finished_stage_that_is_lost_is_flagged(make: Make) -> None:
    made = make()
    assert probe(made).code == 0
    shutil.rmtree(made.run / "2-pretrain")
    made.look()
    assert made.observer.problems == []  # stale, and says why
    shutil.copytree(made.world.folder / "start-patchnet/2-pretrain", made.run / "2-pretrain")
    made.look()
    shown = made.world.dprandp("status", "--run", made.run, "--json").out
    lost = shown.replace('"stage": "pretrain", "state": "done"', '"stage": "pretrain", "state": "missing"')
    assert lost != shown
    made.observer.status(soak.Done(0, lost, ""), ["pretrain"])  # made afresh, as was asked
    assert made.observer.problems == []
    made.observer.status(soak.Done(0, shown, ""), [])
    made.observer.status(soak.Done(0, lost, ""), [])
    assert made.observer.problems == ["stage pretrain was finished and is missing"]


# ---------------------------------------------------------------------------------------------------------- accounting


def test_the_cost_is_a_close_lower_bound() -> None:
    for events in ([(2.0, 0.2, 6)], [(20.0, 1.0, 5), (2.0, 0.3, 3), (1.5, 0.2, 1)]):
        bound = compose([GaussianEvent(*event) for event in events], 1e-5)
        found = soak.cost([{"sigma": s, "rate": q} for s, q, steps in events for _ in range(steps)], 1e-5)
        assert 0.97 * bound.upper < found <= bound.upper * (1 + 1e-9)
    assert soak.cost([{"sigma": 0, "rate": 1.0}], 1e-5) == float("inf")
    assert soak.cost([], 1e-5) == 0
