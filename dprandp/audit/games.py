"""What is tried on one mechanism of a run: replays, the distinguishing game, one run, controls; each as plain values.

Everything here works on public records (``audit_run`` adds the replay on private ones, where that is asked for).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dprandp.audit.loops import head_game_scores, make_head_records, one_thread, replay_head, scratch_folder
from dprandp.errors import UsageError
from dprandp.privacy.accounting import GaussianEvent, compose, gaussian_mu
from dprandp.privacy.auditing.controls import (
    CONTROLS,
    FAITHFUL,
    SELECTION_CONTROL,
    Control,
    canary_scores,
    game_scores,
    seconds_of,
    seen_noise,
    selection_answers,
    selection_evidence,
    trial_event,
    trial_game_scores,
)
from dprandp.privacy.auditing.games import (
    Claim,
    Game,
    choose_game,
    choose_guesses,
    expected_factor,
    game_power,
    largest_factor,
    one_run_bound,
    plain_bound,
    play,
)
from dprandp.privacy.auditing.replay import Check
from dprandp.privacy.mechanism import PrivatePlan
from dprandp.privacy.selection import SelectionPlan

SIGNIFICANCE = 1e-3
"""Of each lower bound: how often a sound mechanism may be accused."""

CONTROL_TRIALS = 1000
"""Trials a world for each control; the faults are gross."""

SURE = 1 - 1e-6
"""Chance that a game sees the fault of a control which nothing else looks for."""

FACTORS = (1.0, 1.1, 1.2, 1.5, 2.0)
"""Noise too small by so much: what the game would see is worked out for each."""

RECORD_KINDS = ("ordinary", "long", "broken")

WANTED, NEEDED = 0.95, 0.85
"""What the game is to show, as a part of the claimed ε: the first if that takes ``PATIENCE`` seconds at most, never
less than the second. Bounds of sampled steps come out .02 to .03 lower, which is the accountant's own error."""

PATIENCE = 60.0
MOST_TRIALS = 20_000_000
MOST_CANARIES = 200_000
SELECTIONS, MOST_TRIAL_GAMES = 2000, 100_000
"""Paid tunings with and as many without the canary; and the most games on single trials of one, both together."""

GAME = "distinguishing game"


@dataclass(frozen=True)
class AuditSettings:
    """How much is tried.

    Attributes:
        trials: of the distinguishing game, with the canary and as many without; None: as many as the claim needs.
        canaries: of the one run; None: as many as the game has trials, at most 200,000.
        controls: whether the controls are run.
        seed: public randomness: labels, which canaries are in, simulated power. Never the noise.
        with_data: replay on the run's private data as well.
        black_box: play the game on released heads too, where a mechanism fits one on full batches.
        images: images of one made-up record: more than 1 where the run protects units of several.
    """

    trials: int | None = None
    canaries: int | None = None
    controls: bool = True
    seed: int = 0
    with_data: bool = False
    black_box: bool = False
    images: int = 1

    def __post_init__(self) -> None:
        for name, value, low, high in (
            ("trials", self.trials, 100, MOST_TRIALS), ("canaries", self.canaries, 20, MOST_CANARIES),
            ("seed", self.seed, 0, 2**63 - 1),
        ):  # fmt: skip
            if value is not None and not low <= value <= high:
                raise UsageError(f"--{name} {value} is out of range", fix=f"give a number from {low} to {high}")


Say = Callable[[str], None]


def try_mechanism(
    plan: PrivatePlan | SelectionPlan,
    features: Tensor,
    classes: int,
    settings: AuditSettings,
    advance: Callable[[], None],
    say: Say = lambda text: None,
) -> dict[str, Any]:
    """Everything that is tried on one mechanism, through the head's loop; of paid tuning, a game on what it selects.

    Args:
        plan: what was accounted.
        features: float [n, d] public features.
        classes: number of classes.
        settings: how much is tried.
        advance: called after each of ``units(settings)`` pieces of work.
        say: told how long the game will take.

    Returns:
        name, plan, epsilon_claimed, delta, replay, two_world (the distinguishing game), one_run, controls, and
        black_box where that was asked for: JSON values. ``flagged`` in each part says whether it contradicts the claim;
        ``ratio`` is the bound over the claim.
    """
    with one_thread():
        if isinstance(plan, SelectionPlan):
            found = _try_selection(plan, settings)
            for _ in range(units(settings)):
                advance()
            return found
        return _try_mechanism(plan, features, classes, settings, advance, say)


