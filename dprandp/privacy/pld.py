"""Privacy loss distributions of sampled Gaussian steps, by Google's ``dp-accounting``: ε and the whole curve δ(ε).

The loss of a step is log P/Q of what comes out, drawn from P: P with the record, Q without it (remove), or the other
way round (add). Losses of independent steps add up: the distribution of a step, put on a grid and convolved T times,
gives δ(ε) = E[(1 − exp(ε − loss))₊] (Koskela, Jälkö & Honkela 2020, "Computing tight differential privacy guarantees
using FFT"). Both directions are computed, since neither covers the other under composition (Lebeda, Regehr, Kamath &
Steinke 2024); zero-out has the same two.

*Upper bound.* The library's step on the grid of mesh h ("connect the dots", Doroshenko, Ghazi, Kamath, Kumar &
Manurangsi 2022) dominates the true one, so every composition of it is an upper bound. It adds a variance of about h²/6
a step; with the mesh chosen below, less than 0.05 % of ε for up to 1e5 steps.

*Lower bound.* A split moves a loss up by at most h²/8 on average, within an interval of length h. By Hoeffding, T of
them add up to more than T h²/8 + h √(T log(1/η)/2) with probability η at most, so δ(ε) is at least δ̂(ε + that) − η.

*Tails and rounding.* Losses that a step, or the composition, has with probability 1e-4 δ altogether count as infinite.
The library does not cover rounding, so δ is reduced by ``ROUNDING`` a step: measured in the far tails, where the mass
should be zero, it is below 3 units of 2.2e-16 a step; 40 are allowed for. Negative masses are set to 0.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from typing import NamedTuple

import numpy as np
from dp_accounting.pld.pld_pmf import PLDPmf, compose_pmfs, create_pmf_pessimistic_connect_dots_fixed_gap
from dp_accounting.pld.privacy_loss_mechanism import AdjacencyType, GaussianPrivacyLoss

from dprandp.privacy.analytic import Component, log_moment

NAME = f"PLD (dp-accounting {version('dp-accounting')})"

FINE, COARSE = 0.02, 0.1
"""The Hoeffding term of the lower bound as a part of ε, which sets the mesh: for bounds, and for searches."""

ROUNDING = 40 * float(np.finfo(np.float64).eps)
"""Largest error of δ by rounding, for each step."""

STEP_POINTS, POINTS, EVENTS = 100_000, 400_000, 100
"""The most points of a step's grid and of a composition's, and the most different events: 1 s and 200 MiB."""

_MOST_ROUNDING = 0.5  # as a part of δ; at a half of it, ε is 1 to 3 % larger than it had to be
_TAIL_SHARE, _SLACK_SHARE = 1e-4, 1e-3
_NOISE, _LEAST_RATE = (1e-3, 1e9), 1e-15
# The library takes a loss this near to −log(1 − q), as a part of it, for that; no point of the grid may be so near.
_NEAR = 1e-8
_LARGEST_EPSILON = 600.0
_MOST_TRIES = 5


class AccountantRefused(Exception):
    """The accountant cannot give a sound bound here; the caller uses another one and warns."""


class Composed(NamedTuple):
    """The loss of a composition, on a grid, in one direction: ``distribution`` dominates the true one but for rounding.

    ``delta_error`` is what rounding may have taken from any δ; δ(ε) is at least that of ``distribution`` at
    ε + ``excess``, less ``mass``.
    """

    distribution: PLDPmf
    delta_error: float
    excess: float
    mass: float


def pld_epsilon(
    components: Sequence[Component], delta: float, scale: float, share: float = FINE
) -> tuple[float, float, float]:
    """(lower, estimate, upper) bounds on ε of a composition of one component or more, at δ in (0, 1).

    Args:
        scale: about ε, above 0: sets the mesh. Too small a one only costs time and digits; where it is more than 1.5
            times what comes out, the mesh is made again with that.
        share: see ``FINE``.

    Guarantee:
        The composition is (``upper``, ``delta``)-DP under add/remove, hence under zero-out; AccountantRefused where
        floating point or the bound on grid points does not allow a sound answer.
    """
    best, excess = (0.0, math.inf, math.inf), math.inf
    for _ in range(_MOST_TRIES):
        try:
            with _refusing():
                curves = _compose(components, delta, scale, share)
                bounds = [_invert(one, delta) for one in curves]
        except AccountantRefused:
            if math.isfinite(best[2]):  # a first mesh was good enough for a bound
                break
            raise
        lower, estimate, upper = (max(values) for values in zip(*bounds, strict=True))
        best = max(best[0], lower), min(best[1], estimate), min(best[2], upper)
        if not 0 < upper < scale / 1.5 or curves[0].excess == excess:  # the same mesh again
            break
        scale, excess = upper, curves[0].excess
    return best


def pld_curve(
    components: Sequence[Component], delta: float, scale: float, points: int
) -> tuple[np.ndarray, np.ndarray]:
    """Points of a valid privacy curve, ``points`` of them: ε ascending, evenly from 0, and δ descending, float64.

    The composition is (ε_i, δ_i)-DP under add/remove, hence zero-out, for every i. ``delta`` is the least δ that the
    curve has to reach; where rounding is more, it ends there. Otherwise as ``pld_epsilon``.
    """
    with _refusing():
        curves = _compose(components, delta, scale, FINE, most_rounding=100.0)
        ends = [one.distribution.get_epsilon_for_delta(max(delta, 2 * one.delta_error)) for one in curves]
        epsilons = np.linspace(0.0, min(max(ends) * 1.001 + 1e-12, _LARGEST_EPSILON), points)
        deltas = [one.distribution.get_delta_for_epsilon(epsilons) + one.delta_error for one in curves]
    deltas = np.minimum.accumulate(np.clip(np.maximum.reduce(deltas), 0.0, 1.0))
    if not (np.isfinite(deltas).all() and np.isfinite(epsilons).all()):
        raise AccountantRefused("it returned infinity, or no number")
    return epsilons, deltas


@contextmanager
def _refusing() -> Iterator[None]:
    """Every failure, and every numerical warning, is a doubt about the bound."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        try:
            yield
        except (ValueError, RuntimeError, ArithmeticError, IndexError, MemoryError, Warning) as error:
            raise AccountantRefused(str(error) or type(error).__name__) from error


