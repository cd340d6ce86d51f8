"""The privacy loss of one Poisson-sampled Gaussian step, as a random variable: its distribution, mean and divergences.

With P = (1−q) N(0, σ²) + q N(1, σ²), "the record is there", and Q = N(0, σ²), "it is not", the loss at x is

    ℓ(x) = log P(x)/Q(x) = log(1 − q + q exp((2x − 1)/(2σ²)))

which rises in x, so that its distribution is that of x read at another place. In the *remove* direction the loss is
Y = ℓ(x) under P, in the *add* direction Y = −ℓ(x) under Q. For q = 1 both are N(1/(2σ²), 1/σ²).
"""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np
from scipy.special import gammaln, ndtr

# Beyond this many standard deviations a normal distribution has no mass in double precision.
_NORMAL_REACH = 39.0
_MOST_PANELS = 20_000
_NODES, _WEIGHTS = np.polynomial.legendre.leggauss(20)


class SampledGaussianLoss:
    """Y of one step.

    Args:
        sample_rate: q in (0, 1].
        noise_multiplier: σ > 0.
        add: the direction, see above.
    """

    def __init__(self, sample_rate: float, noise_multiplier: float, add: bool) -> None:
        self.q, self.sigma, self.add = float(sample_rate), float(noise_multiplier), add

    def cdf(self, t: np.ndarray) -> np.ndarray:
        """P(Y ≤ t), elementwise, float64."""
        return self._tails(np.asarray(t, dtype=np.float64))[0]

    def masses(self, edges: np.ndarray) -> np.ndarray:
        """P(a < Y ≤ b) of the adjacent cells between ascending edges [n + 1]: float64 [n], at least 0.

        Each is a difference of the smaller tails, so that cells far to the right keep their digits.
        """
        below, above = self._tails(edges)
        masses = np.where(below[1:] < 0.5, np.diff(below), -np.diff(above))
        return np.maximum(masses, 0.0)

    def mean(self, low: float, high: float) -> float:
        """E[Y | low < Y ≤ high], to about 14 digits: Gauss-Legendre panels in x, shorter than ℓ's bend and the bell.

        NaN when the interval holds no mass; ValueError when σ is so small (about 0.002) that it would take too long.
        """
        ends = self._place(np.array([-high, -low] if self.add else [low, high])) * self.sigma
        start, stop = np.clip(ends, -_NORMAL_REACH * self.sigma, 1 + _NORMAL_REACH * self.sigma)
        if not stop > start:
            return math.nan
        width = self.sigma if self.q == 1 else min(self.sigma, 2 * self.sigma**2)
        panels = math.ceil((stop - start) / width)
        if panels > _MOST_PANELS:
            raise ValueError(f"noise multiplier {self.sigma:g} is too small for the mean of its loss to be integrated")
        edges = np.linspace(start, stop, panels + 1)
        half = np.diff(edges)[:, None] / 2
        x = edges[:-1, None] + half * (1 + _NODES)
        bells = np.exp(-((x / self.sigma) ** 2) / 2)
        if not self.add:
            bells = (1 - self.q) * bells + self.q * np.exp(-(((x - 1) / self.sigma) ** 2) / 2)
        weights = half * _WEIGHTS * bells
        mean = float((weights * self._loss(x)).sum() / weights.sum())
        return -mean if self.add else mean

    def _loss(self, x: np.ndarray) -> np.ndarray:
        """ℓ(x), accurate near 0 and without overflow."""
        score = (2 * x - 1) / (2 * self.sigma**2)
        if self.q == 1:
            return score
        low, high = np.minimum(score, 0), np.maximum(score, 0)
        return np.where(
            score > 0, high + np.log1p((1 - self.q) * np.expm1(-high)), np.log1p(self.q * np.expm1(low))
        )

    def _place(self, t: np.ndarray) -> np.ndarray:
        """x/σ at which ℓ(x) = t: σ log((exp(t) − 1 + q)/q) + 1/(2σ); −inf where t ≤ log(1 − q), the least loss."""
        if self.q == 1:
            return self.sigma * t + 1 / (2 * self.sigma)
        low = np.expm1(np.minimum(t, 1)) / self.q
        high = np.maximum(t, 1)
        with np.errstate(divide="ignore"):  # log 0 = -inf is meant
            inverse = np.where(
                t < 1,
                np.log1p(np.maximum(low, -1)),
                high + np.log1p(-(1 - self.q) * np.exp(-high)) - math.log(self.q),
            )
        return self.sigma * inverse + 1 / (2 * self.sigma)

    def _tails(self, t: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """P(Y ≤ t) and P(Y > t), each with full relative precision."""
        if self.add:
            place = self._place(-t)
            return ndtr(-place), ndtr(place)
        place = self._place(t)
        moved, q = place - 1 / self.sigma, self.q
        return (1 - q) * ndtr(place) + q * ndtr(moved), (1 - q) * ndtr(-place) + q * ndtr(-moved)


def renyi_divergence(sample_rate: float, noise_multiplier: float, order: float) -> float:
    """Rényi divergence of P from Q of an order above 1: exact at integers, an upper bound between them.

    log A(α) = (α − 1) RDP(α) is a cumulant generating function, hence convex in α, with log A(1) = 0: a straight line
    between two integers lies above it. The divergence of Q from P is at most this one (Mironov, Talwar & Zhang 2019,
    "Rényi differential privacy of the sampled Gaussian mechanism", Theorem 5).
    """
    if sample_rate == 1:
        return order / (2 * noise_multiplier * noise_multiplier)
    below = math.floor(order)
    part = order - below
    log_moment = (1 - part) * _log_moment(sample_rate, noise_multiplier, below)
    if part:
        log_moment += part * _log_moment(sample_rate, noise_multiplier, below + 1)
    return log_moment / (order - 1)


@lru_cache(maxsize=10_000)
def _log_moment(q: float, sigma: float, order: int) -> float:
    """log A(order) = log Σ_k binom(order, k) (1−q)^(order−k) q^k exp((k² − k)/(2σ²)) (Mironov et al. 2019, §3.3)."""
    if order == 1:
        return 0.0
    log_binomial, k = _log_binomials(order)
    terms = log_binomial + k * math.log(q) + (order - k) * math.log1p(-q) + (k * k - k) / (2 * sigma * sigma)
    largest = float(terms.max())
    return max(0.0, largest + math.log(float(np.exp(terms - largest).sum())))


@lru_cache(maxsize=256)
def _log_binomials(order: int) -> tuple[np.ndarray, np.ndarray]:
    k = np.arange(order + 1, dtype=np.float64)
    return gammaln(order + 1) - gammaln(k + 1) - gammaln(order - k + 1), k
