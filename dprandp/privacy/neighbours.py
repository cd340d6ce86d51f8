"""The best attacker against a composition, and ε for other neighbours than one record that is zeroed out.

*The attacker* decides from all releases whether a record was present. At a false-positive rate α each (ε, δ) on the
privacy curve allows a rate of true positives g(α) of at most

    min(δ + exp(ε) α,  1 − exp(−ε) (1 − δ − α))

(Wasserman & Zhou 2010; Dong, Roth & Su 2022, "Gaussian Differential Privacy", Propositions 2.4 and 2.12), and the least
over the whole curve is the tightest bound that it gives. Full batches have the closed form Φ(Φ⁻¹(α) + μ).

*Replacing a record* is zeroing one out and filling its slot with another. For full batches the sum then moves by up to
2C, which doubles μ, exactly. For Poisson samples no pair of data sets is proven to be the worst under composition;
what is proven is group privacy along the two moves: if the mechanism is (ε₁, δ₁)- and (ε₂, δ₂)-DP under zero-out, then

    P(M(D) ∈ S) ≤ exp(ε₁) P(M(D₀) ∈ S) + δ₁ ≤ exp(ε₁ + ε₂) P(M(D′) ∈ S) + δ₁ + exp(ε₁) δ₂

so it is (ε₁ + ε₂, δ₁ + exp(ε₁) δ₂)-DP under replace-one; the best split is searched along the whole curve. This equals
g(g(α)) for trade-offs (Dong et al. 2022, Theorem 2.14).

*Groups.* k records move a sum by k C at most, so a μ-GDP mechanism is kμ-GDP for groups of k: exact for full batches.
For sampled ones, ``group_privacy`` of the δ' for one record at which that gives the δ that was asked for; or all k
records move every step that draws one of them, where that is less.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from scipy.special import ndtr, ndtri

from dprandp.errors import BudgetError, UsageError
from dprandp.privacy import analytic
from dprandp.privacy.accounting import (
    DELTA_SHARE,
    MAX_NOISE_MULTIPLIER,
    EpsilonBound,
    GaussianEvent,
    Warn,
    calibrate,
    check_distance,
    components_of,
    compose,
    gaussian_mu,
    group_privacy,
    log_growth,
    merge_events,
    privacy_curve,
    settle,
    warn_by_log,
)
from dprandp.privacy.gaussian_dp import gaussian_dp_epsilon

ZERO_OUT, ADD_REMOVE, REPLACE_ONE = "zero-out", "add-remove", "replace-one"
ADJACENCIES = {ZERO_OUT: 1, ADD_REMOVE: 1, REPLACE_ONE: 2}
"""Relation -> zero-out moves between neighbours. Add/remove has the same sums with and without the record, hence the
same curve; it is the relation of the accountants' theorems, and no claim about N."""

# The least δ of a curve: what its end may add to a rate; and as a part of δ where the curve is read at one δ.
_RATE_ERROR, _DELTA_SHARE = 1e-8, 1e-2
# The smallest δ' that is tried for a group.
_SMALLEST_LOG_DELTA = -300 * math.log(10)
# The search for δ' ends where the δ of the group is between this part of the one asked for and the whole.
_CLOSE_ENOUGH = 0.9
_BY_TWO_MOVES = ", group privacy of two zero-out moves"


