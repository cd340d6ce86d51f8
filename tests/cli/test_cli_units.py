"""--unit-column, --noise, datasets --check and account --group-size, in processes of their own."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from cli_process import Dprandp, RunAfter, arrays, good, refused, state_of
from PIL import Image

GROUPS = np.arange(120) // 4
UNIT = "one patient (column patient_train)"


@pytest.fixture
def data(tmp_path: Path) -> str:
    """Without a list of classes."""
    made = {key: value for key, value in arrays().items() if key != "classes"}
    np.savez(tmp_path / "scans.npz", **made, patient_train=GROUPS)
    np.savez(tmp_path / "same.npz", **made, patient_train=GROUPS)
    np.savez(tmp_path / "other.npz", **made, patient_train=np.arange(120) % 30)
    return f"npz:{tmp_path / 'scans.npz'}"


@pytest.mark.slow
def test_patients_through_all_commands(dprandp: Dprandp, run_after: RunAfter, data: str, tmp_path: Path) -> None:
    """The unit is named in plan, ledger, result, card and report; the fine-tune goes on with the probe's, and with the
    number of classes that was declared."""
    run = run_after("pretrain")
    asked = ("--data", data, "--unit-column", "patient", "--classes", 3)
    probe = ("probe", "--config", "small.toml", "--run", run, *asked)
    assert f"N = 30 units of privacy, each {UNIT}, 120 images" in dprandp(*probe, "--plan").out
    done = dprandp(*probe, "--json")
    assert done.code == 0, done.err
    assert (done.json["unit"], done.json["train_units"], done.json["expected_batch"]) == (UNIT, 30, 30)
    assert "unit of privacy" not in done.err  # nothing to remind of
    tune = ("finetune", "--config", "small.toml", "--run", run, "--json", "--data")
    before = state_of(run)
    refused(dprandp(*tune, f"npz:{tmp_path}/other.npz"), 3, "units differ")  # the same images in as many other units
    for stage in ("probe", "finetune"):
        done = dprandp(stage, "--config", "small.toml", "--run", run, "--unit-column", "image", "--overwrite")
        refused(done, 5, "unit of privacy was fixed as one patient", "same --unit-column", "new --run")
    assert state_of(run) == before
    result = good(dprandp(*tune, f"npz:{tmp_path}/same.npz"))
    assert (result["unit"], result["train_units"], len(result["classes"])) == (UNIT, 30, 3)
    header = json.loads((run / "privacy/ledger.jsonl").read_text().splitlines()[0])
    assert (header["data_unit"], header["examples"]) == ("patient (column patient_train)", 30)
    assert dprandp("report", "--run", run).code == 0
    assert UNIT in (run / "report.html").read_text(encoding="utf-8")


def test_without_a_column_a_run_says_what_its_unit_is_and_counts_nothing(
    dprandp: Dprandp, run_after: RunAfter, tmp_path: Path
) -> None:
    """The reminder is the same for data with and without duplicates: how many there are is private."""
    said, fresh, made = [], run_after("pretrain"), arrays()
    for name in ("clean", "dirty"):
        np.savez(tmp_path / "set.npz", **made)
        run = shutil.copytree(fresh, tmp_path / f"run-{name}")
        probe = ("probe", "--config", "small.toml", "--run", run, "--data", f"npz:{tmp_path}/set.npz", "--share", 1)
        done = dprandp(*probe)
        assert done.code == 0, done.err
        said.append([line for line in done.err.splitlines() if "unit of privacy" in line])
        made["x_train"][60:], made["y_train"][60:] = made["x_train"][:60], made["y_train"][:60]
    assert said[0] == said[1]
    (line,) = said[0]
    assert "--unit-column" in line
    assert "datasets --check" in line


def test_units_that_make_no_sense(dprandp: Dprandp, run_after: RunAfter, tmp_path: Path, data: str) -> None:
    run = run_after("pretrain")
    before = state_of(run)
    probe = ("probe", "--config", "small.toml", "--run", run)
    asked = ("--data", data, "--classes", 3, "--unit-column")
    refused(dprandp(*probe, *asked, "doctor"), 3, "no array 'doctor'", "doctor_train=")
    refused(dprandp(*probe, "--data", "digits", "--unit-column", "patient"), 2, "unit_column", "does not apply")
    np.savez(tmp_path / "bad.npz", **arrays(), patient_train=GROUPS - 1)
    refused(dprandp(*probe, "--data", f"npz:{tmp_path}/bad.npz", "--unit-column", "patient"), 3, "missing")
    refused(dprandp(*probe, *asked, "patient", "--batch-size", 31), 2, "exceeds the 30", "at most 30")
    assert state_of(run) == before


@pytest.mark.slow
def test_discrete_noise(dprandp: Dprandp, run_after: RunAfter) -> None:
    run = run_after("pretrain")
    data = ("--data", "npz:tiny.npz", "--share", 1)
    probe = ("probe", "--config", "small.toml", "--run", run, *data, "--noise", "discrete")
    done = dprandp(*probe, "--json")
    assert done.code == 0, done.err
    assert (done.json["noise"], done.json["private"]) == ("discrete", True)
    assert 0.99 < done.json["epsilon"] <= 1
    assert "discrete noise" in done.json["accountant"]
    lines = [json.loads(line) for line in (run / "privacy/ledger.jsonl").read_text().splitlines()]
    charges = [line for line in lines if line["kind"] == "charge"]
    assert {(charge["noise"], charge["random"]) for charge in charges} == {("discrete", "os-entropy")}
    assert dprandp("report", "--run", run).code == 0
    assert "discrete Gaussian noise" in (run / "report.html").read_text(encoding="utf-8")
    # another kind of noise is another configuration
    refused(dprandp(*probe[:-1], "gaussian"), 2, "noise", "--overwrite")


def test_datasets_check(dprandp: Dprandp, tmp_path: Path) -> None:
    made = arrays()
    made["x_train"][5] = made["x_train"][0]
    name = f"npz:{tmp_path}/scans.npz"
    np.savez(tmp_path / "scans.npz", **made, patient_train=GROUPS)
    before = state_of(tmp_path)
    done = dprandp("datasets", "--check", name, "--unit-column", "patient", "--json")
    assert done.code == 0, done.err
    assert "do not publish" in done.err
    assert done.json["private_output"] is True
    assert (done.json["repeated_images"], done.json["across_units"], done.json["train_units"]) == (1, 2, 30)
    text = dprandp("datasets", "--check", name).out
    assert "PRIVATE" in text
    assert "declared classes without a training image           0" in text
    assert "--group-size 2" in text
    assert state_of(tmp_path) == before  # nothing is written
    np.savez(tmp_path / "gap.npz", **made | {"y_train": made["y_train"] % 2})
    gap = dprandp("datasets", "--check", f"npz:{tmp_path}/gap.npz")
    assert "has the label bright" in gap.out, gap.err
    refused(dprandp("datasets", "--check", "npz:none.npz"), 3, "there is no file")
    refused(dprandp("datasets", "--unit-column", "patient"), 2, "--check")


def test_account_for_groups(dprandp: Dprandp) -> None:
    made = good(dprandp("account", "--noise-multiplier", 40.9, "--steps", 120, "--group-size", 3, "--json"))
    assert made["group_epsilon"] > 3 * made["epsilon"]
    assert "3 records together: ε = " in dprandp("account", "--eps", 1, "--steps", 60, "--group-size", 3).out


@pytest.mark.slow
def test_units_in_both_splits(dprandp: Dprandp, run_after: RunAfter, tmp_path: Path) -> None:
    """Refused by the stage and by its plan; allowed once for all stages of a run."""
    np.savez(tmp_path / "scans.npz", **arrays(), patient_train=GROUPS, patient_test=np.arange(len(arrays()["y_test"])))
    run = run_after("pretrain")
    before = state_of(run)
    asked = ("--config", "small.toml", "--run", run, "--data", f"npz:{tmp_path}/scans.npz", "--unit-column", "patient")
    for command in (("probe", *asked), ("probe", *asked, "--plan"), ("run", *asked)):
        refused(dprandp(*command), 3, "in both the training and the test split", "--allow-shared-units")
    assert state_of(run) == before
    result = good(dprandp("probe", *asked, "--allow-shared-units", "--json"))
    assert result["shared_units_allowed"] is True
    result = good(dprandp("finetune", "--config", "small.toml", "--run", run, "--json"))
    assert result["shared_units_allowed"] is True
    assert dprandp("report", "--run", run).code == 0
    assert "The user allowed units in both splits" in (run / "report.html").read_text(encoding="utf-8")


def test_the_line_of_a_probe_says_whose_the_rest_of_epsilon_is(dprandp: Dprandp, stages: dict[str, Path]) -> None:
    probe = ("probe", "--config", "small.toml", "--run", stages["probe"])
    said = dprandp(*probe).out
    assert "ε = 0.6 of 2 (the probe's share is 0.3; the rest is for finetune), δ = 1e-05" in said
    assert "for finetune" not in dprandp("finetune", "--config", "small.toml", "--run", stages["finetune"]).out


@pytest.mark.slow
def test_patients_are_the_same_at_every_size_and_in_every_colour(dprandp: Dprandp, tmp_path: Path) -> None:
    """Whoever has two models of one patient's images wants their total ε, whatever the networks see of them."""
    random = np.random.default_rng(0)
    for split, patients in (("train", 12), ("test", 4)):
        for index in range(2 * patients):
            place = tmp_path / "scans" / split / ("ill" if index % 4 > 1 else "healthy") / f"{split}{index // 2}"
            place.mkdir(parents=True, exist_ok=True)
            Image.fromarray(random.integers(0, 256, (70, 70), dtype=np.uint8)).save(place / f"{index}.png")
    scratch = ("finetune", "--from", "scratch", "--arch", "wrn-10-1", "--steps", 1, "--batch-size", 4, "--eps", 3,
               "--data", "folder:scans", "--unit-column", "folder")  # fmt: skip
    runs = []
    for number, more in enumerate(((), ("--input-size", 64), ("--colour", "grey"))):
        runs.append(tmp_path / str(number))
        done = dprandp(*scratch, *more, "--run", runs[-1], folder=tmp_path)
        assert done.code == 0, done.err
    (together,) = good(dprandp("compare", *runs, "--json"))["together"]
    assert sorted(together["runs"]) == sorted(map(str, runs))
    assert together["epsilon"] > 3
