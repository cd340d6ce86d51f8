"""``continue`` and ``diagnose`` as commands: planned, killed, gone on with, and followed by a probe."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from cli_process import Dprandp, RunAfter, good, refused

FLAGS = (
    "--public", "fraction:0.2", "--data", "npz:tiny.npz", "--steps", "6", "--switch", "3", "--batch-size", "16",
    "--public-batch-size", "8",
)  # fmt: skip


@pytest.mark.slow
def test_a_run_from_plan_to_probe_over_a_kill(dprandp: Dprandp, vit: Path) -> None:
    planned = good(dprandp("continue", "--run", vit, *FLAGS, "--eps", "4", "--plan", "--json"))
    assert not (vit / "privacy").exists()
    told = good(dprandp("diagnose", "--run", vit, *FLAGS, "--eps", "4", "--json"))
    assert told["noise_multiplier"] == planned["noise_multiplier"]
    assert json.loads((vit / "diagnose/terms.json").read_text())["rules"] == told["rules"]
    killed = dprandp("continue", "--run", vit, *FLAGS, "--eps", "4", DPRANDP_FAULT="update-applied:2")
    assert killed.code == -9
    done = dprandp("continue", "--run", vit, *FLAGS, "--eps", "4", "--json")
    result = good(done)
    assert (result["steps"], result["charged_steps"], result["lost_steps"]) == (3, 3, 2)
    assert result["noise_multiplier"] == planned["noise_multiplier"]
    assert result["epsilon"] <= planned["epsilon_after"] + 1e-9
    assert "next: dprandp probe" in done.err
    assert good(dprandp("continue", "--run", vit, *FLAGS, "--json")) == result
    probed = good(dprandp("probe", "--run", vit, "--config", "small.toml", "--json"))  # data and ε are the run's
    assert probed["epsilon_total"] == 4
    assert probed["train_examples"] == result["train_examples"] == 96
    assert result["epsilon"] < probed["epsilon"] <= 4
    status = good(dprandp("status", "--run", vit, "--json"))
    assert [row["stage"] for row in status["stages"]] == ["generate", "pretrain", "continue", "probe", "finetune"]
    assert dprandp("report", "--run", vit).code == 0


def test_refusals_say_what_to_do(dprandp: Dprandp, vit: Path, run_after: RunAfter) -> None:
    refused(dprandp("continue", "--run", run_after("pretrain")), 2, "patchnet is a dictionary", "--arch wrn-16-4")
    refused(dprandp("continue", "--run", vit, "--public", "fraction:2"), 2, "'2' is not a number", "fraction:0.1")
    refused(dprandp("continue", "--run", vit, "--switch", "later"), 2, "neither a step nor a rule", "plateau")
    refused(dprandp("diagnose", "--run", vit, "--public", "npz:tiny.npz", "--data", "npz:tiny.npz"), 2, "a part of it")
    assert not (vit / "privacy").exists()
    assert not (vit / "2b-continue").exists()


PART = ("--data", "npz:tiny.npz", "--public-batch-size", 8, "--steps", 4)


@pytest.mark.parametrize("first", ["diagnose", "continue"])
def test_a_part_that_was_public_is_private_in_no_later_stage(
    dprandp: Dprandp, vit: Path, tmp_path: Path, first: str
) -> None:
    """What was read of it without noise has no finite ε. The control: with the same part it stays left out of N."""
    public = (first, "--run", vit, *PART, "--public", "fraction:0.5", "--eps", 4)
    assert dprandp(*public, *(("--mix", "public") if first == "continue" else ("--switch", 2))).code == 0
    probe = ("probe", "--run", vit, "--config", "small.toml", "--data", "npz:tiny.npz", "--eps", 4)
    if first == "diagnose":
        refused(dprandp(*probe), 5, "has used images", "as public data", "the same --public fraction and seed")
    again = ("continue", "--run", vit, *PART, "--eps", 4, "--overwrite")
    for other in (("fraction:0.1",), ("fraction:0.5", "--seed", 3), ("synth",)):
        refused(dprandp(*again, "--switch", 2, "--public", *other), 5, "has used images", "as public data")
        done = dprandp(*again, "--mix", "public", "--public", *other)
        if other == ("synth",):  # which reads no image of the data; and forgets none
            assert done.code == 0
            done = dprandp(*probe)
        refused(done, 5, "has used images", "as public data")
    refused(dprandp("diagnose", "--run", vit, *PART, "--public", "fraction:0.1", "--eps", 4), 5, "as public data")
    assert not (vit / "privacy/ledger.jsonl").exists()
    assert dprandp(*again, "--mix", "public", "--public", "fraction:0.5").code == 0
    assert good(dprandp(*probe, "--json"))["train_examples"] == 60