def compose_group(events: Sequence[GaussianEvent], delta: float, size: int, warn: Warn = warn_by_log) -> EpsilonBound:
    """``accounting.compose`` for groups of ``size`` records, from 1 to 1e15.

    Guarantee:
        The composition is (``upper``, ``delta``)-DP under zero-out of up to ``size`` records, under the
        conditions of ``compose``. Exact for full batches; an upper bound otherwise (``lower`` is that of one record).
    """
    _ = group_privacy(0.0, 0.0, size)  # refuses a senseless size
    single = compose(events, delta, warn)
    if size == 1 or math.isinf(single.upper) or not any(event.steps for event in events):
        return single
    mu = gaussian_mu(events)
    if mu is not None:
        discrete = sum(event.steps for event in events if event.discrete)
        exact = gaussian_dp_epsilon(size * mu, delta * (1 - DELTA_SHARE) if discrete else delta)
        if discrete:
            check_distance(discrete, exact, delta)
        return EpsilonBound(exact, exact, exact, delta, f"{single.accountant}, groups of {size}: kμ")
    upper, by = _by_the_general_bound(events, delta, size)
    name = f"{by}, groups of {size}: general bound"
    if not any(event.discrete for event in events):
        together, by = moved_epsilon(components_of(merge_events(events)), delta, size, size)
        if together < upper:
            upper, name = together, f"{by}, groups of {size}: all in one step"
    return EpsilonBound(min(single.lower, upper), upper, upper, delta, name)


def _by_the_general_bound(events: Sequence[GaussianEvent], delta: float, size: int) -> tuple[float, str]:
    """The smallest kε(δ') found among δ' that give the group no more than ``delta``, and its accountant; inf for none.

    A smaller δ' raises ε, and with it the growth of δ', but more slowly than δ' falls. So δ' is lowered by what the
    group's δ exceeds its goal, until it fits; then the interval between what fits and what does not is halved.
    """
    goal = math.log(delta)
    high, low = goal, -math.inf  # log δ' that is too large, and one that fits
    best, by = math.inf, "none"
    tried = goal
    for _ in range(40):
        bound = compose(events, math.exp(tried), lambda sentence: None)
        epsilon = bound.upper
        excess = tried + log_growth(epsilon, size) - goal
        if excess <= 0:
            (best, by), low = min((best, by), (size * epsilon, bound.accountant)), tried
            if excess > math.log(_CLOSE_ENOUGH) or high - low < 0.05:
                break
        else:
            high = tried
        tried = max(tried - 1.2 * excess, _SMALLEST_LOG_DELTA) if low == -math.inf else (high + low) / 2
        if tried <= _SMALLEST_LOG_DELTA and low == -math.inf:
            break
    return best, by


@dataclass(frozen=True)
class TradeOff:
    """Best true-positive rates of an attacker: of a Gaussian of parameter ``mu``, or below the points of a curve.

    Attributes:
        mu: None for sampled steps; inf without noise.
        epsilons, deltas: points of the zero-out curve, ε ascending from 0; empty when mu is known.
        moves: as in ``ADJACENCIES``.
        source: how it was found.
        most_mu: of a Gaussian whose trade-off is no better for the record: full batches in place of sampled ones.
    """

    mu: float | None
    epsilons: np.ndarray
    deltas: np.ndarray
    moves: int
    source: str
    most_mu: float = math.inf

    def true_positive_rate(self, false_positive_rate: float) -> float:
        """g(α): no test with that false-positive rate, in [0, 1] (else UsageError), finds the record more often."""
        if not 0 <= false_positive_rate <= 1:
            raise UsageError(f"The false-positive rate is {false_positive_rate}.", fix="Give a number from 0 to 1.")
        if self.mu is not None:
            return gaussian_rate(false_positive_rate, self.mu)
        rate = false_positive_rate
        for _ in range(self.moves):
            rate = self._one_move(rate)
        return min(rate, gaussian_rate(false_positive_rate, self.most_mu))

    def _one_move(self, rate: float) -> float:
        return float(min(1.0, _point_rates(self.epsilons, self.deltas, rate).min()))

    @property
    def advantage(self) -> float:
        """The largest difference of true- and false-positive rate: 0 for a guess, 1 when nothing is hidden.

        For two moves: δ₁ + exp(ε₁) δ₂ at ε₁ = −ε₂, where δ(−ε) = 1 − exp(−ε) (1 − δ(ε)).
        """
        if self.mu is not None:
            return math.erf(self.mu / (2 * math.sqrt(2)))
        most = math.erf(self.most_mu / (2 * math.sqrt(2)))
        if self.moves == 1:
            return min(most, float(self.deltas.min(where=self.epsilons == 0, initial=1.0)))
        return float(min(most, (1 - np.exp(-self.epsilons) * (1 - 2 * self.deltas)).min()))


