"""Promise 16 in real processes (gloo): several ranks equal one; whatever dies, the others end, and the run goes on."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import textwrap
import time
from pathlib import Path

import pytest
from cli_process import Done, Dprandp, refused
from rank_jobs import ranks_of, start_ranks, torchrun
from safetensors.torch import load_file
from tiny_run import ledger_of, plans_of
from victims import KILLED, Work

from dprandp.runs import faults, parallel

SEEDED = ["--insecure-seed", 1, "--json"]
AT_STEP_2 = """
import os, signal, time
from dprandp.dpsgd import clipped_sums
honest = clipped_sums.ClippedSums.of
def broken(sums, parameters, step, batch, *more):
    if step == 2:
        {}
    return honest(sums, parameters, step, batch, *more)
clipped_sums.ClippedSums.of = broken
"""
DIE, HANG, STOP = (AT_STEP_2.format(what) for what in (
    "os.kill(os.getpid(), 9)", "time.sleep(1000)", "os.kill(os.getpid(), signal.SIGSTOP)",
))  # fmt: skip
HANG_WITH_THE_NOISE = """
import time
from dprandp.privacy import mechanism
honest = mechanism.PrivateStep.release
mechanism.PrivateStep.release = lambda step, sums: (time.sleep(1000 * (step.number == 2)), honest(step, sums))[1]
"""
SOON = {parallel.TIMEOUT_VARIABLE: "6"}


@pytest.fixture
def probed(work: Work, tmp_path: Path) -> Path:
    """A run after its probe."""
    return Path(shutil.copytree(work.runs["finetune"], tmp_path / "probed"))


def finetune(work: Work, run: Path, *flags: object) -> list[object]:
    return ["finetune", "--run", run, "--config", "poisson.toml", "--data", work.data, *flags]


def apart(left: Path, right: Path) -> float:
    a, b = (load_file(run / "model/model.safetensors") for run in (left, right))
    assert a.keys() == b.keys()
    difference = math.sqrt(sum(float((a[name] - b[name]).square().sum()) for name in a))
    return difference / math.sqrt(sum(float(value.square().sum()) for value in b.values()))


def result_of(jobs: list[Done]) -> dict:
    """All ended well, and rank 0 alone said something."""
    assert [done.code for done in jobs] == [0] * len(jobs), [done.err for done in jobs]
    for follower in jobs[1:]:
        assert (follower.out, follower.err) == ("", "")
    return jobs[0].json


def silent(jobs: list[Done], code: int) -> None:
    """The followers ended with the same exit code, and without a word."""
    for follower in jobs:
        assert (follower.code, follower.out, follower.err) == (code, "", "")


@pytest.mark.slow
@pytest.mark.parametrize(("size", "batch"), [(3, 24), (2, 24), (3, 2)])
def test_16_a_fine_tune_on_several_ranks_equals_one(
    dprandp: Dprandp, work: Work, probed: Path, tmp_path: Path, size: int, batch: int
) -> None:
    """With an expected batch of 2, three ranks have empty shares in most steps. And the same data may have moved."""
    together = Path(shutil.copytree(probed, tmp_path / "together"))
    flags = [*SEEDED, "--batch-size", batch]
    one = dprandp(*finetune(work, probed, *flags))
    assert one.code == 0, one.err
    moved = shutil.copy(work.data.removeprefix("npz:"), tmp_path / "moved.npz")
    many = result_of(ranks_of(dprandp, size, *finetune(work, together, *flags, "--data", f"npz:{moved}")))
    for key in ("epsilon", "steps", "charged_steps", "lost_steps", "accuracy"):
        assert many[key] == one.json[key], key
    assert apart(together, probed) < 1e-5
    charges = [[(c.stage, c.attempt, c.steps, c.noise_multiplier) for c in ledger_of(run).charges]
               for run in (probed, together)]  # fmt: skip
    assert charges[0] == charges[1]
    files = [{str(path.relative_to(run)) for path in run.rglob("*")} for run in (probed, together)]
    assert files[0] | {".shared"} == files[1]


def assert_goes_on(dprandp: Dprandp, work: Work, run: Path, size: int, lost: int) -> None:
    charged = ledger_of(run).charged_steps("finetune", 1)
    assert charged == 3  # the step that was under way is charged
    if size == 1:
        done = dprandp(*finetune(work, run, "--json"))
        assert done.code == 0, done.err
        result = done.json
    else:
        result = result_of(ranks_of(dprandp, size, *finetune(work, run, "--json")))
    assert ledger_of(run).charged_steps("finetune", 1) == plans_of(run)["finetune"]["plan"]["steps"] == 4
    assert result["lost_steps"] == lost
    assert result["epsilon"] <= result["epsilon_total"]


@pytest.mark.slow
@pytest.mark.parametrize("again", [3, 1])
def test_16_a_rank_that_dies_ends_the_job_and_any_number_goes_on(
    dprandp: Dprandp, work: Work, probed: Path, again: int
) -> None:
    jobs = ranks_of(dprandp, 3, *finetune(work, probed), before={2: DIE})
    assert jobs[2].code == KILLED
    refused(jobs[0], 6, "rank 0 of 3 lost another", "run the same command again")
    assert jobs[1].code == 6
    assert (probed / "4-finetune/LATEST").read_text() == "step-000002\n"  # the updates before it were saved
    assert_goes_on(dprandp, work, probed, again, lost=1)


@pytest.mark.parametrize(
    ("rank", "how", "size"),
    [(1, HANG, 2), (2, HANG, 3), (1, STOP, 2), (0, HANG, 2), (0, HANG_WITH_THE_NOISE, 2), (0, STOP, 3)],
)
@pytest.mark.slow
def test_16_a_rank_that_hangs_ends_the_job_in_time(
    dprandp: Dprandp, work: Work, probed: Path, rank: int, how: str, size: int
) -> None:
    jobs = start_ranks(dprandp, size, *finetune(work, probed), before={rank: how}, **SOON)
    log = probed / "4-finetune/metrics.jsonl"
    jobs[0].wait_until(lambda: log.exists() and len(log.read_text().splitlines()) == 2)
    started, hanging = time.monotonic(), jobs.pop(rank)
    for job in jobs:
        refused(job.end(), 6, f"of {size} lost another, which ended or was silent for 6 seconds", "run the same")
    assert time.monotonic() - started < 20
    hanging.signal(signal.SIGKILL)
    assert hanging.end().code == KILLED
    assert_goes_on(dprandp, work, probed, size, lost=1)


@pytest.mark.slow
def test_16_a_stopped_rank_0_is_noticed_while_it_works_alone(dprandp: Dprandp, work: Work, tmp_path: Path) -> None:
    """And one that only takes longer than the others would wait is not taken for lost."""
    run = Path(shutil.copytree(work.runs["probe"], tmp_path / "run"))
    slow = "import os, time\nfrom dprandp import probe\nhonest = probe.fit_head\n"
    slow += "probe.fit_head = lambda *given: (time.sleep(12), honest(*given))[1]"
    probe = ["probe", "--run", run, "--config", "poisson.toml", "--data", work.data, "--json"]
    result_of(ranks_of(dprandp, 2, *probe, before={0: slow}, **SOON))
    stopped = slow.replace("time.sleep(12)", "os.kill(os.getpid(), 19)")
    jobs = start_ranks(dprandp, 2, *probe, "--overwrite", "--share", 0.5, before={0: stopped}, **SOON)
    refused(jobs[1].end(), 6, "rank 1 of 2 lost another")
    jobs[0].signal(signal.SIGKILL)
    jobs[0].end()


def test_16_ranks_with_other_data_end_before_any_step(dprandp: Dprandp, work: Work, probed: Path) -> None:
    other = """
