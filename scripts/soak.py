"""A soak test of the privacy bookkeeping: random commands and accidents, and an observer who keeps books of his own.

A *sequence* is 4 to 12 actions on one tiny run directory, drawn at random: commands with legal and illegal flags, also
killed, interrupted, on a full disk, with a wrong clock or two at once; and files that are edited, cut, deleted, swapped
or put back from an old copy, data that move or become others. A recorder inside each command's process writes down
every noisy update that it released, every batch and every random word, and every reading of training data. After each
action the observer looks at the run and claims:

a. Whatever ε the program shows (``status``, results, report, model card, ``verify``, an export), or else it refuses: it
   is not below what the recorded releases cost. That cost is computed here, from σ and q alone: exactly for full
   batches, by an optimistic privacy loss distribution of dp-accounting for sampled ones. A selection among private
   trials counts as one trial (what its best-of-many costs more is tested elsewhere).
b. A crash loses nothing that was finished: as long as no file was touched by hand, ``status`` answers, and a finished
   stage is still finished, or stale with a reason.
c. No traceback, no exit code but those of ``dprandp/errors.py``; 1 for ``audit`` alone.
d. The ε that was spent is not above the budget, and never falls from one look to the next.
e. No random words and no batch are used twice; and all releases of a run are about the same training data.

What is forgiven are the limits that ``dprandp/runs/ledger.py`` and docs/privacy.md name, and these alone: lines of the
ledger that are gone while neither ``run.json``, nor ``.ledger-head``, nor the released model, nor the folder of a
private stage, as they are now, knows of them. That is so where
(1) the run was put back to an earlier state, or (2) the lines came after the last checkpoint of a stage that was
killed. Releases that the lost lines had paid for are struck from the observer's books.

    python scripts/soak.py --count 100 --log soak.jsonl      a row for each sequence; goes on where it was stopped
    python scripts/soak.py --start 17 --count 1 --seed 3     one sequence again (its accidents' timing may differ)

Exit code 1 where a claim failed; the run in question is kept beside the log.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import re
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from dp_accounting.pld import privacy_loss_distribution as pld
from scipy.optimize import brentq
from scipy.special import log_ndtr

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT / "tests" / "cli"))

from cli_process import Done, Dprandp, arrays  # noqa: E402

from dprandp.runs import faults  # noqa: E402
from dprandp.runs.directory import PRIVATE_STAGES, STAGES  # noqa: E402

CODES = {0, 2, 3, 4, 5, 6, 130, 143}
TOLERANCE = 1e-6
TRAIN = 60
SETTINGS = """
[generate]
process = "dead-leaves"
count = 30
resolution = 32
[pretrain]
filters = 16
dictionary_patches = 1000
dictionary_iterations = 1
steps = 2
batch_size = 8
[continue]
steps = 4
switch = "2"
check_every = 1
batch_size = 12
public_batch_size = 8
instances = 8
checkpoint_every = 1
[probe]
dims = 16
statistics_images = 20
statistics_views = 2
steps = 5
[finetune]
steps = 3
refit_steps = 4
batch_size = 12
checkpoint_every = 2
"""

# Executed in the process before the command. Every event goes to a file at once, by a system call of its own.
RECORD = r"""
import hashlib, json, os
from dprandp.data import base
from dprandp.privacy import mechanism, randomness, selection

log = os.open(os.environ["SEEN"], os.O_WRONLY | os.O_APPEND | os.O_CREAT)
reading = [None]

def write(**values):
    os.write(log, (json.dumps(values) + "\n").encode())

def line():
    # the hash of the ledger's last whole line: what has been paid by now
    try:
        with open(os.environ["LEDGER"], "rb") as file:
            lines = file.read().split(b"\n")[:-1]
        return json.loads(lines[-1])["hash"] if lines else None
    except (OSError, ValueError):
        return None

words, draw, release = randomness.SystemRandom.words, randomness.PoissonSampler.draw, mechanism.PrivateStep.release
begin_trial, train = selection.Trial.__init__, base.Dataset.train

def recorded_words(self, count):
    made = words(self, count)
    write(kind="words", hash=hashlib.sha256(made.tobytes()).hexdigest())
    return made

