"""The one-run bound against everything that can be enumerated."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from scipy.optimize import linprog

from dprandp.errors import UsageError
from dprandp.privacy.auditing.games import (
    choose_guesses,
    count_correct,
    one_run_bound,
    one_run_epsilon,
    one_run_p_value,
)


def tail(guesses: int, correct: int, rate: float) -> float:
    """P[Binomial(guesses, rate) ≥ correct], outcome by outcome."""
    return sum(
        math.prod(rate if right else 1 - rate for right in outcome)
        for outcome in itertools.product((0, 1), repeat=guesses)
        if sum(outcome) >= correct
    )


def rate_of(epsilon: float) -> float:
    return math.exp(epsilon) / (1 + math.exp(epsilon))


@pytest.mark.parametrize("epsilon", [0.0, 0.7, 3.0])
def test_without_delta_it_is_the_binomial_tail(epsilon: float) -> None:
    for guesses in range(8):
        for correct in range(guesses + 1):
            expected = tail(guesses, correct, rate_of(epsilon))
            assert one_run_p_value(9, guesses, correct, epsilon, 0.0) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize(("canaries", "guesses"), [(4, 4), (7, 5), (8, 8)])
@pytest.mark.parametrize("delta", [1e-3, 0.02])
def test_delta_term_is_the_worst_gift_of_right_guesses(canaries: int, guesses: int, delta: float) -> None:
    """The theorem's proof gives the attacker F more right guesses, F of any distribution on 0 … m with mean 2mδ at
    most, and takes the worst: a linear program."""
    for epsilon in (0.0, 1.0, 2.0):
        for correct in range(guesses + 1):
            gains = [tail(guesses, max(0, correct - gift), rate_of(epsilon)) for gift in range(canaries + 1)]
            best = linprog(
                [-gain for gain in gains],
                A_ub=[list(range(canaries + 1))], b_ub=[2 * canaries * delta],
                A_eq=[[1.0] * (canaries + 1)], b_eq=[1.0],
            )  # fmt: skip
            assert one_run_p_value(canaries, guesses, correct, epsilon, delta) == pytest.approx(-best.fun, rel=1e-6)


@pytest.mark.parametrize("delta", [0.0, 0.01, 0.1])
def test_it_holds_for_the_leakiest_mechanism(delta: float) -> None:
    """Each canary is given away with probability δ, else answered by randomised response: (ε, δ)-DP, exactly."""
    for epsilon in (0.0, 0.5, 2.0):
        rate = delta + (1 - delta) * rate_of(epsilon)
        for correct in range(9):
            assert tail(8, correct, rate) <= one_run_p_value(8, 8, correct, epsilon, delta) + 1e-12
    # without the term for δ it would not hold
    assert tail(8, 8, 0.1 + 0.9 * rate_of(0.5)) > one_run_p_value(8, 8, 8, 0.5, 0.0)


@pytest.mark.parametrize(("guesses", "correct"), [(50, 45), (200, 140), (200, 100), (30, 30)])
@pytest.mark.parametrize("delta", [0.0, 1e-5])
def test_epsilon_is_the_largest_refuted_on_a_grid(guesses: int, correct: int, delta: float) -> None:
    found = one_run_epsilon(200, guesses, correct, delta, 0.01)
    grid = np.arange(0, 6, 0.02)
    p_values = np.array([one_run_p_value(200, guesses, correct, value, delta) for value in grid])
    refuted = grid[p_values <= 0.01].tolist()
    assert all(np.diff(p_values) >= -1e-9)
    assert found == 0.0 if not refuted else refuted[-1] <= found + 1e-5 < refuted[-1] + 0.0202


def test_a_large_delta_proves_nothing() -> None:
    assert one_run_epsilon(1000, 1000, 1000, 0.1, 1e-3) == 0.0
    assert one_run_epsilon(1000, 1000, 1000, 1e-5, 1e-3) > 4


def test_error_rate_of_randomised_response() -> None:
    """ε = 1, exactly kept: the bound is above it in 5 % of the runs at most; a mechanism of ε = 2 is found out."""
    random = np.random.default_rng(0)
    above = {1.0: 0, 2.0: 0}
    for epsilon in above:
        for _ in range(200):
            correct = int(random.binomial(1000, rate_of(epsilon)))
            above[epsilon] += one_run_epsilon(1000, 1000, correct, 0.0, 0.05) > 1.0
    assert above[1.0] <= 24  # 10 expected at most
    assert above[2.0] == 200


def test_guesses_are_counted_from_both_ends() -> None:
    scores = np.array([0.3, -2.0, 5.0, 0.1, 1.0, -1.0])
    included = np.array([False, True, True, False, True, False])
    order = np.argsort(scores)
    for guesses in range(7):
        out, taken = order[: guesses // 2], order[6 - (guesses - guesses // 2) :]
        expected = sum(not included[i] for i in out) + sum(bool(included[i]) for i in taken)
        assert count_correct(scores, included, guesses) == expected
    assert count_correct(scores, included, 1) == 1
    assert one_run_bound(scores, included, 2, 0.0, 0.05).correct == 1


def test_number_of_guesses_comes_from_simulation() -> None:
    def draw(random: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        included = random.random(600) < 0.5
        return random.standard_normal(600) + 2.0 * included, included

    guesses, mean = choose_guesses(draw, 1e-5, 1e-3, seed=0, repeats=3)
    assert choose_guesses(draw, 1e-5, 1e-3, seed=0, repeats=3) == (guesses, mean)
    assert guesses < 600  # abstaining pays
    assert 1 < mean < 8
    hopeless = choose_guesses(lambda random: (random.standard_normal(50), random.random(50) < 0.5), 1e-5, 1e-3, 0)
    assert hopeless == (50, 0.0)


@pytest.mark.parametrize(
    "arguments", [(3, 4, 1, 1, 0), (3, 2, 3, 1, 0), (0, 0, 0, 1, 0), (3, 2, 1, -1, 0), (3, 2, 1, 1, 2)]
)
def test_senseless_counts_are_refused(arguments: tuple) -> None:
    with pytest.raises(UsageError):
        one_run_p_value(*arguments)
