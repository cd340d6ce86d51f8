"""Promises 1 and 19: reported ε ≥ spent ε, no silent failure.

How the numbers compare with those of other people's accountants is in test_accountants_agree.py.
"""

from __future__ import annotations

import itertools
import math
import warnings

import mpmath
import numpy as np
import pytest
from opacus.accountants.analysis.rdp import compute_rdp
from scipy.stats import binom

from dprandp.errors import UsageError
from dprandp.privacy import accounting, analytic, pld
from dprandp.privacy.accounting import GaussianEvent, compose, gaussian_mu, merge_events, rounded_up
from dprandp.privacy.analytic import Component
from dprandp.privacy.gaussian_dp import gaussian_dp_delta, gaussian_dp_epsilon
from dprandp.privacy.tuning import TuningEvent


def events_of(rows) -> list[GaussianEvent]:
    return [GaussianEvent(*row) for row in rows]


FULL = Component(30.0, 1.0, 60)
FULL_MU = math.sqrt(60) / 30


# ---------------------------------------------------------------- the declared errors


@pytest.mark.parametrize("share", [0.005, 0.02, 0.3])
@pytest.mark.parametrize(("sigma", "steps"), [(1.0, 1), (30.0, 60), (0.3, 5)])
@pytest.mark.parametrize("delta", [1e-2, 1e-5, 1e-9])
def test_on_every_mesh_the_bounds_lie_on_both_sides_of_the_closed_form(share, sigma, steps, delta):
    """Full batches as steps that are composed numerically: their exact ε is known."""
    exact = gaussian_dp_epsilon(math.sqrt(steps) / sigma, delta)
    low, estimate, high = pld.pld_epsilon([Component(sigma, 1.0, steps)], delta, exact, share)
    assert low <= exact <= high
    assert estimate <= high
    if share <= pld.FINE:
        rounding = pld.ROUNDING * (steps + 2)
        assert high <= 1.0005 * gaussian_dp_epsilon(math.sqrt(steps) / sigma, delta - rounding)
        assert low >= 0.95 * exact or delta < 1e-6  # the masses that rounding made negative count


@pytest.mark.parametrize(("share", "delta"), [(0.1, 1e-3), (0.4, 1e-6)])
def test_a_bound_is_read_at_the_delta_that_rounding_leaves(monkeypatch, share, delta):
    """With an error that is large beside what rounding really takes, the bound is the exact curve, moved by it."""
    monkeypatch.setattr(pld, "ROUNDING", share * delta / (FULL.steps + 2))
    low, estimate, high = pld.pld_epsilon([FULL], delta, gaussian_dp_epsilon(FULL_MU, delta))
    assert high == pytest.approx(gaussian_dp_epsilon(FULL_MU, delta * (1 - share)), rel=1e-3)
    assert estimate == pytest.approx(gaussian_dp_epsilon(FULL_MU, delta), rel=1e-3)
    assert high > estimate * 1.005
    monkeypatch.setattr(pld, "ROUNDING", 0.0)
    assert pld.pld_epsilon([FULL], delta, gaussian_dp_epsilon(FULL_MU, delta))[0] > low


def test_rounding_is_below_what_is_allowed_for():
    """Far beyond the largest loss nothing should be left of the mass, in either direction."""
    for row in [(100.0, 1.0, 10_000), (1.0, 0.01, 1000), (20.0, 0.01, 100_000), (0.7, 0.1, 30)]:
        component = Component(*row)
        scale = analytic.analytic_epsilon([component], 1e-6)[0]
        for one in pld._compose([component], 1e-6, scale, pld.FINE):
            far = float(one.distribution.get_delta_for_epsilon(3 * scale + 3))
            outside = float(one.distribution.get_delta_for_epsilon(math.inf))
            assert abs(far - outside) < 0.25 * one.delta_error


