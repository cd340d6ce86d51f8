"""The page of a run that is unfinished, stale, damaged, hostile, or not private."""

from __future__ import annotations

import json
import math
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from fake_run import CANARY, EVIL, GENERATED, PRETRAINED, charge, finish, make_run, private_result, written
from html_page import Page, outside_references

from dprandp.config import schema
from dprandp.errors import CheckpointError, InputError
from dprandp.privacy.ledger import Ledger
from dprandp.report import page as report
from dprandp.report.card import model_card
from dprandp.report.run import read_run
from dprandp.runs.directory import RunDir
from dprandp.runs.files import atomic_write

# ------------------------------------------------------------------------------------------------------ partial runs


def test_nothing_done_names_the_command(tmp_path: Path) -> None:
    run = RunDir.open(tmp_path / "x", create=True)
    with pytest.raises(InputError) as error:
        report.write(run)
    assert error.value.fix == f"run: dprandp generate --run {run.path}"
    assert not (run.path / "report.html").exists()


def test_finished_stages_alone(tmp_path: Path) -> None:
    sections = ["Stages", "Synthetic images", "Learning curves", "Repeat", "Configuration", "Environment"]
    for stages in (1, 2):
        page = Page(written(make_run(tmp_path / f"{stages}", stages, lines=5)))
        assert page.sections == [name for name in sections if stages == 2 or name != "Learning curves"]
        assert "No classifier yet" in page.text
        assert "no privacy was spent" in page.text
    page = Page(written(make_run(tmp_path / "3", stages=3)))
    for content in ("86.1 %", "0.3 of 1 allowed", "after stage probe"):
        assert content in page.text


def test_a_fine_tune_is_not_missing_where_the_probe_has_the_whole_budget(tmp_path: Path) -> None:
    run = read_run(make_run(tmp_path / "x", stages=3))
    for share, shown in ((0.3, True), (1.0, False)):
        results = run.results | {"probe": replace(run.results["probe"], share=share)}
        text = Page(report.page(replace(run, results=results))).text
        assert ("private fine-tune missing" in text) is shown


def test_unfinished_stage_is_counted(tmp_path: Path) -> None:
    """Charges that no finished stage reports are part of the ε that is shown."""
    run = make_run(tmp_path / "x", stages=3)
    ledger = Ledger.open(run.privacy_dir / "ledger.jsonl")
    with run.lock():
        run.begin("finetune", schema.as_dict(schema.build("finetune", {})), {})
    before = Page(written(run)).text
    assert "0.3 of 1 allowed" in before
    charge(ledger, "finetune", 4, 10.0)
    page = Page(written(run))
    truth = ledger.spent(1e-5).upper
    shown = float(re.search(r"ε, spent ([\d.]+)", page.text).group(1))
    assert truth <= shown <= truth + 1e-3
    assert shown > 0.6
    assert "Stage finetune was begun but is not finished" in page.text
    assert "lost to crashes, restarts and unfinished stages: ε from" in page.text


def planned_run(path: Path) -> RunDir:
    """A run after its public stages, with a plan and an empty ledger."""
    run = make_run(path, stages=2)
    budget = {"epsilon": 1.0, "delta": 1e-5}
    atomic_write(run.privacy_dir / "plan.json", json.dumps({"format": 1, **budget}))
    with run.lock():
        run.begin("probe", schema.as_dict(schema.build("probe", {})), {})
        ledger = Ledger.create(run.privacy_dir / "ledger.jsonl", examples=1437, budget=budget)
        assert "no privacy was spent" in Page(written(run)).text
        run.keep_ledger_head(ledger.head)  # as a stage does before its first charge
    return run


@pytest.mark.parametrize("finished", [2, 3])
def test_the_other_libraries_are_asked_about_what_counts(tmp_path: Path, finished: int) -> None:
    """A sampled stage that was stopped after a step counts as its whole plan, for every accountant."""
    run = planned_run(tmp_path / "x") if finished == 2 else make_run(tmp_path / "x", stages=3)
    with run.lock():
        run.begin("finetune", schema.as_dict(schema.build("finetune", {})), {})
    ledger = Ledger.open(run.privacy_dir / "ledger.jsonl")
    ledger.charge(
        stage="finetune", attempt=1, steps=1, planned=40, noise_multiplier=4.0, sample_rate=0.3, clip_norm=1.0,
        random="os-entropy",
    )  # fmt: skip
    text = Page(written(run)).text
    assert "no privacy was spent" not in text
    shown = float(re.search(r"spent ε = ([\d.]+)" if finished == 2 else r"ε, spent ([\d.]+)", text).group(1))
    assert shown >= ledger.spent(1e-5).upper > 1
    if finished == 3:
        assert float(re.search(r"\(Rényi DP\): ε ≤ ([\d.]+)", text).group(1)) > 1


def test_stale_stage_is_named(tmp_path: Path) -> None:
    run = RunDir.open(tmp_path / "x", create=True)
    with run.lock():
        for stage, result, seed in (
            ("generate", GENERATED, 0),
            ("pretrain", PRETRAINED, 0),
            ("generate", GENERATED, 1),
        ):
            inputs = run.inputs_from("generate") if stage == "pretrain" else {}
            begun = run.begin(stage, {"seed": seed}, inputs, overwrite=True)
            (begun.directory / "made").write_text(f"{stage} {seed}")
            run.finish(stage, run.hash_outputs(stage, ["made"]), result)
        Ledger.create(run.privacy_dir / "ledger.jsonl", examples=1437)
        run.begin("probe", {}, {"generate/made": "0" * 64})
        finish(run, "probe", private_result("probe"))
    text = Page(written(run)).text
    assert "Stage probe is stale: it was made from another generate/made" in text


