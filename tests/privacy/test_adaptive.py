"""The filter over stages: covers against an independent accountant, and an adversary who plans after a look."""

from __future__ import annotations

import math

import numpy as np
import pytest
from dp_accounting.pld import privacy_loss_distribution as pld
from scipy.stats import norm

from dprandp.errors import BudgetError
from dprandp.privacy import adaptive
from dprandp.privacy.accounting import GaussianEvent, calibrate, compose
from dprandp.privacy.adaptive import SLACK, calibrate_stage, compose_stages, cover
from dprandp.privacy.gaussian_dp import gaussian_dp_epsilon, gaussian_dp_mu
from dprandp.privacy.selection import make_selection_plan
from dprandp.privacy.tuning import TrialCount, TuningEvent

STAGES = [
    GaussianEvent(9.2, 0.08192, 875),
    GaussianEvent(0.8, 0.001, 5000),
    GaussianEvent(12.0, 0.5, 60),
    GaussianEvent(1.2, 0.02, 3),
]


def gaussian_delta(mu: float, epsilons: np.ndarray) -> np.ndarray:
    return norm.cdf(mu / 2 - epsilons / mu) - np.exp(epsilons + norm.logcdf(-mu / 2 - epsilons / mu))


def oracle(event: GaussianEvent, mesh: float) -> pld.PrivacyLossDistribution:
    """By another library, in both directions; its rounding is upwards, by a mesh a step at most."""
    one = pld.from_gaussian_mechanism(
        event.noise_multiplier, sampling_prob=event.sample_rate, value_discretization_interval=mesh
    )
    return one.self_compose(event.steps)


@pytest.mark.parametrize("event", STAGES)
def test_a_cover_lies_above_the_curve_and_not_far(event: GaussianEvent) -> None:
    slack = 1e-7
    mu = cover([event], slack)
    truth = oracle(event, 1e-4)
    epsilons = np.concatenate([np.linspace(0, 6 * mu, 60), np.linspace(6 * mu, 12 * mu, 20)])
    deltas = np.array([truth.get_delta_for_epsilon(float(epsilon)) for epsilon in epsilons])
    assert (deltas <= gaussian_delta(mu, epsilons) * (1 + 1e-3) + slack).all()
    assert (deltas > gaussian_delta(0.97 * mu, epsilons) * (1 + 1e-3) + slack).any()  # it could not be much smaller


def test_a_cover_is_never_above_the_full_batch() -> None:
    for rate in (1e-6, 0.3, 0.999999):
        assert cover([GaussianEvent(3.0, rate, 10)], 1e-8) <= math.sqrt(10) / 3.0 * (1 + 1e-12)
    assert cover([GaussianEvent(0.0, 0.5, 1)], 1e-8) == math.inf
    for rate in (1.0, 0.5):  # a stage without noise
        assert compose_stages([[GaussianEvent(0.0, rate, 1)], [STAGES[0]]], 1e-5).upper == math.inf


# ------------------------------------------------------------------------------------------------------- composition


def test_one_stage_is_composed_numerically() -> None:
    for event in (*STAGES, GaussianEvent(40.0, 1.0, 60)):
        assert compose_stages([[event], []], 1e-5) == compose([event], 1e-5)


def test_full_batches_add_in_squares() -> None:
    stages = [[GaussianEvent(40.0, 1.0, 60)], [GaussianEvent(30.0, 1.0, 5), GaussianEvent(9.0, 1.0, 1)]]
    mu = math.sqrt(60 / 1600 + 5 / 900 + 1 / 81)
    assert compose_stages(stages, 1e-5).upper == pytest.approx(gaussian_dp_epsilon(mu, 1e-5 * (1 - SLACK)), rel=1e-9)


@pytest.mark.slow
@pytest.mark.parametrize(("event", "share"), [*zip(STAGES, (0.01, 0.3, 0.01, 0.5), strict=True)])
@pytest.mark.parametrize("probe", [25.0])
def test_not_below_numerical_composition_and_close_to_it(event: GaussianEvent, share: float, probe: float) -> None:
    first = GaussianEvent(probe, 1.0, 60)
    together = compose_stages([[first], [event]], 1e-5)
    fixed = compose([first, event], 1e-5)
    assert fixed.lower <= together.upper <= fixed.upper * (1 + share)
    assert together.accountant == "Gaussian-DP filter over stages"


