"""``dprandp audit`` in real processes: on a run, on a bare plan, and on a package with a fault in it."""

from __future__ import annotations

import json
import stat
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from cli_process import Done, Dprandp, refused, state_of

RunAfter = Callable[[str], Path]
QUICK = ("--trials", 200, "--canaries", 40)

# Faults in the package itself, as a careless change would make them.
WEAK_NOISE = """
from dprandp.privacy import mechanism
add = mechanism.add_gaussian_noise
mechanism.add_gaussian_noise = lambda sums, std, random: add(sums, std / 10, random)
"""
NO_CLIP = """
from dprandp.dpsgd import clipped_sums
clip = clipped_sums.sum_of_clipped
clipped_sums.sum_of_clipped = lambda gradients, parameters, norm, **how: clip(gradients, parameters, 1e6, **how)
"""
BLIND = """
from dprandp.audit.canaries import Control
from dprandp.audit import games
games.CONTROLS = (Control("no fault at all"),)
"""


READING_FAILS = """
from dprandp import data
read = data.Dataset.train
def train(self):
    if self.spec.name != "audit":
        raise RuntimeError("private data were read")
    return read(self)
data.Dataset.train = train
"""


def audited(dprandp: Dprandp, *arguments: object, **options: object) -> Done:
    """An audit that is to find nothing. It accuses a sound mechanism once in a thousand tests: it has a second try."""
    done = dprandp("audit", *arguments, **options)
    return dprandp("audit", *arguments, **options) if done.code == 1 else done


MECHANISMS = {"probe": ["probe"], "finetune": ["probe", "finetune", "finetune.head"]}


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["probe", "finetune"])
def test_a_finished_run(dprandp: Dprandp, run_after: RunAfter, stage: str) -> None:
    run = run_after(stage)
    before = state_of(run)
    done = audited(dprandp, "--run", run, *QUICK, "--json", "--quiet", before=READING_FAILS)
    assert (done.code, done.err) == (0, "")
    result = done.json
    assert result["outcome"] == "nothing contradicts"
    assert [found["name"] for found in result["mechanisms"]] == MECHANISMS[stage]
    for found in result["mechanisms"]:
        game = found["two_world"]
        assert game["mu_lower"] <= game["mu_claimed"]
        assert game["ratio"] == pytest.approx(game["epsilon_lower"] / found["epsilon_claimed"])
        assert [entry["factor"] for entry in game["power"]] == [1.0, 1.1, 1.2, 1.5, 2.0]
        assert 0 <= found["one_run"]["epsilon_lower"] <= found["epsilon_claimed"] <= 2
        assert len(found["controls"]) == (7 if found["name"] == "finetune" else 6)
        assert all(control["flagged"] and control["by"] for control in found["controls"])
        assert ("finetune" in found["replay"]) == (found["name"] == "finetune")
        assert "private_data" not in found["replay"]
    assert all(entry["passed"] for entry in result["accounts"])
    assert "nothing private was read" in result["data"]
    assert json.loads((run / "audit/audit.json").read_text()) == result
    assert (run / "audit/audit.png").read_bytes().startswith(b"\x89PNG")
    after = state_of(run)
    assert set(after) - set(before) == {"audit/audit.json", "audit/audit.png"}
    assert {name: after[name] for name in before} == before  # nothing was charged, nothing moved into model/
    assert dprandp("report", "--run", run).code == 0
    assert "6 of 6 flagged" in (run / "report.html").read_text()
    # private data are read only where asked, and publish one word
    quick = ("audit", "--run", run, *QUICK, "--no-controls", "--with-data", "--json", "--data-dir", "nowhere")
    assert dprandp(*quick, before=READING_FAILS).code == 1
    done = dprandp(*quick)
    assert done.code == 0, done.err
    words = [found["replay"].get("private_data") for found in done.json["mechanisms"]]
    assert words == ["passed", "passed", None][: len(words)]
    assert "passed or failed alone is published" in done.json["data"]
    raw = json.loads((run / "private/audit.json").read_text())
    assert set(raw) == {"probe", "finetune"} & set(MECHANISMS[stage])
    assert stat.S_IMODE((run / "private").stat().st_mode) == 0o700
    values = {check["value"] for checks in raw.values() for check in checks if "sums" in check["name"]}
    assert values
    assert not any(str(value) in done.out for value in values)


@pytest.mark.parametrize(
    ("stage", "fault"), [("probe", WEAK_NOISE), pytest.param("finetune", NO_CLIP, marks=pytest.mark.slow)]
)
def test_a_fault_in_the_package_ends_with_1(dprandp: Dprandp, run_after: RunAfter, stage: str, fault: str) -> None:
    run = run_after(stage)
    done = dprandp("audit", "--run", run, *QUICK, "--no-controls", before=fault)
    assert done.code == 1
    assert f"contradicts the privacy claim ({stage}: replay" in done.err
    assert "fix: Do not release" in done.err
    assert "contradiction" in done.out
    assert json.loads((run / "audit/audit.json").read_text())["passed"] is False


