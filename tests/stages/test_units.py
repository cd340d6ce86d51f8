"""Promise 20 on whole stages: what is drawn, clipped, charged and disclosed is a unit with all its images."""

from __future__ import annotations

import html
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from small_models import SETTING, apart, batch_of, model_of, scaled
from tiny_run import (
    TRAIN,
    Copy,
    Patch,
    Recorder,
    blobs,
    ledger_of,
    plans_of,
    read_json,
    run_finetune,
    run_probe,
    run_scratch,
)

from dprandp.dpsgd import clipped_sums
from dprandp.dpsgd import units as unit_rows
from dprandp.dpsgd.clipped_sums import ClippedSums
from dprandp.errors import BudgetError, CheckpointError, InputError
from dprandp.privacy import clipping
from dprandp.report import page as report
from dprandp.runs.directory import RunDir

UNIT = "one patient (column patient_train)"
PATIENTS = np.sort(np.concatenate([np.arange(30), np.random.default_rng(4).integers(0, 30, TRAIN - 30)]))
PATIENTS = np.random.default_rng(5).permutation(PATIENTS)
UNITS = 30


@pytest.fixture
def patients(tmp_path: Path) -> str:
    np.savez(tmp_path / "patients.npz", **blobs(), patient_train=PATIENTS)
    return f"npz:{tmp_path / 'patients.npz'}"


def slow_clipped(images: torch.Tensor, sizes: list[int], clip_norm: float) -> torch.Tensor:
    """Units one after another: the mean of their images' gradients, clipped, summed."""
    total = torch.zeros(images.shape[1], dtype=torch.float64)
    for part in images.double().split(sizes):
        mean = part.mean(0)
        total += mean * min(1.0, clip_norm / float(mean.norm()))
    return total


class Seen(Recorder):
    """Also keeps the gradients of images that went into each sum of the fine-tune, and what came out of the means."""

    def install_units(self, patch: Patch) -> Seen:
        self.install(patch)
        self.images: list[list[torch.Tensor]] = []
        self.sizes: list[list[int]] = []
        honest_means, honest_sum = clipped_sums.unit_means, unit_rows.clipped_softmax_sum_of_units

        def means(microbatches: Iterator[Mapping[str, torch.Tensor]], sizes: list[int]):
            rows: list[torch.Tensor] = []
            self.images.append(rows)
            self.sizes.append(list(sizes))

            def watched():
                for gradients in microbatches:
                    rows.append(torch.cat([value.flatten(1) for value in gradients.values()], dim=1))
                    yield gradients

            return honest_means(watched(), sizes)

        def softmax_sum(features, labels, offsets, weight, clip_norm, **options):
            self.clips.append((clip_norm, len(offsets) - 1))
            return honest_sum(features, labels, offsets, weight, clip_norm, **options)

        patch.setattr(clipped_sums, "unit_means", means)
        patch.setattr(unit_rows, "clipped_softmax_sum_of_units", softmax_sum)
        return self