@pytest.mark.slow
def test_the_order_of_stages_and_their_number_are_bounded_by_one_slack() -> None:
    event = GaussianEvent(20.0, 0.1, 50)
    for count in (2, 30):
        total = compose_stages([[event]] * count, 1e-5).upper
        assert total >= compose([GaussianEvent(20.0, 0.1, 50 * count)], 1e-5).lower
        assert math.isfinite(total)


def test_the_slacks_of_all_stages_are_within_what_is_set_aside(monkeypatch: pytest.MonkeyPatch) -> None:
    given = []
    monkeypatch.setattr(adaptive, "cover", lambda events, slack, warn: given.append(slack) or 0.1)
    compose_stages([[STAGES[0]], [GaussianEvent(40.0, 1.0, 60)], *[[event] for event in STAGES]] * 5, 1e-5)
    assert len(given) == 25
    assert 0.4 * SLACK * 1e-5 < sum(given) <= SLACK * 1e-5


def test_discrete_noise_costs_its_distance() -> None:
    stages = [[GaussianEvent(40.0, 1.0, 60, True)], [GaussianEvent(9.2, 0.08192, 100, True)]]
    plain = [[GaussianEvent(40.0, 1.0, 60)], [GaussianEvent(9.2, 0.08192, 100)]]
    discrete = compose_stages(stages, 1e-5)
    assert compose_stages(plain, 1e-5).upper < discrete.upper < compose_stages(plain, 1e-5).upper * 1.001
    assert "discrete" in discrete.accountant


# ------------------------------------------------------------------------------------------------------- calibration


@pytest.mark.slow
@pytest.mark.parametrize(
    ("epsilon", "delta", "rate", "steps"),
    [(1.0, 1e-5, 0.08192, 875), (2.0, 1e-6, 1.0, 40), (1.0, 1e-9, 0.05, 20), (1.0, 1e-5, 0.01, 500)],
)
def test_calibration_keeps_the_budget_and_uses_it(epsilon: float, delta: float, rate: float, steps: int) -> None:
    probe = [GaussianEvent(calibrate(0.3 * epsilon, delta, 1.0, 60), 1.0, 60)]
    sigma = calibrate_stage(epsilon, delta, rate, steps, [probe])
    total = compose_stages([probe, [GaussianEvent(sigma, rate, steps)]], delta).upper
    assert 0.99 * epsilon <= total <= epsilon
    fixed = calibrate(epsilon, delta, rate, steps, probe)
    assert fixed * 0.995 <= sigma <= fixed * (1.01 if steps * rate > 10 or rate == 1 else 1.04)


@pytest.mark.parametrize(("steps", "discrete"), [(1, False), (3, True), (7, False), (40, True), (41, False)])
def test_calibration_of_full_batches_is_exact_and_not_above(steps: int, discrete: bool) -> None:
    for first in (2, 3, 60):
        probe = [GaussianEvent(4.47 * math.sqrt(first), 1.0, first)]
        sampled = [GaussianEvent(3.1, 0.2, 4, discrete)]
        sigma = calibrate_stage(4.0, 1e-5, 1.0, steps, [probe, sampled], discrete=discrete)
        total = compose_stages([probe, sampled, [GaussianEvent(sigma, 1.0, steps, discrete)]], 1e-5).upper
        assert 4.0 * (1 - 1e-5) <= total <= 4.0


def test_a_spent_budget_is_refused() -> None:
    probe = [GaussianEvent(calibrate(1.0, 1e-5, 1.0, 60), 1.0, 60)]
    for rate in (1.0, 0.1):
        with pytest.raises(BudgetError):
            calibrate_stage(1.0, 1e-5, rate, 10, [probe])


