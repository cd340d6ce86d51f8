"""Canaries and controls: scores of made-up records that went through the real mechanism, whole or with one known fault.

A canary is a record whose gradient is one coordinate of the released sum and nothing else, so one run of the mechanism
is as many trials as it has canaries. The real sampler draws the batches, the real clip makes the sum, the real
mechanism adds the noise, for all steps of the plan. That the noise of different coordinates is independent is what
``replay`` checks. The gradient's sign alternates from step to step, and so does the score's: for fresh noise this
changes nothing, while noise that comes round again cancels.

A control is the mechanism with one fault, which an audit worth its name must flag. Nothing in the production code can
be switched to these faults: each is made by handing the real pieces something other than what was accounted.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

import numpy as np
import torch

from dprandp.audit.bounds import LARGEST_FACTOR, Game, plain_bound, step_score
from dprandp.privacy.accounting import GaussianEvent
from dprandp.privacy.clipping import clipped_sum
from dprandp.privacy.ledger import Ledger
from dprandp.privacy.mechanism import PrivateMechanism, PrivatePlan, PrivateStep
from dprandp.privacy.randomness import RandomMode, RandomSource, SystemRandom
from dprandp.privacy.selection import PrivateSelection, SelectionPlan, Trial

SEPARATE_VIEWS = 4
"""Views of a record in the control that clips each of them, where the plan has fewer."""

BLOCK = 20_000
"""Canaries in one run of the mechanism."""

CLIPPED_AT_ONCE = 64
"""Canaries whose gradients are clipped together. Such groups are equal but for their place: one is made a step."""

LENGTH = 100.0
"""Norm of a canary's gradient before the clip, in clip norms: the clip has to act."""

MOST_STEPS = 10_000
"""Steps of a trial, at most; a longer plan is judged by its first ones."""

PILOT = 2000
"""Coordinates that are looked at for the size of the noise, before the trials."""


class Tape(SystemRandom):
    """Random words that are kept, in memory alone, and come again after ``rewind``."""

    def __init__(self, source: RandomSource | None = None) -> None:
        self._source, self._kept, self._place = source or SystemRandom(), [], 0

    def rewind(self) -> None:
        self._place = 0

    def words(self, count: int) -> np.ndarray:
        if self._place == len(self._kept):
            self._kept.append(self._source.words(count))
        kept = self._kept[self._place]
        self._place += 1
        if len(kept) != count:
            raise RuntimeError("the second run asked for other randomness than the first")
        return kept


class _SameNoise:
    """Every step's noise is made of the same words; batches stay fresh."""

    mode: RandomMode = "os-entropy"
    private = False

    def __init__(self, source: RandomSource) -> None:
        noise = Tape(source)
        self.uniform, self.gaussian, self.words, self.rewind = source.uniform, noise.gaussian, noise.words, noise.rewind


