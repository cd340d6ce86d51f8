"""Training a part of the weights: how masks and frozen blocks are chosen, that nothing else moves, and that the clip
sees what is left."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from rank_processes import of_rank_0
from safetensors.torch import load_file
from small_models import (
    CLIP,
    SETTING,
    STEP,
    apart,
    batch_of,
    gradient_by_hand,
    images_and_labels,
    model_of,
    norm_of,
    scaled,
)
from tiny_run import Copy, Stopped, run_finetune, stop_at
from torch import Tensor

from dprandp.config import schema
from dprandp.dpsgd import clipped_sums, masks
from dprandp.dpsgd.clipped_sums import ClippedSums, SumSettings, share_of
from dprandp.dpsgd.masks import ALL_WEIGHTS, FrozenPrefix, MaskRule, choose_blocks, rule_of
from dprandp.errors import UsageError
from dprandp.models.classifier import Classifier
from dprandp.runs import checkpoint


def rule(**changes) -> MaskRule:
    given = {"mode": "freeze", "criterion": "random", "keep": 0.1, "scope": "global", "every": 3, "seed": 0,
             "zero": False}  # fmt: skip
    return MaskRule(**(given | changes))


def parameters_of() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = {"extractor.a.weight": (40, 5), "extractor.b.weight": (10, 3, 5, 2), "extractor.b.bias": (10,),
              "head": (6, 3)}  # fmt: skip
    made = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    made["extractor.a.weight"] *= 10
    return made


# ------------------------------------------------------------------------------------------------------------ choosing


@pytest.mark.parametrize("criterion", ["random", "magnitude"])
@pytest.mark.parametrize("scope", ["global", "layer"])
def test_the_part_is_the_part_and_head_and_biases_are_not_in_it(criterion: str, scope: str) -> None:
    masks = rule(criterion=criterion, scope=scope, keep=0.333).choose(parameters_of(), 0)
    assert set(masks) == {"extractor.a.weight", "extractor.b.weight"}
    assert all(mask.dtype == torch.bool and mask.shape == parameters_of()[name].shape for name, mask in masks.items())
    counts = {name: int(mask.sum()) for name, mask in masks.items()}
    if scope == "layer":
        assert counts == {"extractor.a.weight": 67, "extractor.b.weight": 100}
    assert abs(sum(counts.values()) - 500 * 0.333) <= 1


def test_magnitude_takes_the_largest_of_all() -> None:
    parameters = parameters_of()
    masks = rule(criterion="magnitude", keep=0.3).choose(parameters, 0)  # a's weights are ten times as long as b's
    chosen = torch.cat([parameters[name].abs()[mask] for name, mask in masks.items()])
    left = torch.cat([parameters[name].abs()[~mask] for name, mask in masks.items()])
    assert chosen.min() >= left.max()
    assert masks["extractor.a.weight"].float().mean() > 5 * masks["extractor.b.weight"].float().mean()


def test_random_is_spread_evenly_and_a_function_of_seed_and_step_alone() -> None:
    parameters = parameters_of()
    masks = rule(keep=0.5).choose(parameters, 0)
    shares = [float(mask.float().mean()) for mask in masks.values()]
    assert all(abs(share - 0.5) < 5 * 0.5 / math.sqrt(200) for share in shares)
    same = rule(keep=0.5).choose({name: 2 * value for name, value in parameters.items()}, 0)
    assert all(torch.equal(mask, same[name]) for name, mask in masks.items())
    for other in (rule(keep=0.5, seed=1).choose(parameters, 0), rule(keep=0.5).choose(parameters, 3)):
        assert not torch.equal(other["extractor.a.weight"], masks["extractor.a.weight"])


def test_select_chooses_anew_and_freeze_does_not() -> None:
    assert [step for step in range(10) if rule(mode="select").due(step)] == [3, 6, 9]
    assert not any(rule().due(step) for step in range(10))


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"freeze": "gradient", "keep": 0.1}, "further release about the data"),
        ({"select": "gradient", "keep": 0.1}, "further release about the data"),
        ({"freeze": "randm", "keep": 0.1}, "'randm' is unknown"),
        ({"freeze": "random", "select": "random", "keep": 0.1}, "exclude each other"),
        ({"freeze": "random"}, "need --keep"),
        ({"keep": 0.1}, "--keep needs"),
        ({"freeze": "random", "keep": 1.0}, "outside (0, 1)"),
        ({"select": "random", "keep": 0.1, "prune": "zero"}, "needs --freeze"),
        ({"freeze": "random", "keep": 0.1, "every": 3}, "needs --select"),
        ({"scope": "layer"}, "needs --keep"),
        ({"freeze": "random", "keep": 0.1, "scope": "blck"}, "'blck' is unknown"),
        ({"select": "random", "keep": 0.1, "every": 0}, "not a number of steps"),
        ({"freeze": "random", "keep": 0.1, "extractor_scale": 0.0}, "freezes the whole extractor"),
        ({"freeze": "last", "keep": 0.1}, "chooses whole blocks"),
        ({"select": "random", "keep": 0.1, "scope": "block"}, "single weights"),
        ({"freeze": "last", "keep": 0.1, "scope": "block", "prune": "zero"}, "computes nothing"),
    ],
)
def test_what_makes_no_sense_is_refused(settings: dict, said: str) -> None:
    with pytest.raises(UsageError) as caught:
        rule_of(schema.build("finetune", settings))
    assert said in caught.value.problem


def test_a_refusal_comes_before_anything_is_charged(copy: Copy, probed_run: Path, data: str) -> None:
    run = copy(probed_run)
    charged = (run / "privacy/ledger.jsonl").read_bytes()
    with pytest.raises(UsageError, match="further release"):
        run_finetune(run, data, freeze="gradient", keep=0.5)
    assert (run / "privacy/ledger.jsonl").read_bytes() == charged


# ------------------------------------------------------------------------------------------------------------ clipping


def total_over(ranks, masks, records) -> dict[str, Tensor]:
    masks = {name: mask & (ranks.rank == 0) for name, mask in masks.items()}  # the others are given rank 0's
    share = share_of(ranks, records, *images_and_labels(), None)
    model = model_of("patchnet")
    return ClippedSums(model, SETTING).over_ranks(ranks, scaled(model), STEP, share, masks)


@pytest.mark.parametrize("size", [1, pytest.param(3, marks=pytest.mark.slow)])
def test_4_the_mask_comes_before_the_norm(size: int) -> None:
    """The oracle: autograd, mask, norm, clip, one record after another. Clip before mask would be shorter."""
    records = np.array([3, 77, 119])
    parameters = scaled(model_of("patchnet"))
    masks = rule(keep=0.2).choose(parameters, 0)
    right, wrong = ({name: torch.zeros_like(value).double() for name, value in parameters.items()} for _ in range(2))
    for record in records.tolist():
        whole = gradient_by_hand("patchnet", record)
        cut = {name: value * masks.get(name, torch.tensor(1)) for name, value in whole.items()}
        for name in parameters:
            right[name] += cut[name] * min(1, CLIP / norm_of(cut))
            wrong[name] += cut[name] * min(1, CLIP / norm_of(whole))
    total = of_rank_0(size, total_over, masks, records)
    assert apart(total, right) < 1e-3
    assert apart(total, wrong) > 1e-2
    assert all(not total[name][~mask].any() for name, mask in masks.items())


# ------------------------------------------------------------------------------------------------------- the fine-tune


def moved(run: Path, start: Path) -> dict[str, Tensor]:
    """Name -> bool: which released parameters of the extractor differ from those that the fine-tune began with."""
    after, before = (load_file(path / "model/model.safetensors") for path in (run, start))
    return {name: after[name] != before[name] for name in after if name.startswith("extractor.")}


@pytest.mark.slow
def test_frozen_weights_do_not_move_at_all(copy: Copy, probed_run: Path, data: str) -> None:
    run, whole = copy(probed_run), copy(probed_run)
    result = run_finetune(run, data, freeze="random", keep=0.25, scope="layer", refit_steps=0)
    changed = moved(run, probed_run)["extractor.weight"]
    assert 0.24 < float(changed.float().mean()) <= 0.25
    assert moved(run, probed_run)["extractor.bias"].all()
    assert result["trained_weights"].startswith(f"{int(changed.sum()):,} of {changed.numel():,} weights")
    card = (run / "model/MODEL_CARD.md").read_text(encoding="utf-8")
    assert "chosen at random from a public seed once, before the training; the others stay" in card
    assert run_finetune(whole, data, refit_steps=0)["trained_weights"] == ALL_WEIGHTS
    assert moved(whole, probed_run)["extractor.weight"].all()


def test_pruned_weights_are_zero(copy: Copy, probed_run: Path, data: str) -> None:
    run = copy(probed_run)
    run_finetune(run, data, freeze="magnitude", keep=0.25, prune="zero", refit_steps=0)
    before, after = (load_file(path / "model/model.safetensors")["extractor.weight"] for path in (probed_run, run))
    assert float((after == 0).float().mean()) == pytest.approx(0.75, abs=0.01)
    assert before[after != 0].abs().min() >= before[after == 0].abs().max()


def test_selection_moves_more_weights_than_it_trains_at_a_time(copy: Copy, probed_run: Path, data: str) -> None:
    run = copy(probed_run)
    run_finetune(run, data, select="random", keep=0.25, every=2, steps=4, momentum=0.5, refit_steps=0)
    changed = float(moved(run, probed_run)["extractor.weight"].float().mean())
    assert changed == pytest.approx(1 - 0.75**2, abs=0.05)  # two choices


def test_a_resumed_selection_goes_on_with_the_weights_it_had(
    copy: Copy, probed_run: Path, data: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By magnitude of noisy parameters: a choice made anew after a stop would be another one."""
    run = copy(probed_run)
    settings = {"select": "magnitude", "keep": 0.25, "every": 100, "checkpoint_every": 1, "lr": 50.0, "refit_steps": 0}
    with monkeypatch.context() as patch:
        stop_at(patch, 3)
        with pytest.raises(Stopped):
            run_finetune(run, data, **settings)
    saved = checkpoint.load(run / "4-finetune").tensors
    now = {name: saved[f"parameters.{name}"] for name in ("extractor.weight", "extractor.bias", "head")}
    again = rule(mode="select", criterion="magnitude", keep=0.25).choose(now, 0)
    assert not torch.equal(again["extractor.weight"], saved["mask.extractor.weight"])  # the parameters have moved on
    run_finetune(run, data, **settings)
    assert torch.equal(moved(run, probed_run)["extractor.weight"], saved["mask.extractor.weight"])


