"""Tuning in whole runs: free where it reads nothing private, charged where it does, and said in either case."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_run import (
    CLASSES,
    PROBE,
    TRAIN,
    Copy,
    Patch,
    context,
    forbid_reading,
    ledger_of,
    plans_of,
    read_json,
    run_finetune,
    run_probe,
    run_tune,
    write_blobs,
)

from dprandp import data as datasets
from dprandp import probe, tune
from dprandp.config import schema
from dprandp.errors import BudgetError, CheckpointError, UsageError
from dprandp.privacy.accounting import GaussianEvent, compose
from dprandp.privacy.adaptive import compose_stages
from dprandp.privacy.clipping import clipped_softmax_sum
from dprandp.privacy.gaussian_dp import gaussian_dp_mu
from dprandp.privacy.ledger import Ledger
from dprandp.privacy.mechanism import PrivateStep
from dprandp.privacy.selection import Trial
from dprandp.privacy.tuning import TuningEvent
from dprandp.probe.head import HeadSettings
from dprandp.runs.directory import RunDir, frozen, thawed
from dprandp.runs.ledger import open_run_ledger
from dprandp.runs.tuning import read_tuning, tuning_of
from dprandp.tune import TuneConfig, settings_for


def probe_as_tuned(run: Path, data: str, **changes: Any) -> dict[str, Any]:
    with context(run) as given:
        flags = {"data": data} | changes
        resolved = schema.resolve("probe", "tiny", run / "tuned.toml", flags)
        return thawed(frozen(probe.run(resolved, given)))


# ---------------------------------------------------------------------------------------------------------------- free


@pytest.fixture(scope="module")
def privately_tuned(tmp_path_factory: pytest.TempPathFactory, public_run: Path, data: str) -> Path:
    """A run after tuning on the private data."""
    run = Path(shutil.copytree(public_run, tmp_path_factory.mktemp("private") / "run"))
    run_tune(run, data, asked={"on": "private"})
    return run


@pytest.mark.slow
def test_synthetic_tuning_reads_nothing_private_and_costs_nothing(
    copy: Copy, public_run: Path, data: str, monkeypatch: Patch
) -> None:
    run, second = copy(public_run), copy(public_run)
    with monkeypatch.context() as patch:
        forbid_reading(patch)
        result = run_tune(run, data)
        assert run_tune(run, data) == result  # skipped
        assert {**run_tune(second, data), "seconds": 0} == {**result, "seconds": 0}
    assert not (run / "privacy").exists()
    assert not (run / "private").exists()
    assert len(result["tried"]) == 4
    listed = settings_for(schema.build("probe", PROBE), PROBE["dims"])
    assert result["tried"][0]["steps"] == PROBE["steps"]
    assert len(listed) == len(set(listed)) == 30
    probed = probe_as_tuned(run, data)
    chosen = result["chosen"]
    assert (probed["lr"], probed["steps"]) == (chosen["lr"], chosen["steps"])
    assert probed["tuned"] == {
        "on": "synthetic", "trials": 4, "charged_epsilon": 0.0, "settings": ["dims", "lr", "steps"], "used": True,
    }  # fmt: skip
    card = (run / "model/MODEL_CARD.md").read_text(encoding="utf-8")
    assert "on synthetic images of this run: 4 settings tried under simulated noise, no cost in ε" in card
    tuned = run_finetune(run, data, steps=1, refit_steps=0)
    assert tuned["tuned"] == probed["tuned"]
    # settings of others are not called tuned
    result = run_probe(second, data, lr=0.123, tuned_on="another hospital's <scans>")
    assert result["tuned"]["used"] is False
    assert result["tuned_on"] == "another hospital's <scans>"
    card = (second / "model/MODEL_CARD.md").read_text(encoding="utf-8")
    assert "the stage ran with other settings" in card
    assert "tuned on “another hospital's &lt;scans&gt;”" in card


def test_public_data_are_read_from_their_training_split_alone(
    copy: Copy, public_run: Path, data: str, tmp_path: Path, monkeypatch: Patch
) -> None:
    public = write_blobs(tmp_path / "public.npz", seed=9, train=TRAIN - 20)
    read = []
    train = datasets.Dataset.train
    monkeypatch.setattr(datasets.Dataset, "train", lambda self: read.append(self.spec.name) or train(self))
    for name in ("test", "fingerprint"):
        monkeypatch.setattr(datasets.Dataset, name, None)
    result = run_tune(copy(public_run), data, asked={"on": public})
    assert set(read) == {public}  # the private ones are read for their hashes alone
    assert (result["on"], result["fitted_examples"] + result["held_out_examples"]) == (public, TRAIN - 20)
    with pytest.raises(UsageError, match="holds images of the private data set"):
        run_tune(copy(public_run), data, asked={"on": data})


def test_the_simulated_noise_is_that_of_the_private_fit_beside_its_signal(monkeypatch: Patch) -> None:
    """n of N examples, noise n/N times as large: measured on a signal of nothing but zeros."""
    n, examples, steps, mu = 50, 4000, 400, 0.3
    seen = []
    monkeypatch.setattr(tune, "clipped_softmax_sum", lambda *rest: torch.zeros(20, 3))
    monkeypatch.setattr(tune, "update_head", lambda state, update, *rest: seen.append(update))
    tune.simulate(
        torch.zeros(n, 20), torch.zeros(n, dtype=torch.long), 3, steps, 0.5, mu, examples,
        HeadSettings(1.0, 0.9, "average"), torch.Generator().manual_seed(0),
    )  # fmt: skip
    noise = torch.stack(seen).double()
    sigma = math.sqrt(steps) / mu  # of the private fit: σ C / N beside a mean gradient
    assert float(noise.std()) == pytest.approx(sigma * 0.5 / examples, rel=5 / math.sqrt(2 * noise.numel()))


def test_a_simulation_is_the_probe_itself(copy: Copy, public_run: Path, data: str, monkeypatch: Patch) -> None:
    """Same features, no noise: the head that ``simulate`` makes is the head that the probe releases."""
    run = copy(public_run)
    run_probe(run, data, epsilon=math.inf, lr=3.0)
    features = torch.from_numpy(np.load(run / "private/features.npy"))
    labels = torch.from_numpy(datasets.open_dataset(data, run.parent).train().labels)
    simulated = tune.simulate(
        features, labels, CLASSES, PROBE["steps"], schema.ProbeConfig.clip_norm, math.inf, TRAIN,
        HeadSettings(3.0, 0.9, "average"), torch.Generator(),
    )  # fmt: skip
    with context(run) as given:
        assert torch.allclose(simulated, probe.load_head(given, simulated), atol=1e-6)


def test_the_synthetic_task_is_many_instances_a_class(public_run: Path) -> None:
    with context(public_run) as given:
        crops, labels, classes = tune.synthetic_task(given, CLASSES, 90, 32, torch.Generator().manual_seed(0))
    assert (crops.shape, crops.dtype, classes) == ((90, 3, 32, 32), torch.uint8, CLASSES)
    assert np.bincount(labels).max() - np.bincount(labels).min() <= 6


def rights(*rows: str) -> dict[int, torch.Tensor]:
    return {index: torch.tensor([mark == "x" for mark in row]) for index, row in enumerate(rows)}


def test_the_default_stays_unless_another_is_clearly_better() -> None:
    assert tune.better_than_default(rights("xx..", "xx..", "x...")) == 0
    assert tune.better_than_default(rights("xxxx....", "....xxxxx"[:8])) == 0
    assert tune.better_than_default(rights("x.......", "xxxxx...", "xxx.....")) == 1  # 4 gained, none lost
    assert tune.better_than_default(rights("xxxx......", ".xxxxx....")) == 0  # 2 gained, 1 lost: 1 < √3
    assert tune.better_than_default(rights("xxxx......", "...xxxxxxx")) == 1  # 6 gained, 3 lost: 3 ≥ √9


# ------------------------------------------------------------------------------------------------------------- charged


def test_private_tuning_is_charged_and_composed(copy: Copy, public_run: Path, data: str) -> None:
    run = copy(public_run)
    result = run_tune(run, data, asked={"on": "private", "spend": 0.5}, share=0.5)
    (charge,) = ledger_of(run).tunings
    target = 0.5 * 0.5 * PROBE["epsilon"]
    assert result["epsilon"] == result["charged_epsilon"] == compose([charge.event], result["delta"]).upper <= target
    assert result["charged_epsilon"] > 0.99 * target
    assert charge.event.trials.mean == pytest.approx(4)
    # nothing but the best, and nothing that tells the number of trials
    assert not {"seconds", "tried", "accuracy"} & set(read_json(run / "tune.json"))
    probed = probe_as_tuned(run, data)
    assert probed["epsilon_target"] == 0.5 * PROBE["epsilon"]
    event = GaussianEvent(probed["noise_multiplier"], 1.0, probed["steps"])
    assert probed["epsilon"] == compose_stages([[charge.event], [event]], probed["delta"]).upper
    assert 0.99 * probed["epsilon_target"] < probed["epsilon"] <= probed["epsilon_target"]
    assert probed["tuned"]["charged_epsilon"] == result["charged_epsilon"]
    assert (probed["tuned"]["on"], probed["tuned"]["used"]) == ("private", True)
    assert "Papernot" in probed["accountant"]
    tuned = run_finetune(run, data, steps=1, refit_steps=0)
    assert probed["epsilon"] < tuned["epsilon"] <= PROBE["epsilon"]
    card = (run / "model/MODEL_CARD.md").read_text(encoding="utf-8")
    assert "charged: the best of a random number of private trials (4 expected)" in card
    at_most = math.exp(tuned["epsilon"]) + 100 * tuned["delta"]  # per cent, of any mechanism with this ε
    assert f"is then detected at most {math.ceil(10 * at_most) / 10:g} % of the time" in card.replace("\u00a0", " ")


def test_every_private_look_of_a_trial_goes_through_it(
    copy: Copy, public_run: Path, data: str, monkeypatch: Patch
) -> None:
    """Rebuilt from outside: a trial's sums are over its fitted part, at the plan's clip norm, as often as charged."""
    run = copy(public_run)
    seen: list[tuple] = []
    release, score, clip = Trial.release, Trial.score, clipped_softmax_sum

    def recorded_clip(features, labels, weight, clip_norm, *, rows, **options):
        seen.append(("sum", len(rows), clip_norm))
        return clip(features, labels, weight, clip_norm, rows=rows, **options)

    def recorded_release(trial, clipped):
        seen.append(("release", len(trial.fitted), trial.setting))
        return release(trial, clipped)

    def recorded_score(trial, right):
        seen.append(("score", len(right), trial.steps))
        return score(trial, right)

    monkeypatch.setattr("dprandp.tune.clipped_softmax_sum", recorded_clip)
    monkeypatch.setattr(Trial, "release", recorded_release)
    monkeypatch.setattr(Trial, "score", recorded_score)
    monkeypatch.setattr(PrivateStep, "release", None)
    made = run_tune(run, data, {"insecure_seed": 1}, asked={"on": "private", "trials": 3}, clip_norm=0.5)
    assert made["private"] is False  # the seed
    plan = plans_of(run)["tune"]["plan"]
    ends = [place for place, row in enumerate(seen) if row[0] == "score"]
    for start, end in zip([0, *(end + 1 for end in ends)], ends, strict=False):
        steps, held = seen[end][2], seen[end][1]
        assert seen[start:end] == [("sum", TRAIN - held, 0.5), seen[start + 1]] * steps
        assert plan["steps"][seen[start + 1][2]] == steps


def test_too_little_budget_reads_nothing(copy: Copy, public_run: Path, probed_run: Path, data: str, monkeypatch: Patch):
    forbid_reading(monkeypatch)
    for run, changes, error in (
        (copy(probed_run), {}, BudgetError),  # tuning comes before what it is for
        (copy(public_run), {"epsilon": math.inf}, UsageError),
        (copy(public_run), {"batch_size": 30}, UsageError),
        (copy(public_run), {"views": 2}, UsageError),
    ):
        ledger = run / "privacy/ledger.jsonl"
        before = ledger.read_bytes() if ledger.exists() else None
        with pytest.raises(error):
            run_tune(run, data, asked={"on": "private"}, **changes)
        assert (ledger.read_bytes() if ledger.exists() else None) == before
        assert not (run / "tune.json").exists()


def test_units_of_several_images_are_not_tuned_on_privately(copy: Copy, public_run: Path, data: str, tmp_path: Path):
    """A trial's coins and its score count single images: a patient with several would be counted several times."""
    arrays = dict(np.load(data.removeprefix("npz:")))
    arrays["patient_train"] = np.arange(len(arrays["y_train"])) // 2
    np.savez(tmp_path / "grouped.npz", **arrays)
    grouped, run = f"npz:{tmp_path / 'grouped.npz'}", copy(public_run)
    with pytest.raises(UsageError, match="single images"):
        run_tune(run, grouped, asked={"on": "private"}, unit_column="patient")
    assert not (run / "privacy/ledger.jsonl").exists()


