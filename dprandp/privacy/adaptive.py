"""The cost of several stages, each of which may be planned after the results of those before it were seen.

Numerical composition (PLD, PRV) bounds mechanisms whose parameters were fixed beforehand. Where steps are chosen
after a look at earlier results, a privacy filter is needed (Rogers, Roth, Ullman & Vadhan 2016). This one is Gaussian:
each stage is charged the μ of a Gaussian mechanism that *covers* it, and the squares are added. Within a stage the plan
fixes everything before the first step, so numerical composition finds its curve δ(ε).

*Cover.* A stage is covered by (μ, s) if δ_stage(ε) ≤ δ_μ(ε) + s for all ε ≥ 0, in either direction of zero-out, with
δ_μ that of a Gaussian mechanism. Full batches are covered by μ = √(Σ T/σ²) and s = 0, exactly, also where the number of
steps is chosen adaptively (Smith & Thakurta 2022; Koskela, Tobaben & Honkela 2023). Sampled stages have a small s.

*Theorem.* If Σ μ² ≤ B² and Σ s ≤ S for all choices along the way, all stages together are (ε, δ_B(ε) + S)-DP. The proof
is in docs/privacy.md ("Plans made after seeing results"), with what the filter costs.

A sampled stage that was stopped early counts as a whole: its results may have decided when to stop, and a plan bounds
every such decision (the terms of H_ε of a growing composition are a submartingale).

Private tuning is composed in Rényi DP with the covers of the other stages. That is proven where the selection among
private trials comes first, so ``make_selection_plan`` refuses one after anything else was charged.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache

import numpy as np
from scipy.special import log_ndtr, ndtr

from dprandp.errors import BudgetError
from dprandp.privacy.accounting import (
    DELTA_SHARE,
    FIXED,
    MAX_NOISE_MULTIPLIER,
    EpsilonBound,
    Event,
    GaussianEvent,
    Warn,
    calibrate,
    check_distance,
    compose,
    gaussian_mu,
    merge_events,
    nudge,
    privacy_curve,
    refuse_spent,
    settle,
    warn_by_log,
)
from dprandp.privacy.tuning import TuningEvent

SLACK = 0.04
"""Fraction of δ for the covers of sampled stages, if there is more than one stage."""

Stage = Sequence[Event]
"""All planned events of one attempt of one stage."""


def compose_stages(stages: Sequence[Stage], delta: float, warn: Warn = warn_by_log) -> EpsilonBound:
    """Bound ε at ``delta`` of all stages on the same data, each with the events of its whole plan, in their order.

    Guarantee:
        All stages together are (``upper``, ``delta``)-DP, also where the parameters of a stage were chosen after the
        results of earlier ones were seen, as long as each choice kept this bound within a limit that was fixed
        beforehand. A single stage is composed numerically.
    """
    stages = [merged for stage in stages if (merged := tuple(merge_events(stage)))]
    if len(stages) < 2:
        return compose([event for stage in stages for event in stage], delta, warn)
    steps = _discrete_steps(stages)
    share = 1 - DELTA_SHARE if steps else 1.0
    bound = compose(covers(stages, delta * share, warn), delta * share * (1 - SLACK), warn)
    if steps:
        check_distance(steps, bound.upper, delta)
    name = "Gaussian-DP filter over stages"
    if any(isinstance(event, TuningEvent) for stage in stages for event in stage):
        name += f" ({bound.accountant})"
    return EpsilonBound(0.0, bound.estimate, bound.upper, delta, name + (", discrete noise" if steps else ""))


def calibrate_stage(
    epsilon: float,
    delta: float,
    sample_rate: float,
    steps: int,
    spent: Sequence[Stage] = (),
    warn: Warn = warn_by_log,
    discrete: bool = False,
) -> float:
    """``accounting.calibrate`` for a further stage, after the whole plans of those in ``spent``.

    Guarantee:
        ``compose_stages([*spent, [GaussianEvent(result, sample_rate, steps, discrete)]], delta).upper <= epsilon``.
    """
    spent = [merged for stage in spent if (merged := tuple(merge_events(stage)))]
    if not spent or math.isinf(epsilon):
        return calibrate(epsilon, delta, sample_rate, steps, [], warn, discrete)
    refuse_spent(compose_stages(spent, delta, warn).upper, epsilon, delta)
    share = 1 - DELTA_SHARE if discrete or _discrete_steps(spent) else 1.0
    before, left = covers(spent, delta * share, warn), delta * share * (1 - SLACK)
    refuse_spent(compose(before, left, warn).upper, epsilon, delta)  # with the slack for more than one stage
    guess = calibrate(epsilon, left, sample_rate, steps, before, warn)

    def upper(noise_multiplier: float) -> float:
        stage = [GaussianEvent(noise_multiplier, sample_rate, steps, discrete)]
        return compose_stages([*spent, stage], delta, warn).upper

    # for full batches the guess is exact but for rounding
    exact = nudge(upper, epsilon, guess) if sample_rate == 1 else None
    found = settle(upper, epsilon, guess, MAX_NOISE_MULTIPLIER) if exact is None else exact
    if found is None:
        raise BudgetError(
            f"The remaining part of ε = {epsilon:g} at δ = {delta:g} is too little for {steps} sampled steps.",
            fix=f"{FIXED} Give fewer steps, or start a new run and add up the ε of both.",
        )
    return found


def covers(stages: Sequence[Stage], delta: float, warn: Warn = warn_by_log) -> list[Event]:
    """A full-batch Gaussian event that covers each stage; the n-th sampled one has the slack ``SLACK`` · δ / 2ⁿ."""
    found: list[Event] = []
    slack = SLACK * delta
    for stage in stages:
        gaussian = [replace(event, discrete=False) for event in stage if isinstance(event, GaussianEvent)]
        mu = gaussian_mu(gaussian)
        if mu is None:
            slack /= 2
            mu = cover(gaussian, slack, warn)
        if mu > 0:
            found.append(GaussianEvent(1 / mu, 1.0, 1))  # without noise for an infinite μ
        found += [event for event in stage if isinstance(event, TuningEvent)]
    return found


def cover(events: Sequence[GaussianEvent], slack: float, warn: Warn = warn_by_log) -> float:
    """The smallest μ found with δ_events(ε) ≤ δ_μ(ε) + ``slack`` for every ε ≥ 0, in either direction of zero-out."""
    mu, complaint = _cover(tuple(merge_events(events)), slack)
    if complaint:
        warn(complaint)
    return mu


@lru_cache(maxsize=256)
def _cover(events: tuple[GaussianEvent, ...], slack: float) -> tuple[float, str | None]:
    if any(event.noise_multiplier == 0 for event in events):
        return math.inf, None
    # a sampled step is never less private than the same step on the full batch
    full = gaussian_mu([replace(event, sample_rate=1.0) for event in events])
    complaints: list[str] = []
    epsilons, deltas, _ = privacy_curve(events, slack / 4, complaints.append)
    complaint = complaints[-1] if complaints else None
    # between two points of the curve δ is at most that of the first, and a Gaussian's at least that of the second
    wanted = deltas[:-1] - slack
    here = wanted > 0
    wanted, ends = wanted[here], epsilons[1:][here]

    def covered(mu: float) -> bool:
        return bool(np.all(wanted <= _least_delta(mu, ends)))

    if deltas[-1] > slack or not len(wanted) or not covered(full):
        return full, complaint
    low, high = 0.0, full
    while high - low > 1e-5 * high:
        middle = (low + high) / 2
        low, high = (low, middle) if covered(middle) else (middle, high)
    return high, complaint


def _least_delta(mu: float, epsilons: np.ndarray) -> np.ndarray:
    """δ of a μ-GDP mechanism at each ε ≥ 0, rounded down by the largest rounding error."""
    first = ndtr(mu / 2 - epsilons / mu)
    exponent = log_ndtr(-mu / 2 - epsilons / mu)
    second = np.exp(epsilons + exponent)
    return first - second - 1e-15 * (first + second * (1 + epsilons - exponent))


def _discrete_steps(stages: Sequence[Stage]) -> int:
    return sum(
        event.steps for stage in stages for event in stage if isinstance(event, GaussianEvent) and event.discrete
    )
