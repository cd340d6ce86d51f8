"""The ε of a list of noisy steps, and the noise for a budget. Of (lower, estimate, upper), only ``upper`` is promised.

The unit of privacy is one record, under *zero-out* (Kairouz et al. 2021, "Practical and private (deep) learning without
sampling or shuffling"): of two data sets with the same public number N of positions, one has an empty position, which
contributes nothing to any sum. The accountants' theorems are stated for adding or removing a record; an empty position
has the distribution of the sum without it (docs/privacy.md).

===================  ======================================================  ===========================================
events               accountant                                              error
===================  ======================================================  ===========================================
all full batches     closed form of Gaussian DP (``gaussian_dp``)            below 1e-9 of ε
some sampled         privacy loss distributions, both directions (``pld``)   0.05 % (T > 1e5: more), included in upper
where that is less   bounds without a grid, such as Rényi DP (``analytic``)  an upper bound, 5 to 50 % loose
where that refuses   the same, announced by ``warn``                         the same
some private tuning  Rényi DP of everything (``tuning``)                     an upper bound, 5 to 50 % loose
===================  ======================================================  ===========================================

Discrete noise is accounted as Gaussian noise at a δ smaller by a part of 1e-4 (``randomness`` says why).
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from decimal import Decimal
from functools import cache, lru_cache

import numpy as np
from scipy.optimize import brentq

from dprandp.errors import BudgetError, UsageError
from dprandp.privacy import analytic
from dprandp.privacy.analytic import Component
from dprandp.privacy.gaussian_dp import gaussian_dp_epsilon, gaussian_dp_mu
from dprandp.privacy.tuning import TuningEvent

# ------------------------------------------------------------------------------------------------------- discrete cost

LATTICE_BITS = 44
"""At least 2^44 lattice points per standard deviation of the noise."""

DISTANCE = 2.0 ** (-2 * LATTICE_BITS) / 40 + 2.0**-110
"""Total variation distance, per coordinate, to rounded Gaussian noise; the second term is the sampler's."""

MOST_COORDINATES = 2**26
"""Most parameters of a model that gets noise."""

DELTA_SHARE = 1e-4
"""The part of δ that is kept for the distance between the two kinds of noise."""


def check_distance(steps: int, epsilon: float, delta: float) -> None:
    """Refuse where δ's part does not cover the distance: (1 + exp ε) τ > DELTA_SHARE · δ, τ over all coordinates.

    ``steps`` ≥ 1 have discrete noise on up to ``MOST_COORDINATES`` coordinates each; ``epsilon`` is that of Gaussian
    noise, or infinite, which is not refused. Raises BudgetError.
    """
    if math.isinf(epsilon):
        return
    log_cost = math.log(steps * MOST_COORDINATES * DISTANCE) + epsilon + math.log1p(math.exp(-epsilon))
    if log_cost > math.log(DELTA_SHARE * delta):
        raise BudgetError(
            f"At ε = {epsilon:.4g} and δ = {delta:g} the lattice of discrete noise is too coarse to be accounted for.",
            fix="Give a smaller --eps, a larger --delta, or --noise gaussian.",
        )


Warn = Callable[[str], None]
warn_by_log: Warn = logging.getLogger(__name__).warning

_LEAST_PART = 0.005  # with less than this part of the budget, steps would be only noise
MAX_NOISE_MULTIPLIER = 1e6  # with more noise, a step carries no information
FIXED = "A run's budget cannot grow once it has begun."

# A δ is advised to be at most the first, and at most the second as a part of 1/N.
ADVISED_DELTA, ADVISED_SHARE = 1e-5, 0.1
# Limits beyond which there is no privacy, squares overflow, and doubles cannot count.
_LEAST_NOISE, _LARGEST_EPSILON, _MOST_STEPS = 1e-100, 1e150, 2**53