def point_rate(epsilon: float, delta: float, false_positive_rate: float) -> float:
    """The most true positives, in [0, 1], that (ε, δ) alone allows, whatever the mechanism (formula above)."""
    return float(min(1.0, _point_rates(np.array(epsilon), np.array(delta), false_positive_rate)))


def _point_rates(epsilons: np.ndarray, deltas: np.ndarray, rate: float) -> np.ndarray:
    with np.errstate(under="ignore"):
        scaled = np.exp(np.minimum(epsilons + math.log(rate), 0)) if rate else 0.0
    return np.minimum(deltas + scaled, 1 - np.exp(-epsilons) * (1 - deltas - rate))


def gaussian_rate(rate: float, mu: float) -> float:
    """The true-positive rate of the best test of a Gaussian mechanism, Φ(Φ⁻¹(α) + μ), at a false-positive rate."""
    if rate in (0.0, 1.0):
        return rate if math.isfinite(mu) else 1.0
    return float(ndtr(ndtri(rate) + mu))


def trade_off(events: Sequence[GaussianEvent], adjacency: str = ZERO_OUT, warn: Warn = warn_by_log) -> TradeOff:
    """The tightest trade-off that is known under a key of ``ADJACENCIES`` (else UsageError); rates are upper bounds."""
    moves = _moves(adjacency)
    mu = math.inf if any(e.steps and e.noise_multiplier == 0 for e in events) else gaussian_mu(events)
    none = np.zeros(0)
    if mu is not None:
        return TradeOff(moves * mu, none, none, moves, "exact Gaussian DP" if math.isfinite(mu) else "no noise")
    merged = tuple(merge_events(events))
    epsilons, deltas, source = privacy_curve(merged, _RATE_ERROR, warn)
    # also for replacing: one record's part in a sample then moves by 2C
    full = analytic.full_batch_mu(components_of(merged))
    return TradeOff(None, epsilons, deltas, moves, source + (_BY_TWO_MOVES if moves > 1 else ""), moves * full)


def compose_adjacency(
    events: Sequence[GaussianEvent], delta: float, adjacency: str = ZERO_OUT, warn: Warn = warn_by_log
) -> EpsilonBound:
    """``accounting.compose`` for any of ``ADJACENCIES`` (else UsageError).

    Guarantee:
        The composition is (``upper``, ``delta``)-DP under ``adjacency``, on the conditions of ``compose``.
    """
    if _moves(adjacency) == 1:
        return compose(events, delta, warn)
    if gaussian_mu(events) is not None:
        exact = compose_group(events, delta, 2, warn)  # two moves of one record, or one of two: both double μ
        return replace(exact, accountant=compose(events, delta, warn).accountant)
    if any(event.discrete for event in events):
        raise UsageError(
            "Sampled steps with discrete noise are not accounted for replacing a record.",
            fix="Use zero-out, full batches, or Gaussian noise.",
        )
    single = compose(events, delta, warn)
    if not math.isfinite(single.upper):
        return single
    merged = tuple(merge_events(events))
    most, by = moved_epsilon(components_of(merged), delta, 2)
    least = _DELTA_SHARE * delta / (1 + math.exp(min(single.upper, 600)))
    # Where that hides the record already there is no need for a curve.
    epsilons, deltas, source = privacy_curve(merged, least, warn) if most else (None, None, "")
    upper = _two_moves(epsilons, deltas, delta) if most else None
    # Replacing a record by one that contributes nothing is zeroing it out.
    if upper is None or most < upper:
        return EpsilonBound(min(single.lower, most), most, most, delta, f"{by}, moved by 2C")
    return EpsilonBound(min(single.lower, upper), upper, upper, delta, source + _BY_TWO_MOVES)