def _try_mechanism(
    plan: PrivatePlan, features: Tensor, classes: int, settings: AuditSettings, advance: Callable[[], None], say: Say
) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(settings.seed)
    claimed = compose([plan.event], plan.delta).upper
    replay = _replay(plan, features, classes, FAITHFUL, generator, settings.images)
    advance()
    two_world, game = _game(plan, claimed, settings, say)
    advance()
    one_run = _one_run(plan, claimed, game, settings)
    advance()
    controls = []
    for control in CONTROLS if settings.controls else ():
        if control.applies(plan):
            controls.append(_control(plan, features, classes, control, generator))
        advance()
    found = {
        "name": plan.stage,
        "plan": plan.to_dict(),
        "epsilon_claimed": claimed,
        "delta": plan.delta,
        "replay": {"head": replay, "flagged": not passed(replay)},
        "two_world": two_world,
        "one_run": one_run,
        "controls": controls,
    }
    if settings.black_box and plan.sample_rate == 1 and plan.stage in HEAD_STAGES:
        found["black_box"] = _black_box(plan, claimed, game, settings)
    return found


HEAD_STAGES = ("plan", "probe", "finetune.head")
"""Mechanisms that fit a head."""


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
    plan: PrivatePlan, features: Tensor, classes: int, control: Control, generator: torch.Generator, images: int = 1
) -> list[dict[str, Any]]:
    found = []
    for kind in RECORD_KINDS if control is FAITHFUL else ("long",):
        records = make_head_records(features, classes, plan, kind, generator, images)
        found += as_values(replay_head(plan, records, control), f"{kind} record")
    return found


def _game_for(plan: PrivatePlan, claim: Claim, settings: AuditSettings) -> Game:
    """As many trials as were asked for, or as the claim needs."""
    wanted = choose_game(claim, WANTED, SIGNIFICANCE)
    if settings.trials is not None:
        return Game.of(wanted.threshold, 2 * settings.trials)
    if seconds_of(plan, wanted.trials) > PATIENCE:
        needed = choose_game(claim, NEEDED, SIGNIFICANCE)
        affordable = int(wanted.trials * PATIENCE / seconds_of(plan, wanted.trials))
        wanted = Game.of(wanted.threshold, max(needed.trials, affordable))
    return Game.of(wanted.threshold, min(2 * MOST_TRIALS, wanted.trials))


def _game(plan: PrivatePlan, claimed: float, settings: AuditSettings, say: Say) -> tuple[dict[str, Any], Game]:
    """The distinguishing game, what it proves about ε, and what it could have seen."""
    started = time.perf_counter()
    claim, whole = Claim(trial_event(plan), plan.delta), Claim(plan.event, plan.delta)
    game = _game_for(plan, claim, settings)
    about = seconds_of(plan, game.trials)
    say(f"audit of {plan.stage}: {game.trials:,} trials of {claim.event.steps} steps, about {math.ceil(about)} s")
    with scratch_folder() as folder:
        scores = game_scores(plan, game, folder)
    bound = play(game, *scores, claim, SIGNIFICANCE)
    mu = math.sqrt(claim.event.steps) / plan.noise_multiplier
    lower = whole.epsilon(bound.factor)
    return {
        "trials": round(game.trials / 2),
        "trials_with": game.having,
        "trials_without": game.without,
        "threshold": game.threshold,
        "steps": claim.event.steps,
        "errors": bound.false_positives + bound.false_negatives,
        "delta_seen": bound.delta_seen,
        "delta_claimed": claim.curve(1.0, game.threshold),
        "mu_claimed": mu,
        "mu_lower": bound.factor * mu,
        "mu_largest": largest_factor(game, claim, SIGNIFICANCE) * mu,
        "epsilon_lower": lower,
        "epsilon_expected": whole.epsilon(expected_factor(game, claim, SIGNIFICANCE)),
        "ratio": lower / claimed,
        "significance": SIGNIFICANCE,
        "power": [asdict(entry) for entry in game_power(game, claim, SIGNIFICANCE, FACTORS, settings.seed)],
        "seconds_estimated": about,
        "seconds": time.perf_counter() - started,
        "flagged": bound.factor > 1,
    }, game


