"""The commands of docs/own-data.md run, as they stand there."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from cli_process import Dprandp, RunAfter, good, refused
from own_data import make_own_data

PAGE = Path(__file__).resolve().parents[2] / "docs/own-data.md"


def test_the_commands_of_the_page(dprandp: Dprandp, tmp_path: Path) -> None:
    make_own_data(tmp_path)
    fences = re.findall(r"^```bash\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.M | re.S)
    commands = [shlex.split(line, comments=True) for fence in fences for line in fence.splitlines()]
    assert len(commands) >= 3
    for program, *arguments in commands:
        assert program == "dprandp"
        done = dprandp(*arguments, folder=tmp_path)
        assert done.code == 0, (arguments, done.err)
        assert done.out


@pytest.mark.slow
def test_a_table_from_run_to_release(dprandp: Dprandp, run_after: RunAfter, folder: Path, tmp_path: Path) -> None:
    make_own_data(tmp_path)
    run = run_after("pretrain")
    command = ("--run", run, "--config", folder / "small.toml", "--json")
    table = ("--data", "csv:scans-unsplit.csv", "--class-names", "healthy,ill", "--unit-column", "patient")
    drawn = (*table, "--split-by", "group", "--test-fraction", 0.3)
    probed = good(dprandp("probe", *command, *drawn, "--eps", 3, folder=tmp_path))
    rule = "each group in the test split with chance 0.3, by the public seed 0"
    assert (probed["unit"], probed["split_rule"]) == ("one patient (column patient)", rule)
    assert probed["train_examples"] + probed["test_examples"] == 52
    tuned = good(dprandp("finetune", *command, folder=tmp_path))  # keeps all declarations
    assert tuned["train_units"] == probed["train_units"] < tuned["train_examples"]
    assert "by the public seed 0" in (run / "model/MODEL_CARD.md").read_text()
    other = dprandp("finetune", *command, *drawn, "--split-seed", 1, folder=tmp_path)
    refused(other, 3, "when this run began")


def test_a_bare_path_is_asked_about(dprandp: Dprandp, tmp_path: Path) -> None:
    make_own_data(tmp_path)
    refused(dprandp("run", "--data", "scans", folder=tmp_path), 2, "did you mean folder:scans?")
    refused(dprandp("run", "--data", "scans.csv", folder=tmp_path), 2, "did you mean csv:scans.csv?")
