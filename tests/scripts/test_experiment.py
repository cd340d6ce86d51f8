"""What the experiments share, and that each of them knows its rows again."""

from __future__ import annotations

import argparse
import importlib
import json
import sys

import compare_wrn
import experiment
import pytest

ROWS = {
    "compare_systems": {
        "data": "digits", "system": "probe", "epsilon": 1.0, "seed": 0, "size": "tiny", "flags": "",
        "accuracy": 0.5, "spent": 0.99, "seconds": 3.1,
    },
    "continual_finding": {
        "data": "digits", "arch": "vit-2-32-8", "way": "from scratch", "steps": 200, "seed": 0, "epsilon": "1.0",
        "accuracy": 0.5, "spent": 0.99, "seconds": 3.1, "switch": 0, "why": "none",
    },
    "compare_priors": {
        "data": "digits", "fit": 10_000, "process": "dead-leaves", "variant": "one layer", "seed": 0, "clip_norm": 1.0,
        "accuracy": {"1": 0.5, "2": 0.5, "4": 0.5, "8": 0.5, "inf": 0.5}, "dims": 7, "pretraining_seconds": 1.0,
        "seconds": 3.1,
    },
    "compare_wrn": {
        "data": "digits", "fit": 10_000, "process": "dead-leaves", "arch": "wrn-16-4", "budget": 600.0,
        "training": "adamw", "seed": 0, "clip_norm": 1.0, "steps": 9, "views": 9, "loss": 0.5,
        "knn_accuracy": 0.5, "linear_accuracy": 0.5, "effective_rank": 9.0, "pretraining_seconds": 1.0, "seconds": 3.1,
        "accuracy": {key: {"1": 0.5, "2": 0.5, "4": 0.5, "8": 0.5, "inf": 0.5} for key in compare_wrn.FEATURES},
    },
    "results_table": {
        "data": "digits", "size": "small", "seed": 0, "extractor": "learned", "epsilon": "1", "stage": "probe",
        "spent": 0.99, "delta": 1e-5, "accuracy": 0.5, "balanced_accuracy": 0.5, "auc": None, "loss": 0.5,
        "majority_accuracy": 0.1, "seconds": 3.1,
    },
}  # fmt: skip
"""As each script writes them."""

ASKED = {
    "compare_systems": ("digits", "--systems", "probe", "--epsilons", "1"),
    "continual_finding": ("digits", "--ways", "from scratch"),
    "compare_priors": ("--data", "digits", "--processes", "dead-leaves", "--variants", "one layer", "--clip-norm", "1"),
    "compare_wrn": ("--data", "digits", "--processes", "dead-leaves", "--trainings", "adamw", "--clip-norm", "1"),
    "results_table": ("digits", "--extractors", "learned", "--epsilons", "1"),
}


class Asked(Exception):
    """A script wanted a command of the package."""


@pytest.mark.parametrize("name", ROWS)
def test_a_cell_whose_row_is_there_is_not_made_again(tmp_path, monkeypatch, capsys, name):
    script = importlib.import_module(name)

    def refused(*arguments: object) -> dict:
        raise Asked

    monkeypatch.setattr(script, "dprandp", refused)
    arguments = [name, *ASKED[name], "--seeds", "1", "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", arguments)
    with pytest.raises(Asked):  # without the row it is made
        script.main()
    experiment.add_row(tmp_path / "results.jsonl", ROWS[name])
    script.main()
    assert "50.0" in capsys.readouterr().out


def test_settings_of_a_default_that_are_measured_are_not_measured_again(tmp_path, monkeypatch):
    script, log = importlib.import_module("choose_defaults"), tmp_path / "results.jsonl"
    for setting in script.VARIATIONS:
        for target in script.TARGETS:
            experiment.add_row(log, {"setting": setting, "target": list(target), "accuracy": 0.5})
    # features are needed for what is missing alone
    args = argparse.Namespace(out=tmp_path, data_dir=tmp_path / "none")
    script.measure(args, log, 0.1)
    log.write_text("".join(log.read_text().splitlines(keepends=True)[1:]))
    monkeypatch.setattr(script, "public_features", lambda *_: pytest.fail("asked for features"))
    with pytest.raises(pytest.fail.Exception, match="asked for features"):
        script.measure(args, log, script.VARIATIONS[0]["floor"])


def test_rows_are_kept_said_and_found_by_their_facts(tmp_path, capsys):
    log = tmp_path / "results.jsonl"
    assert experiment.read(log) == []
    cell = {"data": "digits", "epsilon": 1.0}
    assert not experiment.has_row(log, cell)
    rows = [{**cell, "accuracy": 0.25}, {**cell, "epsilon": 8.0, "target": [1, 2]}]
    for row in rows:
        experiment.add_row(log, row)
    assert experiment.read(log) == rows
    assert [json.loads(line) for line in capsys.readouterr().err.splitlines()] == rows
    assert experiment.has_row(log, cell)
    assert experiment.has_row(log, {"epsilon": 8, "target": [1, 2]})
    assert not experiment.has_row(log, {"epsilon": 1.0, "target": [1, 2]})
    assert not experiment.has_row(log, {**cell, "seed": 0})  # a fact that no row has


def test_a_spread_is_mean_and_sample_deviation():
    cases = {(): "–", (68.14,): "68.1", (1.0, 3.0): "2.0 ± 1.4"}
    assert {values: experiment.spread(list(values)) for values in cases} == cases


@pytest.mark.slow
def test_a_command_gives_its_json_and_its_failure_ends_the_script(tmp_path, capfd):
    run = tmp_path / "run"
    made = experiment.dprandp(
        "generate", "--run", run, "--process", "perlin", "--count", 3, "--resolution", 32, aloud=True
    )
    assert (made["process"], made["count"]) == ("perlin", 3)
    assert f"+ dprandp generate --run {run} --process perlin" in capfd.readouterr().err
    with pytest.raises(SystemExit, match=r"dprandp generate --run .* ended with 2"):
        experiment.dprandp("generate", "--run", run, "--process", "perlin", "--count", 4, "--resolution", 32)
    assert "+ dprandp" not in capfd.readouterr().err
