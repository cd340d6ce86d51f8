"""Promise 1: independent accountants agree within their stated errors, on a wide grid.

*Privacy random variables* of prv-accountant know one direction of add/remove, hence of zero-out, and bound its ε from
both sides: our upper bound must not lie below their lower one, and both must agree on the estimate. *Rényi DP* of
Opacus is an upper bracket. *The accountant class* of dp_accounting, with a mesh of its own, shows that we use the
library as it is meant: our upper bound must not lie below it by more than its rounding.

The fast test takes a few points; the slow one 114 compositions with 3 values of δ each.
"""

from __future__ import annotations

import math
from functools import cache

import numpy as np
import pytest
from dp_accounting import dp_event
from dp_accounting.pld import PLDAccountant
from opacus.accountants.analysis.rdp import compute_rdp, get_privacy_spent
from prv_accountant import GaussianMechanism, PoissonSubsampledGaussianMechanism, PRVAccountant

from dprandp.privacy import pld
from dprandp.privacy.accounting import GaussianEvent, compose

# Any order bounds ε; those between integers take Opacus seconds where the noise is large.
ORDERS = [float(order) for order in [*range(2, 65), 96, 128, 256, 512]]
DELTAS = (1e-3, 1e-5, 1e-8)

Rows = tuple[tuple[float, float, int], ...]
"""(σ, q, T) of each event."""


def central_limit_mu(rows: Rows) -> float:
    return math.sqrt(sum(t * (1 / s**2 if q == 1 else q**2 * math.expm1(1 / s**2)) for s, q, t in rows))


HOMOGENEOUS = [
    ((sigma, q, steps),)
    for sigma in (0.6, 1.0, 2.0, 5.0, 20.0, 80.0)
    for q in (1e-3, 0.01, 0.08192, 0.3, 0.9)
    for steps in (1, 30, 400, 2500)
]
HETEROGENEOUS = [
    *[
        ((probe, 1.0, 60), (sigma, 0.08192, steps))
        for probe in (40.0, 150.0)
        for sigma in (4.0, 12.5)
        for steps in (96, 779)
    ],
    *[((sigma, 0.01, 1000), (2 * sigma, 0.1, 100)) for sigma in (1.0, 3.0)],
    ((30.0, 1.0, 60), (20.0, 1.0, 10), (12.0, 0.05, 100), (2.0, 0.01, 50)),
    ((5.0, 1.0, 1), (0.8, 1e-3, 100)),
]
# μ above 4 is an ε beyond 20: nobody runs it, and the oracle takes minutes.
COMPOSITIONS: list[Rows] = [rows for rows in [*HOMOGENEOUS, *HETEROGENEOUS] if central_limit_mu(rows) < 4]
FAST: list[tuple[Rows, float]] = [
    (((9.2, 0.08192, 875),), 1e-5),
    (((1.0, 0.01, 1000),), 1e-5),
    (((30.0, 1.0, 60), (20.0, 1.0, 10), (12.0, 0.05, 100), (2.0, 0.01, 50)), 1e-5),
    (((5.0, 0.9, 20),), 1e-3),
    (((0.6, 1e-3, 100),), 1e-6),
    (((2.0, 1.0, 3),), 1e-5),
    (((2.58, 0.08192, 2500),), 1e-10),
]


def interval_of(rows: Rows) -> float:
    """Fine for small ε, but not where little noise makes single losses large and the oracle take minutes."""
    if any(sigma < 2 for sigma, _, _ in rows):
        return 1e-4
    mu = central_limit_mu(rows)
    return 1e-6 if mu < 0.05 else 1e-5 if mu < 0.3 else 1e-4


@cache
def privacy_loss_distribution(rows: Rows) -> PLDAccountant:
    accountant = PLDAccountant(value_discretization_interval=interval_of(rows))
    for sigma, q, steps in rows:
        gaussian = dp_event.GaussianDpEvent(sigma)
        accountant.compose(gaussian if q == 1 else dp_event.PoissonSampledDpEvent(q, gaussian), steps)
    return accountant


