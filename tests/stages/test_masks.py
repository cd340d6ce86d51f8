"""Training a part of the weights: how it is chosen, that nothing else moves, and that the clip sees what is left."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from rank_processes import of_rank_0
from safetensors.torch import load_file
from test_ranks import CLIP, SETTING, apart, blobs, model_of, scaled
from tiny_run import run_finetune

from dprandp import finetune
from dprandp.config import schema
from dprandp.dpsgd.clipped_sums import ClippedSums, loss_function, share_of
from dprandp.dpsgd.masks import ALL_WEIGHTS, MaskRule, rule_of
from dprandp.errors import UsageError
from dprandp.privacy.clipping import per_example_gradients
from dprandp.runs import checkpoint
from dprandp.vision.images import to_input
from dprandp.vision.views import keyed_uniforms, private_views

Copy = Callable[[Path], Path]


def rule(**changes) -> MaskRule:
    given = {"mode": "freeze", "criterion": "random", "keep": 0.1, "scope": "global", "every": 3, "seed": 0,
             "zero": False}  # fmt: skip
    return MaskRule(**(given | changes))


def parameters_of() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = {"extractor.a.weight": (40, 5), "extractor.b.weight": (10, 3, 5, 2), "extractor.b.bias": (10,),
              "head": (6, 3)}  # fmt: skip
    made = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    made["extractor.a.weight"] *= 10
    return made


# ------------------------------------------------------------------------------------------------------------ choosing


@pytest.mark.parametrize("criterion", ["random", "magnitude"])
@pytest.mark.parametrize("scope", ["global", "layer"])
@pytest.mark.parametrize("keep", [0.1, 0.333, 0.9])
def test_the_part_is_the_part_and_head_and_biases_are_not_in_it(criterion: str, scope: str, keep: float) -> None:
    masks = rule(criterion=criterion, scope=scope, keep=keep).choose(parameters_of(), 0)
    assert set(masks) == {"extractor.a.weight", "extractor.b.weight"}
    assert all(mask.dtype == torch.bool and mask.shape == parameters_of()[name].shape for name, mask in masks.items())
    counts = {name: int(mask.sum()) for name, mask in masks.items()}
    if scope == "layer":
        assert counts == {"extractor.a.weight": round(200 * keep), "extractor.b.weight": round(300 * keep)}
    assert abs(sum(counts.values()) - 500 * keep) <= 1


def test_magnitude_takes_the_largest_of_all() -> None:
    parameters = parameters_of()
    masks = rule(criterion="magnitude", keep=0.3).choose(parameters, 0)  # a's weights are ten times as long as b's
    chosen = torch.cat([parameters[name].abs()[mask] for name, mask in masks.items()])
    left = torch.cat([parameters[name].abs()[~mask] for name, mask in masks.items()])
    assert chosen.min() >= left.max()
    assert masks["extractor.a.weight"].float().mean() > 5 * masks["extractor.b.weight"].float().mean()
    even = rule(criterion="magnitude", keep=0.3, scope="layer").choose(parameters, 0)
    assert even["extractor.b.weight"].float().mean() == pytest.approx(0.3, abs=0.01)


def test_random_is_spread_evenly_and_a_function_of_seed_and_step_alone() -> None:
    parameters = parameters_of()
    masks = rule(keep=0.5).choose(parameters, 0)
    shares = [float(mask.float().mean()) for mask in masks.values()]
    assert all(abs(share - 0.5) < 5 * 0.5 / math.sqrt(200) for share in shares)
    doubled = {name: 2 * value for name, value in parameters.items()}
    same = rule(keep=0.5).choose(doubled, 0)
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
        ({"freeze": "random", "keep": 0.0}, "outside (0, 1)"),
        ({"select": "random", "keep": 0.1, "prune": "zero"}, "needs --freeze"),
        ({"freeze": "random", "keep": 0.1, "every": 3}, "needs --select"),
        ({"scope": "layer"}, "needs --keep"),
        ({"select": "random", "keep": 0.1, "every": 0}, "not a number of steps"),
        ({"freeze": "random", "keep": 0.1, "extractor_scale": 0.0}, "freezes the whole extractor"),
    ],
)
def test_what_makes_no_sense_is_refused(settings: dict, said: str) -> None:
    with pytest.raises(UsageError) as caught:
        rule_of(schema.build("finetune", settings))
    assert said in caught.value.problem
    assert caught.value.fix


def test_a_refusal_comes_before_anything_is_paid(copy: Copy, probed_run: Path, data: str) -> None:
    run = copy(probed_run)
    charged = (run / "privacy/ledger.jsonl").read_bytes()
    with pytest.raises(UsageError, match="further release"):
        run_finetune(run, data, freeze="gradient", keep=0.5)
    assert (run / "privacy/ledger.jsonl").read_bytes() == charged


# ------------------------------------------------------------------------------------------------------------ clipping


def total_over(ranks, masks, records) -> dict[str, torch.Tensor]:
    model, made = model_of("patchnet"), blobs(3)
    images, labels = to_input(made["x_train"]), torch.from_numpy(made["y_train"])
    masks = {name: mask & (ranks.rank == 0) for name, mask in masks.items()}  # the others are given rank 0's
    share = share_of(ranks, records, images, labels, None)
    return ClippedSums(model, SETTING).over_ranks(ranks, scaled(model_of("patchnet")), 4, share, masks)


@pytest.mark.parametrize("size", [1, 3])
def test_4_the_mask_comes_before_the_norm(size: int) -> None:
    """The oracle: autograd, mask, norm, clip, one record after another. Clip before mask would be shorter."""
    records = torch.tensor([3, 77, 119]).numpy()
    parameters = scaled(model_of("patchnet"))
    masks = rule(keep=0.2).choose(parameters, 0)
    loss, made = loss_function(model_of("patchnet"), SETTING.scale, torch.device("cpu")), blobs(3)
    right, wrong = ({name: torch.zeros_like(value).double() for name, value in parameters.items()} for _ in range(2))
    for record in records:
        image, label = to_input(made["x_train"][record : record + 1]), torch.tensor([made["y_train"][record]])
        views = private_views(image, 2, keyed_uniforms(torch.tensor([record]).numpy(), 4, 5, 2), flip=True)
        (rows,) = per_example_gradients(loss, parameters, views, label, 1)
        whole = {name: value[0].double() for name, value in rows.items()}
        cut = {name: value * masks.get(name, torch.tensor(1)) for name, value in whole.items()}
        norms = [math.sqrt(sum(float(g.square().sum()) for g in gradient.values())) for gradient in (cut, whole)]
        for name in parameters:
            right[name] += cut[name] * min(1, CLIP / norms[0])
            wrong[name] += cut[name] * min(1, CLIP / norms[1])
    total = of_rank_0(size, total_over, masks, records)
    assert apart(total, right) < 1e-3
    assert apart(total, wrong) > 1e-2
    assert all(not total[name][~mask].any() for name, mask in masks.items())


# ------------------------------------------------------------------------------------------------------- the fine-tune


def moved(run: Path, start: Path) -> dict[str, torch.Tensor]:
    """Name -> bool: which released parameters of the extractor differ from those that the fine-tune began with."""
    after, before = (load_file(path / "model/model.safetensors") for path in (run, start))
    return {name: after[name] != before[name] for name in after if name.startswith("extractor.")}


@pytest.mark.parametrize("scope", [None, "layer"])
def test_frozen_weights_do_not_move_at_all(copy: Copy, probed_run: Path, data: str, scope: str | None) -> None:
    run = copy(probed_run)
    result = run_finetune(run, data, freeze="random", keep=0.25, scope=scope)
    changed = moved(run, probed_run)["extractor.weight"]
    assert 0.24 < float(changed.float().mean()) <= 0.25
    assert moved(run, probed_run)["extractor.bias"].all()
    assert result["trained_weights"].startswith(f"{int(changed.sum()):,} of {changed.numel():,} weights")
    card = (run / "model/MODEL_CARD.md").read_text(encoding="utf-8")
    assert "chosen at random from a public seed once, before the training; the others stay" in card
    whole = copy(probed_run)
    assert run_finetune(whole, data)["trained_weights"] == ALL_WEIGHTS
    assert moved(whole, probed_run)["extractor.weight"].all()


def test_pruned_weights_are_zero(copy: Copy, probed_run: Path, data: str) -> None:
    run = copy(probed_run)
    run_finetune(run, data, freeze="magnitude", keep=0.25, prune="zero")
    before, after = (load_file(path / "model/model.safetensors")["extractor.weight"] for path in (probed_run, run))
    assert float((after == 0).float().mean()) == pytest.approx(0.75, abs=0.01)
    assert before[after != 0].abs().min() >= before[after == 0].abs().max()


def test_selection_moves_more_weights_than_it_trains_at_a_time(copy: Copy, probed_run: Path, data: str) -> None:
    run = copy(probed_run)
    run_finetune(run, data, select="random", keep=0.25, every=2, steps=4, momentum=0.5)
    changed = float(moved(run, probed_run)["extractor.weight"].float().mean())
    assert changed == pytest.approx(1 - 0.75**2, abs=0.05)  # two choices


def test_a_resumed_selection_goes_on_with_the_weights_it_had(
    copy: Copy, probed_run: Path, data: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By magnitude of noisy parameters: a choice made anew after a stop would be another one."""
    run, hits = copy(probed_run), []

    def stop_at_third(name: str) -> None:
        hits.append(name)
        if hits.count("update-applied") == 3:
            raise KeyboardInterrupt

    settings = {"select": "magnitude", "keep": 0.25, "every": 100, "checkpoint_every": 1, "lr": 50.0}
    with monkeypatch.context() as patch:
        patch.setattr(finetune.faults, "point", stop_at_third)
        with pytest.raises(KeyboardInterrupt):
            run_finetune(run, data, **settings)
    saved = checkpoint.load(run / "4-finetune").tensors
    now = {name: saved[f"parameters.{name}"] for name in ("extractor.weight", "extractor.bias", "head")}
    again = rule(mode="select", criterion="magnitude", keep=0.25).choose(now, 0)
    assert not torch.equal(again["extractor.weight"], saved["mask.extractor.weight"])  # the parameters have moved on
    run_finetune(run, data, **settings)
    assert torch.equal(moved(run, probed_run)["extractor.weight"], saved["mask.extractor.weight"])


