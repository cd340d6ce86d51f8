"""Record and replay, canaries and controls: a sound loop passes, and every fault that people make is flagged.

The noise comes from the operating system. Each look at it accuses a sound mechanism once in a million times, each
bound once in a thousand at most.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from dprandp.audit.bounds import AuditSettings, Claim, Game, plain_bound, play, step_score
from dprandp.audit.canaries import (
    CLIP_OFF,
    CONTROLS,
    FAITHFUL,
    Control,
    Tape,
    canary_scores,
    game_scores,
    seen_noise,
    selection_answers,
    selection_evidence,
    trial_event,
    trial_game_scores,
)
from dprandp.audit.games import try_mechanism
from dprandp.audit.loops import (
    Labels,
    hardened,
    head_game_scores,
    made_up_images,
    make_head_records,
    most_wrong,
    records_for,
    replay_finetune,
    replay_head,
)
from dprandp.audit.replay import Check, Observed, Rehearsal, compare, paired_run
from dprandp.config import schema
from dprandp.config.schema import PretrainConfig
from dprandp.dpsgd import clipped_sums
from dprandp.models import whitening
from dprandp.models.classifier import Classifier
from dprandp.models.extractor import build_extractor
from dprandp.privacy.accounting import GaussianEvent, compose
from dprandp.privacy.clipping import clipped_sum
from dprandp.privacy.mechanism import PrivatePlan
from dprandp.privacy.selection import SelectionPlan

PLAN = PrivatePlan("probe", 1000, 1.0, 8, 4.0, 0.5, 1, 10.0, 1e-5)
SAMPLED = replace(PLAN, sample_rate=0.2, views=2)
BOTH = pytest.mark.parametrize("plan", [PLAN, SAMPLED], ids=["full", "sampled"])
BY_NAME = {control.name: control for control in CONTROLS}
SUMS = "the sums differ by at most the clip norm"
FLAGGED_AS = {
    "noise off": "the noise has the standard deviation that was accounted",
    "noise of a tenth": "the noise has the standard deviation that was accounted",
    "clip off": SUMS,
    "clip per view": SUMS,
    "noise reused": "the noise is fresh in every step and coordinate",
    "divisor from the actual batch": "divisor and noise do not depend on the record",
}

Gradients = Callable[[Tensor, Tensor], Tensor]


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def watched_loop(gradients: Gradients, plan: PrivatePlan = PLAN, fewer: int = 0) -> list[Check]:
    """A training loop of five lines on 40 records, recorded and replayed without the last, maybe with fewer steps."""
    rows = torch.randn(40, 6, generator=torch.Generator().manual_seed(0))

    def loop(stage: Rehearsal) -> None:
        data = rows if stage.present else rows[:-1]
        weight = torch.zeros(6)
        for step in stage.mechanism(0).steps():
            batch = data[torch.from_numpy(step.indices)]
            sums = clipped_sum({"w": gradients(batch, weight)}, plan.clip_norm)
            weight = weight - 0.1 * step.release(sums)["w"]
            if not stage.present and stage.remaining_steps == fewer:
                break

    return paired_run(plan, 40, 39, loop, most=4)


def squared_error(batch: Tensor, weight: Tensor) -> Tensor:
    return (batch @ weight - 1)[:, None] * batch


def failed(checks: list[Check]) -> list[str]:
    assert len(checks) == 6
    return [check.name for check in checks if not check.passed]


@BOTH
def test_a_sound_loop_passes(plan: PrivatePlan) -> None:
    checks = watched_loop(squared_error, plan)
    assert failed(checks) == []
    assert 0 < checks[2].value <= 1  # the record was in the batches, and clipped


def test_centred_gradients_and_early_stopping_are_flagged() -> None:
    """Subtracting the batch's mean moves everybody else's gradient when one record leaves."""

    def centred(batch: Tensor, weight: Tensor) -> Tensor:
        gradients = squared_error(batch, weight)
        return 0.1 * (gradients - gradients.mean(dim=0)) + len(batch) * 0.01

    assert SUMS in failed(watched_loop(centred))
    assert "both runs make the same steps" in failed(watched_loop(squared_error, fewer=1))


@pytest.mark.parametrize(("longer", "passes"), [(1e-7, True), (1e-4, False)])
def test_the_sums_may_differ_by_rounding_and_by_no_more(longer: float, passes: bool) -> None:

    def observed(length: float, records: int) -> Observed:
        sums = {"head": torch.tensor([length, 0.0], dtype=torch.float64)}
        return Observed(0, np.arange(records), sums, {"head": sums["head"] / 10})

    plan = replace(PLAN, clip_norm=1.0)
    made = [observed(1 + longer, 11)], [observed(0.0, 10)]
    checks = {check.name: check for check in compare(*made, plan, 10)}
    assert checks[SUMS].passed is passes


def test_a_second_run_that_asks_for_other_randomness_is_a_bug() -> None:
    tape = Tape()
    first = tape.gaussian([5])
    tape.rewind()
    assert torch.equal(tape.gaussian([5]), first)
    assert not torch.equal(Tape().gaussian([5]), first)
    tape.rewind()
    with pytest.raises(RuntimeError, match="other randomness"):
        tape.gaussian([7])


# ------------------------------------------------------------------------------------------ the stages' own head loop


@pytest.fixture(scope="module")
def features() -> Tensor:
    rows = torch.randn(60, 12, generator=torch.Generator().manual_seed(3))
    return torch.nn.functional.normalize(rows, dim=1)


def replayed(
    plan: PrivatePlan, features: Tensor, kind: str, control: Control = FAITHFUL, images: int = 1,
    gone: int | None = None,
) -> list[Check]:  # fmt: skip
    records = make_head_records(features, Labels(3), plan, kind, torch.Generator().manual_seed(1), images)
    return replay_head(plan, records, gone, control)


@pytest.mark.parametrize("noise", ["gaussian", "discrete"])
@pytest.mark.parametrize("images", [1, 3])
@BOTH
def test_the_head_loop_passes_and_every_control_is_flagged_for_what_it_is(
    plan: PrivatePlan, features: Tensor, images: int, noise: str
) -> None:
    """Full batches and samples, one view and two, images and units of several, both kinds of noise."""
    plan = replace(plan, noise=noise, views=1 if images > 1 else plan.views)
    for kind, moved in (("ordinary", None), ("long", 1), ("broken", 0)):  # the long one is clipped, and to C
        checks = replayed(plan, features, kind, images=images)
        assert failed(checks) == []
        assert moved is None or checks[2].value == pytest.approx(moved, abs=1e-3)
    assert set(FLAGGED_AS) == set(BY_NAME)
    for name, seen in FLAGGED_AS.items():
        assert seen in failed(replayed(plan, features, "long", BY_NAME[name], images))
    assert failed(replayed(plan, features, "long", images=images, gone=2)) == []  # any record can be taken away


def test_noise_cannot_be_reused_in_a_single_step() -> None:
    assert not BY_NAME["noise reused"].applies(replace(PLAN, steps=1))
    assert all(control.applies(PLAN) for control in CONTROLS)


def test_the_loop_that_is_replayed_is_that_of_the_stage(features: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    """A fault in the stage's clip is seen: nothing here is a copy of it."""
    from dprandp.probe import head

    monkeypatch.setattr(head, "clipped_softmax_sum", lambda x, y, w, c, **how: x.nan_to_num().T @ torch.eye(3)[y])
    assert SUMS in failed(replayed(PLAN, features, "long"))