def test_20_a_run_on_patients_draws_clips_and_charges_patients(
    copy: Copy, public_run: Path, patients: str, monkeypatch: Patch
) -> None:
    run = copy(public_run)
    seen = Seen(run).install_units(monkeypatch)
    options = {"unit_column": "patient"}
    probed = run_probe(run, patients, **options)
    tuned = run_finetune(run, patients, batch_size=10, refit_steps=2, **options)
    # drawn, clipped and divided by units
    assert {examples for examples, _, _ in seen.draws} == {UNITS}
    assert all(indices.max(initial=0) < UNITS for _, _, indices in seen.draws)
    for release, (_, count) in zip(seen.releases, seen.clips, strict=True):
        assert count == len(release.indices)
    assert {release.divisor for release in seen.of("probe")} == {UNITS}
    assert {round(release.divisor, 6) for release in seen.of("finetune")} == {10}
    assert {release.divisor for release in seen.of("finetune.head")} == {UNITS}
    # the fine-tune's sums against a loop over units, and the images of exactly the drawn units
    for release, rows, sizes in zip(seen.of("finetune"), seen.images, seen.sizes, strict=True):
        assert sizes == np.bincount(PATIENTS)[release.indices].tolist()
        if rows:
            joint = torch.cat([value.flatten() for value in release.sums.values()])
            singles = torch.cat(rows)
            assert torch.allclose(joint, slow_clipped(singles, sizes, 1.0), atol=1e-4)
            # control: images clipped one by one would be seen
            each = clipping.sum_of_clipped([{"all": singles}], {"all": singles[0]}, 1.0)["all"]
            assert not torch.allclose(each / np.mean(sizes), joint, atol=1e-4)
    # accounted, and said
    for name in ("probe", "finetune", "finetune.head"):
        assert plans_of(run)[name]["plan"]["examples"] == UNITS
    assert ledger_of(run).header["data_unit"] == "patient (column patient_train)"
    assert ledger_of(run).examples == UNITS
    plan = read_json(run / "privacy/plan.json")
    assert (plan["unit"], plan["examples"]) == (UNIT, UNITS)
    for result in (probed, tuned):
        assert (result["unit"], result["train_units"], result["train_examples"]) == (UNIT, UNITS, TRAIN)
    rundir = RunDir.open(run, create=False)
    with rundir.lock():
        page = html.unescape(report.write(rundir).read_text(encoding="utf-8"))
    card = (run / "model/MODEL_CARD.md").read_text(encoding="utf-8").replace("\\", "")
    for text in (page, card):
        assert UNIT in text
        assert f"N = {UNITS} units, with {TRAIN} images" in text
        assert "each patient's gradient, the mean over all its images, is clipped" in text


def test_20_another_unit_is_refused(copy: Copy, public_run: Path, patients: str, tmp_path: Path) -> None:
    run = copy(public_run)
    run_probe(run, patients, unit_column="patient", steps=2)
    ledger = (run / "privacy/ledger.jsonl").read_bytes()
    for column, options in (("image", {}), (None, {}), (None, {"resume": True}), (None, {"overwrite": True})):
        for stage in (run_probe, run_finetune):
            with pytest.raises(BudgetError, match="unit of privacy was fixed as one patient"):
                stage(run, patients, options, unit_column=column)
    # the same column with another assignment of images to patients
    np.savez(tmp_path / "patients.npz", **blobs(), patient_train=np.roll(PATIENTS, 1))
    with pytest.raises(InputError, match="their content, order, labels or units differ"):
        run_probe(run, patients, unit_column="patient", steps=2)
    # a ledger of another unit beside this plan
    lines = ledger.split(b"\n")
    assert b"patient (column" in lines[0]
    other = copy(public_run)
    np.savez(tmp_path / "patients.npz", **blobs(), patient_train=PATIENTS)
    run_probe(other, patients, steps=2)
    (other / "privacy/plan.json").write_bytes((run / "privacy/plan.json").read_bytes())
    with pytest.raises(CheckpointError, match=r"unit is 'one patient .* in the ledger"):
        run_probe(other, patients, {"overwrite": True}, unit_column="patient", steps=2)


def sums_of(run: Path, data: str, patch: Patch, stage: Callable[..., Any], **options: Any) -> list[torch.Tensor]:
    """The clipped sums of a stage's first mechanism, before the noise, with every unit in every batch."""
    with patch.context() as inner:
        seen = Recorder(run).install(inner)
        stage(run, data, {"insecure_seed": 3}, **options)
    first = seen.releases[0].mechanism
    return [torch.cat([value.double().flatten() for value in release.sums.values()]) for release in seen.of(first)]