# ------------------------------------------------------------------------------------------------------- frozen blocks


def blocks_of(model: Classifier, **settings) -> masks.Trained:
    given = {"source": "scratch", "scope": "block", "freeze": "last", "keep": 0.5}
    return choose_blocks(rule_of(schema.build("finetune", given | settings)), model)


def trained(model: Classifier, blocks: masks.Trained) -> dict[str, Tensor]:
    return {name: value for name, value in scaled(model).items() if blocks.trains(name)}


def test_blocks_are_chosen_by_public_things_alone():
    model = model_of("wrn-10-1")
    last = blocks_of(model)
    assert not any(last.trains(f"extractor.{name}") for name in ("stem.bias", "blocks.0.norm1.bias"))
    assert last.first == 2
    assert "2 of 4 blocks" in last.words
    assert last.trains("head")
    assert last.trains("extractor.final_norm.bias")
    with torch.no_grad():
        model.extractor.blocks[1].conv1.weight.mul_(50)
    heavy = blocks_of(model, freeze="magnitude", keep=0.3)
    assert heavy.first == 2
    assert not heavy.trains("extractor.blocks.2.conv1.weight")
    random = [blocks_of(model, freeze="random", seed=seed).names for seed in (0, 1, 2, 3, 0)]
    assert len(set(random)) > 1
    assert random[0] == random[4]
    with pytest.raises(UsageError, match="has no blocks"):
        blocks_of(model_of("patchnet"))