def _compose(
    components: Sequence[Component], delta: float, scale: float, share: float, most_rounding: float = _MOST_ROUNDING
) -> list[Composed]:
    """Both directions of the composition; one where all are full batches, whose loss is the same in both."""
    steps = sum(each.steps for each in components)
    delta_error = ROUNDING * (steps + 2 * len(components))
    if delta_error > most_rounding * delta:
        raise AccountantRefused("floating point is too coarse for so many steps at such a small delta")
    if len(components) > EVENTS:
        raise AccountantRefused(f"{len(components)} different events are more than {EVENTS}")
    if not (scale > 0 and math.isfinite(scale)):
        raise AccountantRefused("the size of epsilon is not known")
    for each in components:
        if not _NOISE[0] <= each.noise_multiplier <= _NOISE[1] or each.sample_rate < _LEAST_RATE:
            raise AccountantRefused("the noise multiplier or the sample rate is beyond its range")
    tail = _TAIL_SHARE * delta / steps
    sampled = any(each.sample_rate < 1 for each in components)
    directions = [
        [
            GaussianPrivacyLoss(
                each.noise_multiplier, sampling_prob=each.sample_rate, log_mass_truncation_bound=math.log(tail),
                adjacency_type=direction,
            )
            for each in components
        ]
        for direction in ((AdjacencyType.REMOVE, AdjacencyType.ADD) if sampled else (AdjacencyType.REMOVE,))
    ]  # fmt: skip
    hoeffding = math.sqrt(steps * -math.log(_SLACK_SHARE * delta) / 2)
    mesh = _mesh(components, directions, tail, share * scale / hoeffding)
    return [
        _sum(losses, components, mesh, tail, delta)._replace(
            delta_error=delta_error, excess=steps * mesh**2 / 8 + hoeffding * mesh
        )
        for losses in directions
    ]


def _mesh(
    components: Sequence[Component], directions: Sequence[Sequence[GaussianPrivacyLoss]], tail: float, wanted: float
) -> float:
    """The wanted mesh, or the finest whose grids have no more points than is allowed. Nothing is allocated before."""
    mesh, reach = wanted, 0.0
    for place, each in enumerate(components):
        bounds = [losses[place].connect_dots_bounds() for losses in directions]
        width = max(bound.epsilon_upper - bound.epsilon_lower for bound in bounds)
        mesh = max(mesh, width / STEP_POINTS)
        # the library's Chernoff bound on the sum, of orders 1 to 20 over the width
        reach += min(
            (each.steps * log_moment(each.sample_rate, each.noise_multiplier, order / width) - math.log(tail / 2))
            / (order / width)
            for order in range(1, 21)
        )
    mesh = max(mesh, 2 * reach / POINTS)
    if not 0 < mesh < 0.1 * reach:
        raise AccountantRefused(f"it would need more than {POINTS} grid points")
    largest = [-math.log1p(-each.sample_rate) for each in components if each.sample_rate < 1]
    while any(abs(round(loss / mesh) * mesh - loss) < _NEAR * loss for loss in largest):
        mesh *= 1 + 1e-4
    return mesh


def _sum(
    losses: Sequence[GaussianPrivacyLoss], components: Sequence[Component], mesh: float, tail: float, delta: float
) -> Composed:
    total, log_mass = None, 0.0
    for loss, each in zip(losses, components, strict=True):
        bounds = loss.connect_dots_bounds()
        low, high = math.floor(bounds.epsilon_lower / mesh), math.ceil(bounds.epsilon_upper / mesh)
        deltas = loss.get_delta_for_epsilon(np.arange(low, high + 1) * mesh)
        # dense: the library's sparse form first computes its size to the power of the steps
        step = create_pmf_pessimistic_connect_dots_fixed_gap(mesh, low, high, deltas).to_dense_pmf()
        # above 1 by the negative masses that were set to 0
        log_mass += each.steps * math.log(max(1.0, step.get_delta_for_epsilon(-math.inf)))
        part = step.self_compose(int(each.steps), tail)
        total = part if total is None else compose_pmfs(total, part, tail)
    surplus = math.expm1(min(log_mass, 700.0))
    return Composed(total, 0.0, 0.0, surplus + 2 * _SLACK_SHARE * delta)


def _invert(composed: Composed, delta: float) -> tuple[float, float, float]:
    """(lower, estimate, upper) of ε at δ. The last digits of a loss come from a sum over the grid."""
    least = delta + composed.mass + composed.delta_error
    upper, estimate, lower = (
        float(composed.distribution.get_epsilon_for_delta(each)) if each < 1 else 0.0
        for each in (delta - composed.delta_error, delta, least)
    )
    if not all(math.isfinite(bound) for bound in (upper, estimate, lower)):
        raise ArithmeticError("it returned infinity, or no number")
    upper *= 1 + 1e-9
    estimate = min(estimate, upper)
    return max(0.0, min(lower - composed.excess, estimate)), estimate, upper