def calibrate_adjacency(
    epsilon: float, delta: float, sample_rate: float, steps: int, adjacency: str = ZERO_OUT, warn: Warn = warn_by_log
) -> float:
    """``accounting.calibrate`` (of a fresh budget) for any adjacency.

    Guarantee:
        ``compose_adjacency([GaussianEvent(result, sample_rate, steps)], delta, adjacency).upper <= epsilon``.
    """
    moves = _moves(adjacency)
    if moves == 1 or math.isinf(epsilon):
        return calibrate(epsilon, delta, sample_rate, steps, warn=warn)
    if sample_rate == 1:
        return 2 * calibrate(epsilon, delta, sample_rate, steps, warn=warn)
    complaints: list[str] = []

    def upper(noise_multiplier: float) -> float:
        complaints.clear()
        event = GaussianEvent(noise_multiplier, sample_rate, steps)
        return compose_adjacency([event], delta, adjacency, complaints.append).upper

    try:
        guess = calibrate(epsilon / 2, delta, sample_rate, steps, warn=lambda sentence: None)
    except BudgetError:
        guess = MAX_NOISE_MULTIPLIER  # half the budget is only a starting point
    found = settle(upper, epsilon, guess, MAX_NOISE_MULTIPLIER)
    if found is None:
        raise BudgetError(
            f"ε = {epsilon:g} at δ = {delta:g} under replace-one is too little for {steps} steps with any noise.",
            fix="Give a larger --eps, or fewer steps.",
        )
    upper(found)
    for complaint in complaints[:1]:
        warn(complaint)
    return found


def _moves(adjacency: str) -> int:
    if adjacency not in ADJACENCIES:
        raise UsageError(f"The adjacency is {adjacency!r}.", fix=f"Give {ZERO_OUT}, {ADD_REMOVE} or {REPLACE_ONE}.")
    return ADJACENCIES[adjacency]


def _two_moves(epsilons: np.ndarray, deltas: np.ndarray, delta: float) -> float | None:
    """The least ε₁ + ε₂ along the curve with δ₁ + exp(ε₁) δ₂ ≤ δ; None when the curve ends before."""

    def enough(epsilon: float) -> bool:
        first = epsilons <= epsilon
        rest = np.searchsorted(epsilons, epsilon - epsilons[first], side="right") - 1
        with np.errstate(divide="ignore"):  # log 0 of a δ that underflowed
            grown = np.exp(np.minimum(epsilons[first] + np.log(deltas[rest]), 700))
        return bool((deltas[first] + grown).min() <= delta)

    low, high = 0.0, float(2 * epsilons[-1])
    if enough(low):
        return low
    if not enough(high):
        return None
    while high - low > 1e-5 * high:
        middle = (low + high) / 2
        low, high = (low, middle) if enough(middle) else (middle, high)
    return high


def moved_epsilon(
    components: Sequence[analytic.Component], delta: float, distance: float, records: int = 1
) -> tuple[float, str]:
    """ε of telling apart data sets that differ in ``records`` records, which together move a step by ``distance`` · C.

    Both data sets are sampled with the same coins: a step that draws none of the records is the same in both, and one
    that draws any moves by ``distance`` · C at most. Zeroing out k records is (k, k), replacing one is (2, 1).

    Guarantee:
        The composition is (result, delta)-DP for such data sets.
    """
    moved = [
        each._replace(
            noise_multiplier=each.noise_multiplier / distance,
            sample_rate=-math.expm1(records * math.log1p(-each.sample_rate)) if each.sample_rate < 1 else 1.0,
        )
        for each in components
    ]
    full = gaussian_dp_epsilon(analytic.full_batch_mu(moved), delta)
    counted = analytic.participation_epsilon(moved, delta, full)
    return (full, analytic.FULL_BATCHES) if counted is None or full <= counted else (counted, analytic.PARTICIPATIONS)