def test_tuning_comes_first_or_not_at_all() -> None:
    public = {
        "stage": "tune", "epsilon": 4.0, "delta": 1e-5, "epsilon_target": 2.0, "examples": 1000,
        "mean_trials": 5.0, "eta": 0.0, "held_out": 0.2, "clip_norm": 1.0, "steps": [3, 4],
    }  # fmt: skip
    plan = make_selection_plan(**public, spent=[])
    with pytest.raises(BudgetError, match="comes first"):
        make_selection_plan(**public, spent=[[GaussianEvent(100.0, 1.0, 1)]])
    sigma = calibrate_stage(4.0, 1e-5, 0.1, 50, [[plan.event]])
    assert compose_stages([[plan.event], [GaussianEvent(sigma, 0.1, 50)]], 1e-5).upper <= 4.0
    trials = TrialCount.with_mean(5.0, 0.0)
    tuning = TuningEvent(0.1, trials.eta, trials.gamma)
    together = compose_stages([[tuning], [GaussianEvent(50.0, 1.0, 10)]], 1e-5)
    assert together.upper > compose([tuning], 1e-5).upper


# ------------------------------------------------------------------------- an adversary who plans after having looked

LOOK = 60.0, 60  # noise and steps of the probe
CHOICES = ((1.0, 1), (0.2, 20), (0.004, 50), (0.0005, 20))
MESH = 5e-4


def adaptive_delta(epsilon: float, choices: list[pld.PrivacyLossDistribution]) -> float:
    """δ at ε of: run the probe, look at its outcome, then take the choice that is worst for that outcome.

    E over the probe's outcome, under its law with the record, of the largest δ_choice(ε − loss of the outcome).
    """
    mu = math.sqrt(LOOK[1]) / LOOK[0]
    losses = np.linspace(mu**2 / 2 - 9 * mu, mu**2 / 2 + 9 * mu, 401)
    weights = norm.pdf(losses, mu**2 / 2, mu) * (losses[1] - losses[0])
    rest = (epsilon - losses)[::-1]  # ascending
    worst = np.max([each.get_delta_for_epsilon(rest.tolist()) for each in choices], axis=0)
    return float(weights[::-1] @ worst)


SOME_CHOICES = pytest.mark.parametrize(
    "some", [(CHOICES[0], CHOICES[2]), pytest.param(CHOICES, marks=pytest.mark.slow)], ids=len
)


@pytest.mark.slow
@SOME_CHOICES
def test_no_choice_after_a_look_breaks_the_filter(some: tuple) -> None:
    """Choices of very different curves, each as large as the filter allows."""
    epsilon, delta = 1.0, 1e-5
    probe = [GaussianEvent(LOOK[0], 1.0, LOOK[1])]
    choices = []
    for rate, steps in some:
        event = GaussianEvent(calibrate_stage(epsilon, delta, rate, steps, [probe]), rate, steps)
        choices.append(oracle(event, MESH))
    alone = [adaptive_delta(epsilon, [each]) for each in choices]
    together = adaptive_delta(epsilon, choices)
    assert max(alone) <= delta * 1.002  # the oracle rounds upwards
    assert max(alone) <= together <= delta * 1.002


@pytest.mark.slow
@SOME_CHOICES
def test_numerical_composition_alone_is_no_filter(some: tuple) -> None:
    """Control: the same adversary with plans that numerical composition allows goes beyond δ."""
    epsilon, delta = 1.0, 1e-5
    choices = []
    for rate, steps in some:
        sigma = calibrate(epsilon, delta, rate, steps, [GaussianEvent(LOOK[0], 1.0, LOOK[1])])
        choices.append(oracle(GaussianEvent(sigma, rate, steps), MESH))
    alone = [adaptive_delta(epsilon, [each]) for each in choices]
    assert max(alone) <= delta * 1.002
    assert adaptive_delta(epsilon, choices) > delta * 1.3


def test_a_rounded_gaussian_is_below_the_exact_one() -> None:
    epsilons = np.linspace(0, 8, 200)
    for mu in (0.01, 0.3, 1.7, 5.0):
        least = adaptive._least_delta(mu, epsilons)
        assert (least <= gaussian_delta(mu, epsilons) + 1e-18).all()
        assert (least >= gaussian_delta(mu, epsilons) - 1e-13).all()
    assert gaussian_dp_mu(1.0, 1e-5) == pytest.approx(0.268, abs=1e-3)