# ------------------------------------------------------------------------------------- the fine-tune's own joint loop

TUNE = PrivatePlan("finetune", 1000, 0.2, 4, 1.5, 1.0, 2, 10.0, 1e-5)


def model_of(arch: str) -> Classifier:
    generator = torch.Generator().manual_seed(1)
    extractor = build_extractor(PretrainConfig(arch=arch, filters=8, layers=1), generator)
    whitener = whitening.Whitener(extractor.feature_dim, 10)
    whitener.projection.normal_(generator=generator)
    return Classifier(extractor, whitener, 3)


def tuned(
    arch: str = "patchnet", control: Control = FAITHFUL, plan: PrivatePlan = TUNE, each: int = 1, **changes: Any
) -> list[Check]:
    generator = torch.Generator().manual_seed(2)
    images = torch.randint(256, (20, 3, 32, 32), generator=generator).to(torch.uint8)
    dataset, split = made_up_images(images, Labels(3), records_for(plan, 3), True, generator, each)
    model = hardened(model_of(arch), generator)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    settings = schema.build("finetune", {"checkpoint_every": 100, **changes})
    watched, most = most_wrong(model, split) // each, 1 if control is CLIP_OFF else 2
    checks = replay_finetune(plan, settings, model, 1.0, 0.1, dataset, watched, most=most, control=control)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    return checks