def _one_run(plan: PrivatePlan, claimed: float, game: Game, settings: AuditSettings) -> dict[str, Any]:
    """One run of the mechanism with many canaries, judged twice: without and with independence of its coordinates."""
    started = time.perf_counter()
    claim, whole = Claim(trial_event(plan), plan.delta), Claim(plan.event, plan.delta)
    canaries = settings.canaries or min(MOST_CANARIES, game.trials)
    guesses, could_show = choose_guesses(claim, canaries, SIGNIFICANCE, settings.seed)
    included = np.random.default_rng(settings.seed + 1).random(canaries) < 1 / (1 + math.exp(game.threshold))
    coins = included if game.threshold == 0 else np.random.default_rng(settings.seed + 2).random(canaries) < 0.5
    with scratch_folder() as folder:
        noise = seen_noise(plan, folder)
        scores = canary_scores(plan, coins, folder, noise=noise)
        bound = one_run_bound(scores, coins, guesses, claim, SIGNIFICANCE)
        if coins is not included:
            scores = canary_scores(plan, included, folder, noise=noise)
    sides = Game(game.threshold, int(included.sum()), int((~included).sum()))
    independent = play(sides, scores[~included], scores[included], claim, SIGNIFICANCE)
    lower, other = whole.epsilon(bound.factor), whole.epsilon(independent.factor)
    return {
        "canaries": canaries,
        "guesses": guesses,
        "correct": bound.correct,
        "epsilon_lower": lower,
        "epsilon_could_show": whole.epsilon(could_show),
        "ratio": lower / claimed,
        "epsilon_lower_if_independent": other,
        "ratio_if_independent": other / claimed,
        "significance": SIGNIFICANCE,
        "seconds": time.perf_counter() - started,
        "flagged": bound.factor > 1,
    }


def _control(
    plan: PrivatePlan, features: Tensor, classes: int, control: Control, generator: torch.Generator
) -> dict[str, Any]:
    """Whether one fault is flagged, and by which test."""
    by = [] if passed(_replay(plan, features, classes, control, generator)) else ["replay"]
    claim = Claim(trial_event(plan), plan.delta)
    game = Game.of(choose_game(claim, NEEDED, SIGNIFICANCE).threshold, 2 * CONTROL_TRIALS)
    with scratch_folder() as folder:
        bound = play(game, *game_scores(plan, game, folder, control), claim, SIGNIFICANCE)
    if bound.factor > 1:
        by.append(GAME)
    mu = math.sqrt(claim.event.steps) / plan.noise_multiplier
    return {"name": control.name, "flagged": bool(by), "by": by, "mu_lower": bound.factor * mu}


MOST_HEADS = 100_000
"""Canaries in released heads, at most."""


def _black_box(plan: PrivatePlan, claimed: float, game: Game, settings: AuditSettings) -> dict[str, Any]:
    """The game with nothing but the released head of the whole loop to look at: worst record, worst beginning."""
    started = time.perf_counter()
    claim = Claim(plan.event, plan.delta)
    small = Game.of(0.0, min(MOST_HEADS, game.trials))
    without, having, signal = head_game_scores(plan, small)
    bound = play(small, without, having, claim, SIGNIFICANCE)
    lower = claim.epsilon(bound.factor)
    return {
        "trials": round(small.trials / 2),
        "epsilon_lower": lower,
        "epsilon_attainable": compose(
            [GaussianEvent(1 / (signal * gaussian_mu([plan.event])), 1.0, 1)], plan.delta).upper,
        "ratio": lower / claimed,
        "power": [asdict(one) for one in game_power(small, claim, SIGNIFICANCE, FACTORS, settings.seed, signal)],
        "significance": SIGNIFICANCE,
        "seconds": time.perf_counter() - started,
        "flagged": bound.factor > 1,
    }  # fmt: skip


