"""What scores prove is true as often as it says, and noise that is too small is seen.

Simulations are seeded: what they show is a property of the code, not of the day.
"""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from scipy import stats
from scipy.optimize import linprog

from dprandp.audit import bounds, canaries, games
from dprandp.audit.bounds import (
    Claim,
    Game,
    GameBound,
    choose_game,
    choose_guesses,
    count_correct,
    error_rates,
    game_power,
    ideal_scores,
    least_false_positives,
    one_run_bound,
    one_run_refuted,
    plain_bound,
    play,
    rate_upper_bound,
    step_score,
)
from dprandp.audit.canaries import Control, game_scores, trial_event
from dprandp.errors import UsageError
from dprandp.privacy.accounting import GaussianEvent, calibrate, compose
from dprandp.privacy.mechanism import PrivatePlan

SIGNIFICANCE, DELTA = 1e-3, 1e-5
FULL = Claim(GaussianEvent(4.0, 1.0, 16), DELTA)  # μ = 1
SAMPLED = Claim(GaussianEvent(1.0, 0.2, 6), DELTA)
BOTH = pytest.mark.parametrize("claim", [FULL, SAMPLED], ids=["full", "sampled"])
PLAN = PrivatePlan("probe", 1000, 1.0, 8, 4.0, 0.5, 1, 10.0, DELTA)


