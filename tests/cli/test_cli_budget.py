"""One budget per run: what would exceed it is refused with exit code 5 before a pixel is read."""

from __future__ import annotations

import pytest
from cli_process import NO_PIXELS, Dprandp, RunAfter, good, refused, state_of

CONFIG = ("--config", "small.toml")


def test_finetune_after_the_whole_budget_went_to_the_probe(dprandp: Dprandp, run_after: RunAfter) -> None:
    run = run_after("pretrain")
    done = dprandp("probe", *CONFIG, "--run", run, "--data", "npz:tiny.npz", "--share", 1, "--json")
    assert 0.99 < good(done)["epsilon"] <= done.json["epsilon_target"] == 1
    assert "next: dprandp report" in done.err
    before = state_of(run)
    refused(dprandp("finetune", *CONFIG, "--run", run, before=NO_PIXELS), 5, "ε = 1", "fix:")
    assert state_of(run) == before


def test_probe_again(dprandp: Dprandp, run_after: RunAfter) -> None:
    """A second probe is charged on top of the first: allowed while it fits, refused when it does not."""
    run = run_after("probe")
    first = good(dprandp("status", "--run", run, "--json"))["budget"]["spent"]
    again = ("probe", *CONFIG, "--run", run, "--overwrite")
    before = state_of(run)
    done = dprandp(*again, "--share", 0.97, before=NO_PIXELS)
    refused(done, 5, "running the probe for ε = 1.94", "above its budget of 2", "smaller --share", "new --run")
    assert state_of(run) == before
    assert first < good(dprandp(*again, "--json"))["epsilon"] <= 2
    states = {row["stage"]: row["state"] for row in good(dprandp("status", "--run", run, "--json"))["stages"]}
    assert (states["probe"], states["finetune"]) == ("done", "missing")


@pytest.mark.slow
def test_a_finished_run_has_nothing_left_and_no_other_budget(dprandp: Dprandp, run_after: RunAfter) -> None:
    run = run_after("finetune")
    before = state_of(run)
    for stage, left in (("probe", "above its budget of 2"), ("finetune", "already spent ε = ")):
        for flags in (["--eps", 3], ["--eps", "inf"], ["--delta", 1e-6], ["--eps", 3, "--overwrite"]):
            done = dprandp(stage, *CONFIG, "--run", run, *flags, before=NO_PIXELS)
            refused(done, 5, "fixed at ε = 2", "leave --eps and --delta out", "new --run")
        refused(dprandp(stage, *CONFIG, "--run", run, "--overwrite", before=NO_PIXELS), 5, left, "tart a new")
    refused(dprandp("probe", "--run", run, "--eps", 9, "--plan"), 5, "fixed at ε = 2")
    refused(dprandp("probe", "--run", run, "--data", "npz:none.npz", "--plan"), 3, "there is no file none.npz")
    assert state_of(run) == before
