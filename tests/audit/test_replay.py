"""Record and replay, canaries and controls: a sound loop passes, and every fault that people make is flagged.

The noise comes from the operating system. Each look at it accuses a sound mechanism once in a million times, each
two-world bound once in a thousand at most (far less in fact).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from dprandp.audit import loops
from dprandp.audit.loops import canary_run, make_head_records, replay_head
from dprandp.privacy.auditing.controls import (
    CONTROLS,
    FAITHFUL,
    Control,
    dirac_scores,
    rehearsal_plan,
    trial_mu,
    trial_steps,
)
from dprandp.privacy.auditing.games import two_world_bound
from dprandp.privacy.auditing.replay import Check, Tape, Watch, compare
from dprandp.privacy.clipping import clipped_sum
from dprandp.privacy.ledger import Ledger
from dprandp.privacy.mechanism import PrivateMechanism, PrivatePlan

PLAN = PrivatePlan("probe", 1000, 1.0, 8, 4.0, 0.5, 1, 10.0, 1e-5)
SAMPLED = replace(PLAN, sample_rate=0.2, views=2)
BY_NAME = {control.name: control for control in CONTROLS}

Gradients = Callable[[Tensor, Tensor], Tensor]


def watched_loop(
    folder: Path, gradients: Gradients, plan: PrivatePlan = PLAN, most: Callable[[Tensor], int] = lambda data: 4
) -> list[Check]:
    """A training loop of five lines on 40 records, recorded and replayed without the last."""
    plan = rehearsal_plan(plan, 40)
    rows = torch.randn(40, 6, generator=torch.Generator().manual_seed(0))
    tape, notes = Tape(), None
    for present in (True, False):
        ledger = Ledger.create(folder / f"{present}.jsonl", 40)
        real = PrivateMechanism(plan, ledger, tape if present else tape.again())
        data = rows if present else rows[:-1]
        watch = Watch(real, plan, most(data), watched=39, present=present, follow=notes)
        weight = torch.zeros(6)
        for step in watch.steps():
            batch = data[torch.from_numpy(step.indices)]
            sums = clipped_sum({"w": gradients(batch, weight)}, plan.clip_norm)
            weight = weight - 0.1 * step.release(sums)["w"]
        if present:
            notes = watch.observed
    return compare(notes, watch.observed, plan, 39)


def squared_error(batch: Tensor, weight: Tensor) -> Tensor:
    return (batch @ weight - 1)[:, None] * batch


def failed(checks: list[Check]) -> list[str]:
    assert len(checks) == 6
    return [check.name for check in checks if not check.passed]


@pytest.mark.parametrize("plan", [PLAN, SAMPLED], ids=["full", "sampled"])
def test_a_sound_loop_passes(tmp_path: Path, plan: PrivatePlan) -> None:
    checks = watched_loop(tmp_path, squared_error, plan)
    assert failed(checks) == []
    assert 0 < checks[2].value <= 1  # the record was in the batches, and clipped


def test_centred_gradients_are_flagged(tmp_path: Path) -> None:
    """Subtracting the batch's mean moves everybody else's gradient when one record leaves."""

    def centred(batch: Tensor, weight: Tensor) -> Tensor:
        gradients = squared_error(batch, weight)
        return 0.1 * (gradients - gradients.mean(dim=0)) + len(batch) * 0.01

    assert "the sums differ by at most the clip norm" in failed(watched_loop(tmp_path, centred))


def test_another_number_of_steps_is_flagged(tmp_path: Path) -> None:
    """Early stopping by a look at the data."""
    checks = watched_loop(tmp_path, squared_error, most=lambda data: 4 if len(data) == 40 else 3)
    assert "both runs make the same steps" in failed(checks)


def test_a_second_run_that_asks_for_other_randomness_is_a_bug() -> None:
    tape = Tape()
    first = tape.gaussian([5])
    again = tape.again()
    assert torch.equal(again.gaussian([5]), first)
    assert not torch.equal(Tape().gaussian([5]), first)
    with pytest.raises(RuntimeError, match="other randomness"):
        tape.again().gaussian([7])


# ------------------------------------------------------------------------------------------ the stages' own head loop


@pytest.fixture(scope="module")
def features() -> Tensor:
    rows = torch.randn(60, 12, generator=torch.Generator().manual_seed(3))
    return torch.nn.functional.normalize(rows, dim=1)


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def replayed(plan: PrivatePlan, features: Tensor, kind: str, control: Control = FAITHFUL) -> list[Check]:
    return replay_head(plan, make_head_records(features, 3, plan, kind, torch.Generator().manual_seed(1)), control)


@pytest.mark.parametrize("plan", [PLAN, SAMPLED], ids=["full", "sampled"])
@pytest.mark.parametrize("kind", ["ordinary", "long", "broken"])
def test_the_head_loop_passes(plan: PrivatePlan, features: Tensor, kind: str) -> None:
    checks = replayed(plan, features, kind)
    assert failed(checks) == []
    if kind == "long":
        assert checks[2].value == pytest.approx(1, abs=1e-3)  # it was clipped, and to C
    if kind == "broken":
        assert checks[2].value == 0


FLAGGED_AS = {
    "noise off": "the noise has the standard deviation that was accounted",
    "noise of a tenth": "the noise has the standard deviation that was accounted",
    "clip off": "the sums differ by at most the clip norm",
    "clip per view": "the sums differ by at most the clip norm",
    "noise reused": "the noise is fresh in every step and coordinate",
    "divisor from the actual batch": "divisor and noise do not depend on the record",
}


@pytest.mark.parametrize("plan", [PLAN, SAMPLED], ids=["full", "sampled"])
@pytest.mark.parametrize("name", FLAGGED_AS)
def test_every_control_is_flagged_for_what_it_is(plan: PrivatePlan, features: Tensor, name: str) -> None:
    assert FLAGGED_AS[name] in failed(replayed(plan, features, "long", BY_NAME[name]))


def test_there_is_a_control_for_every_promised_fault() -> None:
    assert set(FLAGGED_AS) == set(BY_NAME)
    assert FAITHFUL.mechanism_plan(PLAN) == PLAN
    assert (FAITHFUL.clip_norm(PLAN), FAITHFUL.views(PLAN)) == (0.5, 1)
    assert not BY_NAME["noise reused"].applies(replace(PLAN, steps=1))


def test_the_loop_that_is_replayed_is_that_of_the_stage(features: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    """A fault in the stage's clip is seen: nothing here is a copy of it."""
    from dprandp.probe import head

    monkeypatch.setattr(head, "clipped_softmax_sum", lambda x, y, w, c, **how: x.nan_to_num().T @ torch.eye(3)[y])
    assert "the sums differ by at most the clip norm" in failed(replayed(PLAN, features, "long"))