# --------------------------------------------------------------------------------------------------------- paid tuning


def selection_control_game(claim: Claim) -> Game:
    """The smallest game, from ``CONTROL_TRIALS`` on and by doubling, that all but surely sees noise of a tenth.

    No paired run looks at this fault, so the game alone has to: the smaller the claim, the more trials it takes.
    """
    trials = 2 * CONTROL_TRIALS
    while trials < MOST_TRIAL_GAMES:
        if game_power(Game.of(0.0, trials), claim, SIGNIFICANCE, (10.0,), 0)[0].flagged > SURE:
            break
        trials *= 2
    return Game.of(0.0, trials)


def _try_selection(plan: SelectionPlan, settings: AuditSettings) -> dict[str, Any]:
    """Games on single trials and on what paid tuning selects, as ``try_mechanism`` returns them.

    A trial's claim is μ, an exact curve, against which ``trials`` are judged. That of the selection is Rényi DP, an
    upper bound, so ``epsilon_lower`` is that of any mechanism (``plain_bound``) and far from it.
    """
    started = time.perf_counter()
    claimed = compose([plan.event], plan.delta).upper
    claim = Claim(GaussianEvent(1 / plan.mu, 1.0, 1), plan.delta)
    game = Game.of(0.0, 2 * settings.trials if settings.trials else min(
        MOST_TRIAL_GAMES, choose_game(claim, NEEDED, SIGNIFICANCE).trials))  # fmt: skip
    parts, power = {}, [asdict(one) for one in game_power(game, claim, SIGNIFICANCE, FACTORS, settings.seed)]
    for name, held_out in (("fitted", False), ("held_out", True)):
        found = play(game, *trial_game_scores(plan, game, held_out), claim, SIGNIFICANCE)
        lower = found.factor * plan.mu
        parts[name] = {"trials": round(game.trials / 2), "mu_claimed": plan.mu, "mu_lower": lower,
                       "ratio": found.factor, "power": power, "flagged": found.factor > 1}  # fmt: skip
    count = min(SELECTIONS, settings.trials or SELECTIONS)
    evidence, expected = selection_evidence(plan, count, SIGNIFICANCE, settings.seed)
    with scratch_folder() as folder:
        answers = [selection_answers(plan, count, there, evidence, folder) for there in (False, True)]
    lower = plain_bound(*answers, count, count, plan.delta, SIGNIFICANCE)
    controls = []
    if settings.controls:
        few = selection_control_game(claim)
        seen = all(
            play(few, *trial_game_scores(plan, few, held_out, faulty=True), claim, SIGNIFICANCE).factor > 1
            for held_out in (False, True)
        )
        by = [GAME] if seen else []
        controls = [{"name": SELECTION_CONTROL, "flagged": seen, "by": by, "mu_lower": None}]
    return {
        "name": plan.stage,
        "plan": plan.to_dict(),
        "epsilon_claimed": claimed,
        "delta": plan.delta,
        "replay": {"head": [], "flagged": False},
        "two_world": {
            "trials": count,
            "one_trial": parts,
            "mu_claimed": plan.mu,
            "epsilon_lower": lower,
            "epsilon_expected": expected,
            "ratio": lower / claimed,
            "significance": SIGNIFICANCE,
            "power": power,
            "seconds": time.perf_counter() - started,
            "flagged": lower > claimed or any(part["flagged"] for part in parts.values()),
        },
        "one_run": None,
        "controls": controls,
    }
