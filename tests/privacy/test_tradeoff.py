"""What an attacker gains, and replace-one. Oracles: most powerful tests and hockey-stick areas by integration."""

from __future__ import annotations

import math

import numpy as np
import pytest
from dp_accounting import NeighboringRelation
from dp_accounting.pld.privacy_loss_distribution import from_gaussian_mechanism
from scipy.stats import norm

from dprandp.errors import UsageError
from dprandp.privacy import accounting, neighbours, pld
from dprandp.privacy.accounting import GaussianEvent, compose
from dprandp.privacy.gaussian_dp import gaussian_dp_delta, gaussian_dp_epsilon
from dprandp.privacy.neighbours import REPLACE_ONE, calibrate_adjacency, compose_adjacency, trade_off

RATES = (1e-3, 0.01, 0.05, 0.3)


def mixture(q: float, sigma: float, centre: float):
    """Upper tail of (1−q) N(0, σ²) + q N(centre, σ²)."""
    return lambda x: (1 - q) * norm.sf(x / sigma) + q * norm.sf((x - centre) / sigma)


def best_rates(q: float, sigma: float) -> np.ndarray:
    """Most powerful tests of one sampled step: thresholds on x, since the likelihood ratio is monotone in it."""
    x = np.linspace(-12 * sigma, 12 * sigma + 1, 40_001)
    without, with_record = mixture(0, sigma, 0)(x), mixture(q, sigma, 1)(x)
    found = np.interp(RATES, without[::-1], with_record[::-1])
    missed = np.interp(RATES, 1 - with_record, 1 - without)
    return np.maximum(found, missed)


@pytest.mark.parametrize(("q", "sigma"), [(0.1, 1.0), (0.9, 0.8)])
def test_an_attacker_on_one_step_does_as_well_as_the_best_test_and_no_better(q, sigma):
    found = trade_off([GaussianEvent(sigma, q, 1)])
    for rate, best in zip(RATES, best_rates(q, sigma), strict=True):
        assert best - 1e-6 <= found.true_positive_rate(rate) <= 1.01 * best + 1e-6
    advantage = q * (2 * norm.cdf(1 / (2 * sigma)) - 1)
    assert advantage <= found.advantage <= 1.05 * advantage + 1e-6


def test_many_sampled_steps_are_nearly_gaussian():
    """T = 875 steps at the published setting: within a few per cent of the Gaussian through (1, 1e-5)."""
    found = trade_off([GaussianEvent(9.144, 0.08192, 875)])
    for rate in RATES:
        assert found.true_positive_rate(rate) == pytest.approx(norm.cdf(norm.ppf(rate) + 0.268), rel=0.02)
    assert found.advantage == pytest.approx(2 * norm.cdf(0.134) - 1, rel=0.02)


def test_full_batches_have_the_closed_form_and_replacing_doubles_mu():
    events = [GaussianEvent(30.0, 1.0, 60), GaussianEvent(20.0, 1.0, 10)]
    mu = math.sqrt(60 / 900 + 10 / 400)
    for adjacency, moves in (("zero-out", 1), ("add-remove", 1), ("replace-one", 2)):
        found = trade_off(events, adjacency)
        assert found.mu == pytest.approx(moves * mu)
        assert found.true_positive_rate(0.01) == pytest.approx(norm.cdf(norm.ppf(0.01) + moves * mu))
        assert found.advantage == pytest.approx(2 * norm.cdf(moves * mu / 2) - 1)
        epsilon = compose_adjacency(events, 1e-5, adjacency).upper
        assert epsilon == pytest.approx(gaussian_dp_epsilon(moves * mu, 1e-5), rel=1e-9)


def test_nothing_and_everything():
    assert trade_off([]).true_positive_rate(0.01) == pytest.approx(0.01)
    assert trade_off([]).advantage == 0
    for events in ([GaussianEvent(0.0, 0.1, 1)], [GaussianEvent(0.0, 1.0, 1)]):
        found = trade_off(events, REPLACE_ONE)
        assert found.true_positive_rate(1e-9) == found.advantage == 1
        assert compose_adjacency(events, 1e-5, REPLACE_ONE).upper == math.inf
    assert compose_adjacency([], 1e-5, REPLACE_ONE).upper == 0
    sampled = trade_off([GaussianEvent(2.0, 0.1, 5)], REPLACE_ONE)
    assert 0 <= sampled.true_positive_rate(0.0) < 1e-6
    assert sampled.true_positive_rate(1.0) == 1


