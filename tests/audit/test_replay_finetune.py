"""Record and replay of the fine-tune's own loop, on made-up images."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from dprandp.audit.loops import hardened, made_up_images, most_wrong, records_for, rehearsal_context, replay_finetune
from dprandp.config import schema
from dprandp.config.schema import PretrainConfig
from dprandp.dpsgd import clipped_sums
from dprandp.models import whitening
from dprandp.models.classifier import Classifier
from dprandp.models.extractor import build_extractor
from dprandp.privacy.auditing.controls import CONTROLS, FAITHFUL, Control
from dprandp.privacy.auditing.replay import Check
from dprandp.privacy.mechanism import PrivatePlan

PLAN = PrivatePlan("finetune", 1000, 0.2, 4, 1.5, 1.0, 2, 10.0, 1e-5)
CLASSES = 3
BY_NAME = {control.name: control for control in CONTROLS}


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def model_of(arch: str) -> Classifier:
    generator = torch.Generator().manual_seed(1)
    extractor = build_extractor(PretrainConfig(arch=arch, filters=8), generator)
    whitener = whitening.Whitener(extractor.feature_dim, 10)
    whitener.projection.normal_(generator=generator)
    return Classifier(extractor, whitener, CLASSES)


def replayed(
    arch: str, control: Control = FAITHFUL, steps: int = 2, plan: PrivatePlan = PLAN, each: int = 1, **changes: Any
) -> list[Check]:
    generator = torch.Generator().manual_seed(2)
    images = torch.randint(256, (20, 3, 32, 32), generator=generator).to(torch.uint8)
    dataset, split = made_up_images(images, CLASSES, records_for(plan, 3), True, generator, each)
    model = hardened(model_of(arch), generator)
    settings = schema.build("finetune", {"checkpoint_every": 100, **changes})
    with rehearsal_context() as context:
        watched = most_wrong(model, split) // each
        return replay_finetune(plan, settings, model, 1.0, 0.1, dataset, watched, context, steps, control)


def failed(checks: list[Check]) -> list[str]:
    assert len(checks) == 6
    return [check.name for check in checks if not check.passed]


@pytest.mark.parametrize("arch", ["patchnet", "wrn-10-1"])
def test_a_sound_fine_tune_passes_with_its_clip_at_work(arch: str) -> None:
    checks = replayed(arch)
    assert failed(checks) == []
    assert checks[2].value == pytest.approx(1, abs=1e-3)  # the record's gradient was clipped, to C


def test_automatic_clipping_passes_and_its_absence_does_not() -> None:
    checks = replayed("patchnet", clipping="automatic")
    assert failed(checks) == []
    assert 0.9 < checks[2].value <= 1
    missing = failed(replayed("patchnet", BY_NAME["clip off"], 1, clipping="automatic"))
    assert "the sums differ by at most the clip norm" in missing


@pytest.mark.parametrize("noise", ["gaussian", "discrete"])
def test_units_of_several_images_pass_and_without_a_clip_do_not(noise: str) -> None:
    plan = replace(PLAN, noise=noise)
    assert failed(replayed("patchnet", plan=plan, each=2)) == []
    unclipped = failed(replayed("patchnet", BY_NAME["clip off"], 1, plan=plan, each=2))
    assert "the sums differ by at most the clip norm" in unclipped


@pytest.mark.parametrize("mode", ["freeze", "select"])
def test_a_part_of_the_weights_passes_and_without_a_clip_does_not(mode: str) -> None:
    settings = {mode: "magnitude", "keep": 0.2}
    assert failed(replayed("patchnet", **settings)) == []
    unclipped = failed(replayed("patchnet", BY_NAME["clip off"], 1, **settings))
    assert "the sums differ by at most the clip norm" in unclipped


@pytest.mark.parametrize("arch", ["patchnet", "wrn-10-1"])
def test_a_missing_clip_is_flagged(arch: str) -> None:
    assert "the sums differ by at most the clip norm" in failed(replayed(arch, BY_NAME["clip off"], 1))


@pytest.mark.parametrize("name", ["noise off", "noise reused", "divisor from the actual batch"])
def test_faults_of_the_release_are_flagged(name: str) -> None:
    assert failed(replayed("patchnet", BY_NAME[name])) != []


def test_views_that_depend_on_the_batch_are_flagged(monkeypatch: pytest.MonkeyPatch) -> None:
    """Random crops dealt along the batch: leaving out a record hands its crop to the next one."""
    keyed = clipped_sums.keyed_uniforms
    wide = replace(PLAN, sample_rate=1.0)
    assert failed(replayed("patchnet", plan=wide)) == []
    monkeypatch.setattr(clipped_sums, "keyed_uniforms", lambda records, *rest: keyed(torch.arange(len(records)), *rest))
    assert "the sums differ by at most the clip norm" in failed(replayed("patchnet", plan=wide))


def test_a_replay_leaves_the_model_as_it_was() -> None:
    generator, model = torch.Generator().manual_seed(2), model_of("patchnet")
    dataset, split = made_up_images(torch.zeros(2, 3, 32, 32, dtype=torch.uint8), CLASSES, 20, True, generator)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    settings = schema.build("finetune", {"checkpoint_every": 100})
    with rehearsal_context() as context:
        replay_finetune(PLAN, settings, model, 1.0, 0.1, dataset, most_wrong(model, split), context, 2)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_every_class_is_made_up() -> None:
    images = torch.zeros(2, 3, 32, 32, dtype=torch.uint8)
    dataset, split = made_up_images(images, 30, 5, False, torch.Generator().manual_seed(0))
    assert dataset.spec.train_examples == len(split.labels) == 30
    assert sorted(dataset.train().labels.tolist()) == list(range(30))
    assert dataset.spec.flip_ok is False
