"""Two worlds, with and without a canary: the μ of Gaussian DP that their scores prove.

An attacker who answers "with" above a threshold errs with a false positive rate α and a false negative rate β. A
μ-GDP mechanism forces Φ⁻¹(1 − α) − Φ⁻¹(β) ≤ μ (Dong, Roth & Su 2022, Definition 2.6 and eq. 6), whatever the score and
the threshold. The threshold is chosen on one half of the trials; the other half bounds both rates from above (Clopper
& Pearson 1934), which bounds μ from below (Nasr et al. 2023, "Tight auditing of differentially private machine
learning", section 4).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.special import betaincinv, ndtri

from dprandp.errors import UsageError

_THRESHOLDS = 200
"""Candidates for the threshold, at equal steps of the pooled scores' ranks."""


def rate_upper_bound(count: np.ndarray | int, trials: int, significance: float) -> np.ndarray:
    """Clopper & Pearson's upper bound on a probability.

    Args:
        count: how often the event was seen, 0 … trials.
        trials: independent trials, at least 1.
        significance: in (0, 1).

    Returns:
        float64, shaped like ``count``: the largest p at which ``count`` or fewer events still have a probability of
        ``significance``; 1 where every trial was an event.

    Guarantee:
        Below the true rate with a probability of at most ``significance``, for every rate and every number of trials.
    """
    count = np.asarray(count, dtype=np.float64)
    some = np.minimum(count, trials - 1)
    return np.where(count >= trials, 1.0, betaincinv(some + 1, trials - some, 1 - significance))


@dataclass(frozen=True)
class TwoWorldBound:
    """What two samples of scores prove.

    Attributes:
        mu_lower: lower bound on μ; 0 where nothing is proven.
        threshold: scores above it were taken as "with".
        false_positives, false_negatives: errors among ``judged`` trials of each world.
        judged: trials a world that were not used to choose the threshold.
        significance: chance of a bound above the true μ, at most.
    """

    mu_lower: float
    threshold: float
    false_positives: int
    false_negatives: int
    judged: int
    significance: float


def two_world_bound(without: np.ndarray, having: np.ndarray, significance: float) -> TwoWorldBound:
    """The μ that scores from two worlds prove.

    Args:
        without: float64 [n], scores of independent trials without the canary; n at least 4.
        having: float64 [n], scores of as many independent trials with it. Larger means "more likely with".
        significance: in (0, 1).

    Guarantee:
        ``mu_lower`` exceeds the μ of a μ-GDP mechanism with a probability of at most ``significance``.

    Raises:
        UsageError: too few trials, samples of different size, a score that is no number, or an impossible significance.
    """
    if without.shape != having.shape or without.ndim != 1 or len(without) < 4:
        raise UsageError(
            f"Two samples of {without.shape} and {having.shape} scores.", fix="Give at least 4 trials a world."
        )
    if not (np.isfinite(without).all() and np.isfinite(having).all() and 0 < significance < 1):
        raise UsageError("A score is not finite, or the significance is not between 0 and 1.", fix="Check the scores.")
    half = len(without) // 2
    candidates = _candidates(without[:half], having[:half])
    # At a stricter level the best threshold is one where errors are common: it does not follow a lucky tail.
    bounds, _, _ = _bounds(without[:half], having[:half], candidates, significance**2)
    threshold = candidates[int(np.argmax(bounds))]
    judged = len(without) - half
    bound, positives, negatives = _bounds(without[half:], having[half:], np.array([threshold]), significance)
    return TwoWorldBound(
        max(0.0, float(bound[0])), float(threshold), int(positives[0]), int(negatives[0]), judged, significance
    )


def largest_bound(trials: int, significance: float) -> float:
    """The μ that n trials a world prove when every one of them is told apart: no audit of this size shows more."""
    rate = rate_upper_bound(0, trials - trials // 2, significance / 2)
    return float(-2 * ndtri(rate))


@dataclass(frozen=True)
class Power:
    """What the two-world test would show at one true μ.

    Attributes:
        factor: true μ over claimed μ: noise too small by this factor.
        mean_bound: mean of the lower bound on μ.
        flagged: how often the bound exceeds the claim.
    """

    factor: float
    mean_bound: float
    flagged: float


def two_world_power(
    mu: float, trials: int, significance: float, factors: Sequence[float], seed: int, repeats: int = 50
) -> list[Power]:
    """Simulate the test on ideal Gaussian scores of mechanisms that claim ``mu`` and have ``factor`` times that.

    Args:
        mu: claimed, above 0.
        trials: a world.
        significance: of the test.
        factors: of the true μ over the claimed one.
        seed: public randomness.
        repeats: simulated audits for each factor.
    """
    generator = np.random.default_rng(seed)
    found = []
    for factor in factors:
        bounds = [
            two_world_bound(
                generator.standard_normal(trials), generator.standard_normal(trials) + factor * mu, significance
            ).mu_lower
            for _ in range(repeats)
        ]
        found.append(Power(factor, float(np.mean(bounds)), float(np.mean(np.array(bounds) > mu))))
    return found


def _candidates(without: np.ndarray, having: np.ndarray) -> np.ndarray:
    """Thresholds between neighbouring distinct scores, thinned out by rank."""
    pooled = np.unique(np.concatenate([without, having]))
    kept = pooled[np.unique(np.linspace(0, len(pooled) - 1, _THRESHOLDS + 1).round().astype(int))]
    return kept if len(kept) == 1 else (kept[1:] + kept[:-1]) / 2


def _bounds(
    without: np.ndarray, having: np.ndarray, thresholds: np.ndarray, significance: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Bound on μ, false positives and false negatives at each threshold; each rate may fail at half the level."""
    count = len(without)
    positives = count - np.searchsorted(np.sort(without), thresholds, side="right")
    negatives = np.searchsorted(np.sort(having), thresholds, side="right")
    rates = [rate_upper_bound(errors, count, significance / 2) for errors in (positives, negatives)]
    return -ndtri(rates[0]) - ndtri(rates[1]), positives, negatives
