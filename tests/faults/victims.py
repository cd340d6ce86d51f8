"""A run whose private stage is killed and started again, with a record of everything that its processes drew."""

from __future__ import annotations

import json
import shutil
import signal
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cli_process import Done, Dprandp
from tiny_run import FINETUNE, PROBE, TRAIN, ledger_of, plans_of

from dprandp.config import toml
from dprandp.privacy.accounting import GaussianEvent, compose, merge_events
from dprandp.runs import faults

KILLED = -signal.SIGKILL
STEPS = {"probe": 16, "finetune": 4, "finetune.head": 16}

# Executed in the process before the command: every random word, batch and release goes to a file at once, by a system
# call of its own, so that a kill loses nothing of it. PAUSE slows the steps down for whoever wants to interrupt them.
RECORD = """
import hashlib, json, os, time
from dprandp.privacy import mechanism, randomness

log = os.open(os.environ["SEEN"], os.O_WRONLY | os.O_APPEND | os.O_CREAT)
pause = float(os.environ.get("PAUSE", "0"))

def write(**values):
    os.write(log, (json.dumps(values) + "\\n").encode())

words, draw, release = randomness.SystemRandom.words, randomness.PoissonSampler.draw, mechanism.PrivateStep.release

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

randomness.SystemRandom.words = recorded_words
randomness.PoissonSampler.draw = recorded_draw
mechanism.PrivateStep.release = recorded_release
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

    def charged(self) -> dict[str, int]:
        """Mechanism -> steps in the ledger, of all attempts."""
        if not (self.run / "privacy/ledger.jsonl").exists():
            return dict.fromkeys(STEPS, 0)
        charges = ledger_of(self.run).charges
        return {name: sum(c.steps for c in charges if c.stage == name) for name in STEPS}

    def used(self) -> dict[str, int]:
        """Mechanism -> releases, in all processes."""
        releases = self.seen("release")
        return {name: sum(r["mechanism"] == name for r in releases) for name in STEPS}

    def assert_charged(self) -> None:
        """What was used is in the ledger, and ε of the ledger is not below ε of what was used."""
        charged, used = self.charged(), self.used()
        assert all(used[name] <= charged[name] for name in used if used[name]), (used, charged)
        assert len(self.seen("draw")) <= sum(charged.values())
        truth = merge_events([GaussianEvent(r["sigma"], r["rate"], 1) for r in self.seen("release")])
        if truth:
            assert compose(truth, 1e-5).lower <= ledger_of(self.run).spent(1e-5).upper

    def assert_nothing_repeated(self) -> None:
        words = [w["hash"] for w in self.seen("words")]
        assert len(set(words)) == len(words)
        batches = [tuple(d["indices"]) for d in self.seen("draw") if d["rate"] < 1]
        assert len(set(batches)) == len(batches)

    def assert_finished(self, done: Done) -> dict[str, Any]:
        """The stage ended well after all: plan kept to the letter, every step charged once, lost ones disclosed."""
        assert done.code == 0, done.err
        self.assert_charged()
        self.assert_nothing_repeated()
        result = done.json
        mechanisms = [self.stage] if self.stage == "probe" else ["finetune", "finetune.head"]
        plans, ledger = plans_of(self.run), ledger_of(self.run)
        for name in mechanisms:
            plan, attempt = plans[name]["plan"], plans[name]["attempt"]
            assert ledger.charged_steps(name, attempt) == plan["steps"] == STEPS[name]
            part = result["refit"] if name == "finetune.head" else result
            assert part["lost_steps"] == plan["steps"] - self.updates[name]  # whatever else was charged
        assert result["charged_steps"] == STEPS[self.stage]
        assert result["epsilon"] == ledger.spent(result["delta"]).upper
        assert result["epsilon"] <= (result["epsilon_total"] if self.stage == "finetune" else result["epsilon_target"])
        assert result["private"] is True
        assert (self.run / "model/model.safetensors").exists()
        return result
