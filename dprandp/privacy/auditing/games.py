"""What the scores of an attack prove: lower bounds on what a mechanism leaks, and the power to see that it leaks more.

*The distinguishing game.* Somebody runs the mechanism with or without a record, the canary, and an attacker who sees
the output has to say which. The scores are log likelihood ratios under the claim, so the attacker says "with" above a
threshold ε₀. For whatever mechanism and score, P the outputs with the canary and Q those without,

    δ(ε₀) = max over events S of  P(S) − exp(ε₀) Q(S),

is a point of the mechanism's privacy curve. Where a part 1/(1 + exp ε₀) of all trials is with the canary, the expected
part of wrong answers is at least (1 − δ(ε₀)) / (1 + exp ε₀). Clopper & Pearson's upper bound on the observed part thus
bounds δ(ε₀) from below; a fixed number of trials on each side only makes the count more concentrated (Hoeffding 1956).
The threshold is fixed beforehand, so no trial is spent on choosing it.

*From δ(ε₀) to ε.* Of all curves that this plan would have with its noise divided by a factor s, those with a smaller
δ(ε₀) are contradicted. ``factor`` is the smallest s that is left, and ε is that of its curve.

Guarantee:
    * *Contradiction* (``factor`` > 1) holds for every mechanism, without any assumption about its noise: one that has
      the curve it claims is accused with a probability of at most ``significance``. So does ``delta_seen``.
    * *The bound on ε at the plan's δ* also assumes that the mechanism is one of that family: Gaussian noise of some
      size, Poisson samples at the planned rate (Nasr et al. 2023, "Tight auditing of differentially private machine
      learning", make the same assumption). Without it, an ε at δ = 1e-5 needs events that hardly ever happen.

*One run* with many canaries, each of which is in the data on a coin of its own, is further down.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
from scipy.special import betaincinv, ndtr, ndtri

from dprandp.errors import UsageError
from dprandp.privacy.accounting import GaussianEvent, compose, gaussian_mu
from dprandp.privacy.gaussian_dp import gaussian_dp_delta, gaussian_dp_epsilon
from dprandp.privacy.guarantees import privacy_curve

LARGEST_FACTOR = 64.0
"""Where the search for the noise's true size ends: no number of trials tells a smaller one from none."""

THRESHOLDS = (0.0, 0.1, 0.2, 0.4, 0.7, 1.0, 1.5, 2.0)
"""Candidates for ε₀; 0 serves full batches."""

_STEPS = 12
"""Of a bisection for the factor: to 1e-4 or so of it, on the safe side."""


def _silent(text: str) -> None:
    """The accountant's remarks were made when the plan was."""


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


# ----------------------------------------------------------------------------------------------------------- the claim


@dataclass(frozen=True)
class Claim:
    """A plan's privacy curve, and those that it would have with its noise divided by a factor.

    Args:
        event: what was accounted, all steps; noise above 0.
        delta: δ at which ε is stated, in (0, 1).
    """

    event: GaussianEvent
    delta: float

    def scaled(self, factor: float) -> GaussianEvent:
        """The event with its noise divided by ``factor``; discrete noise as the Gaussian that it is 1e-12 away from."""
        return replace(self.event, noise_multiplier=self.event.noise_multiplier / factor, discrete=False)

    def curve(self, factor: float, threshold: float) -> float:
        """δ(ε₀) with the noise divided by ``factor``, rounded up.

        Args:
            factor: above 0. threshold: ε₀ ≥ 0.
        """
        event = self.scaled(factor)
        if event.sample_rate == 1:
            return gaussian_dp_delta(gaussian_mu([event]), threshold)
        epsilons, deltas = _points(event, self.delta)
        return float(np.interp(threshold, epsilons, deltas))  # the curve is convex: a chord lies above it

    def lines(self, factor: float) -> tuple[np.ndarray, np.ndarray]:
        """(ε ascending, δ) of many points of the curve."""
        event = self.scaled(factor)
        if event.sample_rate < 1:
            return _points(event, self.delta)
        mu = gaussian_mu([event])
        epsilons = np.linspace(0, gaussian_dp_epsilon(mu, 1e-9), 1500)
        return epsilons, np.array([gaussian_dp_delta(mu, value) for value in epsilons])

    def epsilon(self, factor: float) -> float:
        """ε at δ with the noise divided by ``factor``, rounded down; 0 for a factor of 0."""
        if factor <= 1e-3:
            return 0.0
        return compose([self.scaled(factor)], self.delta, _silent).lower

    def factor_of(self, epsilon: float) -> float:
        """The factor, of at most 1, at which ε at δ is about this."""
        low, high = 0.02, 1.0
        while high - low > 2e-3:
            middle = (low + high) / 2
            low, high = (middle, high) if compose([self.scaled(middle)], self.delta, _silent).upper < epsilon else (
                low, middle)  # fmt: skip
        return low


