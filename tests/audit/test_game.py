"""The distinguishing game: what it proves is true as often as it says, and it sees noise that is too small.

Simulations are seeded: what they show is a property of the code, not of the day.
"""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from dprandp.audit import games as audit_games
from dprandp.errors import UsageError
from dprandp.privacy.accounting import GaussianEvent, calibrate, compose
from dprandp.privacy.auditing import controls, games
from dprandp.privacy.auditing.controls import Control, game_scores, trial_event
from dprandp.privacy.auditing.games import (
    Claim,
    Game,
    GameBound,
    choose_game,
    error_rates,
    expected_factor,
    game_power,
    ideal_scores,
    largest_factor,
    plain_bound,
    play,
    rate_upper_bound,
    step_score,
)
from dprandp.privacy.mechanism import PrivatePlan

SIGNIFICANCE = 1e-3
DELTA = 1e-5
FULL = Claim(GaussianEvent(4.0, 1.0, 16), DELTA)  # μ = 1
SAMPLED = Claim(GaussianEvent(1.0, 0.2, 6), DELTA)


def played(
    claim: Claim, trials: int, seed: int = 0, factor: float = 1.0, threshold: float = 0.0, level: float = SIGNIFICANCE
) -> GameBound:
    game, random = Game.of(threshold, trials), np.random.default_rng(seed)
    without = ideal_scores(claim.event, np.zeros(game.without, bool), random, factor)
    return play(game, without, ideal_scores(claim.event, np.ones(game.having, bool), random, factor), claim, level)


# -------------------------------------------------------------------------------------------------- Clopper & Pearson


@pytest.mark.parametrize(("count", "trials"), [(0, 1), (0, 40), (3, 40), (39, 40), (500, 2500)])
@pytest.mark.parametrize("significance", [0.05, 5e-4])
def test_upper_bound_is_where_the_tail_meets_the_level(count: int, trials: int, significance: float) -> None:
    bound = float(rate_upper_bound(count, trials, significance))
    assert stats.binom.cdf(count, trials, bound) == pytest.approx(significance, rel=1e-6)


def test_every_trial_an_event_bounds_nothing() -> None:
    assert rate_upper_bound(np.array([7, 8]), 8, 0.05).tolist() == [pytest.approx(0.05 ** (1 / 8), abs=1), 1.0]


def missed(bounds: np.ndarray, trials: int, rate: float) -> float:
    """Exact chance that the bound on a rate lies below it."""
    counts = np.arange(trials + 1)
    return float(stats.binom.pmf(counts, trials, rate)[bounds < rate].sum())


def test_coverage_is_exact_and_the_textbook_interval_fails_it() -> None:
    trials, level = 60, 0.01
    counts = np.arange(trials + 1)
    exact = rate_upper_bound(counts, trials, level)
    share = counts / trials
    textbook = share + stats.norm.isf(level) * np.sqrt(share * (1 - share) / trials)
    rates = np.linspace(0.001, 0.999, 400)
    assert max(missed(exact, trials, rate) for rate in rates) <= level
    assert max(missed(textbook, trials, rate) for rate in rates) > 10 * level


# ----------------------------------------------------------------------------------------------------------- the claim


def test_curve_is_that_of_the_mechanism() -> None:
    """δ(ε₀) by integrating the densities: of a Gaussian, and of one sampled step."""
    grid = np.linspace(-30, 30, 600_001)
    for event in (GaussianEvent(2.0, 1.0, 1), GaussianEvent(0.8, 0.3, 1)):
        sigma, rate = event.noise_multiplier, event.sample_rate
        without = stats.norm.pdf(grid, 0, sigma)
        having = (1 - rate) * without + rate * stats.norm.pdf(grid, 1, sigma)
        for threshold in (0.0, 0.3, 1.0):
            exact = np.maximum(having - math.exp(threshold) * without, 0).sum() * (grid[1] - grid[0])
            found = Claim(event, DELTA).curve(1.0, threshold)
            assert exact - 1e-9 <= found <= exact + 2e-3
    assert FULL.epsilon(1.0) == pytest.approx(compose([FULL.event], DELTA).upper)
    assert FULL.epsilon(0.0) == 0


def test_score_is_the_likelihood_ratio() -> None:
    released = np.array([-3.0, 0.0, 0.4, 2.0])
    for rate in (1.0, 0.2):
        without = stats.norm.pdf(released, 0, 1.5)
        having = (1 - rate) * without + rate * stats.norm.pdf(released, 1, 1.5)
        assert step_score(released, 1.5, rate) == pytest.approx(np.log(having / without))


# ------------------------------------------------------------------------------------------------------------ the bound


@pytest.mark.parametrize("threshold", [0.0, 0.7])
def test_bound_against_the_definition(threshold: float) -> None:
    bound, game = played(FULL, 4000, threshold=threshold), Game.of(threshold, 4000)
    errors = bound.false_positives + bound.false_negatives
    high = stats.binomtest(errors, game.trials).proportion_ci(1 - 2 * SIGNIFICANCE, method="exact").high
    assert bound.delta_seen == pytest.approx(1 - high * (1 + math.exp(threshold)), abs=2e-3)
    assert FULL.curve(bound.factor, threshold) < bound.delta_seen <= FULL.curve(bound.factor + 1e-3, threshold)


