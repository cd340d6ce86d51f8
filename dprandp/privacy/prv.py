"""The privacy-random-variable accountant for sampled Gaussian steps, in both directions of add/remove.

The numerical work is done by ``prv_accountant`` (Gopi, Lee & Wutschitz 2021, "Numerical composition of differential
privacy", Theorem 5.5), whose error in ε and δ is bounded and included in ``upper``. Two things are added here:

* *both directions.* That library composes log(P/Q) for P = "with the record", Q = "without it". Adding a record is the
  other direction, and under composition it is not covered by the first one in general (Lebeda, Regehr, Kamath & Steinke
  2024, "Avoiding pitfalls for privacy accounting of subsampled mechanisms under composition"), so both are computed.
* *bounded work.* The number of grid points is chosen before anything is allocated; time and memory follow from it.

Imported only when an accountant is needed: it loads most of scipy.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from prv_accountant import GaussianMechanism, PoissonSubsampledGaussianMechanism, PrivacyRandomVariable, PRVAccountant
from prv_accountant.accountant import compute_safe_domain_size
from scipy.special import gammaln, log_ndtr

from dprandp.privacy.tuning import TuningEvent

# Grid points of all privacy random variables together: the bound on time and memory, known before anything is
# allocated. 400,000 points of 16 bytes take about 2 s and 100 MiB for both directions; the coarse grid serves
# searches only.
FINE_POINTS, COARSE_POINTS = 400_000, 30_000
# The accountant's error in δ, as a part of δ: it is added to δ in every bound.
DELTA_ERROR_SHARE = 1e-3
# Rényi orders for the rough bound. Any order gives a valid bound; a longer list only makes it tighter.
_ORDERS = np.array([1 + x / 10 for x in range(1, 100)] + list(range(12, 64)) + [72, 96, 128, 192, 256, 512])
# Where no divergence needs a sum of many terms.
_CLOSED_FORM_ORDERS = 1 + np.geomspace(1e-2, 1e5, 300)


class AccountantRefused(Exception):
    """The accountant cannot give a sound bound here; the caller names another one aloud."""


class RemoveDirection(PoissonSubsampledGaussianMechanism):
    """log(P/Q) under P = (1−q) N(0, σ²) + q N(1, σ²), Q = N(0, σ²): the record is there, or is not."""

    def probability(self, a: np.ndarray, b: np.ndarray) -> np.ndarray:
        """Mass of the adjacent cells [a_i, b_i]; one cdf evaluation for each edge, where the library makes two."""
        return np.diff(self.cdf(np.append(a, b[-1:])))

    def rdp(self, alpha: float) -> float:
        """Rényi divergence of order alpha > 1: exact at integers, an upper bound between them.

        log A(α) = (α − 1) RDP(α) is a cumulant generating function, hence convex in α, with log A(1) = 0: a straight
        line between two integers lies above it. The library's own series for fractions takes seconds at large q.
        """
        if math.isinf(alpha):
            return math.inf
        below, q, sigma = math.floor(alpha), float(self.p), float(self.sigma)
        part = alpha - below
        log_moment = (1 - part) * _log_moment(q, sigma, below)
        if part:
            log_moment += part * _log_moment(q, sigma, below + 1)
        return log_moment / (alpha - 1)


@lru_cache(maxsize=10_000)
def _log_moment(q: float, sigma: float, order: int) -> float:
    """log A(order) = log Σ_k binom(order, k) (1−q)^(order−k) q^k exp((k² − k)/(2σ²)) (Mironov et al. 2019, §3.3)."""
    if order == 1:
        return 0.0
    k = np.arange(order + 1)
    log_binomial = gammaln(order + 1) - gammaln(k + 1) - gammaln(order - k + 1)
    terms = log_binomial + k * math.log(q) + (order - k) * math.log1p(-q) + (k * k - k) / (2 * sigma**2)
    largest = float(terms.max())
    return max(0.0, largest + math.log(float(np.exp(terms - largest).sum())))


class AddDirection(RemoveDirection):
    """log(Q/P) under Q: the record is not there, or is.

    With x ~ Q = N(0, σ²), the loss −log(1 − q + q exp((2x − 1)/(2σ²))) falls in x, so it is at most t exactly where
    x ≥ σ² log((exp(−t) − 1 + q)/q) + 1/2. It never exceeds −log(1 − q).

    Its Rényi divergences are at most those of the other direction (Mironov, Talwar & Zhang 2019, "Rényi differential
    privacy of the sampled Gaussian mechanism", Theorem 5), so the inherited ``rdp`` gives a grid that is wide enough.
    """

    def cdf(self, t: np.ndarray) -> np.ndarray:
        inside = (np.expm1(-np.asarray(t, dtype=np.longdouble)) + self.p) / self.p
        reachable = inside > 0
        z = np.log(np.where(reachable, inside, 1))
        score = -(self.sigma * z + 1 / (2 * self.sigma))
        return np.where(reachable, np.exp(log_ndtr(np.asarray(score, dtype=np.float64))), 1.0)


@dataclass(frozen=True)
class Component:
    """``steps`` independent uses of one sampled Gaussian; sample_rate = 1 is the plain Gaussian."""

    noise_multiplier: float
    sample_rate: float
    steps: int

    def variable(self, add: bool) -> PrivacyRandomVariable:
        if self.sample_rate == 1:
            return GaussianMechanism(self.noise_multiplier)  # symmetric: one variable serves both directions
        return (AddDirection if add else RemoveDirection)(self.sample_rate, self.noise_multiplier)


def rough_epsilon(components: Sequence[Component], delta: float, tuning: Sequence[TuningEvent] = ()) -> float:
    """A valid but loose upper bound on ε through Rényi orders, in milliseconds (Balle et al. 2020, Theorem 21)."""
    sampled = any(component.sample_rate < 1 for component in components)
    orders = _CLOSED_FORM_ORDERS if tuning and not sampled else _ORDERS
    total = np.zeros(len(orders))
    for component in components:
        variable = component.variable(add=False)
        total += component.steps * np.array([variable.rdp(order) for order in orders])
    for event in tuning:
        total += event.rdp(orders)
    epsilon = total - np.log(delta * orders) / (orders - 1) + np.log1p(-1 / orders)
    return max(0.0, float(np.min(epsilon)))


def prv_epsilon(
    components: Sequence[Component], delta: float, epsilon_error: float, promised: bool = True
) -> tuple[float, float, float]:
    """(lower, estimate, upper) bounds on ε of the composition; not clamped, so slightly negative where ε is about 0.

    Args:
        components: the mechanisms, each with its number of steps.
        delta: δ of the guarantee, in (0, 1).
        epsilon_error: wanted half-width of the bounds; wider when the number of grid points would be passed.
        promised: False takes the coarse grid and skips the add direction (to aim a search, never for a promise).

    Guarantee:
        When ``promised``, ``upper`` is at least the ε of the composition at ``delta`` under add/remove.

    Raises:
        AccountantRefused: floating point or the bound on grid points does not allow a sound, useful answer.
    """
    steps = [component.steps for component in components]
    delta_error = delta * DELTA_ERROR_SHARE
    removal = [component.variable(add=False) for component in components]
    half_width = compute_safe_domain_size(removal, steps, epsilon_error, delta_error)
    if not math.isfinite(half_width):
        raise AccountantRefused("the Rényi bracket is not finite")
    work = 2 * half_width * math.sqrt(sum(steps) / 2 * math.log(12 / delta_error)) * len(components)
    # Grid points = work / epsilon_error (Theorem 5.5 gives the mesh), so a bound on points is a bound on the error.
    epsilon_error = max(epsilon_error, work / (FINE_POINTS if promised else COARSE_POINTS))
    if epsilon_error > 0.1 * half_width:
        raise AccountantRefused(f"it would need more than {FINE_POINTS} grid points")
    bounds = _one_direction(removal, steps, delta, delta_error, epsilon_error)
    if promised and any(component.sample_rate < 1 for component in components):
        addition = [component.variable(add=True) for component in components]
        other = _one_direction(addition, steps, delta, delta_error, epsilon_error)
        bounds = tuple(max(pair) for pair in zip(bounds, other, strict=True))
    return bounds


def _one_direction(
    variables: Sequence[PrivacyRandomVariable],
    steps: Sequence[int],
    delta: float,
    delta_error: float,
    epsilon_error: float,
) -> tuple[float, float, float]:
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a numerical warning here is a doubt about the bound: refuse instead
        try:
            accountant = PRVAccountant(variables, epsilon_error, delta_error, max_self_compositions=steps)
            bounds = accountant.compute_epsilon(delta, steps)
        except (ValueError, RuntimeError, ArithmeticError, AssertionError, IndexError, Warning) as error:
            raise AccountantRefused(str(error) or type(error).__name__) from error
    if any(math.isnan(bound) for bound in bounds):
        raise AccountantRefused("it returned NaN")
    return bounds
