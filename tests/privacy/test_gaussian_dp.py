"""Promise 1 at q = 1: the closed form against 60-digit arithmetic and against its own definition."""

from __future__ import annotations

import math

import mpmath
import numpy as np
import pytest

from dprandp.errors import UsageError
from dprandp.privacy.gaussian_dp import (
    gaussian_dp_delta,
    gaussian_dp_epsilon,
    gaussian_dp_log_delta,
    gaussian_dp_mu,
)


def precise_delta(mu: float, epsilon: float) -> mpmath.mpf:
    """The formula of Balle & Wang in 300-digit arithmetic: slow, with nothing clever in it."""
    with mpmath.workdps(300):
        m, e = mpmath.mpf(mu), mpmath.mpf(epsilon)
        return mpmath.ncdf(m / 2 - e / m) - mpmath.exp(e) * mpmath.ncdf(-m / 2 - e / m)


@pytest.mark.parametrize("mu", [0.01, 0.268, 1.666, 60.0])
@pytest.mark.parametrize("multiple", [0.0, 1.0, 6.0, 20.0])
def test_delta_equals_high_precision_arithmetic(mu, multiple):
    epsilon = mu * mu / 2 + multiple * mu
    exact = float(mpmath.log(precise_delta(mu, epsilon)))
    assert gaussian_dp_log_delta(mu, epsilon) == pytest.approx(exact, abs=1e-8)


def test_delta_is_the_hockey_stick_divergence_of_two_gaussians():
    mu, epsilon = 1.3, 0.7
    x = np.linspace(-12, 14, 400_001)
    with_record, without = np.exp(-((x - mu) ** 2) / 2), np.exp(-(x**2) / 2)
    area = np.trapezoid(np.maximum(with_record - math.exp(epsilon) * without, 0), x) / math.sqrt(2 * math.pi)
    assert gaussian_dp_delta(mu, epsilon) == pytest.approx(area, rel=1e-7)


@pytest.mark.parametrize("delta", [1e-300, 1e-18, 1e-5, 0.1])
@pytest.mark.parametrize("mu", [1e-3, 0.268, 1.666, 40.0])
def test_epsilon_is_never_too_small_and_tight(mu, delta):
    epsilon = gaussian_dp_epsilon(mu, delta)
    assert precise_delta(mu, epsilon) <= delta * (1 + 1e-9)
    if epsilon > 0:
        assert precise_delta(mu, epsilon * (1 - 1e-7)) > delta


@pytest.mark.parametrize(("epsilon", "delta"), [(0.1, 1e-5), (1, 1e-5), (8, 1e-5), (1, 1e-18), (0, 1e-5), (100, 1e-6)])
def test_mu_inverts_epsilon(epsilon, delta):
    mu = gaussian_dp_mu(epsilon, delta)
    assert gaussian_dp_delta(mu, epsilon) <= delta
    assert gaussian_dp_delta(mu * (1 + 1e-6), epsilon) > delta
    assert gaussian_dp_mu(epsilon, delta) == mu


def test_limits_and_published_values():
    assert gaussian_dp_mu(1, 1e-5) == pytest.approx(0.268, abs=5e-4)
    assert gaussian_dp_mu(8, 1e-5) == pytest.approx(1.666, abs=5e-4)
    assert gaussian_dp_epsilon(0.0, 1e-5) == 0
    assert gaussian_dp_epsilon(math.inf, 1e-5) == math.inf
    assert gaussian_dp_epsilon(1e-9, 0.5) == 0  # the total variation is below delta: clamped, not negative
    assert gaussian_dp_delta(0.0, 1.0) == 0


@pytest.mark.parametrize("mu", [1.01e7, 0.99e9, 1.01e9, 1e149])
def test_where_nothing_is_private_the_bound_still_bounds(mu):
    """Exact rational arithmetic would give ε = μ²/2 + zμ with Φ(−z) = δ, up to a term that vanishes like 1/μ."""
    epsilon = gaussian_dp_epsilon(mu, 1e-5)
    assert mu**2 / 2 + 4.26 * mu <= epsilon <= (mu**2 / 2 + 4.81 * mu) * (1 + 1e-11)
    inverse = gaussian_dp_mu(epsilon, 1e-5)
    assert mu * (1 - 1e-8) <= inverse <= mu * (1 + 1e-12)
    assert gaussian_dp_epsilon(inverse, 1e-5) <= epsilon


def test_rounding_never_hides_a_part_of_delta():
    """Small μ and tiny δ, where the two terms of the closed form share most of their digits."""
    random = np.random.default_rng(0)
    for mu, exponent in zip(10 ** random.uniform(-6, -1, 60), random.uniform(-60, -3, 60), strict=True):
        delta = 10**exponent
        assert precise_delta(mu, gaussian_dp_epsilon(mu, delta)) <= delta


def test_senseless_values_are_refused():
    for mu in (-1.0, math.nan):
        with pytest.raises(UsageError, match="mu is"):
            gaussian_dp_epsilon(mu, 1e-5)
    for delta in (0.0, 1.0, -1e-5, math.nan):
        with pytest.raises(UsageError, match="delta is"):
            gaussian_dp_epsilon(1.0, delta)
        with pytest.raises(UsageError, match="delta is"):
            gaussian_dp_mu(1.0, delta)
