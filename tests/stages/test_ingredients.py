"""Ingredients of the fine-tune in the whole stage: releases redone by hand, disclosed, audited, resumed, shared."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from rank_processes import of_rank_0
from safetensors.torch import load_file
from tiny_run import Recorder, blobs, context, read_json, run_finetune
from torch import Tensor

from dprandp import finetune
from dprandp.audit import loops
from dprandp.audit.canaries import CLIP_OFF
from dprandp.config import schema
from dprandp.dpsgd.clipped_sums import ClippedSums, SumSettings, share_of
from dprandp.dpsgd.optimizers import Optimizer, OptimizerSettings
from dprandp.models.classifier import Classifier
from dprandp.models.extractor import build_extractor
from dprandp.models.whitening import Whitener
from dprandp.privacy.mechanism import PrivatePlan
from dprandp.runs import checkpoint
from dprandp.runs.parallel import Ranks
from dprandp.vision.images import to_input

Copy = Callable[[Path], Path]
Record = Callable[[Path], Recorder]

INGREDIENTS = {
    "adam": {"optimizer": "adam", "lr": 0.01},
    "momentum": {"momentum": 0.9},
    "views": {"views": 2},
    "rescaled": {"clipping": "rescaled", "clip_norm": 0.25},
}


@pytest.fixture
def gradient_points(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Tensor]]:
    """Where each step's gradients were taken."""
    seen, of = [], ClippedSums.of

    def recorded(self, parameters, *more):
        seen.append({name: value.clone() for name, value in parameters.items()})
        return of(self, parameters, *more)

    monkeypatch.setattr(ClippedSums, "of", recorded)
    return seen


def seldom(*names: str) -> list:
    """The ingredients, of which these are for the slow suite."""
    return [pytest.param(name, marks=[pytest.mark.slow] if name in names else []) for name in INGREDIENTS]


@pytest.mark.parametrize("name", seldom("adam", "rescaled"))
def test_9_the_parameters_are_a_function_of_the_noisy_updates(
    copy: Copy, probed_run: Path, data: str, record: Record, gradient_points: list, name: str
) -> None:
    run, settings = copy(probed_run), INGREDIENTS[name]
    before = load_file(run / "model/model.safetensors")
    seen = record(run)
    result = run_finetune(run, data, refit_steps=0, extractor_scale=1.0, ema=0.0, **settings)
    names = sorted(seen.releases[0].released)
    parameters = {each: before[each].clone() for each in names}
    optimizer = Optimizer(OptimizerSettings(settings.get("optimizer", "sgd"), settings.get("momentum")), parameters)
    for release, point in zip(seen.of("finetune"), gradient_points, strict=True):
        assert all(torch.allclose(point[each], parameters[each], atol=1e-5) for each in names)
        noisy = {each: release.released[each] / settings.get("clip_norm", 1.0) for each in names}
        optimizer.step(noisy, result["lr"])
    stored = load_file(run / "4-finetune/model.safetensors")
    for each in names:
        assert torch.allclose(stored[each], parameters[each], rtol=1e-4, atol=1e-5), each
        assert not torch.allclose(stored[each], before[each], atol=1e-5)


SAID = {
    "adam": "Adam on the noisy gradients",
    "momentum": "SGD on the noisy gradients, momentum 0.9",
    "views": "2, their gradients averaged before the clip",
    "rescaled": "sum and noise are then divided by C",
}


# those after the noise are seldom: there the replay follows recorded releases
@pytest.mark.parametrize("name", seldom("adam", "momentum", "rescaled"))
def test_22_it_is_disclosed_and_audited(copy: Copy, probed_run: Path, data: str, name: str) -> None:
    """The card names it; the replay of the loop passes, and still sees a clip that was left out."""
    run = copy(probed_run)
    result = run_finetune(run, data, steps=2, refit_steps=0, **INGREDIENTS[name])
    assert SAID[name] in (run / "model/MODEL_CARD.md").read_text(encoding="utf-8")
    settings = schema.build("finetune", {"data": data, "epsilon": 4.0} | INGREDIENTS[name])
    values = read_json(run / "privacy/plan.json")["stages"]["finetune"]["plan"]
    plan = PrivatePlan.from_dict(values)
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (40, 3, 32, 32), generator=generator).to(torch.uint8)
    dataset, split = loops.made_up_images(images, 3, 40, False, generator)
    with context(run) as given:
        model, _ = finetune._probed_model(settings, given, finetune.open_stage(settings, given, write=False))
        hard = loops.hardened(model, generator)
        watched = loops.most_wrong(hard, split)

        def replayed(**options) -> list[str]:
            checks = loops.replay_finetune(
                plan, settings, hard, result["lr"], 1.0, dataset, watched, given, 2, **options
            )
            return [check.name for check in checks if not check.passed]

        assert replayed() == []
        assert "the sums differ by at most the clip norm" in replayed(control=CLIP_OFF)


@pytest.mark.parametrize("name", ["adam", "momentum"])
def test_11_a_stopped_run_goes_on_with_the_state_it_had(
    copy: Copy, probed_run: Path, data: str, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    run, hits = copy(probed_run), []

    def stop_at_third(point: str) -> None:
        hits.append(point)
        if hits.count("update-applied") == 3:
            raise KeyboardInterrupt

    settings = INGREDIENTS[name] | {"refit_steps": 0, "checkpoint_every": 1}
    with monkeypatch.context() as patch:
        patch.setattr(finetune.faults, "point", stop_at_third)
        with pytest.raises(KeyboardInterrupt):
            run_finetune(run, data, **settings)
    saved = checkpoint.load(run / "4-finetune").tensors
    began, step = [], Optimizer.step

    def spied(self, *given):
        began.append({each: value.clone() for each, value in self.state.items()})
        step(self, *given)

    monkeypatch.setattr(Optimizer, "step", spied)
    run_finetune(run, data, **settings)
    assert began[0].keys() == {each for each in saved if each.startswith("optimizer.")}
    for key, value in began[0].items():
        assert value.any(), key
        assert torch.equal(value, saved[key]), key


def total_of_the_later_blocks(ranks: Ranks) -> dict[str, Tensor]:
    setting = SumSettings(scale=0.5, views=2, seed=5, flip=True, clip_norm=0.05, frozen_first=2)
    generator, made = torch.Generator().manual_seed(1), blobs(3)
    extractor = build_extractor(schema.PretrainConfig(arch="wrn-10-1"), generator)
    model = Classifier(extractor, Whitener(extractor.feature_dim, 20, extractor.parts), 3)
    for value in (model.whitener.projection, model.head.data):
        value.normal_(generator=generator)
    frozen = tuple(f"extractor.{name}." for name, _ in extractor.units()[:2])
    here = {n: v.detach().clone() for n, v in model.named_parameters() if not n.startswith(frozen)}
    images, labels = to_input(made["x_train"]), torch.from_numpy(made["y_train"])
    share = share_of(ranks, np.arange(5), images, labels, None)
    return ClippedSums(model, setting).over_ranks(ranks, here, 4, share)


def test_16_several_ranks_make_the_same_sums_where_blocks_are_frozen() -> None:
    alone, two = (of_rank_0(size, total_of_the_later_blocks) for size in (1, 2))
    for name, value in alone.items():
        assert torch.allclose(two[name], value, rtol=1e-4, atol=1e-6), name
    assert float(alone["head"].norm()) > 0
