"""ε over the whole range of parameters, with every Python warning an error.

Oracles, independent of the accountants: *above*, Rényi DP by dp-accounting; *below*, what a simple attacker reaches,
who adds up all releases and compares the sum with a threshold.
"""

from __future__ import annotations

import itertools
import math
import re
import sys

import numpy as np
import pytest
from dp_accounting.rdp.rdp_privacy_accountant import _compute_log_a
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scipy.special import gammaln, log_ndtr, logsumexp
from scipy.stats import binom
from typer.testing import CliRunner

from dprandp.cli import app
from dprandp.errors import BudgetError, DprandpError
from dprandp.privacy import accounting
from dprandp.privacy.accounting import GaussianEvent, calibrate, compose
from dprandp.privacy.analytic import log_moment
from dprandp.privacy.neighbours import (
    REPLACE_ONE,
    calibrate_adjacency,
    compose_adjacency,
    moved_epsilon,
)

pytestmark = pytest.mark.filterwarnings("error")

PART_ORDERS = (1.02, 1.05, 1.1, 1.2, 1.35, 1.5, 1.75)
WHOLE_ORDERS = (*range(2, 33), *(round(2 ** (n / 2)) for n in range(11, 30)))

Point = tuple[float, float, int, float]
"""σ, q, T, δ."""


def silent(sentence: str) -> None:
    pass


def log_moment_at_whole_order(q: float, sigma: float, order: int) -> float:
    """log A(α): A(α) − 1 = Σ_k binom(α, k) q^k (1 − q)^(α−k) (exp(k (k − 1)/(2σ²)) − 1), of which no term is negative
    (Mironov et al. 2019, §3.3)."""
    k = np.arange(2, order + 1, dtype=float)
    exponent = k * (k - 1) / (2 * sigma**2)
    grown = np.where(exponent < 30, np.log(np.expm1(np.minimum(exponent, 30))), exponent)
    log_binomial = gammaln(order + 1) - gammaln(k + 1) - gammaln(order - k + 1)
    terms = log_binomial + k * math.log(q) + (order - k) * math.log1p(-q) + grown
    return float(np.logaddexp(0, logsumexp(terms)))


def renyi_oracle(sigma: float, q: float, steps: int, delta: float) -> float:
    """ε by Balle et al. 2020, Theorem 21; dp-accounting's series between whole orders, where it converges quickly."""
    best = math.inf
    for order in (*PART_ORDERS, *WHOLE_ORDERS):
        if q == 1:
            divergence = order / (2 * sigma**2)
        elif order in WHOLE_ORDERS:
            divergence = log_moment_at_whole_order(q, sigma, order) / (order - 1)
        elif 0.3 <= sigma <= 2 and q <= 0.05:
            # what cancellation may take from the library's logarithm is added
            divergence = (max(_compute_log_a(q, sigma, order), 0.0) * (1 + 1e-12) + 1e-12) / (order - 1)
        else:
            continue
        conversion = math.log1p(-1 / order) - math.log(delta * order) / (order - 1)
        best = min(best, max(0.0, steps * divergence + conversion))
    return best


def reached(sigma: float, q: float, steps: int, epsilon: float) -> float:
    """δ that a threshold on the sum reaches at ``epsilon``, whichever side is guessed. Numbers of participations that
    are left out only make it smaller."""
    mean, spread = q * steps, math.sqrt(q * (1 - q) * steps)
    low, high = max(0, math.floor(mean - 8 * spread - 8)), min(steps, math.ceil(mean + 8 * spread + 8))
    counts = np.unique(np.linspace(low, high, 400).round())
    # a count stands for those up to the next one: rounded down for "above", up for "below"
    chances = np.diff(binom.cdf(np.append(counts - 1, high), steps, q))
    width = math.sqrt(steps) * sigma
    best = 0.0
    for threshold in np.linspace(-9, counts[-1] / width + 9, 200):
        log_without = float(log_ndtr(-threshold))
        above = float(np.dot(chances, np.exp(log_ndtr(counts / width - threshold))))
        best = max(best, above - math.exp(min(epsilon + log_without, 700)))
        following = np.append(counts[1:] - 1, high)  # where every count stands for itself alone
        if np.array_equal(following, counts):
            log_with = float(logsumexp(log_ndtr(threshold - counts / width), b=chances))
            best = max(best, math.exp(log_ndtr(threshold)) - math.exp(min(epsilon + log_with, 700)))
    return best


def check(point: Point) -> None:
    sigma, q, steps, delta = point
    bound = compose([GaussianEvent(sigma, q, steps)], delta, silent)
    assert 0 <= bound.lower <= bound.estimate <= bound.upper < math.inf
    assert bound.upper <= renyi_oracle(*point) * (1 + 1e-5) + 1e-12, bound
    assert reached(sigma, q, steps, bound.upper) <= delta * (1 + 1e-6) + 1e-16 * math.sqrt(steps), bound