@pytest.mark.parametrize("row", [(30.0, 1.0, 1), (2.0, 0.1, 30), (9.2, 0.08192, 875)], ids=str)
@pytest.mark.parametrize("delta", [1e-2, 1e-9])
def test_what_is_left_out_of_the_grid_counts_as_infinite_and_is_little(row, delta):
    for one in pld._compose([Component(*row)], delta, 1.0, pld.FINE):
        outside = float(one.distribution.get_delta_for_epsilon(math.inf))
        assert 0.3e-4 * delta / row[2] < outside < 1e-3 * delta


@pytest.mark.parametrize("row", [(1.0, 0.01, 1000), (2.0, 0.1, 30)], ids=str)
def test_what_is_promised_is_the_upper_end(monkeypatch, row):
    asked = []
    honest = pld.pld_epsilon
    monkeypatch.setattr(pld, "ROUNDING", 1e-3 * 1e-5 / row[2])  # so that the estimate is not the upper end
    monkeypatch.setattr(pld, "pld_epsilon", lambda *values: asked.append(honest(*values)) or asked[-1])
    accounting._compose_sampled.cache_clear()
    bound = compose([GaussianEvent(*row)], 1e-5)
    accounting._compose_sampled.cache_clear()
    (found,) = asked
    assert (bound.lower, bound.estimate, bound.upper) == found
    assert bound.lower < bound.estimate < bound.upper


def test_a_curve_is_above_the_exact_one_by_the_error_that_it_declares(monkeypatch):
    for error in (0.0, 1e-4):
        monkeypatch.setattr(pld, "ROUNDING", error / (FULL.steps + 2))
        epsilons, deltas = pld.pld_curve([FULL], 1e-5, 1.0, 2000)
        assert epsilons[0] == 0
        assert (np.diff(epsilons) > 0).all()
        assert (np.diff(deltas) <= 0).all()
        assert deltas[-1] <= 3.1 * error + 1e-5
        for place in range(0, 2000, 40):
            exact = gaussian_dp_delta(FULL_MU, float(epsilons[place]))
            assert exact + error <= deltas[place] <= (exact + error) * 1.01 + 1e-8


@pytest.mark.parametrize("q", [0.02, 0.5])
def test_a_curve_covers_both_directions(q):
    sigma = 0.7
    epsilons, deltas = pld.pld_curve([Component(sigma, q, 1)], 1e-7, 1.0, 400)
    for place in range(0, 400, 20):
        exact = [integrated_delta(q, sigma, direction, float(epsilons[place])) for direction in ("add", "remove")]
        assert max(exact) * (1 - 1e-6) - 1e-12 <= deltas[place] <= max(exact) * 1.01 + 1e-6


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
        component = Component(sigma, q, count)
        orders = np.geomspace(1e-2, 300, 400)
        moments = np.array([count * analytic.log_moment(q, sigma, float(order)) / order for order in orders])
        best = float((moments + np.log(orders / (1 + orders)) - (np.log(delta) + np.log1p(orders)) / orders).min())
        assert best * (1 - 1e-3) <= analytic.renyi_epsilon([component], delta) <= best * (1 + 1e-9)
        assert analytic.renyi_epsilon([component], delta, [tuning]) > 1.05 * best