@pytest.mark.parametrize("views", [1, 2])
def test_gradients_above_frozen_blocks_are_those_of_autograd(views, monkeypatch):
    model = model_of("wrn-10-1")
    blocks = blocks_of(model)
    parameters, given = trained(model, blocks), batch_of(3)
    settings = {"scale": SETTING.scale, "views": views, "seed": 0, "flip": False, "clip_norm": 0.2}
    asked = {}
    for name, unit in model.extractor.units():
        unit.register_forward_hook(lambda *seen, name=name: asked.update({name: seen[2].requires_grad}))
    short = ClippedSums(model, SumSettings(**settings, frozen_first=blocks.first))
    found = [short.of(parameters, step, given) for step in range(2)]  # the second time from what was kept
    # no operation of a frozen block is recorded for a backward pass
    assert [asked[name] for name, _ in model.extractor.units()[: blocks.first]] == [False, False]
    monkeypatch.setattr(clipped_sums, "has_layer_gradients", lambda extractor: False)
    whole = ClippedSums(model, SumSettings(**settings))
    for step, sums in enumerate(found):
        assert apart(sums, whole.of(parameters, step, given)) < 1e-4
        assert not any("stem" in name or "blocks.0" in name for name in sums)


def total_of_the_later_blocks(ranks) -> dict[str, Tensor]:
    model = model_of("wrn-10-1")
    blocks = blocks_of(model)
    share = share_of(ranks, np.arange(5), *images_and_labels(), None)
    settings = SumSettings(scale=SETTING.scale, views=2, seed=5, flip=True, clip_norm=CLIP, frozen_first=blocks.first)
    return ClippedSums(model, settings).over_ranks(ranks, trained(model, blocks), STEP, share)


