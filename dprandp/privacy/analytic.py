"""Upper bounds on ε of sampled Gaussian steps that need no grid: valid for every σ, q, T and δ.

Each is proven for the whole composition, in either direction of add/remove and so of zero-out, with
P = (1−q) N(0, σ²) + q N(1, σ²) and Q = N(0, σ²); so the smallest of them is a bound as well.

*Full batches.* (P, Q) is what comes out of (N(1, σ²), Q) when the input is replaced by a fresh draw of Q with
probability 1 − q, so that sampled steps are at most as revealing as full batches: √(Σ T/σ²)-GDP.

*Participations.* Of T equal steps a record is in K ~ Binomial(T, q). The hockey-stick divergence is jointly convex, so
δ(ε) ≤ E_K[δ of √K/σ-GDP at ε]. This is tight where the noise is small, and where a record is hardly ever drawn.

*Rényi DP.* With A(α) = E_Q[(P/Q)^α], the divergence of order α > 1 is log A(α)/(α − 1) in the larger direction
(Mironov, Talwar & Zhang 2019, "Rényi differential privacy of the sampled Gaussian mechanism", Theorem 5); to ε by Balle
et al. 2020, Theorem 21, for the best order; to 0 where the total variation, below √(1 − exp(−KL)) and √(KL/2), is ≤ δ.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from scipy.special import betainc, log_ndtr

from dprandp.privacy.gaussian_dp import gaussian_dp_epsilon
from dprandp.privacy.tuning import TuningEvent

FULL_BATCHES = "Gaussian DP of full batches (closed form)"
PARTICIPATIONS = "Gaussian DP averaged over the number of participations"
RENYI = "Rényi DP (integrated)"

# α − 1; any order gives a valid bound
_ORDERS = np.geomspace(1e-4, 1e8, 61)
_GOLDEN = (math.sqrt(5) - 1) / 2
_NODES, _WEIGHTS = np.polynomial.legendre.leggauss(20)
_REACH = 14.0  # a normal density this many standard deviations away is below 1e-43
_MOST_PANELS = 20_000
# A smaller sampling rate is taken for this one, which costs no less: the panels reach no further.
_LEAST_RATE = 1e-25
_SLACK = 1e-9  # what integration and rounding may take from a moment, as a part of it; added to it
_MOST_COUNTS = 2000


class Component(NamedTuple):
    """``steps`` independent uses of one sampled Gaussian; sample_rate = 1 is the plain Gaussian."""

    noise_multiplier: float
    sample_rate: float
    steps: int


def analytic_epsilon(components: Sequence[Component], delta: float) -> tuple[float, str]:
    """The smallest of the bounds above, and the name of the one that gave it; for one component or more.

    Guarantee:
        The composition is (result, delta)-DP under zero-out. Never NaN; infinite only beyond the range of doubles.
    """
    found = [(gaussian_dp_epsilon(full_batch_mu(components), delta), FULL_BATCHES)]
    counted = participation_epsilon(components, delta, found[0][0])
    if counted is not None:
        found.append((counted, PARTICIPATIONS))
    if min(found)[0] > 0:
        found.append((renyi_epsilon(components, delta), RENYI))
    return min(found)


def analytic_curve(components: Sequence[Component], deltas: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Valid points of the privacy curve: ε ascending from 0 and δ descending, float64 [n + 1].

    There is one at each of ``deltas``, float64 [n], descending in (0, 1), and one at ε = 0.
    """
    tabled = _ORDERS[(_ORDERS > 1e-3) & (_ORDERS < 1e7)]
    divergences = np.array([_divergence(components, float(order)) for order in tabled])
    mu = full_batch_mu(components)
    epsilons = []
    for delta in deltas.tolist():
        full = gaussian_dp_epsilon(mu, delta)
        counted = participation_epsilon(components, delta, full)
        epsilons.append(min(full, math.inf if counted is None else counted, _least(divergences, tabled, delta)))
    return np.concatenate([[0.0], np.maximum.accumulate(epsilons)]), np.concatenate([[_variation(components)], deltas])