def recorded_draw(self):
    made = draw(self)
    write(kind="draw", rate=self.sample_rate, size=len(made), hash=hashlib.sha256(made.tobytes()).hexdigest())
    return made

def recorded_release(self, sums):
    plan = self._plan
    write(kind="release", stage=plan.stage, sigma=plan.noise_multiplier, rate=plan.sample_rate, line=line(),
          data=reading[0])
    return release(self, sums)

def recorded_trial(self, plan, random):
    write(kind="trial", stage="tune", sigma=1 / plan.mu, rate=1.0, line=line(), data=reading[0])
    begin_trial(self, plan, random)

def recorded_train(self):
    split = train(self)
    reading[0] = hashlib.sha256(split.images.tobytes() + split.labels.tobytes()).hexdigest()
    return split

randomness.SystemRandom.words, randomness.PoissonSampler.draw = recorded_words, recorded_draw
mechanism.PrivateStep.release, selection.Trial.__init__ = recorded_release, recorded_trial
base.Dataset.train = recorded_train
write(kind="start")
"""

# From its n-th fsync on the disk is full.
FULL = """
import errno, os
real, count = os.fsync, [0]
def fsync(descriptor):
    count[0] += 1
    if count[0] >= {number}:
        raise OSError(errno.ENOSPC, "No space left on device")
    real(descriptor)
os.fsync = fsync
"""

# Each look at the clock shows an earlier time than the one before.
CLOCK = """
import datetime as module, time
now = [{start}]
def tick():
    now[0] -= {step}
    return now[0]
class Clock(module.datetime):
    @classmethod
    def now(cls, tz=None): return module.datetime.fromtimestamp(tick(), tz)
time.time = tick
import dprandp.runs.directory, dprandp.privacy.ledger
for place in (dprandp.runs.directory, dprandp.privacy.ledger):
    place.datetime = Clock
