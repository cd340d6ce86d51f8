"""The one place that runs a selection among private trials: what runs is what ``TuningEvent`` accounts.

A ``SelectionPlan`` is public data, saved with the run. A ``PrivateSelection`` carries it out: it charges, draws the
number of trials and never shows it, and hands out the trials one by one. A trial can do what one trial of the theorem
does and no more: it fits on one part of the records and is scored on the other.

    def one_trial(trial):
        for _ in range(trial.steps):
            gradient = trial.release(clipped_sum(records[trial.fitted]))     # zeros for an empty part
        trial.score(is_right(records[trial.held_out]))

    chosen, score = PrivateSelection(plan, ledger, SystemRandom(), attempt=1).run(one_trial)    # charged first

One trial, as the theorem sees it, outputs (score, setting), of which the largest is the best. It is a Gaussian
mechanism of parameter μ at most:

* the setting is drawn at random, without the data, so it may be taken as fixed (quasi-convexity of the divergence);
* each record is put into the fitted or the held-out part by a coin of its own, so given all coins it is in one of them;
* a record of the fitted part is in T clipped sums with noise of multiplier σ = √T/μ: λ T/(2σ²) = λ μ²/2, exactly;
* a record of the held-out part is in one count of right answers, sensitivity 1, noise of std 1/μ: λ μ²/2 again.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from scipy.optimize import brentq

from dprandp.errors import BudgetError, CheckpointError, UsageError
from dprandp.privacy.accounting import Warn, warn_by_log
from dprandp.privacy.adaptive import Stage, compose_stages
from dprandp.privacy.clipping import require_clip_norm
from dprandp.privacy.ledger import Ledger
from dprandp.privacy.mechanism import refuse_overspending, validate_budget
from dprandp.privacy.randomness import RandomSource, add_gaussian_noise
from dprandp.privacy.tuning import TrialCount, TuningEvent

_SMALLEST_MU, _LARGEST_MU = 1e-4, 100.0


@dataclass(frozen=True)
class SelectionPlan:
    """A selection among settings. Everything here is public and chosen before the data are read; else UsageError.

    Args:
        mu: μ of one trial, see the top of this file.
        eta, gamma: distribution of the number of trials, see ``tuning.TrialCount``.
        held_out: chance of a record to be held out in a trial, in (0, 1).
        steps: T ≥ 1 of each setting, at least 2 settings.
        epsilon_target: what the run may have spent in total after this; finite. The rest: as in ``PrivatePlan``.
    """

    stage: str
    examples: int
    mu: float
    eta: float
    gamma: float
    held_out: float
    clip_norm: float
    steps: tuple[int, ...]
    epsilon_target: float
    delta: float

    def __post_init__(self) -> None:
        validate_budget(self.epsilon_target, self.delta, self.examples)
        _ = self.event
        if math.isinf(self.epsilon_target):
            raise UsageError("A selection without a budget is not private.", fix="Give a finite --eps.")
        if not 0 < self.held_out < 1:
            raise UsageError(f"The held-out part is {self.held_out}.", fix="Give a number between 0 and 1.")
        require_clip_norm(self.clip_norm)
        if len(self.steps) < 2 or min(self.steps) < 1:
            raise UsageError(f"Settings with {list(self.steps)} steps.", fix="Give two settings or more, with steps.")

    @property
    def event(self) -> TuningEvent:
        return TuningEvent(self.mu, self.eta, self.gamma)

    @property
    def score_std(self) -> float:
        """1/μ: standard deviation of the noise in a count of right answers."""
        return 1 / self.mu

    def noise_std(self, setting: int) -> float:
        """σ C with σ = √T/μ: standard deviation of the noise in one coordinate of a step's sum."""
        return math.sqrt(self.steps[setting]) / self.mu * self.clip_norm

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"steps": list(self.steps)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> SelectionPlan:
        """The inverse of ``to_dict``. Raises CheckpointError for wrong keys, UsageError for bad values."""
        try:
            return cls(**{**values, "steps": tuple(values["steps"])})
        except (KeyError, TypeError, ValueError) as error:
            problem = "The plan of a tuning has missing, unknown or unreadable entries."
            raise CheckpointError(problem, fix="Restore it from a copy.") from error


def make_selection_plan(
    *,
    stage: str,
    epsilon: float,
    delta: float,
    epsilon_target: float,
    spent: Sequence[Stage],
    examples: int,
    mean_trials: float,
    eta: float,
    held_out: float,
    clip_norm: float,
    steps: Sequence[int],
    warn: Warn = warn_by_log,
) -> SelectionPlan:
    """The plan after which the run has spent at most ``epsilon_target``, with the largest μ that was found.

    Args:
        epsilon_target: cumulative ε that may be spent once this is done, at most ``epsilon``, finite. BudgetError where
            what was spent reaches it or leaves too little, or another stage came first.
        mean_trials: expected number of trials, above 1.
        spent, warn: as for ``mechanism.make_plan``. The rest: as in ``SelectionPlan`` and ``TrialCount``.

    Guarantee:
        ``compose_stages([*spent, [plan.event]], delta).upper <= epsilon_target``. No data are read.
    """
    validate_budget(epsilon, delta, examples)
    if not 0 < epsilon_target <= epsilon or math.isinf(epsilon_target):
        raise UsageError(
            f"The selection may spend up to ε = {epsilon_target}, of a total of {epsilon}.",
            fix="Give a finite --eps and a part of it above 0, at most 1.",
        )
    if any(True for stage in spent for _ in stage):
        raise BudgetError(
            "This run has used its private data already; what tuning costs is proven where it comes first, and once.",
            fix="Tune before the first private stage, in a new run; or tune on synthetic images, which costs nothing.",
        )
    trials = TrialCount.with_mean(mean_trials, eta)

    def upper(mu: float) -> float:
        return compose_stages([*spent, [TuningEvent(mu, trials.eta, trials.gamma)]], delta, warn).upper

    if upper(_SMALLEST_MU) > epsilon_target:
        raise BudgetError(
            f"Tuning may bring this run to ε = {epsilon_target:.4g}, which with what is spent already is too little.",
            fix="Give tuning a larger part of the budget, or tune on synthetic images, which costs nothing.",
        )
    mu = _LARGEST_MU
    if upper(mu) > epsilon_target:
        log_mu = brentq(
            lambda value: upper(math.exp(value)) - epsilon_target, math.log(_SMALLEST_MU), math.log(mu), xtol=1e-6
        )
        mu = math.exp(log_mu)
        while upper(mu) > epsilon_target:
            mu *= 1 - 1e-6
    return SelectionPlan(
        stage, examples, mu, trials.eta, trials.gamma, held_out, clip_norm, tuple(steps), epsilon_target, delta
    )


