"""What is tried on one mechanism of a run: replays, the distinguishing game, one run, controls.

Everything here works on public records (``loops`` adds the replay on private ones, where that is asked for).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dprandp.audit.bounds import (
    MOST_CANARIES,
    MOST_TRIALS,
    SIGNIFICANCE,
    AuditSettings,
    Claim,
    Game,
    Power,
    choose_game,
    choose_guesses,
    game_power,
    one_run_bound,
    plain_bound,
    play,
)
from dprandp.audit.canaries import (
    CONTROLS,
    FAITHFUL,
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
from dprandp.audit.loops import (
    ControlFound,
    Labels,
    Tried,
    head_game_scores,
    make_head_records,
    one_thread,
    passed,
    replay_head,
    tried_on,
)
from dprandp.audit.replay import scratch_folder
from dprandp.privacy.accounting import GaussianEvent, compose, gaussian_mu
from dprandp.privacy.mechanism import PrivatePlan
from dprandp.privacy.selection import SelectionPlan

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
MOST_HEADS = 100_000
"""Canaries in released heads, at most."""

SELECTIONS, MOST_TRIAL_GAMES = 2000, 100_000
"""Tunings with and as many without the canary; and the most games on single trials of one, both together."""

GAME = "distinguishing game"
HEAD_STAGES = ("plan", "probe", "finetune.head")
"""Mechanisms that fit a head."""


@dataclass(frozen=True, kw_only=True)
class GameFound:
    """The distinguishing game: what it proves about ε, and what it could have seen."""

    trials: int  # with the record, and as many without, about
    trials_with: int
    trials_without: int
    threshold: float
    steps: int
    errors: int
    delta_seen: float
    delta_claimed: float
    mu_claimed: float
    mu_lower: float
    mu_largest: float  # that it could prove
    epsilon_lower: float
    epsilon_expected: float  # that it proves of a faithful mechanism
    ratio: float  # lower bound over claim
    significance: float
    power: list[Power]
    seconds_estimated: float
    seconds: float
    flagged: bool  # contradicts the claim


@dataclass(frozen=True, kw_only=True)
class TrialFound:
    """The game on single trials of private tuning."""

    trials: int
    mu_claimed: float
    mu_lower: float
    ratio: float
    power: list[Power]
    flagged: bool


@dataclass(frozen=True, kw_only=True)
class SelectionFound:
    """The games on private tuning; ``ratio`` and ``epsilon_lower`` are of what it selects."""

    trials: int  # tunings with the canary, and as many without
    one_trial: dict[str, TrialFound]  # fitted, held_out
    mu_claimed: float  # of a trial
    epsilon_lower: float
    epsilon_expected: float
    ratio: float
    significance: float
    power: list[Power]
    seconds: float
    flagged: bool


@dataclass(frozen=True, kw_only=True)
class OneRunFound:
    """One run of the mechanism with many canaries, judged twice: without and with independence of its coordinates."""

    canaries: int
    guesses: int
    correct: int
    epsilon_lower: float
    epsilon_could_show: float
    ratio: float
    epsilon_lower_if_independent: float
    ratio_if_independent: float
    significance: float
    seconds: float
    flagged: bool


@dataclass(frozen=True, kw_only=True)
class BlackBoxFound:
    """The game with nothing but the released head of the whole loop to look at: worst record, worst beginning."""

    trials: int
    epsilon_lower: float
    epsilon_attainable: float
    ratio: float
    power: list[Power]
    significance: float
    seconds: float
    flagged: bool


@dataclass(frozen=True, kw_only=True)
class Found:
    """Everything that was tried on one mechanism."""

    name: str
    plan: dict[str, Any]  # as in plan.json
    epsilon_claimed: float
    delta: float
    replay: dict[str, Any]  # loop (head, finetune, continue) -> its checks; flagged; private_data: passed or failed
    two_world: GameFound | SelectionFound
    one_run: OneRunFound | None  # None for private tuning
    controls: list[ControlFound]
    black_box: BlackBoxFound | None = None
    attempt: int | None = None  # of a run's mechanism


def units(settings: AuditSettings) -> int:
    """Pieces of work for one mechanism."""
    return 3 + len(CONTROLS) * settings.controls


def try_mechanism(
    plan: PrivatePlan | SelectionPlan,
    features: Tensor,
    labels: Labels,
    settings: AuditSettings,
    advance: Callable[[], None],
    say: Callable[[str], None] = lambda text: None,
) -> Found:
    """Everything that is tried on one mechanism, through the head's loop; of private tuning, games on what it selects.

    Args:
        plan: what was accounted.
        features: float [n, d] public features.
        labels: what is known about them.
        advance: called after each of ``units(settings)`` pieces of work.
        say: told how long the game will take.
    """
    claimed = compose([plan.event], plan.delta).upper
    with one_thread():
        if isinstance(plan, SelectionPlan):
            found = _try_selection(plan, claimed, settings)
            for _ in range(units(settings)):
                advance()
            return found
        generator = torch.Generator().manual_seed(settings.seed)
        replay = _replay(plan, features, labels, FAITHFUL, generator, settings.images)
        advance()
        two_world, game = _game(plan, claimed, settings, say)
        advance()
        one_run = _one_run(plan, claimed, game, settings)
        advance()
        controls = []
        for control in CONTROLS if settings.controls else ():
            if control.applies(plan):
                controls.append(_control(plan, features, labels, control, generator))
            advance()
        black_box = None
        if settings.black_box and plan.sample_rate == 1 and plan.stage in HEAD_STAGES:
            black_box = _black_box(plan, claimed, game, settings)
        return Found(
            name=plan.stage,
            plan=plan.to_dict(),
            epsilon_claimed=claimed,
            delta=plan.delta,
            replay={"head": replay, "flagged": not passed(replay)},
            two_world=two_world,
            one_run=one_run,
            controls=controls,
            black_box=black_box,
        )


def _replay(
    plan: PrivatePlan, features: Tensor, labels: Labels, control: Control, generator: torch.Generator, images: int = 1
) -> list[Tried]:
    found = []
    for kind in RECORD_KINDS if control is FAITHFUL else ("long",):
        records = make_head_records(features, labels, plan, kind, generator, images)
        found += tried_on(replay_head(plan, records, control=control), f"{kind} record")
    return found


def _game_for(plan: PrivatePlan, claim: Claim, settings: AuditSettings) -> Game:
    """As many trials as were asked for, or as the claim needs."""
    wanted = choose_game(claim, WANTED, SIGNIFICANCE)
    if settings.trials is not None:
        return Game.of(wanted.threshold, 2 * settings.trials)
    trials = wanted.trials
    if seconds_of(plan, trials) > PATIENCE:
        affordable = int(trials * PATIENCE / seconds_of(plan, trials))
        trials = max(choose_game(claim, NEEDED, SIGNIFICANCE).trials, affordable)
    return Game.of(wanted.threshold, min(2 * MOST_TRIALS, trials))


def _game(
    plan: PrivatePlan, claimed: float, settings: AuditSettings, say: Callable[[str], None]
) -> tuple[GameFound, Game]:
    started = time.perf_counter()
    claim, whole = Claim(trial_event(plan), plan.delta), Claim(plan.event, plan.delta)
    game = _game_for(plan, claim, settings)
    about = seconds_of(plan, game.trials)
    say(f"audit of {plan.stage}: {game.trials:,} trials of {claim.event.steps} steps, about {math.ceil(about)} s")
    with scratch_folder() as folder:
        bound = play(game, *game_scores(plan, game, folder), claim, SIGNIFICANCE)
    mu = math.sqrt(claim.event.steps) / plan.noise_multiplier
    lower = whole.epsilon(bound.factor)
    return GameFound(
        trials=round(game.trials / 2),
        trials_with=game.having,
        trials_without=game.without,
        threshold=game.threshold,
        steps=claim.event.steps,
        errors=bound.errors,
        delta_seen=bound.delta_seen,
        delta_claimed=claim.curve(1.0, game.threshold),
        mu_claimed=mu,
        mu_lower=bound.factor * mu,
        mu_largest=game.proves(0, claim, SIGNIFICANCE)[0] * mu,
        epsilon_lower=lower,
        epsilon_expected=whole.epsilon(game.proves(game.expected_errors(claim), claim, SIGNIFICANCE)[0]),
        ratio=lower / claimed,
        significance=SIGNIFICANCE,
        power=game_power(game, claim, SIGNIFICANCE, FACTORS, settings.seed),
        seconds_estimated=about,
        seconds=time.perf_counter() - started,
        flagged=bound.factor > 1,
    ), game


def _one_run(plan: PrivatePlan, claimed: float, game: Game, settings: AuditSettings) -> OneRunFound:
    started = time.perf_counter()
    claim, whole = Claim(trial_event(plan), plan.delta), Claim(plan.event, plan.delta)
    canaries = settings.canaries or min(MOST_CANARIES, game.trials)
    guesses, could_show = choose_guesses(claim, canaries, SIGNIFICANCE, settings.seed)
    included = np.random.default_rng(settings.seed + 1).random(canaries) < 1 / (1 + math.exp(game.threshold))
    coins = included if game.threshold == 0 else np.random.default_rng(settings.seed + 2).random(canaries) < 0.5
    with scratch_folder() as folder:
        noise = seen_noise(plan, folder)
        scores = canary_scores(plan, coins, folder, FAITHFUL, noise)
        factor, correct = one_run_bound(scores, coins, guesses, claim, SIGNIFICANCE)
        if coins is not included:
            scores = canary_scores(plan, included, folder, FAITHFUL, noise)
    sides = Game(game.threshold, int(included.sum()), int((~included).sum()))
    independent = play(sides, scores[~included], scores[included], claim, SIGNIFICANCE)
    lower, other = whole.epsilon(factor), whole.epsilon(independent.factor)
    return OneRunFound(
        canaries=canaries,
        guesses=guesses,
        correct=correct,
        epsilon_lower=lower,
        epsilon_could_show=whole.epsilon(could_show),
        ratio=lower / claimed,
        epsilon_lower_if_independent=other,
        ratio_if_independent=other / claimed,
        significance=SIGNIFICANCE,
        seconds=time.perf_counter() - started,
        flagged=factor > 1,
    )


def _control(
    plan: PrivatePlan, features: Tensor, labels: Labels, control: Control, generator: torch.Generator
) -> ControlFound:
    """Whether one fault is flagged, and by which test."""
    by = [] if passed(_replay(plan, features, labels, control, generator)) else ["replay"]
    claim = Claim(trial_event(plan), plan.delta)
    game = Game.of(choose_game(claim, NEEDED, SIGNIFICANCE).threshold, 2 * CONTROL_TRIALS)
    with scratch_folder() as folder:
        factor = play(game, *game_scores(plan, game, folder, control), claim, SIGNIFICANCE).factor
    by += [GAME] if factor > 1 else []
    mu = math.sqrt(claim.event.steps) / plan.noise_multiplier
    return ControlFound(control.name, bool(by), by, factor * mu)


def _black_box(plan: PrivatePlan, claimed: float, game: Game, settings: AuditSettings) -> BlackBoxFound:
    started = time.perf_counter()
    claim = Claim(plan.event, plan.delta)
    small = Game.of(0.0, min(MOST_HEADS, game.trials))
    without, having, signal = head_game_scores(plan, small)
    factor = play(small, without, having, claim, SIGNIFICANCE).factor
    lower, attainable = claim.epsilon(factor), GaussianEvent(1 / (signal * gaussian_mu([plan.event])), 1.0, 1)
    return BlackBoxFound(
        trials=round(small.trials / 2),
        epsilon_lower=lower,
        epsilon_attainable=compose([attainable], plan.delta).upper,
        ratio=lower / claimed,
        power=game_power(small, claim, SIGNIFICANCE, FACTORS, settings.seed, signal),
        significance=SIGNIFICANCE,
        seconds=time.perf_counter() - started,
        flagged=factor > 1,
    )


# ------------------------------------------------------------------------------------------------------ private tuning


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


def _try_selection(plan: SelectionPlan, claimed: float, settings: AuditSettings) -> Found:
    """Games on single trials and on what private tuning selects.

    A trial's claim is μ, an exact curve, against which ``trials`` are judged. That of the selection is Rényi DP, an
    upper bound, so ``epsilon_lower`` is that of any mechanism (``plain_bound``) and far from it.
    """
    started = time.perf_counter()
    claim = Claim(GaussianEvent(1 / plan.mu, 1.0, 1), plan.delta)
    game = Game.of(0.0, 2 * settings.trials if settings.trials else min(
        MOST_TRIAL_GAMES, choose_game(claim, NEEDED, SIGNIFICANCE).trials))  # fmt: skip
    parts, power = {}, game_power(game, claim, SIGNIFICANCE, FACTORS, settings.seed)
    for name, held_out in (("fitted", False), ("held_out", True)):
        factor = play(game, *trial_game_scores(plan, game, held_out), claim, SIGNIFICANCE).factor
        parts[name] = TrialFound(trials=round(game.trials / 2), mu_claimed=plan.mu, mu_lower=factor * plan.mu,
                                 ratio=factor, power=power, flagged=factor > 1)  # fmt: skip
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
        controls = [ControlFound("noise of a tenth, in private tuning", seen, [GAME] if seen else [], None)]
    return Found(
        name=plan.stage,
        plan=plan.to_dict(),
        epsilon_claimed=claimed,
        delta=plan.delta,
        replay={"head": [], "flagged": False},
        two_world=SelectionFound(
            trials=count,
            one_trial=parts,
            mu_claimed=plan.mu,
            epsilon_lower=lower,
            epsilon_expected=expected,
            ratio=lower / claimed,
            significance=SIGNIFICANCE,
            power=power,
            seconds=time.perf_counter() - started,
            flagged=lower > claimed or any(part.flagged for part in parts.values()),
        ),
        one_run=None,
        controls=controls,
    )