from dprandp.dpsgd import stage
stage.training_data.fingerprint_of = lambda dataset: "ab" * 32
"""
    jobs = ranks_of(dprandp, 2, *finetune(work, probed), before={1: other})
    refused(jobs[0], 3, "the 2 processes do not have the same training data", "give every process the same files")
    silent(jobs[1:], 3)
    assert ledger_of(probed).charged_steps("finetune", 1) == 0


@pytest.mark.slow
def test_16_a_killed_leader_ends_the_job_and_other_ranks_go_on(dprandp: Dprandp, work: Work, probed: Path) -> None:
    jobs = ranks_of(dprandp, 2, *finetune(work, probed), **{faults.VARIABLE: "update-applied:3"})
    assert jobs[0].code == KILLED
    refused(jobs[1], 6, "rank 1 of 2 lost another")
    assert_goes_on(dprandp, work, probed, 3, lost=1)


def test_16_an_error_of_rank_0_is_said_once(dprandp: Dprandp, work: Work, probed: Path) -> None:
    jobs = ranks_of(dprandp, 2, *finetune(work, probed, "--eps", 2))
    refused(jobs[0], 5, "budget was fixed")
    silent(jobs[1:], 5)


def test_16_an_error_of_another_rank_is_said_once_by_rank_0(dprandp: Dprandp, work: Work, probed: Path) -> None:
    broken = "from dprandp.dpsgd import clipped_sums; clipped_sums.private_views = lambda *a, **k: {}['pixel 77']"
    jobs = ranks_of(dprandp, 2, *finetune(work, probed), before={1: broken})
    refused(jobs[0], 1, "rank 1 of 2", "KeyError in", "--debug")
    assert "77" not in jobs[0].err
    silent(jobs[1:], 1)
    assert ledger_of(probed).charged_steps("finetune", 1) == 1


@pytest.mark.slow
def test_16_noise_on_a_rank_is_refused_before_it_is_released(dprandp: Dprandp, work: Work, probed: Path) -> None:
    """The positive control: a mechanism that adds noise on every rank; the rank itself does not add its share."""
    noisy = """