@pytest.mark.parametrize(("mu", "delta"), [(0.268, 1e-5), (1.666, 1e-3)])
def test_two_moves_along_a_gaussian_curve_double_mu(mu, delta):
    epsilons = np.linspace(0, gaussian_dp_epsilon(mu, 1e-9), 4000)
    deltas = np.array([gaussian_dp_delta(mu, epsilon) for epsilon in epsilons])
    exact = gaussian_dp_epsilon(2 * mu, delta)
    assert exact <= neighbours._two_moves(epsilons, deltas, delta) <= 1.002 * exact
    curve = neighbours.TradeOff(None, epsilons, deltas, 2, "")
    for rate in RATES:
        best = norm.cdf(norm.ppf(rate) + 2 * mu)
        assert best <= curve.true_positive_rate(rate) <= 1.001 * best
    assert 2 * norm.cdf(mu) - 1 <= curve.advantage <= min(1, 2 * (2 * norm.cdf(mu / 2) - 1))


@pytest.mark.parametrize(("q", "sigma"), [(0.1, 1.0), (0.99, 3.0)])
def test_replacing_in_one_sampled_step_is_covered(q, sigma):
    """Two records that pull in opposite directions: a real pair of neighbours, whose δ is an area."""
    x = np.linspace(-12 * sigma - 1, 12 * sigma + 1, 100_001)
    bell = norm(scale=sigma).pdf
    here, there = ((1 - q) * bell(x) + q * bell(x - side) for side in (1, -1))
    events = [GaussianEvent(sigma, q, 1)]
    for delta in (1e-2, 1e-4):
        epsilon = compose_adjacency(events, delta, REPLACE_ONE).upper
        assert np.trapezoid(np.maximum(here - math.exp(epsilon) * there, 0), x) <= delta
        # Positive control: the add/remove ε would not do.
        smaller = compose(events, delta).upper
        assert np.trapezoid(np.maximum(here - math.exp(smaller) * there, 0), x) > 1.5 * delta


def test_replacing_under_composition_covers_that_pair_and_is_not_wasteful():
    sigma, q, steps, delta = 9.144, 0.08192, 875, 1e-5
    pair = from_gaussian_mechanism(
        sigma, sampling_prob=q, neighboring_relation=NeighboringRelation.REPLACE_ONE, value_discretization_interval=1e-4
    )
    reached = pair.self_compose(steps).get_epsilon_for_delta(delta)
    upper = compose_adjacency([GaussianEvent(sigma, q, steps)], delta, REPLACE_ONE).upper
    assert 0.999 * reached <= upper <= 1.03 * reached


@pytest.mark.parametrize("rate", [1.0, 0.08192])
def test_calibration_for_replacing_stays_just_below_its_target(rate):
    sigma = calibrate_adjacency(1.0, 1e-5, rate, 200, REPLACE_ONE)
    assert 0.995 <= compose_adjacency([GaussianEvent(sigma, rate, 200)], 1e-5, REPLACE_ONE).upper <= 1.0


@pytest.mark.parametrize(("sigma", "name"), [(0.5, "participations"), (200.0, "full batches")])
def test_where_the_curve_ends_too_early_both_moves_are_bounded_as_one(monkeypatch, sigma, name):
    monkeypatch.setattr(neighbours, "_two_moves", lambda *curve: None)
    bound = compose_adjacency([GaussianEvent(sigma, 0.5, 7)], 1e-5, REPLACE_ONE)
    full = gaussian_dp_epsilon(2 * math.sqrt(7) / sigma, 1e-5)
    assert 0.5 * full < bound.upper <= full * (1 + 1e-9)
    assert name in bound.accountant
    assert "moved by 2C" in bound.accountant


def test_the_fallback_is_named_aloud_and_looser(monkeypatch):
    events = [GaussianEvent(2.0, 0.1, 100)]
    tight = trade_off(events)

    def refuse(*arguments):
        raise pld.AccountantRefused("for a test")

    monkeypatch.setattr(pld, "pld_curve", refuse)
    accounting._cached_curve.cache_clear()
    said: list[str] = []
    loose = trade_off(events, warn=said.append)
    assert "for a test" in said[0]
    assert "Rényi" in said[0]
    assert loose.source == accounting.WITHOUT_GRID
    trade_off(events, warn=said.append)
    accounting._cached_curve.cache_clear()
    assert len(said) == 2  # also when the answer is remembered
    for rate in RATES:
        assert tight.true_positive_rate(rate) < loose.true_positive_rate(rate) <= 1


def test_senseless_questions_are_refused():
    assert calibrate_adjacency(math.inf, 1e-5, 0.1, 10, REPLACE_ONE) == 0
    with pytest.raises(UsageError, match="adjacency is 'swap'"):
        trade_off([], "swap")
    with pytest.raises(UsageError, match="adjacency is 'swap'"):
        compose_adjacency([], 1e-5, "swap")
    for rate in (-0.1, 1.1, math.nan):
        with pytest.raises(UsageError, match="false-positive rate"):
            trade_off([]).true_positive_rate(rate)