@cache
def renyi_divergences(rows: Rows) -> np.ndarray:
    return sum(compute_rdp(q=q, noise_multiplier=s, steps=t, orders=ORDERS) for s, q, t in rows)


def renyi_epsilon(rows: Rows, delta: float) -> float:
    return max(0.0, float(get_privacy_spent(orders=ORDERS, rdp=renyi_divergences(rows), delta=delta)[0]))


def privacy_random_variables(rows: Rows, delta: float, about: float) -> tuple[float, float, float] | None:
    """(lower, estimate, upper) of the remove direction; None where 100,000 grid points are too few to say much."""
    rows = tuple((sigma / math.sqrt(t), q, 1) if q == 1 else (sigma, q, t) for sigma, q, t in rows)
    steps = sum(t for _, _, t in rows)
    cells = math.sqrt(steps / 2 * math.log(12e3 / delta))
    error = max(0.01 * about, 2 * (2 * about + 3.5) * cells / 1e5)
    if error > 0.2 * about or steps * 1e-14 > 1e-3 * delta:
        return None
    variables = [GaussianMechanism(s) if q == 1 else PoissonSubsampledGaussianMechanism(q, s) for s, q, _ in rows]
    accountant = PRVAccountant(variables, error, 1e-3 * delta, max_self_compositions=[t for _, _, t in rows])
    return accountant.compute_epsilon(delta, [t for _, _, t in rows])


def check(rows: Rows, delta: float) -> float:
    """Raise unless all agree; returns how far our estimate is from the oracle, as a part of ε."""
    bound = compose([GaussianEvent(*row) for row in rows], delta)
    oracle = privacy_loss_distribution(rows).get_epsilon(delta)
    rounding = 2 * interval_of(rows) + 1e-3 * oracle  # of the oracle, upwards
    assert bound.lower <= oracle
    assert bound.upper >= oracle - rounding
    assert bound.estimate <= renyi_epsilon(rows, delta) * (1 + 1e-6)
    other = privacy_random_variables(rows, delta, bound.upper)
    if other is not None:
        assert bound.upper >= other[0]
        assert bound.lower <= other[2]
    if "PLD" not in bound.accountant and "exact" not in bound.accountant:  # an upper bound and no more
        return 0.0
    if other is not None:
        assert bound.upper == pytest.approx(other[1], rel=3e-3, abs=1e-5)
    left = delta - pld.ROUNDING * (sum(t for _, _, t in rows) + 2 * len(rows))
    assert bound.upper <= privacy_loss_distribution(rows).get_epsilon(left) * (1 + 1e-3) + 1e-5  # and no wider
    if min(q for _, q, _ in rows) >= 0.01 and delta >= 1e-5:
        assert bound.upper - bound.lower <= 0.05 * oracle + 1e-4
    assert bound.estimate == pytest.approx(oracle, abs=rounding)
    return abs(bound.estimate - oracle) / oracle if oracle > 0.01 else 0.0


@pytest.mark.parametrize(("rows", "delta"), FAST)
def test_all_accountants_agree(rows, delta):
    check(rows, delta)


@pytest.mark.slow
@pytest.mark.parametrize("rows", COMPOSITIONS)
def test_all_accountants_agree_on_a_wide_grid(rows):
    for delta in DELTAS:
        check(rows, delta)


def test_the_check_finds_a_wrong_accountant():
    """Positive control: noise that is 2 % smaller than what is accounted for is noticed."""
    rows = ((9.2, 0.08192, 875),)
    smaller = ((9.2 * 0.98, 0.08192, 875),)
    bound, oracle = compose([GaussianEvent(*rows[0])], 1e-5), privacy_loss_distribution(smaller).get_epsilon(1e-5)
    assert bound.upper < oracle - 2e-4 - 1e-3 * oracle
    assert bound.upper < privacy_random_variables(smaller, 1e-5, bound.upper)[0]
    assert len(COMPOSITIONS) * len(DELTAS) >= 200
