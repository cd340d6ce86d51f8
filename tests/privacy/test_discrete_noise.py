"""Discrete noise: on the lattice, of the right distribution, fresh, accounted as what it is.

Statistical tests reject at p < 1e-6 and have a positive control each; they draw from the operating system.
"""

from __future__ import annotations

import itertools
import math
from decimal import Decimal, localcontext
from fractions import Fraction

import noise_checks
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from dprandp.errors import BudgetError, UsageError
from dprandp.privacy import accounting, neighbours, randomness
from dprandp.privacy.accounting import (
    DELTA_SHARE,
    DISTANCE,
    LATTICE_BITS,
    MOST_COORDINATES,
    GaussianEvent,
    calibrate,
    check_distance,
    compose,
)
from dprandp.privacy.gaussian_dp import gaussian_dp_epsilon
from dprandp.privacy.ledger import Charge, Ledger
from dprandp.privacy.mechanism import PrivateMechanism, make_plan
from dprandp.privacy.neighbours import compose_group
from dprandp.privacy.randomness import (
    InsecureSeed,
    SystemRandom,
    add_discrete_noise,
    discrete_gaussian,
    granularity,
    lattice_scale,
)

ALPHA = 1e-6
DRAWS = 60_000


def pmf(scale: int) -> tuple[np.ndarray, np.ndarray]:
    """Whole numbers and their exact probabilities (to double precision), 15 standard deviations wide."""
    values = np.arange(-15 * scale, 15 * scale + 1)
    weights = np.exp(-(values**2) / (2 * scale**2))
    return values, weights / weights.sum()


def chi2_p(draws: np.ndarray, scale: int) -> float:
    """Chi-square of the counts against the exact probabilities; rare values are taken together in the tails."""
    values, probability = pmf(scale)
    low, high = (int(values[np.searchsorted(probability.cumsum(), p)]) for p in (0.001, 0.999))
    cells = np.arange(low, high + 1)
    inside = probability[(values >= low) & (values <= high)]
    expected = np.array([probability[values < low].sum(), *inside, probability[values > high].sum()]) * len(draws)
    counted = np.bincount(np.clip(draws - low + 1, 0, len(cells) + 1), minlength=len(cells) + 2)
    return float(stats.chisquare(counted, expected * len(draws) / expected.sum()).pvalue)


@pytest.mark.parametrize("scale", [1, 5, 12])
def test_small_scales_have_the_exact_distribution_and_no_other(scale):
    draws = discrete_gaussian(scale, DRAWS, SystemRandom())
    assert chi2_p(draws, scale) > ALPHA
    assert chi2_p(draws, scale + 1) < ALPHA
    assert scale == 1 or chi2_p(draws, scale - 1) < ALPHA


def test_a_doubled_zero_or_a_rounded_gaussian_is_rejected():
    """What the sampler would give without rejecting the second zero, and the neighbouring distribution."""
    draws = discrete_gaussian(1, DRAWS, SystemRandom())
    doubled = np.concatenate([draws, np.zeros((draws == 0).sum(), np.int64)])
    assert chi2_p(doubled, 1) < ALPHA
    assert chi2_p(np.rint(SystemRandom().gaussian([DRAWS]).numpy()).astype(np.int64), 1) < ALPHA


def test_large_scales_are_gaussian_too():
    scale = 2**44 + 12_345
    draws = discrete_gaussian(scale, DRAWS, SystemRandom()) / scale
    assert stats.kstest(draws, "norm").pvalue > ALPHA
    for factor in (0.9, 1.1):
        assert stats.kstest(draws * factor, "norm").pvalue < ALPHA
    assert abs(float((draws[1:] * draws[:-1]).mean())) * math.sqrt(DRAWS) < 5.5


def test_the_slow_exact_comparison_has_the_same_distribution(monkeypatch):
    """Once in 2^39 values the doubles do not decide; here they never do."""
    monkeypatch.setattr(randomness, "_MARGIN", 1e9)
    assert chi2_p(discrete_gaussian(3, 4000, SystemRandom()), 3) > ALPHA
    assert chi2_p(discrete_gaussian(3, 4000, SystemRandom()) * 2, 3) < ALPHA


