"""What the commands print: JSON, help, exit codes, and the NOT PRIVATE stamp."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer
from cli_process import Dprandp, RunAfter, good, refused

from dprandp.cli import app

PRIVATE_KEYS = {
    "stage", "data", "accuracy", "balanced_accuracy", "auc", "loss", "epsilon", "delta", "epsilon_target",
    "noise_multiplier", "sample_rate", "steps", "clip_norm", "views", "train_examples", "seconds", "device", "private",
}  # fmt: skip
KEYS = {
    "generate": {"stage", "process", "count", "resolution", "images_per_second", "seconds"},
    "pretrain": {"stage", "steps", "views_per_second", "loss", "knn_accuracy", "seconds"},
    "probe": PRIVATE_KEYS,
    "finetune": PRIVATE_KEYS,
}


@pytest.mark.parametrize("stage", KEYS)
def test_json_of_a_stage(dprandp: Dprandp, stages: dict[str, Path], stage: str) -> None:
    first = (stages[stage].parent / f"{stage}.json").read_text()
    assert first.count("\n") == 1
    result = json.loads(first)
    assert KEYS[stage] <= set(result)
    assert result["stage"] == stage
    skipped = dprandp(stage, "--config", "small.toml", "--run", stages[stage], "--json", "--quiet")
    assert (skipped.code, skipped.json, skipped.err) == (0, result, "")
    line = dprandp(stage, "--config", "small.toml", "--run", stages[stage])
    assert re.fullmatch(rf"{stage}: .+\n", line.out)
    assert "next: dprandp " in line.err
    if stage in ("probe", "finetune"):
        assert result["private"] is True
        # what the run has spent by now, what it may have spent by now, and in all
        assert 0 < result["epsilon"] <= result["epsilon_target"] <= result["epsilon_total"] == 2
        said = re.search(r"ε = ([0-9.]+)", line.out)
        assert said is not None
        assert float(said.group(1)) == pytest.approx(result["epsilon"], rel=0.01)


def test_json_of_the_others(dprandp: Dprandp, run_after: RunAfter) -> None:
    run = run_after("finetune")
    status = good(dprandp("status", "--run", run, "--json"))
    assert [row["stage"] for row in status["stages"]] == ["generate", "pretrain", "probe", "finetune"]
    assert {row["state"] for row in status["stages"]} == {"done"}
    assert 0 < status["budget"]["spent"] <= status["budget"]["epsilon"] == 2
    account = good(dprandp("account", "--eps", "inf", "--json"))
    assert (account["epsilon"], account["noise_multiplier"]) == ("inf", 0)
    rows = good(dprandp("datasets", "--json", "--data-dir", "nowhere"))["datasets"]
    assert {row["name"]: row["available"] for row in rows}["digits"] is True
    assert all(row["how_to_get"] for row in rows if not row["available"])
    assert Path(good(dprandp("report", "--run", run, "--json"))["report"]) == run / "report.html"


def test_account_explains_itself_beside_its_one_line(dprandp: Dprandp) -> None:
    """Scripts read stdout: one line, unless a table was asked for. People read the rest."""
    asked = ("account", "--noise-multiplier", 40.9, "--steps", 120)
    plain, table = dprandp(*asked), dprandp(*asked, "--curve")
    assert "ε = 0.0000" not in dprandp("account", "--eps", "1e-9").out
    assert plain.out.count("\n") == 1
    assert table.out.startswith(plain.out)
    assert [line.split()[0] for line in table.out.splitlines()[2:]] == [f"1e-{e:02d}" for e in range(3, 11)]
    assert "at 0.1 / 1 / 5 % false alarms" in plain.err
    assert "best advantage" in plain.err
    replaced = dprandp(*asked, "--adjacency", "replace-one", "--json")
    assert "attacker" not in replaced.err
    assert replaced.json["adjacency"] == "replace one record"
    assert "doubles μ (exact)" in replaced.json["adjacency_relation"]
    assert replaced.json["equivalent_mu"] == pytest.approx(2 * 120**0.5 / 40.9)
    assert len(replaced.json["curve"]["epsilon"]) == len(replaced.json["curve"]["delta"]) == 8


def test_the_whole_run(dprandp: Dprandp, run_after: RunAfter) -> None:
    """``dprandp run`` on a finished run repeats nothing; a refusal in the middle keeps what was made."""
    done = dprandp("run", "--config", "small.toml", "--run", run_after("finetune"), "--json", "--quiet")
    assert set(good(done)["results"]) == set(KEYS)
    assert done.err == ""
    run = run_after("pretrain")
    refused(dprandp("run", "--config", "small.toml", "--run", run, "--data", "npz:none.npz", "--workers", 1), 3, "none")
    states = {row["stage"]: row["state"] for row in good(dprandp("status", "--run", run, "--json"))["stages"]}
    assert states == {"generate": "done", "pretrain": "done", "probe": "missing", "finetune": "missing"}


@pytest.mark.parametrize("flags", [["--eps", "inf"], ["--eps", 2, "--insecure-seed", 3]], ids=lambda flags: flags[-2])
def test_not_private_is_stamped_everywhere(dprandp: Dprandp, run_after: RunAfter, flags: list) -> None:
    run = run_after("pretrain")
    probe = ("probe", "--config", "small.toml", "--run", run, "--data", "npz:tiny.npz", *flags)
    done = dprandp(*probe, "--json")
    assert done.code == 0, done.err
    assert done.json["private"] is False
    if "inf" in flags:
        assert done.json["epsilon"] == "inf"
    else:
        assert "NOT PRIVATE" in done.err
    assert "NOT PRIVATE" in dprandp(*probe).out
    assert "NOT PRIVATE" in dprandp("status", "--run", run).out
    assert dprandp("status", "--run", run, "--json").json["budget"]["private"] is False
    assert dprandp("report", "--run", run).code == 0
    assert "NOT PRIVATE" in (run / "report.html").read_text()
    assert "NOT PRIVATE" in (run / "model" / "MODEL_CARD.md").read_text()
    assert json.loads((run / "model" / "config.json").read_text())["result"]["private"] is False
    # one careless stage marks the run for good: a proper stage after it cannot wash it clean
    if "inf" not in flags:
        done = dprandp("finetune", "--config", "small.toml", "--run", run, "--json")
        assert (done.code, done.json["private"]) == (0, False), done.err


def test_private_is_not_stamped(dprandp: Dprandp, run_after: RunAfter) -> None:
    run = run_after("finetune")
    assert dprandp("report", "--run", run).code == 0
    pages = [(run / name).read_text() for name in ("report.html", "model/MODEL_CARD.md")]
    assert not any("NOT PRIVATE" in text for text in (dprandp("status", "--run", run).out, *pages))


# -------------------------------------------------------------------------------------------------------------- help

COMMANDS = typer.main.get_command(app).commands  # type: ignore[attr-defined]
PANELS = ["Main", "Data", "Privacy", "Training", "Performance", "Output"]


def options(command: object) -> Iterator:
    found = (entry for entry in command.params if entry.param_type_name == "option")  # type: ignore[attr-defined]
    yield from (entry for entry in found if entry.name != "help")


@pytest.mark.parametrize("name", COMMANDS)
def test_help(dprandp: Dprandp, name: str) -> None:
    """Every option is explained in its panel, and the panels come in one order."""
    done = dprandp(name, "--help")
    assert (done.code, done.err) == (0, "")
    flat = " ".join(done.out.replace("│", " ").split())
    assert len(re.findall(rf"dprandp {name}\b", flat)) >= 3, "the usage line and two examples"
    panels = list(dict.fromkeys(entry.rich_help_panel for entry in options(COMMANDS[name])))
    assert panels == [panel for panel in PANELS if panel in panels]
    assert all(f"─ {panel} ─" in done.out for panel in panels)
    for entry in options(COMMANDS[name]):
        assert entry.rich_help_panel in PANELS, entry.name
        assert entry.help, entry.name
        # a value that the option has if it is not given: shown by typer, or said in words
        optional = entry.is_flag or entry.name in ("config", "classes", "insecure_seed", "data")
        if entry.default is None and not optional and not entry.required:
            assert re.search(r"[Dd]efault|Find the", entry.help), f"--{entry.name}: {entry.help}"


def test_help_of_run_begins_with_what_most_calls_give(dprandp: Dprandp) -> None:
    shown = re.findall(r"^│ (--[a-z-]+)", dprandp("run", "--help").out, re.MULTILINE)
    assert shown[1:7] == ["--data", "--eps", "--unit-column", "--size", "--prior", "--run"]


# -------------------------------------------------------------------------------------------------------- exit codes

BUG = """
from dprandp.inspection import overview
def status(rundir): raise KeyError("patient 4711")
overview.status = status
"""


def test_a_bug_shows_nothing_private(dprandp: Dprandp, stages: dict[str, Path]) -> None:
    done = dprandp("status", "--run", stages["probe"], before=BUG)
    refused(done, 1, "this is a bug in dprandp: KeyError", "--debug")
    assert "4711" not in done.err
    done = dprandp("status", "--run", stages["probe"], "--debug", before=BUG)
    assert done.code == 1
    assert "Traceback" in done.err
    assert "patient 4711" in done.err


def test_exit_codes(run_after: RunAfter, folder: Path, dprandp: Dprandp) -> None:
    """130 and 143 are in the tests of signals, where one is of ``python -m dprandp``."""
    done = dprandp("--version")
    assert (done.code, done.err) == (0, "")
    run = run_after("probe")
    command = ("finetune", "--config", "small.toml", "--run", run)
    refused(dprandp(*command, "--eps", 7), 5, "fixed at ε = 2")
    error = json.loads(dprandp(*command, "--eps", 7, "--json").out)["error"]
    assert (error["exit_code"], "fixed at ε = 2" in error["problem"]) == (5, True)
    (run / "run.json").write_text("{")
    refused(dprandp(*command), 4, "run.json is corrupt")
    refused(dprandp("generate", "--run", folder / "tiny.npz" / "x"), 6, "cannot")
    assert all(name in dprandp().out for name in (*COMMANDS, "dprandp run --data digits --eps 1"))


def test_armed_fault_is_announced_and_a_malformed_one_refused(dprandp: Dprandp) -> None:
    done = dprandp("account", "--eps", 1, DPRANDP_FAULT="renamed:3")
    assert done.code == 0
    assert "will be killed at hit 3 of 'renamed'" in done.err
    refused(dprandp("account", "--eps", 1, DPRANDP_FAULT="renamd:3"), 2, "did you mean 'renamed'")