@dataclass(frozen=True)
class GaussianEvent:
    """``steps`` noisy sums, each over a Poisson sample, each with Gaussian noise of std noise_multiplier · clip_norm.

    Args:
        noise_multiplier: σ ≥ 0; 0 means no noise, hence no privacy.
        sample_rate: q in (0, 1], each record's independent chance of being in a step; 1 means full batches.
        steps: T, from 0 to 2^53. Values out of range, NaN or infinite raise UsageError.
        discrete: the noise is a discrete Gaussian on a lattice (``randomness``).
    """

    noise_multiplier: float
    sample_rate: float
    steps: int
    discrete: bool = False

    def __post_init__(self) -> None:
        noise = self.noise_multiplier
        if not (math.isfinite(noise) and (noise == 0 or noise >= _LEAST_NOISE)):
            raise UsageError(
                f"The noise multiplier is {self.noise_multiplier}.",
                fix=f"Give a finite number of at least {_LEAST_NOISE:g}, or 0 for no noise.",
            )
        if not 0 < self.sample_rate <= 1:
            raise UsageError(f"The sample rate is {self.sample_rate}.", fix="Give a number above 0, at most 1.")
        if isinstance(self.steps, bool) or not 0 <= self.steps <= _MOST_STEPS or self.steps != int(self.steps):
            raise UsageError(f"The number of steps is {self.steps}.", fix="Give a whole number from 0 to 2^53.")


Event = GaussianEvent | TuningEvent


@dataclass(frozen=True)
class EpsilonBound:
    """ε of a composition at one δ. Only ``upper`` may be promised; ``lower`` and ``estimate`` show the slack."""

    lower: float
    estimate: float
    upper: float
    delta: float
    accountant: str


def rounded_up(epsilon: float, digits: int = 4) -> str:
    """ε for people, with so many significant digits: never less than it is (but for a part of 1e-12)."""
    if not math.isfinite(epsilon) or epsilon <= 0:
        return f"{epsilon:g}"
    places = digits - 1 - math.floor(math.log10(epsilon))
    up = math.ceil(Decimal(epsilon * (1 - 1e-12)).scaleb(places))
    return f"{float(Decimal(up).scaleb(-places)):.{digits}g}"


def advised_delta(examples: int) -> float:
    """1e-5, or a tenth of 1/N (for N ``examples``) where that is smaller, rounded down to one significant digit."""
    most = min(ADVISED_DELTA, ADVISED_SHARE / examples)
    digit, _, exponent = f"{most:.0e}".partition("e")  # rounded to the nearest
    rounded = float(f"{digit}e{exponent}")
    if rounded <= most:
        return rounded
    return float(f"{int(digit) - 1}e{exponent}") if digit != "1" else float(f"9e{int(exponent) - 1}")


def merge_events(events: Sequence[Event]) -> list[Event]:
    """The same composition in canonical form: equal (q, σ, kind of noise) added up, sorted, none empty, tuning last."""
    totals: dict[tuple[float, float, bool], int] = {}
    if unknown := [event for event in events if not isinstance(event, GaussianEvent | TuningEvent)]:
        raise TypeError(f"{unknown[0]!r} is no event")
    tuning = sorted((e for e in events if isinstance(e, TuningEvent)), key=lambda e: (e.mu, e.eta, e.gamma))
    for event in events:
        if isinstance(event, GaussianEvent) and event.steps:
            key = (event.sample_rate, event.noise_multiplier, event.discrete)
            totals[key] = totals.get(key, 0) + int(event.steps)
    steps = [GaussianEvent(sigma, q, steps, discrete) for (q, sigma, discrete), steps in sorted(totals.items())]
    return [*steps, *tuning]


def gaussian_mu(events: Sequence[Event]) -> float | None:
    """μ of a composition of full-batch steps, √(Σ T/σ²); None when any event is another, inf when one has no noise."""
    merged = merge_events(events)
    if any(isinstance(event, TuningEvent) or event.sample_rate < 1 for event in merged):
        return None
    if any(event.noise_multiplier == 0 for event in merged):
        return math.inf
    if any(event.noise_multiplier > 1e150 for event in merged):  # its square is beyond doubles
        return math.hypot(*(math.sqrt(event.steps) / event.noise_multiplier for event in merged))
    return math.sqrt(math.fsum(event.steps / event.noise_multiplier**2 for event in merged))