def densities(q: float, sigma: float, direction: str, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """P and Q of one step at x, from which the outcome is drawn and to which it is compared."""
    alone = np.exp(-(x**2) / (2 * sigma**2)) / (sigma * math.sqrt(2 * math.pi))
    mixture = (1 - q) * alone + q * np.exp(-((x - 1) ** 2) / (2 * sigma**2)) / (sigma * math.sqrt(2 * math.pi))
    return (alone, mixture) if direction == "add" else (mixture, alone)


def integrated_delta(q: float, sigma: float, direction: str, epsilon: float) -> float:
    """δ(ε) of one step as the area between P and exp(ε) Q: by the trapezoidal rule, no library."""
    x = np.linspace(-14 * sigma, 14 * sigma + 1, 400_001)
    p, other = densities(q, sigma, direction, x)
    return float(np.trapezoid(np.maximum(p - math.exp(epsilon) * other, 0), x))


@pytest.mark.parametrize(("q", "sigma"), [(0.1, 1.0), (0.5, 3.0), (1e-3, 0.7), (0.9, 0.5)])
@pytest.mark.parametrize("place", [0, 1], ids=["remove", "add"])
def test_one_step_in_each_direction_equals_numerical_integration(q, sigma, place):
    direction = ("remove", "add")[place]
    scale = analytic.analytic_epsilon([Component(sigma, q, 1)], 1e-5)[0]
    one = pld._compose([Component(sigma, q, 1)], 1e-5, scale, 1e-3)[place]
    for epsilon in np.linspace(0, 1.2, 9) * scale:
        exact = integrated_delta(q, sigma, direction, float(epsilon))
        found = float(one.distribution.get_delta_for_epsilon(float(epsilon)))
        assert exact * (1 - 1e-6) - 1e-12 <= found <= exact * (1 + 1e-3) + 1e-7
    for delta in (1e-3, 1e-5):
        low, _, high = pld.pld_epsilon([Component(sigma, q, 1)], delta, scale)
        assert integrated_delta(q, sigma, direction, high) <= delta * (1 + 1e-9)
        if low:
            both = [integrated_delta(q, sigma, each, low) for each in ("remove", "add")]
            assert max(both) >= delta


def exact_delta(q: float, sigma: float, direction: str, epsilon: float) -> mpmath.mpf:
    """δ(ε) of one step with 60 digits, from the point where the loss is ε."""
    with mpmath.workdps(60):
        q, sigma, epsilon = mpmath.mpf(q), mpmath.mpf(sigma), mpmath.mpf(epsilon)
        sign = 1 if direction == "remove" else -1
        ratio = (mpmath.exp(sign * epsilon) - 1 + q) / q
        if ratio <= 0:
            return 1 - mpmath.exp(epsilon) if sign == 1 else mpmath.mpf(0)
        x = sigma**2 * mpmath.log(ratio) + mpmath.mpf(1) / 2
        alone, moved = (mpmath.erfc(sign * (x - centre) / sigma / mpmath.sqrt(2)) / 2 for centre in (0, 1))
        mixed = (1 - q) * alone + q * moved
        upper, lower = (mixed, alone) if sign == 1 else (alone, mixed)
        return upper - mpmath.exp(epsilon) * lower


@pytest.mark.parametrize(
    ("q", "sigma"), [(0.1, 1.0), (0.5, 0.02), (1e-6, 1.0), (1e-4, 1e3), (0.9, 3.0), (1 - 1e-9, 1.0), (1e-3, 0.3)]
)
@pytest.mark.parametrize("direction", ["remove", "add"])
def test_the_curve_of_one_step_is_right_to_a_unit_of_rounding(q, sigma, direction):
    """What the accounting for rounding rests on: 40 units a step are taken off δ."""
    adjacency = {"remove": pld.AdjacencyType.REMOVE, "add": pld.AdjacencyType.ADD}[direction]
    loss = pld.GaussianPrivacyLoss(
        sigma, sampling_prob=q, log_mass_truncation_bound=-40, adjacency_type=adjacency
    )
    bounds, most = loss.connect_dots_bounds(), -math.log1p(-q)
    random = np.random.default_rng(0)
    epsilons = np.concatenate([
        random.uniform(bounds.epsilon_lower, bounds.epsilon_upper, 30), most * random.uniform(-1, 1, 20),
        most * (1 - 10 ** random.uniform(-8, 0, 20)),
    ])  # fmt: skip
    for epsilon, delta in zip(epsilons.tolist(), loss.get_delta_for_epsilon(epsilons).tolist(), strict=True):
        assert float(exact_delta(q, sigma, direction, epsilon) - delta) <= 2 * np.finfo(float).eps


def test_no_point_of_the_grid_is_where_the_library_rounds_a_loss_to_its_largest():
    sampled = Component(1.0, 0.5, 3)
    losses = [
        pld.GaussianPrivacyLoss(1.0, sampling_prob=0.5, log_mass_truncation_bound=-30, adjacency_type=direction)
        for direction in (pld.AdjacencyType.REMOVE, pld.AdjacencyType.ADD)
    ]
    for parts in (7, 100, 1000):
        wanted = math.log(2) / parts
        mesh = pld._mesh([sampled], [[loss] for loss in losses], 1e-13, wanted)
        assert wanted < mesh < 1.001 * wanted
        assert abs(round(math.log(2) / mesh) * mesh / math.log(2) - 1) > 1e-8


@pytest.mark.parametrize("order", [1.5, 7, 31.5])
def test_renyi_divergence_equals_opacus(order):
    ours = analytic.log_moment(0.07, 1.3, order - 1.0) / (order - 1)
    reference = float(compute_rdp(q=0.07, noise_multiplier=1.3, steps=1, orders=float(order)))
    assert reference * (1 - 1e-9) <= ours <= reference * (1 + 1e-6)


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
    assert "PLD" not in bound.accountant
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
    """Whatever the PLD accountant does: one sentence, a named fallback, and a finite upper bound."""
    said: list[str] = []
    bound = compose(events_of(rows), delta, said.append)
    assert len(said) == 1
    assert bound.accountant in said[0]
    components = accounting.components_of(merge_events(events_of(rows)))
    assert (bound.upper, bound.accountant) == analytic.analytic_epsilon(components, delta)
    return said[0]


class Broken:
    """A distribution that cannot be inverted, in the way that ``answer`` says."""

    def __init__(self, *args):
        pass

    def to_dense_pmf(self):
        return self

    def self_compose(self, steps, tail):
        return self

    def get_delta_for_epsilon(self, epsilon):
        return 1.0

    def get_epsilon_for_delta(self, delta):
        return self.answer()


def complain():
    warnings.warn("the integral may be wrong", RuntimeWarning, stacklevel=1)


def run_out_of_memory():
    raise MemoryError


@pytest.mark.parametrize(
    ("answer", "word"),
    [(complain, "integral may be wrong"), (run_out_of_memory, "MemoryError"), (lambda: math.nan, "no number"),
     (itertools.cycle([0.1, math.nan, 0.3]).__next__, "no number"), (lambda: math.inf, "infinity")],
    ids=["warning", "memory", "nan", "one nan", "infinity"],
)  # fmt: skip
def test_a_failing_inversion_is_a_refusal_and_a_named_fallback(monkeypatch, forgetful, answer, word):
    monkeypatch.setattr(Broken, "answer", staticmethod(answer), raising=False)
    monkeypatch.setattr(pld, "create_pmf_pessimistic_connect_dots_fixed_gap", Broken)
    assert word in falls_back()


@pytest.mark.parametrize(
    "deltas",
    [lambda self, epsilons: np.full(len(epsilons), np.nan), lambda self, epsilons: np.linspace(0, 1, len(epsilons))],
    ids=["no numbers", "a curve that rises"],
)
def test_a_broken_curve_of_one_step_is_a_refusal_and_a_named_fallback(monkeypatch, forgetful, deltas):
    monkeypatch.setattr(pld.GaussianPrivacyLoss, "get_delta_for_epsilon", deltas)
    falls_back()


def test_a_finer_mesh_that_is_refused_leaves_the_bound_of_the_first(monkeypatch):
    honest, component = pld._compose, Component(9.2, 0.08192, 100)
    scales: list[float] = []

    def once(components, delta, scale, share):
        scales.append(scale)
        if len(scales) > 1:
            raise pld.AccountantRefused("only once")
        return honest(components, delta, scale, share)

    expected = pld.pld_epsilon([component], 1e-5, 0.31)
    monkeypatch.setattr(pld, "_compose", once)
    low, _, high = pld.pld_epsilon([component], 1e-5, 1.0)
    assert len(scales) == 2
    assert low < expected[0] < expected[2] < high < 1.1 * expected[2]


def test_time_and_memory_are_bounded_before_anything_is_allocated(monkeypatch):
    """What would never end is not begun: no array is longer than the bound, whatever is asked."""
    asked: list[float] = []

    def counted(losses, components, mesh, tail, delta):
        for loss in losses:
            bounds = loss.connect_dots_bounds()
            asked.append((bounds.epsilon_upper - bounds.epsilon_lower) / mesh)
        raise pld.AccountantRefused("counted, not computed")

    monkeypatch.setattr(pld, "_sum", counted)
    for rows in (
        [(1e5, 0.5, 10**9)], [(1e3, 0.5, 10**15)], [(1e-6, 0.5, 1)], [(50.0 + i, 0.1, 100) for i in range(3000)],
        [(2.0 + i / 100, 0.01, 10**4) for i in range(12)],
    ):  # fmt: skip
        components = [Component(*row) for row in rows]
        with pytest.raises(pld.AccountantRefused):
            pld.pld_epsilon(components, 1e-5, 1e-12)
        with pytest.raises(pld.AccountantRefused):
            pld.pld_curve(components, 1e-5, 1e-12, 100)
    assert all(points <= 1.001 * pld.STEP_POINTS for points in asked)


@pytest.mark.parametrize("rows", [[(1.0, 1e-3, 10**5)], [(5.0, 0.9, 3), (1.0, 0.01, 1000)]], ids=str)
def test_a_composition_has_hardly_more_points_than_was_foreseen(rows):
    for one in pld._compose([Component(*row) for row in rows], 1e-5, 1e-6, pld.FINE):
        assert one.distribution.size <= 2 * pld.POINTS


def test_contradicting_accountants_give_the_larger_bound_aloud(monkeypatch, forgetful):
    monkeypatch.setattr(analytic, "analytic_epsilon", lambda components, delta: (0.01, "a wrong bound"))
    said: list[str] = []
    bound = compose([GaussianEvent(1.0, 0.1, 50)], 1e-5, said.append)
    assert "contradicts" in said[0]
    assert bound.upper > 1


def test_senseless_events_and_deltas_are_refused():
    for values in (
        (-1.0, 0.1, 1), (math.nan, 0.1, 1), (math.inf, 0.1, 1), (1.0, 0.0, 1), (1.0, 1.1, 1), (1.0, math.nan, 1),
        (1.0, 0.1, -1), (1.0, 0.1, 1.5), *((1.0, 0.1, steps) for steps in (10**400, 1e16, math.inf, math.nan)),
    ):  # fmt: skip
        with pytest.raises(UsageError):
            GaussianEvent(*values)
    for delta in (0.0, 1.0, math.nan):
        with pytest.raises(UsageError, match="delta is"):
            compose([GaussianEvent(1.0, 0.1, 1)], delta)


@pytest.mark.parametrize("digits", [3, 4, 5])
def test_an_epsilon_for_people_is_never_below_itself(digits):
    """And above it by no more than a unit of the last digit."""
    for epsilon in (1.397245, 1.3972, 0.99951, 9.99999, 1e-5, 3.3e-4, 123.4567, 0.5, 2.0, 8.000000001):
        said = float(rounded_up(epsilon, digits))
        assert epsilon * (1 - 1e-11) <= said <= epsilon * (1 + 10 ** (1 - digits)), epsilon
    assert (rounded_up(0.9999999999999999), rounded_up(1.0), rounded_up(0.0)) == ("1", "1", "0")
    assert rounded_up(math.inf) == "inf"
