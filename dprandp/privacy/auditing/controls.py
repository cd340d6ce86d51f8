"""Positive controls: the run's mechanism with one known fault, wrapped around it from outside.

Nothing in the production code can be switched to these faults. Each is made by handing the real pieces something
other than what was accounted: another plan to the mechanism, another clip norm or separated views to the loop, noise
that comes round again, or an output divided once more.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

import numpy as np
import torch

from dprandp.privacy.clipping import clipped_sum
from dprandp.privacy.ledger import Ledger
from dprandp.privacy.mechanism import PrivateMechanism, PrivatePlan, PrivateStep
from dprandp.privacy.randomness import RandomMode, RandomSource, SystemRandom

SEPARATE_VIEWS = 4
"""Views of a record in the control that clips each of them, where the plan has fewer."""


class _SameNoise:
    """Noise of one shape is drawn once and then handed out again; batches stay fresh."""

    mode: RandomMode = "os-entropy"
    private = False

    def __init__(self, source: RandomSource) -> None:
        self._source = source
        self._kept: dict[tuple[int, ...], torch.Tensor] = {}

    def uniform(self, count: int):
        return self._source.uniform(count)

    def gaussian(self, shape: Sequence[int]) -> torch.Tensor:
        key = tuple(shape)
        if key not in self._kept:
            self._kept[key] = self._source.gaussian(shape)
        return self._kept[key].clone()


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
        name: as the report calls it.
        noise_factor: the noise is this many times what was accounted.
        clip_factor: the loop clips at this many times the clip norm.
        separate_views: the K views of a record are clipped one by one and added up, as if they were records. (Clipping
            each view and then *averaging* would keep the sensitivity; added up, it is K C.)
        same_noise: every step gets the noise of the first.
        actual_divisor: the sum is divided by the number of records that were drawn.
    """

    name: str
    noise_factor: float = 1.0
    clip_factor: float = 1.0
    separate_views: bool = False
    same_noise: bool = False
    actual_divisor: bool = False

    def mechanism_plan(self, plan: PrivatePlan) -> PrivatePlan:
        """What the mechanism is given instead of the plan."""
        return replace(plan, noise_multiplier=plan.noise_multiplier * self.noise_factor)

    def clip_norm(self, plan: PrivatePlan) -> float:
        """What the loop clips at."""
        return min(1e8, plan.clip_norm * self.clip_factor)

    def views(self, plan: PrivatePlan) -> int:
        """Views of a record that a loop is to be given."""
        return max(SEPARATE_VIEWS, plan.views) if self.separate_views else plan.views

    def random(self, source: RandomSource) -> RandomSource:
        """Where the mechanism takes its randomness from."""
        return _SameNoise(source) if self.same_noise else source

    def step(self, step: PrivateStep, plan: PrivatePlan) -> PrivateStep | _DividedByBatch:
        """What the loop is handed instead of the step; its ``indices`` may be changed by the caller afterwards."""
        return _DividedByBatch(step, plan) if self.actual_divisor else step

    def applies(self, plan: PrivatePlan) -> bool:
        """False where the plan leaves no room for the fault: noise cannot be reused in a single step."""
        return plan.steps > 1 or not self.same_noise


FAITHFUL = Control("none")
CONTROLS = (
    Control("noise off", noise_factor=0.0),
    Control("noise of a tenth", noise_factor=0.1),
    Control("clip off", clip_factor=1e6),
    Control("clip per view", separate_views=True),
    Control("noise reused", same_noise=True),
    Control("divisor from the actual batch", actual_divisor=True),
)


# ------------------------------------------------------------------------------------------------------------ canaries
#
# Scores of Dirac canaries: records whose gradient is one coordinate of the released sum and nothing else.
#
# Each canary has a coordinate of its own, so one noisy step is many independent trials: half of the coordinates belong
# to canaries that are in the data, half to canaries that are not. The real clip makes the sum, the real mechanism adds
# the noise. That the noise of different coordinates is independent is what ``replay`` checks.
#
# The gradient's sign alternates from step to step, and so does the score's: for fresh noise this changes nothing, while
# noise that comes round again cancels.