"""


# ------------------------------------------------------------------------------------------ what releases cost at least


def cost(releases: Iterable[dict[str, Any]], delta: float) -> float:
    """A lower estimate of ε of these releases together at δ; infinite where one had no noise."""
    counts = Counter((each["sigma"], each["rate"]) for each in releases)
    return _cost(tuple(sorted(counts.items())), delta)


@cache
def _cost(counts: tuple[tuple[tuple[float, float], int], ...], delta: float) -> float:
    if not counts:
        return 0.0
    if any(sigma == 0 for (sigma, _), _ in counts):
        return math.inf
    mu = math.sqrt(sum(number / sigma**2 for (sigma, rate), number in counts if rate == 1))
    sampled = [(sigma, rate, number) for (sigma, rate), number in counts if rate < 1]
    if not sampled:
        return _gaussian_epsilon(mu, delta)
    parts = [_loss(sigma, rate).self_compose(number) for sigma, rate, number in sampled]
    parts += [_loss(1 / mu, 1.0)] if mu else []
    total = parts[0]
    for part in parts[1:]:
        total = total.compose(part)
    return float(total.get_epsilon_for_delta(delta))


@cache
def _loss(sigma: float, rate: float) -> Any:
    return pld.from_gaussian_mechanism(
        sigma, pessimistic_estimate=False, value_discretization_interval=2e-3, sampling_prob=rate,
        use_connect_dots=False,
    )  # fmt: skip


def _gaussian_epsilon(mu: float, delta: float) -> float:
    """ε of a Gaussian mechanism (Balle & Wang 2018, theorem 8)."""

    def excess(epsilon: float) -> float:
        first, second = log_ndtr(mu / 2 - epsilon / mu), epsilon + log_ndtr(-mu / 2 - epsilon / mu)
        return math.exp(first) - math.exp(second) - delta

    return 0.0 if excess(0.0) <= 0 else float(brentq(excess, 0.0, mu**2 / 2 + 40 * mu, xtol=1e-10))


# --------------------------------------------------------------------------------------------------------- the observer


class Observer:
    """Keeps the books of one run directory, from what its processes did and from what is shown; see the top."""

    def __init__(self, run: Path) -> None:
        self.run = run
        self.problems: list[str] = []
        self.releases: list[dict[str, Any]] = []
        self.untouched = True  # no file was changed by hand
        self._seen: set[str] = set()
        self._known: set[str] = set()  # hashes of ledger lines
        self._floor = 0.0
        self._finished: set[str] = set()

    def flag(self, text: str) -> None:
        self.problems.append(text)

    def lines(self) -> list[dict[str, Any]]:
        """The whole lines of the ledger as it is now; none where it cannot be read."""
        try:
            content = (self.run / "privacy" / "ledger.jsonl").read_bytes()
            return [json.loads(line) for line in content.split(b"\n")[:-1]]
        except (OSError, ValueError):
            return []

    def take(self, name: str, file: Path) -> list[dict[str, Any]]:
        """Enter into the books what a command's process recorded; returns its releases."""
        whole = file.read_bytes().split(b"\n")[:-1] if file.exists() else []  # a limit on files cuts this one, too
        events = [json.loads(line) for line in whole]
        if name in ("status", "audit"):  # they try the mechanism on made-up data, with repeated noise
            return []
        for event in events:
            small = event["kind"] == "draw" and (event["rate"] == 1 or event["size"] < 4)  # may well come twice
            if event["kind"] in ("words", "draw") and not small:
                if event["hash"] in self._seen:
                    self.flag(f"{event['kind']} used twice")
                self._seen.add(event["hash"])
        made = [event for event in events if event["kind"] in ("release", "trial")]
        trials = {event["line"]: event for event in made if event["kind"] == "trial"}  # a selection counts once
        made = [event for event in made if event["kind"] == "release"] + list(trials.values())
        self.releases += made
        self.settle()
        if len({event["data"] for event in self.releases}) > 1:
            self.flag("the run released updates about different training data")
        return made

    def settle(self) -> None:
        """Strike out what the documented limits let the run forget."""
        lines = self.lines()
        present = {line["hash"] for line in lines if isinstance(line.get("hash"), str)}
        gone = self._known - present
        if not gone:
            self._known |= present
            return
        try:
            head = json.loads((self.run / "run.json").read_bytes())["ledger_head"]
        except FileNotFoundError:
            head = None
        except (ValueError, KeyError, TypeError, OSError):
            return
        spent = any(line.get("kind") in ("charge", "tuning") for line in lines)
        try:
            model = json.loads((self.run / "model" / "config.json").read_bytes())["result"]["ledger_head"]
        except (ValueError, KeyError, TypeError, OSError):
            model = None
        notes = [note.read_text(errors="replace").strip() for note in self.run.glob("**/*ledger-head")]
        if any(each not in present for each in (model, *notes) if each is not None):
            return
        stages = json.loads((self.run / "run.json").read_bytes())["stages"] if (self.run / "run.json").is_file() else {}
        if any(any((self.run / folder).glob("*")) for stage, folder in STAGES.items()
               if stage in PRIVATE_STAGES and stage not in stages):  # fmt: skip
            return
        if head in present or (head is None and not spent):
            self.releases = [event for event in self.releases if event["line"] not in gone]
            self._known, self._floor = present, 0.0

    def truth(self, delta: float, head: str | None = None) -> float:
        """What the run's releases cost by now, or up to this line of its ledger."""
        releases = self.releases
        if head is not None:
            place = {line["hash"]: number for number, line in enumerate(self.lines())}
            releases = [e for e in releases if place.get(e["line"], math.inf) <= place.get(head, math.inf)]
        return cost(releases, delta)

    def shown(self, where: str, epsilon: Any, delta: float, head: str | None = None) -> None:
        """Claim a, of one number that the program showed."""
        truth = self.truth(delta, head)
        if not float(epsilon) >= truth * (1 - TOLERANCE) - TOLERANCE:
            self.flag(f"{where} shows ε = {epsilon}, and at least {truth:.6g} was spent")

    def ended(self, name: str, done: Done, killed: bool) -> None:
        """Claim c."""
        allowed = CODES | ({1} if name == "audit" else set()) | ({-signal.SIGKILL} if killed else set())
        if done.code not in allowed or "Traceback" in done.err or "bug in dprandp" in done.err:
            self.flag(f"{name} ended with {done.code}: {done.err[-2000:]}")

    def status(self, done: Done, redone: Iterable[str]) -> None:
        """Claims a, b and d, of an answer of ``status``; ``redone`` are stages that may have been begun afresh."""
        self.settle()
        if done.code != 0:
            if self.untouched:
                self.flag(f"status refuses although no file was touched: {done.err[-600:]}")
            return
        table = json.loads(done.out)
        states = {row["stage"]: row for row in table["stages"]}
        if self.untouched:
            for stage in self._finished - set(redone):
                row = states[stage]
                if row["state"] != "done" and not (row["state"] == "stale" and row["reasons"]):
                    self.flag(f"stage {stage} was finished and is {row['state']}")
        self._finished = {stage for stage, row in states.items() if row["state"] == "done"}
        for stage, row in states.items():
            result = row["result"] or {}
            if "epsilon" in result:
                self.shown(f"the result of {stage}", result["epsilon"], result["delta"], result["ledger_head"])
        budget = table["budget"]
        if budget is None:
            if self.releases:
                self.flag(f"status shows no budget after {len(self.releases)} releases")
            return
        spent = float(budget["spent"])
        self.shown("status", spent, budget["delta"])
        if spent > float(budget["epsilon"]) * (1 + TOLERANCE):
            self.flag(f"spent {spent} of {budget['epsilon']}")
        if spent < self._floor * (1 - TOLERANCE):
            self.flag(f"spent fell from {self._floor} to {spent}")
        self._floor = spent
        paid: Counter[str] = Counter()
        for line in self.lines():
            if line["kind"] in ("charge", "tuning"):
                paid[line["stage"]] += line.get("steps", 1)
        for stage, used in Counter(event["stage"] for event in self.releases).items():
            if used > paid[stage]:
                self.flag(f"{used} releases of {stage}, {paid[stage]} steps in the ledger")

    def answer(self, name: str, done: Done, made: list[dict[str, Any]], out: Path) -> None:
        """Claim a, of what else a command that succeeded has shown or written."""
        result = json.loads(done.out) if done.out.startswith("{") else {}
        if name in ("probe", "finetune", "continue", "tune") and "epsilon" in result:
            head = result.get("ledger_head") or next(
                (line["hash"] for line in reversed(self.lines()) if line.get("kind") == "tuning"), None
            )  # of a stage that was finished before: what it said then
            self.shown(name, result["epsilon"], result["delta"], None if made else head)
        if name == "report":
            text = re.sub(r"<[^>]+>", " ", (self.run / "report.html").read_text(encoding="utf-8"))
            said = re.findall(r"ε, spent\s+(?:void computed )?([\d.]+|∞)|has spent ε = ([\d.]+|∞)", text)
            values = [float("inf" if "∞" in one + two else one + two) for one, two in said]
            plan = self.run / "privacy" / "plan.json"
            if plan.exists():
                self.shown("the report", min(values, default=0.0), json.loads(plan.read_text())["delta"])
        folder = {"predict": self.run / "model", "export": out, "verify": self.run / "model"}.get(name)
        if folder is not None:
            model = json.loads((folder / "config.json").read_text())["result"]
            self.shown(f"the model of {name}", model["epsilon"], model["delta"], model["ledger_head"])
            card = re.search(r"\*\*\(ε = ([\d.]+), δ", (folder / "MODEL_CARD.md").read_text(encoding="utf-8"))
            if name != "predict" and card is not None:  # without a number it says NOT PRIVATE
                self.shown(f"the card of {name}", card[1], model["delta"], model["ledger_head"])


