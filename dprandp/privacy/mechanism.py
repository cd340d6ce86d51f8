"""The only module that couples sampling, clipping, noise and accounting: the run matches the accounted plan.

A ``PrivatePlan`` is public data, saved with the run. A ``PrivateMechanism`` executes it: it charges, then returns a
Poisson batch, then takes the sum of clipped gradients and returns it with noise, divided by the public expected batch.

    mechanism = PrivateMechanism(plan, ledger, SystemRandom(), attempt=1)
    for step in mechanism.steps():                                   # charged and on disk before ``step`` exists
        sums = sum_of_clipped(gradients_of(step.indices), ...)       # zeros for an empty batch
        gradient = step.release(sums)                                # exactly once a step
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch

from dprandp.errors import BudgetError, CheckpointError, UsageError
from dprandp.privacy.accounting import GaussianEvent, Warn, advised_delta, rounded_up, warn_by_log
from dprandp.privacy.adaptive import Stage, calibrate_stage, compose_stages
from dprandp.privacy.clipping import require_clip_norm
from dprandp.privacy.ledger import Ledger
from dprandp.privacy.randomness import NoiseKind, PoissonSampler, RandomSource, add_discrete_noise, add_gaussian_noise


@dataclass(frozen=True)
class PrivatePlan:
    """One stage's private steps. Everything here is public and chosen before the data are read; else UsageError.

    Args:
        examples: N ≥ 1, the public number of records: of units of privacy, each one image or one patient, say.
        sample_rate, steps: q in (0, 1], T ≥ 1.
        noise_multiplier: σ ≥ 0; 0 means no privacy.
        clip_norm: C, the L2 sensitivity of a step's sum, 1e-8 … 1e8.
        views: K ≥ 1 views of a record, averaged before the clip.
        epsilon_target: limit on the run's total ε after this stage; inf means no privacy.
        delta: δ in (0, 1/N).
    """

    stage: str
    examples: int
    sample_rate: float
    steps: int
    noise_multiplier: float
    clip_norm: float
    views: int
    epsilon_target: float
    delta: float
    noise: NoiseKind = "gaussian"

    def __post_init__(self) -> None:
        if self.noise not in ("gaussian", "discrete"):
            raise UsageError(f"The noise is {self.noise!r}.", fix="Give gaussian or discrete.")
        validate_budget(self.epsilon_target, self.delta, self.examples)
        _ = self.event
        if self.steps < 1 or self.views < 1:
            raise UsageError(f"The plan has {self.steps} steps of {self.views} views.", fix="Give at least 1 of each.")
        require_clip_norm(self.clip_norm)
        if self.noise_multiplier == 0 and not math.isinf(self.epsilon_target):
            raise UsageError("A plan without noise has a finite epsilon.", fix="Give --eps inf, or noise.")

    @property
    def event(self) -> GaussianEvent:
        return GaussianEvent(self.noise_multiplier, self.sample_rate, self.steps, self.noise == "discrete")

    @property
    def expected_batch(self) -> float:
        """B = q N: the public divisor, for any size of the drawn batch."""
        return self.sample_rate * self.examples

    @property
    def noise_std(self) -> float:
        """σ C: standard deviation of the noise in one coordinate of a step's sum."""
        return self.noise_multiplier * self.clip_norm

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values; an infinite epsilon is the string ``"inf"``."""
        return {**asdict(self), "epsilon_target": "inf" if math.isinf(self.epsilon_target) else self.epsilon_target}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> PrivatePlan:
        """The inverse of ``to_dict``. Raises CheckpointError for wrong keys, UsageError for bad values."""
        try:
            return cls(**{**values, "epsilon_target": float(values["epsilon_target"])})
        except (KeyError, TypeError, ValueError) as error:
            problem = "The privacy plan has missing, unknown or unreadable entries."
            raise CheckpointError(problem, fix="Restore it from a copy, or --overwrite.") from error


def validate_budget(epsilon: float, delta: float, examples: int) -> None:
    """Raise UsageError for a budget without meaning: ε ≤ 0 or NaN, N < 1, δ not in (0, 1/N)."""
    if not epsilon > 0:
        raise UsageError(f"epsilon is {epsilon}.", fix="Give a number above 0, or inf for no privacy.")
    if examples < 1:
        raise UsageError(f"The number of examples is {examples}.", fix="Give a data set with at least one example.")
    if not 0 < delta < 1 / examples:
        raise UsageError(
            f"delta is {delta}, but it must lie between 0 and 1/{examples} = {1 / examples:.3g}: at 1/N, publishing "
            "one whole record at random would count as private.",
            fix=f"Give a --delta below {1 / examples:.3g}, for instance {advised_delta(examples):g}.",
        )


def make_plan(
    *,
    stage: str,
    epsilon: float,
    delta: float,
    epsilon_target: float,
    spent: Sequence[Stage],
    examples: int,
    sample_rate: float,
    steps: int,
    clip_norm: float,
    views: int = 1,
    noise: NoiseKind = "gaussian",
    warn: Warn = warn_by_log,
) -> PrivatePlan:
    """The plan of a stage after which the run has spent at most ``epsilon_target``, with the least noise found.

    Args:
        epsilon: the run's whole budget; inf plans without noise, hence without privacy.
        epsilon_target: cumulative ε that may be spent once this stage is done, at most ``epsilon``; BudgetError where
            earlier stages have spent it, or leave too little.
        spent: ``ledger.stages()``: every stage that the run has charged. The rest: as in ``PrivatePlan``.

    Guarantee:
        ``compose_stages([*spent, [plan.event]], delta).upper <= epsilon_target``. No data are read.
    """
    validate_budget(epsilon, delta, examples)
    if not 0 < epsilon_target <= epsilon:
        raise UsageError(
            f"The stage may spend up to ε = {epsilon_target}, of a total of {epsilon}.",
            fix="Give a share of the budget above 0, at most 1.",
        )
    sigma = calibrate_stage(epsilon_target, delta, sample_rate, steps, spent, warn, discrete=noise == "discrete")
    plan = PrivatePlan(stage, examples, sample_rate, steps, sigma, clip_norm, views, epsilon_target, delta, noise)
    if noise == "discrete":
        compose_stages([*spent, [plan.event]], delta, warn)  # refuses an ε for which the lattice is too coarse
    return plan


def refuse_overspending(
    stage: str, stages: Sequence[Stage], delta: float, epsilon_target: float, *, fix: str, warn: Warn = warn_by_log
) -> None:
    """The final check before a plan is executed: BudgetError unless all stages are known to be within a finite target.

    Args:
        stages: those in the ledger, and the whole plan.
    """
    total = compose_stages(stages, delta, warn).upper
    if not total <= epsilon_target:
        problem = f"Stage {stage} would bring this run to ε = {rounded_up(total)}, above its {epsilon_target:g}."
        raise BudgetError(problem, fix=fix)


class PrivateStep:
    """One charged step. ``number`` is the update it makes, from 0; ``indices`` (int64 [b], b may be 0) is private."""

    def __init__(self, number: int, indices: np.ndarray, plan: PrivatePlan, random: RandomSource) -> None:
        self.number, self.indices, self.released = number, indices, False
        self._plan, self._random = plan, random

    def release(self, clipped_sums: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """(sum + N(0, (σC)² I)) / (qN), or its discrete counterpart: the only thing that leaves a step.

        ``clipped_sums``: name -> sum of clipped gradients over ``indices``, sensitivity ``clip_norm`` over all names
        jointly; zeros for an empty batch. Returns float32 tensors of the same names and shapes. RuntimeError for a
        second release, nothing to release, or sums that are not finite.

        Guarantee:
            Noise is added once, to every coordinate, for every batch.
        """
        if self.released:
            raise RuntimeError("a step's sum was released twice: its noise would be averaged away")
        plan, noisy = self._plan, {}
        discrete = plan.noise == "discrete" and plan.noise_multiplier > 0
        if not discrete:  # drawn while a device may still compute the sums
            noisy = add_gaussian_noise(clipped_sums, plan.noise_std, self._random)
        finite = [torch.isfinite(total).all() for total in clipped_sums.values()]
        if not finite or not bool(torch.stack(finite).all()):
            raise RuntimeError("the clipped sums of a step are missing or not finite: they were not clipped as planned")
        self.released = True
        if discrete:
            noisy = add_discrete_noise(clipped_sums, plan.clip_norm, plan.noise_multiplier, self._random)
        return {name: (total / plan.expected_batch).to(torch.float32) for name, total in noisy.items()}


class PrivateMechanism:
    """Executes a plan, step by step, and charges before each.

    Args:
        ledger: the run's ledger, open for writing; CheckpointError where it is of other data or of another plan, or
            shows fewer steps than the checkpoint.
        random: ``SystemRandom()``; anything else makes the run not private.
        attempt: 1 for a stage's first plan, one more for each restart (``--overwrite``); unchanged by a resume.
        start_step: updates that the checkpoint holds; 0 for a fresh start.
        charge_block: steps charged at once. A crash loses at most this many charged steps; larger blocks save fsyncs.

    Guarantee:
        * Steps charged in this attempt, over all resumes, never exceed ``plan.steps``.
        * Everything else in the ledger, composed with the whole plan, is within ``plan.epsilon_target``: checked
          here, before anything is drawn, for every plan (else BudgetError).
        * Each step's batch and noise are drawn after its charge is on disk, and are new after a resume.
    """

    def __init__(
        self,
        plan: PrivatePlan,
        ledger: Ledger,
        random: RandomSource,
        attempt: int = 1,
        start_step: int = 0,
        charge_block: int = 1,
        warn: Warn = warn_by_log,
    ) -> None:
        if charge_block < 1:
            raise UsageError(f"The charge block is {charge_block}.", fix="Give a whole number of at least 1.")
        self.plan, self.attempt, self.charge_block = plan, attempt, charge_block
        self.next_step = start_step
        self._ledger, self._random = ledger, random
        self._charged_ahead = 0
        self._sampler = PoissonSampler(plan.examples, plan.sample_rate, random)
        self._refuse_mismatch(start_step)
        if math.isfinite(plan.epsilon_target):
            others = ledger.stages(besides=[(plan.stage, attempt)])
            fix = "--overwrite, for what is left of the budget." if others else "more noise, or a larger --eps."
            fix, total = f"Plan the stage again with {fix}", [*others, [plan.event]]
            refuse_overspending(plan.stage, total, plan.delta, plan.epsilon_target, fix=fix, warn=warn)

    @property
    def remaining_steps(self) -> int:
        """Steps that can still be made: those not charged yet, and those charged here but not returned yet."""
        return self.plan.steps - self._ledger.charged_steps(self.plan.stage, self.attempt) + self._charged_ahead

    @property
    def private(self) -> bool:
        """False with repeatable randomness or without noise."""
        return self._random.private and self.plan.noise_multiplier > 0

    def steps(self) -> Iterator[PrivateStep]:
        """The remaining steps. Each must be released, also one with an empty batch, before the next."""
        while self.remaining_steps > 0:
            if self._charged_ahead == 0:
                self._charge(min(self.charge_block, self.remaining_steps))
            self._charged_ahead -= 1
            step = PrivateStep(self.next_step, self._sampler.draw(), self.plan, self._random)
            self.next_step += 1
            yield step
            if not step.released:
                raise RuntimeError("a charged step was not released; an empty batch is released as zeros")

    def _charge(self, steps: int) -> None:
        plan = self.plan
        self._ledger.charge(
            stage=plan.stage, attempt=self.attempt, steps=steps, planned=plan.steps, random=self._random.mode,
            noise_multiplier=plan.noise_multiplier, sample_rate=plan.sample_rate, clip_norm=plan.clip_norm,
            noise=plan.noise,
        )  # fmt: skip
        self._charged_ahead = steps

    def _refuse_mismatch(self, start_step: int) -> None:
        plan, ledger = self.plan, self._ledger
        charged = ledger.charged_steps(plan.stage, self.attempt)
        wanted = (plan.noise_multiplier, plan.sample_rate, plan.clip_norm, plan.noise, plan.steps)
        problem = None
        if ledger.examples != plan.examples:
            problem = f"The ledger is of {ledger.examples} examples, the plan of {plan.examples}."
        elif not ledger.last_attempt(plan.stage) <= self.attempt <= ledger.last_attempt(plan.stage) + 1:
            problem = f"Attempt {self.attempt} of stage {plan.stage} does not follow the attempts in the ledger."
        elif any(
            (c.noise_multiplier, c.sample_rate, c.clip_norm, c.noise, c.planned) != wanted
            for c in ledger.charges
            if (c.stage, c.attempt) == (plan.stage, self.attempt)
        ):
            problem = f"The ledger holds steps of stage {plan.stage} of another plan: other noise, rate, clip or steps."
        elif not 0 <= start_step <= charged:
            problem = f"The checkpoint holds {start_step} updates, but only {charged} steps of it were charged."
        if problem:
            fix = "Restore the run's privacy folder and checkpoint together, or --overwrite."
            raise CheckpointError(problem, fix=fix)
