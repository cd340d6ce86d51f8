"""One run with many canaries: the ε that correct guesses about them prove.

Steinke, Nasr & Jagielski 2023, "Privacy auditing with one (1) training run", Theorem 5.2. Each of m canaries is in the
data with probability 1/2, on its own coin. From the output of *one* run the auditor guesses for r of them whether they
were in, abstains from the rest, and is right v times. A canary that is out adds nothing to any sum (zero-out). If the
run is (ε, δ)-DP for one canary, then

    P[V ≥ v] ≤ f(v) + 2 m δ max over i = 1 … m of (f(v − i) − f(v)) / i,      f(v) = P[Binomial(r, e^ε/(1 + e^ε)) ≥ v]

The largest ε at which this stays below the significance is refuted, and with it all smaller ones.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.special import bdtrc, expit, gammaln, log_expit

from dprandp.errors import UsageError

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