class Words(SystemRandom):
    """Given words first, then real ones."""

    def __init__(self, *words: int) -> None:
        self._first = list(words)

    def words(self, count):
        drawn = super().words(count).copy()
        taken, self._first = self._first[:count], self._first[count:]
        drawn[: len(taken)] = np.array(taken, np.uint64)
        return drawn


def test_levels_on_a_threshold_are_decided_by_its_lower_half():
    thresholds = randomness._thresholds()
    assert len(thresholds) == 13
    total = sum(math.exp(-k * k / 2) for k in range(20))
    assert [t / 2**128 for t in thresholds[:4]] == pytest.approx(
        list(itertools.accumulate(math.exp(-k * k / 2) / total for k in range(4)))
    )
    upper, lower = divmod(thresholds[1], 2**64)
    for below, level in ((lower - 1, 1), (lower, 2)):
        assert randomness._level(1, Words(upper, below)).tolist() == [level]
    assert randomness._level(3, Words(0, upper - 1, upper + 1)).tolist() == [0, 1, 2]


def test_the_exact_comparison_agrees_with_fractions():
    """exp(−z) by its series in whole fractions, bracketed from both sides."""
    k, offset, scale = 2, 5, 7
    z = Fraction(offset * (2 * k * scale + offset), 2 * scale * scale)
    series = [sum((-z) ** n / math.factorial(n) for n in range(count)) for count in (60, 61)]
    near = int(min(series) * 2**64)  # the word that holds exp(−z): the bits after it decide
    bits = int((min(series) * 2**64 - near) * 2**128)
    for more, expected in ((bits - 2**40, True), (bits + 2**40, False)):
        words = Words(more >> 64, more & (2**64 - 1))
        assert randomness._accepts_exactly(k, offset, scale, near, words) is expected


def test_values_below_a_limit_are_uniform():
    drawn = randomness._below(5, 50_000, SystemRandom())
    assert stats.chisquare(np.bincount(drawn, minlength=5)).pvalue > ALPHA
    assert stats.chisquare(np.bincount(np.minimum(drawn, 3), minlength=5)[:4]).pvalue < ALPHA
    assert set(randomness._below(1, 100, SystemRandom()).tolist()) == {0}


def test_noise_is_fresh_and_the_insecure_seed_repeats():
    draws = [discrete_gaussian(2**44, 200, source) for source in (SystemRandom(), SystemRandom()) for _ in range(2)]
    assert len(np.unique(np.concatenate(draws))) == 800
    assert np.array_equal(discrete_gaussian(99, 50, InsecureSeed(1)), discrete_gaussian(99, 50, InsecureSeed(1)))
    assert not np.array_equal(discrete_gaussian(99, 50, InsecureSeed(1)), discrete_gaussian(99, 50, InsecureSeed(2)))


def test_senseless_values_are_refused(monkeypatch):
    for scale in (0, -1, 2**48 + 1):
        with pytest.raises(UsageError, match="scale"):
            discrete_gaussian(scale, 1, SystemRandom())
    for value in (1e30, math.inf, math.nan):
        with pytest.raises(RuntimeError, match="too large"):
            add_discrete_noise({"a": torch.tensor([value])}, CLIP, SIGMA, SystemRandom())
    monkeypatch.setattr(randomness, "MOST_COORDINATES", 3)
    with pytest.raises(UsageError, match="4 parameters"):
        add_discrete_noise({"a": torch.zeros(4)}, CLIP, SIGMA, SystemRandom())
    for clip_norm, sigma in ((0.0, 1.0), (1.0, 0.0), (1.0, math.inf), (math.nan, 1.0)):
        with pytest.raises(UsageError, match="makes no sense"):
            granularity(clip_norm, sigma)


# ---------------------------------------------------------------- the lattice

SIGMA, CLIP = 7.3, 0.45
clips = st.floats(1e-8, 1e8)
sigmas = st.floats(0.01, 1e6)