def compose(events: Sequence[Event], delta: float, warn: Warn = warn_by_log) -> EpsilonBound:
    """Bound ε of running all events on the same data, in any order, at ``delta`` in (0, 1).

    ``warn`` is called with one sentence when the PLD accountant refuses or two accountants contradict each other.

    Guarantee:
        The composition is (``upper``, ``delta``)-DP under zero-out of one record, provided each step is a Poisson
        sample at the stated rate, of sensitivity C, with fresh Gaussian noise of std σC, or discrete noise as
        ``add_discrete_noise`` adds it. The parameters may differ from event to event but must not depend on the data,
        nor on earlier *results* that somebody looked at (``adaptive`` allows that); for full batches they may, as far
        as Σ T/σ² is fixed.

    Raises:
        UsageError: δ is not between 0 and 1. BudgetError: ε is too large for the lattice of discrete noise.
    """
    if not 0 < delta < 1:
        raise UsageError(f"delta is {delta}.", fix="Give a delta between 0 and 1, both excluded.")
    if _any_discrete(events):
        return _compose_discrete(events, delta, warn)
    merged = tuple(merge_events(events))
    if not merged:
        return EpsilonBound(0.0, 0.0, 0.0, delta, "none (nothing was spent)")
    if any(isinstance(event, GaussianEvent) and event.noise_multiplier == 0 for event in merged):
        return EpsilonBound(math.inf, math.inf, math.inf, delta, "none (a step without noise)")
    if any(isinstance(event, TuningEvent) for event in merged):
        return _compose_tuned(merged, delta)
    mu = gaussian_mu(merged)
    if mu is not None:
        exact = gaussian_dp_epsilon(mu, delta)
        return EpsilonBound(exact, exact, exact, delta, "exact Gaussian DP (closed form)")
    bound, complaint = _compose_sampled(merged, delta)
    if complaint:
        warn(complaint)
    return bound


def _compose_discrete(events: Sequence[Event], delta: float, warn: Warn) -> EpsilonBound:
    bound = compose(_continuous(events), delta * (1 - DELTA_SHARE), warn)
    steps = sum(event.steps for event in events if isinstance(event, GaussianEvent) and event.discrete)
    check_distance(max(1, steps), bound.upper, delta)
    return replace(bound, delta=delta, accountant=f"{bound.accountant}, discrete noise")


def _any_discrete(events: Sequence[Event]) -> bool:
    return any(isinstance(event, GaussianEvent) and event.discrete for event in events)


def _continuous(events: Sequence[Event]) -> list[Event]:
    return [replace(event, discrete=False) if isinstance(event, GaussianEvent) else event for event in events]


@lru_cache(maxsize=512)
def _compose_tuned(merged: tuple[Event, ...], delta: float) -> EpsilonBound:
    steps = [event for event in merged if isinstance(event, GaussianEvent)]
    tuning = [event for event in merged if isinstance(event, TuningEvent)]
    epsilon = analytic.renyi_epsilon(components_of(steps), delta, tuning)
    return EpsilonBound(0.0, epsilon, epsilon, delta, "Rényi DP, tuning by Papernot & Steinke 2022, Theorem 2")


@lru_cache(maxsize=512)
def _compose_sampled(merged: tuple[GaussianEvent, ...], delta: float) -> tuple[EpsilonBound, str | None]:
    """The smallest proven bound, and a warning about it, if any."""
    from dprandp.privacy import pld  # takes long to load

    components = components_of(merged)
    simple, simple_name = analytic.analytic_epsilon(components, delta)
    if simple == 0:
        return EpsilonBound(0.0, 0.0, 0.0, delta, simple_name), None
    try:
        lower, estimate, upper = pld.pld_epsilon(components, delta, simple)
    except pld.AccountantRefused as refusal:
        complaint = f"The PLD accountant refused ({refusal}); {simple_name} gives the looser ε ≤ {rounded_up(simple)}."
        return EpsilonBound(0.0, simple, simple, delta, simple_name), complaint
    if lower > simple * (1 + 1e-6):
        # Two proven bounds that exclude each other: one of them failed numerically. Promise the larger.
        complaint = f"PLD (ε ≥ {lower:.6g}) contradicts {simple_name} (ε ≤ {simple:.6g}): the larger is kept."
        return EpsilonBound(lower, estimate, max(upper, simple), delta, pld.NAME), complaint
    if simple < upper:
        return EpsilonBound(min(lower, simple), min(estimate, simple), simple, delta, simple_name), None
    return EpsilonBound(lower, estimate, upper, delta, pld.NAME), None


