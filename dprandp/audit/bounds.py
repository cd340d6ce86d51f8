"""What the scores of an attack prove: lower bounds on what a mechanism leaks, and the power to see that it leaks more.

*The distinguishing game.* Somebody runs the mechanism with or without a record, the canary; an attacker who sees the
output says "with" above a threshold ε₀, fixed beforehand, of the log likelihood ratio under the claim. For whatever
mechanism and score, P the outputs with the canary and Q those without, δ(ε₀) = max over events S of P(S) − exp(ε₀) Q(S)
is a point of its privacy curve. Where a part 1/(1 + exp ε₀) of all trials is with the canary, the expected part of
wrong answers is at least (1 − δ(ε₀)) / (1 + exp ε₀): Clopper & Pearson's upper bound on the observed part bounds δ(ε₀)
from below. (A fixed number of trials on each side only makes the count more concentrated, Hoeffding 1956.) Of all
curves that the plan would have with its noise divided by a factor s, those with a smaller δ(ε₀) are contradicted:
``factor`` is the smallest s that is left, and ε is that of its curve.

Guarantee:
    * *Contradiction* (``factor`` > 1) holds for every mechanism, without any assumption about its noise: one that has
      the curve it claims is accused with a probability of at most ``significance``.
    * *The bound on ε at the plan's δ* also assumes Gaussian noise of some size and Poisson samples at the planned rate
      (as Nasr et al. 2023, "Tight auditing of differentially private machine learning"). Without it, an ε at δ = 1e-5
      needs events that hardly ever happen.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from scipy.special import betaincinv, ndtr, ndtri

from dprandp.errors import UsageError
from dprandp.privacy.accounting import GaussianEvent, compose, gaussian_mu, privacy_curve
from dprandp.privacy.gaussian_dp import gaussian_dp_delta, gaussian_dp_epsilon

# ---------------------------------------------------------------------------------------------------- how much is tried

SIGNIFICANCE = 1e-3
"""Of each lower bound: how often a sound mechanism may be accused."""

MOST_TRIALS = 20_000_000
MOST_CANARIES = 200_000


@dataclass(frozen=True)
class AuditSettings:
    """How much is tried.

    Attributes:
        trials: of the distinguishing game, with the canary and as many without; None: as many as the claim needs.
        canaries: of the one run; None: as many as the game has trials, at most 200,000.
        controls: whether the controls are run.
        seed: public randomness: labels, which canaries are in, simulated power. Never the noise.
        with_data: replay on the run's private data as well.
        black_box: play the game on released heads too, where a mechanism fits one on full batches.
        images: images of one made-up record: more than 1 where the run protects units of several.
    """

    trials: int | None = None
    canaries: int | None = None
    controls: bool = True
    seed: int = 0
    with_data: bool = False
    black_box: bool = False
    images: int = 1

    def __post_init__(self) -> None:
        for name, value, low, high in (
            ("trials", self.trials, 100, MOST_TRIALS), ("canaries", self.canaries, 20, MOST_CANARIES),
            ("seed", self.seed, 0, 2**63 - 1),
        ):  # fmt: skip
            if value is not None and not low <= value <= high:
                raise UsageError(f"--{name} {value} is out of range", fix=f"give a number from {low} to {high}")


# ------------------------------------------------------------------------------------------------------------ the claim

LARGEST_FACTOR = 64.0
"""Where the search for the noise's true size ends: no number of trials tells a smaller one from none."""

THRESHOLDS = (0.0, 0.1, 0.2, 0.4, 0.7, 1.0, 1.5, 2.0)
"""Candidates for ε₀; 0 serves full batches."""

SIMULATED = 3_000_000
"""Simulated coordinates, steps times trials, where there is no closed form."""


def rate_upper_bound(count: np.ndarray | int, trials: int, significance: float) -> np.ndarray:
    """Clopper & Pearson's upper bound on a probability: below the true one in a part ``significance`` of all cases.

    The largest p at which ``count`` (0 … trials) or fewer events still have that probability; 1 for ``trials`` events.
    """
    count = np.asarray(count, dtype=np.float64)
    some = np.minimum(count, trials - 1)
    return np.where(count >= trials, 1.0, betaincinv(some + 1, trials - some, 1 - significance))


def _upper(event: GaussianEvent, delta: float) -> float:
    return compose([event], delta, _silent).upper


def _silent(text: str) -> None:
    """The accountant's remarks were made when the plan was."""


