"""One budget per run: what would exceed it is refused with exit code 5 before a pixel is read."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from cli_process import Dprandp, refused, state_of

RunAfter = Callable[[str], Path]

NO_PIXELS = """
from dprandp.data import Dataset
def read(*arguments): raise SystemExit("private pixels were read")
Dataset.train = Dataset.test = Dataset.fingerprint = read
"""


def test_finetune_after_the_whole_budget_went_to_the_probe(dprandp: Dprandp, run_after: RunAfter) -> None:
    run = run_after("pretrain")
    done = dprandp("probe", "--config", "small.toml", "--run", run, "--data", "npz:tiny.npz", "--share", 1, "--json")
    assert done.code == 0, done.err
    assert 0.99 < done.json["epsilon"] <= done.json["epsilon_target"] == 1
    assert "next: dprandp report" in done.err
    before = state_of(run)
    refused(dprandp("finetune", "--config", "small.toml", "--run", run, before=NO_PIXELS), 5, "ε = 1", "fix:")
    assert state_of(run) == before


def test_probe_again(dprandp: Dprandp, run_after: RunAfter) -> None:
    """A second probe is charged on top of the first: allowed while it fits, refused when it does not."""
    run = run_after("probe")
    first = json.loads(dprandp("status", "--run", run, "--json").out)["budget"]["spent"]
    again = ("probe", "--config", "small.toml", "--run", run, "--overwrite")
    before = state_of(run)
    done = dprandp(*again, "--share", 0.97, before=NO_PIXELS)
    refused(done, 5, "running the probe again for ε = 1.94", "above its budget of 2", "smaller --share", "new --run")
    assert state_of(run) == before
    done = dprandp(*again, "--json")
    assert done.code == 0, done.err
    assert first < done.json["epsilon"] <= 2
    states = {row["stage"]: row["state"] for row in dprandp("status", "--run", run, "--json").json["stages"]}
    assert (states["probe"], states["finetune"]) == ("done", "missing")


def test_other_budget(dprandp: Dprandp, run_after: RunAfter) -> None:
    run = run_after("finetune")
    before = state_of(run)
    for stage in ("probe", "finetune"):
        for flags in (["--eps", 3], ["--eps", 1], ["--eps", "inf"], ["--delta", 1e-6], ["--eps", 3, "--overwrite"]):
            done = dprandp(stage, "--config", "small.toml", "--run", run, *flags, before=NO_PIXELS)
            refused(done, 5, "fixed at ε = 2", "leave --eps and --delta out", "new --run")
    assert state_of(run) == before


def test_finished_run_has_nothing_left(dprandp: Dprandp, run_after: RunAfter) -> None:
    run = run_after("finetune")
    before = state_of(run)
    for stage, *fragments in (
        ("probe", "above its budget of 2", "start a new --run"),
        ("finetune", "already spent ε = ", "Start a new run"),
    ):
        done = dprandp(stage, "--config", "small.toml", "--run", run, "--overwrite", before=NO_PIXELS)
        refused(done, 5, *fragments)
    assert state_of(run) == before


def test_plan_reads_no_data_and_writes_nothing(dprandp: Dprandp, run_after: RunAfter, tmp_path: Path) -> None:
    for run, stage, flags in (
        (run_after("pretrain"), "probe", ["--data", "npz:tiny.npz", "--eps", 2]),
        (run_after("probe"), "finetune", []),
        (run_after("finetune"), "finetune", []),
    ):
        before = state_of(run), sorted(run.rglob("*"))
        done = dprandp(stage, "--config", "small.toml", "--run", run, "--plan", "--json", *flags, before=NO_PIXELS)
        assert done.code == 0, done.err
        plan = done.json
        assert plan["stage"] == stage
        assert 0 < plan["epsilon_after"] <= 2
        assert {"noise_multiplier", "steps", "sample_rate", "delta", "clip_norm", "views", "examples"} <= set(plan)
        assert (state_of(run), sorted(run.rglob("*"))) == before
    scratch = ("finetune", "--from", "scratch", "--data", "digits", "--eps", 2, "--steps", 3, "--run", tmp_path / "new")
    done = dprandp(*scratch, "--plan", before=NO_PIXELS)
    assert done.code == 0, done.err
    assert not (tmp_path / "new").exists()


def test_plan_refuses_what_the_stage_would_refuse(dprandp: Dprandp, run_after: RunAfter) -> None:
    run = run_after("finetune")
    refused(dprandp("probe", "--run", run, "--eps", 9, "--plan"), 5, "fixed at ε = 2")
    refused(dprandp("probe", "--run", run, "--data", "npz:none.npz", "--plan"), 3, "there is no file none.npz")
