"""Bare commands: nobody has said what the data are before the probe, and it is as good as if somebody had."""

from __future__ import annotations

from pathlib import Path

import pytest
from cli_process import Dprandp, RunAfter, good, refused, state_of

from dprandp.cli import session
from dprandp.cli.flags import Options
from dprandp.config.schema import as_dict, build
from dprandp.runs.directory import RunDir


def test_a_bare_extractor_stands_for_data_that_are_named_later(dprandp: Dprandp, run_after: RunAfter) -> None:
    """``--data`` is served by an extractor for each kind; a colour that is asked for is asked for alone."""
    run = run_after("finetune")  # of grey data
    before = state_of(run)
    assert (run / "2-pretrain/grey/extractor.safetensors").exists()
    assert '"colour": "grey"' in (run / "model/config.json").read_text()
    common = ("pretrain", "--config", "small.toml", "--run", run)
    made = good(dprandp(*common, "--data", "npz:tiny.npz", "--json"))
    assert set(made["grey"]) <= set(made)  # the same measures of both
    refused(dprandp(*common, "--colour", "grey"), 2, 'colour was "both", is now "grey"', "--overwrite")
    refused(dprandp(*common, "--colour", "mixed"), 2, "'mixed'", "known: both, grey, rgb")
    assert "warning" not in dprandp("probe", "--config", "small.toml", "--run", run).err
    assert state_of(run) == before


def test_data_that_are_named_first_have_one_extractor(dprandp: Dprandp, run_after: RunAfter) -> None:
    run = run_after("generate")
    made = good(dprandp("pretrain", "--config", "small.toml", "--run", run, "--data", "npz:tiny.npz", "--json"))
    assert "grey" not in made
    assert not (run / "2-pretrain/grey").exists()
    assert 'colour = "grey"' in (run / "2-pretrain/config.toml").read_text()


@pytest.mark.parametrize(
    ("recorded", "file", "resolved"),
    [(None, None, "grey"), ("both", None, "both"), ("rgb", None, "grey"), (None, "rgb", "rgb"), ("both", "rgb", "rgb")],
)
def test_the_colour_that_fits_the_data(tmp_path: Path, recorded: str | None, file: str | None, resolved: str) -> None:
    """Of grey data: an extractor for either kind stays, one for colours alone does not pass for it; the user wins."""
    rundir = RunDir.open(tmp_path / "run", create=True)
    if recorded:
        with rundir.lock():
            config = as_dict(build("pretrain", {"colour": recorded}))
            rundir.begin("pretrain", config, {}, resume=False, overwrite=False)
    toml = tmp_path / "c.toml"
    toml.write_text(f'[pretrain]\ncolour = "{file}"\n' if file else "")
    options = Options(config=toml)
    config = session.resolve(rundir, "pretrain", options, {"colour": None}, fitting={"colour": "grey"})
    assert config.colour == resolved


@pytest.mark.slow
def test_bare_commands_read_digits_as_well_as_run_does(dprandp: Dprandp, tmp_path: Path) -> None:
    """At ε = 1; with one extractor for either kind of data it was 84 %."""
    run = ("--run", tmp_path / "run", "--json")
    for command in (("generate",), ("pretrain",), ("probe", "--eps", 1), ("finetune",)):
        result = good(dprandp(*command, *run))
    assert result["epsilon"] <= 1
    assert result["accuracy"] >= 0.9