# ------------------------------------------------------------------------------------------------------- the sequences


class World:
    """What all sequences share: the server of commands, the settings, and finished public stages to start from."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "output").mkdir(exist_ok=True)
        (folder / "small.toml").write_text(SETTINGS)
        self.dprandp = Dprandp(folder / "output", folder)

    def start(self, arch: str, run: Path) -> None:
        """Copy a run whose public stages are finished."""
        made = self.folder / f"start-{arch}"
        for command in () if made.exists() else (["generate", "--workers", 1], ["pretrain", "--arch", arch]):
            done = self.dprandp(*command, "--config", self.folder / "small.toml", "--run", made)
            assert done.code == 0, done.err
        shutil.copytree(made, run)


def data(seed: int) -> dict[str, np.ndarray]:
    """Arrays of a data set; another for each seed."""
    made = arrays(TRAIN, 12)
    return made | {"x_train": made["x_train"] ^ np.uint8(seed)}


class Sequence:
    """One run directory and what happens to it.

    Args:
        world: shared.
        base: a folder of its own.
        chance: decides everything but the moments of accidents.
        start: the extractor that it has at the beginning; none where this is empty.
        patch: Python to execute before each command, to break the package on purpose (the controls of the test).
    """

    def __init__(
        self, world: World, base: Path, chance: random.Random, start: str = "patchnet", patch: str = ""
    ) -> None:
        self.world, self.base, self.chance, self.patch = world, base, chance, patch
        self.run, self.arch = base / "run", start
        base.mkdir(parents=True)
        if start:
            world.start(start, self.run)
        self.data = base / "data.npz"
        np.savez(self.data, **data(0))
        self.observer = Observer(self.run)
        self.history: list[str] = []
        self.commands = self.accidents = self._count = 0
        self.epsilon = chance.choice([0.5, 1, 2, 4, 8])
        self._last: list[object] | None = None
        self._copies: list[Path] = []

    # ------------------------------------------------------------------------------------------------------- commands

    def start(self, arguments: list[object], before: str = "", fault: str = "", largest: int | None = None):
        """Start a command; returns its process and the file of its recorder."""
        self._count += 1
        self.commands += 1
        seen = self.base / f"seen-{self._count}.jsonl"
        environment = {"SEEN": str(seen), "LEDGER": str(self.run / "privacy" / "ledger.jsonl"), faults.VARIABLE: fault}
        running = self.world.dprandp.start(
            *arguments, "--run", self.run, "--json", folder=self.base, largest_file=largest,
            before=self.patch + RECORD + before, **environment,
        )  # fmt: skip
        return running, seen

    def end(self, arguments: list[object], running: Any, seen: Path, killed: bool = False) -> Done:
        """Wait for a command, and hold everything against the books."""
        done, name = running.end(), str(arguments[0])
        made = self.observer.take(name, seen)
        self.history.append(f"{' '.join(map(str, arguments))} -> {done.code}")
        self.observer.ended(name, done, killed)
        if done.code == 0:
            out = str(arguments[arguments.index("--out") + 1]) if "--out" in arguments else ""
            self.observer.answer(name, done, made, self.base / out)
        return done

    def command(self, *arguments: object, killed: bool = False, **options: Any) -> Done:
        """Run a command to its end, whatever that is, and look at the run."""
        done = self.end(list(arguments), *self.start(list(arguments), **options), killed)
        self.look(arguments)
        return done

    def look(self, *commands: Iterable[object]) -> None:
        """Ask for the status; ``commands`` are those that ran since the last look."""
        redone = {str(command[0]) for command in map(list, commands) if "--overwrite" in command}
        if not self.run.exists():
            return
        done = self.world.dprandp("status", "--run", self.run, "--json", before=self.patch)
        self.observer.ended("status", done, False)
        self.observer.status(done, redone)

    def arguments(self, name: str = "") -> list[object]:
        """A command at random, with flags that fit or do not."""
        config = ["--config", self.world.folder / "small.toml"]
        probed = (self.run / "3-probe" / "head.safetensors").exists()
        usual = {"probe": 6, "finetune": 8 if probed else 1, "continue": 4 if "wrn" in self.arch else 0.3, "tune": 1.5}
        looks = dict.fromkeys(["report", "verify", "predict", "export"], 1.2 if probed else 0.2)
        rare = {"generate": 0.3, "pretrain": 0.5, "check": 0.2, "audit": 0.2}
        weights = usual | looks | rare if (self.run / "2-pretrain").exists() else {"generate": 1, "pretrain": 1}
        name = name or self.chance.choices(list(weights), list(weights.values()))[0]
        if name == "check":
            return ["status", "--check"]
        if name == "audit":
            return ["audit", "--trials", 100, "--canaries", 20, "--no-controls"]
        if name == "predict":
            return ["predict", "--data", f"npz:{self.data}"]
        if name == "export":
            return ["export", "--out", f"export-{self._count + 1}"]
        if name in ("report", "verify"):
            return [name]
        made: list[object] = [name, *config]
        if name == "generate":
            made += ["--workers", 1, *self._maybe(0.2, "--count", [20, 0])]
        elif name == "pretrain":
            self.arch = self.arch or self.chance.choice(["patchnet", "wrn-10-1"])
            made += ["--arch", self.arch, *self._maybe(0.2, "--seed", [0, 1])]
        else:
            made += self._private(name)
        if name != "tune":
            made += [flag for flag in ("--overwrite", "--resume") if self.chance.random() < 0.2]
        return made

    def _private(self, name: str) -> list[object]:
        epsilon = self.epsilon if self.chance.random() < 0.96 else self.chance.choice([0.3, 16, "inf", 0])
        made: list[object] = ["--data", f"npz:{self.data}", "--eps", epsilon, *self._maybe(0.05, "--delta", [1e-4])]
        if name == "tune":
            return [*made, "--on", self.chance.choice(["synthetic", "private", "private"]), "--trials", 2]
        made += self._maybe(0.5, "--batch-size", [12, 12, 20, 20, TRAIN, TRAIN + 1])
        made += self._maybe(0.2, "--views", [2, 2, 2, 0])
        made += self._maybe(0.3, "--steps", [2, 6, 4, 3, 0])
        if name == "probe":
            made += self._maybe(0.6, "--share", [0.1, 0.1, 0.3, 0.5, 1, 2]) + self._maybe(0.15, "--noise", ["discrete"])
        if name == "finetune":
            made += self._maybe(0.3, "--clipping", ["automatic", "rescaled", "automatic", "none"])
            made += ["--freeze", "random", "--keep", 0.5] if self.chance.random() < 0.15 else []
            made += ["--from", "scratch", "--arch", "wrn-10-1"] if self.chance.random() < 0.1 else []
        if name == "continue":
            made += ["--public", self.chance.choice(["synth", "fraction:0.2"]), *self._maybe(0.4, "--share", [0.3, 1])]
            made += self._maybe(0.3, "--mix", ["cosine", "private", "public"])
        return made

    def _maybe(self, probability: float, flag: str, values: list[object]) -> list[object]:
        return [flag, self.chance.choice(values)] if self.chance.random() < probability else []

    # --------------------------------------------------------------------------------------------------------- actions

    def act(self) -> None:
        """One action, and what the observer says to it."""
        kinds = {self.plain: 6, self.again: 3 if self._last else 0, self.broken: 6, self.two_at_once: 0.7,
                 self.touch: 2.5 if self.run.exists() else 0, self.other_data: 0.6}  # fmt: skip
        self.chance.choices(list(kinds), list(kinds.values()))[0]()
        if self.run.exists() and len(self._copies) < 4 and self.chance.random() < 0.4:
            copy = self.base / f"copy-{len(self._copies)}"
            self._copies.append(Path(shutil.copytree(self.run, copy)))

    def plain(self) -> None:
        """A command that nothing happens to."""
        self.command(*self.arguments())

    def again(self) -> None:
        """The command that was broken off, as it was."""
        assert self._last is not None
        last, self._last = self._last, None
        self.command(*last)

    def broken(self) -> None:
        """A command that something happens to."""
        names = ["probe", "probe", "finetune", "finetune", "finetune", "pretrain", "generate", "report", "tune"]
        names += ["continue"] * (2 if "wrn" in self.arch else 0)
        ready = (self.run / "3-probe" / "head.safetensors").exists() and self.chance.random() < 0.7
        arguments = self._last = self.arguments(self.chance.choice(names) if ready else "")
        self.accidents += 1
        kind = self.chance.choice(["point", "point", "kill", "signal", "fsync", "limit", "clock"])
        self.history.append(f"accident: {kind}")
        if kind == "point":
            point, hit = self.chance.choice(faults.POINTS), self.chance.choice([1, 1, 2, 2, 3, 4, 5, 7])
            self.history.append(f"{point}:{hit}")
            self.command(*arguments, killed=True, fault=f"{point}:{hit}")
        elif kind in ("kill", "signal"):
            number = self.chance.choice([signal.SIGTERM, signal.SIGINT]) if kind == "signal" else signal.SIGKILL
            running, seen = self.start(arguments)
            end = time.monotonic() + 60
            while not seen.exists() and time.monotonic() < end:
                time.sleep(0.002)
            time.sleep(0.03 + self.chance.random() ** 2 * 1.5)
            try:
                os.kill(running.pid, number)
            except ProcessLookupError:
                self.history.append("too late")
            self.end(arguments, running, seen, killed=kind == "kill")
            self.look(arguments)
        elif kind == "fsync":
            self.command(*arguments, before=FULL.format(number=self.chance.randint(1, 40)))
        elif kind == "limit":
            self.command(*arguments, largest=self.chance.randint(20_000, 100_000))
        else:
            start, step = self.chance.choice([(2_000_000_000, 3600), (1_000_000_000, 0), (10_000, 1e-3)])
            self.command(*arguments, before=CLOCK.format(start=start, step=step))

    def two_at_once(self) -> None:
        """Two processes on the same run."""
        both = [self.arguments(), self.arguments()]
        self.accidents += 1
        self.history.append("two at once")
        running = [(arguments, *self.start(arguments)) for arguments in both]
        for arguments, process, seen in running:
            done = process.end()
            self.observer.take(str(arguments[0]), seen)
            self.history.append(f"{' '.join(map(str, arguments))} -> {done.code}")
            self.observer.ended(str(arguments[0]), done, False)
        self.look(*both)

    def touch(self) -> None:
        """Somebody changes files of the run."""
        files = sorted(path for path in self.run.rglob("*") if path.is_file() and path.name != ".lock")
        if not files:
            return
        telling = [path for path in files if path.name in TELLING]
        file = self.chance.choice(telling if telling and self.chance.random() < 0.6 else files)
        kinds: list[Callable[[Path], str]] = [self.edit_byte, self.edit_number, self.delete, self.cut, self.swap]
        kinds += [self.put_back] * (4 if self._copies else 0)
        self.observer.untouched = False
        self.accidents += 1
        self.history.append(f"touched: {self.chance.choice(kinds)(file)}")
        self.look()

    def edit_byte(self, file: Path) -> str:
        """Another byte somewhere."""
        content = bytearray(file.read_bytes() or b" ")
        place = self.chance.randrange(len(content))
        content[place] ^= self.chance.randrange(1, 256)
        file.write_bytes(content)
        return f"byte {place} of {file.relative_to(self.run)}"

    def edit_number(self, file: Path) -> str:
        """Another number, where there are any."""
        content = file.read_bytes()
        found = list(re.finditer(rb"(?<![\w.])\d+(?:\.\d+)?(?:e-?\d+)?(?![\w])", content))
        if not found:
            return self.edit_byte(file)
        place, new = self.chance.choice(found), self.chance.choice([b"0", b"1", b"2", b"7.5", b"100000"])
        file.write_bytes(content[: place.start()] + new + content[place.end() :])
        return f"{place[0].decode()} -> {new.decode()} at {place.start()} in {file.relative_to(self.run)}"

    def delete(self, file: Path) -> str:
        """The file, or the folder that it is in."""
        name = file.relative_to(self.run)
        if len(name.parts) > 1 and self.chance.random() < 0.3:
            shutil.rmtree(self.run / name.parts[0])
            return f"{name.parts[0]} deleted"
        file.unlink()
        return f"{name} deleted"

    def cut(self, file: Path) -> str:
        """The end is missing: whole lines, or any number of bytes."""
        content = file.read_bytes()
        lines = content.splitlines(keepends=True)
        if file.name == "ledger.jsonl" and len(lines) > 1 and self.chance.random() < 0.5:
            kept = b"".join(lines[: self.chance.randrange(1, len(lines))])
        else:
            kept = content[: self.chance.randrange(len(content) + 1)]
        file.write_bytes(kept)
        return f"{file.relative_to(self.run)} cut to {len(kept)} of {len(content)} bytes"

    def swap(self, file: Path) -> str:
        """Two files of the same kind, anywhere in the run."""
        others = sorted(path for path in self.run.rglob(f"*{file.suffix}") if path.is_file() and path != file)
        if not others:
            return self.delete(file)
        other = self.chance.choice(others)
        one, two = file.read_bytes(), other.read_bytes()
        file.write_bytes(two)
        other.write_bytes(one)
        return f"{file.relative_to(self.run)} and {other.relative_to(self.run)} swapped"

    def put_back(self, file: Path) -> str:
        """An old copy of the file, or of the folder that it is in."""
        copy = self.chance.choice(self._copies)
        name = file.relative_to(self.run)
        if len(name.parts) > 1 and self.chance.random() < 0.6:
            name = Path(name.parts[0])
        self.restore(copy / name, self.run / name)
        return f"{name} as in {copy.name}"

    @staticmethod
    def restore(old: Path, new: Path) -> None:
        """Put a file or a folder in the place of another; also one that was not there then."""
        if new.is_dir():
            shutil.rmtree(new)
        new.unlink(missing_ok=True)
        if old.is_dir():
            shutil.copytree(old, new)
        elif old.exists():
            new.parent.mkdir(exist_ok=True, parents=True)
            shutil.copy(old, new)

    def other_data(self) -> None:
        """The data move, or others lie where they lay."""
        self.accidents += 1
        if self.chance.random() < 0.5:
            moved = self.base / f"data-{self._count}-{self.accidents}.npz"
            self.data.rename(moved)
            self.data = moved
            self.history.append("data moved")
        else:
            seed = self.chance.choice([0, 0, 1])
            np.savez(self.data, **data(seed))
            self.history.append(f"data {seed} lie there now")


TELLING = (
    "run.json", "plan.json", "ledger.jsonl", "config.json", "MODEL_CARD.md", "LATEST", "training-data.json",
    ".ledger-head", "ledger-head",
)  # fmt: skip


def run_sequence(world: World, base: Path, seed: int, index: int, most: int = 12) -> dict[str, Any]:
    """Make one sequence, of ``most`` actions at most; returns its row for the log."""
    chance = random.Random(f"{seed} {index}")
    began = time.monotonic()
    sequence = Sequence(world, base, chance, chance.choices(["", "patchnet", "wrn-10-1"], [1, 6, 3])[0])
    for _ in range(min(most, chance.randint(4, 12))):
        try:
            sequence.act()
        except Exception as error:  # a command that hangs, or that shows what the observer cannot read
            sequence.observer.flag(repr(error))
        if sequence.observer.problems:
            break
    return {
        "seed": seed, "index": index, "commands": sequence.commands, "accidents": sequence.accidents,
        "releases": len(sequence.observer.releases), "seconds": round(time.monotonic() - began, 1),
        "codes": Counter(line.rpartition(" -> ")[2] for line in sequence.history if " -> " in line),
        "history": sequence.history, "problems": sequence.observer.problems,
    }  # fmt: skip


def summary(rows: list[dict[str, Any]]) -> str:
    """The sums of a log."""
    total = Counter({key: sum(row[key] for row in rows) for key in ("commands", "accidents", "releases")})
    wrong = [row for row in rows if row["problems"]]
    lines = [
        f"{len(rows)} sequences: {total['commands']} commands, {total['accidents']} accidents, {total['releases']} "
        f"releases; a claim failed in {len(wrong)}"
    ]
    lines += [f"  sequence {row['index']} of seed {row['seed']}: {row['problems']}" for row in wrong]
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--start", type=int, default=0, help="number of the first sequence")
    parser.add_argument("--count", type=int, default=30, help="number of sequences")
    parser.add_argument("--seed", type=int, default=0, help="of all choices")
    parser.add_argument("--log", type=Path, default=Path("soak.jsonl"), help="a row for each sequence")
    told = parser.parse_args()
    rows = [json.loads(line) for line in told.log.read_text().splitlines()] if told.log.exists() else []
    finished = {(row["seed"], row["index"]) for row in rows}
    with tempfile.TemporaryDirectory() as scratch:
        world = World(Path(scratch))
        for index in range(told.start, told.start + told.count):
            if (told.seed, index) in finished:
                continue
            base = Path(scratch) / f"sequence-{index}"
            rows.append(run_sequence(world, base, told.seed, index))
            if rows[-1]["problems"]:
                shutil.copytree(base, told.log.with_suffix(f".{told.seed}-{index}"), dirs_exist_ok=True)
                print(f"sequence {index}: {rows[-1]['problems'][0]}", flush=True)
            with told.log.open("a") as file:
                file.write(json.dumps(rows[-1]) + "\n")
            shutil.rmtree(base)
        world.dprandp.close()
    print(summary(rows))
    return int(any(row["problems"] for row in rows))


if __name__ == "__main__":
    sys.exit(main())
