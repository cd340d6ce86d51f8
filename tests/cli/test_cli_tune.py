"""``dprandp tune`` as a user runs it, and what the probe after it says."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path

import pytest
from cli_process import NO_PIXELS, Dprandp, RunAfter, good, refused, state_of

DATA = ("--data", "npz:tiny.npz", "--eps", 2)


@pytest.mark.slow
def test_tune_then_probe(dprandp: Dprandp, run_after: RunAfter) -> None:
    run = run_after("pretrain")
    tune = ("tune", "--run", run, "--config", "small.toml", "--trials", 3, *DATA)
    done = dprandp(*tune, "--json", before=NO_PIXELS)
    assert done.code == 0, done.err
    assert f"next: dprandp probe --run {run} --config {run / 'tuned.toml'}" in done.err
    record = json.loads((run / "tune.json").read_text())
    assert done.json["chosen"] == record["chosen"]
    assert tomllib.loads((run / "tuned.toml").read_text())["probe"].items() >= record["chosen"].items()
    before = state_of(run)
    again = dprandp(*tune)
    assert again.out.startswith("tune: lr = ")
    assert "nothing charged" in again.out
    refused(dprandp(*tune, "--seed", 5), 2, "was tuned before, on synthetic", "--overwrite")
    assert state_of(run) == before
    probe = ("probe", "--run", run, "--config", run / "tuned.toml", "--json", "--tuned-on", "our <old> scans")
    tuned = good(dprandp(*probe))["tuned"]
    assert (tuned["used"], tuned["on"], tuned["charged_epsilon"]) == (True, "synthetic", 0)
    assert dprandp("report", "--run", run).code == 0
    page = (run / "report.html").read_text()
    assert "3 settings tried under simulated noise, no cost in ε" in page
    assert "tuned on “our &lt;old&gt; scans”" in page


def test_tune_on_private_data_is_charged(dprandp: Dprandp, run_after: RunAfter, tmp_path: Path) -> None:
    run = run_after("pretrain")
    tune = ("tune", "--run", run, "--config", "small.toml", "--trials", 2, "--on", "private", *DATA)
    slowly = "from dprandp.privacy import selection\nimport time\nrun = selection.PrivateSelection.run\n" \
             "selection.PrivateSelection.run = lambda *given: (run(*given), time.sleep(1.1))[0]"  # fmt: skip
    charged = good(dprandp(*tune, "--json", before=slowly))["charged_epsilon"]
    plan = run / "privacy/plan.json"
    for path in (run, *run.glob("*.*"), *(run / "privacy").iterdir()):  # how long the trials took is nobody's business
        assert path.stat().st_mtime <= plan.stat().st_mtime, path
    assert not any("T" in str(value) for line in (run / "privacy/ledger.jsonl").read_text().splitlines()
                   for key, value in json.loads(line).items() if key in ("time", "created"))  # fmt: skip
    assert 0.178 < charged <= 2 * 0.3 * 0.3
    assert dprandp("status", "--run", run, "--json").json["budget"]["spent"] == charged
    dprandp("report", "--run", run)
    assert "No privacy was spent" not in (run / "report.html").read_text()
    assert "tuning or an unfinished stage has spent ε = 0.18" in (run / "report.html").read_text()
    refused(dprandp("probe", "--run", run, "--data", "npz:tiny.npz", "--eps", 3), 5, "fixed at ε = 2")
    planned = good(dprandp("probe", "--run", run, "--plan", "--json", before=NO_PIXELS))
    assert 0.59 < planned["epsilon_after"] <= 0.6  # of the run's budget of 2
    probe = ("probe", "--run", run, "--config", run / "tuned.toml", "--json")
    plan = good(dprandp(*probe, "--plan", before=NO_PIXELS))
    assert charged < good(dprandp(*probe))["epsilon"] == plan["epsilon_after"] <= 0.6
    dprandp("report", "--run", run)
    assert "the best of a random number of private trials (2 expected)" in (run / "report.html").read_text()
    assert "tuned elsewhere" not in (run / "model/MODEL_CARD.md").read_text()
    before = state_of(run)
    refused(dprandp(*tune, "--overwrite", before=NO_PIXELS), 5, "comes first", "tune on synthetic")
    assert state_of(run) == before
    tuned = run.rename(tmp_path / "tuned") / "tuned.toml"
    other = run_after("pretrain")  # whose ε does not count what was spent there
    done = dprandp("probe", "--run", other, "--config", tuned)
    assert done.code == 0, done.err
    card = (other / "model/MODEL_CARD.md").read_text()
    assert "tuned on “its private data, which that run's ε counts, by dprandp tune in another run”" in card


def test_what_tune_refuses(dprandp: Dprandp, run_after: RunAfter, tmp_path: Path) -> None:
    run = run_after("generate")
    refused(dprandp("tune", "--run", run, *DATA), 3, "'tune' needs stage 'pretrain'")
    refused(dprandp("tune", "--run", tmp_path / "none", *DATA), 3, "there is no run")
    run = run_after("pretrain")
    before = state_of(run)
    small = ("tune", "--run", run, "--config", "small.toml", *DATA)
    for flags, code, fragment in (
        (["--on", "npz:tiny.npz"], 2, "holds images of the private data set"),
        (["--on", "fashion-mnits"], 2, "did you mean"),
        (["--trials", 1], 2, "--trials 1 lies outside"),
        (["--spend", 1], 2, "--spend 1.0 lies outside"),
        (["--on", "private", "--eps", "inf"], 2, "finite --eps"),
        (["--on", "private", "--held-out", 0], 2, "--held-out 0.0 lies outside"),
    ):
        refused(dprandp(*small, *flags, before=NO_PIXELS), code, fragment)
    after = {name: content for name, content in state_of(run).items() if not name.startswith("whitening/")}
    assert after == before