@pytest.mark.parametrize(
    "options",
    [{"arch": "patchnet"}, {"arch": "wrn-10-1"}, {"clipping": "automatic"}, {"each": 2},
     {"each": 2, "plan": replace(TUNE, noise="discrete")}, {"freeze": "magnitude", "keep": 0.2},
     {"select": "magnitude", "keep": 0.2}],
    ids=str,
)  # fmt: skip
def test_a_sound_fine_tune_passes_with_its_clip_at_work_and_without_a_clip_does_not(options: dict[str, Any]) -> None:
    checks = tuned(**options)
    assert failed(checks) == []
    assert 0.9 < checks[2].value <= 1 + 1e-3  # the record's gradient was clipped, to C
    assert SUMS in failed(tuned(**options, control=CLIP_OFF))


@pytest.mark.parametrize("name", ["noise off", "noise reused", "divisor from the actual batch"])
def test_faults_of_the_release_are_flagged(name: str) -> None:
    assert failed(tuned(control=BY_NAME[name])) != []


def test_views_that_depend_on_the_batch_are_flagged(monkeypatch: pytest.MonkeyPatch) -> None:
    """Random crops dealt along the batch: leaving out a record hands its crop to the next one."""
    keyed = clipped_sums.keyed_uniforms
    wide = replace(TUNE, sample_rate=1.0)
    assert failed(tuned(plan=wide)) == []
    monkeypatch.setattr(clipped_sums, "keyed_uniforms", lambda records, *rest: keyed(torch.arange(len(records)), *rest))
    assert SUMS in failed(tuned(plan=wide))


def test_every_class_is_made_up() -> None:
    images = torch.zeros(2, 3, 32, 32, dtype=torch.uint8)
    dataset, split = made_up_images(images, Labels(30), 5, False, torch.Generator().manual_seed(0))
    assert dataset.spec.train_examples == len(split.labels) == 30
    assert sorted(dataset.train().labels.tolist()) == list(range(30))
    assert dataset.spec.flip_ok is False


# ------------------------------------------------------------------------------------------------------ the canaries


@pytest.mark.parametrize("noise", ["gaussian", "discrete"])
def test_scores_have_the_promised_mean_and_variance(tmp_path: Path, noise: str) -> None:
    mu = math.sqrt(8) / 4
    without, having = game_scores(replace(PLAN, noise=noise), Game.of(0.0, 6000), tmp_path)
    for scores, mean in ((without, -(mu**2) / 2), (having, mu**2 / 2)):  # log likelihood ratios of a Gaussian
        assert abs(scores.mean() - mean) / mu * math.sqrt(3000) < 5  # 1 in 2 million
        assert abs(scores.var() / mu**2 - 1) * math.sqrt(1500) < 6
    assert list(tmp_path.iterdir()) == []