CORNERS = list(itertools.product((1e-3, 1e6), (1e-8, 1.0), (1, 10**7), (1e-15, 0.1)))
EDGES = [
    (56.0, 1e-4, 10**6, 1e-10), (0.3, 0.01, 1000, 1e-10), (0.05, 0.3, 30, 1e-5), (1.0, 1 - 1e-9, 100, 1e-5),
    (2.0, 1e-6, 10**6, 1e-9),
]  # fmt: skip
GRID = list(
    itertools.product(
        (1e-3, 0.03, 0.3, 1.0, 30.0, 1e3, 1e6),
        (1e-8, 1e-4, 0.01, 0.5, 1 - 1e-9, 1.0),
        (1, 30, 10**4, 10**7),
        (1e-15, 1e-5, 0.1),
    )
)


def log_uniform(low: float, high: float) -> st.SearchStrategy[float]:
    ends = math.log(low), math.log(high)
    return st.floats(*ends).map(lambda value: min(max(math.exp(value), low), high))


POINTS = st.tuples(
    log_uniform(1e-3, 1e6), log_uniform(1e-8, 1.0), log_uniform(1, 1e7).map(round), log_uniform(1e-15, 0.1)
)
quickly = settings(
    max_examples=20, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
)
at_length = settings(quickly, max_examples=600)


@pytest.mark.parametrize("point", [*CORNERS, *EDGES], ids=str)
def test_epsilon_lies_between_an_attack_and_renyi_dp_at_the_corners(point):
    check(point)


@pytest.mark.slow
@given(POINTS)
@quickly
def test_epsilon_lies_between_an_attack_and_renyi_dp_anywhere(point):
    check(point)


@pytest.mark.slow
def test_epsilon_lies_between_an_attack_and_renyi_dp_on_the_whole_grid():
    for point in GRID:
        check(point)


@pytest.mark.slow
@given(POINTS)
@at_length
def test_epsilon_lies_between_an_attack_and_renyi_dp_at_many_points(point):
    check(point)


@pytest.mark.parametrize(
    ("accounted", "point"),
    [(GaussianEvent(10.5, 0.5, 400), (10.0, 0.5, 400, 1e-5)),
     (GaussianEvent(1.4, 0.01, 1000), (2.0, 0.01, 1000, 1e-5))],
)  # fmt: skip
def test_the_check_notices_a_bound_that_is_too_small_or_too_large(monkeypatch, accounted, point):
    """Positive control: noise that is 5 % smaller than what is accounted for; and an ε that is wasteful."""
    honest = compose
    monkeypatch.setattr(sys.modules[__name__], "compose", lambda events, *rest: honest([accounted], *rest))
    with pytest.raises(AssertionError):
        check(point)


@pytest.mark.parametrize("q", [1e-8, 1e-3, 0.3])
@pytest.mark.parametrize("sigma", [0.3, 1.0, 20.0, 1e4])
def test_moments_equal_the_closed_sum_at_whole_orders(q, sigma):
    for alpha in (2, 3, 7, 20, 400):
        exact = log_moment_at_whole_order(q, sigma, alpha)
        assert exact * (1 - 1e-9) <= log_moment(q, sigma, alpha - 1.0) <= exact * (1 + 1e-7)


# ---------------------------------------------------------------- calibration


def check_calibration(epsilon: float, q: float, steps: int, delta: float) -> None:
    """A σ is found wherever the largest fits, by our accountant or by the oracle; and what is found fits."""
    largest = accounting.MAX_NOISE_MULTIPLIER
    possible = min(
        compose([GaussianEvent(largest, q, steps)], delta, silent).upper, renyi_oracle(largest, q, steps, delta)
    ) <= epsilon  # fmt: skip
    try:
        sigma = calibrate(epsilon, delta, q, steps, warn=silent)
    except BudgetError:
        assert not possible
        return
    assert compose([GaussianEvent(sigma, q, steps)], delta, silent).upper <= epsilon
    taken_part = -math.expm1(steps * math.log1p(-q)) if q < 1 else 1.0
    # the search ends where hardly any noise is enough; where δ covers the chance of being drawn at all, all noise fits
    if sigma > 2e-6 and delta < 0.5 * taken_part:
        assert compose([GaussianEvent(0.9 * sigma, q, steps)], delta, silent).upper > 0.99 * epsilon


BUDGETS = [
    (0.01, 1e-4, 10**6, 1e-10), (1e-4, 1e-8, 10**7, 1e-15), (1e-6, 0.5, 10**7, 1e-15), (30.0, 0.5, 10**7, 1e-10),
    (1e6, 0.01, 1000, 1e-5), (0.5, 1e-8, 10, 1e-5), (1e-9, 1.0, 10**7, 1e-15),
]  # fmt: skip


