"""Record and replay, canaries and controls: a sound loop passes, and every fault that people make is flagged.

The noise comes from the operating system. Each look at it accuses a sound mechanism once in a million times, each
bound once in a thousand at most.
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

from dprandp.audit.games import AuditSettings, try_mechanism
from dprandp.audit.loops import head_game_scores, make_head_records, replay_head
from dprandp.privacy.accounting import GaussianEvent, compose
from dprandp.privacy.auditing.controls import (
    CONTROLS,
    FAITHFUL,
    Control,
    canary_scores,
    game_scores,
    rehearsal_plan,
    seen_noise,
    selection_answers,
    selection_evidence,
    trial_event,
    trial_game_scores,
)
from dprandp.privacy.auditing.games import Claim, Game, plain_bound, play, step_score
from dprandp.privacy.auditing.replay import Check, Tape, Watch, compare
from dprandp.privacy.clipping import clipped_sum
from dprandp.privacy.ledger import Ledger
from dprandp.privacy.mechanism import PrivateMechanism, PrivatePlan
from dprandp.privacy.selection import SelectionPlan

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


@pytest.mark.parametrize("noise", ["gaussian", "discrete"])
@pytest.mark.parametrize("images", [1, 3])
@pytest.mark.parametrize("plan", [PLAN, replace(SAMPLED, views=1)], ids=["full", "sampled"])
def test_units_of_several_images_and_discrete_noise(
    plan: PrivatePlan, features: Tensor, images: int, noise: str
) -> None:
    plan, generator = replace(plan, noise=noise), torch.Generator().manual_seed(1)
    for kind, moved in (("ordinary", None), ("long", 1), ("broken", 0)):
        checks = replay_head(plan, make_head_records(features, 3, plan, kind, generator, images))
        assert failed(checks) == []
        if moved is not None:
            assert checks[2].value == pytest.approx(moved, abs=1e-3)
    for name, seen in FLAGGED_AS.items():
        records = make_head_records(features, 3, plan, "long", generator, images)
        assert seen in failed(replay_head(plan, records, BY_NAME[name]))


def test_any_unit_can_be_taken_away(features: Tensor) -> None:
    records = make_head_records(features, 3, PLAN, "long", torch.Generator().manual_seed(1), 3)
    other = records.ending_with(2)
    assert (other.count, other.watched) == (len(records.labels) // 3, 2)
    assert failed(replay_head(PLAN, other)) == []


# ------------------------------------------------------------------------------------------------------ the canaries


@pytest.mark.parametrize("noise", ["gaussian", "discrete"])
def test_scores_have_the_promised_mean_and_variance(tmp_path: Path, noise: str) -> None:
    game, mu = Game.of(0.0, 6000), math.sqrt(8) / 4
    without, having = game_scores(replace(PLAN, noise=noise), game, tmp_path)
    for scores, mean in ((without, -(mu**2) / 2), (having, mu**2 / 2)):  # log likelihood ratios of a Gaussian
        assert abs(scores.mean() - mean) / mu * math.sqrt(3000) < 5  # 1 in 2 million
        assert abs(scores.var() / mu**2 - 1) * math.sqrt(1500) < 6
    assert list(tmp_path.iterdir()) == []


def test_sampled_canaries_are_drawn_at_the_rate(tmp_path: Path) -> None:
    """Without noise a score says in how many batches the canary was."""
    plan, included = replace(SAMPLED, views=1), np.arange(4000) % 2 == 0
    silent = BY_NAME["noise off"]
    scores = canary_scores(plan, included, tmp_path, silent)
    steps = np.array([float(step_score(np.array(x), 4.0, 0.2)) for x in (0.0, 1 - 1e-5)])
    drawn = (scores - 8 * steps[0]) / (steps[1] - steps[0])
    assert drawn[~included] == pytest.approx(0, abs=1e-2)
    assert abs(drawn[included].mean() - 8 * 0.2) < 5 * math.sqrt(8 * 0.2 * 0.8 / 2000)
    assert seen_noise(plan, tmp_path, silent) == pytest.approx(4.0 / 64)
    assert seen_noise(plan, tmp_path) == 4.0


@pytest.mark.parametrize("plan", [PLAN, replace(SAMPLED, views=1)], ids=["full", "sampled"])
@pytest.mark.parametrize("name", ["noise off", "noise of a tenth", "clip off", "clip per view"])
def test_the_game_sees_the_controls(tmp_path: Path, name: str, plan: PrivatePlan) -> None:
    game, claim = Game.of(0.0, 2000), Claim(trial_event(plan), 1e-5)
    assert play(game, *game_scores(plan, game, tmp_path, BY_NAME[name]), claim, 1e-3).delta_seen > claim.curve(1, 0)


def test_the_game_sees_noise_that_comes_again(tmp_path: Path) -> None:
    for plan in (PLAN, replace(PLAN, noise="discrete")):
        game, claim = Game.of(0.0, 2000), Claim(trial_event(plan), 1e-5)
        scores = game_scores(plan, game, tmp_path, BY_NAME["noise reused"])
        assert play(game, *scores, claim, 1e-3).factor > 1


# ----------------------------------------------------------------------------------------------- released heads alone


def test_released_heads_say_nearly_as_much_as_all_steps() -> None:
    plan, game = replace(PLAN, steps=60, noise_multiplier=math.sqrt(60), clip_norm=1.0), Game.of(0.0, 4000)
    without, having, signal = head_game_scores(plan, game)
    mu = signal  # of μ = 1
    assert 0.8 < signal < 1
    for scores, mean in ((without, -(mu**2) / 2), (having, mu**2 / 2)):
        assert abs(scores.mean() - mean) / mu * math.sqrt(2000) < 5
        assert abs(scores.var() / mu**2 - 1) * math.sqrt(1000) < 6


# ---------------------------------------------------------------------------------------------------------- paid tuning

TUNING = SelectionPlan("tune", 1000, 1.0, 0.0, 0.1, 0.1, 1.0, (2, 4), 8.0, 1e-5)


@pytest.mark.parametrize("held_out", [False, True])
def test_one_trial_of_paid_tuning_is_as_gaussian_as_it_says(held_out: bool) -> None:
    game = Game.of(0.0, 3000)
    for scores, mean in zip(trial_game_scores(TUNING, game, held_out), (-0.5, 0.5), strict=True):
        assert abs(scores.mean() - mean) * math.sqrt(1500) < 5
        assert abs(scores.var() - 1) * math.sqrt(750) < 6
    claim, faulty = Claim(GaussianEvent(1.0, 1.0, 1), 1e-5), trial_game_scores(TUNING, game, held_out, faulty=True)
    assert play(game, *faulty, claim, 1e-3).factor > 1


def test_what_is_selected_tells_of_the_record(tmp_path: Path) -> None:
    evidence, expected = selection_evidence(TUNING, 150, 1e-3, 0)
    answers = [selection_answers(TUNING, 150, there, evidence, tmp_path) for there in (False, True)]
    assert answers[0] < answers[1]
    bound = plain_bound(*answers, 150, 150, 1e-5, 1e-3)
    assert bound == pytest.approx(expected, abs=1.5)
    assert bound < compose([TUNING.event], 1e-5).upper


def test_paid_tuning_is_audited_like_the_rest() -> None:
    found = try_mechanism(TUNING, torch.empty(0), 3, AuditSettings(trials=200), lambda: None)
    game = found["two_world"]
    assert set(game["one_trial"]) == {"fitted", "held_out"}
    assert not game["flagged"]
    assert 0 <= game["ratio"] < 1
    assert [entry["flagged"] for entry in found["controls"]] == [True]
