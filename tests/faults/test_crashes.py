"""Promises 10 and 11: kill -9 anywhere in a private stage; whatever was used is paid for, and nothing is used twice."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from cli_process import Done, Dprandp, refused
from safetensors.torch import load_file
from tiny_run import FINETUNE, PROBE, TRAIN, ledger_of, make_public, plans_of, run_probe, write_blobs

from dprandp import faults, toml
from dprandp.privacy.accounting import GaussianEvent, compose, merge_events

KILLED = -signal.SIGKILL
STEPS = {"probe": 16, "finetune": 4, "finetune.head": 16}

# Executed in the process before the command: every random word, batch and release goes to a file at once, by a system
# call of its own, so that a kill loses nothing of it. PAUSE slows the steps down for whoever wants to interrupt them.
RECORD = """
import hashlib, json, os, time
from dprandp.privacy import noise, plan, sampling

log = os.open(os.environ["SEEN"], os.O_WRONLY | os.O_APPEND | os.O_CREAT)
pause = float(os.environ.get("PAUSE", "0"))

def write(**values):
    os.write(log, (json.dumps(values) + "\\n").encode())

words, draw, release = noise.SystemRandom._words, sampling.PoissonSampler.draw, plan.PrivateStep.release

def recorded_words(self, count):
    made = words(self, count)
    write(kind="words", count=count, hash=hashlib.sha256(made.tobytes()).hexdigest())
    return made

def recorded_draw(self):
    made = draw(self)
    write(kind="draw", rate=self.sample_rate, indices=made.tolist())
    return made

def recorded_release(self, sums):
    time.sleep(pause)
    write(kind="release", mechanism=self._plan.stage, step=self.number, sigma=self._plan.noise_multiplier,
          rate=self._plan.sample_rate)
    made = release(self, sums)
    return made

