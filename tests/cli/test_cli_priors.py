"""--prior and the command priors, with a prior made from the tiny run."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
from cli_process import Done, Dprandp, good, refused, state_of

DATA = ("--data", "npz:tiny.npz", "--eps", 2)


class Shelf:
    """Commands that find one prior, ``little``: the extractor that the tiny run, of grey data, takes."""

    def __init__(self, dprandp: Dprandp, folder: Path) -> None:
        self.dprandp, self.folder = dprandp, folder
        self.before = f"import dprandp.priors, pathlib; dprandp.priors.FOLDER = pathlib.Path({str(folder)!r})"

    def __call__(self, *arguments: object) -> Done:
        return self.dprandp(*arguments, before=self.before)


@pytest.fixture
def shelf(dprandp: Dprandp, stages: dict[str, Path], tmp_path: Path) -> Shelf:
    made = stages["pretrain"]
    record = json.loads((made / "run.json").read_text())["stages"]
    tensors = (made / "2-pretrain/grey/extractor.safetensors").read_bytes()
    card: dict[str, Any] = {
        "format": 1, "name": "little", "version": "0", "licence": "MIT", "commands": [], "probes": [], "hardware": {},
        "sha256": hashlib.sha256(tensors).hexdigest(), "bytes": len(tensors), "seconds": {"pretrain": 1.0},
        "generate": record["generate"]["config"], "pretrain": record["pretrain"]["config"] | {"colour": "grey"},
        "result": record["pretrain"]["result"],
    }  # fmt: skip
    folder = tmp_path / "priors"
    folder.mkdir()
    (folder / "little.json").write_text(json.dumps(card))
    (folder / "little.safetensors").write_bytes(tensors)
    short = "[probe]\ndims = 32\nstatistics_images = 100\nstatistics_views = 2\nsteps = 5\n"
    (tmp_path / "short.toml").write_text(short)
    return Shelf(dprandp, folder)


def test_the_list_and_its_check(shelf: Shelf) -> None:
    (row,) = shelf("priors", "--json").json["priors"]
    assert (row["name"], row["process"], row["size"], row["licence"]) == ("little", "dead-leaves", "tiny", "MIT")
    assert row["feature_dim"] == 2 * 5 * 32
    assert row["problem"] is None
    done = shelf("priors", "--check")
    assert done.code == 0
    assert "little" in done.out
    assert "DAMAGED" not in done.out
    path = shelf.folder / "little.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    done = shelf("priors", "--check")
    assert done.code == 4
    assert "DAMAGED" in done.out
    assert "sha256 differs" in done.err
    assert shelf("priors").code == 0  # the list alone passes no judgement


@pytest.mark.slow
def test_a_probe_from_nothing_but_a_prior(shelf: Shelf, stages: dict[str, Path], tmp_path: Path) -> None:
    run = tmp_path / "run"
    probe = ("probe", "--prior", "little", *DATA, "--run", run, "--config", tmp_path / "short.toml", "--json")
    planned = good(shelf(*probe, "--plan"))
    assert not run.exists()
    done = shelf(*probe)
    assert good(done)["noise_multiplier"] == planned["noise_multiplier"]
    assert "warning: this extractor" not in done.err
    made = json.loads((run / "run.json").read_text())["stages"]
    states = {stage: record["state"] for stage, record in made.items()}
    assert states == dict.fromkeys(("generate", "pretrain", "probe"), "done")
    whitener = "3-probe/statistics/whitener.safetensors"
    assert (run / whitener).read_bytes() == (stages["probe"] / whitener).read_bytes()
    before = state_of(run)
    assert good(shelf(*probe)) == done.json
    assert state_of(run) == before
    # the run remembers; the report tells
    assert shelf("report", "--run", run).code == 0
    assert "the prior little that dprandp ships" in (run / "report.html").read_text()


@pytest.mark.slow
def test_run_and_pretrain_take_a_prior_too(shelf: Shelf, tmp_path: Path) -> None:
    config = ("--config", tmp_path / "short.toml", "--json")
    run = ("run", "--prior", "little", *DATA, "--run", tmp_path / "a", *config)
    by_name = {made["stage"]: made for made in good(shelf(*run, "--plan"))["stages"]}
    assert (by_name["generate"]["count"], by_name["pretrain"]["prior"]) == (100, "little")
    result = good(shelf(*run))
    assert (result["stage"], result["results"]["pretrain"]["prior"]) == ("probe", "little")
    assert "the prior little" in (tmp_path / "a/report.html").read_text()
    assert shelf(*run).code == 0  # all skipped
    pretrain = ("pretrain", "--prior", "little", "--run", tmp_path / "b", *config)
    assert good(shelf(*pretrain))["prior"] == "little"
    assert shelf(*pretrain, "--plan").code == 0


def test_refusals_leave_nothing_behind(shelf: Shelf, tmp_path: Path) -> None:
    run = tmp_path / "run"
    probe = ("probe", *DATA, "--run", run, "--prior")
    refused(shelf(*probe, "litle"), 2, "no prior called 'litle'", "did you mean 'little'")
    refused(shelf("run", *DATA, "--run", run, "--prior", "little", "--count", 9), 2, "--count sets how")
    refused(shelf("run", *DATA, "--run", run, "--prior", "little", "--pretrain-steps", 9), 2, "--pretrain-steps sets")
    refused(shelf("pretrain", "--run", run, "--prior", "little", "--arch", "wrn-16-4"), 2, "--arch sets how")
    toml = tmp_path / "more.toml"
    toml.write_text("[generate]\ncount = 9\n")
    refused(shelf(*probe, "little", "--config", toml), 2, "sets generate", "leave --prior out")
    refused(shelf("probe", "--data", "npz:none.npz", "--run", run, "--prior", "little"), 3, "none.npz")
    (shelf.folder / "little.safetensors").write_bytes(b"no tensors")
    refused(shelf(*probe, "little", "--plan"), 4, "its sha256 differs")
    refused(shelf("pretrain", "--run", tmp_path / "other", "--prior", "little"), 4, "its sha256 differs")
    assert not (run / "run.json").exists()
    assert not (tmp_path / "other" / "run.json").exists()


def test_a_run_with_images_of_its_own_takes_no_prior(shelf: Shelf, tmp_path: Path) -> None:
    run = tmp_path / "own"
    assert shelf("generate", "--run", run, "--count", 20, "--resolution", 32, "--workers", 1).code == 0
    done = shelf("pretrain", "--run", run, "--prior", "little")
    refused(done, 2, "has made its own images", "start a new --run for the prior")


@pytest.mark.slow
def test_a_prior_of_the_other_colour_is_told_of(shelf: Shelf, tmp_path: Path) -> None:
    probe = ("probe", "--prior", "little", *DATA, "--config", tmp_path / "short.toml", "--run")
    card = json.loads((shelf.folder / "little.json").read_text())
    card["pretrain"]["colour"] = "rgb"
    (shelf.folder / "little.json").write_text(json.dumps(card))
    done = shelf(*probe, tmp_path / "other")
    assert done.code == 0, done.err
    assert "warning: this extractor was learned from rgb images, and npz:tiny.npz declares grey ones" in done.err
