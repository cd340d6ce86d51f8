"""A privacy ledger that is deleted, cut, put back from an older copy or swapped, and results edited by hand: every
command that spends, reports or releases refuses, and changes nothing."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path

import pytest
from cli_process import Dprandp, refused, state_of

from dprandp.inspection import Check, check, exit_code

RunAfter = Callable[[str], Path]
Stages = dict[str, Path]


def ledger(run: Path) -> Path:
    return run / "privacy" / "ledger.jsonl"


def edit(path: Path, change: Callable[[dict], object]) -> None:
    document = json.loads(path.read_text())
    change(document)
    path.write_text(json.dumps(document))


def of_ledger(change: Callable[[list[bytes]], list[bytes]]) -> Callable[[Path], object]:
    return lambda run: ledger(run).write_bytes(b"".join(change(ledger(run).read_bytes().splitlines(keepends=True))))


def of_run(change: Callable[[dict], object]) -> Callable[[Path], object]:
    return lambda run: edit(run / "run.json", change)


def of_result(**values: float) -> Callable[[Path], object]:
    return of_run(lambda document: document["stages"]["probe"]["result"].update(values))


def of_plan(**values: object) -> Callable[[Path], object]:
    return lambda run: edit(run / "privacy/plan.json", lambda document: document.update(values))


def raise_delta(run: Path) -> None:
    """Everywhere that the plan names it, as somebody would who wants to be believed."""
    text = (run / "privacy" / "plan.json").read_text()
    (run / "privacy" / "plan.json").write_text(text.replace('"delta": 1e-05', '"delta": 0.004'))


def put_back_the_probes(run: Path, stages: Stages) -> None:
    """Of a run after its fine-tune: the privacy folder as a backup made after the probe has it."""
    shutil.rmtree(run / "privacy")
    shutil.copytree(stages["probe"] / "privacy", run / "privacy")


def put_back_run_json_alone(run: Path, stages: Stages) -> None:
    """As it was before the first private stage: it does not know of a ledger, so it would not miss lines of it."""
    shutil.copy(stages["pretrain"] / "run.json", run / "run.json")


LOSSES: dict[str, Callable[[Path], object]] = {
    "no folder": lambda run: shutil.rmtree(run / "privacy"),
    "no ledger": lambda run: ledger(run).unlink(),
    "no plan": lambda run: (run / "privacy" / "plan.json").unlink(),
    "the header alone": of_ledger(lambda lines: lines[:1]),
    "the last line cut": of_ledger(lambda lines: lines[:-1]),
    "epsilon edited": of_result(epsilon=0.01),
    "noise edited": of_result(noise_multiplier=5000.0),
    "accuracy edited": of_result(accuracy=0.99),
    "the head forgotten": of_run(lambda document: document.update(ledger_head=None)),
    "the budget raised": of_plan(epsilon=5.0),
    "delta raised": raise_delta,
    "a part declared public": of_plan(public_part="fraction 0.1 by seed 0"),
}
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


def refuses(dprandp: Dprandp, run: Path, *names: str) -> None:
    before = state_of(run)
    for name in names:
        refused(dprandp(*COMMANDS[name], "--run", run, "--json"), 4)
        after = state_of(run)
        assert {file: after.get(file) for file in before} == before
        assert set(after) - set(before) <= {"privacy", "private/training-data.json"}


# Every loss is met by some commands, and every command meets some losses.
SOME_COMMANDS, SOME_LOSSES = ("status", "finetune", "export"), ("no ledger", "the last line cut", "noise edited")


@pytest.mark.parametrize("loss", LOSSES)
def test_refused_after_a_probe(dprandp: Dprandp, run_after: RunAfter, loss: str) -> None:
    run = run_after("probe")
    LOSSES[loss](run)
    refuses(dprandp, run, *(COMMANDS if loss in SOME_LOSSES else SOME_COMMANDS))


@pytest.mark.slow
@pytest.mark.parametrize("loss", LOSSES)
def test_refused_by_every_command(dprandp: Dprandp, run_after: RunAfter, loss: str) -> None:
    run = run_after("probe")
    LOSSES[loss](run)
    refuses(dprandp, run, *COMMANDS)


def test_refused_after_a_finetune(dprandp: Dprandp, run_after: RunAfter, stages: Stages, tmp_path: Path) -> None:
    backup = {"an older backup": lambda run: put_back_the_probes(run, stages)}
    for loss in ("no folder", "the last line cut", "noise edited", "an older backup"):
        shutil.rmtree(tmp_path / "after-finetune", ignore_errors=True)
        run = run_after("finetune")
        (LOSSES | backup)[loss](run)
        refuses(dprandp, run, "status", "report", "finetune afresh", "predict", "audit")


def forget_notes(run: Path) -> None:
    """What would tell of a ledger beside run.json: the model, and the files with its head."""
    shutil.rmtree(run / "model")
    for path in run.rglob("*ledger-head"):
        path.unlink()


def leave_the_results_alone(run: Path) -> None:
    LOSSES["the head forgotten"](run)
    shutil.rmtree(run / "privacy")
    forget_notes(run)


@pytest.mark.parametrize("loss", [*LOSSES.values(), leave_the_results_alone], ids=[*LOSSES, "the results left alone"])
def test_status_check_sees_it(
    run_after: RunAfter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, loss: Callable[[Path], object]
) -> None:
    run = run_after("probe")
    loss(run)
    monkeypatch.setattr(check, "_arithmetic", lambda device: Check("arithmetic", "ok", ""))
    checks = check.examine(run, tmp_path)
    assert exit_code(checks) == 4
    assert [made.state for made in checks if made.name == "ledger"] == ["fail"]


@pytest.mark.parametrize("privacy", ["finetune", "probe"])
def test_an_older_run_json_does_not_vouch_for_a_ledger(
    dprandp: Dprandp, run_after: RunAfter, stages: Stages, privacy: str
) -> None:
    """run.json from before the first private stage, and a ledger from some time after it: it may lack any number of
    lines, here those of the fine-tune."""
    run = run_after("finetune")
    put_back_run_json_alone(run, stages)
    if privacy == "probe":
        put_back_the_probes(run, stages)
    refuses(dprandp, run, "status", "report", "probe afresh", "tune", "predict")
    refused(dprandp("status", "--run", run), 4, "run.json does not know of it", "restore the run as a whole")


def test_a_ledger_that_nothing_else_knows_of_is_refused(dprandp: Dprandp, run_after: RunAfter, stages: Stages) -> None:
    """Nothing tells whether it is whole."""
    run = run_after("probe")
    put_back_run_json_alone(run, stages)
    for folder in ("3-probe", "model"):
        shutil.rmtree(run / folder)
    (run / ".ledger-head").unlink()
    refused(dprandp("status", "--run", run), 4, "holds charges", "restore run.json")
    refuses(dprandp, run, "status", "probe afresh")


def test_a_backup_that_is_older_than_the_model_is_refused(
    dprandp: Dprandp, run_after: RunAfter, stages: Stages
) -> None:
    """run.json and privacy/ as they were after the probe, which fit each other; the model was released since."""
    run = run_after("finetune")
    shutil.copy(stages["probe"] / "run.json", run / "run.json")
    put_back_the_probes(run, stages)
    refuses(dprandp, run, "status", "report", "finetune", "probe afresh", "predict", "audit")
    shutil.rmtree(run / "4-finetune")  # which run.json does not know of either
    shutil.copy(stages["probe"] / ".ledger-head", run / ".ledger-head")
    refused(dprandp("status", "--run", run), 4, "older than the model", "restore the run as a whole")
    shutil.rmtree(run / "model")
    shutil.copytree(stages["probe"] / "model", run / "model")
    assert dprandp("status", "--run", run).code == 0  # now it is the whole run of an earlier time, which is not noticed


@pytest.mark.parametrize("left", ["4-finetune", "4-finetune/ledger-head", ".ledger-head"])
def test_what_a_stage_left_behind_contradicts_an_older_rest(
    dprandp: Dprandp, run_after: RunAfter, stages: Stages, left: str
) -> None:
    """run.json, ledger and model as they were after the probe; of the fine-tune since then, a folder or a file."""
    run = run_after("finetune")
    kept = {run / left} | ({run / left / "ledger-head"} if left == "4-finetune" else set())
    for name in ("run.json", ".ledger-head"):
        if run / name not in kept:
            shutil.copy(stages["probe"] / name, run / name)
    put_back_the_probes(run, stages)
    shutil.rmtree(run / "model")
    shutil.copytree(stages["probe"] / "model", run / "model")
    if left == ".ledger-head":
        shutil.rmtree(run / "4-finetune")
    elif left == "4-finetune":
        (run / "4-finetune/ledger-head").unlink()  # as in a run of before
    else:
        edit(run / "run.json", lambda document: document["stages"].update(
            finetune=json.loads((stages["finetune"] / "run.json").read_text())["stages"]["finetune"]
            | {"state": "partial", "result": {}, "finished": None}))  # fmt: skip
    refuses(dprandp, run, *COMMANDS)
    assert dprandp("verify", "--run", run).code == 4


def test_the_record_of_other_data_is_noticed(dprandp: Dprandp, run_after: RunAfter) -> None:
    """Both files of it from another run, so that they fit each other."""
    run = run_after("probe")
    record = run / "private/training-data.json"
    assert json.loads((run / "privacy/plan.json").read_text())["data_record"] == sha256(record.read_bytes()).hexdigest()
    edit(record, lambda document: document.update(train="0" * 64))
    refused(dprandp("finetune", "--config", "small.toml", "--run", run), 4, "not the record")
    done = dprandp("status", "--check", "--run", run)
    assert done.code == 4
    assert "not the record that this run's budget was fixed with" in " ".join(done.out.split())


def test_no_privacy_folder_and_no_record_of_the_stages_that_are_there(
    dprandp: Dprandp, run_after: RunAfter, stages: Stages
) -> None:
    run = run_after("finetune")
    shutil.copy(stages["pretrain"] / "run.json", run / "run.json")
    for folder in ("privacy", "model", "private"):
        shutil.rmtree(run / folder)
    refuses(dprandp, run, "status", "probe afresh", "tune", "report")
    for folder in ("3-probe", "4-finetune"):
        shutil.rmtree(run / folder)
    refuses(dprandp, run, "status", "report")
    (run / ".ledger-head").unlink()
    assert dprandp("status", "--run", run).code == 0  # as before its first private stage


def test_a_model_without_any_ledger_is_refused(dprandp: Dprandp, run_after: RunAfter, stages: Stages) -> None:
    """run.json as it was before the first private stage, and no privacy folder: only the model tells."""
    run = run_after("probe")
    put_back_run_json_alone(run, stages)
    LOSSES["no folder"](run)
    refuses(dprandp, run, "status", "probe afresh")


def test_a_stage_that_may_spend_more_than_the_budget_is_refused(dprandp: Dprandp, run_after: RunAfter) -> None:
    """The budget is as it was, but the plan of one stage says that it may go beyond it."""
    run = run_after("probe")
    edit(run / "privacy/plan.json", lambda document: document["stages"]["probe"]["plan"].update(epsilon_target=5.0))
    refuses(dprandp, run, "status", "finetune", "plan", "audit")


def test_a_changed_budget_is_named_with_both_values(dprandp: Dprandp, run_after: RunAfter) -> None:
    run = run_after("probe")
    of_plan(epsilon=5.0)(run)
    asked = ("finetune", "--config", "small.toml", "--run", run)
    refused(dprandp(*asked), 4, "epsilon is 5.0 there and 2.0 in the ledger", "with the ledger's values")
    of_plan(epsilon=2.0)(run)  # the way out that the message names
    done = dprandp(*asked)
    assert done.code == 0, done.err


def test_the_budget_of_a_run_without_privacy_may_not_become_one(dprandp: Dprandp, run_after: RunAfter) -> None:
    run = run_after("pretrain")
    probe = ["probe", "--run", run, "--data", "npz:tiny.npz", "--eps", "inf", "--config", "small.toml"]
    assert dprandp(*probe).code == 0
    assert dprandp("status", "--run", run).code == 0
    of_plan(epsilon=1.0)(run)
    refused(dprandp("status", "--run", run), 4, "'inf' in the ledger")


def test_overwrite_does_not_make_the_run_forget(dprandp: Dprandp, run_after: RunAfter) -> None:
    """What was released stays counted although its stage was begun afresh, and stopped, since."""
    run = run_after("probe")
    again = ["probe", "--run", run, "--data", "npz:tiny.npz", "--eps", "2", "--config", "small.toml", "--overwrite"]
    done = dprandp(*again, DPRANDP_FAULT="update-applied:1")
    assert done.code == -9, done.err
    assert json.loads((run / "run.json").read_text())["stages"]["probe"]["result"] == {}
    forget_notes(run)
    for loss in ("the header alone", "no folder"):
        LOSSES[loss](run)
        refused(dprandp(*again), 4, "ledger")


def test_a_ledger_of_another_run_is_refused(dprandp: Dprandp, run_after: RunAfter, tmp_path: Path) -> None:
    """The same settings, data and budget: only the hashes tell."""
    run, other = run_after("probe"), tmp_path / "other"
    shutil.copytree(run_after("pretrain"), other)
    done = dprandp("probe", "--run", other, "--config", "small.toml", "--data", "npz:tiny.npz", "--eps", 2)
    assert done.code == 0, done.err
    shutil.rmtree(run / "privacy")
    shutil.copytree(other / "privacy", run / "privacy")
    refused(dprandp("status", "--run", run), 4, "another run")


def test_a_model_of_another_run_is_refused(dprandp: Dprandp, run_after: RunAfter) -> None:
    run = run_after("finetune")
    last = shutil.copytree(run / "model", run.with_name("last"))
    shutil.rmtree(run / "model")
    shutil.copytree(run_after("probe") / "model", run / "model")
    refused(dprandp("predict", "--run", run, "--data", "npz:tiny.npz"), 4, "not the one of the run's last finished")
    shutil.rmtree(run / "model")
    shutil.copytree(last, run / "model")
    assert dprandp("predict", "--run", run, "--data", "npz:tiny.npz").code == 0
    config = run / "model" / "config.json"
    text = config.read_text()
    config.write_text(re.sub(r'"epsilon": [0-9.]+', '"epsilon": 0.01', text))
    refused(dprandp("predict", "--run", run, "--data", "npz:tiny.npz"), 4, "not the one of the run's last finished")
    config.write_text(text)
    edit(config, lambda document: document["result"].update(ledger_head="0" * 64))
    refused(dprandp("predict", "--run", run, "--data", "npz:tiny.npz"), 4, "not in this run's ledger")
    edit(config, lambda document: document["result"].pop("ledger_head"))
    refused(dprandp("predict", "--run", run, "--data", "npz:tiny.npz"), 4, "config.json cannot be used")


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