@pytest.mark.parametrize("stage", ["probe", "scratch"])
def test_4_removing_one_patient_moves_a_sum_by_at_most_the_clip_norm(
    copy: Copy, public_run: Path, tmp_path: Path, monkeypatch: Patch, stage: str
) -> None:
    """A whole stage with and without one patient, whose six images are extreme; what is compared is the first sum."""
    made = blobs(train=36, test=6)
    groups = np.repeat(np.arange(9), [6, 4, 4, 4, 4, 4, 4, 4, 2])
    made["x_train"][:6] = np.random.default_rng(0).integers(0, 2, (6, 16, 16, 3), dtype=np.uint8) * 255
    kept = groups != 0
    smaller = made | {"x_train": made["x_train"][kept], "y_train": made["y_train"][kept]}
    sums = []
    for count, (content, units) in enumerate(((made, groups), (smaller, groups[kept]))):
        path = tmp_path / f"{count}" / "set.npz"
        path.parent.mkdir()
        np.savez(path, **content, patient_train=units)
        run = copy(public_run) if stage == "probe" else tmp_path / f"run-{count}"
        public = {"unit_column": "patient", "steps": 1, "clip_norm": 0.5, "batch_size": len(np.unique(units))}
        make = run_probe if stage == "probe" else run_scratch
        sums.append(sums_of(run, f"npz:{path}", monkeypatch, make, **public)[0])
    distance = float((sums[0] - sums[1]).norm())
    assert 0.02 < distance <= 0.5 * (1 + 1e-5)


def test_6_the_microbatch_cuts_no_patient_in_two() -> None:
    parameters = scaled(model_of("wrn-10-1"))
    sums = [
        ClippedSums(model_of("wrn-10-1"), replace(SETTING, microbatch=size)).of(parameters, 0, batch_of(9, [5, 1, 3]))
        for size in (2, 4, 500)
    ]
    assert max(apart(other, sums[0]) for other in sums[1:]) < 1e-4


@pytest.mark.slow
def test_discrete_noise_in_both_stages(copy: Copy, public_run: Path, data: str, monkeypatch: Patch) -> None:
    run = copy(public_run)
    seen = Recorder(run).install(monkeypatch)
    probed = run_probe(run, data, steps=20, noise="discrete")
    tuned = run_finetune(run, data, noise="discrete", batch_size=TRAIN, steps=2, refit_steps=4)
    for name, tolerance in (("probe", 0.1), ("finetune", 0.1), ("finetune.head", 0.2)):
        plan = plans_of(run)[name]["plan"]
        assert plan["noise"] == "discrete"
        assert seen.observed_event(name).noise_multiplier == pytest.approx(plan["noise_multiplier"], rel=tolerance)
    assert all(total.dtype == torch.float64 for release in seen.releases for total in release.sums.values())
    assert {charge.noise for charge in ledger_of(run).charges} == {"discrete"}
    assert probed["noise"] == tuned["noise"] == "discrete"
    assert 3.9 < tuned["epsilon"] <= 4.0
    card = (run / "model/MODEL_CARD.md").read_text(encoding="utf-8")
    assert "discrete Gaussian noise" in card
    assert "None in the noise" in card


def test_a_batch_of_units_takes_their_images_and_no_others() -> None:
    generator = torch.Generator().manual_seed(1)
    features, labels = torch.randn(9, 5, generator=generator), torch.randint(0, 3, (9,), generator=generator)
    weight, group = torch.randn(5, 3, generator=generator), np.array([2, 0, 1, 1, 3, 0, 2, 2, 3])
    rows = unit_rows.UnitRows(np.argsort(group, kind="stable"), np.array([0, 2, 4, 7, 9]))
    for members in ([0, 3], [2], [0, 1, 2, 3], []):
        expected = torch.zeros(5, 3, dtype=torch.float64)
        for unit in members:
            residual = torch.softmax(features @ weight, 1) - torch.eye(3)[labels]
            gradient = (features[:, :, None] * residual[:, None, :])[group == unit].double().mean(0)
            expected += gradient * min(1.0, 0.3 / float(gradient.norm()))
        units = np.array(members, dtype=np.int64)
        found = rows.clipped_softmax_sum(features, labels, units, weight, 0.3, precise=True)
        assert torch.allclose(found, expected, atol=2e-5)
