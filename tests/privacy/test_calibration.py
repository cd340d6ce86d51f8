"""Promises 1 and 12: calibration never above its target. First the search alone, on functions whose answer is known."""

from __future__ import annotations

import math
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dprandp.errors import BudgetError, UsageError
from dprandp.privacy import accounting, analytic
from dprandp.privacy.accounting import ACCEPT, GaussianEvent, calibrate, compose, nudge, settle, solve


@pytest.mark.parametrize(("start", "power"), [(1e-3, 1.0), (5.0, 2.0), (900.0, 1.0)])
def test_solve_finds_the_crossing_from_anywhere(start, power):
    assert solve(lambda x: 10 / x**power, 2.0, start, 1e6) == pytest.approx(5 ** (1 / power), rel=2e-4)


def test_solve_says_when_there_is_none():
    assert solve(lambda x: 3.0 + 1 / x, 2.0, 1.0, 1e6) == math.inf
    assert solve(lambda x: 1.0 / (1 + x), 2.0, 1.0, 1e6) == 1e-6
    assert solve(lambda x: 0.0, 2.0, 1.0, 1e6) == 1e-6


@pytest.mark.parametrize("guess", [0.5, 4.9, 5.0, 5.3, 80.0])
def test_settle_lands_at_or_just_below_the_budget(guess):
    asked: list[float] = []

    def promised(x: float) -> float:
        asked.append(x)
        return 10 / x

    found = settle(promised, 2.0, guess, 1e6)
    assert ACCEPT * 2.0 <= 10 / found <= 2.0
    assert len(asked) <= 16


@settings(max_examples=200, deadline=None)
@given(budget=st.floats(1e-3, 50), power=st.floats(0.2, 3), excess=st.floats(0.9, 1.1), grain=st.floats(0, 0.02))
def test_what_settle_and_nudge_return_is_within_the_budget(budget, power, excess, grain):
    """However near the guess is, and however rough the function: not above the budget by the last digit."""

    def promised(x: float) -> float:
        value = excess * budget / x**power
        return value * (1 + grain * math.sin(1000 * x))

    found = settle(promised, budget, 1.0, 1e6)
    assert promised(found) <= budget
    near = nudge(lambda x: budget * x**-power * (1 + 1e-13), budget, 1.0)
    assert budget * near**-power * (1 + 1e-13) <= budget


def test_settle_never_returns_what_does_not_fit():
    assert settle(lambda x: 2.5 + 1 / x, 2.0, 3.0, 1e6) is None
    assert settle(lambda x: 2.5, 2.0, math.inf, 1e6) is None
    # a function with steps, and one with a floor just under the budget
    for promised in (lambda x: math.ceil(10 / x), lambda x: 1.99 + 1 / x):
        assert promised(settle(promised, 2.0, 3.0, 1e6)) <= 2.0


def test_nudge_takes_the_first_value_that_fits():
    assert nudge(lambda x: 10 / x, 2.0, 5.0) == pytest.approx(5.0, rel=1e-12)
    assert 10 / nudge(lambda x: 10 / x, 2.0, 5.0 * (1 - 1e-9)) <= 2.0
    assert nudge(lambda x: 10 / x, 2.0, 4.0) is None


# ---------------------------------------------------------------- with the accountants

RATE = 4096 / 50000
PROBE = (GaussianEvent(40.0, 1.0, 60),)

# (ε, δ, q, T, spent, the published σ). The first three are the settings of Tang et al. 2023 for CIFAR-10.
CALIBRATIONS = [
    (1.0, 1e-5, RATE, 875, (), 9.20),
    (3.0, 1e-5, RATE, 1593, (), 4.65),
    (8.0, 1e-5, RATE, 2500, (), 2.58),
    (0.01, 1e-5, RATE, 100, (), None),
    (0.05, 1e-5, 1e-3, 1000, (), None),
    (1.0, 1e-5, RATE, 779, PROBE, None),
    (1.0, 1e-5, 1.0, 60, (GaussianEvent(9.3, RATE, 96),), None),
    (3.0, 1e-6, 0.5, 60, (), None),
    (20.0, 1e-5, 0.1, 20, (), None),
    (1.0, 1e-9, 0.02, 500, (), None),
]