# ------------------------------------------------------------------------------------------------- canaries, two worlds


def test_scores_have_the_promised_mean_and_variance(tmp_path: Path) -> None:
    steps = trial_steps(PLAN)
    without, having = dirac_scores(PLAN, 3000, steps, tmp_path)
    assert steps == 8
    assert trial_mu(PLAN, steps) == pytest.approx(math.sqrt(8) / 4)
    for scores, mean in ((without, 0.0), (having, trial_mu(PLAN, steps))):
        assert abs(scores.mean() - mean) * math.sqrt(3000) < 5  # 1 in 2 million
        assert abs(scores.var() - 1) * math.sqrt(1500) < 6
    assert two_world_bound(without, having, 1e-3).mu_lower <= trial_mu(PLAN, steps)


SEEN_BY_TWO_WORLDS = ["noise off", "noise of a tenth", "clip off", "clip per view", "noise reused"]


@pytest.mark.parametrize("name", SEEN_BY_TWO_WORLDS)
def test_two_worlds_see_the_controls(tmp_path: Path, name: str) -> None:
    steps = trial_steps(SAMPLED)
    scores = dirac_scores(SAMPLED, 1000, steps, tmp_path, BY_NAME[name])
    assert two_world_bound(*scores, 1e-3).mu_lower > trial_mu(SAMPLED, steps)


@pytest.mark.slow
@pytest.mark.parametrize("plan", [PLAN, SAMPLED], ids=["full", "sampled"])
def test_two_worlds_do_not_contradict_a_sound_mechanism(tmp_path: Path, plan: PrivatePlan) -> None:
    steps = trial_steps(plan)
    bound = two_world_bound(*dirac_scores(plan, 20_000, steps, tmp_path), 1e-3)
    assert 0.7 * trial_mu(plan, steps) < bound.mu_lower <= trial_mu(plan, steps)


def test_trials_are_even_and_bounded() -> None:
    assert trial_steps(replace(PLAN, steps=1)) == 1
    assert trial_steps(replace(PLAN, steps=7)) == 6
    assert trial_steps(replace(PLAN, noise_multiplier=0.5)) == 2
    assert trial_steps(replace(PLAN, noise_multiplier=100.0, steps=10_000)) == 400


# ---------------------------------------------------------------------------------------------------------- one run


def test_canaries_of_one_run(features: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loops, "OTHERS", 12)
    included = np.random.default_rng(0).random(400) < 0.5
    generator = torch.Generator().manual_seed(0)
    for plan in (PLAN, SAMPLED):
        scores = canary_run(plan, features, 3, included, generator)
        mean = plan.sample_rate * math.sqrt(plan.steps) / plan.noise_multiplier
        assert abs(scores[~included].mean()) * math.sqrt((~included).sum()) < 5
        assert abs(scores[included].mean() - mean) * math.sqrt(included.sum()) < 5.5
        assert abs(scores[~included].var() - 1) < 0.6
    silent = canary_run(PLAN, features, 3, included, generator, BY_NAME["noise off"])
    assert silent[~included].tolist() == [0.0] * int((~included).sum())
    assert silent[included] == pytest.approx(math.sqrt(8) / 4, rel=1e-4)