@lru_cache(maxsize=256)
def _points(event: GaussianEvent, delta: float) -> tuple[np.ndarray, np.ndarray]:
    epsilons, deltas, _ = privacy_curve((event,), delta, _silent)
    return epsilons, deltas


def contradicted(holds, low: float = 0.0) -> float:
    """The largest factor found for which ``holds`` is false, where it is false up to some factor and then true.

    Args:
        holds: factor -> whether the curve of that factor is compatible with what was seen.
        low: a factor that is known to be contradicted.
    """
    high = max(1.0, low)
    while not holds(high):
        low, high = high, 2 * high
        if high > LARGEST_FACTOR:
            return low
    for _ in range(_STEPS):
        middle = (low + high) / 2
        low, high = (low, middle) if holds(middle) else (middle, high)
    return low


# ------------------------------------------------------------------------------------------------ distinguishing game


@dataclass(frozen=True)
class Game:
    """How the game is played, fixed before its first trial.

    Attributes:
        threshold: ε₀; a score above it is taken for "with".
        having, without: trials with and without the canary.
    """

    threshold: float
    having: int
    without: int

    @classmethod
    def of(cls, threshold: float, trials: int) -> Game:
        """So many trials in all, divided as the threshold wants them: exp ε₀ times as many without as with."""
        having = max(1, math.floor(trials / (1 + math.exp(threshold))))
        return cls(threshold, having, max(1, trials - having))

    @property
    def trials(self) -> int:
        """Both together."""
        return self.having + self.without


@dataclass(frozen=True)
class GameBound:
    """What a game proves.

    Attributes:
        factor: the noise is at least this many times too small for the curve that was seen (1: as claimed); 0 where
            nothing is proven.
        delta_seen: lower bound on δ(ε₀); 0 where nothing is proven.
        false_positives, false_negatives: wrong answers without and with the canary.
    """

    factor: float
    delta_seen: float
    false_positives: int
    false_negatives: int


def play(game: Game, without: np.ndarray, having: np.ndarray, claim: Claim, significance: float) -> GameBound:
    """Judge the scores of a game; see the Guarantee of this file.

    Args:
        game: fixed before the scores were seen.
        without: float64 [game.without], scores of independent trials without the canary.
        having: float64 [game.having], with it. Larger means "more likely with".
        claim: what was accounted for these trials.
        significance: in (0, 1).

    Raises:
        UsageError: another number of scores, a score that is not finite, or an impossible significance.
    """
    if (without.shape, having.shape) != ((game.without,), (game.having,)):
        raise UsageError(f"{len(without)} and {len(having)} scores for {game}.", fix="Give one score for each trial.")
    if not (np.isfinite(without).all() and np.isfinite(having).all() and 0 < significance < 1):
        raise UsageError("A score is not finite, or the significance is not between 0 and 1.", fix="Check the scores.")
    positives, negatives = int((without > game.threshold).sum()), int((having <= game.threshold).sum())
    delta_seen = _delta_seen(game, positives + negatives, significance)
    factor = 0.0
    if delta_seen > 0:
        factor = contradicted(lambda s: s > 0 and claim.curve(s, game.threshold) >= delta_seen)
    return GameBound(factor, delta_seen, positives, negatives)


def _delta_seen(game: Game, errors: int, significance: float) -> float:
    """Lower bound on δ(ε₀) from the number of wrong answers.

    E[errors] = n₁ (1 − P(S)) + n₀ Q(S) ≥ min(n₁, n₀ exp(−ε₀)) (1 − δ(ε₀)), for n₁ trials with and n₀ without.
    """
    rate = float(rate_upper_bound(errors, game.trials, significance))
    return max(0.0, 1 - rate * game.trials / min(game.having, game.without * math.exp(-game.threshold)))


def largest_factor(game: Game, claim: Claim, significance: float) -> float:
    """The factor that is proven where every answer is right: no game of this size shows more."""
    most = _delta_seen(game, 0, significance)
    return contradicted(lambda s: s > 0 and claim.curve(s, game.threshold) >= most) if most > 0 else 0.0