def forget_everything():
    for cached in (accounting._calibrate, accounting._compose_sampled, analytic.log_moment, analytic._participations):
        cached.cache_clear()


@pytest.mark.parametrize(("epsilon", "delta", "q", "steps", "spent", "published"), CALIBRATIONS)
def test_calibration_is_quick_and_lands_just_below_its_target(epsilon, delta, q, steps, spent, published):
    forget_everything()
    start = time.process_time()
    sigma = calibrate(epsilon, delta, q, steps, spent)
    assert time.process_time() - start < 2.0  # 0.1 to 0.4 s on an idle core, 1.3 s for q = 1e-3
    upper = compose([*spent, GaussianEvent(sigma, q, steps)], delta).upper
    assert 0.995 * epsilon <= upper <= epsilon
    if published:
        assert sigma == pytest.approx(published, rel=0.01)
        assert sigma < 1.0015 * published  # no more noise than was published, but for its two digits


@pytest.mark.parametrize(("epsilon", "steps", "spent"), [(1, 60, ()), (8, 150, (GaussianEvent(20.0, 1.0, 40),))])
def test_calibration_of_full_batches_is_exact(epsilon, steps, spent):
    sigma = calibrate(epsilon, 1e-5, 1.0, steps, spent)
    upper = compose([*spent, GaussianEvent(sigma, 1.0, steps)], 1e-5).upper
    assert epsilon * (1 - 1e-8) <= upper <= epsilon


def test_calibration_survives_the_fallback_aloud():
    said: list[str] = []
    sigma = calibrate(1.0, 1e-18, 0.01, 100, warn=said.append)
    assert said
    assert compose([GaussianEvent(sigma, 0.01, 100)], 1e-18, said.append).upper <= 1.0


def test_an_exhausted_budget_is_refused_with_both_numbers():
    spent = [GaussianEvent(9.0, 0.1, 800)]
    with pytest.raises(BudgetError, match=r"already spent ε = 1\.\d+ .* uses up ε = 1") as caught:
        calibrate(1.0, 1e-5, 0.1, 10, spent)
    assert caught.value.exit_code == 5
    assert "--eps" not in caught.value.fix  # the budget of a run that has begun is fixed
    assert "new run" in caught.value.fix


def test_a_sliver_of_budget_is_respected():
    spent = [GaussianEvent(9.3, 0.08192, 96)]
    target = compose(spent, 1e-5).upper * 1.02
    sigma = calibrate(target, 1e-5, 0.08192, 20, spent)
    assert compose([*spent, GaussianEvent(sigma, 0.08192, 20)], 1e-5).upper <= target


@pytest.mark.parametrize("rate", [0.08192, 1.0])
def test_less_than_the_accountant_resolves_is_refused(rate):
    spent = [GaussianEvent(9.3, rate, 10)]
    with pytest.raises(BudgetError, match="already spent"):
        calibrate(compose(spent, 1e-5).upper * 1.004, 1e-5, rate, 500, spent)


def test_when_no_noise_fits_the_budget_refuses(monkeypatch):
    monkeypatch.setattr(accounting, "settle", lambda *arguments: None)
    with pytest.raises(BudgetError, match=r"^ε = 1\.2345 .* too little") as fresh:
        calibrate(1.2345, 1e-5, 0.5, 3)
    assert "larger --eps" in fresh.value.fix
    with pytest.raises(BudgetError, match=r"What is left of ε = 1\.2345 .* too little") as begun:
        calibrate(1.2345, 1e-5, 0.5, 3, [GaussianEvent(100.0, 1.0, 1)])
    assert "larger --eps" not in begun.value.fix
    assert "new run" in begun.value.fix


def test_senseless_epsilon_is_refused_and_an_infinite_one_needs_no_noise():
    for epsilon in (0.0, -1.0, math.nan):
        with pytest.raises(UsageError, match="epsilon is"):
            calibrate(epsilon, 1e-5, 0.1, 10)
    assert calibrate(math.inf, 1e-5, 0.1, 10) == 0.0