@pytest.fixture
def whether_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether the claim is contradicted, and not what else is: that takes many accountings."""
    monkeypatch.setattr(bounds, "contradicted", lambda holds: 1.0 if holds(1.0) else 2.0)


def played(
    claim: Claim, trials: int, seed: int = 0, factor: float = 1.0, threshold: float = 0.0, level: float = SIGNIFICANCE
) -> GameBound:
    game, random = Game.of(threshold, trials), np.random.default_rng(seed)
    without = ideal_scores(claim.event, np.zeros(game.without, bool), random, factor)
    return play(game, without, ideal_scores(claim.event, np.ones(game.having, bool), random, factor), claim, level)


def missed(limits: np.ndarray, trials: int, rate: float) -> float:
    """Exact chance that the bound on a rate lies below it."""
    counts = np.arange(trials + 1)
    return float(stats.binom.pmf(counts, trials, rate)[limits < rate].sum())


def test_coverage_of_rates_is_exact_and_the_textbook_interval_fails_it() -> None:
    for count, trials in ((0, 1), (0, 40), (39, 40), (500, 2500)):
        for level in (0.05, 5e-4):
            bound = float(rate_upper_bound(count, trials, level))
            assert stats.binom.cdf(count, trials, bound) == pytest.approx(level, rel=1e-6)
    trials, level = 60, 0.01
    counts = np.arange(trials + 1)
    exact = rate_upper_bound(counts, trials, level)
    assert exact[-1] == 1
    share = counts / trials
    textbook = share + stats.norm.isf(level) * np.sqrt(share * (1 - share) / trials)
    rates = np.linspace(0.001, 0.999, 400)
    assert max(missed(exact, trials, rate) for rate in rates) <= level
    assert max(missed(textbook, trials, rate) for rate in rates) > 10 * level


def test_curve_and_score_are_those_of_the_mechanism() -> None:
    """δ(ε₀) by integrating the densities: of a Gaussian, and of one sampled step."""
    grid = np.linspace(-30, 30, 600_001)
    for event in (GaussianEvent(2.0, 1.0, 1), GaussianEvent(0.8, 0.3, 1)):
        sigma, rate = event.noise_multiplier, event.sample_rate
        without = stats.norm.pdf(grid, 0, sigma)
        having = (1 - rate) * without + rate * stats.norm.pdf(grid, 1, sigma)
        for threshold in (0.0, 0.3, 1.0):
            exact = np.maximum(having - math.exp(threshold) * without, 0).sum() * (grid[1] - grid[0])
            assert exact - 1e-9 <= Claim(event, DELTA).curve(1.0, threshold) <= exact + 2e-3
        near = slice(290_000, 330_000, 5000)
        assert step_score(grid, sigma, rate)[near] == pytest.approx(np.log(having / without)[near])
    assert FULL.epsilon(1.0) == pytest.approx(compose([FULL.event], DELTA).upper)
    assert FULL.epsilon(0.0) == 0


# ---------------------------------------------------------------------------------------------------------- the game


@pytest.mark.parametrize("threshold", [0.0, 0.7])
def test_bound_against_the_definition(threshold: float) -> None:
    bound, game = played(FULL, 4000, threshold=threshold), Game.of(threshold, 4000)
    high = stats.binomtest(bound.errors, game.trials).proportion_ci(1 - 2 * SIGNIFICANCE, method="exact").high
    assert bound.delta_seen == pytest.approx(1 - high * (1 + math.exp(threshold)), abs=2e-3)
    assert FULL.curve(bound.factor, threshold) < bound.delta_seen <= FULL.curve(bound.factor + 1e-3, threshold)


@pytest.mark.parametrize("threshold", [0.0, 1.0])
@BOTH
def test_a_mechanism_that_keeps_its_claim_is_accused_as_seldom_as_it_says(
    claim: Claim, threshold: float, whether_alone: None
) -> None:
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
    assert separate.factor == pytest.approx(game.proves(0, FULL, SIGNIFICANCE)[0])
    assert separate.factor > 3
    assert play(game, np.ones(500), -np.ones(500), FULL, SIGNIFICANCE).factor == 0
    assert play(game, np.zeros(500), np.zeros(500), FULL, SIGNIFICANCE).factor == 0


@pytest.mark.slow
@BOTH
def test_number_of_trials_follows_from_the_claim(claim: Claim) -> None:
    small, large = (choose_game(claim, part, SIGNIFICANCE) for part in (0.8, 0.9))
    assert small.trials < large.trials
    claimed = compose([claim.event], DELTA).upper
    expected = large.proves(large.expected_errors(claim), claim, SIGNIFICANCE)[0]
    assert claim.epsilon(expected) / claimed == pytest.approx(0.9, abs=0.05)
    found = [played(claim, large.trials, seed, threshold=large.threshold).factor for seed in range(3)]
    assert claim.epsilon(np.mean(found)) / claimed == pytest.approx(0.9, abs=0.05)


def test_a_smaller_claim_needs_more_trials() -> None:
    claims = [Claim(GaussianEvent(calibrate(epsilon, DELTA, 1.0, 120), 1.0, 120), DELTA) for epsilon in (8.0, 1.0, 0.3)]
    trials = [choose_game(claim, 0.85, SIGNIFICANCE).trials for claim in claims]
    assert trials[0] < 3000 < trials[1] < 100_000 < trials[2]
    uneven = Game.of(math.log(3), 1000)
    assert (uneven.having, uneven.without, uneven.trials) == (250, 750, 1000)


@pytest.mark.parametrize("factor", [1.0, 1.2])
@BOTH
def test_power_is_what_repeated_games_show(claim: Claim, factor: float, whether_alone: None) -> None:
    (power,) = game_power(Game.of(0.0, 3000), claim, SIGNIFICANCE, (factor,), seed=1)
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


@pytest.mark.slow
@pytest.mark.parametrize("plan", [PLAN, replace(PLAN, sample_rate=0.2, noise_multiplier=0.8)], ids=["full", "sampled"])
def test_power_against_really_weakened_noise(tmp_path: Path, plan: PrivatePlan, whether_alone: None) -> None:
    """The positive control: the real mechanism, its noise divided by a factor, is flagged as often as was foretold."""
    claim, game = Claim(trial_event(plan), DELTA), Game.of(0.0, 3000)
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
    monkeypatch.setattr(canaries, "MOST_STEPS", 3)
    assert trial_event(PLAN).steps == 3
    assert trial_event(replace(PLAN, steps=2)).steps == 2


def test_plain_bound_against_the_leakiest_mechanism() -> None:
    """Given away with probability δ, else randomised response: (ε, δ)-DP exactly, so above ε as seldom as it says."""
    random, delta, epsilon = np.random.default_rng(0), 0.01, 1.0
    rate = math.exp(epsilon) / (1 + math.exp(epsilon))
    found = []
    for _ in range(200):
        positives = random.binomial(2000, (1 - delta) * (1 - rate))
        true = random.binomial(2000, delta + (1 - delta) * rate)
        found.append(plain_bound(positives, true, 2000, 2000, delta, 0.05))
    assert sum(bound > epsilon for bound in found) <= 23
    assert np.mean(found) > 0.8
    assert plain_bound(5, 5, 100, 100, delta, 0.05) == 0.0


def test_senseless_scores_and_counts_are_refused() -> None:
    right = np.zeros(5)
    for without, having, significance in (
        (np.zeros(3), right, 0.1), (right, np.zeros(4), 0.1), (right, np.full(5, np.nan), 0.1), (right, right, 0.0),
    ):  # fmt: skip
        with pytest.raises(UsageError):
            play(Game(0.0, 5, 5), without, having, FULL, significance)
    for canaries_, guesses, correct, significance in ((3, 4, 1, 0.1), (3, 2, 3, 0.1), (0, 0, 0, 0.1), (3, 2, 1, 0.0)):
        with pytest.raises(UsageError):
            one_run_refuted(canaries_, guesses, correct, ([0.0], [0.0]), significance)


@pytest.mark.parametrize("mu", [0.01, 0.3])
def test_the_control_of_tuning_has_as_many_trials_as_its_claim_needs(mu: float) -> None:
    """With a fixed number, a small claim would let noise of a tenth pass in one audit of ten."""
    claim = Claim(GaussianEvent(1 / mu, 1.0, 1), DELTA)
    game, least = games.selection_control_game(claim), Game.of(0.0, 2 * games.CONTROL_TRIALS)
    seen, fixed = (game_power(each, claim, SIGNIFICANCE, (10.0,), 0)[0].flagged for each in (game, least))
    assert seen > 1 - 1e-5
    assert (game == least) == (fixed > games.SURE)
    assert (fixed < 0.97) == (mu < 0.1)


# ------------------------------------------------------------------------------------------------------------ one run


def test_trade_off_of_a_gaussian() -> None:
    """x(y) = Φ(Φ⁻¹(y) − μ), from below."""
    slopes, offsets = (np.array(part) for part in least_false_positives(*FULL.lines(1.0)))
    rates = np.linspace(0, 1, len(slopes))[1:-1]
    found, exact = slopes[1:-1] * rates + offsets[1:-1], stats.norm.cdf(stats.norm.ppf(rates) - 1)
    assert (found <= exact + 1e-9).all()
    assert np.abs(found - exact).max() < 1e-3


def largest_tail(canaries: int, guesses: int, correct: int, epsilons: np.ndarray, deltas: np.ndarray) -> float:
    """max P[V ≥ v] under the theorem's inequalities: a linear program, since the trade-off is made of lines."""
    count = np.arange(guesses + 1)
    slopes = np.concatenate([np.exp(-epsilons), np.exp(epsilons)])
    offsets = np.concatenate([-deltas * np.exp(-epsilons), 1 - deltas - np.exp(epsilons)])
    rows, limits = [], []
    for first in range(1, guesses + 1):
        right = np.where(count >= first, count, 0) / canaries
        wrong = np.where(count >= first - 1, guesses - count, 0) / canaries
        for slope, offset in zip(slopes, offsets, strict=True):
            rows.append(slope * right - wrong)
            limits.append(-offset)
    best = linprog(-(count >= correct).astype(float), A_ub=rows, b_ub=limits, A_eq=[np.ones(guesses + 1)], b_eq=[1.0])
    return -best.fun


