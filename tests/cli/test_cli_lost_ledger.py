"""A privacy ledger that is deleted, cut, put back from an older copy or swapped, and results edited by hand: every
command that spends, reports or releases refuses, and changes nothing."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from cli_process import Dprandp, refused, state_of

RunAfter = Callable[[str], Path]
Stages = dict[str, Path]


def ledger(run: Path) -> Path:
    return run / "privacy" / "ledger.jsonl"


def delete_the_folder(run: Path, stages: Stages) -> None:
    shutil.rmtree(run / "privacy")


def delete_the_ledger(run: Path, stages: Stages) -> None:
    ledger(run).unlink()


def delete_the_plan(run: Path, stages: Stages) -> None:
    (run / "privacy" / "plan.json").unlink()


def keep_the_header(run: Path, stages: Stages) -> None:
    ledger(run).write_bytes(ledger(run).read_bytes().splitlines(keepends=True)[0])


def cut_the_last_line(run: Path, stages: Stages) -> None:
    ledger(run).write_bytes(b"".join(ledger(run).read_bytes().splitlines(keepends=True)[:-1]))


def put_back_the_probes(run: Path, stages: Stages) -> None:
    """Of a run after its fine-tune: the privacy folder as a backup made after the probe has it."""
    shutil.rmtree(run / "privacy")
    shutil.copytree(stages["probe"] / "privacy", run / "privacy")


def edit(run: Path, change: Callable[[dict], None]) -> None:
    document = json.loads((run / "run.json").read_text())
    change(document)
    (run / "run.json").write_text(json.dumps(document))


def edit_epsilon(run: Path, stages: Stages) -> None:
    edit(run, lambda document: document["stages"]["probe"]["result"].update(epsilon=0.01))


def edit_noise(run: Path, stages: Stages) -> None:
    edit(run, lambda document: document["stages"]["probe"]["result"].update(noise_multiplier=5000.0))


def edit_accuracy(run: Path, stages: Stages) -> None:
    edit(run, lambda document: document["stages"]["probe"]["result"].update(accuracy=0.99))


def put_back_run_json_alone(run: Path, stages: Stages) -> None:
    """As it was before the first private stage: it does not know of a ledger, so it would not miss lines of it."""
    shutil.copy(stages["pretrain"] / "run.json", run / "run.json")


def forget_the_head(run: Path, stages: Stages) -> None:
    edit(run, lambda document: document.update(ledger_head=None))


def edit_plan(run: Path, change: Callable[[dict], None]) -> None:
    document = json.loads((run / "privacy" / "plan.json").read_text())
    change(document)
    (run / "privacy" / "plan.json").write_text(json.dumps(document))


def raise_the_budget(run: Path, stages: Stages) -> None:
    edit_plan(run, lambda document: document.update(epsilon=5.0))


def raise_delta(run: Path, stages: Stages) -> None:
    """Everywhere that the plan names it, as somebody would who wants to be believed."""
    text = (run / "privacy" / "plan.json").read_text()
    (run / "privacy" / "plan.json").write_text(text.replace('"delta": 1e-05', '"delta": 0.004'))


def declare_a_part_public(run: Path, stages: Stages) -> None:
    edit_plan(run, lambda document: document.update(public_part="fraction 0.1 by seed 0"))


LOSSES = [delete_the_folder, delete_the_ledger, delete_the_plan, keep_the_header, cut_the_last_line]
EDITS = [edit_epsilon, edit_noise, edit_accuracy, forget_the_head]
EDITS_OF_THE_PLAN = [raise_the_budget, raise_delta, declare_a_part_public]
COMMANDS = {
    "status": ["status"],
    "report": ["report"],
    "probe afresh": ["probe", "--data", "npz:tiny.npz", "--eps", "2", "--config", "small.toml", "--overwrite"],
    "finetune": ["finetune", "--config", "small.toml"],
    "finetune afresh": ["finetune", "--config", "small.toml", "--overwrite"],
    "plan": ["finetune", "--config", "small.toml", "--plan"],
    "tune": ["tune", "--on", "private", "--data", "npz:tiny.npz", "--eps", "2", "--config", "small.toml"],
    "predict": ["predict", "--data", "npz:tiny.npz"],
    "export": ["export", "--out", "elsewhere"],
    "audit": ["audit"],
}


def refuses(dprandp: Dprandp, run: Path, name: str) -> None:
    before = state_of(run)
    refused(dprandp(*COMMANDS[name], "--run", run, "--json"), 4)
    after = state_of(run)
    assert {file: after.get(file) for file in before} == before
    assert set(after) - set(before) <= {"privacy", "private/training-data.json"}


@pytest.mark.parametrize("name", COMMANDS)
@pytest.mark.parametrize("loss", [*LOSSES, *EDITS, *EDITS_OF_THE_PLAN])
def test_refused_after_a_probe(
    dprandp: Dprandp, run_after: RunAfter, stages: Stages, loss: Callable[[Path, Stages], None], name: str
) -> None:
    run = run_after("probe")
    loss(run, stages)
    refuses(dprandp, run, name)


@pytest.mark.parametrize("name", ["status", "report", "finetune afresh", "predict", "audit"])
@pytest.mark.parametrize("loss", [delete_the_folder, cut_the_last_line, put_back_the_probes, edit_noise])
def test_refused_after_a_finetune(
    dprandp: Dprandp, run_after: RunAfter, stages: Stages, loss: Callable[[Path, Stages], None], name: str
) -> None:
    run = run_after("finetune")
    loss(run, stages)
    refuses(dprandp, run, name)


@pytest.mark.parametrize("loss", [*LOSSES, *EDITS, *EDITS_OF_THE_PLAN])
def test_status_check_sees_it(
    dprandp: Dprandp, run_after: RunAfter, stages: Stages, loss: Callable[[Path, Stages], None]
) -> None:
    run = run_after("probe")
    loss(run, stages)
    done = dprandp("status", "--check", "--run", run, "--json")
    assert done.code == 4, done.err
    found = {check["name"]: check["state"] for check in done.json["checks"]}
    assert found["ledger"] == "fail"


@pytest.mark.parametrize("name", ["status", "report", "probe afresh", "tune", "predict"])
@pytest.mark.parametrize("privacy", ["finetune", "probe"])
def test_an_older_run_json_does_not_vouch_for_a_ledger(
    dprandp: Dprandp, run_after: RunAfter, stages: Stages, name: str, privacy: str
) -> None:
    """run.json from before the first private stage, and a ledger from some time after it: it may lack any number of
    lines, here those of the fine-tune."""
    run = run_after("finetune")
    put_back_run_json_alone(run, stages)
    if privacy == "probe":
        put_back_the_probes(run, stages)
    refuses(dprandp, run, name)
    refused(dprandp("status", "--run", run), 4, "run.json does not know of it", "restore run.json")


@pytest.mark.parametrize("name", ["status", "report", "finetune", "probe afresh", "predict", "audit"])
def test_a_backup_that_is_older_than_the_model_is_refused(
    dprandp: Dprandp, run_after: RunAfter, stages: Stages, name: str
) -> None:
    """run.json and privacy/ as they were after the probe, which fit each other; the model was released since."""
    run = run_after("finetune")
    shutil.copy(stages["probe"] / "run.json", run / "run.json")
    put_back_the_probes(run, stages)
    refuses(dprandp, run, name)
    refused(dprandp("status", "--run", run), 4, "older than the model", "restore the run as a whole")
    shutil.rmtree(run / "model")
    shutil.copytree(stages["probe"] / "model", run / "model")
    assert dprandp("status", "--run", run).code == 0


def test_a_model_without_any_ledger_is_refused(dprandp: Dprandp, run_after: RunAfter, stages: Stages) -> None:
    """run.json as it was before the first private stage, and no privacy folder: only the model tells."""
    run = run_after("probe")
    put_back_run_json_alone(run, stages)
    delete_the_folder(run, stages)
    refuses(dprandp, run, "status")
    refuses(dprandp, run, "probe afresh")


@pytest.mark.parametrize("name", ["status", "finetune", "plan", "audit"])
def test_a_stage_that_may_spend_more_than_the_budget_is_refused(
    dprandp: Dprandp, run_after: RunAfter, name: str
) -> None:
    """The budget is as it was, but the plan of one stage says that it may go beyond it."""
    run = run_after("probe")
    edit_plan(run, lambda document: document["stages"]["probe"]["plan"].update(epsilon_target=5.0))
    refuses(dprandp, run, name)


def test_a_changed_budget_is_named_with_both_values(dprandp: Dprandp, run_after: RunAfter) -> None:
    run = run_after("probe")
    raise_the_budget(run, {})
    asked = ("finetune", "--config", "small.toml", "--run", run)
    refused(dprandp(*asked), 4, "epsilon is 5.0 there and 2.0 in the ledger", "with the ledger's values")
    edit_plan(run, lambda document: document.update(epsilon=2.0))  # the way out that the message names
    done = dprandp(*asked)
    assert done.code == 0, done.err


def test_the_budget_of_a_run_without_privacy_may_not_become_one(dprandp: Dprandp, run_after: RunAfter) -> None:
    run = run_after("pretrain")
    probe = ["probe", "--run", run, "--data", "npz:tiny.npz", "--eps", "inf", "--config", "small.toml"]
    assert dprandp(*probe).code == 0
    assert dprandp("status", "--run", run).code == 0
    edit_plan(run, lambda document: document.update(epsilon=1.0))
    refused(dprandp("status", "--run", run), 4, "'inf' in the ledger")


@pytest.mark.parametrize("loss", [delete_the_folder, keep_the_header])
def test_overwrite_does_not_make_the_run_forget(
    dprandp: Dprandp, run_after: RunAfter, stages: Stages, loss: Callable[[Path, Stages], None]
) -> None:
    """What was released stays counted although its stage was begun afresh, and stopped, since."""
    run = run_after("probe")
    again = ["probe", "--run", run, "--data", "npz:tiny.npz", "--eps", "2", "--config", "small.toml", "--overwrite"]
    done = dprandp(*again, DPRANDP_FAULT="update-applied:1")
    assert done.code == -9, done.err
    assert json.loads((run / "run.json").read_text())["stages"]["probe"]["result"] == {}
    loss(run, stages)
    refused(dprandp(*again), 4, "ledger")


def test_a_ledger_of_another_run_is_refused(dprandp: Dprandp, run_after: RunAfter, tmp_path: Path) -> None:
    """The same settings, data and budget: only the hashes tell."""
    run, other = run_after("probe"), tmp_path / "other"
    shutil.copytree(run, other)
    for path in (other / "run.json", other / "privacy"):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    for folder in ("3-probe", "model", "private", "2-pretrain", "1-generate", "whitening"):
        shutil.rmtree(other / folder)
    for stage, flags in {
        "generate": ["--workers", 1], "pretrain": [], "probe": ["--data", "npz:tiny.npz", "--eps", 2]
    }.items():  # fmt: skip
        done = dprandp(stage, "--run", other, "--config", "small.toml", *flags)
        assert done.code == 0, done.err
    shutil.rmtree(run / "privacy")
    shutil.copytree(other / "privacy", run / "privacy")
    refused(dprandp("status", "--run", run), 4, "another run")


def test_a_model_of_another_run_is_refused(dprandp: Dprandp, run_after: RunAfter) -> None:
    run = run_after("finetune")
    shutil.rmtree(run / "model")
    shutil.copytree(run_after("probe") / "model", run / "model")
    done = dprandp("predict", "--run", run, "--data", "npz:tiny.npz")
    assert done.code == 0, done.err  # an earlier model of this very run: its cost is in the ledger
    config = run / "model" / "config.json"
    text = config.read_text()
    config.write_text(re.sub(r'"epsilon": [0-9.]+', '"epsilon": 0.01', text))
    refused(dprandp("predict", "--run", run, "--data", "npz:tiny.npz"), 4, "config.json")
    config.write_text(re.sub(r'"ledger_head": "[0-9a-f]+"', f'"ledger_head": "{"0" * 64}"', text))
    refused(dprandp("predict", "--run", run, "--data", "npz:tiny.npz"), 4, "not in this run's ledger")


def test_the_card_says_what_the_ledger_holds(dprandp: Dprandp, run_after: RunAfter) -> None:
    """A probe, abandoned after two steps and made afresh, then a fine-tune: its card names both attempts."""
    run = run_after("pretrain")
    probe = ["probe", "--run", run, "--data", "npz:tiny.npz", "--eps", "2", "--config", "small.toml"]
    assert dprandp(*probe, DPRANDP_FAULT="update-applied:2").code == -9
    card = run / "model" / "MODEL_CARD.md"
    done = dprandp(*probe, "--overwrite")
    assert done.code == 0, done.err
    (row,) = (line for line in card.read_text().splitlines() if "Also counted" in line)
    assert "probe: q = 1, T = 2," in row
    assert "attempt 2" not in row  # that is the model's own
    done = dprandp("finetune", "--run", run, "--config", "small.toml")
    assert done.code == 0, done.err
    charges = [json.loads(line) for line in ledger(run).read_text().splitlines()]
    counts = {
        attempt: sum(c["steps"] for c in charges if c["kind"] == "charge" and (c["stage"], c["attempt"]) == attempt)
        for attempt in (("probe", 1), ("probe", 2))
    }
    assert counts == {("probe", 1): 2, ("probe", 2): 5}
    (row,) = (line for line in card.read_text().splitlines() if "Also counted" in line)
    assert "probe: q = 1, T = 2," in row
    assert "probe, attempt 2: q = 1, T = 5," in row
    assert dprandp("report", "--run", run).code == 0
    assert "probe, attempt 2: q = 1, T = 5," in (run / "report.html").read_text()
