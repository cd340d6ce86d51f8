"""Group privacy: exact for full batches, above the truth for sampled ones, monotone."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from dprandp.errors import UsageError
from dprandp.privacy.accounting import GaussianEvent, compose, group_privacy
from dprandp.privacy.analytic import PARTICIPATIONS, Component
from dprandp.privacy.gaussian_dp import gaussian_dp_delta
from dprandp.privacy.neighbours import compose_group, moved_epsilon


def test_the_general_bound_against_its_definition():
    """k neighbours in a row: each step multiplies by exp(ε) and adds δ."""
    for epsilon, delta in ((0.0, 1e-3), (0.3, 0.0), (1.0, 1e-5), (3.0, 1e-9)):
        for size in (1, 2, 3, 10):
            bound, group_delta = group_privacy(epsilon, delta, size)
            chained = 0.0
            for _ in range(size):
                chained = math.exp(epsilon) * chained + delta
            assert bound == pytest.approx(size * epsilon)
            assert group_delta == pytest.approx(chained, rel=1e-9)


def test_the_general_bound_is_reached_by_randomised_response_in_a_row_and_never_passed():
    """A mechanism whose δ at (kε) is known: the Gaussian with k times the sensitivity."""
    mu, epsilon = 0.4, 0.9
    delta = gaussian_dp_delta(mu, epsilon)
    for size in (2, 3, 5):
        bound, group_delta = group_privacy(epsilon, delta, size)
        truth = gaussian_dp_delta(size * mu, bound)
        assert truth <= group_delta
        assert truth > gaussian_dp_delta(mu, bound)


@pytest.mark.parametrize("size", [2, 20])
def test_full_batches_are_exact(size):
    """Oracle: hypothesis testing between N(0, 1) and N(k μ, 1)."""
    sigma, steps, delta = 30.0, 60, 1e-5
    bound = compose_group([GaussianEvent(sigma, 1.0, steps)], delta, size)
    mu = size * math.sqrt(steps) / sigma
    at = bound.upper
    truth = stats.norm.cdf(mu / 2 - at / mu) - math.exp(at) * stats.norm.cdf(-mu / 2 - at / mu)
    assert truth == pytest.approx(delta, rel=1e-6)
    assert bound.lower == bound.upper
    assert f"groups of {size}" in bound.accountant
    discrete = compose_group([GaussianEvent(sigma, 1.0, steps, True)], delta, 2)
    exact = compose_group([GaussianEvent(sigma, 1.0, steps)], delta, 2)
    assert exact.upper < discrete.upper < exact.upper * 1.001


def test_sampled_batches_lie_above_a_tight_accountant():
    """Oracle: the mixture of Gaussians of dp-accounting, where a batch holds Binomial(k, q) of the group."""
    from dp_accounting.pld import privacy_loss_distribution as pld

    sigma, q, steps, delta, size = 4.0, 0.05, 20, 1e-5, 3
    event = GaussianEvent(sigma, q, steps)
    bound = compose_group([event], delta, size)
    chances = [float(stats.binom.pmf(count, size, q)) for count in range(size + 1)]
    tight = pld.from_mixture_gaussian_mechanism(
        sigma, sensitivities=list(range(size + 1)), sampling_probs=chances, value_discretization_interval=1e-3
    )
    truth = tight.self_compose(steps).get_epsilon_for_delta(delta)
    single = compose([event], delta).upper
    assert single < truth <= bound.upper
    assert bound.upper < 3 * truth  # and is of use
    assert bound.upper > size * single * 0.999  # the general bound cannot be better than k ε


@pytest.mark.parametrize(
    ("sigma", "q", "steps", "size"), [(0.5, 0.02, 40, 3), (0.4, 0.05, 10, 5), (0.8, 0.001, 900, 20)]
)
def test_a_step_that_draws_any_of_a_group_is_moved_by_all_of_it(sigma, q, steps, size):
    """Oracle: δ of √K k/σ-GDP, summed over K, the number of steps that draw one of k records at least."""
    for delta in (1e-3, 1e-6):
        epsilon, by = moved_epsilon([Component(sigma, q, steps)], delta, size, size)
        assert by == PARTICIPATIONS
        chance = 1 - (1 - q) ** size
        parts = [gaussian_dp_delta(math.sqrt(k) * size / sigma, epsilon) if k else 0.0 for k in range(steps + 1)]
        truth = float(np.dot(stats.binom.pmf(np.arange(steps + 1), steps, chance), parts))
        assert 0.98 * delta < truth <= delta * (1 + 1e-6)


def test_a_group_of_one_is_one_and_larger_groups_lose_more():
    event = GaussianEvent(60.0, 1.0, 10)
    assert compose_group([event], 1e-5, 1) == compose([event], 1e-5)
    found = [compose_group([event], 1e-5, size).upper for size in (1, 2, 4)]
    assert 2 * found[0] < found[1] < found[2] / 2 < math.inf


@pytest.mark.parametrize("rate", [1.0, 0.5])
def test_a_group_is_not_hidden_because_one_record_is(rate):
    """One record's total variation is below δ, ten records' is above it."""
    event = GaussianEvent(1e4, rate, 1)
    assert compose([event], 1e-4).upper == 0
    assert compose_group([event], 1e-4, 10).upper > 0
    assert compose_group([event], 1e-4, 2).upper == 0


def test_nothing_and_no_noise():
    assert compose_group([], 1e-5, 3).upper == 0
    assert compose_group([GaussianEvent(0.0, 1.0, 1)], 1e-5, 3).upper == math.inf
    assert group_privacy(math.inf, 1e-5, 3)[0] == math.inf
    assert group_privacy(500.0, 1e-5, 30)[1] == math.inf


def test_what_is_senseless_is_refused():
    for size in (0, -1, 1.5, 10**400):
        with pytest.raises(UsageError, match="size of a group"):
            compose_group([GaussianEvent(9.0, 1.0, 1)], 1e-5, size)
        with pytest.raises(UsageError, match="size of a group"):
            group_privacy(1.0, 1e-5, size)
    for epsilon, delta in ((-1.0, 1e-5), (math.nan, 1e-5), (1.0, 1.0), (1.0, -0.1)):
        with pytest.raises(UsageError, match="not a guarantee"):
            group_privacy(epsilon, delta, 2)