@dataclass(frozen=True)
class Claim:
    """The privacy curve of an event (all steps; noise above 0), and those it would have with less noise; δ of ε."""

    event: GaussianEvent
    delta: float

    def scaled(self, factor: float) -> GaussianEvent:
        # discrete noise as the Gaussian that it is 1e-12 away from
        return replace(self.event, noise_multiplier=self.event.noise_multiplier / factor, discrete=False)

    def curve(self, factor: float, threshold: float) -> float:
        """δ(ε₀) with the noise divided by ``factor``, rounded up."""
        if self.event.sample_rate == 1:
            return gaussian_dp_delta(gaussian_mu([self.scaled(factor)]), threshold)
        return float(np.interp(threshold, *self.lines(factor)))  # the curve is convex: a chord lies above it

    def lines(self, factor: float) -> tuple[np.ndarray, np.ndarray]:
        """(ε ascending, δ) of many points of the curve."""
        event = self.scaled(factor)
        if event.sample_rate < 1:
            return privacy_curve((event,), self.delta, _silent)[:2]
        mu = gaussian_mu([event])
        epsilons = np.linspace(0, gaussian_dp_epsilon(mu, 1e-9), 1500)
        return epsilons, np.array([gaussian_dp_delta(mu, value) for value in epsilons])

    def epsilon(self, factor: float) -> float:
        """ε at δ with the noise divided by ``factor``, rounded down; 0 for a factor of 0."""
        return 0.0 if factor <= 1e-3 else compose([self.scaled(factor)], self.delta, _silent).lower

    def factor_of(self, epsilon: float) -> float:
        """The factor, of at most 1, at which ε at δ is about this."""
        low, high = 0.02, 1.0
        while high - low > 2e-3:
            middle = (low + high) / 2
            low, high = (middle, high) if _upper(self.scaled(middle), self.delta) < epsilon else (low, middle)
        return low


def contradicted(holds: Callable[[float], bool]) -> float:
    """The largest factor found at which ``holds`` is false; it is false up to some factor, and then true."""
    low, high = 0.0, 1.0
    while not holds(high):
        low, high = high, 2 * high
        if high > LARGEST_FACTOR:
            return low
    for _ in range(12):
        middle = (low + high) / 2
        low, high = (low, middle) if holds(middle) else (middle, high)
    return low


# ------------------------------------------------------------------------------------------------ distinguishing game