def choose_game(claim: Claim, part: float, significance: float, least: int = 1000) -> Game:
    """The smallest game whose bound on ε is expected to be ``part`` of the claim, if the claim holds exactly.

    Args:
        claim: what the trials are held against.
        part: wanted ratio of bound and claim, in (0, 1).
        significance: of the bound.
        least: trials at least.
    """
    target = claim.factor_of(part * compose([claim.event], claim.delta, _silent).upper)
    quantile, best = -float(ndtri(significance)), (math.inf, 0.0)
    for threshold in (0.0,) if claim.event.sample_rate == 1 else THRESHOLDS:
        odds = 1 + math.exp(threshold)
        seen, wanted = claim.curve(1.0, threshold), claim.curve(target, threshold)
        rate = (1 - seen) / odds
        if seen > wanted:
            best = min(best, ((quantile * odds / (seen - wanted)) ** 2 * rate * (1 - rate), threshold))
    return Game.of(best[1], max(least, math.ceil(min(best[0], 1e9))))


def expected_factor(game: Game, claim: Claim, significance: float) -> float:
    """The factor that the game is expected to prove, if the claim holds exactly."""
    rate = (1 - claim.curve(1.0, game.threshold)) / (1 + math.exp(game.threshold))
    seen = _delta_seen(game, round(rate * game.trials), significance)
    return contradicted(lambda s: s > 0 and claim.curve(s, game.threshold) >= seen) if seen > 0 else 0.0


@dataclass(frozen=True)
class Power:
    """What a game would show where the noise is too small.

    Attributes:
        factor: the noise is too small by this factor.
        mean_bound: the factor that the mean number of wrong answers proves, interpolated, at most the largest one.
        flagged: chance that the claim is contradicted.
    """

    factor: float
    mean_bound: float
    flagged: float


def game_power(
    game: Game, claim: Claim, significance: float, factors: Sequence[float], seed: int, signal: float = 1.0
) -> list[Power]:
    """What the game would show of mechanisms that claim ``claim`` and have less noise.

    Args:
        game, claim, significance: as for ``play``.
        factors: by which the noise is too small.
        seed: public randomness, of simulated scores where batches are sampled.
        signal: the canary's part of a score, as a part of what it is in the best attack.
    """
    most = _most_errors(game, claim, significance)
    scales = sorted({0.0, 0.5, 0.8, 0.9, *factors})
    curve = [0.0 if s == 0 else claim.curve(s, game.threshold) for s in scales]
    found = []
    for factor in factors:
        false_positive, false_negative = error_rates(claim.event, factor, game.threshold, seed, signal)
        mean = game.without * false_positive + game.having * false_negative
        variance = game.without * false_positive * (1 - false_positive)
        variance += game.having * false_negative * (1 - false_negative)
        seen = _delta_seen(game, round(mean), significance)
        bound = float(np.interp(seen, curve, scales))
        found.append(Power(factor, bound, float(ndtr((most + 0.5 - mean) / math.sqrt(max(variance, 1e-9))))))
    return found


def _most_errors(game: Game, claim: Claim, significance: float) -> int:
    """The largest number of wrong answers that contradicts the claim; −1 if none does."""
    claimed = claim.curve(1.0, game.threshold)
    low, high = -1, game.trials
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if _delta_seen(game, middle, significance) > claimed else (low, middle)
    return low


SIMULATED = 3_000_000
"""Simulated coordinates, steps times trials, where there is no closed form."""


