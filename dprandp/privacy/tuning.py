"""What it costs to choose settings on private data: run a private training a random number of times, keep the best.

Trying a *fixed* number k of settings costs about k times one training. With a number of trials K that is itself random,
and never shown, it costs two to three times one trial (Liu & Talwar 2019; Papernot & Steinke 2022, "Hyperparameter
tuning with Rényi differential privacy"). What one trial hands over, its score included, must be private as a whole.

Theorem 2 of Papernot & Steinke. Let one trial be (λ, ε_λ)-RDP and (λ̂, ε_λ̂)-RDP, λ > 1, λ̂ ≥ 1, with outputs in a total
order. Draw K from D(η, γ), see ``TrialCount``; run K trials, independent of one another; output the best. This is
(λ, ε')-RDP for every λ̂, hence for the best one, with

    ε' = ε_λ + (1 + η) (1 − 1/λ̂) ε_λ̂ + (1 + η) log(1/γ) / λ̂ + log(E K) / (λ − 1)
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from scipy.optimize import brentq

from dprandp.errors import UsageError

_GAMMA_SMALLEST = 1e-12


@dataclass(frozen=True)
class TrialCount:
    """D(η, γ), the truncated negative binomial distribution of the number of trials, on 1, 2, 3, …

    P(K = k) is proportional to (1 − γ)^k ∏_{l<k} (l + η) / (l + 1); for η = 0, the logarithmic one, to (1 − γ)^k / k;
    η = 1 is the geometric one. η in (−1, 100], γ (a smaller one: more trials) in [1e-12, 1), else UsageError.
    """

    eta: float
    gamma: float

    def __post_init__(self) -> None:
        if not -1 < self.eta <= 100:
            raise UsageError(f"eta is {self.eta}.", fix="Give a number above -1, at most 100, such as 0.")
        if not _GAMMA_SMALLEST <= self.gamma < 1:
            raise UsageError(f"gamma is {self.gamma}.", fix="Give a number from 1e-12 to below 1.")

    @classmethod
    def with_mean(cls, mean: float, eta: float = 0.0) -> TrialCount:
        """The distribution of this η whose mean is above 1 and at most 10,000 (else UsageError)."""
        if not 1 < mean <= 10_000:
            raise UsageError(f"The mean number of trials is {mean}.", fix="Give a number above 1, at most 10000.")

        def excess(log_gamma: float) -> float:
            return math.log(cls(eta, math.exp(log_gamma)).mean / mean)

        lowest, highest = math.log(_GAMMA_SMALLEST), -1e-9
        if excess(lowest) < 0:
            raise UsageError(f"With eta = {eta} the mean never reaches {mean}.", fix="Give a larger eta or less mean.")
        return cls(eta, math.exp(brentq(excess, lowest, highest, xtol=1e-14)))

    @property
    def mean(self) -> float:
        """E K = η (1 − γ) / (γ (1 − γ^η)), and (1/γ − 1) / log(1/γ) for η = 0."""
        return self._first_ratio / self.gamma

    def probabilities(self) -> Iterator[float]:
        """P(K = 1), P(K = 2), …, without end; zeros once they are below the smallest double."""
        # (1 − γ) η / (γ^−η − 1) = γ^η · E K · γ, by the same quotient as in ``mean``
        probability, k = self._first_ratio * self.gamma**self.eta, 1
        while True:
            yield probability
            probability *= (1 - self.gamma) * (k + self.eta) / (k + 1)
            k += 1

    def draw(self, uniform: float) -> int:
        """K from one uniform value in [0, 1), by inversion; rounding shifts the probabilities by less than 1e-12."""
        total = 0.0
        for k, probability in enumerate(self.probabilities(), start=1):
            total += probability
            if total > uniform or (probability < 1e-18 and k > self.mean):
                return k
        raise RuntimeError("the probabilities ended")

    @property
    def _first_ratio(self) -> float:
        """η (1 − γ) / (1 − γ^η), and (1 − γ) / log(1/γ) for η = 0: two forms of one function, continuous in η."""
        log_inverse = -math.log(self.gamma)
        if abs(self.eta) * log_inverse < 1e-12:
            return (1 - self.gamma) / log_inverse
        return self.eta * (1 - self.gamma) / -math.expm1(-self.eta * log_inverse)


def selection_rdp(
    order: np.ndarray | float, at_order: np.ndarray | float, hat: float, at_hat: float, trials: TrialCount
) -> np.ndarray | float:
    """Theorem 2: RDP of the best of K trials at each ``order`` λ > 1, from that of one there and at λ̂ = ``hat``."""
    repeated = (1 + trials.eta) * ((1 - 1 / hat) * at_hat - math.log(trials.gamma) / hat)
    return at_order + repeated + math.log(trials.mean) / (np.asarray(order) - 1)


@dataclass(frozen=True)
class TuningEvent:
    """The best of a random number of trials, each no worse than a Gaussian mechanism of parameter ``mu``.

    ``mu``: from 1e-6 to 1000 (else UsageError); the Rényi DP of one trial at every order λ is at most λ μ²/2. A
    composition of full-batch Gaussian steps of multiplier σ_i has μ² = Σ 1/σ_i². ``eta, gamma``: see ``TrialCount``.
    """

    mu: float
    eta: float
    gamma: float

    def __post_init__(self) -> None:
        if not 1e-6 <= self.mu <= 1e3:
            raise UsageError(f"mu of a trial is {self.mu}.", fix="Give a number from 1e-6 to 1000.")
        _ = self.trials

    @property
    def trials(self) -> TrialCount:
        return TrialCount(self.eta, self.gamma)

    def rdp(self, orders: np.ndarray) -> np.ndarray:
        """Rényi DP at orders λ > 1, float64 [n].

        For a Gaussian trial (1 − 1/λ̂) ε_λ̂ + log(1/γ)/λ̂ = (λ̂ − 1) μ²/2 + log(1/γ)/λ̂, least at λ̂² = 2 log(1/γ)/μ².
        Rényi divergences rise with their order, so the value at a larger order serves a smaller one as well: the
        theorem's is least at (λ − 1)² = 2 log(E K)/μ².

        Guarantee:
            The whole selection (which setting was best, and its score) is (λ, result)-RDP for each order, if K is drawn
            from ``trials``, is not revealed, and every trial was independent and μ-Gaussian in the sense above.
        """
        hat = max(1.0, math.sqrt(-2 * math.log(self.gamma)) / self.mu)
        orders = np.maximum(orders, 1 + math.sqrt(2 * math.log(self.trials.mean)) / self.mu)
        return selection_rdp(orders, orders * self.mu**2 / 2, hat, hat * self.mu**2 / 2, self.trials)
