"""The price of the best of a random number of trials, against brute force on small mechanisms and another's library.

The oracle computes what the theorem bounds: the output distribution of the best of K trials, summed over every K, and
its exact Rényi divergence. A price that leaves out part of the theorem must be caught by it.
"""

from __future__ import annotations

import itertools
import math
from functools import cache

import numpy as np
import pytest
from dp_accounting import dp_event
from dp_accounting.rdp import RdpAccountant
from scipy.special import ndtr
from scipy.stats import geom, logser

from dprandp.errors import UsageError
from dprandp.privacy.accounting import GaussianEvent, calibrate, compose
from dprandp.privacy.tuning import TrialCount, TuningEvent, selection_rdp

COUNTS = [TrialCount(0.0, 0.04), TrialCount(1.0, 0.08), TrialCount(-0.5, 0.02), TrialCount(2.5, 0.3)]
ORDERS = [1.1, 1.5, 2.0, 4.0, 16.0, 64.0]


def probabilities(trials: TrialCount, tail: float = 1e-13) -> np.ndarray:
    """P(K = 1), … as far as they matter."""
    return np.array(list(itertools.takewhile(lambda p: p > tail, itertools.islice(trials.probabilities(), 200_000))))


@pytest.mark.parametrize("trials", COUNTS)
def test_the_number_of_trials_is_a_distribution_of_the_stated_mean(trials: TrialCount) -> None:
    p = probabilities(trials)
    assert p.sum() == pytest.approx(1, abs=1e-8)
    assert (p * np.arange(1, len(p) + 1)).sum() == pytest.approx(trials.mean, rel=1e-6)
    assert TrialCount.with_mean(trials.mean, trials.eta).gamma == pytest.approx(trials.gamma, rel=1e-9)
    # inversion: an even grid of uniform values meets each k in proportion to its probability
    grid = (np.arange(1000) + 0.5) / 1000
    drawn = np.bincount([trials.draw(float(u)) for u in grid])[1:]
    assert np.abs(np.cumsum(drawn) / 1000 - np.cumsum(p)[: len(drawn)]).max() <= 1 / 1000
    assert trials.draw(0.0) == 1
    assert trials.draw(1 - 2**-53) > trials.mean


def test_known_special_cases() -> None:
    k = np.arange(1, 50)
    assert probabilities(TrialCount(1.0, 0.1))[:49] == pytest.approx(geom(0.1).pmf(k))
    assert probabilities(TrialCount(0.0, 0.1))[:49] == pytest.approx(logser(0.9).pmf(k))
    assert TrialCount(1e-9, 0.1).mean == pytest.approx(TrialCount(0.0, 0.1).mean, rel=1e-6)


# --------------------------------------------------------------------------------------------- the theorem, brute force


def best_of(p: np.ndarray, trials: TrialCount) -> np.ndarray:
    """Output distribution of the best (largest index) of K draws from p, summed over every K."""
    upto = np.concatenate([[0.0], np.cumsum(p)])
    weights = probabilities(trials, 1e-12)
    powers = np.zeros(len(upto))
    current = np.ones(len(upto))
    for weight in weights:
        current = current * upto
        powers += weight * current
    return np.diff(powers)


def renyi(p: np.ndarray, q: np.ndarray, order: float) -> float:
    log_terms = order * np.log(p) + (1 - order) * np.log(q)
    top = log_terms.max()
    return (top + math.log(np.exp(log_terms - top).sum())) / (order - 1)


def both(p: np.ndarray, q: np.ndarray, order: float) -> float:
    """Rényi divergence in the worse direction; order 1 is Kullback-Leibler."""
    if order == 1:
        return max(float((p * np.log(p / q)).sum()), float((q * np.log(q / p)).sum()))
    return max(renyi(p, q, order), renyi(q, p, order))


@cache
def pairs() -> list[tuple[np.ndarray, np.ndarray]]:
    """Output distributions on neighbouring data: randomised response with the lie ranked low and high, and others."""
    response = [(np.array([1, math.e**e]) / (1 + math.e**e), np.array([math.e**e, 1]) / (1 + math.e**e))
                for e in (0.05, 0.5, 2.0)]  # fmt: skip
    rare = (np.array([0.999, 0.001]), np.array([0.997, 0.003]))
    random = np.random.default_rng(0)
    other = [tuple(random.dirichlet(np.ones(5) * 3) + 1e-3 for _ in range(2)) for _ in range(3)]
    return [*response, rare, *((p / p.sum(), q / q.sum()) for p, q in other)]


@cache
def best_pairs() -> list[tuple]:
    """Each pair of distributions, of one trial and of the best of K, for each distribution of K."""
    return [(p, q, best_of(p, trials), best_of(q, trials), trials) for (p, q), trials in
            itertools.product(pairs(), COUNTS)]  # fmt: skip


def worst_excess(price) -> float:
    """Largest exact divergence above a claimed price, over mechanisms, distributions and orders."""
    excess = -math.inf
    for p, q, a, b, trials in best_pairs():
        for order in ORDERS:
            claimed = min(price(order, both(p, q, order), hat, both(p, q, hat), trials) for hat in (1, 1.5, 3, 10, 50))
            excess = max(excess, both(a, b, order) - claimed)
    return excess


