"""Scores of Dirac canaries: records whose gradient is one coordinate of the released sum and nothing else.

Each canary has a coordinate of its own, so one noisy step is many independent trials: half of the coordinates belong
to canaries that are in the data, half to canaries that are not. The real clip makes the sum, the real mechanism adds
the noise. That the noise of different coordinates is independent is what ``replay`` checks.

The gradient's sign alternates from step to step, and so does the score's: for fresh noise this changes nothing, while
noise that comes round again cancels.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import torch

from dprandp.privacy.auditing.controls import FAITHFUL, Control
from dprandp.privacy.clipping import clipped_sum
from dprandp.privacy.ledger import Ledger
from dprandp.privacy.noise import SystemRandom
from dprandp.privacy.plan import PrivateMechanism, PrivatePlan

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
