"""``continue``: what it reads, what it charges, how it goes on, and what later stages make of it."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_run import (
    CONTINUE,
    TRAIN,
    Stopped,
    context,
    forbid_reading,
    ledger_of,
    metrics_of,
    plans_of,
    read_json,
    run_continue,
    run_finetune,
    run_probe,
    write_blobs,
)

from dprandp.audit.bounds import AuditSettings
from dprandp.audit.loops import Facts, on_made_up, on_private_data
from dprandp.config import schema
from dprandp.continual import diagnose, loop
from dprandp.continual import public as public_steps
from dprandp.continual.public import Training
from dprandp.errors import BudgetError, CheckpointError, InputError, UsageError
from dprandp.pipeline import plan as planning
from dprandp.pretrain import load_extractor
from dprandp.privacy.mechanism import PrivatePlan
from dprandp.release import load_model
from dprandp.report import page as report
from dprandp.runs import checkpoint

PUBLIC = 24  # a fifth of the training images
FOLDER = "2b-continue"


def built(data: str, **changes: object) -> schema.StageConfig:
    return schema.build("continue", CONTINUE | {"data": data} | changes)


@pytest.fixture(scope="module")
def continued_run(tmp_path_factory, vit_run, data) -> Path:
    run = Path(shutil.copytree(vit_run, tmp_path_factory.mktemp("continued") / "run"))
    run_continue(run, data)
    return run


def test_public_then_private_steps(vit_run, copy, data, record, monkeypatch) -> None:
    """N is without the public part; what was seen is what was planned and charged; the test split comes last."""
    run, moments = copy(vit_run), []
    with monkeypatch.context() as patch, context(run) as given:
        forbid_reading(patch)
        fixed = planning.plan("continue", built(data), given)
        ruled = planning.plan("continue", built(data, switch="plateau"), given)
        alone = planning.plan("continue", built(data, mix="public"), given)
    switch = Training.switch

    def watched(self):
        for work in (lambda: None, lambda: switch(self)):
            work()
            moments.append({name: value.clone() for name, value in self.optimizer.state.items()})

    monkeypatch.setattr(Training, "switch", watched)
    seen = record(run)
    result = run_continue(run, data)
    (plan,) = plans_of(run).values()
    assert (plan["plan"]["examples"], plan["plan"]["steps"]) == (TRAIN - PUBLIC, 4)
    assert result["train_examples"] == result["train_units"] == TRAIN - PUBLIC
    assert {examples for examples, _, _ in seen.draws} == {TRAIN - PUBLIC}
    observed = seen.observed_event("continue")
    assert (observed.sample_rate, observed.steps) == (24 / 96, 4)
    assert observed.noise_multiplier == pytest.approx(plan["plan"]["noise_multiplier"], rel=0.05)
    assert result["epsilon"] <= 0.7 * 8 + 1e-9
    assert ledger_of(run).spent(result["delta"]).upper == pytest.approx(result["epsilon"])
    assert seen.charged == [1, 2, 3, 4]  # before the batch is drawn
    assert {place for place, _ in seen.tests} == {4}
    public = result["public_training"]
    assert (public["steps"], public["head"]) == (4, "one for public and private images")
    arrays = np.load(data.removeprefix("npz:"))
    answers = load_model(run / "model").probabilities(arrays["x_test"]).argmax(dim=1).numpy()
    assert (answers == arrays["y_test"]).mean() == pytest.approx(result["accuracy"])
    assert [line["step"] for line in metrics_of(run / FOLDER)] in ([0, 2, 4, 4, 5, 6, 7], [0, 2, 4, 5, 6, 7])
    # as it was planned before, from public facts
    for key in ("steps", "noise_multiplier", "sample_rate"):
        assert getattr(fixed, key) == result[key]
    assert fixed.epsilon_after == pytest.approx(result["epsilon"])
    assert (fixed.switch, ruled.switch, ruled.steps) == (None, "plateau", 2)
    assert isinstance(alone, planning.PublicPlan)
    for made in (fixed, ruled, alone):
        assert "continue" in planning.plan_lines(made)
    # at the switch Adam's first moment is reset, and nothing else of its state
    before, after = moments
    assert {int(value) for name, value in after.items() if ".step." in name} == {4}
    for name, value in after.items():
        if name.startswith("optimizer.exp_avg."):
            assert not value.any()
            assert before[name].any()
        else:
            assert torch.equal(value, before[name])


def test_public_steps_alone_read_nothing_private_and_cost_nothing(vit_run, copy, data, monkeypatch) -> None:
    """Stopped and continued, they are the same to the byte."""
    whole, run = copy(vit_run), copy(vit_run)
    options = {"public": "synth", "mix": "public", "switch": "plateau"}
    with monkeypatch.context() as patch:
        forbid_reading(patch)
        result = run_continue(whole, data, **options)
        with pytest.MonkeyPatch.context() as stopped:
            stop_before(stopped, 6)
            with pytest.raises(Stopped):
                run_continue(run, data, **options)
        assert checkpoint.latest(run / FOLDER) == "step-000004"
        run_continue(run, data, **options)
    for name in ("extractor.safetensors", "metrics.jsonl"):
        assert (run / FOLDER / name).read_bytes() == (whole / FOLDER / name).read_bytes()
    assert "epsilon" not in result
    assert "accuracy" not in result
    for folder in ("privacy", "model"):
        assert not (run / folder).exists() or not list((run / folder).iterdir())
    before = extractor_of(run, "pretrain")
    assert any(not torch.equal(before[name], value) for name, value in extractor_of(run).items())
    assert run_probe(run, data)["train_examples"] == TRAIN
    assert "20 synthetic images of this run" in (run / "model/MODEL_CARD.md").read_text()
    with context(run) as given:
        assert "nothing private was read" in report.write(given.rundir).read_text()


def extractor_of(run: Path, made_by: str | None = None) -> dict[str, torch.Tensor]:
    with context(run) as given:
        return {k: v.clone() for k, v in load_extractor(given, "rgb", made_by)[0].state_dict().items()}


@pytest.mark.slow
def test_later_stages_take_the_continued_extractor_the_private_rest_and_the_same_budget(
    continued_run, copy, data
) -> None:
    run = copy(continued_run)
    first = ledger_of(run).spent(1e-5).upper
    kept = checkpoint.load(run / FOLDER, "extractor").tensors
    assert all(torch.equal(kept[name], value) for name, value in extractor_of(run).items())
    with pytest.raises(BudgetError, match="ε = 8"):
        run_probe(run, data)  # another ε than the run's
    rest = copy(run)
    probed = run_probe(run, data, epsilon=8.0)
    tuned = run_finetune(run, data, epsilon=8.0, steps=2, refit_steps=0)
    assert probed["train_examples"] == tuned["train_examples"] == TRAIN - PUBLIC
    assert first < probed["epsilon"] < tuned["epsilon"] <= 8
    assert tuned["epsilon"] == pytest.approx(ledger_of(run).spent(tuned["delta"]).upper)
    card = (run / "model/MODEL_CARD.md").read_text()
    assert "continue: q = 0.25, T = 4" in card
    assert "declared public by the user" in card
    with context(run) as given:
        page = report.write(given.rundir).read_text()
    assert "fraction 0.2 by seed 0" in page
    assert "continue: ε from 0 to" in page
    # a probe with the whole share takes all that is left
    whole = run_probe(rest, data, epsilon=8.0, share=1.0)
    assert probed["epsilon"] < 7.9 < whole["epsilon"] <= 8
    with pytest.raises(BudgetError):
        run_probe(rest, data, {"overwrite": True}, epsilon=8.0, share=1.0)


def test_the_declared_public_part_is_fixed_for_the_run(continued_run, copy, data) -> None:
    run = copy(continued_run)
    for changes in ({"seed": 1}, {"public": "fraction:0.3"}, {"public": "synth"}, {"seed": 1, "mix": "public"}):
        with pytest.raises(BudgetError, match=r"public part was fixed as fraction 0\.2 by seed 0"):
            run_continue(run, data, {"overwrite": True}, **changes)
    again = run_continue(run, data, {"overwrite": True}, share=1.0)
    assert again["epsilon"] <= 8
    assert plans_of(run)["continue"]["attempt"] == 2
    with pytest.raises(BudgetError):
        run_continue(run, data, {"overwrite": True}, share=1.0)


def test_a_probe_made_before_is_stale_and_made_again_within_the_budget(vit_run, copy, data) -> None:
    run = copy(vit_run)
    run_probe(run, data, epsilon=8.0)
    with pytest.raises(BudgetError, match="public part was fixed as none"):
        run_continue(run, data)  # what was private must not become public afterwards
    run_continue(run, data, public="synth", share=0.5)
    with pytest.raises(InputError, match="continued since"):
        run_finetune(run, data, epsilon=8.0)
    assert run_probe(run, data, {"overwrite": True}, epsilon=8.0)["epsilon"] <= 8


# ------------------------------------------------------------------------------------------------- stopping, going on


def stop_before(patch: pytest.MonkeyPatch, update: int) -> None:
    """Break off before the given update of the parameters, public and private ones counted together."""
    true, seen = Training.update, []

    def update_or_stop(self, gradients, lr):
        seen.append(1)
        if len(seen) == update:
            raise Stopped
        true(self, gradients, lr)

    patch.setattr(Training, "update", update_or_stop)


@pytest.mark.parametrize(("update", "lost"), [(5, 1), (8, 2)])  # a checkpoint every second step
def test_interrupted_private_steps_stay_charged(vit_run, copy, data, monkeypatch, record, update, lost) -> None:
    run = copy(vit_run)
    seen = record(run)
    with monkeypatch.context() as patch:
        stop_before(patch, update)
        with pytest.raises(Stopped):
            run_continue(run, data)
    charged = len(seen.releases)
    assert charged == update - 4 == ledger_of(run).charged_steps("continue", 1)
    result = run_continue(run, data)
    assert result["charged_steps"] == 4
    assert result["lost_steps"] == lost
    assert len(seen.releases) == 4
    assert result["epsilon"] <= 0.7 * 8 + 1e-9
    assert result["public_training"]["steps"] == 4


def test_a_moved_switch_cannot_change_a_plan_that_was_charged(vit_run, copy, data, monkeypatch) -> None:
    run = copy(vit_run)
    with monkeypatch.context() as patch:
        stop_before(patch, 6)
        with pytest.raises(Stopped):
            run_continue(run, data)
    for path in (*(run / FOLDER).glob("step-*"), run / FOLDER / "LATEST"):
        path.unlink()
    monkeypatch.setattr(loop.switching, "switch_now", lambda *given: "at step 3" if given[2] == 3 else None)
    with pytest.raises(CheckpointError, match="planned as 4"):
        run_continue(run, data)


# ------------------------------------------------------------------------------------------------------ what is planned


def test_what_was_charged_before_counts_where_the_rule_makes_another_plan(vit_run, copy, data, monkeypatch) -> None:
    """The plan is made again when the number of private steps is known: for what is left, not for the whole."""
    run = copy(vit_run)
    before = run_probe(run, data, epsilon=8.0)["epsilon"]
    options = {"public": "synth", "switch": "plateau", "steps": 12, "check_every": 1, "share": 1.0}
    with context(run) as given:
        planned = planning.plan("continue", built(data, **options), given)
    monkeypatch.setattr(loop.switching, "switch_now", lambda *given: "at step 7" if given[2] == 7 else None)
    result = run_continue(run, data, **options)
    assert (result["steps"], planned.steps) == (5, 9)
    assert result["noise_multiplier"] < planned.noise_multiplier
    assert before < result["epsilon"] == ledger_of(run).spent(result["delta"]).upper <= 8
    assert result["epsilon"] > 7.9  # all of it is used


@pytest.mark.parametrize("mix", ["cosine", "private"])
def test_mixed_steps_are_all_charged(vit_run, copy, data, mix) -> None:
    run = copy(vit_run)
    result = run_continue(run, data, {"insecure_seed": 1}, public="synth", mix=mix, steps=4)
    assert result["charged_steps"] == result["steps"] == 4
    assert result["public_training"]["steps"] == 0
    assert result["private"] is False  # the seed
    heads = checkpoint.load(run / FOLDER / "heads", "heads").tensors
    assert bool(heads["public_head"].abs().max() > 0) == (mix != "private")


@pytest.mark.slow
def test_a_wrn_is_trained_too(wide_run, copy, data, monkeypatch) -> None:
    monkeypatch.setattr(public_steps, "TERM_EXAMPLES", 4)
    monkeypatch.setattr(public_steps, "TERM_PROBES", 1)
    result = run_continue(copy(wide_run), data, public="synth", steps=4, switch="decelerator", check_every=1)
    assert result["arch"] == "wrn-10-1"
    assert 0 < result["epsilon"] <= 5.6


def test_other_public_data_with_classes_of_their_own(vit_run, copy, data, tmp_path) -> None:
    other = np.load(data.removeprefix("npz:"))
    names = [name for name in other.files if name != "num_classes"]
    arrays = {name: other[name][: 30 if name.endswith("train") else 10] for name in names}
    arrays |= {name: labels % 2 for name, labels in arrays.items() if name.startswith("y_")}
    arrays["x_train"] = arrays["x_train"][:, ::-1]  # other images than the private ones
    np.savez(tmp_path / "public.npz", **arrays, num_classes=np.array(2))
    result = run_continue(copy(vit_run), data, public=f"npz:{tmp_path / 'public.npz'}")
    assert result["train_examples"] == TRAIN
    assert "30 images of" in result["public_training"]["images"]


def test_refusals(vit_run, continued_run, public_run, copy, data, tmp_path) -> None:
    with pytest.raises(UsageError, match="patchnet is a dictionary"):
        run_continue(copy(public_run), data)
    with pytest.raises(UsageError, match="both as private and as public data"):
        run_continue(copy(vit_run), data, public=data)
    run = copy(continued_run)
    with pytest.raises(UsageError, match="begun with other settings: lr"):
        run_continue(run, data, lr=0.5)
    assert run_continue(run, data, {"resume": True}, lr=0.5)["lr"] == CONTINUE.get("lr", 0.001)
    with pytest.raises(InputError, match="not those that this run began with"):
        run_probe(run, write_blobs(tmp_path / "other.npz", seed=1), epsilon=8.0)


# ---------------------------------------------------------------------------------------------- audit and diagnosis


@pytest.mark.slow
def test_the_audit_replays_the_private_steps(vit_run, copy, data) -> None:
    """Leaving one record out moves a sum by no more than C, and nothing else; without the clip it is seen to."""
    run = copy(vit_run)
    run_continue(run, data, steps=6, views=2)
    with context(run) as given:
        plan = PrivatePlan.from_dict(plans_of(run)["continue"]["plan"])
        checks, controls = on_made_up("continue", plan, Facts(given), AuditSettings(controls=True), given)
        private = on_private_data("continue", plan, Facts(given), given)
    assert [check.name for check in checks if not check.passed] == []
    assert [check.name for check in private if not check.passed] == []
    assert 0.9 < checks[2].value <= 1  # the record was in a batch, and its gradient of full length
    assert [control.flagged for control in controls] == [True]


def test_diagnose_reads_the_public_part_alone_and_costs_nothing(vit_run, copy, data, monkeypatch) -> None:
    monkeypatch.setattr(public_steps, "TERM_PROBES", 1)
    run = copy(vit_run)
    with context(run) as given:
        result = diagnose.run(built(data, switch="plateau", steps=8), given)
        free = diagnose.run(built(data, switch="plateau", epsilon=float("inf"), steps=3), given)
    assert [row["step"] for row in result.terms] == [0, 2, 4, 6, 7]
    assert not (run / "privacy").exists() or not list((run / "privacy").iterdir())
    assert read_json(run / "diagnose/terms.json")["terms"][1]["step"] == 2
    assert (run / "diagnose/terms.png").read_bytes()[:4] == b"\x89PNG"
    said = diagnose.line(result)
    assert "privacy's term" in said or "not positive" in said
    assert all(row["decelerator"] == 0 for row in free.terms)
    assert "no noise" in free.meaning[0]