def test_a_control_that_is_missed_ends_with_1(dprandp: Dprandp) -> None:
    done = dprandp("audit", "--eps", 1, "--steps", 4, *QUICK, before=BLIND)
    assert done.code == 1
    assert "failed to flag a fault that it was shown (plan: no fault at all)" in done.err


@pytest.mark.slow  # of a sampled mechanism; the next one is quick
def test_a_bare_plan(dprandp: Dprandp, folder: Path) -> None:
    before = sorted(path.name for path in folder.iterdir())
    done = audited(dprandp, "--eps", 8, "--steps", 6, "--sample-rate", 0.3, "--examples", 500, *QUICK,
                   "--no-controls")  # fmt: skip
    assert done.code == 0, done.err
    assert "plan claims ε ≤ " in done.out
    assert "no controls run" in done.out
    assert "A clean audit is no proof" in done.out
    assert done.out.count("\n") == 1
    assert sorted(path.name for path in folder.iterdir()) == before


def test_a_plan_with_discrete_noise_and_its_released_heads(dprandp: Dprandp) -> None:
    plan = ("--eps", 8, "--steps", 6, "--examples", 500, "--noise", "discrete", "--no-controls")
    done = audited(dprandp, *plan, *QUICK, "--black-box", "--json")
    assert done.code == 0, done.err
    (found,) = done.json["mechanisms"]
    assert found["plan"]["noise"] == "discrete"
    assert 0 <= found["black_box"]["epsilon_lower"] <= found["epsilon_claimed"]
    assert "trials of 6 steps, about" in done.err


@pytest.mark.slow
def test_a_run_that_protects_units_with_discrete_noise(dprandp: Dprandp, run_after: RunAfter, folder: Path) -> None:
    run, arrays = run_after("pretrain"), dict(np.load(folder / "tiny.npz"))
    arrays["patient_train"] = np.arange(len(arrays["y_train"])) // 3
    np.savez(folder / "patients.npz", **arrays)
    flags = ("--data", "npz:patients.npz", "--unit-column", "patient_train", "--noise", "discrete", "--eps", 2)
    done = dprandp("probe", "--config", "small.toml", "--run", run, *flags)
    assert done.code == 0, done.err
    done = audited(dprandp, "--run", run, *QUICK, "--with-data", "--json", "--no-controls")
    assert done.code == 0, done.err
    assert [found["replay"]["private_data"] for found in done.json["mechanisms"]] == ["passed"]


@pytest.mark.slow  # the audit of a tuning is in tests/audit
def test_a_run_with_private_tuning(dprandp: Dprandp, run_after: RunAfter) -> None:
    run = run_after("pretrain")
    data = ("--run", run, "--config", "small.toml", "--data", "npz:tiny.npz", "--eps", 2)
    for command in (("tune", "--on", "private"), ("probe",)):
        done = dprandp(*command, *data)
        assert done.code == 0, done.err
    done = audited(dprandp, "--run", run, *QUICK, "--json")
    assert done.code == 0, done.err
    tuning, probe = sorted(done.json["mechanisms"], key=lambda found: found["name"] != "tune")
    assert (tuning["name"], probe["name"], tuning["one_run"]) == ("tune", "probe", None)
    assert [control["flagged"] for control in tuning["controls"]] == [True]
    assert set(tuning["two_world"]["one_trial"]) == {"fitted", "held_out"}
    assert all(entry["passed"] for entry in done.json["accounts"])
    assert dprandp("report", "--run", run).code == 0


@pytest.mark.slow
def test_what_cannot_be_audited_is_refused(dprandp: Dprandp, run_after: RunAfter, tmp_path: Path) -> None:
    refused(dprandp("audit", "--run", tmp_path / "no"), 3, "there is no run at")
    refused(dprandp("audit", "--run", run_after("pretrain")), 3, "no finished private stage", "dprandp probe")
    refused(dprandp("audit", "--eps", "inf"), 3, "NOT PRIVATE")
    refused(dprandp("audit", "--steps", 5), 2, "--steps describes a plan")
    refused(dprandp("audit", "--eps", 1, "--run", tmp_path), 2, "a plan without a run")
    refused(dprandp("audit", "--eps", 1, "--trials", 5), 2, "--trials 5 is out of range")
    refused(dprandp("audit", "--eps", 1, "--delta", 0.5), 2, "delta is 0.5")
    run = run_after("pretrain")
    flags = ("--data", "npz:tiny.npz", "--eps", 2, "--insecure-seed", 3)
    assert dprandp("probe", "--config", "small.toml", "--run", run, *flags).code == 0
    refused(dprandp("audit", "--run", run), 3, "NOT PRIVATE", "without --insecure-seed")
