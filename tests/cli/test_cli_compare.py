"""compare and status --runs, on runs of real stages."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path

import pytest
from cli_process import Dprandp, RunAfter, good, refused, state_of
from own_data import make_own_data
from PIL import Image


@pytest.mark.slow
def test_two_runs_about_the_same_data(
    dprandp: Dprandp, run_after: RunAfter, folder: Path, tmp_path: Path
) -> None:
    """The data have another path in the second run; the first has a fine-tune, the second a probe."""
    first = run_after("finetune").rename(tmp_path / "first")
    second = run_after("pretrain").rename(tmp_path / "second")
    moved = shutil.copy(folder / "tiny.npz", tmp_path / "moved.npz")
    probe = ("probe", "--config", "small.toml", "--run", second, "--data", f"npz:{moved}", "--share", 1)
    assert dprandp(*probe, "--eps", 1).code == 0
    before = state_of(tmp_path)
    found = good(dprandp("compare", first, second, "--json"))
    assert [(row["stage"], row["epsilon_total"]) for row in found["runs"]] == [("finetune", 2), ("probe", 1)]
    for row, run in zip(found["runs"], (first, second), strict=True):
        result = json.loads((run / "model/config.json").read_text())["result"]
        assert (row["accuracy"], row["delta"]) == (result["accuracy"], result["delta"])
        assert row["accuracy_interval"] == result["intervals"]["accuracy"]
        assert row["epsilon"] == pytest.approx(result["epsilon"])
    (together,) = found["together"]
    assert max(row["epsilon"] for row in found["runs"]) < together["epsilon"] < 3
    said = dprandp("compare", first, second)
    assert f"warning: {first}, {second} are about the same data: together they have spent ε = 2." in said.out
    listed = dprandp("status", "--runs", tmp_path)
    assert listed.out == said.out
    assert state_of(tmp_path) == before  # nothing was written
    refused(dprandp("status", "--runs", tmp_path, "--check"), 2, "--runs lists runs")
    refused(dprandp("compare", tmp_path / "third"), 3, "there is no run")


@pytest.mark.slow
def test_the_same_files_are_the_same_data_whatever_their_decoding(
    dprandp: Dprandp, run_after: RunAfter, tmp_path: Path
) -> None:
    """In one run they are read as RGB, in another as grey, in a third a single file is left; the control: none is."""
    make_own_data(tmp_path)
    runs, public = [], run_after("pretrain").rename(tmp_path / "public")
    files = sorted((tmp_path / "scans/train").rglob("*.png"))
    for name, flags in (("rgb", ()), ("grey", ("--colour", "grey")), ("one left", ()), ("other", ())):
        runs.append(Path(shutil.copytree(public, tmp_path / name)))
        for path in {"one left": files[1:], "other": files}.get(name, []):
            with Image.open(path) as image:
                turned = image.transpose(Image.Transpose.ROTATE_90)
            turned.save(path)
        probe = ("probe", "--config", "small.toml", "--run", runs[-1], "--data", f"folder:{tmp_path}/scans", *flags)
        assert dprandp(*probe, "--eps", 1, "--share", 1).code == 0
    (together,) = good(dprandp("compare", *runs, "--json"))["together"]
    assert together["runs"] == list(map(str, runs[:3]))
    assert together["epsilon"] > 1.3


def test_tables_are_written_where_asked_for(dprandp: Dprandp, run_after: RunAfter, tmp_path: Path) -> None:
    run = run_after("probe")
    table, tex, page = (tmp_path / f"table.{end}" for end in ("csv", "tex", "html"))
    compare = ("compare", run, "--csv", table, "--latex", tex, "--html", page)
    assert dprandp(*compare).code == 0
    (row,) = csv.DictReader(table.open(encoding="utf-8"))
    assert (row["stage"], row["together_epsilon"]) == ("probe", "")
    assert float(row["accuracy_low"]) < float(row["accuracy"]) < float(row["accuracy_high"])
    assert tex.read_text(encoding="utf-8").startswith("\\begin{tabular}")
    assert "<h1>Runs side by side</h1>" in page.read_text(encoding="utf-8")
    refused(dprandp(*compare), 2, "table.csv exists", "--overwrite")
    assert dprandp(*compare, "--overwrite").code == 0
