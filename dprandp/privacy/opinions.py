"""Second and third opinions on a reported ε, by libraries that the reporting accountant does not use.

==================  =========================================  =======================================================
opinion             method                                     what it says
==================  =========================================  =======================================================
``prv-accountant``  privacy random variables, Fourier          certified bounds on ε of one direction (the record was
                    (Gopi, Lee & Wutschitz 2021)               there), so a certified lower bound on ε
``opacus``          Rényi DP of sampled Gaussian steps         an upper bound on ε, 5 to 50 % loose
                    (Mironov, Talwar & Zhang 2019)
``dp-accounting``   Rényi DP of private tuning, and of the     an upper bound on ε; given where the others, which know
                    steps after it (Papernot & Steinke 2022)   no tuning, have nothing to say
==================  =========================================  =======================================================

Both speak of Poisson samples whose parameters were fixed beforehand, under add/remove of one record, hence of zero-out.
Where a certified lower bound is above an upper one, a library is wrong, and no ε is given (``refuse_contradiction``).
An opinion may be missing, with its reason: these libraries take too long, or lose digits, for some parameters.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from importlib.metadata import version

import numpy as np

from dprandp.errors import AuditError
from dprandp.privacy.accounting import (
    DELTA_SHARE,
    EpsilonBound,
    Event,
    GaussianEvent,
    compose,
    gaussian_mu,
    merge_events,
)
from dprandp.privacy.tuning import TuningEvent

# Limits on prv-accountant's time (1 s) and memory, and the range in which its formulas hold.
_POINTS, _EVENTS = 60_000, 10
_NOISE, _LEAST_RATE = (0.2, 1e4), 1e-6
# Its wanted half-width as a part of ε; with a wider one than the second part it has nothing to say.
_WIDTH, _WIDEST = 0.0025, 0.5
# Rounding in δ for each step, which has to be below the error that it allows itself, this part of δ.
_ROUNDING, _DELTA_SHARE = 1e-14, 1e-3
# Whole orders: between them Opacus takes seconds where the noise is large. Any order gives a bound.
_ORDERS = [*range(2, 65), 96, 128, 256, 512]
# Orders of the composition with private tuning: close, since its best one may be anywhere.
_TUNED_ORDERS = np.unique(np.r_[np.geomspace(1.01, 2000, 400), 2:300])
# What rounding may do to a bound, as a part of it and alone.
_SLACK, _LEAST_SLACK = 1e-6, 1e-9


@dataclass(frozen=True)
class Opinion:
    """What another library (``name``, version and method) says of ε.

    Bounds are 0 and infinity where it claims none; ``why`` is the reason of a missing opinion, else empty.
    """

    name: str
    lower: float
    upper: float
    why: str = ""

    def __str__(self) -> str:
        if self.why:
            return f"{self.name}: none ({self.why})"
        if self.lower == 0 and math.isinf(self.upper):
            return f"{self.name}: no bound"
        above = f"{math.ceil(self.upper * 1e4 - 1e-9) / 1e4:.5g}"
        return f"{self.name}: ε {f'from {math.floor(self.lower * 1e4) / 1e4:.5g} to' if self.lower else '≤'} {above}"


def second_opinions(events: Sequence[Event], delta: float) -> list[Opinion]:
    """Opinions on a composition at δ in (0, 1): prv-accountant's, Opacus' and, with private tuning, dp-accounting's.

    The events' parameters were fixed beforehand. Discrete noise counts as Gaussian, at the δ that is left for it.
    """
    return list(_opinions(tuple(merge_events(events)), delta))


@lru_cache(maxsize=64)
def _opinions(merged: tuple[Event, ...], delta: float) -> tuple[Opinion, ...]:
    if any(isinstance(event, GaussianEvent) and event.discrete for event in merged):
        delta *= 1 - DELTA_SHARE
    names = f"prv-accountant {version('prv-accountant')} (PRV)", f"opacus {version('opacus')} (Rényi DP)"
    tuned = any(isinstance(event, TuningEvent) for event in merged)
    reason = ""
    if not merged:
        reason = "nothing was spent"
    elif any(isinstance(event, GaussianEvent) and event.noise_multiplier == 0 for event in merged):
        reason = "a step without noise"
    elif tuned:
        reason = "it does not know private tuning"
    if reason:
        missing = tuple(Opinion(name, 0.0, math.inf, reason) for name in names)
        if not tuned:
            return missing
        name = f"dp-accounting {version('dp-accounting')} (Rényi DP)"
        return *missing, _opinion(name, lambda: _renyi_tuned(merged, delta))
    full = [event for event in merged if event.sample_rate == 1]
    rows = [(event.noise_multiplier, event.sample_rate, event.steps) for event in merged if event.sample_rate < 1]
    if full:  # together one Gaussian, exactly
        rows.append((1 / gaussian_mu(full), 1.0, 1))
    about = compose([replace(event, discrete=False) for event in merged], delta, lambda sentence: None).upper
    return _opinion(names[0], lambda: _prv(rows, delta, about)), _opinion(names[1], lambda: _renyi(rows, delta))


def refuse_contradiction(reported: EpsilonBound, opinions: Sequence[Opinion]) -> None:
    """Raise AuditError where the promised ε is below a certified lower bound, or an upper bound below a lower one."""
    lower, of = max((reported.lower, reported.accountant), *((each.lower, each.name) for each in opinions))
    for upper, name in ((reported.upper, reported.accountant), *((each.upper, each.name) for each in opinions)):
        # prv-accountant's upper bound is of one direction alone, so it may be below the ε of both
        if name.startswith("prv-accountant") or upper * (1 + _SLACK) + _LEAST_SLACK >= lower:
            continue
        raise AuditError(
            f"Two accountants contradict each other: {of} has ε ≥ {lower:.6g} and {name} has ε ≤ {upper:.6g}.",
            fix="do not rely on this ε: one of the two libraries is wrong; report the parameters as a bug",
        )


def _opinion(name: str, ask: Callable[[], tuple[float, float]]) -> Opinion:
    with warnings.catch_warnings(record=True):  # its warnings are suppressed
        warnings.simplefilter("always")
        try:
            lower, upper = ask()
        except (ValueError, RuntimeError, ArithmeticError, IndexError, MemoryError, AssertionError) as error:
            return Opinion(name, 0.0, math.inf, str(error).split("\n")[0][:80] or type(error).__name__)
    if math.isnan(lower) or math.isnan(upper):
        return Opinion(name, 0.0, math.inf, "it returned NaN")
    return Opinion(name, max(0.0, float(lower)), max(0.0, float(upper)))


def _prv(rows: Sequence[tuple[float, float, int]], delta: float, about: float) -> tuple[float, float]:
    from prv_accountant import GaussianMechanism, PoissonSubsampledGaussianMechanism, PRVAccountant

    steps = sum(row[2] for row in rows)
    error = _DELTA_SHARE * delta
    if len(rows) > _EVENTS:
        raise ValueError(f"{len(rows)} different events are more than {_EVENTS}")
    if not all(_NOISE[0] <= sigma <= _NOISE[1] and q >= _LEAST_RATE for sigma, q, _ in rows):
        raise ValueError("the noise or the sampling rate is beyond its range")
    if _ROUNDING * steps > error:
        raise ValueError("too many steps for floating point at this delta")
    # its mesh is the width over ``cells``, and its grid about as long as this
    cells, length = math.sqrt(steps / 2 * math.log(12 / error)), 2 * (2 * about + 3.5)
    width = max(_WIDTH * about, length * cells / _POINTS)
    if not width <= _WIDEST * about:
        raise ValueError("it would need too many grid points")
    accountant = PRVAccountant(
        [GaussianMechanism(sigma) if q == 1 else PoissonSubsampledGaussianMechanism(q, sigma) for sigma, q, _ in rows],
        width, error, max_self_compositions=[row[2] for row in rows],
    )  # fmt: skip
    lower, _, upper = accountant.compute_epsilon(delta, [row[2] for row in rows])
    return lower, upper


def _renyi(rows: Sequence[tuple[float, float, int]], delta: float) -> tuple[float, float]:
    from opacus.accountants.analysis.rdp import compute_rdp, get_privacy_spent

    divergences = sum(compute_rdp(q=q, noise_multiplier=sigma, steps=steps, orders=_ORDERS) for sigma, q, steps in rows)
    return 0.0, float(get_privacy_spent(orders=_ORDERS, rdp=divergences, delta=delta)[0])


def _renyi_tuned(events: Sequence[Event], delta: float) -> tuple[float, float]:
    from dp_accounting import dp_event
    from dp_accounting.rdp import RdpAccountant

    if not all(isinstance(event, TuningEvent) or event.noise_multiplier for event in events):
        raise ValueError("a step without noise")
    accountant = RdpAccountant(orders=_TUNED_ORDERS)
    for event in events:
        if isinstance(event, TuningEvent):
            trial = dp_event.GaussianDpEvent(1 / event.mu)
            accountant.compose(dp_event.RepeatAndSelectDpEvent(trial, event.trials.mean, event.eta))
        else:
            step = dp_event.GaussianDpEvent(event.noise_multiplier)
            sampled = dp_event.PoissonSampledDpEvent(event.sample_rate, step)
            accountant.compose(step if event.sample_rate == 1 else sampled, event.steps)
    return 0.0, accountant.get_epsilon(delta)