@settings(max_examples=200, deadline=None)
@given(clip_norm=clips, sigma=sigmas, coordinates=st.integers(1, MOST_COORDINATES))
def test_the_lattice_is_a_power_of_two_fine_and_its_noise_large_enough(clip_norm, sigma, coordinates):
    gamma = granularity(clip_norm, sigma)
    assert math.frexp(gamma)[0] == 0.5
    exact = Fraction(sigma) * Fraction(clip_norm) / Fraction(gamma)
    assert 2**44 * (1 - 1e-12) <= exact < 2**45 * (1 + 1e-12)
    scale = lattice_scale(clip_norm, sigma, coordinates)
    # Δ = C + γ √d, with the root from above
    wanted = Fraction(sigma) * (Fraction(clip_norm) / Fraction(gamma) + Fraction(math.sqrt(coordinates)))
    assert wanted <= scale <= wanted * (1 + Fraction(1, 10**13)) + 2
    assert wanted < exact * Fraction(1001, 1000)  # what rounding adds is below 0.1 %


def test_output_lies_on_the_lattice_and_keeps_the_structure():
    sums = {"a": torch.randn(40, 30, dtype=torch.float64) * 20, "b": torch.tensor(3.3, dtype=torch.float64)}
    gamma = granularity(CLIP, SIGMA)
    noisy = add_discrete_noise(sums, CLIP, SIGMA, SystemRandom())
    assert {name: tuple(value.shape) for name, value in noisy.items()} == {"a": (40, 30), "b": ()}
    for value in noisy.values():
        steps = value / gamma
        assert value.dtype == torch.float64
        assert torch.equal(steps, steps.round())
    assert not torch.equal(sums["a"] / gamma, (sums["a"] / gamma).round())  # the sums themselves do not


@pytest.mark.parametrize("value", [0.0, 123.456])
def test_every_tensor_and_every_coordinate_gets_all_of_the_noise(value):
    def added(sums):
        noisy = add_discrete_noise(noise_checks.sums_of(value), CLIP, SIGMA, SystemRandom())
        return {name: total - value for name, total in noisy.items()}

    assert noise_checks.complaints(noise_checks.draws_of(added), SIGMA * CLIP) == []


def test_the_sensitivity_is_raised_for_the_coordinates_of_all_tensors_together(monkeypatch):
    scales = []
    honest = randomness.discrete_gaussian
    monkeypatch.setattr(
        randomness, "discrete_gaussian", lambda scale, *rest: scales.append(scale) or honest(scale, *rest)
    )
    sums = noise_checks.sums_of()
    add_discrete_noise(sums, CLIP, SIGMA, SystemRandom())
    gamma = Fraction(granularity(CLIP, SIGMA))
    count = sum(total.numel() for total in sums.values())
    delta = Fraction(CLIP) + gamma * Fraction(math.sqrt(count))
    assert len(set(scales)) == 1
    assert len(scales) == len(sums)
    assert Fraction(SIGMA) * delta / gamma <= scales[0] <= Fraction(SIGMA) * delta / gamma * (1 + Fraction(1, 2**40))


@settings(max_examples=60, deadline=None)
@given(
    coordinates=st.integers(1, 40),
    offset=st.floats(-30, 30),
    sigma=st.sampled_from([0.3, 1.0, 40.0]),
    seed=st.integers(0, 2**31),
)
def test_rounding_moves_neighbouring_sums_apart_by_at_most_the_inflated_sensitivity(coordinates, offset, sigma, seed):
    """What the noise is scaled by covers the distance of the rounded sums, worst cases included."""
    gamma = granularity(1.0, sigma)
    generator = torch.Generator().manual_seed(seed)
    here = offset + torch.randn(coordinates, generator=generator, dtype=torch.float64)
    here = (torch.floor(here / gamma) + 0.5) * gamma  # half-way between two points: rounding does its worst
    change = torch.randn(coordinates, generator=generator, dtype=torch.float64)
    there = here + change / change.norm()
    distance = float((there - here).norm())
    rounded = [np.rint(value.numpy() / gamma) for value in (here, there)]
    apart = float(np.linalg.norm(rounded[0] - rounded[1]))
    assert apart <= distance / gamma + math.sqrt(coordinates)
    assert sigma * apart <= lattice_scale(max(1.0, distance), sigma, coordinates) * (1 + 1e-9)


