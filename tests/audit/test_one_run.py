"""The one-run bound against linear programs and simulated runs."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats
from scipy.optimize import brentq, linprog

from dprandp.errors import UsageError
from dprandp.privacy.accounting import GaussianEvent
from dprandp.privacy.auditing.games import (
    Claim,
    TradeOff,
    choose_guesses,
    count_correct,
    ideal_scores,
    one_run_bound,
    one_run_refuted,
)

FULL = Claim(GaussianEvent(4.0, 1.0, 16), 1e-5)  # μ = 1
SAMPLED = Claim(GaussianEvent(1.0, 0.2, 6), 1e-5)


def test_trade_off_of_a_gaussian() -> None:
    """x(y) = Φ(Φ⁻¹(y) − μ), from below."""
    slopes, offsets = (np.array(part) for part in TradeOff(*FULL.lines(1.0)).least_false_positives())
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


@pytest.mark.parametrize("claim", [FULL, SAMPLED], ids=["full", "sampled"])
@pytest.mark.parametrize(("canaries", "guesses"), [(12, 12), (20, 8)])
def test_what_is_refuted_is_what_the_inequalities_forbid(claim: Claim, canaries: int, guesses: int) -> None:
    epsilons, deltas = (part[::60] for part in claim.lines(1.0))
    trade_off = TradeOff(epsilons, deltas)
    for correct in range(guesses // 2 + 1, guesses + 1):
        allowed = largest_tail(canaries, guesses, correct, epsilons, deltas)
        assert not one_run_refuted(canaries, guesses, correct, trade_off, allowed * 0.98)
        if allowed < 0.9:
            assert one_run_refuted(canaries, guesses, correct, trade_off, min(0.999, allowed * 1.02))


@pytest.mark.parametrize("claim", [FULL, SAMPLED], ids=["full", "sampled"])
def test_a_run_that_keeps_its_claim_is_accused_as_seldom_as_it_says(claim: Claim) -> None:
    random, trade_off, accused = np.random.default_rng(0), TradeOff(*claim.lines(1.0)), 0
    for _ in range(200):
        included = random.random(300) < 0.5
        correct = count_correct(ideal_scores(claim.event, included, random), included, 60)
        accused += one_run_refuted(300, 60, correct, trade_off, 0.05)
    assert accused <= 23


def test_canaries_that_all_tell_the_same_are_not_taken_for_many() -> None:
    """One bit of randomised response for all canaries at once: right about all of them or none. It is private."""
    rate = 1 / (1 + math.exp(-1.0))
    epsilons = np.array([0.0, 1.0])
    trade_off = TradeOff(epsilons, np.array([2 * rate - 1, 0.0]))
    assert not one_run_refuted(50, 50, 50, trade_off, 1e-9 * 2.0**-50)
    assert one_run_refuted(50, 50, 50, trade_off, 1e-3)


def test_less_noise_is_found_out_and_half_of_the_claim_is_shown() -> None:
    random = np.random.default_rng(1)
    included = random.random(20_000) < 0.5
    guesses, could_show = choose_guesses(FULL, 20_000, 1e-3, seed=0)
    assert (guesses, could_show) == choose_guesses(FULL, 20_000, 1e-3, seed=0)
    assert guesses < 20_000  # abstaining pays
    true = one_run_bound(ideal_scores(FULL.event, included, random), included, guesses, FULL, 1e-3)
    assert 0.4 < true.factor < 1
    assert true.factor == pytest.approx(could_show, abs=0.1)
    weak = one_run_bound(ideal_scores(FULL.event, included, random, 4.0), included, guesses, FULL, 1e-3)
    assert weak.factor > 1


def test_guesses_are_those_that_are_most_certain() -> None:
    scores = np.array([0.3, -2.0, 5.0, 0.1, 1.0, -1.0])
    included = np.array([False, True, True, False, True, False])
    assert [count_correct(scores, included, guesses) for guesses in range(7)] == [0, 1, 1, 2, 3, 3, 3]
    assert one_run_bound(scores, included, 6, FULL, 0.05).factor == 0.0


def test_no_gaussian_knows_more_than_its_rate() -> None:
    """The best guesser of independent canaries is right with Φ(μ/2); that many right guesses are never refuted."""
    rate = stats.norm.cdf(0.5)
    trade_off = TradeOff(*FULL.lines(1.0))
    assert not one_run_refuted(1000, 1000, round(1000 * rate), trade_off, 0.2)
    assert brentq(lambda mu: stats.norm.cdf(mu / 2) - rate, 0, 5) == pytest.approx(1.0)


@pytest.mark.parametrize("arguments", [(3, 4, 1, 0.1), (3, 2, 3, 0.1), (0, 0, 0, 0.1), (3, 2, 1, 0.0)])
def test_senseless_counts_are_refused(arguments: tuple) -> None:
    canaries, guesses, correct, significance = arguments
    with pytest.raises(UsageError):
        one_run_refuted(canaries, guesses, correct, TradeOff(*FULL.lines(1.0)), significance)
