"""sweep: shared public stages, one table, the ε of all private runs together, and a sweep that goes on after a kill."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
from pathlib import Path

import pytest
from cli_process import NO_PIXELS, Done, Dprandp, good, refused

from dprandp.privacy.gaussian_dp import gaussian_dp_epsilon

SWEEP = ("sweep", "--config", "small.toml", "--data", "npz:tiny.npz", "--workers", 1)
PROBES = (*SWEEP, "--eps", 2, "--eps", "inf", "--seeds", 1)


def test_a_plan_says_what_all_private_runs_cost_together_and_writes_nothing(dprandp: Dprandp, tmp_path: Path) -> None:
    """The oracle of probes, which are full batches: squares of μ add up."""
    out = tmp_path / "sweep"
    plan = (*SWEEP, "--eps", 1, "--eps", 2, "--eps", "inf", "--seeds", 2, "--out", out, "--plan")
    made = good(dprandp(*plan, "--json", before=NO_PIXELS))
    assert not out.exists()
    assert [run["action"] for run in made["runs"]] == ["fresh"] * 6
    (together,) = made["together"]
    assert (len(together["runs"]), made["not_private"], made["public"], made["exposed"]) == (4, 2, 2, [])
    alone = {epsilon: mu_of(epsilon) for epsilon in (1, 2)}
    truth = gaussian_dp_epsilon(math.sqrt(2 * (alone[1] ** 2 + alone[2] ** 2)), together["delta"])
    assert together["epsilon"] == pytest.approx(truth, rel=0.02)
    said = dprandp(*plan).out
    assert f"4 private runs on the same data cost together ε = {together['epsilon']:.2f}"[:-1] in said
    assert "2 runs without privacy (ε = ∞) promise nothing" in said


def test_a_plan_counts_every_stage_of_a_run(dprandp: Dprandp, tmp_path: Path) -> None:
    """Probe, fine-tune and refit of two runs: together they cost more than twice the refit alone."""
    sweep = (*SWEEP, "--system", "dp-randp", "--eps", 2, "--seeds", 2, "--out", tmp_path / "out", "--plan", "--json")
    (together,) = good(dprandp(*sweep))["together"]
    assert together["epsilon"] > gaussian_dp_epsilon(math.sqrt(2) * mu_of(2), together["delta"]) - 0.05


def mu_of(epsilon: float) -> float:
    low, high = 0.0, 10.0
    while high - low > 1e-9:
        middle = (low + high) / 2
        low, high = (middle, high) if gaussian_dp_epsilon(middle, 1e-5) < epsilon else (low, middle)
    return low


@pytest.mark.slow
def test_every_system_can_be_planned_at_its_published_size(dprandp: Dprandp, tmp_path: Path) -> None:
    """cifar10 is not there: its declared facts are enough for a plan, and the sweep itself refuses to begin."""
    systems = [part for name in ("dp-randp", "de2022", "pruning", "continual") for part in ("--system", name)]
    paper = ("--eps", 8, "--seeds", 1, "--size", "paper")
    sweep = ("sweep", "--data", "cifar10", "--data-dir", tmp_path, *systems, *paper, "--out", tmp_path / "out")
    made = good(dprandp(*sweep, "--plan", "--json"))
    assert [run["system"] for run in made["runs"]] == ["dp-randp", "de2022", "pruning", "continual"]
    assert all(7 < run["epsilon_after"] <= 8 for run in made["runs"])
    assert made["public"] == 2  # the same for dp-randp and pruning
    assert made["exposed"] == ["cifar10"]  # continual declares a tenth public
    refused(dprandp(*sweep), 3, "cifar10 is not in")
    assert not (tmp_path / "out").exists()


def test_a_sweep_refuses_before_anything_runs(dprandp: Dprandp, tmp_path: Path) -> None:
    out = ("--out", tmp_path / "out")
    refused(dprandp(*SWEEP, "--system", "dprandp", *out), 2, "no system called 'dprandp'", "did you mean 'dp-randp'")
    refused(dprandp(*SWEEP, "--seeds", 0, *out), 2, "--seeds 0")
    done = dprandp("sweep", "--data", "digits", "--system", "probe", "--system", "de2022", "--seeds", 1,
                   "--size", "paper", *out)  # fmt: skip
    refused(done, 2, "digits-de2022-paper-eps1-s0: --batch-size 4096 exceeds the 1440 training examples")
    refused(dprandp(*SWEEP, "--data", f"npz:{tmp_path}/tiny.npz", *out), 2, "two runs of this sweep would be called")
    refused(dprandp(*SWEEP, "--data", f"npz:{tmp_path}/none.npz", *out), 3, "none.npz")
    assert not (tmp_path / "out").exists()


@pytest.fixture(scope="module")
def swept(dprandp: Dprandp, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sweep that was killed in the probe of its first run, and was started again."""
    out = tmp_path_factory.mktemp("swept") / "out"
    killed = dprandp(*PROBES, "--system", "probe", "--system", "dp-randp", "--out", out,
                     DPRANDP_FAULT="update-applied:3")  # fmt: skip
    assert killed.code == -signal.SIGKILL
    assert not (out / "results.jsonl").exists()
    done = dprandp(*PROBES, "--system", "probe", "--system", "dp-randp", "--out", out)
    assert done.code == 0, done.err
    (out / "said.txt").write_text(done.err + done.out)
    return out


