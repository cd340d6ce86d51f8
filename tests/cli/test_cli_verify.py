"""verify: a run's claims hold for an outsider; each contradiction is found, named, and gives its exit code."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from cli_process import Dprandp, refused
from safetensors.torch import load_file, save_file

from dprandp.dpsgd.release import card_of
from dprandp.privacy.ledger import Ledger
from dprandp.runs.directory import RunDir, result_digest
from dprandp.runs.results import read_result

RunAfter = Callable[[str], Path]


def test_the_claims_of_a_run_hold_without_its_private_part(dprandp: Dprandp, run_after: RunAfter) -> None:
    run = run_after("finetune")
    shutil.rmtree(run / "private")
    done = dprandp("verify", "--run", run, "--json")
    assert done.code == 0, done.out + done.err
    assert done.json["passed"]
    names = [check["name"] for check in done.json["checks"]]
    assert names == ["ledger", "run and ledger", "plans", "ε of probe", "ε of finetune", "model"]
    assert "all claims hold" in dprandp("verify", "--run", run_after("probe")).out


def test_a_run_without_private_stages_claims_nothing(dprandp: Dprandp, run_after: RunAfter) -> None:
    refused(dprandp("verify", "--run", run_after("pretrain")), 3, "no finished private stage")
    for lost in ("run.json", "privacy"):  # it does claim something, and what is lost would have said so
        run = run_after("probe")
        (run / "run.json").unlink()
        if lost == "privacy":
            shutil.rmtree(run / "privacy")
        refused(dprandp("verify", "--run", run), 4, "ledger")


def rewrite(run: Path, change: Callable[[list[dict]], None]) -> None:
    """What somebody would do who knows the format: change the ledger, seal it anew, and let run.json fit."""
    path = run / "privacy/ledger.jsonl"
    lines = [json.loads(line) for line in path.read_bytes().splitlines()]
    change(lines)
    table = json.loads((run / "run.json").read_text())
    renamed, previous = {}, "0" * 64
    for line in lines:
        old = line.pop("hash")
        line["previous"] = previous
        for stage, record in table["stages"].items():
            head = record["result"].get("ledger_head")
            if head in renamed:
                record["result"]["ledger_head"] = renamed[head]
            if line["kind"] == "result" and line["stage"] == stage:
                line["digest"] = result_digest(record["result"])
        previous = hashlib.sha256(json.dumps(line, separators=(",", ":")).encode()).hexdigest()
        renamed[old], line["hash"] = previous, previous
    table["ledger_head"] = previous
    path.write_bytes(b"".join(json.dumps(line, separators=(",", ":")).encode() + b"\n" for line in lines))
    (run / "run.json").write_text(json.dumps(table))
    for note in run.rglob("*ledger-head"):
        note.write_text(renamed[note.read_text().strip()])
    config = (run / "model/config.json").read_text()
    for old, new in renamed.items():
        config = config.replace(old, new)
    (run / "model/config.json").write_text(config)


def contradicted(dprandp: Dprandp, run: Path, code: int, *names: str) -> str:
    """Claims of these names fail; returns what was found."""
    done = dprandp("verify", "--run", run, "--json")
    failed = {check["name"]: check["found"] for check in done.json["checks"] if check["state"] == "fail"}
    assert failed.keys() >= {*names}, done.json
    assert done.code == done.json["exit_code"] == code
    assert not done.json["passed"]
    return str(failed)


def test_an_epsilon_that_is_too_low_is_found_although_all_hashes_fit(dprandp: Dprandp, run_after: RunAfter) -> None:
    run = run_after("finetune")
    rewrite(run, lambda lines: None)  # the control: what is sealed anew without a change holds
    assert dprandp("verify", "--run", run).code == 0

    def halve(lines: list[dict]) -> None:
        for line in lines:
            if line["kind"] == "charge":
                line["noise_multiplier"] /= 2

    rewrite(run, halve)
    contradicted(dprandp, run, 1, "run and ledger", "plans")  # more was spent than the budget, too
    plans = json.loads((run / "privacy/plan.json").read_text())
    for entry in plans["stages"].values():
        entry["plan"]["noise_multiplier"] /= 2
    (run / "privacy/plan.json").write_text(json.dumps(plans))
    assert "prv-accountant" in contradicted(dprandp, run, 1, "ε of probe", "ε of finetune")


def test_the_epsilon_of_a_run_with_private_tuning_is_recomputed(dprandp: Dprandp, run_after: RunAfter) -> None:
    run = run_after("pretrain")
    data = ("--run", run, "--config", "small.toml", "--data", "npz:tiny.npz", "--eps", 2)
    for command in (("tune", "--on", "private"), ("probe", "--share", 1)):
        done = dprandp(*command, *data)
        assert done.code == 0, done.err
    done = dprandp("verify", "--run", run)
    assert done.code == 0, done.out + done.err
    assert "dp-accounting" in done.out

    def more(lines: list[dict]) -> None:
        """Trials with a tenth less noise than the result was computed from."""
        next(line for line in lines if line["kind"] == "tuning")["mu"] *= 1.1

    rewrite(run, more)
    assert "dp-accounting" in contradicted(dprandp, run, 1, "ε of probe")


@pytest.mark.parametrize(
    ("key", "name"), [("kind", "run and ledger"), ("steps", "ledger"), ("noise_multiplier", "ledger")]
)
def test_a_sealed_line_that_makes_no_sense_is_named(
    dprandp: Dprandp, run_after: RunAfter, key: str, name: str
) -> None:
    run = run_after("probe")
    rewrite(run, lambda lines: lines[1].update({key: None}))
    contradicted(dprandp, run, 4, name)


def test_files_that_contradict_each_other_are_found(dprandp: Dprandp, run_after: RunAfter) -> None:
    for name, damage in {
        "ledger": lambda run: edit(run / "privacy/ledger.jsonl", '"steps":1', '"steps":2'),
        "run and ledger": lambda run: edit(run / "run.json", '"epsilon": 0.', '"epsilon": 0.0'),
        "model": lambda run: edit(run / "model/MODEL_CARD.md", "0.6", "0.1"),
    }.items():
        run = run_after("probe")
        damage(run)
        contradicted(dprandp, run, 4, name)


def test_a_report_of_before_a_charge_is_found(dprandp: Dprandp, run_after: RunAfter) -> None:
    """Put back, or made by another version. The control: the report of now."""
    run = run_after("probe")
    dprandp("report", "--run", run)
    older = (run / "report.html").read_text(encoding="utf-8")
    assert dprandp("verify", "--run", run, "--json").json["checks"][-1]["name"] == "report"
    dprandp("finetune", "--run", run)
    assert not (run / "report.html").exists()
    for page in (older, "<html>ε = 0.1</html>"):
        (run / "report.html").write_text(page, encoding="utf-8")
        contradicted(dprandp, run, 4, "report")
        checks = dprandp("status", "--check", "--run", run, "--json").json["checks"]
        assert [each["state"] for each in checks if each["name"] == "report"] == ["warn"]
    dprandp("report", "--run", run)
    assert dprandp("verify", "--run", run).code == 0


@pytest.mark.parametrize(
    ("old", "new"),
    [("**(ε = ", "**(ε = 0."), ("unit: ", "unit: one patient, not "), ("private: true", "private: false"),
     ("zero-out", "replace-one"), ("\n## Disclosure", "\nThe true guarantee is ε = 0.01.\n\n## Disclosure"),
     ("planned", "never planned")],
)  # fmt: skip
def test_a_card_that_says_anything_else_is_found_although_its_hash_fits(
    dprandp: Dprandp, run_after: RunAfter, old: str, new: str
) -> None:
    run = run_after("probe")
    card, config = run / "model/MODEL_CARD.md", run / "model/config.json"
    before = hashlib.sha256(card.read_bytes()).hexdigest()
    edit(card, old, new)
    edit(config, before, hashlib.sha256(card.read_bytes()).hexdigest())
    assert "the card" in contradicted(dprandp, run, 4, "model")


@pytest.mark.parametrize("lie", ["an earlier line of the ledger", "other weights", "the model of an earlier stage"])
def test_a_model_that_is_not_the_one_of_the_last_result_is_refused(
    dprandp: Dprandp, run_after: RunAfter, tmp_path: Path, lie: str
) -> None:
    """With a card and hashes that fit, as the program would write them; export and predict refuse it as well."""
    run = run_after("probe").rename(tmp_path / "run")
    folder = run / "model"
    if lie == "the model of an earlier stage":
        shutil.copytree(folder, tmp_path / "before")
        assert dprandp("finetune", "--run", run).code == 0
        shutil.rmtree(folder)
        shutil.copytree(tmp_path / "before", folder)
    else:
        config = json.loads((folder / "config.json").read_text())
        if lie == "other weights":
            tensors = load_file(folder / "model.safetensors")
            save_file({name: value + 1 for name, value in tensors.items()}, folder / "model.safetensors")
            name = "model.safetensors"
        else:
            line = (run / "privacy/ledger.jsonl").read_text().splitlines()[1]
            config["result"] |= {"epsilon": 0.01, "ledger_head": json.loads(line)["hash"]}
            result = read_result("probe", config["result"])
            card = card_of(RunDir.open(run, create=False), result, tuple(config["input"]["shape"]))
            name = "MODEL_CARD.md"
            (folder / name).write_text(card, encoding="utf-8")
        config["sha256"][name] = hashlib.sha256((folder / name).read_bytes()).hexdigest()
        (folder / "config.json").write_text(json.dumps(config))
    contradicted(dprandp, run, 4, "model")
    said = "the weights in" if lie == "other weights" else "not the one of the run's last finished stage"
    refused(dprandp("export", "--run", run, "--out", tmp_path / "out.zip"), 4, said)
    refused(dprandp("predict", "--run", run, "--data", "npz:tiny.npz"), 4, said)


def test_noise_from_a_seed_is_not_private_to_an_outsider_either(dprandp: Dprandp, run_after: RunAfter) -> None:
    """Also where the stage was done again without one: what was released once stays released."""
    run = run_after("pretrain")
    probe = ("probe", "--run", run, "--config", "small.toml", "--data", "npz:tiny.npz", "--eps", 2)
    assert dprandp(*probe, "--insecure-seed", 3).code == 0
    assert dprandp(*probe, "--overwrite").code == 0
    assert "NOT PRIVATE" in dprandp("verify", "--run", run).out


def test_charges_beyond_the_budget_or_without_a_plan_are_found(dprandp: Dprandp, run_after: RunAfter) -> None:
    """As another program would append them; and ``status`` tells them as well."""
    run = run_after("probe")
    ledger = Ledger.open(run / "privacy/ledger.jsonl")
    ledger.charge(stage="head", attempt=1, steps=3, planned=3, noise_multiplier=0.5, sample_rate=1.0, clip_norm=1.0,
                  random="os-entropy")  # fmt: skip
    said = contradicted(dprandp, run, 1, "run and ledger", "plans")
    assert "of a budget of" in said
    assert "head was charged, but never planned" in said
    assert dprandp("status", "--run", run, "--json").json["budget"]["spent"] > 5


def edit(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text, (path, old)
    path.write_text(text.replace(old, new))
