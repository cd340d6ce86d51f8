"""Two worlds, with and without a canary: the μ of Gaussian DP that their scores prove.

An attacker who answers "with" above a threshold errs with a false positive rate α and a false negative rate β. A
μ-GDP mechanism forces Φ⁻¹(1 − α) − Φ⁻¹(β) ≤ μ (Dong, Roth & Su 2022, Definition 2.6 and eq. 6), whatever the score and
the threshold. The threshold is chosen on one half of the trials; the other half bounds both rates from above (Clopper
& Pearson 1934), which bounds μ from below (Nasr et al. 2023, "Tight auditing of differentially private machine
learning", section 4).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.special import bdtrc, betaincinv, expit, gammaln, log_expit, ndtri

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


# ------------------------------------------------------------------------------------------------------------- one run
#
# One run with many canaries: the ε that correct guesses about them prove.
#
# Steinke, Nasr & Jagielski 2023, "Privacy auditing with one (1) training run", Theorem 5.2. Each of m canaries is in
# the data with probability 1/2, on its own coin. From the output of *one* run the auditor guesses for r of them whether
# they were in, abstains from the rest, and is right v times. A canary that is out adds nothing to any sum (zero-out).
# If the run is (ε, δ)-DP for one canary, then
#
#     P[V ≥ v] ≤ f(v) + 2 m δ max over i = 1 … m of (f(v − i) − f(v)) / i,      f(v) = P[Binomial(r, e^ε/(1 + e^ε)) ≥ v]
#
# The largest ε at which this stays below the significance is refuted, and with it all smaller ones.

LARGEST_EPSILON = 60.0
"""Where the search for the bound ends; no number of canaries proves this much."""


def one_run_p_value(canaries: int, guesses: int, correct: int, epsilon: float, delta: float) -> float:
    """The largest chance of ``correct`` or more right guesses under (ε, δ)-DP.

    Args:
        canaries: m ≥ 1.
        guesses: r, 0 … m.
        correct: v, 0 … r.
        epsilon: ε ≥ 0. delta: δ in [0, 1].

    Raises:
        UsageError: a value is outside its range.
    """
    if not (0 <= correct <= guesses <= canaries and canaries >= 1 and epsilon >= 0 and 0 <= delta <= 1):
        raise UsageError(
            f"{correct} right of {guesses} guesses about {canaries} canaries at ε = {epsilon}, δ = {delta}.",
            fix="Give 0 ≤ correct ≤ guesses ≤ canaries, ε ≥ 0 and δ in [0, 1].",
        )
    if correct == 0:
        return 1.0
    tail = float(bdtrc(correct - 1, guesses, expit(epsilon)))
    if delta == 0:
        return min(1.0, tail)
    # f(v − i) − f(v) is the sum of the i probabilities just below v; nothing is gained beyond i = v, where f is 1.
    count = np.arange(correct - 1, -1, -1)
    log_ways = gammaln(guesses + 1) - gammaln(count + 1) - gammaln(guesses - count + 1)
    log_odds = count * log_expit(epsilon) + (guesses - count) * log_expit(-epsilon)
    below = np.cumsum(np.exp(log_ways + log_odds))
    steepest = float((below / np.arange(1, correct + 1)).max())
    return min(1.0, tail + 2 * canaries * delta * steepest)


def one_run_epsilon(canaries: int, guesses: int, correct: int, delta: float, significance: float) -> float:
    """The ε that ``correct`` right guesses prove; 0 where they prove nothing.

    Guarantee:
        An (ε, δ)-DP run yields more than its ε with a probability of at most ``significance``, provided the number of
        guesses was fixed before the scores were seen.
    """
    refuted = 0.0
    if one_run_p_value(canaries, guesses, correct, refuted, delta) > significance:
        return 0.0
    # The bound rises with ε; steps of 1/4 before the bisection, so that not even a dip would be jumped over.
    end = refuted
    while one_run_p_value(canaries, guesses, correct, end, delta) <= significance:
        refuted, end = end, end + 0.25
        if end > LARGEST_EPSILON:
            return refuted
    while end - refuted > 1e-6:
        middle = (refuted + end) / 2
        inside = one_run_p_value(canaries, guesses, correct, middle, delta) <= significance
        refuted, end = (middle, end) if inside else (refuted, middle)
    return refuted


def count_correct(scores: np.ndarray, included: np.ndarray, guesses: int) -> int:
    """Guess "in" for the largest scores, "out" for the smallest, abstain in between; how many guesses are right.

    Args:
        scores: float [m], larger means "more likely in".
        included: bool [m], the truth.
        guesses: r, 0 … m; the odd one out is a guess "in".
    """
    order = np.argsort(scores, kind="stable")
    out = guesses // 2
    return int((~included[order[:out]]).sum() + included[order[len(scores) - (guesses - out) :]].sum())


@dataclass(frozen=True)
class OneRunBound:
    """What one run proves.

    Attributes:
        epsilon_lower: lower bound on ε at ``delta``.
        canaries, guesses, correct: m, r and v.
        delta, significance: of the bound.
    """

    epsilon_lower: float
    canaries: int
    guesses: int
    correct: int
    delta: float
    significance: float


def one_run_bound(
    scores: np.ndarray, included: np.ndarray, guesses: int, delta: float, significance: float
) -> OneRunBound:
    """The ε that the scores of one run prove; see ``count_correct`` and ``one_run_epsilon``."""
    correct = count_correct(scores, included, guesses)
    epsilon = one_run_epsilon(len(scores), guesses, correct, delta, significance)
    return OneRunBound(epsilon, len(scores), guesses, correct, delta, significance)


def choose_guesses(
    draw: Callable[[np.random.Generator], tuple[np.ndarray, np.ndarray]],
    delta: float,
    significance: float,
    seed: int,
    parts: Sequence[float] = (0.02, 0.05, 0.1, 0.2, 0.4, 0.7, 1.0),
    repeats: int = 8,
) -> tuple[int, float]:
    """How many guesses to make, from simulated runs alone: the number must not depend on the run that is audited.

    Args:
        draw: one simulated run of a mechanism that keeps its claim exactly: (scores [m], included [m]).
        delta, significance: of the bound.
        seed: public randomness.
        parts: numbers of guesses to try, as parts of m.
        repeats: simulated runs.

    Returns:
        The best number of guesses, and the mean of the bound that it gives: what the audit could have shown.
    """
    generator = np.random.default_rng(seed)
    runs = [draw(generator) for _ in range(repeats)]
    canaries = len(runs[0][0])
    best, mean = canaries, 0.0
    for guesses in sorted({max(1, math.ceil(part * canaries)) for part in parts}):
        bounds = [one_run_bound(*run, guesses, delta, significance).epsilon_lower for run in runs]
        if float(np.mean(bounds)) > mean:
            best, mean = guesses, float(np.mean(bounds))
    return best, mean