def test_tuning_again(copy: Copy, privately_tuned: Path, data: str) -> None:
    run = copy(privately_tuned)
    first = run_tune(run, data, asked={"on": "private"})
    assert len(ledger_of(run).tunings) == 1
    with pytest.raises(UsageError, match="tuned before, on private"):
        run_tune(run, data)
    with pytest.raises(BudgetError):
        run_tune(run, data, {"overwrite": True}, asked={"on": "private"})
    run_tune(run, data, {"overwrite": True})  # on synthetic images now; what was charged is not forgotten
    probed = probe_as_tuned(run, data)
    assert (probed["tuned"]["on"], probed["tuned"]["charged_epsilon"]) == ("synthetic", first["charged_epsilon"])
    card = (run / "model/MODEL_CARD.md").read_text(encoding="utf-8")
    assert "before that on the private data" in card


def test_an_edited_record_is_not_shown_again(copy: Copy, privately_tuned: Path, data: str) -> None:
    """Nor one without its ledger; and a lost one does not hide what was charged."""
    run = copy(privately_tuned)
    own = read_json(run / "tune.json")
    chosen = {"lr": 1.0, "steps": 1, "dims": 1}
    for edit in ({"epsilon": 0.01}, {"charged_epsilon": 0.01}, {"noisy_right_answers": 0.01}, {"chosen": chosen}):
        (run / "tune.json").write_text(json.dumps(own | edit))
        for command in (lambda: run_tune(run, data, asked={"on": "private"}), lambda: run_probe(run, data)):
            with pytest.raises(CheckpointError, match="not what the tuning of this run reported"):
                command()
    (run / "tune.json").unlink()
    tuned = run_probe(run, data)["tuned"]
    assert (tuned["on"], tuned["charged_epsilon"], tuned["used"]) == ("private", own["charged_epsilon"], False)
    assert "(tune.json is missing)" in (run / "model/MODEL_CARD.md").read_text(encoding="utf-8")
    without = copy(privately_tuned)
    shutil.rmtree(without / "privacy")
    with pytest.raises(CheckpointError, match="privacy ledger"):
        run_tune(without, data, asked={"on": "private"})