def test_the_theorem_holds_by_brute_force() -> None:
    assert worst_excess(selection_rdp) <= 1e-7


@pytest.mark.parametrize(
    "cheat",
    [
        lambda order, at_order, hat, at_hat, trials: at_order,  # tuning for nothing
        lambda order, at_order, hat, at_hat, trials: 2 * at_order,  # twice, whatever the number of trials
        lambda order, at_order, hat, at_hat, trials: at_order + math.log(trials.mean) / (order - 1),
        lambda order, at_order, hat, at_hat, trials: at_order + (1 + trials.eta) * (1 - 1 / hat) * at_hat,
    ],
)
def test_control_a_cheaper_price_is_caught(cheat) -> None:
    assert worst_excess(cheat) > 1e-3


def gaussian_cells(mu: float) -> tuple[np.ndarray, np.ndarray]:
    """N(μ, 1) and N(0, 1) on a fine grid of scores: a coarser output than the score, so no worse than μ-Gaussian."""
    edges = np.linspace(-7, 7 + mu, 800)
    cells = []
    for mean in (mu, 0.0):
        below = ndtr(edges - mean)
        cells.append(np.diff(np.concatenate([[0.0], below, [1.0]])))
    return cells[0].clip(1e-300), cells[1].clip(1e-300)


def hockey_stick(p: np.ndarray, q: np.ndarray, epsilon: float) -> float:
    return max(float((p - math.exp(epsilon) * q).clip(0).sum()), float((q - math.exp(epsilon) * p).clip(0).sum()))


@pytest.mark.parametrize("mu", [0.05, 0.5])
@pytest.mark.parametrize("trials", COUNTS[:2])
def test_gaussian_trials_with_noisy_scores(mu: float, trials: TrialCount) -> None:
    p, q = (best_of(cells, trials) for cells in gaussian_cells(mu))
    event = TuningEvent(mu, trials.eta, trials.gamma)
    for order in (1.5, 4.0, 12.0):
        inner = (p > 1e-14) & (q > 1e-14)  # the sum over every K is cut off there
        assert both(p[inner], q[inner], order) <= event.rdp(np.array([order]))[0]
    delta = 1e-4
    assert hockey_stick(p, q, compose([event], delta).upper) <= delta
    # the positive control: the price of a single trial is not enough
    assert hockey_stick(p, q, compose([GaussianEvent(1 / mu, 1.0, 1)], delta).upper) > delta


@pytest.mark.parametrize("trials", [trials for trials in COUNTS if trials.eta >= 0])
def test_against_dp_accounting(trials: TrialCount) -> None:
    orders = list(1 + np.geomspace(0.05, 500, 150))
    for mu in (0.03, 0.4):
        theirs = RdpAccountant(orders).compose(
            dp_event.RepeatAndSelectDpEvent(dp_event.GaussianDpEvent(1 / mu), trials.mean, trials.eta)
        )
        ours = TuningEvent(mu, trials.eta, trials.gamma).rdp(np.array(orders))
        assert (ours <= np.array(theirs._rdp) * (1 + 1e-9)).all()  # theirs looks for λ̂ among the orders
        assert ours == pytest.approx(np.array(theirs._rdp), rel=0.05)


# ---------------------------------------------------------------------------------------------------------- composition


TUNING = TuningEvent(0.05, 0.0, 0.027)


@pytest.mark.parametrize("others", [[GaussianEvent(60.0, 1.0, 120)], [GaussianEvent(3.0, 0.05, 50)], [TUNING]])
def test_tuning_composes_with_everything(others: list) -> None:
    alone, rest = compose([TUNING], 1e-5).upper, compose(others, 1e-5).upper
    together = compose([*others, TUNING], 1e-5)
    assert max(alone, rest) < together.upper <= alone + compose([*others, GaussianEvent(1e5, 1.0, 1)], 1e-5).upper * 1.4
    assert "Papernot" in together.accountant
    assert compose([TUNING, *others], 1e-5) == together
    assert compose([TUNING, *others, GaussianEvent(0.0, 1.0, 1)], 1e-5).upper == math.inf


@pytest.mark.parametrize(("rate", "steps", "epsilon"), [(1.0, 120, 0.7), (0.08, 60, 8.0)])
def test_what_is_left_after_tuning_is_used_and_not_exceeded(rate: float, steps: int, epsilon: float) -> None:
    sigma = calibrate(epsilon, 1e-5, rate, steps, [TUNING])
    total = compose([TUNING, GaussianEvent(sigma, rate, steps)], 1e-5).upper
    assert 0.99 * epsilon < total <= epsilon
    assert sigma > calibrate(epsilon, 1e-5, rate, steps)


def test_values_out_of_range():
    for values in (
        (0.0, 0.0, 0.5), (math.nan, 0.0, 0.5), (1.0, -1.0, 0.5), (1.0, math.nan, 0.5), (1.0, 0.0, 1.0),
        (1.0, 0.0, 0.0), (math.inf, 0.0, 0.5),
    ):  # fmt: skip
        with pytest.raises(UsageError):
            TuningEvent(*values)
    for mean in (1.0, math.nan, 1e9):
        with pytest.raises(UsageError):
            TrialCount.with_mean(mean)
