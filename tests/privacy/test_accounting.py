"""Promises 1 and 19: reported ε ≥ spent ε, no silent failure.

How the numbers compare with those of other people's accountants is in test_accountants_agree.py.
"""

from __future__ import annotations

import math
import warnings

import numpy as np
import pytest
from opacus.accountants.analysis.rdp import compute_rdp
from prv_accountant import PoissonSubsampledGaussianMechanism, PRVAccountant
from scipy.stats import binom, norm

from dprandp.errors import UsageError
from dprandp.privacy import accounting, analytic, prv
from dprandp.privacy.accounting import GaussianEvent, compose, gaussian_mu, merge_events
from dprandp.privacy.gaussian_dp import gaussian_dp_delta, gaussian_dp_epsilon
from dprandp.privacy.sampled_loss import SampledGaussianLoss, renyi_divergence
from dprandp.privacy.tuning import TuningEvent


def events_of(rows) -> list[GaussianEvent]:
    return [GaussianEvent(*row) for row in rows]


@pytest.mark.parametrize(
    ("sigma", "q", "steps"),
    [
        (1.0, 0.01, 1000),
        pytest.param(9.2, 0.08192, 875, marks=pytest.mark.slow),
        pytest.param(3.0, 0.5, 20, marks=pytest.mark.slow),
    ],
)
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


# ---------------------------------------------------------------- the declared errors

EPSILON_ERROR = 0.02
FULL = prv.Component(30.0, 1.0, 60)
FULL_MU = math.sqrt(60) / 30


@pytest.mark.parametrize("share", [0.3, 0.9])
@pytest.mark.parametrize("delta", [1e-3, 1e-6])
def test_a_bound_is_read_at_the_delta_that_the_error_leaves_and_moved_by_the_error_of_epsilon(
    monkeypatch, share, delta
):
    """With errors that are large beside what the grid really errs by, the bounds are the exact curve, moved by them."""
    monkeypatch.setattr(prv, "DELTA_ERROR_SHARE", share)
    low, estimate, high = prv.prv_epsilon([FULL], delta, EPSILON_ERROR)
    near = {"abs": 0.05 * EPSILON_ERROR}
    assert high == pytest.approx(gaussian_dp_epsilon(FULL_MU, delta * (1 - share)) + EPSILON_ERROR, **near)
    assert low == pytest.approx(gaussian_dp_epsilon(FULL_MU, delta * (1 + share)) - EPSILON_ERROR, **near)
    assert estimate == pytest.approx(gaussian_dp_epsilon(FULL_MU, delta), **near)
    moved = gaussian_dp_epsilon(FULL_MU, delta * (1 - share)) - gaussian_dp_epsilon(FULL_MU, delta)
    assert moved > 0.5 * EPSILON_ERROR  # either error shows


@pytest.mark.parametrize("share", [0.3, 0.9])
@pytest.mark.parametrize("rows", [[(2.0, 0.1, 30)], [(9.2, 0.08192, 200), (40.0, 1.0, 20)]], ids=str)
def test_sampled_bounds_are_those_of_a_finer_grid_moved_by_the_errors(monkeypatch, rows, share):
    components, delta = [prv.Component(*row) for row in rows], 1e-5
    fine = {part: prv.prv_epsilon(components, delta * part, 1e-3)[1] for part in (1 - share, 1, 1 + share)}
    monkeypatch.setattr(prv, "DELTA_ERROR_SHARE", share)
    low, estimate, high = prv.prv_epsilon(components, delta, EPSILON_ERROR)
    assert high == pytest.approx(fine[1 - share] + EPSILON_ERROR, abs=0.1 * EPSILON_ERROR)
    assert low == pytest.approx(fine[1 + share] - EPSILON_ERROR, abs=0.1 * EPSILON_ERROR)
    assert estimate == pytest.approx(fine[1], abs=0.1 * EPSILON_ERROR)


@pytest.mark.parametrize("row", [(1.0, 0.01, 1000), (9.2, 0.08192, 200), (2.0, 0.1, 30)], ids=str)
def test_what_is_promised_is_the_upper_end(monkeypatch, row):
    asked = []
    honest = prv.prv_epsilon
    monkeypatch.setattr(prv, "prv_epsilon", lambda *values: asked.append(honest(*values)) or asked[-1])
    accounting._compose_sampled.cache_clear()
    bound = compose([GaussianEvent(*row)], 1e-5)
    accounting._compose_sampled.cache_clear()
    (found,) = asked
    assert (bound.lower, bound.estimate, bound.upper) == found
    assert bound.lower < bound.estimate < bound.upper