@BOTH
@pytest.mark.parametrize(("canaries", "guesses"), [(12, 12), (20, 8)])
def test_what_is_refuted_is_what_the_inequalities_forbid(claim: Claim, canaries: int, guesses: int) -> None:
    epsilons, deltas = (part[::60] for part in claim.lines(1.0))
    lines = least_false_positives(epsilons, deltas)
    for correct in range(guesses // 2 + 1, guesses + 1):
        allowed = largest_tail(canaries, guesses, correct, epsilons, deltas)
        assert not one_run_refuted(canaries, guesses, correct, lines, allowed * 0.98)
        if allowed < 0.9:
            assert one_run_refuted(canaries, guesses, correct, lines, min(0.999, allowed * 1.02))


@BOTH
def test_a_run_that_keeps_its_claim_is_accused_as_seldom_as_it_says(claim: Claim) -> None:
    lines, accused = least_false_positives(*claim.lines(1.0)), 0
    for seed in range(200):
        random = np.random.default_rng(seed)
        included = random.random(300) < 0.5
        correct = count_correct(ideal_scores(claim.event, included, random), included, 60)
        accused += one_run_refuted(300, 60, correct, lines, 0.05)
    assert accused <= 23
    # the best guesser of independent canaries is right with Φ(μ/2); that many right guesses are never refuted
    best = round(1000 * stats.norm.cdf(0.5))
    assert claim is SAMPLED or not one_run_refuted(1000, 1000, best, lines, 0.2)


def test_canaries_that_all_tell_the_same_are_not_taken_for_many() -> None:
    """One bit of randomised response for all canaries at once: right about all of them or none. It is private."""
    rate = 1 / (1 + math.exp(-1.0))
    lines = least_false_positives(np.array([0.0, 1.0]), np.array([2 * rate - 1, 0.0]))
    assert not one_run_refuted(50, 50, 50, lines, 1e-9 * 2.0**-50)
    assert one_run_refuted(50, 50, 50, lines, 1e-3)


@pytest.mark.slow
def test_less_noise_is_found_out_and_half_of_the_claim_is_shown() -> None:
    random = np.random.default_rng(1)
    included = random.random(20_000) < 0.5
    guesses, could_show = choose_guesses(FULL, 20_000, SIGNIFICANCE, seed=0)
    assert guesses < 20_000  # abstaining pays
    true, _ = one_run_bound(ideal_scores(FULL.event, included, random), included, guesses, FULL, SIGNIFICANCE)
    assert 0.4 < true < 1
    assert true == pytest.approx(could_show, abs=0.1)
    weak = ideal_scores(FULL.event, included, random, 4.0)
    assert one_run_bound(weak, included, guesses, FULL, SIGNIFICANCE)[0] > 1


def test_guesses_are_those_that_are_most_certain() -> None:
    scores = np.array([0.3, -2.0, 5.0, 0.1, 1.0, -1.0])
    included = np.array([False, True, True, False, True, False])
    assert [count_correct(scores, included, guesses) for guesses in range(7)] == [0, 1, 1, 2, 3, 3, 3]
    assert one_run_bound(scores, included, 6, FULL, 0.05) == (0.0, 3)