class Trial:
    """One trial of a selection: a setting, drawn at random, its number of steps, and two parts of the records.

    ``fitted`` and ``held_out``, int64, rising, are private; ``expected_fitted`` = (1 − h) N is the public divisor.
    """

    def __init__(self, plan: SelectionPlan, random: RandomSource) -> None:
        self.setting = int(random.uniform(1)[0] * len(plan.steps))
        self.steps = plan.steps[self.setting]
        held = random.uniform(plan.examples) < plan.held_out
        self.fitted, self.held_out = np.flatnonzero(~held), np.flatnonzero(held)
        self.expected_fitted = (1 - plan.held_out) * plan.examples
        self._plan, self._random = plan, random
        self._steps_left = self.steps
        self._score: float | None = None

    def release(self, clipped_sum: torch.Tensor) -> torch.Tensor:
        """(sum + N(0, (σC)² I)) / ((1 − h) N), at most ``steps`` times, of a sum over ``fitted`` alone.

        RuntimeError for more steps than planned, a step after the score, or a sum that is not finite.
        """
        if self._steps_left < 1 or self._score is not None:
            raise RuntimeError("a trial made a step that was not planned")
        if not bool(torch.isfinite(clipped_sum).all()):
            raise RuntimeError("the clipped sum of a trial's step is not finite: it was not clipped as planned")
        self._steps_left -= 1
        (noisy,) = add_gaussian_noise([clipped_sum], self._plan.noise_std(self.setting), self._random)
        return noisy / self.expected_fitted

    def score(self, right: torch.Tensor) -> None:
        """Count the held-out records that were answered right, with noise; once, after the last step.

        ``right``: bool [len(held_out)], entry i a function of record ``held_out[i]`` and of released things alone.
        """
        if self._steps_left or self._score is not None:
            raise RuntimeError("a trial is scored once, after all of its steps")
        if right.dtype != torch.bool or right.shape != (len(self.held_out),):
            raise RuntimeError("a trial's score takes one bool for each held-out record")
        self._score = float(right.sum()) + self._plan.score_std * float(self._random.gaussian((1,))[0])

    @property
    def outcome(self) -> tuple[float, int]:
        """(score, setting): all that the theorem lets a trial hand over."""
        if self._score is None:
            raise RuntimeError("a trial ended without a score")
        return self._score, self.setting


class PrivateSelection:
    """Carries out a plan: charges once, runs the trials, returns the best.

    ``random``: ``SystemRandom()``; anything else makes the run not private. ``attempt``: one more than the ledger's
    last of this stage: a selection is never resumed, only charged again.

    Guarantee:
        The result of ``run`` costs ``plan.event``, charged before any trial is returned, however many trials there are.
        That number is not returned, stored or logged; who can time the run learns something of it (``randomness``).

    Raises:
        BudgetError: the plan does not fit into its target beside what the ledger holds.
        CheckpointError: the ledger is of other data, or the attempt does not follow.
    """

    def __init__(
        self, plan: SelectionPlan, ledger: Ledger, random: RandomSource, attempt: int, warn: Warn = warn_by_log
    ) -> None:
        if ledger.examples != plan.examples or attempt != ledger.last_attempt(plan.stage) + 1:
            raise CheckpointError(
                f"The ledger is of {ledger.examples} examples and has {ledger.last_attempt(plan.stage)} selections; "
                f"the plan is of {plan.examples} examples, attempt {attempt}.",
                fix="Restore the run's privacy folder.",
            )
        total = [*ledger.stages(), [plan.event]]
        fix = "Give tuning a larger part of the budget, or tune on synthetic images."
        refuse_overspending(plan.stage, total, plan.delta, plan.epsilon_target, fix=fix, warn=warn)
        self._plan, self._ledger, self._random, self._attempt = plan, ledger, random, attempt

    def run(self, one_trial: Callable[[Trial], None]) -> tuple[int, float]:
        """Charge, run the trials, keep the best: the index of its setting, and its noisy number of right answers.

        ``one_trial`` makes a trial's steps and scores it; it must keep nothing of one trial for another. RuntimeError
        where a trial did not do what was planned; what was spent stays spent.
        """
        plan = self._plan
        self._ledger.charge_tuning(
            stage=plan.stage, attempt=self._attempt, event=plan.event, random=self._random.mode
        )
        count = plan.event.trials.draw(float(self._random.uniform(1)[0]))
        outcomes = []
        for _ in range(count):
            trial = Trial(plan, self._random)
            one_trial(trial)
            outcomes.append(trial.outcome)
        score, setting = max(outcomes)
        return setting, score