BLOCK = 125
"""Trials of each world in one mechanism."""

LENGTH = 100.0
"""Norm of a canary's gradient before the clip, in clip norms: the clip has to act."""

TELLING_MU = 1.5
"""Steps of a trial are added until its μ is this large, where errors of both kinds are neither rare nor common."""

MOST_STEPS = 400


def trial_steps(plan: PrivatePlan) -> int:
    """How many steps make one trial: an even number, if the plan has more than one step."""
    wanted = math.ceil((TELLING_MU * plan.noise_multiplier) ** 2)
    steps = max(1, min(plan.steps, MOST_STEPS, max(2, wanted)))
    return steps if steps == 1 else steps - steps % 2


def trial_mu(plan: PrivatePlan, steps: int) -> float:
    """μ of ``steps`` steps that all hold the canary, √steps/σ: the claim that a trial is held against."""
    return math.sqrt(steps) / plan.noise_multiplier


def dirac_scores(
    plan: PrivatePlan, trials: int, steps: int, folder: Path, control: Control = FAITHFUL
) -> tuple[np.ndarray, np.ndarray]:
    """Scores of trials without and with a canary that is in every batch.

    Args:
        plan: what was accounted; σ > 0.
        trials: a world.
        steps: of each trial, at most those of the plan.
        folder: for ledgers; nothing in it is of use afterwards.
        control: the fault to make, if any.

    Returns:
        (float64 [trials] without, float64 [trials] with) the canary, in units of the noise that was accounted: of
        variance 1 and means 0 and ``trial_mu`` if the mechanism is what it claims to be.
    """
    blocks = [
        _block(plan, min(BLOCK, trials - start), steps, folder / f"{control.name}-{start}.jsonl", control)
        for start in range(0, trials, BLOCK)
    ]
    return np.concatenate([block[0] for block in blocks]), np.concatenate([block[1] for block in blocks])


def _block(
    plan: PrivatePlan, count: int, steps: int, ledger: Path, control: Control
) -> tuple[np.ndarray, np.ndarray]:
    rows = torch.eye(count, 2 * count) * (LENGTH * plan.clip_norm)  # the last ``count`` coordinates stay empty
    if control.separate_views:
        rows = rows.repeat(control.views(plan), 1)
    signed = (rows, -rows)
    total = torch.zeros(2 * count, dtype=torch.float64)
    for step in islice(rehearsal_steps(plan, 2 * count, ledger, control), steps):
        sign = 1 - 2 * (step.number % 2)
        sums = clipped_sum({"canary": signed[step.number % 2]}, control.clip_norm(plan))
        total += sign * step.release(sums)["canary"].double()
    per_step = plan.sample_rate * 2 * count / plan.clip_norm  # undoes the public divisor
    scores = (total * per_step / (plan.noise_multiplier * math.sqrt(steps))).numpy()
    return scores[count:], scores[:count]


def rehearsal_plan(plan: PrivatePlan, examples: int) -> PrivatePlan:
    """The same noise, rate, steps and clip for another number of records, with nothing to pay for."""
    return replace(plan, examples=examples, epsilon_target=math.inf, delta=1e-12)


def rehearsal_steps(plan: PrivatePlan, examples: int, ledger: Path, control: Control) -> Iterator:
    """The steps of a plan's real mechanism on made-up records, with the control's fault."""
    runnable = control.mechanism_plan(rehearsal_plan(plan, examples))
    source = control.random(SystemRandom())
    mechanism = PrivateMechanism(runnable, Ledger.create(ledger, examples), source, charge_block=plan.steps)
    for step in mechanism.steps():
        yield control.step(step, runnable)