@pytest.mark.slow
def test_a_killed_sweep_goes_on_in_the_run_that_it_was_in(swept: Path) -> None:
    runs = sorted(path.parent.name for path in swept.glob("*/run.json"))
    systems = ("dp-randp", "probe")
    assert runs == [f"npz-tiny.npz-{system}-tiny-eps{epsilon}-s0" for system in systems for epsilon in (2, "inf")]
    first = json.loads((swept / "npz-tiny.npz-probe-tiny-eps2-s0/run.json").read_text())["stages"]["probe"]["result"]
    assert (first["attempt"], first["steps"], first["lost_steps"] > 0) == (1, 5, True)
    said = (swept / "said.txt").read_text()
    assert said.count("generate: ") == 0  # the images were made before the kill, for all four runs
    assert "warning: 2 private runs on the same data cost together ε = " in said
    assert "warning: 2 runs without privacy" in said


def test_runs_share_images_extractor_whitener_and_features_as_one_file(swept: Path) -> None:
    (public,) = (swept / "shared").iterdir()
    runs = sorted(path.parent for path in swept.glob("*/run.json"))
    probes = [run for run in runs if "-probe-" in run.name]  # a fine-tune makes features of its own afterwards
    for name in ("1-generate/shard-00000.npy", "2-pretrain/extractor.safetensors", "private/features.npy"):
        sharing = probes if name.startswith("private") else runs
        assert len({os.stat(run / name).st_ino for run in (public, *sharing)}) == 1, name
    assert len({path.name for path in (public / "whitening").iterdir()}) == 1
    assert (public / "private").stat().st_mode & 0o777 == 0o700
    assert not (public / "private/training-data.json").exists()


def test_the_results_have_every_run_and_what_the_private_ones_cost_together(
    dprandp: Dprandp, swept: Path, tmp_path: Path
) -> None:
    *rows, together = map(json.loads, (swept / "results.jsonl").read_text().splitlines())
    assert [(row["system"], row["epsilon_total"]) for row in rows] == [
        ("probe", 2), ("probe", "inf"), ("dp-randp", 2), ("dp-randp", "inf"),
    ]  # fmt: skip
    private = [row["run"] for row in rows if row["private"]]
    assert together["together"]["runs"] == private
    compared = good(dprandp("compare", *private, "--json"))["together"]
    assert compared == [together["together"]]
    said = f"together they have spent ε = {together['together']['epsilon']:.2f}"[:-1]
    assert said in (swept / "said.txt").read_text()
    for row in rows:
        result = json.loads((Path(row["run"]) / "model/config.json").read_text())["result"]
        assert row["accuracy"] == result["accuracy"]
        assert "1 other run" in (text := (Path(row["run"]) / "report.html").read_text()) or "3 other" in text
    alone = shutil.copy(swept / "results.jsonl", tmp_path)  # the table needs no run
    found = good(dprandp("compare", alone, "--json"))
    assert [group["seeds"] for group in found["groups"]] == [1] * 4
    assert found["together"] == [together["together"]]
    refused(dprandp("compare", alone, private[0]), 2, "cannot be compared with each other")
    Path(alone).write_text('{"run": 3}\n')
    refused(dprandp("compare", alone), 4, "line 1", "dprandp sweep")


def test_a_finished_sweep_has_nothing_to_do(dprandp: Dprandp, swept: Path) -> None:
    before = (swept / "results.jsonl").read_bytes()
    made = good(dprandp(*PROBES, "--system", "probe", "--out", swept, "--plan", "--json"))
    assert [run["action"] for run in made["runs"]] == ["skip", "skip"]
    both = good(dprandp(*SWEEP, "--eps", 2, "--seeds", 1, "--system", "probe", "--system", "dp-randp", "--out", swept,
                        "--plan", "--json"))  # fmt: skip
    spent = json.loads((swept / "results.jsonl").read_text().splitlines()[-1])["together"]["epsilon"]
    assert both["together"][0]["epsilon"] == pytest.approx(spent)  # all of it charged, nothing planned any more
    again = dprandp(*PROBES, "--system", "probe", "--system", "dp-randp", "--out", swept, before=NO_PIXELS)
    assert again.code == 0, again.err
    assert (swept / "results.jsonl").read_bytes() == before


def test_a_second_sweep_in_the_same_folder_counts_the_first(dprandp: Dprandp, tmp_path: Path, folder: Path) -> None:
    out = tmp_path / "out"

    def sweep(epsilon: float, *more: object, **options: object) -> Done:
        return dprandp("sweep", "--config", "small.toml", "--data", "npz:tiny.npz", "--eps", epsilon, "--seeds", 1,
                       "--out", out, "--json", *more, **options)  # fmt: skip

    assert good(sweep(2))["together"] == []
    (planned,) = good(sweep(3, "--plan", before=NO_PIXELS))["together"]
    assert len(planned["runs"]) == 2
    killed = sweep(3, DPRANDP_FAULT="update-applied:2")  # its run has no line, and has charged
    assert killed.code == -signal.SIGKILL
    (together,) = good(dprandp("compare", out / "results.jsonl", "--json"))["together"]
    assert together["epsilon"] > 2
    found = good(sweep(3))
    (together,) = found["together"]
    assert together["epsilon"] == pytest.approx(planned["epsilon"])
    assert [row["epsilon_total"] for row in found["runs"]] == [3, 2]
    lines = (out / "results.jsonl").read_text().splitlines()
    assert sum('"system"' in line for line in lines) == 2
    (listed,) = good(dprandp("status", "--runs", out, "--json"))["together"]
    assert listed["epsilon"] == together["epsilon"]
    # what a run that was deleted has released stays released, and another one in its place does not hide it
    (gone,) = (path for path in out.iterdir() if "eps2" in path.name)
    shutil.rmtree(gone)
    assert good(sweep(2))["notes"]
    again = (out / "results.jsonl").read_text().splitlines()
    assert sum('"system"' in line for line in again) == 3
    assert json.dumps(together["epsilon"]) in "".join(again)
    assert good(sweep(2))["notes"]
    assert (out / "results.jsonl").read_text().splitlines() == again