@pytest.mark.parametrize("budget", BUDGETS, ids=str)
def test_calibration_finds_noise_wherever_there_is_enough(budget):
    check_calibration(*budget)


@pytest.mark.slow
@given(st.tuples(log_uniform(1e-6, 1e4), log_uniform(1e-8, 1), log_uniform(1, 1e7).map(round), log_uniform(1e-15, 0.1)))
@settings(at_length, max_examples=100)
def test_calibration_finds_noise_at_many_points(budget):
    check_calibration(*budget)


@pytest.mark.parametrize(("q", "steps", "delta"), [(1e-3, 10**7, 1e-14), (0.5, 10**6, 1e-12)])
def test_calibration_for_replacing_finds_noise_where_the_grid_refuses(q, steps, delta):
    sigma = calibrate_adjacency(1.0, delta, q, steps, REPLACE_ONE, silent)
    assert compose_adjacency([GaussianEvent(sigma, q, steps)], delta, REPLACE_ONE, silent).upper <= 1.0


# ---------------------------------------------------------------- groups, replacing, attacks


def test_moved_records_are_covered_in_one_step():
    """Replacing a record of one step: the area between two mixtures that lie 2C apart."""
    q, sigma, delta = 0.05, 0.4, 1e-4
    epsilon, _ = moved_epsilon(accounting.components_of([GaussianEvent(sigma, q, 1)]), delta, 2)
    x = np.linspace(-10, 10, 400_001)
    bell = np.exp(-(x**2) / (2 * sigma**2))
    here, there = (
        (1 - q) * bell + q * np.exp(-((x - side) ** 2) / (2 * sigma**2)) for side in (1, -1)
    )  # fmt: skip
    area = np.trapezoid(np.maximum(here - math.exp(epsilon) * there, 0), x) / np.trapezoid(bell, x)
    assert area <= delta * (1 + 1e-6)


# ---------------------------------------------------------------- the command line

SANE = [
    (0.3, 0.01, 1000, 1e-5), (0.001, 1e-8, 10_000_000, 1e-15), (1e6, 0.01, 10_000_000, 1e-15), (0.001, 0.5, 1, 0.1),
    (0.01, 1.0, 10_000_000, 1e-5),
]  # fmt: skip
BEYOND = [
    "--noise-multiplier 1e300 --curve", "--noise-multiplier 1e300 --adjacency replace-one --sample-rate 0.5",
    "--noise-multiplier 1e155 --sample-rate 0.5",
    "--noise-multiplier 1e155 --sample-rate 0.5 --group-size 3", "--noise-multiplier 1e160 --delta 1e-300",
    "--noise-multiplier 1e-100 --adjacency replace-one", "--noise-multiplier 1e-100 --sample-rate 0.5 --json",
    "--noise-multiplier 1e-300", "--noise-multiplier 2 --sample-rate 1e-320 --steps 100",
    "--noise-multiplier 2 --sample-rate 0.1 --delta 1e-320",
    "--noise-multiplier 2 --sample-rate 0.1 --delta 0.9999999999999999", f"--noise-multiplier 2 --steps {10**400}",
    f"--noise-multiplier 2e6 --steps {10**15} --sample-rate 0.1", f"--noise-multiplier 2 --group-size {10**400}",
    f"--noise-multiplier 2 --sample-rate 0.1 --group-size {10**15}", "--eps 1e-320", "--eps 1e-320 --sample-rate 1e-3",
    "--eps 1e150 --sample-rate 0.1", "--eps 1e300",
]  # fmt: skip


def account(arguments: tuple[object, ...]) -> int:
    """Exit code of the command in this process; any exception but the package's own is a failure."""
    result = CliRunner().invoke(app, ["account", *map(str, arguments)])
    if isinstance(result.exception, DprandpError):
        return result.exception.exit_code
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert re.search(r"\bnan\b", result.output, re.IGNORECASE) is None
    return result.exit_code


@pytest.mark.slow
def test_the_command_line_answers_everywhere():
    options = [("--json",), ("--adjacency", "replace-one"), ("--group-size", 7), ("--json",), ("--curve",)]
    for (sigma, q, steps, delta), more in zip(SANE, options, strict=True):
        arguments = ("--noise-multiplier", sigma, "--sample-rate", q, "--steps", steps, "--delta", delta, *more)
        assert account(arguments) == 0, arguments


@pytest.mark.slow
def test_the_command_line_answers_or_refuses_what_is_beyond_doubles():
    for arguments in BEYOND:
        assert account(tuple(arguments.split())) in (0, 2, 5), arguments


def test_a_sampling_rate_below_all_sense_still_costs():
    """δ at ε = 0 is about q T: no less than 1e-185 here."""
    assert compose([GaussianEvent(1 / 30, 1e-200, 10**15)], 5e-193).upper > 0
    assert compose([GaussianEvent(1 / 30, 1e-200, 10**15)], 1e-150).upper >= 0
