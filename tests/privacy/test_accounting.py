"""Promises 1, 12 and 19: reported ε ≥ spent ε, calibration never above its target, no silent failure.

Oracles: prv_accountant used directly, Opacus' Rényi accountant (an upper bracket) and dp_accounting's privacy loss
distributions, which know both directions of add/remove and were written by other people.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
from dp_accounting import dp_event
from dp_accounting.pld import PLDAccountant
from opacus.accountants.analysis.rdp import compute_rdp, get_privacy_spent
from prv_accountant import PoissonSubsampledGaussianMechanism, PRVAccountant

from dprandp.errors import UsageError
from dprandp.privacy import accounting, prv
from dprandp.privacy.accounting import GaussianEvent, compose, gaussian_mu, merge_events

ORDERS = [1 + x / 10 for x in range(1, 100)] + list(range(12, 128))

# (events as (σ, q, T), δ): sampled, heterogeneous with full batches, large and small q, large and small ε.
GRID = [
    ([(9.2, 0.08192, 875)], 1e-5),
    ([(1.0, 0.01, 1000)], 1e-5),
    ([(40.0, 1.0, 60), (12.5, 0.08192, 779)], 1e-5),
    ([(30.0, 1.0, 60), (20.0, 1.0, 10), (12.0, 0.05, 100), (2.0, 0.01, 50)], 1e-5),
    ([(0.7, 0.1, 10)], 1e-6),
    ([(20.0, 0.5, 100)], 1e-4),
    ([(5.0, 0.9, 20)], 1e-3),
    ([(0.6, 1e-3, 100)], 1e-6),
    ([(0.8, 0.01, 1)], 1e-5),
    ([(2.0, 1.0, 3)], 1e-5),
]
SLOW_GRID = [
    ([(sigma, q, steps)], delta)
    for sigma in (0.6, 1.0, 3.0, 20.0)
    for q in (1e-3, 0.02, 0.3, 0.99)
    for steps in (1, 30, 1000)
    for delta in (1e-3, 1e-7)
    if not (
        sigma <= 1 and q >= 0.3 and steps == 1000
    )  # epsilon in the hundreds: nobody runs it, the oracle takes minutes
]


def events_of(rows) -> list[GaussianEvent]:
    return [GaussianEvent(*row) for row in rows]


def pld_epsilon(rows, delta: float, interval: float = 1e-4) -> float:
    """ε by privacy loss distributions; pessimistic, and more so the coarser the interval."""
    accountant = PLDAccountant(value_discretization_interval=interval)
    for sigma, q, steps in rows:
        gaussian = dp_event.GaussianDpEvent(sigma)
        accountant.compose(gaussian if q == 1 else dp_event.PoissonSampledDpEvent(q, gaussian), steps)
    return accountant.get_epsilon(delta)


def rdp_epsilon(rows, delta: float) -> float:
    rdp = sum(compute_rdp(q=q, noise_multiplier=s, steps=t, orders=ORDERS) for s, q, t in rows)
    return float(get_privacy_spent(orders=ORDERS, rdp=rdp, delta=delta)[0])


def check_against_pld(rows, delta):
    bound = compose(events_of(rows), delta)
    oracle = pld_epsilon(rows, delta)
    if oracle < 0.1:
        oracle = pld_epsilon(rows, delta, 1e-5)
    pessimism = 2e-4 + 1e-3 * oracle  # of the oracle, by its own rounding up
    assert bound.upper >= oracle - pessimism
    assert bound.lower <= oracle
    if "opacus" not in bound.accountant:  # the announced fallback is an upper bound and no more
        assert bound.estimate == pytest.approx(oracle, rel=2e-3, abs=3e-4)
        assert bound.upper - bound.lower <= 0.03 * oracle + 0.01


@pytest.mark.parametrize(("rows", "delta"), GRID)
def test_bounds_enclose_the_privacy_loss_distribution_oracle(rows, delta):
    check_against_pld(rows, delta)


@pytest.mark.slow
@pytest.mark.parametrize(("rows", "delta"), SLOW_GRID)
def test_bounds_enclose_the_oracle_on_a_wide_grid(rows, delta):
    check_against_pld(rows, delta)


@pytest.mark.parametrize(("rows", "delta"), [case for case in GRID if case[1] >= 1e-6][:7])
def test_renyi_accounting_of_opacus_is_an_upper_bracket(rows, delta):
    assert compose(events_of(rows), delta).estimate <= rdp_epsilon(rows, delta) * (1 + 1e-6)


@pytest.mark.parametrize(("sigma", "q", "steps"), [(9.2, 0.08192, 875), (1.0, 0.01, 1000), (3.0, 0.5, 20)])
def test_bounds_agree_with_prv_accountant_used_directly(sigma, q, steps):
    direct = PRVAccountant([PoissonSubsampledGaussianMechanism(q, sigma)], 0.01, 1e-8, max_self_compositions=[steps])
    low, estimate, high = direct.compute_epsilon(1e-5, [steps])
    ours = compose([GaussianEvent(sigma, q, steps)], 1e-5)
    assert low <= ours.estimate <= high
    assert ours.upper >= low
    assert ours.estimate == pytest.approx(estimate, rel=1e-3)


def test_full_batches_through_the_numerical_accountant_equal_the_closed_form():
    component = prv.Component(30.0, 1.0, 60)
    low, estimate, high = prv.prv_epsilon([component], 1e-5, 0.005)
    exact = compose([GaussianEvent(30.0, 1.0, 60)], 1e-5)
    assert low <= exact.upper <= high
    assert estimate == pytest.approx(exact.upper, rel=1e-3)
    assert exact.lower == exact.estimate == exact.upper


@pytest.mark.parametrize(("q", "sigma"), [(0.1, 1.0), (0.5, 3.0), (1e-3, 0.7)])
@pytest.mark.parametrize("direction", ["add", "remove"])
def test_loss_distribution_of_each_direction_equals_numerical_integration(q, sigma, direction):
    x = np.linspace(-12 * sigma, 12 * sigma + 1, 2_000_001)
    alone = np.exp(-(x**2) / (2 * sigma**2))
    mixture = (1 - q) * alone + q * np.exp(-((x - 1) ** 2) / (2 * sigma**2))
    p, other = (alone, mixture) if direction == "add" else (mixture, alone)
    p_mass = p / p.sum()
    with np.errstate(divide="ignore", invalid="ignore"):
        loss = np.log(p) - np.log(other)
    variable = prv.Component(sigma, q, 1).variable(add=direction == "add")
    scale = abs(math.log1p(-q))
    for t in (-3 * scale, -0.5 * scale, -0.01 * scale, 0.0, 0.01 * scale, 0.5 * scale, 0.99 * scale, 3 * scale):
        assert float(variable.cdf(np.array([t]))[0]) == pytest.approx(float(p_mass[loss <= t].sum()), abs=2e-5)


def test_both_directions_enter_the_promise(monkeypatch):
    """Positive control: were the other direction the larger one, it would be the one reported."""
    rows = [GaussianEvent(2.0, 0.1, 7)]
    honest = compose(rows, 1e-5).upper

    class Louder(prv.RemoveDirection):
        def __init__(self, q, sigma):
            super().__init__(q, sigma / 2)

    monkeypatch.setattr(prv, "AddDirection", Louder)
    accounting._compose_sampled.cache_clear()
    assert compose(rows, 1e-5).upper > 1.2 * honest
    accounting._compose_sampled.cache_clear()


@pytest.mark.parametrize("order", [1.5, 2, 2.3, 7, 31.5, 64])
def test_renyi_divergence_equals_opacus_at_integers_and_lies_above_between(order):
    variable = prv.Component(1.3, 0.07, 1).variable(add=False)
    reference = float(compute_rdp(q=0.07, noise_multiplier=1.3, steps=1, orders=float(order)))
    if float(order).is_integer():
        assert variable.rdp(order) == pytest.approx(reference, rel=1e-9)
    else:
        assert reference * (1 - 1e-9) <= variable.rdp(order) <= 1.5 * reference


def test_epsilon_falls_with_noise_and_rises_with_steps_and_rate():
    def upper(sigma, q, steps):
        return compose([GaussianEvent(sigma, q, steps)], 1e-5).upper

    base = upper(3.0, 0.1, 100)
    assert upper(3.5, 0.1, 100) < base < upper(2.5, 0.1, 100)
    assert upper(3.0, 0.1, 50) < base < upper(3.0, 0.1, 200)
    assert upper(3.0, 0.05, 100) < base < upper(3.0, 0.2, 100) < upper(3.0, 1.0, 100)


def test_order_and_splitting_of_events_do_not_matter():
    whole = [GaussianEvent(9.0, 0.1, 20), GaussianEvent(30.0, 1.0, 10)]
    split = [GaussianEvent(30.0, 1.0, 4), *[GaussianEvent(9.0, 0.1, 1)] * 20, GaussianEvent(30.0, 1.0, 6)]
    assert compose(whole, 1e-5) == compose(split, 1e-5)
    assert merge_events([GaussianEvent(1.0, 0.1, 0)]) == []


def test_composition_is_at_least_as_large_as_each_part():
    parts = [GaussianEvent(9.0, 0.1, 100), GaussianEvent(40.0, 1.0, 30)]
    assert compose(parts, 1e-5).upper > max(compose([part], 1e-5).upper for part in parts)


def test_nothing_costs_nothing_and_no_noise_costs_everything():
    assert compose([], 1e-5).upper == 0
    assert compose([GaussianEvent(0.0, 0.1, 1), GaussianEvent(9.0, 0.1, 1)], 1e-5).upper == math.inf
    assert gaussian_mu([GaussianEvent(0.0, 1.0, 1)]) == math.inf
    assert gaussian_mu([GaussianEvent(2.0, 1.0, 4), GaussianEvent(1.0, 1.0, 1)]) == pytest.approx(math.sqrt(2))
    assert gaussian_mu([GaussianEvent(2.0, 0.5, 4)]) is None


def test_very_private_settings_are_clamped_at_zero():
    bound = compose([GaussianEvent(1000.0, 0.001, 1)], 1e-2)
    assert bound.lower == bound.estimate == 0
    assert 0 <= bound.upper < 1e-3


@pytest.mark.parametrize(
    ("rows", "delta"),
    [([(2.0, 0.01, 100)], 1e-18), ([(1e5, 0.5, 10**9)], 1e-5)],
    ids=["delta below floating point", "too many grid points"],
)
def test_the_fallback_is_announced_named_and_an_upper_bound(rows, delta):
    said: list[str] = []
    bound = compose(events_of(rows), delta, said.append)
    assert len(said) == 1
    assert "refused" in said[0]
    assert bound.accountant in said[0]
    assert "opacus" in bound.accountant
    assert math.isfinite(bound.upper)
    assert bound.lower == 0
    compose(events_of(rows), delta, said.append)
    assert len(said) == 2  # also when the answer comes from the cache


def test_a_numerical_warning_inside_the_accountant_is_a_refusal(monkeypatch):
    import warnings

    def doubtful(*args, **kwargs):
        warnings.warn("the integral may be wrong", RuntimeWarning, stacklevel=1)

    monkeypatch.setattr(prv, "PRVAccountant", doubtful)
    with pytest.raises(prv.AccountantRefused, match="integral may be wrong"):
        prv.prv_epsilon([prv.Component(2.0, 0.1, 10)], 1e-5, 0.01)


def test_nan_from_the_accountant_is_a_refusal(monkeypatch):
    class Broken:
        def __init__(self, *args, **kwargs):
            pass

        def compute_epsilon(self, delta, steps):
            return math.nan, math.nan, math.nan

    monkeypatch.setattr(prv, "PRVAccountant", Broken)
    with pytest.raises(prv.AccountantRefused, match="NaN"):
        prv.prv_epsilon([prv.Component(2.0, 0.1, 10)], 1e-5, 0.01)


def test_contradicting_accountants_give_the_larger_bound_aloud(monkeypatch):
    monkeypatch.setattr(prv, "rough_epsilon", lambda components, delta: 0.01)
    accounting._compose_sampled.cache_clear()
    said: list[str] = []
    bound = compose([GaussianEvent(1.0, 0.1, 50)], 1e-5, said.append)
    accounting._compose_sampled.cache_clear()
    assert "contradicts" in said[0]
    assert bound.upper > 1


@pytest.mark.parametrize("delta", [0.0, 1.0, math.nan])
def test_senseless_delta_is_refused_by_compose(delta):
    with pytest.raises(UsageError, match="delta is"):
        compose([GaussianEvent(1.0, 0.1, 1)], delta)


@pytest.mark.parametrize(
    "values",
    [
        (-1.0, 0.1, 1),
        (math.nan, 0.1, 1),
        (math.inf, 0.1, 1),
        (1.0, 0.0, 1),
        (1.0, 1.1, 1),
        (1.0, math.nan, 1),
        (1.0, 0.1, -1),
        (1.0, 0.1, 1.5),
    ],
)
def test_senseless_events_are_refused(values):
    with pytest.raises(UsageError):
        GaussianEvent(*values)


def test_events_are_plain_data():
    event = GaussianEvent(9.2, 0.08192, 875)
    assert GaussianEvent.from_dict(event.to_dict()) == event