def test_a_curve_holds_both_errors():
    """Each point is the exact curve's, moved by the error of ε, and raised by that of δ. A part of the latter is used
    up, as little is computed of the tail that it allows to be left out."""
    error = 1e-4
    epsilons, deltas = prv.prv_curve([FULL], error, EPSILON_ERROR)
    mesh = epsilons[-1] - epsilons[-2]
    assert 5 * mesh < EPSILON_ERROR  # the grid tells where the curve is read
    looked = 0
    for place in np.linspace(0, len(epsilons) - 1, 60).astype(int):
        epsilon, delta = float(epsilons[place]), float(deltas[place])
        assert delta >= gaussian_dp_delta(FULL_MU, epsilon)
        earliest, latest = (epsilon - EPSILON_ERROR + side * mesh for side in (-2, 1))
        if earliest >= 0:
            assert delta >= gaussian_dp_delta(FULL_MU, latest) + 0.6 * error
            assert delta <= gaussian_dp_delta(FULL_MU, earliest) + 1.001 * error
            looked += 1
    assert looked > 20
    assert (np.diff(deltas) <= 0).all()


@pytest.mark.parametrize("row", [(30.0, 1.0, 1), (60.0, 1.0, 500), (2.0, 0.1, 30), (9.2, 0.08192, 875)], ids=str)
@pytest.mark.parametrize("delta_error", [1e-4, 1e-8, 1e-12])
def test_a_grid_errs_by_no_more_than_it_declares(row, delta_error):
    """Hoeffding for the roundings, and what is left outside, by the exact law of full batches or by simulation."""
    component = prv.Component(*row)
    grid = prv.plan_grid([component], delta_error, 0.01)
    share, steps = delta_error / 3, component.steps
    rounding = 2 * math.exp(-2 * grid.epsilon_error**2 / (steps * grid.mesh**2))
    assert rounding <= share * (1 + 1e-9)
    assert grid.delta_error >= delta_error + np.finfo(grid.real).eps * math.log2(grid.points) * steps
    end = grid.mesh * (grid.points // 2 - 1)
    if component.sample_rate == 1:
        mu = math.sqrt(steps) / component.noise_multiplier
        outside = norm.sf((end - mu**2 / 2) / mu) + norm.cdf((-end - mu**2 / 2) / mu)
        assert outside <= share
        assert steps * 2 * norm.sf((end - mu**2 / steps) * component.noise_multiplier) <= share
    else:
        for add in (False, True):
            beyond = component.loss(add).cdf(np.array([-end, end]))
            assert steps * (beyond[0] + 1 - beyond[1]) <= share + 1e-12
        assert np.abs(_sampled_sums(component, 4000)).max() < end


@pytest.mark.parametrize(("q", "sigma", "steps"), [(0.001, 3.0, 400), (0.02, 0.5, 40), (0.3, 0.4, 12), (0.9, 1.5, 7)])
def test_the_delta_of_participations_is_at_least_the_slow_sum(q, sigma, steps):
    """E_K[δ of √K/σ-GDP at ε], term by term over every number of participations."""
    for delta in (1e-3, 1e-9):
        counted = analytic._participations(q, sigma, steps, delta)
        for epsilon in (0.05, 1.0, 5.0, 20.0):
            parts = [gaussian_dp_delta(math.sqrt(k) / sigma, epsilon) if k else 0.0 for k in range(steps + 1)]
            slow = float(np.dot(binom.pmf(np.arange(steps + 1), steps, q), parts))
            if counted is None:
                assert q * steps > 1
                assert sigma > 1
                continue
            found = analytic._counted_delta(*counted, epsilon)
            assert slow * (1 - 1e-9) <= found <= slow * (1 + 1e-3) + 1e-7 * delta


def test_participations_that_share_a_place_count_as_the_most_of_them():
    """More numbers of participations than are kept apart: each stands for those up to it, and the rest costs all."""
    q, sigma, steps, delta = 0.5, 0.8, 40_000, 1e-6
    mus, more = analytic._participations(q, sigma, steps, delta)
    counts = np.rint((mus * sigma) ** 2)
    assert len(mus) <= analytic._MOST_COUNTS + 1
    assert np.allclose(more[1:], binom.sf(counts, steps, q), rtol=1e-6, atol=1e-300)
    assert more[0] == 1
    assert more[-1] <= 1e-7 * delta  # beyond the last of them, all is taken for lost
    assert analytic._counted_delta(np.array([0.0]), np.array([1.0, 0.25]), 1.0) == pytest.approx(0.25, rel=1e-5)


def best_conversion(divergence, delta: float) -> float:
    """The least ε of Balle et al. 2020, Theorem 21, over a hundred thousand orders, written down here again."""
    orders = 1 + np.geomspace(1e-3, 1e5, 100_000)
    found = divergence(orders) + np.log1p(-1 / orders) - (np.log(delta) + np.log(orders)) / (orders - 1)
    return float(found.min())


@pytest.mark.parametrize("delta", [1e-2, 1e-5, 1e-10])
def test_no_conversion_of_divergences_is_below_the_best_order(delta):
    tuning, steps = TuningEvent(0.6, 0.0, 0.05), GaussianEvent(8.0, 1.0, 20)

    def tuned(orders):
        return tuning.rdp(orders) + orders * 20 / (2 * 8.0**2)

    for events, divergence in (([tuning], tuning.rdp), ([tuning, steps], tuned)):
        best = best_conversion(divergence, delta)
        assert best * (1 - 1e-6) <= compose(events, delta).upper <= 1.02 * best
    for sigma, q, count in ((2.0, 0.1, 50), (9.2, 0.08192, 875), (0.9, 0.3, 3)):
        component = prv.Component(sigma, q, count)
        orders = np.geomspace(1e-2, 300, 400)
        moments = np.array([count * analytic.log_moment(q, sigma, float(order)) / order for order in orders])
        best = float((moments + np.log(orders / (1 + orders)) - (np.log(delta) + np.log1p(orders)) / orders).min())
        assert best * (1 - 1e-3) <= analytic.renyi_epsilon([component], delta) <= best * (1 + 1e-9)
        assert prv.rough_epsilon([component], delta) >= best * (1 - 1e-9)


def _sampled_sums(component: prv.Component, count: int) -> np.ndarray:
    """Sums of the losses of all steps, in the remove direction."""
    random = np.random.default_rng(0)
    total = np.zeros(count)
    for _ in range(component.steps):
        x = component.noise_multiplier * random.normal(size=count) + (random.random(count) < component.sample_rate)
        total += component.loss(False)._loss(x)
    return total


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
    variable = prv.Component(sigma, q, 1).loss(add=direction == "add")
    scale = abs(math.log1p(-q))
    for t in (-3 * scale, -0.5 * scale, -0.01 * scale, 0.0, 0.01 * scale, 0.5 * scale, 0.99 * scale, 3 * scale):
        assert float(variable.cdf(np.array([t]))[0]) == pytest.approx(float(p_mass[loss <= t].sum()), abs=2e-5)


def test_both_directions_enter_the_promise(monkeypatch):
    """Positive control: were the other direction the larger one, it would be the one reported."""
    rows = [GaussianEvent(2.0, 0.1, 7)]
    honest = compose(rows, 1e-5).upper

    class Louder(SampledGaussianLoss):
        def __init__(self, q, sigma, add):
            super().__init__(q, sigma / 2 if add else sigma, add)

    monkeypatch.setattr(prv, "SampledGaussianLoss", Louder)
    accounting._compose_sampled.cache_clear()
    assert compose(rows, 1e-5).upper > 1.2 * honest
    accounting._compose_sampled.cache_clear()


@pytest.mark.parametrize("order", [1.5, 2, 2.3, 7, 31.5, 64])
def test_renyi_divergence_equals_opacus_at_integers_and_lies_above_between(order):
    ours = renyi_divergence(0.07, 1.3, order)
    reference = float(compute_rdp(q=0.07, noise_multiplier=1.3, steps=1, orders=float(order)))
    if float(order).is_integer():
        assert ours == pytest.approx(reference, rel=1e-9)
    else:
        assert reference * (1 - 1e-9) <= ours <= 1.5 * reference


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
    assert "PRV" not in bound.accountant
    assert math.isfinite(bound.upper)
    assert bound.lower == 0
    compose(events_of(rows), delta, said.append)
    assert len(said) == 2  # also when the answer comes from the cache


@pytest.fixture
def forgetful():
    """Broken accountants must neither be hidden by what is remembered, nor be remembered."""
    accounting._compose_sampled.cache_clear()
    yield
    accounting._compose_sampled.cache_clear()


def falls_back(rows=((2.0, 0.1, 10),), delta=1e-5):
    """Whatever the PRV accountant does: one sentence, a named fallback, and a finite upper bound."""
    said: list[str] = []
    bound = compose(events_of(rows), delta, said.append)
    assert len(said) == 1
    assert bound.accountant in said[0]
    components = accounting.components_of(merge_events(events_of(rows)))
    assert (bound.upper, bound.accountant) == analytic.analytic_epsilon(components, delta)
    return said[0]


class Broken:
    """A curve that cannot be inverted, in the way that ``answer`` says."""

    def __init__(self, *args):
        pass

    def compute_epsilon(self, delta, delta_error, epsilon_error):
        return self.answer()


def complain():
    warnings.warn("the integral may be wrong", RuntimeWarning, stacklevel=1)


def fail():
    raise RuntimeError("Cannot compute epsilon")


def run_out_of_memory():
    raise MemoryError


@pytest.mark.parametrize(
    ("answer", "word"),
    [
        (complain, "integral may be wrong"),
        (fail, "Cannot compute"),
        (run_out_of_memory, "MemoryError"),
        (lambda: (math.nan, math.nan, math.nan), "NaN"),
        (lambda: (0.1, math.nan, 0.3), "NaN"),
    ],
    ids=["warning", "error", "memory", "nan", "one nan"],
)
def test_a_failing_inversion_is_a_refusal_and_a_named_fallback(monkeypatch, forgetful, answer, word):
    monkeypatch.setattr(Broken, "answer", staticmethod(answer), raising=False)
    monkeypatch.setattr(prv, "DiscretePrivacyRandomVariable", Broken)
    assert word in falls_back()


@pytest.mark.parametrize(
    ("method", "value"),
    [("masses", lambda self, edges: np.full(len(edges) - 1, np.nan)), ("mean", lambda self, low, high: high)],
    ids=["masses that are not numbers", "a wrong mean"],
)
def test_a_broken_random_variable_is_a_refusal_and_a_named_fallback(monkeypatch, forgetful, method, value):
    monkeypatch.setattr(SampledGaussianLoss, method, value)
    falls_back()


def test_a_negative_epsilon_is_zero(monkeypatch, forgetful):
    monkeypatch.setattr(Broken, "answer", staticmethod(lambda: (-3.0, -2.0, -1.0)), raising=False)
    monkeypatch.setattr(prv, "DiscretePrivacyRandomVariable", Broken)
    bound = compose(events_of([(2.0, 0.1, 10)]), 1e-5)
    assert (bound.lower, bound.estimate, bound.upper) == (0, 0, 0)


@pytest.mark.parametrize(
    "rows",
    [
        [(1e5, 0.5, 10**9)],
        [(1e3, 0.5, 10**15)],
        [(1e-6, 0.5, 1)],
        [(50.0 + i, 0.1, 100) for i in range(3000)],
        [(2.0 + i / 100, 0.01, 10**4) for i in range(12)],
    ],
    ids=["many steps", "more steps than digits", "hardly any noise", "many events", "many events of many steps"],
)
def test_time_and_memory_are_bounded_before_anything_is_allocated(monkeypatch, rows):
    """What would never end is not begun: no array is longer than the bound, whatever is asked."""
    asked: list[tuple[int, int]] = []

    def counted(components, grid, add):
        asked.append((grid.points, grid.points * len(components)))
        raise prv.AccountantRefused("counted, not computed")

    monkeypatch.setattr(prv, "_compose", counted)
    components = [prv.Component(*row) for row in rows]
    for call in (
        lambda: prv.prv_epsilon(components, 1e-5, 1e-12),
        lambda: prv.prv_curve(components, 1e-8, 1e-12),
        lambda: prv.sketch_epsilon(components, 1e-5),
    ):
        with pytest.raises(prv.AccountantRefused):
            call()
    for points, work in asked:
        assert points <= 1.1 * prv.FINE_POINTS  # rounded up to a length that transforms quickly
        assert work <= max(1.1 * prv.ALL_POINTS, len(rows) * prv.COARSE_POINTS)


def test_contradicting_accountants_give_the_larger_bound_aloud(monkeypatch, forgetful):
    monkeypatch.setattr(analytic, "analytic_epsilon", lambda components, delta: (0.01, "a wrong bound"))
    said: list[str] = []
    bound = compose([GaussianEvent(1.0, 0.1, 50)], 1e-5, said.append)
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