import torch
from dprandp.dpsgd import clipped_sums
honest = clipped_sums.sum_of_clipped
clipped_sums.sum_of_clipped = lambda gradients, parameters, norm, **how: {
    name: value + norm * torch.randn(value.shape)
    for name, value in honest(gradients, parameters, norm, **how).items()
}
"""
    jobs = ranks_of(dprandp, 2, *finetune(work, probed), before={1: noisy})
    assert [done.code for done in jobs] == [1, 1]
    assert "rank 1 of 2: this is a bug in dprandp: RuntimeError in clipped_sums.py" in jobs[0].err
    assert not (probed / "4-finetune/LATEST").exists()


@pytest.mark.slow
@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_16_a_signal_to_all_saves_and_ends(
    dprandp: Dprandp, work: Work, probed: Path, signum: signal.Signals
) -> None:
    slow = "from dprandp.privacy import mechanism\nimport time\nhonest = mechanism.PrivateStep.release\n"
    slow += "mechanism.PrivateStep.release = lambda step, sums: (time.sleep(.5), honest(step, sums))[1]"
    jobs = start_ranks(dprandp, 2, *finetune(work, probed), before={0: slow})
    log = probed / "4-finetune/metrics.jsonl"
    jobs[0].wait_until(lambda: log.exists() and log.read_text() != "")
    for job in reversed(jobs):
        os.kill(job.pid, signum)
    ended = [job.end() for job in jobs]
    assert ended[0].code == 128 + signum, ended[0].err
    assert ended[0].err.count("the state was saved") == 1
    silent(ended[1:], 128 + signum)
    assert (probed / "4-finetune/LATEST").exists()


ALONE = ("tune", "audit", "predict", "export", "account", "status", "datasets")


@pytest.mark.parametrize("command", ["report", *(pytest.param(name, marks=pytest.mark.slow) for name in ALONE)])
def test_16_what_one_process_does_is_refused(dprandp: Dprandp, command: str) -> None:
    jobs = ranks_of(dprandp, 2, command)
    refused(jobs[0], 2, f"`dprandp {command}` runs in one process, not in 2", "without torchrun")
    silent(jobs[1:], 2)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("flags", "message"),
    [(["--workers", 3], "does not go with several processes"), (["--device", "cuda:0"], "names one device"),
     (["--nonsense"], "No such option")],
)  # fmt: skip
def test_16_flags_that_contradict_several_ranks(
    dprandp: Dprandp, work: Work, tmp_path: Path, flags: list, message: str
) -> None:
    jobs = ranks_of(dprandp, 2, "run", "--run", tmp_path / "run", "--data", work.data, "--eps", 2, *flags)
    refused(jobs[0], 2, message)
    silent(jobs[1:], 2)


@pytest.mark.slow
def test_16_a_process_that_is_alone_in_a_job_says_so(dprandp: Dprandp, work: Work) -> None:
    done = dprandp("generate", RANK="0", WORLD_SIZE="2")  # no address to meet at
    refused(done, 2, "not as torchrun sets them", "torchrun --nproc-per-node")


# ------------------------------------------------------------------------------------------------------------- torchrun

RUN = """
[generate]
process = "dead-leaves"
count = 60
resolution = 32
[pretrain]
arch = "wrn-10-1"
precision = "float32"
steps = 2
batch_size = 8
projection_hidden = 32
projection_dim = 16
lr = 0.001
[probe]
precision = "float32"
steps = 4
dims = 32
statistics_images = 25
statistics_views = 2
[finetune]
steps = 2
refit_steps = 4
batch_size = 12
"""


@pytest.mark.slow
def test_16_torchrun_of_a_whole_run_equals_one_process(dprandp: Dprandp, tmp_path: Path) -> None:
    (tmp_path / "run.toml").write_text(RUN)
    arguments = ["run", "--config", "run.toml", "--data", "digits", "--eps", 4, "--insecure-seed", 1, "--json"]
    one = dprandp(*arguments, "--run", "one", folder=tmp_path)
    assert one.code == 0, one.err
    for size in (2, 3):
        done = torchrun(tmp_path, size, *arguments, "--run", f"of-{size}")
        assert done.code == 0, done.err
        assert json.loads(done.out)["epsilon"] == one.json["epsilon"]
        assert done.err.count("probe steps 4/4") == 1  # rank 0 alone reports
        run = tmp_path / f"of-{size}"
        manifests = [folder / "1-generate/manifest.json" for folder in (run, tmp_path / "one")]
        assert manifests[0].read_bytes() == manifests[1].read_bytes()
        assert apart(run, tmp_path / "one") < 1e-3
        assert len(ledger_of(run).charges) == len(ledger_of(tmp_path / "one").charges)


@pytest.mark.slow
def test_16_torchrun_starts_a_job_again_whose_rank_died(work: Work, probed: Path, tmp_path: Path) -> None:
    """Elastic: with --max-restarts the job meets again and goes on from ledger and checkpoint."""
    (tmp_path / "sitecustomize.py").write_text(
        "import os\n"
        "if os.environ.get('RANK') == '1' and os.environ.get('TORCHELASTIC_RESTART_COUNT') == '0':\n"
        + textwrap.indent(DIE.strip(), "    ")
    )
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    done = torchrun(work.folder, 2, *finetune(work, probed, "--json"), flags=("--max-restarts=1",), PYTHONPATH=path)
    assert done.code == 0, done.err
    assert "rank 0 of 2 lost another" in done.err, done.err
    lost, result = map(json.loads, done.out.splitlines())
    assert lost["error"]["exit_code"] == 6
    assert (result["charged_steps"], result["lost_steps"]) == (4, 1)
