"""Group privacy: what a guarantee for one record says about k records that are zeroed out together.

Where each step is a full batch the answer is exact: k records move a sum by k C at most, so a μ-GDP mechanism is kμ-GDP
for groups of k (Dong, Roth & Su 2022, "Gaussian Differential Privacy", Theorem 2.14, and tight for the Gaussian). For
sampled batches the general bound is used: k neighbours in a row, each (ε, δ')-private, give (Vadhan 2017, "The
complexity of differential privacy", Lemma 2.2)

    (k ε, δ' (exp(k ε) − 1) / (exp(ε) − 1)).

As ε depends on δ', the δ' is searched for which the second entry is the δ that was asked for. This bound is valid and
not tight: Poisson sampling rarely draws all of a group into one batch (Ganesh 2024, "Tight group-level DP guarantees
for DP-SGD with sampling via mixture of Gaussians mechanisms"), which it makes nothing of. Where it is worse than all
k records moving every step that draws one of them (``analytic.moved_epsilon``), that bound is given.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from dprandp.errors import UsageError
from dprandp.privacy.accounting import (
    EpsilonBound,
    GaussianEvent,
    Warn,
    components_of,
    compose,
    gaussian_mu,
    merge_events,
    warn_by_log,
)
from dprandp.privacy.discrete_cost import DELTA_SHARE, check_distance
from dprandp.privacy.gaussian_dp import gaussian_dp_epsilon

# A δ' smaller than this is not tried.
_SMALLEST_LOG_DELTA = -300 * math.log(10)
_LARGEST_SIZE = 10**15
# The search ends where the δ of the group is between this part of the one asked for and the whole.
_CLOSE_ENOUGH = 0.9


def group_privacy(epsilon: float, delta: float, size: int) -> tuple[float, float]:
    """(ε, δ) for groups of ``size`` records, from (ε, δ) for one, whatever the mechanism.

    Args:
        epsilon: ε ≥ 0; inf gives (inf, delta).
        delta: δ in [0, 1).
        size: k, from 1 to 1e15.

    Guarantee:
        Every (epsilon, delta)-private mechanism has it. δ may exceed 1, which says nothing.

    Raises:
        UsageError: a value is out of its range.
    """
    _require_size(size)
    if not (epsilon >= 0 and 0 <= delta < 1):
        raise UsageError(f"ε = {epsilon} with δ = {delta} is no guarantee.", fix="Give ε of at least 0 and δ below 1.")
    if math.isinf(epsilon):
        return math.inf, delta
    log_delta = math.log(delta) + _log_growth(epsilon, size) if delta else -math.inf
    return size * epsilon, math.exp(log_delta) if log_delta < 700 else math.inf


def compose_group(
    events: Sequence[GaussianEvent], delta: float, size: int, warn: Warn = warn_by_log
) -> EpsilonBound:
    """Bound ε of running all events, for groups of ``size`` records, at ``delta``.

    Args:
        events: as for ``accounting.compose``.
        delta: δ of the guarantee for groups, in (0, 1).
        size: k, from 1 to 1e15; 1 is ``accounting.compose``.
        warn: see ``accounting.compose``.

    Guarantee:
        The composition is (``upper``, ``delta``)-DP under zero-out of up to ``size`` records, under the
        conditions of ``compose``. Exact for full batches; an upper bound otherwise (``lower`` is that of one record).

    Raises:
        UsageError: δ or the size is out of its range. BudgetError: as ``compose``.
    """
    _require_size(size)
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
        from dprandp.privacy import analytic

        together, by = analytic.moved_epsilon(components_of(merge_events(events)), delta, size, size)
        if together < upper:
            upper, name = together, f"{by}, groups of {size}: all in one step"
    return EpsilonBound(min(single.lower, upper), upper, upper, delta, name)


def _by_the_general_bound(events: Sequence[GaussianEvent], delta: float, size: int) -> tuple[float, str]:
    """The smallest kε(δ') found among δ' that give the group no more than ``delta``, and the accountant of that ε(δ');
    inf where none was found.

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
        excess = tried + _log_growth(epsilon, size) - goal
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


def _log_growth(epsilon: float, size: int) -> float:
    """log((exp(kε) − 1)/(exp(ε) − 1)) = log Σ_{i<k} exp(iε), without overflow."""
    if epsilon == 0:
        return math.log(size)
    return (size - 1) * epsilon + math.log(-math.expm1(-size * epsilon)) - math.log(-math.expm1(-epsilon))


def _require_size(size: int) -> None:
    if isinstance(size, bool) or not 1 <= size <= _LARGEST_SIZE or size != int(size):
        raise UsageError(f"The size of a group is {size}.", fix="Give a whole number from 1 to 1e15.")
