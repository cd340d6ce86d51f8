"""Second and third opinions: they agree with what is reported, a contradiction is an error, a missing one says why."""

from __future__ import annotations

import math
from dataclasses import replace

import prv_accountant
import pytest

from dprandp.errors import AuditError
from dprandp.inspection import account as calculator
from dprandp.inspection.verify import TUNED
from dprandp.privacy import opinions
from dprandp.privacy.accounting import GaussianEvent, compose
from dprandp.privacy.adaptive import compose_stages
from dprandp.privacy.opinions import Opinion, refuse_contradiction, second_opinions
from dprandp.privacy.tuning import TrialCount, TuningEvent

RUNS = [
    [GaussianEvent(9.2, 0.08192, 875)],
    [GaussianEvent(1.0, 0.01, 1000)],
    [GaussianEvent(30.0, 1.0, 60)],
    [GaussianEvent(40.0, 1.0, 60), GaussianEvent(12.5, 0.08192, 300)],
    [GaussianEvent(9.2, 0.08192, 100, discrete=True)],
]


@pytest.fixture(autouse=True)
def forgetful():
    opinions._opinions.cache_clear()
    yield
    opinions._opinions.cache_clear()


@pytest.mark.parametrize(("events", "delta"), [*((run, 1e-5) for run in RUNS), (RUNS[0], 1e-7)], ids=str)
def test_both_agree_with_what_is_reported(events, delta):
    bound = compose(events, delta)
    certified, loose = second_opinions(events, delta)
    assert 0.95 * bound.upper <= certified.lower <= bound.upper * (1 + 1e-9)
    assert bound.lower * (1 - 1e-9) <= certified.upper
    assert bound.lower <= loose.upper <= 1.6 * bound.upper
    assert not certified.why
    assert not loose.why
    refuse_contradiction(bound, [certified, loose])
    if not events[0].discrete:  # an ε that is a little too low is an error
        with pytest.raises(AuditError, match=r"contradict each other: prv-accountant") as caught:
            refuse_contradiction(replace(bound, lower=0.0, upper=0.93 * bound.upper), [certified, loose])
        assert caught.value.exit_code == 1


def test_the_filter_over_stages_is_not_below_them():
    stages = [[GaussianEvent(40.0, 1.0, 60)], [GaussianEvent(9.2, 0.08192, 300)]]
    events = [event for stage in stages for event in stage]
    refuse_contradiction(compose_stages(stages, 1e-5), second_opinions(events, 1e-5))


@pytest.mark.parametrize(("mu", "eta", "mean"), [(0.02, 0.0, 10), (0.2, 0.0, 100), (0.1, 1.0, 20), (0.3, -0.5, 5)])
@pytest.mark.parametrize("noise", [None, 40.0, 150.0])
def test_another_library_finds_the_same_epsilon_with_private_tuning(mu, eta, mean, noise):
    tuning = [TuningEvent(mu, eta, TrialCount.with_mean(mean, eta).gamma)]
    steps = [] if noise is None else [GaussianEvent(noise, 1.0, 120)]
    bound = compose_stages([tuning, steps], 1e-5)
    *_, found = second_opinions([*tuning, *steps], 1e-5)
    if eta < 0:  # dp-accounting has no such distribution
        assert found.why
        return
    # without a step the same formula; with one, ours keeps a part of δ for sampled stages
    assert bound.upper == pytest.approx(found.upper, rel=3e-3)
    assert bound.upper >= found.upper * (1 - TUNED)
    # the positive control: a trial's noise that is a tenth too small
    *_, wrong = second_opinions([TuningEvent(1.1 * mu, eta, tuning[0].gamma), *steps], 1e-5)
    assert noise is not None or bound.upper < wrong.upper * (1 - TUNED)


def test_an_upper_bound_of_renyi_dp_below_a_lower_one_is_an_error():
    bound = compose(RUNS[0], 1e-5)
    certified, loose = second_opinions(RUNS[0], 1e-5)
    wrong = replace(loose, upper=0.9 * bound.lower)
    for others in ([certified, wrong], [wrong]):
        with pytest.raises(AuditError, match="opacus"):
            refuse_contradiction(bound, others)
    # an upper bound of one direction is no contradiction
    refuse_contradiction(bound, [Opinion("prv-accountant 0 (PRV)", 0.0, 0.5 * bound.lower)])


@pytest.mark.parametrize(
    ("events", "delta", "word"),
    [
        ([], 1e-5, "nothing was spent"),
        ([GaussianEvent(0.0, 0.1, 1)], 1e-5, "without noise"),
        ([TuningEvent(0.5, 0.0, 0.1)], 1e-5, "private tuning"),
        ([TuningEvent(0.5, 0.0, 0.1), GaussianEvent(0.0, 1.0, 1)], 1e-5, "without noise"),
        ([GaussianEvent(0.01, 0.1, 5)], 1e-5, "beyond its range"),
        ([GaussianEvent(50.0 + i, 0.1, 1) for i in range(30)], 1e-5, "different events"),
        ([GaussianEvent(100.0, 0.1, 10**6)], 1e-9, "floating point"),
        ([GaussianEvent(2000.0, 0.1, 10**6)], 1e-3, "grid points"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_missing_opinion_has_a_reason(events, delta, word):
    certified, loose, *_ = second_opinions(events, delta)
    assert word in certified.why
    assert word in str(certified)
    assert "none" in str(certified)
    assert (certified.lower, certified.upper) == (0, math.inf)
    refuse_contradiction(compose(events, delta, lambda sentence: None), [certified, loose])


@pytest.mark.parametrize("error", [ValueError("no root"), ZeroDivisionError("no root")])
def test_a_library_that_fails_has_no_opinion(monkeypatch, error):
    def fail(*values, **more):
        raise error

    monkeypatch.setattr(prv_accountant, "PRVAccountant", fail)
    assert second_opinions(RUNS[0], 1e-5)[0].why == "no root"


def test_the_calculator_names_them_and_refuses_a_contradiction(monkeypatch):
    result = calculator.account(None, 9.2, 0.08192, 100, 1e-5, curve=False)
    assert [each.name.split()[0] for each in result.opinions] == ["prv-accountant", "opacus"]
    assert result.opinions[0].epsilon_lower <= result.epsilon <= result.opinions[1].epsilon_upper
    said = calculator.opinion_lines(result)
    assert "from 0." in said
    assert "≤ 0." in said
    honest = calculator.compose_adjacency
    monkeypatch.setattr(
        calculator, "compose_adjacency",
        lambda *values: replace(honest(*values), lower=0.0, upper=0.9 * honest(*values).upper),
    )  # fmt: skip
    with pytest.raises(AuditError, match="contradict"):
        calculator.account(None, 9.2, 0.08192, 100, 1e-5, curve=False)