noise.SystemRandom._words = recorded_words
sampling.PoissonSampler.draw = recorded_draw
plan.PrivateStep.release = recorded_release
"""


@dataclass(frozen=True)
class Work:
    """Where the crash tests work: configuration files, data, runs to copy."""

    folder: Path
    runs: dict[str, Path]
    data: str


def settings(poisson: bool) -> str:
    """TOML of both stages; full batches are exact and quick to account, Poisson batches show what was drawn."""
    probe = PROBE | {"steps": STEPS["probe"], "batch_size": 30 if poisson else TRAIN}
    tune = FINETUNE | {
        "steps": STEPS["finetune"], "refit_steps": STEPS["finetune.head"], "batch_size": 24 if poisson else TRAIN,
    }  # fmt: skip
    return "".join(f"[{name}]\n{toml.dumps(table)}\n" for name, table in (("probe", probe), ("finetune", tune)))


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Work:
    folder = tmp_path_factory.mktemp("crashes")
    data = write_blobs(folder / "blobs.npz")
    (folder / "full.toml").write_text(settings(False))
    (folder / "poisson.toml").write_text(settings(True))
    make_public(folder / "public")
    shutil.copytree(folder / "public", folder / "probed")
    run_probe(folder / "probed", data)
    return Work(folder, {"probe": folder / "public", "finetune": folder / "probed"}, data)


@pytest.fixture(scope="module")
def dprandp(tmp_path_factory: pytest.TempPathFactory, work: Work) -> Iterator[Dprandp]:
    server = Dprandp(tmp_path_factory.mktemp("output"), work.folder)
    yield server
    server.close()


class Victim:
    """A copy of a run whose private stage is killed and started again; remembers everything that its processes drew."""

    def __init__(self, dprandp: Dprandp, work: Work, base: Path, stage: str, settings: str = "full.toml") -> None:
        self.dprandp, self.work, self.stage, self.settings = dprandp, work, stage, settings
        self.run = Path(shutil.copytree(work.runs[stage], base / "run"))
        self.log = base / "seen.jsonl"
        self.log.touch()
        self.updates = dict.fromkeys(STEPS, 0)
        self._read = 0

    def arguments(self, *flags: object) -> list[object]:
        return [self.stage, "--run", self.run, "--config", self.settings, "--data", self.work.data, "--json", *flags]

    def command(self, *flags: object, fault: str = "", pause: float = 0) -> Done:
        done = self.dprandp(*self.arguments(*flags), before=RECORD, **self.environment(fault, pause))
        self.count_updates(done)
        return done

    def count_updates(self, done: Done) -> None:
        """How many updates the parameters of each mechanism hold, from what was seen and from what LATEST names."""
        releases, folder = self.seen("release"), self.run / "4-finetune"
        folders = {"probe": self.run / "3-probe", "finetune": folder, "finetune.head": folder / "refit"}
        for name in STEPS:
            mine = [r["step"] for r in releases[self._read :] if r["mechanism"] == name]
            latest = (folders[name] / "LATEST").read_text().strip() if (folders[name] / "LATEST").exists() else "step-0"
            if done.code != 0 and latest.startswith("step-"):
                self.updates[name] = int(latest.removeprefix("step-"))
            elif mine:  # the last step is saved, or the whole parameters were
                self.updates[name] = mine[-1] + 1
        self._read = len(releases)

    def start(self, *flags: object, fault: str = "", pause: float = 0):
        return self.dprandp.start(*self.arguments(*flags), before=RECORD, **self.environment(fault, pause))

    def environment(self, fault: str, pause: float) -> dict[str, str]:
        return {"SEEN": str(self.log), "PAUSE": str(pause), faults.VARIABLE: fault}

    def seen(self, kind: str) -> list[dict[str, Any]]:
        lines = [json.loads(line) for line in self.log.read_text(encoding="utf-8").splitlines()]
        return [line for line in lines if line["kind"] == kind]

    def paid(self) -> dict[str, int]:
        """Mechanism -> steps in the ledger, of all attempts."""
        if not (self.run / "privacy/ledger.jsonl").exists():
            return dict.fromkeys(STEPS, 0)
        charges = ledger_of(self.run).charges
        return {name: sum(c.steps for c in charges if c.stage == name) for name in STEPS}

    def used(self) -> dict[str, int]:
        """Mechanism -> releases, in all processes."""
        releases = self.seen("release")
        return {name: sum(r["mechanism"] == name for r in releases) for name in STEPS}

    def assert_paid_for(self) -> None:
        """What was used is in the ledger, and ε of the ledger is not below ε of what was used."""
        paid, used = self.paid(), self.used()
        assert all(used[name] <= paid[name] for name in used if used[name]), (used, paid)
        assert len(self.seen("draw")) <= sum(paid.values())
        truth = merge_events([GaussianEvent(r["sigma"], r["rate"], 1) for r in self.seen("release")])
        if truth:
            assert compose(truth, 1e-5).lower <= ledger_of(self.run).spent(1e-5).upper

    def assert_nothing_repeated(self) -> None:
        words = [w["hash"] for w in self.seen("words")]
        assert len(set(words)) == len(words)
        batches = [tuple(d["indices"]) for d in self.seen("draw") if d["rate"] < 1]
        assert len(set(batches)) == len(batches)

    def assert_finished(self, done: Done) -> dict[str, Any]:
        """The stage ended well after all: plan kept to the letter, every step paid once, lost ones disclosed."""
        assert done.code == 0, done.err
        self.assert_paid_for()
        self.assert_nothing_repeated()
        result = done.json
        mechanisms = [self.stage] if self.stage == "probe" else ["finetune", "finetune.head"]
        plans, ledger = plans_of(self.run), ledger_of(self.run)
        for name in mechanisms:
            plan, attempt = plans[name]["plan"], plans[name]["attempt"]
            assert ledger.charged_steps(name, attempt) == plan["steps"] == STEPS[name]
            part = result["refit"] if name == "finetune.head" else result
            assert part["lost_steps"] == plan["steps"] - self.updates[name]  # whatever else was paid for
        assert result["charged_steps"] == STEPS[self.stage]
        assert result["epsilon"] == ledger.spent(result["delta"]).upper
        assert result["epsilon"] <= (result["epsilon_total"] if self.stage == "finetune" else result["epsilon_target"])
        assert result["private"] is True
        assert (self.run / "model/model.safetensors").exists()
        return result


@pytest.fixture
def victim(dprandp: Dprandp, work: Work, tmp_path: Path) -> Callable[..., Victim]:
    def make(stage: str, settings: str = "full.toml") -> Victim:
        base = tmp_path / f"{len(list(tmp_path.iterdir()))}"
        base.mkdir()
        return Victim(dprandp, work, base, stage, settings)

    return make


def kill_and_resume(made: Victim, fault: str) -> dict[str, Any]:
    done = made.command(fault=fault)
    assert done.code == KILLED, f"{fault}: the fault point was not passed so often\n{done.err}"
    made.assert_paid_for()
    return made.assert_finished(made.command())


# Files are written in this order: hashes of the inputs, run.json, configuration, plan, (whitener), (features), metrics,
# then three a checkpoint; so 4 is the plan and what follows 14 lies among the checkpoints of the probe.
PROBE_FAULTS = [
    "ledger-appended:7", "ledger-fsynced:16", "update-applied:1", "update-applied:16", "temp-written:4", "renamed:19",
    "pointer-moved:8",
]  # fmt: skip
FINETUNE_FAULTS = [
    "ledger-appended:2", "ledger-fsynced:9", "update-applied:4", "temp-written:7", "renamed:14", "pointer-moved:3",
]  # fmt: skip


@pytest.mark.parametrize("fault", PROBE_FAULTS)
def test_10_probe_killed(victim: Callable[..., Victim], fault: str) -> None:
    kill_and_resume(victim("probe"), fault)


@pytest.mark.parametrize("fault", FINETUNE_FAULTS)
def test_10_finetune_killed(victim: Callable[..., Victim], fault: str) -> None:
    kill_and_resume(victim("finetune"), fault)


@pytest.mark.parametrize(("stage", "fault"), [("probe", "ledger-fsynced:6"), ("finetune", "update-applied:3")])
def test_10_no_batch_is_drawn_again(victim: Callable[..., Victim], stage: str, fault: str) -> None:
    made = victim(stage, "poisson.toml")
    kill_and_resume(made, fault)
    batches = [draw for draw in made.seen("draw") if draw["rate"] < 1]
    # one paid step was never used: either its batch was not drawn (killed before) or it was drawn and not saved
    assert len(batches) == STEPS[stage] - fault.startswith("ledger")
    assert len({tuple(draw["indices"]) for draw in batches}) == len(batches) > 3


def test_10_lost_steps_are_counted_and_disclosed(victim: Callable[..., Victim]) -> None:
    """Checkpoints are at every second step of sixteen: killed in the middle of step 8 (the eighth), 1 or 2 are lost."""
    made = victim("probe")
    assert made.command(fault="update-applied:8").code == KILLED
    assert (made.paid()["probe"], made.used()["probe"]) == (8, 8)
    result = made.assert_finished(made.command())
    assert (result["charged_steps"], result["lost_steps"]) == (16, 2)  # steps 7 and 8; the checkpoint holds 6
    assert made.used()["probe"] == 16
    card = (made.run / "model/MODEL_CARD.md").read_text(encoding="utf-8")
    assert "2 of these were lost in interruptions" in card


def test_10_killed_again_and_again(victim: Callable[..., Victim]) -> None:
    """Even a run that dies at every third step ends, with the ε it promised and fewer updates."""
    made = victim("probe")
    deaths = 0
    while (done := made.command(fault="update-applied:3")).code == KILLED:
        made.assert_paid_for()
        deaths += 1
        assert deaths < 10
    result = made.assert_finished(done)
    assert deaths == 5  # of three paid steps each; the sixteenth is made alone
    assert result["lost_steps"] == 5
    assert result["epsilon"] <= 1.2 + 1e-9


def test_10_a_ledger_line_torn_by_a_power_cut(victim: Callable[..., Victim]) -> None:
    """A line that was not whole on disk belongs to a charge that never returned; it is repaired, and aloud."""
    made = victim("probe")
    assert made.command(fault="ledger-fsynced:9").code == KILLED
    ledger = made.run / "privacy/ledger.jsonl"
    whole = ledger.read_bytes()
    ledger.write_bytes(whole[:-25])
    done = made.command()
    assert "cut off while it was written" in done.err
    made.assert_finished(done)


def test_10_a_ledger_older_than_its_checkpoint_is_refused(victim: Callable[..., Victim]) -> None:
    """Restored from a copy, the ledger would forget what was paid since."""
    made = victim("probe")
    assert made.command(fault="update-applied:2").code == KILLED
    old = (made.run / "privacy/ledger.jsonl").read_bytes()
    assert made.command(fault="update-applied:9").code == KILLED
    (made.run / "privacy/ledger.jsonl").write_bytes(old)
    refused(made.command(), 4, "were paid")


@pytest.mark.parametrize("stage", ["probe", "finetune"])
def test_11_changed_settings_or_data_are_refused(victim: Callable[..., Victim], stage: str, tmp_path: Path) -> None:
    made = victim(stage)
    assert made.command(fault="update-applied:3").code == KILLED
    before, used = made.paid(), made.used()
    refused(made.command("--steps", 17), 2, "steps was", "--resume", "--overwrite")
    refused(made.command("--clip", 2), 2, "clip_norm was 1.0, is now 2.0")
    refused(made.command("--eps", 5), 5, "fixed at ε = 4")
    original = Path(made.work.data.removeprefix("npz:"))
    kept = original.read_bytes()
    try:
        write_blobs(original, seed=9)
        refused(made.command(), 2, "other inputs: train changed")
        refused(made.command("--resume"), 2, "other inputs: train changed")
    finally:
        original.write_bytes(kept)
    assert (made.paid(), made.used()) == (before, used)
    made.assert_finished(made.command("--resume", "--steps", 17))  # the recorded settings, not the new ones


@pytest.mark.parametrize("stage", ["probe", "finetune"])
def test_11_sigterm_then_the_same_command(victim: Callable[..., Victim], stage: str) -> None:
    made = victim(stage)
    running = made.start(pause=0.05)
    running.wait_until(lambda: len(made.seen("release")) >= 3)
    running.signal(signal.SIGTERM)
    done = running.end()
    made.count_updates(done)
    assert done.code == 143, done.err
    made.assert_paid_for()
    assert sum(made.used().values()) < sum(STEPS[name] for name in STEPS if name.startswith(stage))
    result = made.assert_finished(made.command())
    assert result["lost_steps"] == 0  # saved before it stopped


def test_10_overwrite_after_a_kill_pays_again(victim: Callable[..., Victim]) -> None:
    """Started afresh, the stage is a new attempt on top of what was paid; the old steps stay paid."""
    made = victim("probe")
    assert made.command(fault="update-applied:5").code == KILLED
    done = made.command("--overwrite", "--share", 0.2)
    assert done.code == 0, done.err
    made.assert_paid_for()
    made.assert_nothing_repeated()
    ledger, result = ledger_of(made.run), done.json
    assert (ledger.charged_steps("probe", 1), ledger.charged_steps("probe", 2)) == (5, 16)
    assert result["epsilon"] == ledger.spent(result["delta"]).upper > ledger.spent(1e-5).lower * 0.99
    assert result["epsilon"] > compose(ledger.events_for("probe", 2), result["delta"]).upper
    assert result["lost_steps"] == 0


@pytest.mark.parametrize("hit", [1, 2, 3])
def test_10_an_overwrite_killed_before_its_plan_is_fixed(victim: Callable[..., Victim], hit: int) -> None:
    """Then the old plan, spent to the last step, must not be taken for the new attempt's: it would train nothing."""
    made = victim("probe")
    assert made.command().code == 0
    assert made.command("--overwrite", fault=f"renamed:{hit}").code == KILLED
    done = made.command("--overwrite") if hit == 1 else made.command()
    assert done.code == 0, done.err
    made.assert_paid_for()
    assert done.json["lost_steps"] == 0
    assert bool(load_file(made.run / "model/model.safetensors")["head"].any())


