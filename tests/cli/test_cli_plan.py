"""--plan: what is printed is what then runs; nothing is read, nothing is written. And where the flags of run go."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cli_process import NO_PIXELS, Dprandp, RunAfter, good, refused, state_of

PRIVATE = ("--config", "small.toml", "--data", "npz:tiny.npz", "--eps", 2)
MECHANISM = ("noise_multiplier", "sample_rate", "steps", "clip_norm")


def planned(dprandp: Dprandp, *command: object) -> dict[str, Any]:
    """The plan of a command that must read no pixel and change nothing."""
    run = Path(str(command[command.index("--run") + 1]))
    before = (state_of(run), sorted(run.rglob("*"))) if run.exists() else None
    plan = good(dprandp(*command, "--plan", "--json", before=NO_PIXELS))
    assert ((state_of(run), sorted(run.rglob("*"))) if run.exists() else None) == before
    return plan


def result_of(stages: dict[str, Path], stage: str) -> dict[str, Any]:
    return json.loads((stages[stage].parent / f"{stage}.json").read_text())


@pytest.mark.slow
def test_the_plan_of_a_new_run_is_what_the_stages_then_did(
    dprandp: Dprandp, stages: dict[str, Path], tmp_path: Path
) -> None:
    """The oracle: results of the same four stages, run one after another with the same settings."""
    plan = planned(dprandp, "run", *PRIVATE, "--share", 0.3, "--run", tmp_path / "deep" / "new", "--workers", 1)
    assert list(tmp_path.iterdir()) == []
    assert (plan["stage"], plan["data"], plan["examples"], plan["epsilon"]) == ("run", "npz:tiny.npz", 120, 2)
    by_name = {made["stage"]: made for made in plan["stages"]}
    assert list(by_name) == ["generate", "pretrain", "probe", "finetune"]
    assert {made["action"] for made in plan["stages"]} == {"fresh"}
    results = {stage: result_of(stages, stage) for stage in by_name}
    for stage in ("probe", "finetune"):
        made, result = by_name[stage], results[stage]
        for key in (*MECHANISM, "views", "delta"):
            assert made[key] == pytest.approx(result[key], rel=1e-9), (stage, key)
        assert made["epsilon_after"] == pytest.approx(result["epsilon"], rel=1e-6)
    for key in MECHANISM:
        assert by_name["finetune"]["refit"][key] == pytest.approx(results["finetune"]["refit"][key], rel=1e-9)
    assert plan["epsilon_after"] == by_name["finetune"]["epsilon_after"] <= 2
    made = by_name["generate"]
    assert (made["count"], made["resolution"], made["process"]) == (120, 32, "dead-leaves")
    shards = sorted((stages["generate"] / "1-generate").glob("*.npy"))
    assert made["shards"] == len(shards)
    assert made["disk_bytes"] == sum(np.load(path, mmap_mode="r").nbytes for path in shards)
    for key in ("parameters", "feature_dim", "steps", "arch"):
        assert by_name["pretrain"][key] == results["pretrain"][key]


@pytest.mark.parametrize("stage", ["probe", "finetune"])
def test_the_plan_goes_on_from_what_is_done(
    dprandp: Dprandp, stages: dict[str, Path], run_after: RunAfter, stage: str
) -> None:
    """After the probe its events are charged and not planned: they count once, not twice."""
    plan = planned(dprandp, "run", "--config", "small.toml", "--run", run_after(stage))
    actions = ["skip", "skip", "skip", "fresh" if stage == "probe" else "skip"]
    assert [made["action"] for made in plan["stages"]] == actions
    last, result = plan["stages"][-1], result_of(stages, "finetune")
    assert last["noise_multiplier"] == pytest.approx(result["noise_multiplier"], rel=1e-9)
    assert last["refit"]["noise_multiplier"] == pytest.approx(result["refit"]["noise_multiplier"], rel=1e-9)
    assert plan["epsilon_after"] == pytest.approx(result["epsilon"], rel=1e-6)


def test_the_plan_of_a_single_stage(dprandp: Dprandp, run_after: RunAfter, tmp_path: Path) -> None:
    new = tmp_path / "new"
    made = planned(dprandp, "generate", "--run", new, "--count", 1000, "--resolution", 128, "--workers", 2)
    assert (made["stage"], made["count"], made["disk_bytes"]) == ("generate", 1000, 1000 * 3 * 128**2)
    scratch = ("--from", "scratch", "--data", "digits", "--eps", 2, "--steps", 3)
    assert planned(dprandp, "finetune", *scratch, "--run", new)["steps"] == 3
    assert not new.exists()
    run = run_after("generate")
    made = planned(dprandp, "pretrain", "--run", run, "--arch", "wrn-10-1", "--steps", 9, "--batch-size", 8)
    assert (made["stage"], made["steps"], made["batch_size"], made["action"]) == ("pretrain", 9, 8, "fresh")
    done = dprandp("generate", "--config", "small.toml", "--run", run, "--plan")
    assert "generate: 120 images of dead-leaves at 32 px, 0.37 MB (finished: nothing to do)" in done.out


@pytest.mark.slow
@pytest.mark.parametrize(
    ("command", "planned_as"),
    [
        ("pretrain", ""),
        ("probe", ""),
        ("continue --public fraction:0.1", ""),
        ("continue --mix public", ""),
        ("finetune", "pretrain and probe"),
        ("finetune --from scratch --arch wrn-10-1", ""),
        ("run --share 0.3", ""),
    ],
)
def test_a_plan_needs_neither_the_stages_before_it_nor_the_files_of_a_known_set(
    dprandp: Dprandp, tmp_path: Path, command: str, planned_as: str
) -> None:
    """cifar10 is not there: its declared facts are enough, and the plan says so."""
    data = [] if command == "pretrain" else ["--data", "cifar10", "--eps", 2, "--data-dir", tmp_path]
    done = dprandp(*command.split(), *data, "--run", tmp_path / "new", "--plan", before=NO_PIXELS)
    assert done.code == 0, done.err
    assert list(tmp_path.iterdir()) == []
    assert ("planned as after" in done.err) == bool(planned_as)
    assert planned_as in done.err
    private = data and "--mix public" not in command
    assert done.out.count("warning: cifar10 is not in") == bool(private)


@pytest.mark.slow
def test_a_fine_tune_is_planned_after_the_probe_that_it_needs(
    dprandp: Dprandp, stages: dict[str, Path], run_after: RunAfter
) -> None:
    """The oracle: the fine-tune that was run after that probe."""
    command = ("finetune", "--config", "small.toml", "--data", "npz:tiny.npz", "--eps", 2)
    made, result = planned(dprandp, *command, "--run", run_after("pretrain")), result_of(stages, "finetune")
    for key in MECHANISM:
        assert made[key] == pytest.approx(result[key], rel=1e-9)
    assert made["epsilon_after"] == pytest.approx(result["epsilon"], rel=1e-6)


def test_a_plan_refuses_what_the_stage_would(dprandp: Dprandp, run_after: RunAfter, tmp_path: Path) -> None:
    new = tmp_path / "new"
    refused(dprandp("generate", "--run", new, "--resolution", 33, "--plan"), 2, "resolution = 33 is not offered")
    refused(dprandp("run", "--run", new, "--arch", "vit", "--plan"), 2, "unknown architecture 'vit'")
    refused(dprandp("run", "--run", new, "--share", 1, "--steps", 3, "--lr", 1), 2, "--steps, --lr", "--probe-steps")
    assert not new.exists() or list(new.iterdir()) == [new / ".lock"]
    run = run_after("finetune")
    for flags, said in (
        (["--count", 130], "'generate' in {} was begun with other settings: count was 120, is now 130"),
        (["--probe-lr", 3], "'probe' in {} was begun with other settings: lr was unset, is now 3.0"),
        (["--lr", 3], "'finetune' in {} was begun with other settings: lr was unset, is now 3.0"),
    ):
        done = dprandp("run", "--config", "small.toml", "--run", run, "--plan", *flags)
        refused(done, 2, said.format(run), "--resume", "--overwrite")
    refused(dprandp("run", "--config", "small.toml", "--run", run, "--plan", "--overwrite"), 5, "above its budget of 2")


def test_the_flags_of_run_go_where_their_names_say(dprandp: Dprandp, tmp_path: Path) -> None:
    flags = {
        "--count": 90, "--resolution": 64, "--process": "dead-leaves", "--arch": "wrn-10-1", "--pretrain-steps": 9,
        "--probe-steps": 7, "--probe-batch-size": 100, "--probe-views": 3, "--steps": 2, "--batch-size": 60,
        "--views": 2, "--clip": 0.5, "--eps": "inf", "--seed": 5,
    }  # fmt: skip
    given = [part for pair in flags.items() for part in pair]
    plan = planned(dprandp, "run", "--data", "npz:tiny.npz", "--run", tmp_path / "new", *given)
    generate, pretrain, probe, finetune = plan["stages"]
    assert (generate["count"], generate["resolution"], generate["seed"]) == (90, 64, 5)
    assert (pretrain["arch"], pretrain["steps"]) == ("wrn-10-1", 9)
    assert (probe["steps"], probe["sample_rate"], probe["views"], probe["clip_norm"]) == (7, 100 / 120, 3, 0.5)
    assert (finetune["steps"], finetune["sample_rate"], finetune["views"]) == (2, 0.5, 2)
    assert (finetune["clip_norm"], finetune["refit"]) == (0.5, None)
    assert (plan["epsilon_after"], finetune["noise_multiplier"]) == ("inf", 0)
    done = dprandp("run", "--data", "npz:tiny.npz", "--run", tmp_path / "new", "--share", 1, "--eps", 1, "--plan")
    assert done.code == 0, done.err
    assert "finetune: none, since the probe has the whole budget" in done.out
    first = [line.split()[0] for line in done.out.splitlines()]
    assert first == ["generate:", "pretrain:", "probe", "finetune:", "run:"]


@pytest.mark.slow
def test_run_leaves_a_part_of_the_budget_only_to_a_fine_tune_that_pays(
    dprandp: Dprandp, run_after: RunAfter, tmp_path: Path
) -> None:
    """A patchnet's does not: it has to be asked for, unless the run's probe has left a part for it already."""
    new = ("run", "--data", "npz:tiny.npz", "--run", tmp_path / "new")

    def last(*command: object) -> str:
        return planned(dprandp, *command)["stages"][-1]["stage"]

    assert last(*new) == "probe"
    assert last(*new, "--share", 0.3) == last(*new, "--arch", "wrn-10-1") == "finetune"
    refused(dprandp(*new, "--steps", 3), 2, "--steps set the fine-tune", "--probe-steps", "--share 0.3")
    assert last("run", "--config", "small.toml", "--run", run_after("probe")) == "finetune"
    assert last("run", "--config", "small.toml", "--run", run_after("pretrain")) == "probe"


@pytest.mark.slow
def test_run_makes_images_that_are_large_enough_for_the_input(dprandp: Dprandp, tmp_path: Path) -> None:
    new = ("run", "--data", "npz:tiny.npz", "--run", tmp_path / "new")
    for flags, resolution, size in (
        ((), 64, 32), (("--input-size", 28), 64, 28), (("--input-size", 64), 128, 64),
        (("--input-size", 224), 512, 224), (("--input-size", 64, "--resolution", 256), 256, 64),
        (("--input-size", 64, "--resolution", 64), 64, 64),
    ):  # fmt: skip
        generate, pretrain, _ = planned(dprandp, *new, *flags)["stages"]
        assert (generate["resolution"], pretrain["input_size"]) == (resolution, size)
    shown = dprandp(*new, "--input-size", 64, "--plan").out
    assert "features of images of 64 × 64 pixels" in shown


def test_a_plan_says_that_n_is_small(dprandp: Dprandp, run_after: RunAfter) -> None:
    """Of a run, the last stage alone: a probe with a part of ε is not what is released."""
    run = run_after("pretrain")
    probe = ("probe", "--config", "small.toml", "--run", run, "--data", "npz:tiny.npz", "--plan", "--eps")
    small = dprandp(*probe, 0.5, before=NO_PIXELS)
    assert "warning: N = 120 is small for ε = 0.15 and 3 classes" in small.out
    assert "with the run's whole ε = 0.5 (--share 1)" in small.out
    assert "is small" in good(dprandp(*probe, 0.5, "--json"))["warning"]
    assert "warning" not in good(dprandp(*probe, 50, "--json"))
    assert "is small" not in dprandp(*probe, 50).out
    whole = dprandp("run", *probe[1:], 0.2, before=NO_PIXELS).out
    assert whole.count("warning: ") == 1
    assert whole.splitlines()[-1].startswith("warning: N = 120 is small for ε = 0.2 and 3 classes")