# ---------------------------------------------------------------- accounting


@pytest.mark.parametrize("scale", [16, 200])
def test_the_distance_to_rounded_gaussian_noise_is_below_its_bound(scale):
    """Total variation distance computed in full, at scales where double precision still resolves it."""
    values, probability = pmf(scale)
    edges = (np.append(values, values[-1] + 1) - 0.5) / scale
    rounded = np.where(edges[:-1] < 0, np.diff(stats.norm.cdf(edges)), -np.diff(stats.norm.sf(edges)))
    distance = 0.5 * float(np.abs(probability - rounded).sum())
    assert 0.7 / (40 * scale**2) < distance < 1 / (40 * scale**2)
    assert DISTANCE >= 1 / (40 * 2.0**88)


@settings(max_examples=100, deadline=None)
@given(steps=st.integers(1, 10**6), epsilon=st.floats(0, 40), log_delta=st.floats(-40, -2))
def test_what_is_refused_is_what_delta_does_not_pay_for(steps, epsilon, log_delta):
    """(1 + exp ε) T d (2⁻⁸⁸/40 + 2⁻¹¹⁰) ≤ share · δ with d = 2²⁶ coordinates, in 60 digits."""
    assert (LATTICE_BITS, MOST_COORDINATES) == (44, 2**26)
    delta = math.exp(log_delta)
    with localcontext() as exact:
        exact.prec = 60
        each = Decimal(2) ** -88 / 40 + Decimal(2) ** -110
        cost = (1 + Decimal(epsilon).exp()) * steps * 2**26 * each
        allowed = Decimal(DELTA_SHARE) * Decimal(delta)
        near = abs(cost / allowed - 1) < Decimal("1e-9")
    try:
        check_distance(steps, epsilon, delta)
        refused = False
    except BudgetError:
        refused = True
    assert near or refused == (cost > allowed)


def test_the_distance_is_that_of_all_discrete_steps(monkeypatch):
    asked = []
    for module in (accounting, neighbours):
        monkeypatch.setattr(module, "check_distance", lambda *values: asked.append(values))
    events = [GaussianEvent(30.0, 1.0, 7, True), GaussianEvent(9.0, 0.1, 5, True), GaussianEvent(30.0, 1.0, 11)]
    bound = compose(events, 1e-5)
    assert asked == [(12, bound.upper, 1e-5)]
    asked.clear()
    full = [GaussianEvent(30.0, 1.0, 7, True), GaussianEvent(31.0, 1.0, 5, True), GaussianEvent(30.0, 1.0, 11)]
    bound = compose_group(full, 1e-5, 2)
    assert asked[-1] == (12, bound.upper, 1e-5)


def test_discrete_steps_cost_as_gaussian_ones_at_the_reduced_delta():
    full, sampled = GaussianEvent(30.0, 1.0, 60), GaussianEvent(9.2, 0.08192, 20)
    for events in ([full], [full, sampled]):
        plain = compose(events, 1e-5)
        noisy = compose([GaussianEvent(e.noise_multiplier, e.sample_rate, e.steps, True) for e in events], 1e-5)
        assert plain.upper < noisy.upper < plain.upper * 1.0001
        assert noisy.upper == compose(events, 1e-5 * (1 - DELTA_SHARE)).upper
        assert noisy.delta == 1e-5
        assert "discrete noise" in noisy.accountant
    mixed = compose([full, GaussianEvent(30.0, 1.0, 60, True)], 1e-5)
    assert mixed.upper == pytest.approx(gaussian_dp_epsilon(math.sqrt(120) / 30, 1e-5 * (1 - DELTA_SHARE)), rel=1e-9)