def test_stale_fine_tune_gives_way_to_the_probe_but_stays_paid(tmp_path: Path) -> None:
    run = make_run(tmp_path / "x", stages=3)
    charge(Ledger.open(run.privacy_dir / "ledger.jsonl"), "finetune", 4, 10.0)
    with run.lock():
        run.begin("finetune", {}, {"probe/head.safetensors": "0" * 64})
        finish(run, "finetune", private_result("finetune"))
    page = Page(written(run))
    assert "Test accuracy 86.1 %" in page.text
    assert "after stage probe" in page.text
    assert "0.999 of 1 allowed" in page.text


# ------------------------------------------------------------------------------------------------------- not private


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"epsilon": math.inf, "epsilon_total": math.inf, "noise_multiplier": 0.0, "private": False}, "without noise"),
        ({"random": "insecure-seed", "private": False}, "came from a seed"),
        ({"private": False}, "An earlier step of this run"),
    ],
)
def test_not_private_is_unmissable(tmp_path: Path, changes: dict[str, Any], reason: str) -> None:
    text = written(make_run(tmp_path / "x", **changes))
    page = Page(text)
    assert "NOT PRIVATE" in page.texts
    assert "PRIVATE" not in page.texts  # the badge
    assert any(attributes.get("class") == "banner" for attributes in page.all("div"))
    assert reason in page.text
    assert "differentially private image classifier" not in page.text
    assert re.search(r"ε, spent (∞|void)", page.text)
    card = model_card(private_result("finetune", **changes), PRETRAINED, GENERATED)
    assert "## NOT PRIVATE" in card
    assert reason in card
    assert "differential privacy** for" not in card


def test_seeded_charge_in_the_ledger_is_enough(tmp_path: Path) -> None:
    run = make_run(tmp_path / "x")
    charge(Ledger.open(run.privacy_dir / "ledger.jsonl"), "probe", 1, 133.7, "insecure-seed")
    page = Page(written(run))
    assert "NOT PRIVATE" in page.texts
    assert "PRIVATE" not in page.texts


# ---------------------------------------------------------------------------------------------- what must not get in


def test_names_from_files_stay_text(tmp_path: Path) -> None:
    classes = [EVIL, '"><img src=x onerror=alert(1)>', "c&amp;", *map(str, range(7))]
    changes = {"title": f"{EVIL}T", "data": "folder:<b>", "device": EVIL, "accountant": "'\"<i>"}
    text = written(make_run(tmp_path / "x", classes=classes, **changes))
    page = Page(text)
    assert outside_references(text) == []
    assert EVIL in page.texts
    assert "c&amp;" in page.texts
    assert not page.all("b")
    assert not page.all("i")[4:]  # those of the budget's legend
    text = written(make_run(tmp_path / "many", classes=[f"{EVIL} {number}" for number in range(25)]))
    page = Page(text)
    assert outside_references(text) == []
    assert "confusion-title" in page.drawings
    assert "Most frequent confusions" in page.text
    assert any(row.startswith(EVIL) for row in page.texts)


@pytest.fixture
def opened() -> Iterator[Callable[[], list[str]]]:
    """Paths opened since; audit hooks cannot be removed, so this one is switched off at the end."""
    paths: list[str] = []
    active = True

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if active and event in ("open", "os.listdir", "os.scandir"):
            paths.append(str(arguments[0]))

    sys.addaudithook(hook)
    yield lambda: paths
    active = False


def test_private_folder_is_never_read(tmp_path: Path, opened: Callable[[], list[str]]) -> None:
    run = make_run(tmp_path / "x")
    opened().clear()
    text = written(run)
    touched = [path for path in opened() if str(run.path) in path]
    assert any("ledger.jsonl" in path for path in touched)  # the hook sees
    assert not [path for path in touched if "/private" in path]
    assert CANARY not in text


# ----------------------------------------------------------------------------------------------------- damaged files


@pytest.mark.parametrize(
    ("file", "content", "named"),
    [
        ("env.json", b"{", "env.json"), ("env.json", b"[]", "env.json"), ("privacy/plan.json", b"\xff", "plan.json"),
        ("3-probe/metrics.jsonl", b'{"step": 1}\nrubbish\n{"step": 2}\n', "line 2"),
        ("1-generate/preview.png", b"no picture", "preview.png"), ("privacy/ledger.jsonl", None, "ledger"),
    ],
)  # fmt: skip
def test_damage_is_named(tmp_path: Path, file: str, content: bytes | None, named: str) -> None:
    run = make_run(tmp_path / "x")
    (run.path / file).unlink()
    if content is not None:
        (run.path / file).write_bytes(content)
    with pytest.raises(CheckpointError, match=named):
        report.write(run)
    assert not (run.path / "report.html").exists()


def test_torn_metrics_and_missing_preview_are_harmless(tmp_path: Path) -> None:
    run = make_run(tmp_path / "x", stages=3, lines=5)
    with open(run.path / "3-probe" / "metrics.jsonl", "a") as file:
        file.write('{"step": 7, "upda')
    (run.path / "1-generate" / "preview.png").unlink()
    assert Page(written(run)).sections[:2] == ["Stages", "Learning curves"]
