"""Several labels an image and a weighted loss, in the sums of the fine-tune and in the fit of a head."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from small_models import CLIP, SETTING, STEP, apart, images_and_labels, model_of, norm_of, scaled
from tiny_run import CLASSES, Copy, Patch, blobs, run_finetune, run_probe

from dprandp.dpsgd import clipped_sums
from dprandp.dpsgd.clipped_sums import Batch, ClippedSums
from dprandp.losses import class_weights
from dprandp.probe import head as heads
from dprandp.vision.views import keyed_uniforms, private_views

COUNT, SHARES = 5, (0.1, 0.3, 0.6)


@pytest.mark.parametrize("arch", ["patchnet", "deep", "wrn-10-1", "vit-1-16-16"])
@pytest.mark.parametrize(("several", "shares"), [(True, None), (True, SHARES), (False, SHARES)])
def test_sums_of_all_parameters_equal_a_loop(arch: str, several: bool, shares: tuple[float, ...] | None) -> None:
    """One record after another by automatic differentiation of the loss written out, clipped, added."""
    setting = replace(SETTING, class_shares=shares, multi_label=several)
    images, labels = images_and_labels(COUNT)
    if several:
        labels = torch.from_numpy(np.random.default_rng(0).integers(0, 2, (COUNT, CLASSES)))
    found = ClippedSums(model_of(arch), setting).of(
        scaled(model_of(arch)), STEP, Batch(images, labels, torch.arange(COUNT))
    )
    model, weights = model_of(arch), class_weights(shares, several)
    wanted = {name: torch.zeros_like(value, dtype=torch.float64) for name, value in scaled(model).items()}
    for record in range(COUNT):
        draws = keyed_uniforms(np.array([record]), STEP, setting.seed, setting.views)
        views = private_views(images[record : record + 1], setting.views, draws, flip=setting.flip)[0]
        scores = model(model.extractor.normalise(views))
        if several:
            own = labels[record].to(scores.dtype)
            factor = 1.0 if weights is None else own * weights[1] + (1 - own) * weights[0]
            loss = -(factor * (own * scores.sigmoid().log() + (1 - own) * (-scores).sigmoid().log())).sum(dim=1).mean()
        else:
            loss = -(weights[labels[record]] * scores.log_softmax(dim=1)[:, labels[record]]).mean()
        parts = torch.autograd.grad(loss, list(dict(model.named_parameters()).values()))
        parts = {
            name: value * (setting.scale if name.startswith("extractor.") else 1)
            for name, value in zip(wanted, parts, strict=True)
        }
        factor = min(1.0, CLIP / norm_of(parts))
        for name, value in parts.items():
            wanted[name] += factor * value.double()
    assert apart(found, wanted) < 2e-3


def test_a_run_hands_the_declaration_to_both_mechanisms(
    public_run: Path, tmp_path: Path, copy: Copy, monkeypatch: Patch
) -> None:
    """The probe, the fine-tune and its refit, with units of several images too."""
    made = blobs()
    for split in ("train", "test"):
        several = np.eye(CLASSES, dtype=np.uint8)[made[f"y_{split}"]]
        several[::4] = 1 - several[::4]
        made[f"y_{split}"] = several
    made["patient_train"] = np.arange(len(made["y_train"])) // 2
    np.savez(tmp_path / "several.npz", **made)
    seen: list[tuple[int, ...]] = []

    def watched(features, labels, *arguments, class_weights=None, **options):
        seen.append((labels.ndim, class_weights.ndim))
        return original(features, labels, *arguments, class_weights=class_weights, **options)

    original = heads.clipped_softmax_sum
    monkeypatch.setattr(heads, "clipped_softmax_sum", watched)
    settings: list[tuple[object, bool]] = []
    prepare = clipped_sums.ClippedSums.__init__

    def noted(self, model, setting):
        settings.append((setting.class_shares, setting.multi_label))
        prepare(self, model, setting)

    monkeypatch.setattr(clipped_sums.ClippedSums, "__init__", noted)
    data = {"data": f"npz:{tmp_path / 'several.npz'}", "class_shares": "0.3,0.4,0.5"}
    run = copy(public_run)
    probed = run_probe(run, **data)
    tuned = run_finetune(run, **data)
    assert set(seen) == {(2, 2)}
    assert settings == [((0.3, 0.4, 0.5), True)]
    for result in (probed, tuned):
        assert result["multi_label"]
        assert result["class_shares"] == [0.3, 0.4, 0.5]
    units = run_probe(copy(public_run), **data, unit_column="patient")
    assert units["train_units"] == units["train_examples"] // 2


def test_weights_are_those_of_the_declaration_alone(
    public_run: Path, data: str, copy: Copy, monkeypatch: Patch
) -> None:
    """The classes of the data are about equally frequent; without a declaration nothing is weighted."""
    seen: list[torch.Tensor | None] = []
    original = heads.clipped_softmax_sum

    def watched(*arguments, class_weights=None, **options):
        seen.append(class_weights)
        return original(*arguments, class_weights=class_weights, **options)

    monkeypatch.setattr(heads, "clipped_softmax_sum", watched)
    assert "class_shares" not in run_probe(copy(public_run), data)
    assert set(seen) == {None}
    seen.clear()
    run_probe(copy(public_run), data, class_shares="0.7,0.2,0.1")
    assert all(torch.equal(weights, class_weights((0.7, 0.2, 0.1), False)) for weights in seen)


def test_declared_shares_raise_the_balanced_accuracy_of_a_rare_class() -> None:
    """Two Gaussian clouds, 95 and 5 % of 2,000 records; DP-SGD's arithmetic with the noise of ε = 1."""
    from sklearn.metrics import balanced_accuracy_score

    from dprandp.privacy.gaussian_dp import gaussian_dp_mu

    generator = torch.Generator().manual_seed(0)
    rare = torch.rand(4000, generator=generator) < 0.05
    rows = torch.randn(4000, 20, generator=generator)
    rows[:, 0] += torch.where(rare, 1.5, -1.5)
    rows = torch.nn.functional.normalize(torch.cat([rows, torch.full((4000, 1), 3.0)], dim=1), dim=1)
    labels, mu, steps, clip_norm = rare.long(), gaussian_dp_mu(1.0, 1e-5), 60, 0.5

    def balanced(shares: tuple[float, ...] | None) -> float:
        noise = torch.Generator().manual_seed(1)
        rate = heads.default_lr(1.0, 1e-5, 2000, steps, clip_norm)
        rule = heads.HeadSettings(rate, 0.9, "average", class_weights(shares, False))
        state = heads.begin_head(torch.zeros(21, 2))
        for number in range(steps):
            clipped = heads.clipped_softmax_sum(
                rows[:2000], labels[:2000], state["head"], clip_norm, class_weights=rule.class_weights
            )
            clipped += steps**0.5 / mu * clip_norm * torch.randn(clipped.shape, generator=noise)
            heads.update_head(state, clipped / 2000, rule, number, steps)
        answers = (rows[2000:] @ heads.released_head(state, rule)).argmax(dim=1)
        return float(balanced_accuracy_score(labels[2000:], answers))

    plain, weighted = balanced(None), balanced((0.95, 0.05))
    assert plain < 0.7
    assert weighted > plain + 0.2