def full_batch_mu(components: Sequence[Component]) -> float:
    """μ of the same steps on full batches: √(Σ T/σ²), a bound for any sampling."""
    return math.hypot(*(math.sqrt(each.steps) / each.noise_multiplier for each in components)) * (1 + 1e-15)


def participation_epsilon(components: Sequence[Component], delta: float, largest: float) -> float | None:
    """ε by the number of participations, at most ``largest``; None where that is no gain or the steps differ."""
    if len(components) != 1 or not math.isfinite(largest):
        return None
    counted = _participations(components[0].sample_rate, components[0].noise_multiplier, components[0].steps, delta)
    if counted is None:
        return None
    if _counted_delta(*counted, 0.0) <= delta:
        return 0.0
    low, high = 0.0, largest
    while _counted_delta(*counted, high / 2) <= delta:
        high /= 2
    low = high / 2 if high < largest else 0.0
    while high - low > 1e-6 * high:
        middle = (low + high) / 2
        low, high = (low, middle) if _counted_delta(*counted, middle) <= delta else (middle, high)
    return high


@lru_cache(maxsize=64)
def _participations(q: float, sigma: float, steps: int, delta: float) -> tuple[np.ndarray, np.ndarray] | None:
    """μ_j = √k_j/σ of ascending numbers k_j, and P(K > k_(j−1)) before each and after the last: float64 [n], [n + 1].

    None where averaging over K gains nothing: a record takes part often, in steps that say little.
    """
    if q == 1 or (q * steps > 1 and sigma > 2):
        return None
    mean, log_rest = q * steps, 20 - math.log(delta)
    lowest = math.floor(max(0.0, mean - 10 * math.sqrt(mean) - 10))
    spread = log_rest / 3 + math.sqrt(log_rest**2 / 9 + 2 * mean * log_rest)  # Bernstein: P(K > mean + spread) ≤ 1e-8 δ
    highest = min(steps, math.ceil(mean + spread))
    # Where there are too many, several share the largest of them.
    stride = max(1, -(-(highest - lowest) // _MOST_COUNTS))
    counts = np.arange(lowest, highest + stride, stride, dtype=np.float64).clip(max=steps)
    more = np.where(counts < steps, betainc(counts + 1, np.maximum(steps - counts, 1e-9), q), 0.0)
    return np.sqrt(counts) / sigma, np.concatenate([[1.0], more])


def _counted_delta(mus: np.ndarray, more: np.ndarray, epsilon: float) -> float:
    """E_K[δ(K)] = Σ_j P(K > k_(j−1)) (δ_j − δ_(j−1)), where all terms are positive; beyond the last k it is 1."""
    with np.errstate(divide="ignore", invalid="ignore", under="ignore"):  # 0/0 for a record that never takes part
        place = np.where(mus > 0, epsilon / mus, np.inf)
        deltas = np.exp(log_ndtr(mus / 2 - place))
        if epsilon < 1e6:  # beyond, the second term is lost in rounding; without it the bound holds as well
            ratio = epsilon + log_ndtr(-mus / 2 - place) - log_ndtr(mus / 2 - place)
            deltas = np.where(mus > 0, deltas * (1e-14 - np.expm1(np.minimum(np.nan_to_num(ratio), 0))), 0.0)
    deltas = np.maximum.accumulate(np.concatenate([[0.0], np.where(mus > 0, deltas, 0.0), [1.0]]))
    return float(np.dot(more, np.diff(deltas))) * (1 + 1e-6)


def renyi_epsilon(components: Sequence[Component], delta: float, tuning: Sequence[TuningEvent] = ()) -> float:
    """ε by the best Rényi order. Coarse steps outward from where it should be, then a golden section."""
    kl = _divergence(components, float(_ORDERS[0]), tuning)
    if math.sqrt(min(kl / 2, -math.expm1(-kl))) <= delta:
        return 0.0
    known: dict[float, float] = {}

    def epsilon(order: float) -> float:
        if order not in known:
            known[order] = _divergence(components, order, tuning) + _conversion(order, delta)
        return known[order]

    variance = math.fsum(each.steps * (each.sample_rate / each.noise_multiplier) ** 2 for each in components
                         if each.sample_rate / each.noise_multiplier < 1e100)  # fmt: skip
    start = int(np.searchsorted(_ORDERS, math.sqrt(-2 * math.log(delta) / max(variance, 1e-200)))) if variance else 60
    best, where = math.inf, min(start, len(_ORDERS) - 1)
    spent = kl
    # Upwards the divergence rises, downwards the conversion does: both ends are known before they are integrated.
    for index in range(where, len(_ORDERS)):
        order = float(_ORDERS[index])
        if spent + _conversion(order, delta) < best:
            spent = epsilon(order) - _conversion(order, delta)
            if spent + _conversion(order, delta) < best:
                best, where = epsilon(order), index
    for index in reversed(range(start)):
        order = float(_ORDERS[min(index, len(_ORDERS) - 1)])
        if kl + _conversion(order, delta) < best and epsilon(order) < best:
            best, where = epsilon(order), index
    if not math.isfinite(best):
        return math.inf
    low, high = (math.log(_ORDERS[min(max(where + side, 0), len(_ORDERS) - 1)]) for side in (-1, 1))
    for _ in range(14):
        left, right = high - _GOLDEN * (high - low), low + _GOLDEN * (high - low)
        if epsilon(math.exp(left)) < epsilon(math.exp(right)):
            high = right
        else:
            low = left
    return max(0.0, min(known.values()))


def _divergence(components: Sequence[Component], order: float, tuning: Sequence[TuningEvent] = ()) -> float:
    """Rényi divergence of the composition at 1 + ``order``."""
    moments = (each.steps * log_moment(each.sample_rate, each.noise_multiplier, order) for each in components)
    return math.fsum(moments) / order + math.fsum(float(event.rdp(np.array(1 + order))) for event in tuning)


def _conversion(order: float, delta: float) -> float:
    """What Balle et al. 2020, Theorem 21, adds to a divergence at 1 + ``order`` to make it ε."""
    return -(math.log(delta) + math.log1p(order)) / order + math.log(order) - math.log1p(order)


def _least(divergences: np.ndarray, orders: np.ndarray, delta: float) -> float:
    if math.sqrt(min(divergences[0] / 2, -math.expm1(-divergences[0]))) <= delta:
        return 0.0
    return max(0.0, float(np.min(divergences + [_conversion(order, delta) for order in orders.tolist()])))


def _variation(components: Sequence[Component]) -> float:
    """Total variation at most: δ at ε = 0."""
    kl = _divergence(components, 1e-3)
    bounds = [math.erf(full_batch_mu(components) / math.sqrt(8)), math.sqrt(min(kl / 2, -math.expm1(-kl)))]
    if len(components) == 1:
        only = components[0]
        counted = _participations(only.sample_rate, only.noise_multiplier, only.steps, 1e-12)
        if counted is not None:
            bounds.append(_counted_delta(*counted, 0.0))
    return min(1.0, min(bounds) * (1 + 1e-9))


@lru_cache(maxsize=10_000)
def log_moment(q: float, sigma: float, order: float) -> float:
    """log A(1 + ``order``) of one step, or above it by less than 1e-6 of it wherever integration is feasible.

    Otherwise the smaller of two bounds: full batches, and Minkowski's inequality in L_α(Q),
    ‖(1 − q) + q N(1, σ²)/N(0, σ²)‖_α ≤ 1 − q + q exp((α − 1)/(2σ²)).
    """
    q = max(q, _LEAST_RATE)
    alpha, c = 1 + order, 1 / sigma
    exponent = order * c / 2 * c
    full = alpha * exponent
    if q == 1 or c < 1e-30 or not math.isfinite(full):
        return full
    grown = math.log(q) + exponent
    norm = math.log1p(q * math.expm1(exponent)) if exponent < 30 else float(np.logaddexp(math.log1p(-q), grown))
    simple = min(full, alpha * norm)
    found = _integrated_log_moment(q, c, order)
    return simple if found is None else min(simple, found)


def _integrated_log_moment(q: float, c: float, order: float) -> float | None:
    """log of ∫ φ(z) (1 + u)^α dz, u = q (exp(c z − c²/2) − 1), c = 1/σ; None where it would take too many panels.

    Where A is near 1, A − 1 = ∫ φ ((1 + u)^α − 1 − α u) dz, since u has mean 0: no digits are lost.
    """
    edges = _panel_edges(q, c, order)
    if edges is None:
        return None
    alpha = 1 + order
    at_edges = alpha * _log_ratio(q, c, edges) - edges**2 / 2
    tallest = np.maximum(at_edges[1:], at_edges[:-1])
    # Of a panel no wider than 1, a peak inside it is less than this above its ends or it is no peak of the integrand.
    keep = (tallest > tallest.max() - 80) | (edges[:-1] < _REACH)
    starts, half = edges[:-1][keep, None], np.diff(edges)[keep, None] / 2
    z, weights = starts + half * (1 + _NODES), half * _WEIGHTS / math.sqrt(2 * math.pi)
    power = alpha * _log_ratio(q, c, z)
    log_values = power - z**2 / 2
    largest = float(log_values.max())
    with np.errstate(under="ignore"):
        direct = largest + math.log(float((weights * np.exp(log_values - largest)).sum()))
        if direct > 0.1:
            return direct * (1 + _SLACK)
        bell, shifted = np.exp(-(z**2) / 2), np.exp(-((z - c) ** 2) / 2)
        u = q * np.expm1(np.minimum(c * z - c * c / 2, 300))
        scaled = alpha * u
        small = np.abs(scaled) < 1e-4
        tiny = np.where(small, u, 0.0)
        series = alpha * order / 2 * tiny * tiny * (1 + (alpha - 2) * tiny / 3 * (1 + (alpha - 3) * tiny / 4))
        near = bell * (np.expm1(np.minimum(power, 1)) - scaled)
        far = np.exp(log_values) - bell - alpha * q * (shifted - bell)
        values = np.where(small, bell * series, np.where(power < 1, near, far))
        rounding = 4e-16 * np.where(small, 0.0, bell * np.abs(scaled) + np.exp(log_values))
    excess = float((weights * (np.maximum(values, 0) + rounding)).sum())
    return math.log1p(excess) * (1 + _SLACK)


def _log_ratio(q: float, c: float, z: np.ndarray) -> np.ndarray:
    """log(1 + u) = log(1 − q + q exp(c z − c²/2)), accurate near 0 and without overflow."""
    score = c * z - c * c / 2
    u = q * np.expm1(np.minimum(score, 300))
    with np.errstate(under="ignore"):
        far = np.logaddexp(math.log1p(-q), math.log(q) + score)
        return np.where(np.abs(u) < 0.5, np.log1p(np.clip(u, -0.5, 0.5)), far)


def _panel_edges(q: float, c: float, order: float) -> np.ndarray | None:
    """Ascending ends of panels that cover all that matters of φ(z) (1 + u)^α: float64 [n + 1].

    The integrand falls like a normal density right of its last stationary point z = α c w(z), where w = q e^s/(1 + u)
    rises with z: iterating from above comes down to it. Panels are at most 1 wide, and near z₀, where 1 + u = 0 at the
    points z₀ ± iπ/c, no wider than their distance from those.
    """
    top = last = (1 + order) * c
    log_odds = math.log1p(-q) - math.log(q)
    for _ in range(100):
        argument = log_odds - c * last + c * c / 2
        new = top / (1 + math.exp(argument)) if argument < 700 else 0.0
        if last - new < 0.1:
            break
        last = new
    centre, width = log_odds / c + c / 2, 2 / c
    # Near α = 1 what exceeds 1 peaks where the ratio begins to rise, up to 2c, however small q makes it.
    low, high = -_REACH, max(last, min(2 * c, centre) + 1) + _REACH
    if high - low > _MOST_PANELS or c > 1e6:
        return None
    edges = np.linspace(low, high, math.ceil(high - low) + 1)
    if width < 1:
        distances = [0.0]
        while distances[-1] < 2:
            distances.append(distances[-1] + max(width, distances[-1]))
        sides = np.concatenate([centre - np.array(distances), centre + np.array(distances)])
        edges = np.union1d(edges, sides[(sides > low) & (sides < high)])
    return edges