class _DividedByBatch:
    """A step whose sum is divided by the batch that was drawn, not by the public expected batch."""

    def __init__(self, step: PrivateStep, plan: PrivatePlan) -> None:
        self.number, self.indices = step.number, step.indices
        self._step, self._plan = step, plan

    def release(self, clipped_sums: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        factor = self._plan.expected_batch / max(1, len(self.indices))
        return {name: value * factor for name, value in self._step.release(clipped_sums).items()}


@dataclass(frozen=True)
class Control:
    """A mechanism with at most one fault; ``FAITHFUL`` has none.

    Attributes:
        noise_factor: the noise is this many times what was accounted.
        clip_factor: the loop clips at this many times the clip norm.
        separate_views: the K views of a record are clipped one by one and added up, which makes its part K C long.
            (Clipping each view and then *averaging* would not.)
        same_noise: every step gets the noise of the first.
        actual_divisor: the sum is divided by the number of records that were drawn.
    """

    name: str
    noise_factor: float = 1.0
    clip_factor: float = 1.0
    separate_views: bool = False
    same_noise: bool = False
    actual_divisor: bool = False

    def clip_norm(self, plan: PrivatePlan) -> float:
        """What the loop clips at."""
        return min(1e8, plan.clip_norm * self.clip_factor)

    def views(self, plan: PrivatePlan) -> int:
        """Views of a record that a loop is to be given."""
        return max(SEPARATE_VIEWS, plan.views) if self.separate_views else plan.views

    def mechanism(self, plan: PrivatePlan, ledger: Ledger, source: RandomSource) -> PrivateMechanism:
        """The real mechanism of a rehearsal's plan, with the fault in noise or randomness."""
        faulty = replace(plan, noise_multiplier=plan.noise_multiplier * self.noise_factor)
        return PrivateMechanism(
            faulty, ledger, _SameNoise(source) if self.same_noise else source, charge_block=plan.steps
        )

    def step(self, step: PrivateStep, plan: PrivatePlan) -> PrivateStep | _DividedByBatch:
        """What the loop is handed instead of the step; its ``indices`` may be changed by the caller afterwards."""
        if self.same_noise:
            step._random.rewind()
        return _DividedByBatch(step, plan) if self.actual_divisor else step

    def applies(self, plan: PrivatePlan) -> bool:
        """False where the plan leaves no room for the fault: noise cannot be reused in a single step."""
        return plan.steps > 1 or not self.same_noise


FAITHFUL = Control("none")
CLIP_OFF = Control("clip off", clip_factor=1e6)
CONTROLS = (
    Control("noise off", noise_factor=0.0),
    Control("noise of a tenth", noise_factor=0.1),
    CLIP_OFF,
    Control("clip per view", separate_views=True),
    Control("noise reused", same_noise=True),
    Control("divisor from the actual batch", actual_divisor=True),
)


def rehearsal_plan(plan: PrivatePlan, examples: int) -> PrivatePlan:
    """The same noise, rate, steps and clip for another number of records, with nothing to charge."""
    return replace(plan, examples=examples, epsilon_target=math.inf, delta=1e-12)


def trial_event(plan: PrivatePlan) -> GaussianEvent:
    """What was accounted for one trial: the whole plan, but for ``MOST_STEPS``."""
    return replace(plan.event, steps=min(plan.steps, MOST_STEPS))


def seconds_of(plan: PrivatePlan, canaries: int) -> float:
    """About how long scores of so many canaries take on one processor of 2020."""
    steps = min(plan.steps, MOST_STEPS)
    cost = 1e-6 if plan.noise == "discrete" else 1.5e-7 if plan.sample_rate == 1 else 2.5e-7
    return steps * (4e-4 * math.ceil(canaries / BLOCK) + cost * canaries)


def game_scores(
    plan: PrivatePlan, game: Game, folder: Path, control: Control = FAITHFUL
) -> tuple[np.ndarray, np.ndarray]:
    """Scores of a distinguishing game with σ > 0, as ``Game.scores``; ``folder`` is for ledgers."""
    noise = seen_noise(plan, folder, control)
    return game.scores(BLOCK, lambda included: canary_scores(plan, included, folder, control, noise))


def seen_noise(plan: PrivatePlan, folder: Path, control: Control = FAITHFUL) -> float:
    """The noise multiplier that an attacker would measure beforehand on data without canaries: σ, if that is near.

    The best score for noise of another size than was accounted is another one, so a fault in it shows more.
    """
    squares, steps = 0.0, min(plan.steps, 100)
    for released, _ in _released(plan, np.zeros(PILOT, bool), folder, control, steps):
        squares += float(np.square(released).mean())
    found = math.sqrt(squares / steps)
    near = abs(found / plan.noise_multiplier - 1) < max(0.03, 4 / math.sqrt(2 * PILOT * steps))
    return plan.noise_multiplier if near else max(found, plan.noise_multiplier / LARGEST_FACTOR)


def canary_scores(
    plan: PrivatePlan, included: np.ndarray, folder: Path, control: Control, noise: float
) -> np.ndarray:
    """One run of the mechanism with canaries: the log likelihood ratio of each, with to without, float64 [m].

    ``included``, bool [m]: which canaries are in the data; the records of the others are empty. ``noise``: the noise
    multiplier that the attacker assumes.
    """
    scores = np.zeros(len(included))
    for released, sign in _released(plan, included, folder, control, MOST_STEPS):
        scores += step_score(sign * released, noise, plan.sample_rate)
    return scores


def _released(
    plan: PrivatePlan, included: np.ndarray, folder: Path, control: Control, steps: int
) -> Iterator[tuple[np.ndarray, int]]:
    """The released sum of each step, float64 [m] in clip norms, and the sign of the gradients in it."""
    count, ledger = len(included), folder / f"{next(_numbers)}.jsonl"
    runnable = rehearsal_plan(plan, count)
    mechanism = control.mechanism(runnable, Ledger.create(ledger, count), SystemRandom())
    for real in islice(mechanism.steps(), steps):
        step, sign = control.step(real, runnable), 1 - 2 * (real.number % 2)
        drawn = step.indices[included[step.indices]]
        groups, rest = divmod(len(drawn), CLIPPED_AT_ONCE)
        sums = torch.zeros(count, dtype=torch.float64)
        sums[torch.from_numpy(drawn)] = torch.cat(
            [_clipped(CLIPPED_AT_ONCE, sign, plan, control).repeat(groups), _clipped(rest, sign, plan, control)]
        )
        factor = plan.sample_rate * count / plan.clip_norm  # undoes the public divisor
        yield step.release({"canary": sums})["canary"].double().numpy() * factor, sign
    ledger.unlink()


_numbers = itertools.count()


def _clipped(count: int, sign: int, plan: PrivatePlan, control: Control = FAITHFUL) -> torch.Tensor:
    """Sum of so many canaries' clipped gradients, one coordinate for each, float64 [count]."""
    rows = torch.eye(count) * (sign * LENGTH * plan.clip_norm)
    rows = rows.repeat(control.views(plan), 1) if control.separate_views else rows
    return clipped_sum({"canary": rows}, control.clip_norm(plan))["canary"]


# ------------------------------------------------------------------------------------------------------ private tuning
#
# A trial of a selection is a Gaussian mechanism of parameter μ, whether the record is fitted or held out: two games,
# one with canaries in the sums of real trials, one with a held-out canary that is counted. What the selection adds, its
# random number of trials, is in a third, in which all that is seen is the best noisy score.

ANSWERS = 8
"""Records held out on average, times μ, in the third game: a count of all is then far above one of none, and noise."""


def trial_game_scores(
    plan: SelectionPlan, game: Game, held_out: bool, faulty: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """Scores of a game on single trials of a selection, of a Gaussian of parameter μ; see ``Game.scores``.

    The number of records, and the part that is held out, are made up. ``held_out``: the canary is held out, and counted
    as a right answer; else it is fitted. ``faulty``: with noise ten times smaller than was accounted.
    """

    def of(included: np.ndarray) -> np.ndarray:
        real = replace(
            plan, examples=len(included), held_out=1 - 1e-12 if held_out else 1e-12, delta=1e-12, epsilon_target=1e9,
            mu=min(1000.0, 10 * plan.mu) if faulty else plan.mu,
            steps=(1,) * len(plan.steps) if held_out else plan.steps,
        )  # fmt: skip
        trial = Trial(real, SystemRandom())
        return step_score((_counted if held_out else _fitted)(real, trial, included), 1 / plan.mu, 1.0)

    return game.scores(1 if held_out else BLOCK, of)


def _fitted(plan: SelectionPlan, trial: Trial, included: np.ndarray) -> np.ndarray:
    """The mean released sum of a trial's steps, float64 [m] in clip norms: of standard deviation σ/√T = 1/μ."""
    sums = torch.zeros(len(included), dtype=torch.float64)
    total = torch.zeros(len(included), dtype=torch.float64)
    drawn = trial.fitted[included[trial.fitted]]
    for _ in range(trial.steps):
        gradient = torch.full((1, 1), LENGTH * plan.clip_norm)
        sums[torch.from_numpy(drawn)] = clipped_sum({"canary": gradient}, plan.clip_norm)["canary"]
        total += trial.release(sums).double()
    return (total * (trial.expected_fitted / plan.clip_norm / trial.steps)).numpy()


def _counted(plan: SelectionPlan, trial: Trial, included: np.ndarray) -> np.ndarray:
    """The noisy count of one held-out record, right if it is there."""
    for _ in range(trial.steps):
        trial.release(torch.zeros(1))
    trial.score(torch.from_numpy(included[trial.held_out]))
    return np.array([trial.outcome[0]])


def selection_answers(plan: SelectionPlan, count: int, present: bool, evidence: float, folder: Path) -> int:
    """In how many of ``count`` real selections the best score says that the canary, record 0, is there.

    A trial whose noisy sums speak for it by more than ``evidence`` (in standard deviations of its noise) answers all
    held-out records right, another none. Each setting makes one step, which by the plan says as much as all of them
    (σ = √T/μ). Where the canary is not ``present`` its record is empty.
    """
    examples = math.ceil(max(30, ANSWERS / plan.mu) / plan.held_out)
    real = replace(plan, examples=examples, steps=(1,) * len(plan.steps), epsilon_target=1e9, delta=1e-9)
    gradient, found = {"canary": torch.full((1, 1), LENGTH * plan.clip_norm)}, 0

    def one_trial(trial: Trial) -> None:
        total = torch.zeros(1, dtype=torch.float64)
        if present and len(trial.fitted) and trial.fitted[0] == 0:
            total = clipped_sum(gradient, plan.clip_norm)["canary"]
        seen = float(trial.release(total)[0]) * trial.expected_fitted / plan.clip_norm * plan.mu
        trial.score(torch.full((len(trial.held_out),), seen > evidence))

    for _ in range(count):
        ledger = folder / f"{next(_numbers)}.jsonl"
        selection = PrivateSelection(real, Ledger.create(ledger, examples), SystemRandom(), 1, warn=lambda text: None)
        found += selection.run(one_trial)[1] > examples * plan.held_out / 2
        ledger.unlink()
    return found


def selection_evidence(plan: SelectionPlan, count: int, significance: float, seed: int) -> tuple[float, float]:
    """The evidence to ask of a trial, from simulated selections alone: where the bound is largest; and that bound."""
    random = np.random.default_rng(seed)
    many = max(20_000, 4 * count)
    sides = []
    for present in (False, True):
        trials = np.array([plan.event.trials.draw(value) for value in random.random(many)])
        values = random.standard_normal(trials.sum())
        values += plan.mu * present * (random.random(len(values)) >= plan.held_out)
        sides.append(np.sort(np.maximum.reduceat(values, np.concatenate([[0], np.cumsum(trials)[:-1]]))))

    def bound(evidence: float) -> float:
        above = [round((many - np.searchsorted(side, evidence, "right")) * count / many) for side in sides]
        return plain_bound(*above, count, count, plan.delta, significance)

    best = max(np.quantile(sides[0], 1 - np.geomspace(1 / count, 0.6, 60)), key=bound)
    return float(best), bound(best)