def test_a_record_of_private_tuning_without_its_charge_is_refused(
    copy: Copy, public_run: Path, privately_tuned: Path, data: str
) -> None:
    """Where all that knew of the charge is gone or older, and where the file is of another run."""
    lost, other, later = copy(privately_tuned), copy(public_run), copy(public_run)
    shutil.rmtree(lost / "privacy")
    (lost / ".ledger-head").unlink()
    shutil.copy(public_run / "run.json", lost / "run.json")
    shutil.copy(privately_tuned / "tune.json", other)
    for run in (lost, other):
        with pytest.raises(CheckpointError, match="no privacy ledger that it was charged to"):
            probe_as_tuned(run, data) if run == lost else run_probe(run, data)
        assert not (run / "3-probe/head.safetensors").exists()
    run_probe(later, data)
    shutil.copy(privately_tuned / "tune.json", later)
    with pytest.raises(CheckpointError, match="not what the tuning of this run reported"):
        open_run_ledger(RunDir.open(later, create=False))


def test_everything_that_was_charged_for_tuning_is_disclosed(tmp_path: Path) -> None:
    """Tuned twice: the cost is that of both, whatever the record says of the last."""
    ledger = Ledger.create(tmp_path / "ledger.jsonl", TRAIN)
    events = [TuningEvent(0.05, 0.0, 0.1), TuningEvent(0.11, 0.0, 0.2)]
    for attempt, event in enumerate(events, start=1):
        ledger.charge_tuning(stage="tune", attempt=attempt, event=event, random="os-entropy")
        found = tuning_of(RunDir.open(tmp_path / "run", create=True), ledger, 1e-5, {})
        assert found.charged_epsilon == compose(events[:attempt], 1e-5).upper
    assert found.charged_epsilon > max(compose([event], 1e-5).upper for event in events)


def test_the_steps_of_the_settings_cost_the_same(data: str) -> None:
    """What the theorem needs: every setting of the list is one and the same Gaussian mechanism."""
    mu = gaussian_dp_mu(1.0, 1e-5)
    steps = {setting.steps for setting in settings_for(schema.build("probe", PROBE), 32)}
    assert len(steps) == 3
    costs = [compose([GaussianEvent(math.sqrt(t) / mu, 1.0, t)], 1e-5).upper for t in steps]
    assert costs == pytest.approx([1.0] * 3)


def test_damaged_records_and_settings_out_of_range_are_refused(tmp_path: Path) -> None:
    run = RunDir.open(tmp_path / "run", create=True)
    for content in ("{", "[]", '{"format": 2}', json.dumps({"format": 1, "on": 3})):
        (run.path / "tune.json").write_text(content)
        with pytest.raises(CheckpointError, match=r"tune\.json"):
            read_tuning(run)
    for values in ({"trials": 1}, {"spend": 0.0}, {"spend": 1.0}, {"held_out": math.nan}):
        with pytest.raises(UsageError, match="lies outside"):
            TuneConfig(**values)