def error_rates(
    event: GaussianEvent, factor: float, threshold: float, seed: int, signal: float = 1.0
) -> tuple[float, float]:
    """(false positive, false negative) rate of the best attack on a mechanism with ``factor`` times less noise.

    In closed form for full batches, by simulation else (to about .003).
    """
    if event.sample_rate == 1:
        mu = signal * gaussian_mu([event])
        at = threshold / mu + mu / 2
        return float(ndtr(-at * factor)), float(ndtr((at - mu) * factor))
    random = np.random.default_rng(seed)
    trials = max(2000, SIMULATED // event.steps)
    scores = [ideal_scores(event, np.full(trials, there), random, factor) for there in (False, True)]
    return float((scores[0] > threshold).mean()), float((scores[1] <= threshold).mean())


def ideal_scores(
    event: GaussianEvent, included: np.ndarray, random: np.random.Generator, factor: float = 1.0
) -> np.ndarray:
    """Simulated scores of canaries, of a mechanism that has its noise divided by ``factor``.

    Args:
        event: what was accounted.
        included: bool [m], which canaries are in the data.
        random: public randomness.
        factor: above 0; the attacker has measured it, and scores accordingly.
    """
    sigma, rate = event.noise_multiplier, event.sample_rate
    count = len(included)
    if rate == 1:
        mu = factor * math.sqrt(event.steps) / sigma
        return mu * (random.standard_normal(count) + mu * included) - mu**2 / 2
    scores = np.zeros(count)
    for _ in range(event.steps):
        there = included & (random.random(count) < rate)
        scores += step_score(there + random.standard_normal(count) * (sigma / factor), sigma / factor, rate)
    return scores


def step_score(released: np.ndarray, noise_multiplier: float, sample_rate: float) -> np.ndarray:
    """Log likelihood ratio, with canary to without, of one step's coordinate: log(1 − q + q exp((2x − 1)/(2σ²))).

    Args:
        released: x, float64, in clip norms, as a sum (not divided by the batch).
        noise_multiplier: σ. sample_rate: q.
    """
    loss = (2 * released - 1) / (2 * noise_multiplier**2)
    if sample_rate == 1:
        return loss
    return np.logaddexp(math.log1p(-sample_rate), math.log(sample_rate) + loss)


# ------------------------------------------------------------------------------------------------------------- one run
#
# One run with m canaries. Each is in the data on a fair coin of its own; from the output of the run the attacker
# guesses for the r most telling ones whether they were in, and is right v times.
#
# Mahloujifar, Melis & Chaudhuri 2025, "Auditing f-differential privacy in one run", Theorem 9 and Algorithm 3. Let p_i
# be the chance of exactly i right guesses, and x(y) the smallest false positive rate at which the claimed trade-off
# allows a true positive rate of y. Of one canary, f-DP bounds [right, i or more right in all] by [wrong, i − 1 or more
# right in all], as the two differ in the canary's coin alone; the mean over all canaries gives, for every i,
#
#     Σ_{j ≥ i−1} (r − j)/m p_j  ≥  x( Σ_{j ≥ i} j/m p_j ).
#
# If v or more right guesses had a probability of τ, these inequalities, from i = v down to 1, would force all p_j
# together above 1, so that the probability is less. No independence is assumed, neither of noise nor of canaries; the
# price is that even endless canaries of a Gaussian mechanism prove about half of its ε.
#
# ("Let's ask Gauss", Agrawal et al. 2026, arXiv 2606.12733, fits two normal distributions to the same scores. Its
# bounds hold as far as the scores are normal and independent; so this file counts guesses.)


class TradeOff:
    """x(y) of a claim: the smallest false positive rate at a true positive rate of y, from tangents of the curve.

    Args:
        epsilons, deltas: points of a privacy curve that holds in both directions; ε ascending from 0, δ descending.
    """

    def __init__(self, epsilons: np.ndarray, deltas: np.ndarray) -> None:
        # y ≤ δ + exp(ε) x, and 1 − x ≤ δ + exp(ε) (1 − y): lines x = slope · y + offset, slopes ascending
        slopes = np.concatenate([np.exp(-epsilons[::-1]), np.exp(epsilons)])
        offsets = np.concatenate([-deltas[::-1] * np.exp(-epsilons[::-1]), 1 - deltas - np.exp(epsilons)])
        rise = np.diff(slopes)
        cross = -np.diff(offsets) / np.where(rise > 0, rise, 1)
        # whichever line is taken, x is a lower bound; this takes the highest one where the points are convex
        self._cross = np.maximum.accumulate(np.where(rise > 0, cross, -math.inf))
        self._slopes, self._offsets = slopes, offsets
        self._grid = np.searchsorted(self._cross, np.linspace(0, 1, 20_001))

    def least_false_positives(self) -> tuple[list[float], list[float]]:
        """Slope and offset of the line for each of 20,001 evenly spaced y from 0 to 1."""
        return self._slopes[self._grid].tolist(), self._offsets[self._grid].tolist()


def one_run_refuted(canaries: int, guesses: int, correct: int, trade_off: TradeOff, significance: float) -> bool:
    """Whether ``correct`` or more right guesses have a probability below ``significance`` under a trade-off.

    Args:
        canaries: m ≥ 1. guesses: r, 0 … m, fixed beforehand. correct: v, 0 … r.
        trade_off: of a claim. significance: in (0, 1).

    Raises:
        UsageError: a value is outside its range.
    """
    if not (0 <= correct <= guesses <= canaries and canaries >= 1 and 0 < significance < 1):
        raise UsageError(
            f"{correct} right of {guesses} guesses about {canaries} canaries.",
            fix="Give 0 ≤ correct ≤ guesses ≤ canaries and a significance between 0 and 1.",
        )
    slopes, offsets = trade_off.least_false_positives()
    last = len(slopes) - 1
    right, wrong = significance * correct / canaries, significance * (guesses - correct) / canaries
    for number in range(correct, 0, -1):  # right, wrong: of ``number`` or more right guesses
        place = min(last, int(right * last))
        more = max(wrong, slopes[place] * right + offsets[place])
        right += (number - 1) / (guesses - number + 1) * (more - wrong)
        wrong = more
        if right + wrong > guesses / canaries:
            return True
    return False


def count_correct(scores: np.ndarray, included: np.ndarray, guesses: int) -> int:
    """How many guesses are right: "in" for a positive score, "out" else, for those furthest from 0.

    Args:
        scores: float [m], log likelihood ratios.
        included: bool [m], the truth.
        guesses: r, 0 … m.
    """
    told = np.argsort(-np.abs(scores), kind="stable")[:guesses]
    return int(((scores[told] > 0) == included[told]).sum())


@dataclass(frozen=True)
class OneRunBound:
    """What one run proves.

    Attributes:
        factor: as of ``GameBound``.
        canaries, guesses, correct: m, r and v.
    """

    factor: float
    canaries: int
    guesses: int
    correct: int


def one_run_bound(
    scores: np.ndarray, included: np.ndarray, guesses: int, claim: Claim, significance: float
) -> OneRunBound:
    """What the scores of one run prove.

    Args:
        scores, included, guesses: as for ``count_correct``; ``guesses`` fixed before the scores were seen.
        claim: what was accounted for the run.
        significance: in (0, 1).

    Guarantee:
        ``factor`` > 1 for a run that keeps its claim with a probability of at most ``significance``, whatever its
        noise is and however canaries influence one another.
    """
    correct, canaries = count_correct(scores, included, guesses), len(scores)
    if correct <= guesses / 2:
        return OneRunBound(0.0, canaries, guesses, correct)
    factor = contradicted(
        lambda s: s > 0
        and not one_run_refuted(canaries, guesses, correct, TradeOff(*claim.lines(s)), significance)
    )  # fmt: skip
    return OneRunBound(factor, canaries, guesses, correct)


def choose_guesses(
    claim: Claim, canaries: int, significance: float, seed: int, parts: Sequence[float] = (0.05, 0.15, 0.4, 0.7, 1.0)
) -> tuple[int, float]:
    """How many guesses to make, from a simulated run alone: the number must not depend on the run that is audited.

    Args:
        claim: that the simulated run keeps exactly.
        canaries: m. significance: of the bound. seed: public randomness.
        parts: numbers of guesses to try, as parts of m.

    Returns:
        The best number of guesses, and the factor that it gives: what the audit could show.
    """
    random = np.random.default_rng(seed)
    included = random.random(canaries) < 0.5
    scores = ideal_scores(claim.event, included, random)
    best, factor = canaries, 0.0
    for guesses in sorted({max(1, math.ceil(part * canaries)) for part in parts}):
        found = one_run_bound(scores, included, guesses, claim, significance).factor
        if found > factor:
            best, factor = guesses, found
    return best, factor


# ------------------------------------------------------------------------------------------- games about any mechanism


def plain_bound(
    false_positives: int, true_positives: int, without: int, having: int, delta: float, significance: float
) -> float:
    """ε at δ that a game about any mechanism proves: log((true positive rate − δ) / false positive rate).

    Args:
        false_positives, true_positives: answers "with" in trials without and with the canary.
        without, having: numbers of trials.
        delta: δ of the claim. significance: in (0, 1), half of it for either rate.

    Guarantee:
        Above the ε of an (ε, δ)-DP mechanism with a probability of at most ``significance``; nothing is assumed about
        it, and the threshold was fixed beforehand.
    """
    high = float(rate_upper_bound(false_positives, without, significance / 2))
    low = 1 - float(rate_upper_bound(having - true_positives, having, significance / 2))
    return max(0.0, math.log((low - delta) / high)) if low > delta else 0.0