def test_10_a_plan_that_was_not_fixed_is_not_mixed_with_other_settings(victim: Callable[..., Victim]) -> None:
    """Killed between run.json and plan.json, resumed with --resume and another clip norm: noise has to fit the clip."""
    made = victim("finetune")
    assert made.command("--clip", 2, fault="renamed:3").code == KILLED  # run.json and config.toml say 2
    assert "finetune" not in plans_of(made.run)
    clips = "from dprandp.stages import finetune\nhonest = finetune.sum_of_clipped\n"
    clips += "def recorded(rows, parameters, clip_norm):\n"
    clips += "    write(kind='clip', clip_norm=clip_norm)\n    return honest(rows, parameters, clip_norm)\n"
    clips += "finetune.sum_of_clipped = recorded\n"
    done = made.dprandp(*made.arguments("--resume", "--clip", 1), before=RECORD + clips, **made.environment("", 0))
    assert done.code == 0, done.err
    used = {line["clip_norm"] for line in made.seen("clip")}
    assert used == {plans_of(made.run)["finetune"]["plan"]["clip_norm"]}


# ---------------------------------------------------------------------------------------------------------- slow ones


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["probe", "finetune"])
@pytest.mark.parametrize("name", ["temp-written", "renamed", "pointer-moved", "ledger-appended", "update-applied"])
def test_10_killed_at_every_hit_of_every_point(victim: Callable[..., Victim], stage: str, name: str) -> None:
    hit = 1
    while True:
        made = victim(stage)
        done = made.command(fault=f"{name}:{hit}")
        if done.code == 0:
            break
        assert done.code == KILLED
        made.assert_paid_for()
        done = made.command()
        made.assert_finished(done)
        hit += 1
    assert hit > 4


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["probe", "finetune"])
def test_10_killed_at_random_times(victim: Callable[..., Victim], stage: str) -> None:
    """Each run is killed at random moments until it gets through; Poisson batches, all draws compared."""
    dice = random.Random(os.urandom(8))
    for _ in range(8):
        made = victim(stage, "poisson.toml")
        for _ in range(4):
            running = made.start(pause=0.02)
            time.sleep(dice.uniform(0.2, 4.0))
            running.signal(signal.SIGKILL)
            done = running.end()
            made.count_updates(done)
            if done.code == 0:
                break
            made.assert_paid_for()
        made.assert_finished(made.command())
