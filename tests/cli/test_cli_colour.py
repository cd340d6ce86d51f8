"""Bare commands: nobody has said what the data are before the probe, and it is as good as if somebody had."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from cli_process import Dprandp, refused, state_of

RunAfter = Callable[[str], Path]


def test_a_bare_extractor_stands_for_data_that_are_named_later(dprandp: Dprandp, run_after: RunAfter) -> None:
    """``--data`` is served by an extractor for each kind; a colour that is asked for is asked for alone."""
    run = run_after("pretrain")
    before = state_of(run)
    assert (run / "2-pretrain/grey/extractor.safetensors").exists()
    common = ("pretrain", "--config", "small.toml", "--run", run)
    done = dprandp(*common, "--data", "npz:tiny.npz", "--json")
    assert done.code == 0, done.err
    assert set(done.json["grey"]) <= set(done.json)  # the same measures of both
    refused(dprandp(*common, "--colour", "grey"), 2, 'colour was "both", is now "grey"', "--overwrite")
    refused(dprandp(*common, "--colour", "mixed"), 2, "'mixed'", "known: both, grey, rgb")
    assert state_of(run) == before


def test_data_that_are_named_first_have_one_extractor(dprandp: Dprandp, run_after: RunAfter) -> None:
    run = run_after("generate")
    done = dprandp("pretrain", "--config", "small.toml", "--run", run, "--data", "npz:tiny.npz", "--json")
    assert done.code == 0, done.err
    assert "grey" not in done.json
    assert not (run / "2-pretrain/grey").exists()
    assert 'colour = "grey"' in (run / "2-pretrain/config.toml").read_text()


def test_the_chain_of_bare_commands_takes_the_grey_extractor(dprandp: Dprandp, run_after: RunAfter) -> None:
    run = run_after("finetune")  # of grey data
    assert "warning" not in dprandp("probe", "--config", "small.toml", "--run", run).err
    done = dprandp("export", "--run", run, "--out", run / "released.zip")
    assert done.code == 0, done.err
    assert '"colour": "grey"' in (run / "model/config.json").read_text()


@pytest.mark.slow
def test_bare_commands_read_digits_as_well_as_run_does(dprandp: Dprandp, tmp_path: Path) -> None:
    """At ε = 1; with one extractor for either kind of data it was 84 %."""
    run = ("--run", tmp_path / "run", "--json")
    for command in (("generate",), ("pretrain",), ("probe", "--eps", 1), ("finetune",)):
        done = dprandp(*command, *run)
        assert done.code == 0, done.err
    assert done.json["epsilon"] <= 1
    assert done.json["accuracy"] >= 0.9
