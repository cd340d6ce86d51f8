"""What is tried on one mechanism of a run: replays, two worlds, one run, and the controls; each as plain values.

Everything here works on public records (``audit_run`` adds the replay on private ones, where that is asked for).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dprandp.audit.loops import canary_run, make_head_records, one_thread, replay_head, scratch_folder
from dprandp.errors import UsageError
from dprandp.privacy.accounting import GaussianEvent, compose
from dprandp.privacy.auditing.controls import CONTROLS, FAITHFUL, Control, dirac_scores, trial_mu, trial_steps
from dprandp.privacy.auditing.games import (
    choose_guesses,
    largest_bound,
    one_run_bound,
    two_world_bound,
    two_world_power,
)
from dprandp.privacy.auditing.replay import Check
from dprandp.privacy.mechanism import PrivatePlan

SIGNIFICANCE = 1e-3
"""Of each lower bound: how often a sound mechanism may be accused."""

CONTROL_TRIALS = 1000
"""Trials a world for each control; the faults are gross."""

FACTORS = (1.0, 1.2, 1.5, 2.0)
"""Noise too small by so much: what the two-world test would see is simulated for each."""

RECORD_KINDS = ("ordinary", "long", "broken")


@dataclass(frozen=True)
class AuditSettings:
    """How much is tried.

    Attributes:
        trials: of the two-world test, a world.
        canaries: of the one-run test.
        controls: whether the controls are run.
        seed: public randomness: labels, which canaries are in, simulated power. Never the noise.
        with_data: replay on the run's private data as well.
    """

    trials: int = 5000
    canaries: int = 1000
    controls: bool = True
    seed: int = 0
    with_data: bool = False

    def __post_init__(self) -> None:
        for name, value, low, high in (
            ("trials", self.trials, 100, 1_000_000), ("canaries", self.canaries, 20, 20_000),
            ("seed", self.seed, 0, 2**63 - 1),
        ):  # fmt: skip
            if not low <= value <= high:
                raise UsageError(f"--{name} {value} is out of range", fix=f"give a number from {low} to {high}")


def try_mechanism(
    plan: PrivatePlan, features: Tensor, classes: int, settings: AuditSettings, advance: Callable[[], None]
) -> dict[str, Any]:
    """Everything that is tried on one mechanism, through the head's loop.

    Args:
        plan: what was accounted.
        features: float [n, d] public features.
        classes: number of classes.
        settings: how much is tried.
        advance: called after each of ``units(settings)`` pieces of work.

    Returns:
        name, plan, epsilon_claimed, delta, replay, two_world, one_run, controls: JSON values. ``flagged`` in each part
        says whether it contradicts the claim.
    """
    with one_thread():
        return _try_mechanism(plan, features, classes, settings, advance)


def _try_mechanism(
    plan: PrivatePlan, features: Tensor, classes: int, settings: AuditSettings, advance: Callable[[], None]
) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(settings.seed)
    claimed = compose([plan.event], plan.delta).upper
    replay = _replay(plan, features, classes, FAITHFUL, generator)
    advance()
    two_world = _two_world(plan, settings)
    advance()
    one_run = _one_run(plan, features, classes, claimed, settings, generator)
    advance()
    controls = []
    for control in CONTROLS if settings.controls else ():
        if control.applies(plan):
            controls.append(_control(plan, features, classes, control, generator))
        advance()
    return {
        "name": plan.stage,
        "plan": plan.to_dict(),
        "epsilon_claimed": claimed,
        "delta": plan.delta,
        "replay": {"head": replay, "flagged": not passed(replay)},
        "two_world": two_world,
        "one_run": one_run,
        "controls": controls,
    }


def units(settings: AuditSettings) -> int:
    """Pieces of work for one mechanism."""
    return 3 + len(CONTROLS) * settings.controls


def passed(checks: list[dict[str, Any]]) -> bool:
    """Whether every check of a replay holds."""
    return all(check["passed"] for check in checks)


def as_values(checks: list[Check], on: str) -> list[dict[str, Any]]:
    """Checks as JSON values, with what they were tried on."""
    return [{"on": on, **asdict(check), "passed": bool(check.passed)} for check in checks]


def _replay(
    plan: PrivatePlan, features: Tensor, classes: int, control: Control, generator: torch.Generator
) -> list[dict[str, Any]]:
    found = []
    for kind in RECORD_KINDS if control is FAITHFUL else ("long",):
        records = make_head_records(features, classes, plan, kind, generator)
        found += as_values(replay_head(plan, records, control), f"{kind} record")
    return found


def _two_world(plan: PrivatePlan, settings: AuditSettings) -> dict[str, Any]:
    """The test at full size, what it proves about ε, and what it could have seen."""
    steps = trial_steps(plan)
    claimed = trial_mu(plan, steps)
    with scratch_folder() as folder:
        scores = dirac_scores(plan, settings.trials, steps, folder)
    bound = two_world_bound(*scores, SIGNIFICANCE)
    power = two_world_power(claimed, settings.trials, SIGNIFICANCE, FACTORS, settings.seed, repeats=20)
    return {
        "trials": settings.trials,
        "steps": steps,
        "mu_claimed": claimed,
        "mu_lower": bound.mu_lower,
        "mu_largest": largest_bound(settings.trials, SIGNIFICANCE),
        "epsilon_lower": implied_epsilon(plan, bound.mu_lower / math.sqrt(steps)),
        "significance": SIGNIFICANCE,
        "power": [asdict(entry) for entry in power],
        "flagged": bound.mu_lower > claimed,
    }


def implied_epsilon(plan: PrivatePlan, mu_step: float) -> float:
    """ε of the whole composition if each step were exactly ``mu_step``-GDP towards a record that it holds.

    A lower bound on the plan's ε wherever ``mu_step`` is one on the step's μ and the noise is Gaussian.
    """
    if mu_step <= 0:
        return 0.0
    bound = compose([GaussianEvent(1 / mu_step, plan.sample_rate, plan.steps)], plan.delta, warn=lambda text: None)
    return bound.lower


def _one_run(
    plan: PrivatePlan,
    features: Tensor,
    classes: int,
    claimed: float,
    settings: AuditSettings,
    generator: torch.Generator,
) -> dict[str, Any]:
    guesses, could_show = choose_guesses(
        lambda random: ideal_scores(plan, settings.canaries, random), plan.delta, SIGNIFICANCE, settings.seed
    )
    included = np.random.default_rng(settings.seed + 1).random(settings.canaries) < 0.5
    scores = canary_run(plan, features, classes, included, generator)
    bound = one_run_bound(scores, included, guesses, plan.delta, SIGNIFICANCE)
    return {
        "canaries": settings.canaries,
        "guesses": guesses,
        "correct": bound.correct,
        "epsilon_lower": bound.epsilon_lower,
        "epsilon_could_show": could_show,
        "significance": SIGNIFICANCE,
        "flagged": bound.epsilon_lower > claimed,
    }


def ideal_scores(plan: PrivatePlan, canaries: int, random: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """What ``canary_run`` returns for a mechanism that keeps its claim exactly, simulated: (scores, included)."""
    included = random.random(canaries) < 0.5
    held = random.binomial(plan.steps, plan.sample_rate, canaries) * included
    return random.standard_normal(canaries) + held / (plan.noise_multiplier * math.sqrt(plan.steps)), included


def _control(
    plan: PrivatePlan, features: Tensor, classes: int, control: Control, generator: torch.Generator
) -> dict[str, Any]:
    """Whether one fault is flagged, and by which test."""
    by = [] if passed(_replay(plan, features, classes, control, generator)) else ["replay"]
    steps = trial_steps(plan)
    with scratch_folder() as folder:
        scores = dirac_scores(plan, CONTROL_TRIALS, steps, folder, control)
    mu_lower = two_world_bound(*scores, SIGNIFICANCE).mu_lower
    if mu_lower > trial_mu(plan, steps):
        by.append("two worlds")
    return {"name": control.name, "flagged": bool(by), "by": by, "mu_lower": mu_lower}