def components_of(events: Sequence[GaussianEvent]) -> list[Component]:
    """Sampled events as they are; all full-batch events as one Gaussian of the same μ, which is exact and cheaper."""
    full = [event for event in events if event.sample_rate == 1]
    components = [Component(e.noise_multiplier, e.sample_rate, e.steps) for e in events if e.sample_rate < 1]
    if full:
        components.append(Component(1 / gaussian_mu(full), 1.0, 1))
    return components


def calibrate(
    epsilon: float,
    delta: float,
    sample_rate: float,
    steps: int,
    spent: Sequence[Event] = (),
    warn: Warn = warn_by_log,
    discrete: bool = False,
) -> float:
    """The smallest noise multiplier found for ``steps`` ≥ 1 that keeps everything, ``spent`` too, within ``epsilon``.

    ``epsilon`` > 0; inf gives 0 (no noise, not private).

    Guarantee:
        ``compose([*spent, GaussianEvent(result, sample_rate, steps, discrete)], delta).upper <= epsilon``; it is
        within 0.5 % of ``epsilon`` unless what is left of the budget is smaller than the accountant's own error.

    Raises:
        BudgetError: ``spent`` reaches 99.5 % of ``epsilon``, or no noise below a multiplier of 1e6 fits into the rest.
        UsageError: a value is outside its range.
    """
    if not (0 < epsilon <= _LARGEST_EPSILON or math.isinf(epsilon)):
        fix = f"Give a number above 0, at most {_LARGEST_EPSILON:g}, or inf for no privacy."
        raise UsageError(f"epsilon is {epsilon}.", fix=fix)
    if discrete or _any_discrete(spent):
        spent, delta = _continuous(spent), delta * (1 - DELTA_SHARE)
    event = GaussianEvent(1.0, sample_rate, steps)
    if event.steps < 1:
        raise UsageError("There are no steps to calibrate the noise for.", fix="Give at least one step.")
    if math.isinf(epsilon):
        return 0.0
    refuse_spent(compose(spent, delta, warn).upper, epsilon, delta)
    noise_multiplier, complaint = _calibrate(epsilon, delta, sample_rate, int(steps), tuple(merge_events(spent)))
    if complaint:
        warn(complaint)
    return noise_multiplier


def refuse_spent(spent: float, epsilon: float, delta: float) -> None:
    """Raise BudgetError where what was spent leaves less than 0.5 % of ``epsilon``."""
    if spent >= epsilon * (1 - _LEAST_PART):
        raise BudgetError(
            f"This run has already spent ε = {rounded_up(spent)} at δ = {delta:g}, which uses up ε = {epsilon:g}.",
            fix=f"{FIXED} Start a new run, and add up the ε of both.",
        )


@lru_cache(maxsize=128)
def _calibrate(
    epsilon: float, delta: float, sample_rate: float, steps: int, spent: tuple[Event, ...]
) -> tuple[float, str | None]:
    complaints: list[str] = []

    def upper(noise_multiplier: float) -> float:
        complaints.clear()
        return compose([*spent, GaussianEvent(noise_multiplier, sample_rate, steps)], delta, complaints.append).upper

    mu_spent = gaussian_mu(spent)
    if sample_rate == 1 and mu_spent is not None:
        # Gaussian DP adds in squares: what is left for the new steps is μ² − μ_spent².
        mu = gaussian_dp_mu(epsilon, delta)
        room = mu**2 - mu_spent**2 if mu_spent else 1.0
        guess = math.sqrt(steps / room) if mu_spent and room > 0 else math.sqrt(steps) / mu
        found = nudge(upper, epsilon, guess) if room > 0 else None
    else:

        def sketch(noise_multiplier: float) -> float:
            events = merge_events([*spent, GaussianEvent(noise_multiplier, sample_rate, steps)])
            return _sketch(components_of(events), delta)

        # with private tuning, one quick accountant serves for everything: the promised bound itself
        tuned = any(isinstance(event, TuningEvent) for event in spent)
        start = math.sqrt(steps) if tuned else _first_guess(epsilon, delta, sample_rate, steps)
        guess = solve(upper if tuned else sketch, epsilon * AIM, start, MAX_NOISE_MULTIPLIER)
        found = settle(upper, epsilon, guess, MAX_NOISE_MULTIPLIER)
    if found is None:
        left = "What is left of " if spent else ""
        raise BudgetError(
            f"{left}ε = {epsilon:g} at δ = {delta:g} is too little for {steps} steps, however large the noise.",
            fix=f"{FIXED} Give fewer steps, or start a new run and add up the ε of both."
            if spent
            else "Give a larger --eps, or fewer steps.",
        )
    upper(found)  # warn about the accepted value, if necessary
    return found, complaints[-1] if complaints else None