@pytest.mark.slow
def test_16_several_ranks_make_the_same_sums_where_blocks_are_frozen() -> None:
    alone, two = (of_rank_0(size, total_of_the_later_blocks) for size in (1, 2))
    assert apart(two, alone) < 1e-4


def test_outputs_are_kept_where_views_do_not_change(monkeypatch):
    model, given = model_of("wrn-10-1"), batch_of(4)
    made = []
    forward = FrozenPrefix._forward
    monkeypatch.setattr(FrozenPrefix, "_forward", lambda self, x: made.append(len(x)) or forward(self, x))
    prefix = FrozenPrefix(model, 2, keep=True)
    first = prefix.outputs(given.images[:3, None], given.members[:3])
    second = prefix.outputs(given.images[1:, None], given.members[1:])
    assert made == [3, 1]
    assert torch.equal(first[1:], second[:2])
    plain = FrozenPrefix(model, 2, keep=False)
    for _ in range(2):
        assert torch.allclose(plain.outputs(given.images[1:, None], given.members[1:]), second, atol=1e-5)
    assert made == [3, 1, 3, 3]
    monkeypatch.setattr(masks, "CACHE_BYTES", 2 * first[0].numel() * 4)
    small = FrozenPrefix(model, 2, keep=True)
    for _ in range(2):
        assert torch.allclose(small.outputs(given.images[:3, None], given.members[:3]), first, atol=1e-5)
    assert made[4:] == [3, 1]  # two of three found room
    assert prefix.outputs(given.images[:0, None], given.members[:0]).shape == (0, *first.shape[1:])