@pytest.mark.parametrize("threshold", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("claim", [FULL, SAMPLED], ids=["full", "sampled"])
def test_a_mechanism_that_keeps_its_claim_is_accused_as_seldom_as_it_says(
    claim: Claim, threshold: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    # whether the claim is contradicted, and not what else is: that takes many accountings
    monkeypatch.setattr(games, "contradicted", lambda holds: 1.0 if holds(1.0) else 2.0)
    # 5 % is asked for, so that failures could be seen: 200 x 5 % = 10 expected at most, 24 in a ten-thousandth
    accused = sum(played(claim, 600, seed, threshold=threshold, level=0.05).factor > 1 for seed in range(200))
    assert accused <= 23
    # the control: without Clopper & Pearson's allowance, half of all games accuse
    assert sum(played(claim, 600, seed, threshold=threshold, level=0.5).factor > 1 for seed in range(200)) > 60


def test_the_worst_mechanism_of_a_claim_is_not_accused_either() -> None:
    """Nothing Gaussian about it: the outcomes are "with", "without" and nothing, as δ(0) allows."""
    claimed, random, game = FULL.curve(1.0, 0.0), np.random.default_rng(0), Game.of(0.0, 1000)
    accused = 0
    for _ in range(200):
        with_side = np.where(random.random(game.having) < (1 + claimed) / 2, 1.0, -1.0)
        without = np.where(random.random(game.without) < (1 - claimed) / 2, 1.0, -1.0)
        accused += play(game, without, with_side, FULL, 0.05).factor > 1
    assert accused <= 23


def test_scores_that_tell_everything_give_the_largest_bound() -> None:
    game = Game.of(0.0, 1000)
    separate = play(game, -np.ones(500), np.ones(500), FULL, SIGNIFICANCE)
    assert separate.factor == pytest.approx(largest_factor(game, FULL, SIGNIFICANCE))
    assert separate.factor > 3
    assert play(game, np.ones(500), -np.ones(500), FULL, SIGNIFICANCE).factor == 0
    assert play(game, np.zeros(500), np.zeros(500), FULL, SIGNIFICANCE).factor == 0


# ----------------------------------------------------------------------------------------------- trials and their power


@pytest.mark.parametrize("claim", [FULL, SAMPLED], ids=["full", "sampled"])
def test_number_of_trials_follows_from_the_claim(claim: Claim) -> None:
    small, large = (choose_game(claim, part, SIGNIFICANCE) for part in (0.8, 0.9))
    assert small.trials < large.trials
    claimed = compose([claim.event], DELTA).upper
    for game, part in ((small, 0.8), (large, 0.9)):
        assert claim.epsilon(expected_factor(game, claim, SIGNIFICANCE)) / claimed == pytest.approx(part, abs=0.05)
    ratios = [
        claim.epsilon(played(claim, large.trials, seed, threshold=large.threshold).factor) / claimed
        for seed in range(5)
    ]
    assert np.mean(ratios) == pytest.approx(0.9, abs=0.05)


def test_a_smaller_claim_needs_more_trials() -> None:
    claims = [Claim(GaussianEvent(calibrate(epsilon, DELTA, 1.0, 120), 1.0, 120), DELTA) for epsilon in (8.0, 1.0, 0.3)]
    trials = [choose_game(claim, 0.85, SIGNIFICANCE).trials for claim in claims]
    assert trials[0] < 3000 < trials[1] < 100_000 < trials[2]


def test_trials_are_divided_as_the_threshold_wants() -> None:
    assert Game.of(0.0, 1000) == Game(0.0, 500, 500)
    uneven = Game.of(math.log(3), 1000)
    assert (uneven.having, uneven.without, uneven.trials) == (250, 750, 1000)


@pytest.mark.parametrize("claim", [FULL, SAMPLED], ids=["full", "sampled"])
@pytest.mark.parametrize("factor", [1.0, 1.2])
def test_power_is_what_repeated_games_show(claim: Claim, factor: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(games, "contradicted", lambda holds: 1.0 if holds(1.0) else 2.0)
    game = Game.of(0.0, 3000)
    (power,) = game_power(game, claim, SIGNIFICANCE, (factor,), seed=1)
    flagged = np.mean([played(claim, 3000, seed, factor).factor > 1 for seed in range(40)])
    assert abs(flagged - power.flagged) < 0.25
    if factor == 1:
        assert power.flagged <= SIGNIFICANCE * 1.5
        assert power.mean_bound < 1


def test_error_rates_in_closed_form() -> None:
    random = np.random.default_rng(2)
    for factor in (1.0, 1.5):
        for there, expected in zip((False, True), error_rates(FULL.event, factor, 0.0, 0), strict=True):
            scores = ideal_scores(FULL.event, np.full(40_000, there), random, factor)
            assert ((scores > 0) != there).mean() == pytest.approx(expected, abs=0.01)


PLAN = PrivatePlan("probe", 1000, 1.0, 8, 4.0, 0.5, 1, 10.0, DELTA)


@pytest.mark.parametrize("plan", [PLAN, replace(PLAN, sample_rate=0.2, noise_multiplier=0.8)], ids=["full", "sampled"])
def test_power_against_really_weakened_noise(
    tmp_path: Path, plan: PrivatePlan, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The positive control: the real mechanism, its noise divided by a factor, is flagged as often as was foretold."""
    monkeypatch.setattr(games, "contradicted", lambda holds: 1.0 if holds(1.0) else 2.0)
    claim, game = Claim(trial_event(plan), DELTA), Game.of(0.0, 4000)
    for power in game_power(game, claim, SIGNIFICANCE, (1.0, 1.5, 2.0), seed=0):
        weak = Control("weak noise", noise_factor=1 / power.factor)
        flagged = [
            play(game, *game_scores(plan, game, tmp_path, weak), claim, SIGNIFICANCE).factor > 1 for _ in range(8)
        ]
        assert abs(np.mean(flagged) - power.flagged) < 0.5
        if power.factor == 2:
            assert all(flagged)
            assert power.flagged > 0.99


@pytest.mark.slow
@pytest.mark.parametrize(
    ("epsilon", "rate", "steps", "part"),
    [(1, 1.0, 120, 0.8), (1, 0.02, 8, 0.8), (1, 0.08192, 40, 0.8), (8, 1.0, 120, 0.9), (8, 0.02, 8, 0.9),
     (8, 0.08192, 40, 0.9)],
)  # fmt: skip
def test_the_real_mechanism_is_known_to_a_tenth(
    tmp_path: Path, epsilon: float, rate: float, steps: int, part: float
) -> None:
    sigma = calibrate(epsilon, DELTA, rate, steps)
    plan = PrivatePlan("plan", 10_000, rate, steps, sigma, 1.0, 1, float(epsilon), DELTA)
    claim = Claim(trial_event(plan), DELTA)
    game = choose_game(claim, 0.95, SIGNIFICANCE)
    bound = play(game, *game_scores(plan, game, tmp_path), claim, SIGNIFICANCE)
    assert part * epsilon <= claim.epsilon(bound.factor) <= epsilon
    assert bound.factor <= 1


def test_a_plan_of_many_steps_is_judged_by_its_first_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(controls, "MOST_STEPS", 3)
    assert trial_event(PLAN).steps == 3
    assert trial_event(replace(PLAN, steps=2)).steps == 2


# ---------------------------------------------------------------------------------------------------- any mechanism


def test_plain_bound_against_the_leakiest_mechanism() -> None:
    """Given away with probability δ, else randomised response: (ε, δ)-DP exactly, so above ε as seldom as it says."""
    random, delta, epsilon = np.random.default_rng(0), 0.01, 1.0
    rate = math.exp(epsilon) / (1 + math.exp(epsilon))
    bounds = []
    for _ in range(200):
        positives = random.binomial(2000, (1 - delta) * (1 - rate))
        true = random.binomial(2000, delta + (1 - delta) * rate)
        bounds.append(plain_bound(positives, true, 2000, 2000, delta, 0.05))
    assert sum(bound > epsilon for bound in bounds) <= 23
    assert np.mean(bounds) > 0.8
    assert plain_bound(5, 5, 100, 100, delta, 0.05) == 0.0


@pytest.mark.parametrize(
    ("without", "having", "significance"),
    [
        (np.zeros(3), np.zeros(5), 0.1),
        (np.zeros(5), np.zeros(4), 0.1),
        (np.zeros(5), np.full(5, np.nan), 0.1),
        (np.zeros(5), np.zeros(5), 0.0),
    ],
)
def test_senseless_scores_are_refused(without: np.ndarray, having: np.ndarray, significance: float) -> None:
    with pytest.raises(UsageError):
        play(Game(0.0, 5, 5), without, having, FULL, significance)


@pytest.mark.parametrize("mu", [0.01, 0.03, 0.3])
def test_the_control_of_tuning_has_as_many_trials_as_its_claim_needs(mu: float) -> None:
    """With a fixed number, a small claim let noise of a tenth pass in one audit of ten."""
    claim = games.Claim(GaussianEvent(1 / mu, 1.0, 1), 1e-5)
    game = audit_games.selection_control_game(claim)
    [seen] = games.game_power(game, claim, audit_games.SIGNIFICANCE, (10.0,), 0)
    assert seen.flagged > 1 - 1e-5
    least = games.Game.of(0.0, 2 * audit_games.CONTROL_TRIALS)
    [fixed] = games.game_power(least, claim, audit_games.SIGNIFICANCE, (10.0,), 0)
    assert (game == least) == (fixed.flagged > audit_games.SURE)
    assert (fixed.flagged < 0.97) == (mu < 0.1)