@dataclass(frozen=True)
class Game:
    """How the game is played: "with" above ``threshold`` (ε₀), so many trials ``having`` and ``without`` the canary."""

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
        return self.having + self.without

    def scores(self, block: int, of: Callable[[np.ndarray], np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        """Scores without the canary, float64 [without], and with it, float64 [having], made in blocks of trials.

        ``of`` takes which canaries of a block are there, bool [m], and returns their scores, float64 [m].
        """
        included = np.arange(self.trials) < self.having
        found = np.concatenate([of(included[start : start + block]) for start in range(0, self.trials, block)])
        return found[self.having :], found[: self.having]

    def proves(self, errors: int, claim: Claim, significance: float) -> tuple[float, float]:
        """(factor, lower bound on δ(ε₀)) from the number of wrong answers; zeros where nothing is proven.

        E[errors] = n₁ (1 − P(S)) + n₀ Q(S) ≥ min(n₁, n₀ exp(−ε₀)) (1 − δ(ε₀)), for n₁ trials with and n₀ without.
        """
        seen = self.delta_seen(errors, significance)
        if seen == 0:
            return 0.0, 0.0
        return contradicted(lambda factor: claim.curve(factor, self.threshold) >= seen), seen

    def delta_seen(self, errors: int, significance: float) -> float:
        """Lower bound on δ(ε₀); see ``proves``."""
        rate = float(rate_upper_bound(errors, self.trials, significance))
        return max(0.0, 1 - rate * self.trials / min(self.having, self.without * math.exp(-self.threshold)))

    def expected_errors(self, claim: Claim) -> int:
        """Wrong answers where the claim holds exactly."""
        return round((1 - claim.curve(1.0, self.threshold)) / (1 + math.exp(self.threshold)) * self.trials)


@dataclass(frozen=True)
class GameBound:
    """What a game proves, see ``Game.proves``, and its number of wrong answers."""

    factor: float
    delta_seen: float
    errors: int


def play(game: Game, without: np.ndarray, having: np.ndarray, claim: Claim, significance: float) -> GameBound:
    """Judge the scores of a game: float64, of independent trials, larger for "more likely with".

    Raises:
        UsageError: another number of scores, a score that is not finite, or an impossible significance.
    """
    if (without.shape, having.shape) != ((game.without,), (game.having,)):
        raise UsageError(f"{len(without)} and {len(having)} scores for {game}.", fix="Give one score for each trial.")
    if not (np.isfinite(without).all() and np.isfinite(having).all() and 0 < significance < 1):
        raise UsageError("A score is not finite, or the significance is not between 0 and 1.", fix="Check the scores.")
    errors = int((without > game.threshold).sum()) + int((having <= game.threshold).sum())
    return GameBound(*game.proves(errors, claim, significance), errors)


def choose_game(claim: Claim, part: float, significance: float, least: int = 1000) -> Game:
    """The smallest game, of ``least`` trials, that is expected to prove ``part`` of the ε of a true claim."""
    target = claim.factor_of(part * _upper(claim.event, claim.delta))
    quantile, best = -float(ndtri(significance)), (math.inf, 0.0)
    for threshold in (0.0,) if claim.event.sample_rate == 1 else THRESHOLDS:
        odds = 1 + math.exp(threshold)
        seen, wanted = claim.curve(1.0, threshold), claim.curve(target, threshold)
        rate = (1 - seen) / odds
        if seen > wanted:
            best = min(best, ((quantile * odds / (seen - wanted)) ** 2 * rate * (1 - rate), threshold))
    return Game.of(best[1], max(least, math.ceil(min(best[0], 1e9))))


@dataclass(frozen=True)
class Power:
    """Where the noise is too small by ``factor``: the factor proven on average, and the chance that it is above 1."""

    factor: float
    mean_bound: float
    flagged: float


def game_power(
    game: Game, claim: Claim, significance: float, factors: Sequence[float], seed: int, signal: float = 1.0
) -> list[Power]:
    """What the game would show of mechanisms that claim ``claim`` and have ``factors`` times less noise.

    ``signal`` is the canary's part of a score, as a part of that in the best attack; ``seed`` of simulated scores.
    """
    most, high = -1, game.trials  # the largest number of wrong answers that contradicts the claim; −1 if none does
    claimed = claim.curve(1.0, game.threshold)
    while high - most > 1:
        middle = (most + high) // 2
        most, high = (middle, high) if game.delta_seen(middle, significance) > claimed else (most, middle)
    scales = sorted({0.0, 0.5, 0.8, 0.9, *factors})
    curve = [0.0 if s == 0 else claim.curve(s, game.threshold) for s in scales]
    found = []
    for factor in factors:
        false_positive, false_negative = error_rates(claim.event, factor, game.threshold, seed, signal)
        mean = game.without * false_positive + game.having * false_negative
        variance = game.without * false_positive * (1 - false_positive)
        variance += game.having * false_negative * (1 - false_negative)
        bound = float(np.interp(game.delta_seen(round(mean), significance), curve, scales))
        found.append(Power(factor, bound, float(ndtr((most + 0.5 - mean) / math.sqrt(max(variance, 1e-9))))))
    return found


def error_rates(
    event: GaussianEvent, factor: float, threshold: float, seed: int, signal: float = 1.0
) -> tuple[float, float]:
    """(false positive, false negative) rate of the best attack: in closed form for full batches, else simulated."""
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
    """Simulated scores, float64 [m], of canaries (bool [m], which of them are in the data).

    The mechanism has its noise divided by ``factor``; the attacker has measured it, and scores accordingly.
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

    ``released`` is x, float64, in clip norms, as a sum (not divided by the batch).
    """
    loss = (2 * released - 1) / (2 * noise_multiplier**2)
    if sample_rate == 1:
        return loss
    return np.logaddexp(math.log1p(-sample_rate), math.log(sample_rate) + loss)


# ------------------------------------------------------------------------------------------------------------- one run
#
# One run with m canaries, each in the data on a fair coin of its own; the attacker guesses for the r most telling ones
# whether they were in, and is right v times. Mahloujifar, Melis & Chaudhuri 2025, "Auditing f-differential privacy in
# one run", Theorem 9 and Algorithm 3: with p_i the chance of exactly i right guesses, and x(y) the smallest false
# positive rate at which the claimed trade-off allows a true positive rate of y, for every i
#
#     Σ_{j ≥ i−1} (r − j)/m p_j  ≥  x( Σ_{j ≥ i} j/m p_j ).
#
# If v or more right guesses had a probability of τ, these inequalities, from i = v down to 1, would force all p_j
# together above 1, so that the probability is less. No independence is assumed, neither of noise nor of canaries; the
# price is that even endless canaries of a Gaussian mechanism prove about half of its ε.


def least_false_positives(epsilons: np.ndarray, deltas: np.ndarray) -> tuple[list[float], list[float]]:
    """x(y) for 20,001 evenly spaced y from 0 to 1, from tangents of a curve: slope and offset of the line for each.

    The points (ε ascending from 0, δ descending) are of a privacy curve that holds in both directions.
    """
    # y ≤ δ + exp(ε) x, and 1 − x ≤ δ + exp(ε) (1 − y): lines x = slope · y + offset, slopes ascending
    slopes = np.concatenate([np.exp(-epsilons[::-1]), np.exp(epsilons)])
    offsets = np.concatenate([-deltas[::-1] * np.exp(-epsilons[::-1]), 1 - deltas - np.exp(epsilons)])
    rise = np.diff(slopes)
    cross = -np.diff(offsets) / np.where(rise > 0, rise, 1)
    # whichever line is taken, x is a lower bound; this takes the highest one where the points are convex
    cross = np.maximum.accumulate(np.where(rise > 0, cross, -math.inf))
    place = np.searchsorted(cross, np.linspace(0, 1, 20_001))
    return slopes[place].tolist(), offsets[place].tolist()


def one_run_refuted(
    canaries: int, guesses: int, correct: int, lines: tuple[list[float], list[float]], significance: float
) -> bool:
    """Whether ``correct`` or more right guesses have a probability below ``significance`` under a trade-off.

    Args:
        canaries: m ≥ 1. guesses: r, 0 … m, fixed beforehand. correct: v, 0 … r (others: UsageError).
        lines: ``least_false_positives`` of a claim's curve.
    """
    if not (0 <= correct <= guesses <= canaries and canaries >= 1 and 0 < significance < 1):
        raise UsageError(
            f"{correct} right of {guesses} guesses about {canaries} canaries.",
            fix="Give 0 ≤ correct ≤ guesses ≤ canaries and a significance between 0 and 1.",
        )
    slopes, offsets = lines
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
    """How many guesses are right: "in" for a positive score, "out" else, for the ``guesses`` furthest from 0."""
    told = np.argsort(-np.abs(scores), kind="stable")[:guesses]
    return int(((scores[told] > 0) == included[told]).sum())


def one_run_bound(
    scores: np.ndarray, included: np.ndarray, guesses: int, claim: Claim, significance: float
) -> tuple[float, int]:
    """(factor, number of right guesses) of one run, for a number of guesses that was fixed beforehand.

    Guarantee:
        ``factor`` > 1 for a run that keeps its claim with a probability of at most ``significance``, whatever its
        noise is and however canaries influence one another.
    """
    correct = count_correct(scores, included, guesses)
    if correct <= guesses / 2:
        return 0.0, correct

    def holds(factor: float) -> bool:
        lines = least_false_positives(*claim.lines(factor))
        return not one_run_refuted(len(scores), guesses, correct, lines, significance)

    return contradicted(holds), correct


def choose_guesses(claim: Claim, canaries: int, significance: float, seed: int) -> tuple[int, float]:
    """How many guesses to make, and the factor that they give, on a simulated run that keeps its claim exactly.

    The number must not depend on the run that is audited.
    """
    random = np.random.default_rng(seed)
    included = random.random(canaries) < 0.5
    scores = ideal_scores(claim.event, included, random)
    counts = sorted({math.ceil(part * canaries) for part in (0.05, 0.15, 0.4, 0.7, 1.0)})
    found = [(one_run_bound(scores, included, count, claim, significance)[0], count) for count in counts]
    factor, guesses = max(found, key=lambda each: each[0])
    return (guesses, factor) if factor > 0 else (canaries, 0.0)


# ------------------------------------------------------------------------------------------- games about any mechanism


def plain_bound(
    false_positives: int, true_positives: int, without: int, having: int, delta: float, significance: float
) -> float:
    """ε at δ that a game about any mechanism proves: log((true positive rate − δ) / false positive rate).

    Guarantee:
        Above the ε of an (ε, δ)-DP mechanism with a probability of at most ``significance``, half of it for either
        rate, where the threshold was fixed beforehand.
    """
    high = float(rate_upper_bound(false_positives, without, significance / 2))
    low = 1 - float(rate_upper_bound(having - true_positives, having, significance / 2))
    return max(0.0, math.log((low - delta) / high)) if low > delta else 0.0