def test_an_exact_discrete_mechanism_is_within_the_bound_that_is_given():
    """Oracle: (ε, δ) of one coordinate, one step, from the exact probabilities of both neighbours, sensitivity 40."""
    scale, shift = 40, 40
    values, probability = pmf(scale)
    moved = np.exp(-((values - shift) ** 2) / (2 * scale**2))
    moved /= moved.sum()
    epsilon = 2.0
    exact = float(np.maximum(probability - math.exp(epsilon) * moved, 0).sum())
    slack = (1 + math.exp(epsilon)) / (40 * scale**2)
    bound = stats.norm.cdf(0.5 - epsilon) - math.exp(epsilon) * stats.norm.cdf(-0.5 - epsilon)
    assert exact <= bound + slack
    assert exact > 0.9 * bound  # the oracle is not trivially small


def test_calibration_for_discrete_noise_meets_its_target():
    for q, steps in ((1.0, 120), (0.1, 5)):
        sigma = calibrate(1.0, 1e-5, q, steps, discrete=True)
        assert 0.995 < compose([GaussianEvent(sigma, q, steps, True)], 1e-5).upper <= 1.0
        assert sigma >= calibrate(1.0, 1e-5, q, steps) * (1 - 1e-3)


def test_an_epsilon_for_which_the_lattice_is_too_coarse_is_refused():
    with pytest.raises(BudgetError, match="too coarse"):
        compose([GaussianEvent(0.3, 1.0, 20, True)], 1e-9)
    public = {"stage": "probe", "delta": 1e-9, "spent": [], "examples": 50, "sample_rate": 1.0, "steps": 10}
    with pytest.raises(BudgetError, match="--noise gaussian"):
        make_plan(**public, epsilon=50.0, epsilon_target=50.0, clip_norm=1.0, noise="discrete")
    assert make_plan(**public, epsilon=math.inf, epsilon_target=math.inf, clip_norm=1.0, noise="discrete")


def test_a_mechanism_with_discrete_noise_is_paid_for_as_such(tmp_path):
    plan = make_plan(
        stage="probe", epsilon=2.0, delta=1e-4, epsilon_target=2.0, spent=[], examples=64, sample_rate=0.5,
        steps=3, clip_norm=1.0, noise="discrete",
    )  # fmt: skip
    ledger = Ledger.create(tmp_path / "ledger.jsonl", 64, "patient (column patient_train)")
    mechanism = PrivateMechanism(plan, ledger, SystemRandom())
    released = [step.release({"w": torch.zeros(500)})["w"] for step in mechanism.steps()]
    again = Ledger.open(tmp_path / "ledger.jsonl", read_only=True)
    assert again.events() == [plan.event]
    assert plan.event.discrete
    assert {charge.noise for charge in again.charges} == {"discrete"}
    assert again.data_unit == "patient (column patient_train)"
    seen = torch.cat(released).double() * 32  # qN undone
    assert float(seen.std()) == pytest.approx(plan.noise_multiplier, rel=0.15)
    assert {value.dtype for value in released} == {torch.float32}


def test_a_ledger_names_the_kind_of_noise():
    charge = Charge("probe", 1, 0, 2, 7, 9.0, 0.5, 1.0, "discrete", "os-entropy")
    line = b'{"kind":"charge","stage":"probe","attempt":1,"step":0,"steps":2,"planned":7,"noise_multiplier":9.0,'
    rest = b'"sample_rate":0.5,"clip_norm":1.0,'
    assert Charge.from_torn(line + rest + b'"noise":"discrete","random":"os-entropy","ti') == charge
    assert Charge.from_torn(line + rest + b'"random":"os-entropy","ti') is None
    assert Charge.from_torn(line + rest + b'"noise":"discrete","random":"os-e') is None
    record = charge.record()
    assert Charge.from_record(record) == charge
    for change in ({"noise": "loud"}, {"planned": 1}, {"clip_norm": "1"}):
        with pytest.raises(UsageError):
            Charge.from_record(record | change)
    del record["noise"]
    with pytest.raises(KeyError):
        Charge.from_record(record)