def _first_guess(epsilon: float, delta: float, sample_rate: float, steps: int) -> float:
    """Central limit: T steps at rate q are about μ-GDP with μ = q √(T (exp(1/σ²) − 1)) (Dong et al. 2022, §5.1)."""
    root = gaussian_dp_mu(epsilon, delta) / sample_rate / math.sqrt(steps)
    return 1 / math.sqrt(math.log1p(min(max(root, 1e-150), 1e150) ** 2))


def _sketch(components: Sequence[Component], delta: float) -> float:
    """ε on a coarse grid, to aim with; a bound without a grid where the PLD accountant refuses, or that is less."""
    from dprandp.privacy import pld

    simple = analytic.analytic_epsilon(components, delta)[0]
    try:
        return min(simple, pld.pld_epsilon(components, delta, simple, pld.COARSE)[2])
    except pld.AccountantRefused:
        return simple


# ------------------------------------------------------------------------------------------------- curves and groups

_CURVE_POINTS = 5000
# The smallest δ at which a curve without a grid is tabled.
_LEAST_DELTA = 1e-300
_LARGEST_SIZE = 10**15
WITHOUT_GRID = "a curve from Rényi DP and Gaussian DP"


def group_privacy(epsilon: float, delta: float, size: int) -> tuple[float, float]:
    """(ε, δ) for groups of ``size`` records, 1 to 1e15, from (ε, δ) for one, for any mechanism; else UsageError.

    k neighbours in a row, each (ε, δ)-private, give (k ε, δ (exp(k ε) − 1) / (exp(ε) − 1)) (Vadhan 2017, "The
    complexity of differential privacy", Lemma 2.2). ε = inf gives (inf, delta). The δ may exceed 1, which says nothing.
    """
    if isinstance(size, bool) or not 1 <= size <= _LARGEST_SIZE or size != int(size):
        raise UsageError(f"The size of a group is {size}.", fix="Give a whole number from 1 to 1e15.")
    if not (epsilon >= 0 and 0 <= delta < 1):
        raise UsageError(f"ε = {epsilon} with δ = {delta} is not a guarantee.", fix="Give ε ≥ 0 and δ < 1.")
    if math.isinf(epsilon):
        return math.inf, delta
    log_delta = math.log(delta) + log_growth(epsilon, size) if delta else -math.inf
    return size * epsilon, math.exp(log_delta) if log_delta < 700 else math.inf


def log_growth(epsilon: float, size: int) -> float:
    """log((exp(kε) − 1)/(exp(ε) − 1)) = log Σ_{i<k} exp(iε), without overflow."""
    if epsilon == 0:
        return math.log(size)
    return (size - 1) * epsilon + math.log(-math.expm1(-size * epsilon)) - math.log(-math.expm1(-epsilon))


def privacy_curve(events: tuple[GaussianEvent, ...], least: float, warn: Warn) -> tuple[np.ndarray, np.ndarray, str]:
    """Points of a valid privacy curve: ε ascending from 0, δ descending, float64 [n]; and where they come from.

    The composition (merged, at least one event, none without noise) is (ε_i, δ_i)-DP under zero-out for every i. The
    curve should reach δ ``least``; rounding may end it before. ``warn`` is told where a looser bound stands in.
    """
    epsilons, deltas, source, complaint = _cached_curve(events, least)
    if complaint:
        warn(complaint)
    return epsilons, deltas, source


