"""Gaussian differential privacy: the exact trade-off of full-batch Gaussian steps.

A full-batch step with noise multiplier σ is exactly (1/σ)-GDP, and T such steps compose to √(Σ 1/σ²)-GDP exactly (Dong,
Roth & Su 2022, "Gaussian Differential Privacy", Corollary 3.3). Its (ε, δ) curve has a closed form (Balle & Wang 2018,
"Improving the Gaussian mechanism for differential privacy", Theorem 8):

    δ(ε) = Φ(μ/2 − ε/μ) − exp(ε) Φ(−μ/2 − ε/μ)

All logarithms of Φ come from ``scipy.special.log_ndtr``, so that δ = 1e-300 or μ = 100 neither underflow nor overflow.
"""

from __future__ import annotations

import math

from scipy.optimize import brentq
from scipy.special import log_ndtr

from dprandp.errors import UsageError

# Results of a root finder are moved by this factor to the side on which the promise holds, and then checked.
_OUTWARD = 1e-12
_LARGEST_MU = 1e7  # beyond, the closed form cancels in doubles, and ``_largest_epsilon`` is as good
_ROUNDING = 1e-15  # of the logarithms that the closed form subtracts: some units in the last place


def gaussian_dp_log_delta(mu: float, epsilon: float) -> float:
    """Natural logarithm of the smallest δ at which a μ-GDP mechanism is (ε, δ)-DP, rounded up; −inf for μ = 0."""
    _require(math.isfinite(mu) and mu >= 0, "mu", mu, "a finite number of at least 0")
    _require(math.isfinite(epsilon) and epsilon >= 0, "epsilon", epsilon, "a finite number of at least 0")
    if mu == 0:
        return -math.inf
    log_first = float(log_ndtr(mu / 2 - epsilon / mu))
    if log_first == -math.inf:
        return -math.inf
    log_ratio = epsilon + float(log_ndtr(-mu / 2 - epsilon / mu)) - log_first
    # Where μ is small or ε large the two terms share most of their digits. What rounding may have hidden of their
    # difference is added; total variation, the δ at ε = 0, bounds what that makes of it.
    log_ratio = min(log_ratio, 0.0) - _ROUNDING * (1 + epsilon + abs(log_first))
    return min(log_first + math.log(-math.expm1(log_ratio)), math.log(math.erf(mu / math.sqrt(8))))


def gaussian_dp_delta(mu: float, epsilon: float) -> float:
    """The smallest δ at which a μ-GDP mechanism is (ε, δ)-DP (0 when it is below the smallest double)."""
    return math.exp(gaussian_dp_log_delta(mu, epsilon))


def gaussian_dp_epsilon(mu: float, delta: float) -> float:
    """The smallest ε ≥ 0 at which a μ-GDP mechanism is (ε, δ)-DP; inf for μ = inf.

    Guarantee:
        ``gaussian_dp_delta(mu, result) <= delta``; the result exceeds the exact ε by less than 1e-9 of it.

    Raises:
        UsageError: μ is negative or NaN, δ is not between 0 and 1.
    """
    _require(mu >= 0, "mu", mu, "at least 0")
    _require(0 < delta < 1, "delta", delta, "between 0 and 1, both excluded")
    if math.isinf(mu):
        return math.inf
    goal = math.log(delta) - _ROUNDING * (1 - math.log(delta))  # δ itself comes from a logarithm
    if gaussian_dp_log_delta(mu, 0.0) <= goal:
        return 0.0
    high = _largest_epsilon(mu, goal)
    if mu > _LARGEST_MU:
        return high
    epsilon = brentq(lambda e: gaussian_dp_log_delta(mu, e) - goal, 0.0, high, xtol=1e-300, rtol=1e-14, maxiter=500)
    while gaussian_dp_log_delta(mu, epsilon) > goal:
        epsilon = epsilon * (1 + _OUTWARD) + 1e-300
    return epsilon


def _largest_epsilon(mu: float, log_delta: float) -> float:
    """At least the ε of a μ-GDP mechanism: without its negative term δ(ε) is Φ(μ/2 − ε/μ) ≤ exp(−(ε/μ − μ/2)²/2)."""
    return mu * (mu / 2 + math.sqrt(-2 * log_delta)) * (1 + _OUTWARD) + min(1e-9, mu)


def gaussian_dp_mu(epsilon: float, delta: float) -> float:
    """The largest μ for which a μ-GDP mechanism is (ε, δ)-DP: ``gaussian_dp_delta(result, epsilon) <= delta``.

    It makes budgets of different δ comparable.

    Raises:
        UsageError: ε is negative, infinite or NaN, δ is not between 0 and 1.
    """
    _require(math.isfinite(epsilon) and epsilon >= 0, "epsilon", epsilon, "a finite number of at least 0")
    _require(0 < delta < 1, "delta", delta, "between 0 and 1, both excluded")
    goal = math.log(delta) - _ROUNDING * (1 - math.log(delta))  # δ itself comes from a logarithm
    if epsilon > _largest_epsilon(_LARGEST_MU, goal):  # its inverse, a little below
        tail = math.sqrt(-2 * goal)
        return (math.sqrt(2) * math.sqrt(epsilon + tail**2 / 2) - tail) * (1 - 3 * _OUTWARD)
    low, high = 0.0, 1.0
    while gaussian_dp_log_delta(high, epsilon) < goal:
        low, high = high, 2 * high
    if low == 0.0:
        low = high
        while gaussian_dp_log_delta(low, epsilon) > goal:
            low, high = low / 2, low
    mu = brentq(lambda m: gaussian_dp_log_delta(m, epsilon) - goal, low, high, xtol=1e-300, rtol=1e-14, maxiter=500)
    while gaussian_dp_log_delta(mu, epsilon) > goal:
        mu *= 1 - _OUTWARD
    return mu


def _require(holds: bool, name: str, value: float, wanted: str) -> None:
    if not holds:
        raise UsageError(f"{name} is {value}, which is not {wanted}.", fix=f"Give a {name} that is {wanted}.")