def test_sampled_canaries_are_drawn_at_the_rate(tmp_path: Path) -> None:
    """Without noise a score says in how many batches the canary was."""
    plan, included = replace(SAMPLED, views=1), np.arange(4000) % 2 == 0
    silent = BY_NAME["noise off"]
    scores = canary_scores(plan, included, tmp_path, silent, plan.noise_multiplier)
    steps = np.array([float(step_score(np.array(x), 4.0, 0.2)) for x in (0.0, 1 - 1e-5)])
    drawn = (scores - 8 * steps[0]) / (steps[1] - steps[0])
    assert drawn[~included] == pytest.approx(0, abs=1e-2)
    assert abs(drawn[included].mean() - 8 * 0.2) < 5 * math.sqrt(8 * 0.2 * 0.8 / 2000)
    assert seen_noise(plan, tmp_path, silent) == pytest.approx(4.0 / 64)
    assert seen_noise(plan, tmp_path) == 4.0


@pytest.mark.slow
@pytest.mark.parametrize("name", ["noise off", "noise of a tenth", "clip off", "clip per view"])
@BOTH
def test_the_game_sees_the_controls(tmp_path: Path, name: str, plan: PrivatePlan) -> None:
    plan = replace(plan, views=1)
    game, claim = Game.of(0.0, 2000), Claim(trial_event(plan), 1e-5)
    assert play(game, *game_scores(plan, game, tmp_path, BY_NAME[name]), claim, 1e-3).delta_seen > claim.curve(1, 0)


def test_the_game_sees_noise_that_comes_again(tmp_path: Path) -> None:
    for plan in (PLAN, replace(PLAN, noise="discrete")):
        game, claim = Game.of(0.0, 2000), Claim(trial_event(plan), 1e-5)
        scores = game_scores(plan, game, tmp_path, BY_NAME["noise reused"])
        assert play(game, *scores, claim, 1e-3).factor > 1


def test_released_heads_say_nearly_as_much_as_all_steps() -> None:
    plan, game = replace(PLAN, steps=60, noise_multiplier=math.sqrt(60), clip_norm=1.0), Game.of(0.0, 4000)
    without, having, mu = head_game_scores(plan, game)  # the signal is of μ = 1
    assert 0.8 < mu < 1
    for scores, mean in ((without, -(mu**2) / 2), (having, mu**2 / 2)):
        assert abs(scores.mean() - mean) / mu * math.sqrt(2000) < 5
        assert abs(scores.var() / mu**2 - 1) * math.sqrt(1000) < 6


# ------------------------------------------------------------------------------------------------------ private tuning

TUNING = SelectionPlan("tune", 1000, 1.0, 0.0, 0.1, 0.1, 1.0, (2, 4), 8.0, 1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("held_out", [False, True])
def test_one_trial_of_private_tuning_is_as_gaussian_as_it_says(held_out: bool) -> None:
    game = Game.of(0.0, 3000)
    for scores, mean in zip(trial_game_scores(TUNING, game, held_out), (-0.5, 0.5), strict=True):
        assert abs(scores.mean() - mean) * math.sqrt(1500) < 5
        assert abs(scores.var() - 1) * math.sqrt(750) < 6
    claim, faulty = Claim(GaussianEvent(1.0, 1.0, 1), 1e-5), trial_game_scores(TUNING, game, held_out, faulty=True)
    assert play(game, *faulty, claim, 1e-3).factor > 1


@pytest.mark.slow
def test_what_is_selected_tells_of_the_record(tmp_path: Path) -> None:
    evidence, expected = selection_evidence(TUNING, 150, 1e-3, 0)
    answers = [selection_answers(TUNING, 150, there, evidence, tmp_path) for there in (False, True)]
    assert answers[0] < answers[1]
    bound = plain_bound(*answers, 150, 150, 1e-5, 1e-3)
    assert bound == pytest.approx(expected, abs=1.5)
    assert bound < compose([TUNING.event], 1e-5).upper


@pytest.mark.slow
def test_private_tuning_is_audited_like_the_rest() -> None:
    found = try_mechanism(TUNING, torch.empty(0), Labels(3), AuditSettings(trials=200), lambda: None)
    game = found.two_world
    assert set(game.one_trial) == {"fitted", "held_out"}
    assert not game.flagged
    assert 0 <= game.ratio < 1
    assert [entry.flagged for entry in found.controls] == [True]