@lru_cache(maxsize=64)
def _cached_curve(events: tuple[GaussianEvent, ...], least: float) -> tuple[np.ndarray, np.ndarray, str, str | None]:
    from dprandp.privacy import pld  # takes long to load

    components, least = components_of(events), max(least, _LEAST_DELTA)
    try:
        scale = analytic.analytic_epsilon(components, least)[0]
        epsilons, deltas = pld.pld_curve(components, least, scale, _CURVE_POINTS)
    except pld.AccountantRefused as refusal:
        epsilons, deltas = analytic.analytic_curve(components, np.geomspace(0.9, least, 60))
        return epsilons, deltas, WITHOUT_GRID, f"The PLD accountant refused ({refusal}); {WITHOUT_GRID} is looser."
    return epsilons, deltas, "the whole PLD curve", None


# --------------------------------------------------------------------------------------------------------- calibration
#
# ``solve`` finds a guess with a cheap function, ``settle`` checks it with the promised one and corrects it. So an error
# in the cheap function costs time, never privacy.

Falling = Callable[[float], float]

# ``settle`` aims at the first part of the budget and accepts anything from the second part up to the whole.
AIM, ACCEPT = 0.9995, 0.998
_SMALLEST = 1e-6


def solve(function: Falling, goal: float, start: float, largest: float, tolerance: float = 1e-4) -> float:
    """Where ``function`` (positive argument, falling) equals ``goal``, to a relative ``tolerance`` of the argument.

    Returns ``inf`` when the function stays above the goal up to ``largest``, 1e-6 when it is below it there.
    """

    @cache
    def excess(log_argument: float) -> float:
        return math.log(max(function(math.exp(log_argument)), 1e-300)) - math.log(goal)

    here = math.log(min(max(start, _SMALLEST), largest))
    upwards = excess(here) > 0
    end = math.log(largest if upwards else _SMALLEST)
    stride = 0.1
    while here != end:
        there = min(here + stride, end) if upwards else max(here - stride, end)
        if (excess(there) > 0) != upwards:
            return math.exp(brentq(excess, min(here, there), max(here, there), xtol=tolerance, maxiter=60))
        here, stride = there, 2 * stride
    return math.inf if upwards else _SMALLEST


def settle(promised: Falling, budget: float, guess: float, largest: float) -> float | None:
    """The smallest argument seen at which ``promised`` is at most ``budget``, if it can be not below ACCEPT of it.

    None where no argument up to ``largest`` fits.
    """
    fits, exceeds = math.inf, 0.0
    argument, slope, stride = min(guess, largest), -1.0, 0.0
    previous: tuple[float, float] | None = None
    for _ in range(24):
        value = promised(argument)
        if value <= budget:
            fits = min(fits, argument)
            if value >= ACCEPT * budget or argument <= _SMALLEST:
                break
        else:
            exceeds = max(exceeds, argument)
            if exceeds >= largest:
                break
        if exceeds and fits / exceeds < 1.0005:
            break  # the accountant's grid is coarser than the window
        here = (math.log(argument), math.log(max(value, 1e-300)))
        if previous and previous[0] != here[0]:
            slope = min(-0.05, (here[1] - previous[1]) / (here[0] - previous[0]))
        previous = here
        last, stride = stride, max(-1.0, min(1.0, (math.log(AIM * budget) - here[1]) / slope))
        if value > budget and math.isinf(fits):
            stride = max(stride, 2 * last, 2e-4)  # nothing fits yet: strides double, since the function may flatten out
        argument = math.exp(here[0] + stride)
        if exceeds and math.isfinite(fits) and not exceeds < argument < fits:
            argument = math.sqrt(exceeds * fits)
        argument = max(min(argument, largest), _SMALLEST)
    return fits if math.isfinite(fits) else None


def nudge(promised: Falling, budget: float, guess: float) -> float | None:
    """The first step above ``guess`` (at most 0.001 %) that fits: for guesses that are exact but for rounding."""
    for exponent in range(-14, -4):
        argument = guess * (1 + 10.0**exponent)
        if promised(argument) <= budget:
            return argument
    return None
