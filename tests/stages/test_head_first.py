"""Phases II and III in one training (Tang et al. 2023): the first steps train the head and the last norm alone."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from small_models import SETTING, apart, batch_of, model_of, norm_of, scaled
from tiny_run import Copy, Patch, Record, Stopped, ledger_of, run_finetune, stop_at

from dprandp.dpsgd import clipped_sums
from dprandp.dpsgd.clipped_sums import ClippedSums
from dprandp.dpsgd.masks import after_the_blocks
from dprandp.errors import InputError, UsageError

LAST = {"head", "extractor.final_norm.weight", "extractor.final_norm.bias"}
WITHOUT = {"source": "pretrain", "steps": 5, "head_steps": 3, "head_lr": 2.0, "lr": 0.1, "refit_steps": 0}


@pytest.mark.parametrize("views", [1, 3])
def test_the_sum_is_that_of_automatic_gradients_of_the_same_parameters(monkeypatch: Patch, views: int) -> None:
    """The oracle: gradients through the whole network, of which the head's and the last norm's are clipped."""
    model, batch = model_of("wrn-10-1"), batch_of(6)
    model.head.data.normal_(generator=torch.Generator().manual_seed(1))
    chosen = after_the_blocks(model)
    assert chosen.names == LAST
    assert chosen.first == len(model.extractor.units())
    own = {name: value for name, value in scaled(model).items() if chosen.trains(name)}
    found = ClippedSums(model, replace(SETTING, views=views, frozen_first=chosen.first)).of(own, 2, batch)
    monkeypatch.setattr(clipped_sums, "has_layer_gradients", lambda extractor: False)
    automatic = ClippedSums(model, replace(SETTING, views=views)).of(own, 2, batch)
    assert found.keys() == LAST
    assert norm_of(found) > 0
    assert apart(found, automatic) < 1e-4
    whole = ClippedSums(model, replace(SETTING, views=views)).of(scaled(model), 2, batch)  # the control
    assert apart(found, {name: whole[name] for name in LAST}) > 1e-2


def test_only_they_get_noise_and_move_until_the_joint_steps_begin(
    copy: Copy, wide_run: Path, data: str, record: Record
) -> None:
    run = copy(wide_run)
    seen = record(run)
    result = run_finetune(run, data, {"insecure_seed": 4}, checkpoint_every=1, ema=0.0, **WITHOUT)
    names = [set(release.released) for release in seen.releases]
    assert names[:3] == [LAST] * 3
    assert all(len(later) > len(LAST) for later in names[3:])
    assert len(names) == 5
    assert {clip for clip, _ in seen.clips} == {1.0}
    # every step is of one mechanism, with one noise: what is charged are its five steps
    assert [(charge.stage, charge.attempt) for charge in ledger_of(run).charges] == [("finetune", 1)] * 5
    noise = [float(release.noise.std()) for release in seen.releases[3:]]
    assert noise == pytest.approx([result["noise_multiplier"]] * 2, rel=0.1)
    heads = torch.cat([release.noise for release in seen.releases[:3]])
    assert float(heads.std()) == pytest.approx(result["noise_multiplier"], rel=0.2)
    assert (result["source"], result["head_steps"], result["head_lr"]) == ("pretrain", 3, 2.0)
    card = (run / "model/MODEL_CARD.md").read_text(encoding="utf-8")
    assert "the first 3 steps train the head and the last norm alone, at learning rate 2" in card
    assert not (run / "3-probe").exists()


def test_the_blocks_stay_as_pretrained_where_all_steps_are_of_the_head(
    copy: Copy, wide_run: Path, data: str
) -> None:
    run = copy(wide_run)
    before = load_file(run / "2-pretrain/extractor.safetensors")
    run_finetune(run, data, **(WITHOUT | {"head_steps": 5}))
    after = load_file(run / "model/model.safetensors")
    blocks = {name: value for name, value in before.items() if f"extractor.{name}" not in LAST}
    assert len(blocks) > 10
    assert all(torch.equal(after[f"extractor.{name}"], value) for name, value in blocks.items())
    assert not torch.equal(after["extractor.final_norm.bias"], before["final_norm.bias"])
    assert bool(after["head"].any())


def test_a_training_that_was_stopped_among_the_head_s_steps_goes_on(
    copy: Copy, wide_run: Path, data: str, record: Record
) -> None:
    run = copy(wide_run)
    with pytest.MonkeyPatch.context() as patch:
        stop_at(patch, 2)
        with pytest.raises(Stopped):
            run_finetune(run, data, checkpoint_every=1, **WITHOUT)
    seen = record(run)
    run_finetune(run, data, checkpoint_every=1, **WITHOUT)
    names = [set(release.released) == LAST for release in seen.releases]
    assert names == [True, True, False]  # updates 1 to 3; the step that was lost stays charged, so there is no fifth
    assert ledger_of(run).charged_steps("finetune", 1) == 5


def test_what_it_cannot_start_from_is_refused(copy: Copy, public_run: Path, data: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="a patchnet need the probe's whitening"):
        run_finetune(copy(public_run), data, **WITHOUT)
    with pytest.raises(InputError, match="needs stage 'pretrain'"):
        run_finetune(tmp_path / "new", data, **WITHOUT)
    assert not (tmp_path / "new/privacy/ledger.jsonl").exists()
