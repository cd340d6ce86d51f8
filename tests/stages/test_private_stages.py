"""Promises 1, 2, 3, 5, 10 and 12 on whole stages: what runs is planned, charged first, and accounted as it ran."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_run import (
    TRAIN,
    Copy,
    NothingRead,
    Patch,
    Record,
    Recorder,
    Stopped,
    forbid_reading,
    ledger_of,
    plans_of,
    run_continue,
    run_finetune,
    run_probe,
    run_scratch,
    run_tune,
    stop_at,
    write_blobs,
)

from dprandp.dpsgd import training_data
from dprandp.dpsgd.stage import PrivateStage
from dprandp.errors import BudgetError, CheckpointError, InputError, UsageError
from dprandp.privacy import mechanism as plan_module
from dprandp.privacy.accounting import compose, merge_events
from dprandp.privacy.adaptive import compose_stages
from dprandp.privacy.ledger import Ledger
from dprandp.privacy.mechanism import PrivatePlan
from dprandp.privacy.randomness import PoissonSampler
from dprandp.runs.directory import RunDir


def assert_accounted(run: Path, seen: Recorder, result: dict[str, Any], *mechanisms: str) -> None:
    """What was seen, the plan, the ledger and the reported ε say the same of these mechanisms."""
    plans = {name: PrivatePlan.from_dict(entry["plan"]) for name, entry in plans_of(run).items()}
    for name in mechanisms:
        plan, event = plans[name], seen.observed_event(name)
        assert (event.sample_rate, event.steps) == (plan.sample_rate, plan.steps)
        values = sum(release.noise.numel() for release in seen.of(name))
        assert event.noise_multiplier == pytest.approx(plan.noise_multiplier, rel=5.5 / math.sqrt(2 * values))
        assert merge_events([c.event for c in ledger_of(run).charges if c.stage == name]) == [plan.event]
        places = [i for i, release in enumerate(seen.releases) if release.mechanism == name]
        for i in places:
            assert seen.draws[i][0] == plan.examples == TRAIN
            assert seen.clips[i] == (plan.clip_norm, len(seen.draws[i][2]))
            assert bool((seen.releases[i].noise != 0).all())
    # seen order: every batch was charged before it was drawn, clipped once and released once
    before = sum(charge.steps for charge in ledger_of(run).charges) - len(seen.draws)
    assert seen.charged == list(range(before + 1, before + 1 + len(seen.draws)))
    assert len(seen.draws) == len(seen.clips) == len(seen.releases)
    assert {release.mechanism for release in seen.releases} == set(mechanisms)
    # the ledger holds these mechanisms and what was there before, and the report is its account
    events = [plan.event for plan in plans.values()]
    assert ledger_of(run).events() == merge_events(events)
    assert result["epsilon"] == compose_stages([[event] for event in events], result["delta"]).upper
    assert result["epsilon"] >= compose(events, result["delta"]).lower
    assert result["epsilon"] <= result["epsilon_target"] <= result["epsilon_total"]


@pytest.mark.parametrize("stage", ["probe", "probe again", "finetune", "scratch", "continue", "tune"])
def test_no_report_of_before_is_left_once_a_stage_has_charged(
    copy: Copy, public_run: Path, probed_run: Path, vit_run: Path, data: str, monkeypatch: Patch, stage: str
) -> None:
    """report.html says ε: it is gone before the first charge. The control: a stage that was refused leaves it."""
    run = copy({"probe again": probed_run, "finetune": probed_run, "continue": vit_run}.get(stage, public_run))
    report = run / "report.html"
    report.write_text("spent: less")
    there: list[bool] = []
    charge = Ledger._append

    def noted(ledger: Ledger, *arguments: Any, **notes: Any) -> None:
        there.append(report.exists())
        charge(ledger, *arguments, **notes)

    def refused(*arguments: Any, **options: Any) -> None:
        raise BudgetError("too little is left", fix="")

    def begin() -> None:
        if stage == "tune":
            run_tune(run, data, asked={"on": "private"})
        elif stage == "continue":
            run_continue(run, data)
        elif stage == "scratch":
            run_scratch(run, data, steps=1)
        elif stage == "finetune":
            run_finetune(run, data, steps=1, refit_steps=2)
        else:
            run_probe(run, data, {"overwrite": True}, steps=2, share=0.9)

    monkeypatch.setattr(Ledger, "_append", noted)
    with monkeypatch.context() as patch:
        patch.setattr(PrivateStage, "fix_plan", refused)
        with pytest.raises(BudgetError):
            begin()
    assert report.exists()
    begin()
    assert there
    assert not any(there)


@pytest.mark.parametrize("batch_size", [None, 30])
def test_2_probe_runs_what_was_accounted(
    copy: Copy, public_run: Path, data: str, record: Record, batch_size: int | None
) -> None:
    run = copy(public_run)
    seen = record(run)
    result = run_probe(run, data, steps=40, batch_size=batch_size, clip_norm=0.5)
    assert_accounted(run, seen, result, "probe")
    assert seen.observed_event("probe").sample_rate == (1 if batch_size is None else 30 / TRAIN)
    assert result["steps"] == result["charged_steps"] == 40
    assert result["lost_steps"] == 0
    sizes = {len(indices) for _, _, indices in seen.draws}
    assert sizes == {TRAIN} if batch_size is None else len(sizes) > 3
    # no record's part exceeds the clip norm; with unit features and a head at zero it reaches it
    assert 0.999 * 0.5 < max(seen.lengths) <= 0.5


def test_2_finetune_composes_three_mechanisms(copy: Copy, probed_run: Path, data: str, record: Record) -> None:
    run = copy(probed_run)
    seen = record(run)
    result = run_finetune(run, data, refit_steps=20)
    assert_accounted(run, seen, result, "finetune", "finetune.head")
    assert set(plans_of(run)) == {"probe", "finetune", "finetune.head"}
    assert result["refit"]["noise_multiplier"] == plans_of(run)["finetune.head"]["plan"]["noise_multiplier"]
    assert result["epsilon"] > 0.98 * result["epsilon_total"]  # the budget is used, not hoarded


def test_2_scratch(tmp_path: Path, data: str, record: Record) -> None:
    seen = record(tmp_path / "run")
    result = run_scratch(tmp_path / "run", data)
    assert_accounted(tmp_path / "run", seen, result, "finetune")
    card = (tmp_path / "run/model/MODEL_CARD.md").read_text(encoding="utf-8")
    assert "random weights" in card
    released = json.loads((tmp_path / "run/model/config.json").read_text(encoding="utf-8"))
    assert released["arch"] == released["extractor"]["arch"] == "wrn-10-1"


def test_2_control_other_noise_is_seen(
    copy: Copy, public_run: Path, data: str, record: Record, monkeypatch: Patch
) -> None:
    honest = plan_module.add_gaussian_noise
    monkeypatch.setattr(plan_module, "add_gaussian_noise", lambda sums, std, random: honest(sums, 0.9 * std, random))
    run = copy(public_run)
    seen = record(run)
    result = run_probe(run, data, steps=40)
    with pytest.raises(AssertionError, match="comparison failed"):
        assert_accounted(run, seen, result, "probe")


def test_3_an_empty_batch_is_a_charged_and_noisy_step(
    copy: Copy, probed_run: Path, public_run: Path, data: str, record: Record, monkeypatch: Patch
) -> None:
    monkeypatch.setattr(PoissonSampler, "draw", lambda sampler: np.zeros(0, dtype=np.int64))
    probe_run, tune_run = copy(public_run), copy(probed_run)
    seen = record(probe_run)
    run_probe(probe_run, data, batch_size=5, steps=3)
    seen.run = tune_run
    run_finetune(tune_run, data, views=2, refit_steps=0)
    assert [len(release.indices) for release in seen.releases] == [0] * 7
    for release in seen.releases:
        assert all(not total.any() for total in release.sums.values())
        assert all(bool((update != 0).all()) for update in release.released.values())
    assert ledger_of(probe_run).charged_steps("probe", 1) == 3
    assert ledger_of(tune_run).charged_steps("finetune", 1) == 4


def released_head(run: Path) -> bytes:
    return (run / "3-probe/head.safetensors").read_bytes()


def test_5_the_same_seed_never_repeats_the_noise(copy: Copy, public_run: Path, data: str, record: Record) -> None:
    first, second = copy(public_run), copy(public_run)
    seen = record(first)
    run_probe(first, data, seed=7, batch_size=30)
    run_probe(second, data, seed=7, batch_size=30)
    assert released_head(first) != released_head(second)
    noise = torch.cat([release.noise for release in seen.releases])
    assert len(noise.unique()) > 0.999 * len(noise)
    assert abs(float(torch.corrcoef(noise.view(2, -1))[0, 1])) < 5.5 / math.sqrt(noise.numel() / 2)
    batches = [tuple(indices) for _, _, indices in seen.draws]
    assert len(set(batches)) == len(batches) == 16
    # the whitener, the views and all else that the seed decides are the same
    whitener = "3-probe/statistics/whitener.safetensors"
    assert (first / whitener).read_bytes() == (second / whitener).read_bytes()


def test_5_a_seed_repeats_no_noise_within_a_run(
    copy: Copy, public_run: Path, data: str, record: Record, monkeypatch: Patch
) -> None:
    """Not even a seed that is asked for: a stage that goes on, another attempt and another stage draw their own."""
    run = copy(public_run)
    seen = record(run)
    with monkeypatch.context() as patch:
        stop_at(patch, 3)
        with pytest.raises(Stopped):
            run_probe(run, data, {"insecure_seed": 3}, batch_size=30)
    run_probe(run, data, {"insecure_seed": 3}, batch_size=30)
    run_probe(run, data, {"insecure_seed": 3, "overwrite": True}, batch_size=30)
    run_finetune(run, data, {"insecure_seed": 3}, batch_size=30, refit_steps=0)
    noises = [release.noise[-96:] / release.noise[-96:].std() for release in seen.releases]  # of the head, in each
    assert len(noises) == 3 + 5 + 8 + 4
    for place, noise in enumerate(noises):
        assert all(float((noise - other).norm()) > 5 for other in noises[:place])
    batches = [tuple(indices) for _, _, indices in seen.draws]
    assert len(set(batches)) == len(batches)


def test_13_insecure_seed_repeats_and_is_stamped_everywhere(copy: Copy, public_run: Path, data: str) -> None:
    runs = [copy(public_run), copy(public_run)]
    results = [run_probe(run, data, {"insecure_seed": 3}) for run in runs]
    assert released_head(runs[0]) == released_head(runs[1])
    run, result = runs[0], results[0]
    assert result["private"] is False
    assert result["random"] == "insecure-seed"
    assert {charge.random for charge in ledger_of(run).charges} == {"insecure-seed"}
    assert ledger_of(run).private is False
    assert "NOT PRIVATE" in (run / "model/MODEL_CARD.md").read_text(encoding="utf-8")
    released = json.loads((run / "model/config.json").read_text(encoding="utf-8"))["result"]
    assert (released["private"], released["random"]) == (False, "insecure-seed")
    # one insecure stage stains what follows, whatever randomness that uses
    tuned = run_finetune(run, data, steps=1, refit_steps=0)
    assert tuned["private"] is False
    assert "NOT PRIVATE" in (run / "model/MODEL_CARD.md").read_text(encoding="utf-8")


def test_infinite_epsilon_goes_the_same_way_without_noise(
    copy: Copy, public_run: Path, data: str, record: Record
) -> None:
    run = copy(public_run)
    seen = record(run)
    probed = run_probe(run, data, epsilon=math.inf, batch_size=30)
    tuned = run_finetune(run, data, epsilon=math.inf)
    assert [release.mechanism for release in seen.releases] == ["probe"] * 8 + ["finetune"] * 4 + ["finetune.head"] * 6
    assert len(ledger_of(run).charges) == 18
    for release in seen.releases:  # the update is the sum over qN, for whatever number of records was drawn
        assert float(release.noise.abs().max()) < 1e-5  # float32 of the sum, no more
        expected = {"probe": 30, "finetune": 24, "finetune.head": TRAIN}[release.mechanism]
        for name, update in release.released.items():
            assert torch.allclose(update.double(), release.sums[name].double() / expected, rtol=1e-5, atol=1e-9)
    for result in (probed, tuned):
        assert (result["epsilon"], result["noise_multiplier"], result["private"]) == (math.inf, 0, False)
    assert tuned["accuracy"] > 0.6
    assert "NOT PRIVATE" in (run / "model/MODEL_CARD.md").read_text(encoding="utf-8")


# ---------------------------------------------------------------------------------------------------- 12: one budget


def test_12_probe_finetune_and_reruns_compose(copy: Copy, tuned_run: Path, public_run: Path, data: str) -> None:
    run = copy(public_run)
    first = run_probe(run, data)
    again = run_probe(run, data, {"overwrite": True})
    charged = ledger_of(run)
    assert charged.charged_steps("probe", 1) == charged.charged_steps("probe", 2) == 8
    assert first["epsilon"] < again["epsilon"] == charged.spent(again["delta"]).upper <= 4
    single = compose([c.event for c in charged.charges if c.attempt == 2], again["delta"]).upper
    assert single == pytest.approx(1.2, rel=0.01)  # the share once more, on top
    tuned = run_finetune(run, data)
    assert again["epsilon"] < tuned["epsilon"] <= 4
    # after one probe alone more was left, so that what takes all that is left needed less noise
    noise = {path: plans_of(path)["finetune.head"]["plan"]["noise_multiplier"] for path in (run, tuned_run)}
    assert noise[run] > noise[tuned_run]


def test_12_the_refit_of_another_attempt_is_one_of_its_own(
    copy: Copy, probed_run: Path, data: str, monkeypatch: Patch
) -> None:
    """Stopped in its refit, then begun afresh: all steps of both attempts are charged, out of the one budget."""
    run = copy(probed_run)
    with monkeypatch.context() as patch:
        stop_at(patch, 4 + 2)
        with pytest.raises(Stopped):
            run_finetune(run, data)
    stopped = ledger_of(run)
    assert (stopped.charged_steps("finetune", 1), stopped.charged_steps("finetune.head", 1)) == (4, 2)
    result = run_finetune(run, data, {"overwrite": True})
    charged = ledger_of(run)
    assert [charged.charged_steps("finetune", attempt) for attempt in (1, 2)] == [4, 4]
    assert [charged.charged_steps("finetune.head", attempt) for attempt in (1, 2)] == [2, 6]
    assert plans_of(run)["finetune.head"]["parent_attempt"] == plans_of(run)["finetune.head"]["attempt"] == 2
    assert compose(charged.events(), result["delta"]).lower <= result["epsilon"] <= 4
    assert result["epsilon"] == charged.spent(result["delta"]).upper


def test_12_over_budget_reads_nothing(
    copy: Copy, tuned_run: Path, public_run: Path, data: str, monkeypatch: Patch
) -> None:
    run = copy(tuned_run)
    ledger = (run / "privacy/ledger.jsonl").read_bytes()
    forbid_reading(monkeypatch)
    for stage in (run_probe, run_finetune):
        with pytest.raises(BudgetError) as refusal:
            stage(run, data, {"overwrite": True})
        assert refusal.value.exit_code == 5
    assert (run / "privacy/ledger.jsonl").read_bytes() == ledger
    assert (run / "4-finetune/model.safetensors").exists()  # the overwrite that was refused has deleted nothing
    assert (run / "3-probe/head.safetensors").exists()
    with pytest.raises(NothingRead):  # control: a stage within the budget does read
        run_probe(copy(public_run), data)


@pytest.mark.parametrize("changes", [{"epsilon": 5.0}, {"epsilon": 3.0}, {"epsilon": math.inf}, {"delta": 1e-6}])
def test_12_another_budget_is_refused(
    probed_run: Path, copy: Copy, data: str, monkeypatch: Patch, changes: dict
) -> None:
    run = copy(probed_run)
    forbid_reading(monkeypatch)
    for flags in ({}, {"resume": True}, {"overwrite": True}):
        for stage in (run_probe, run_finetune):
            with pytest.raises(BudgetError, match="fixed at ε = 4"):
                stage(run, data, flags, **changes)


def test_12_other_data_are_refused(probed_run: Path, copy: Copy, tmp_path: Path, monkeypatch: Patch) -> None:
    """By their content where their declaration is the same, else before they are read."""
    run = copy(probed_run)
    other, larger = write_blobs(tmp_path / "other.npz", seed=1), write_blobs(tmp_path / "larger.npz", train=TRAIN + 1)
    spent = (run / "privacy/ledger.jsonl").read_bytes()
    for stage in (run_probe, run_finetune):
        with pytest.raises(InputError, match="not those that this run began with"):
            stage(run, other, {"overwrite": True})
    forbid_reading(monkeypatch)
    for stage in (run_probe, run_finetune):
        with pytest.raises(UsageError, match="this run is about"):
            stage(run, larger, {"overwrite": True})
    assert (run / "privacy/ledger.jsonl").read_bytes() == spent


def test_12_the_ledger_cannot_be_lost(probed_run: Path, copy: Copy, data: str) -> None:
    """Without its ledger, or with one that was cut short, a run does not start counting from zero."""
    run = copy(probed_run)
    ledger = run / "privacy/ledger.jsonl"
    lines = ledger.read_bytes().splitlines(keepends=True)
    ledger.write_bytes(b"".join(lines[:3] + lines[4:]))
    with pytest.raises(CheckpointError, match="Line 4"):
        run_finetune(run, data)
    ledger.unlink()
    with pytest.raises(CheckpointError, match="ledger"):
        run_finetune(run, data)


def test_12_the_plan_cannot_be_lost(probed_run: Path, copy: Copy, data: str, monkeypatch: Patch) -> None:
    """A ledger with charges and no plan is no run that has not begun."""
    run = copy(probed_run)
    (run / "privacy/plan.json").unlink()
    forbid_reading(monkeypatch)
    for stage, options in ((run_probe, {}), (run_finetune, {"resume": True}), (run_probe, {"overwrite": True})):
        with pytest.raises(CheckpointError, match=r"plan\.json is missing"):
            stage(run, data, options)


def forge(path: Path) -> None:
    """Another ledger that shows as much as this one: all steps of an attempt as one charge, the chain in order. The
    run's own note of its head is forged as well, and the model of an earlier stage gone, so that the checkpoint alone
    can tell."""
    old = Ledger.open(path)
    path.unlink()
    made = Ledger.create(path, old.examples, old.data_unit, budget=old.budget)
    for stage, attempt in dict.fromkeys((charge.stage, charge.attempt) for charge in old.charges):
        first = next(charge for charge in old.charges if (charge.stage, charge.attempt) == (stage, attempt))
        kept = ("planned", "noise_multiplier", "sample_rate", "clip_norm", "random", "noise")
        made.charge(stage=stage, attempt=attempt, steps=old.charged_steps(stage, attempt),
                    **{name: getattr(first, name) for name in kept})  # fmt: skip
    for seal in old.seals.values():
        made.seal_result(stage=seal.stage, attempt=seal.attempt, digest=seal.digest)
    assert made.events() == old.events()
    table = path.parents[1] / "run.json"
    document = json.loads(table.read_text())
    table.write_text(json.dumps(document | {"ledger_head": made.head}))
    shutil.rmtree(path.parents[1] / "model", ignore_errors=True)
    for note in path.parents[1].rglob("*ledger-head"):
        note.unlink()


@pytest.mark.parametrize(
    ("source", "stage", "updates"),
    [
        ("public_run", run_probe, 3),
        ("probed_run", run_finetune, 3),
        ("probed_run", run_finetune, 4 + 3),  # in its refit
        ("vit_run", run_continue, 3),
        (None, run_scratch, 2),
    ],
    ids=["probe", "finetune", "refit", "continue", "scratch"],
)
def test_10_a_checkpoint_goes_on_with_its_own_ledger_alone(
    request: pytest.FixtureRequest, copy: Copy, tmp_path: Path, data: str, monkeypatch: Patch,
    source: str | None, stage: Callable[..., dict[str, Any]], updates: int,
) -> None:  # fmt: skip
    """Not with one that was cut short, nor with another that shows as many steps or more."""
    run = tmp_path / "empty" if source is None else copy(request.getfixturevalue(source))
    with monkeypatch.context() as patch:
        stop_at(patch, updates)
        with pytest.raises(Stopped):
            stage(run, data)
    ledger = run / "privacy/ledger.jsonl"
    own, table = ledger.read_bytes(), (run / "run.json").read_bytes()
    notes = {note: note.read_bytes() for note in run.rglob("*ledger-head")}
    assert len(notes) >= 2
    forge(ledger)
    forged = ledger.read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(PoissonSampler, "draw", None)
        with pytest.raises(CheckpointError, match="older than the checkpoint"):
            stage(run, data)
    assert ledger.read_bytes() == forged
    (run / "run.json").write_bytes(table)
    for note, text in notes.items():
        note.write_bytes(text)
    ledger.write_bytes(b"".join(own.splitlines(keepends=True)[:-3]))
    with pytest.raises(CheckpointError):
        stage(run, data)
    ledger.write_bytes(own)
    assert stage(run, data)["charged_steps"] > 0


def test_a_ledger_that_another_process_has_begun_meanwhile_is_left_alone(
    copy: Copy, public_run: Path, data: str, monkeypatch: Patch
) -> None:
    """Where the run's lock did not hold, such as on a file system that machines share. The control: no charge in it."""
    for charged in (True, False):
        run = copy(public_run)
        path, found = run / "privacy/ledger.jsonl", []

        def examine(rundir: RunDir, *given: object, charged: bool = charged, found: list = found) -> None:
            if not found:
                ledger = Ledger.create(rundir.privacy_dir / "ledger.jsonl", TRAIN, "image")
                if charged:
                    ledger.charge(stage="probe", attempt=1, steps=3, planned=40, noise_multiplier=9.0, sample_rate=1.0,
                                  clip_norm=1.0, random="os-entropy")  # fmt: skip
                found.append(ledger.path.read_bytes())

        monkeypatch.setattr(training_data, "examine", examine)
        if charged:
            with pytest.raises(CheckpointError, match="another process has begun to charge"):
                run_probe(run, data, steps=40)
            assert [path.read_bytes()] == found
            assert [each.name for each in path.parent.iterdir()] == [path.name]
        else:
            assert run_probe(run, data, steps=40)["epsilon"] > 0
