"""Arguments that make no sense: refused in words, before anything is written or spent."""

from __future__ import annotations

from pathlib import Path

import pytest
from cli_process import Dprandp, RunAfter, refused, state_of

# (stage, flags, exit code, what the message has to say). The ranges of settings are tried in tests/config.
REFUSED = [
    ("probe", ["--eps", "0"], 2, "epsilon = 0.0", "--eps inf for a model without privacy"),
    ("probe", ["--eps", "nan"], 2, "epsilon = nan", "a number above 0"),
    ("probe", ["--eps", "much"], 2, "Invalid value for '--eps'"),
    ("probe", ["--delta", "2"], 2, "delta = 2.0", "such as 1e-5"),
    ("probe", ["--share", "1.5"], 2, "share = 1.5 lies outside (0, 1]", "such as 0.3"),
    ("probe", ["--clip", "-1"], 2, "clip_norm = -1.0"),
    ("probe", ["--steps", "1.5"], 2, "Invalid value for '--steps'"),
    ("probe", ["--seed", str(10**30)], 2, "seed has more than 64 bits", "at most 9223372036854775807"),
    ("probe", ["--insecure-seed", "-1"], 2, "--insecure-seed -1"),
    ("probe", ["--size", "huge"], 2, "unknown size 'huge'", "tiny, small, paper"),
    ("probe", ["--data", "cifar1"], 2, "there is no data set 'cifar1'", "did you mean 'cifar10'"),
    ("probe", ["--data", "npz:"], 2, "npz: names no path", "npz:PATH"),
    ("probe", ["--data", "digits", "--classes", "7"], 2, "classes", "digits", "leave"),
    ("probe", ["--device", "tpu"], 2, "--device 'tpu' is unknown", "auto, cpu, cuda"),
    ("probe", ["--device", "cuda:99"], 2, "--device cuda:99", "--device cpu"),
    ("probe", ["--epss", "1"], 2, "No such option: --epss", "--eps"),
    # known only once N is: a ledger fixes N for the whole run, so a command that is refused must not leave one behind
    ("probe", ["--delta", "0.00834"], 2, "delta is 0.00834", "1/120 = 0.00833", "for instance 1e-05"),
    ("probe", ["--clip", "1e9"], 2, "1000000000.0", "1e8"),
    ("probe", ["--batch-size", "121"], 2, "--batch-size 121 exceeds the 120 training examples", "at most 120"),
    ("probe", ["--resume", "--overwrite"], 2, "--resume and --overwrite exclude each other", "give one of them"),
    ("probe", ["--noise", "laplace"], 2, "noise = 'laplace'"),
    ("probe", ["--noise", "discrete", "--eps", "60", "--delta", "1e-9"], 5, "too coarse", "--noise gaussian"),
    ("finetune", ["--microbatch", "0"], 2, "--microbatch '0'", "give auto, or 1, 2"),
    ("finetune", ["--microbatch", "²"], 2, "--microbatch '²'", "give auto, or 1, 2"),
    ("finetune", ["--from", "scrach"], 2, "'scrach' is unknown", "did you mean 'scratch'?"),
    ("finetune", ["--from", "scratch", "--arch", "patchnet"], 2, "cannot train 'patchnet'", "wrn-16-4"),
    ("finetune", ["--freeze", "gradient", "--keep", "0.1"], 2, "further release about the data", "--freeze random"),
    ("finetune", ["--eps", "3"], 5, "fixed at ε = 2", "ε = 3", "leave --eps and --delta out", "new --run"),
    ("finetune", ["--delta", "1e-6"], 5, "δ = 1e-05", "δ = 1e-06", "new --run"),
    ("finetune", ["--data", "digits"], 2, "this run is about npz:tiny.npz", "not digits", "another --run"),
    ("generate", ["--process", "dead-leafs"], 2, "'dead-leafs'", "did you mean 'dead-leaves'"),
    ("generate", ["--process", "zzz"], 2, "'zzz'", "known: stylegan-oriented, stylegan-random"),
    ("generate", ["--resolution", "33"], 2, "resolution = 33", "64"),
    ("generate", ["--workers", "0"], 2, "--workers 0", "1 or more"),
    ("pretrain", ["--arch", "resnet"], 2, "unknown architecture 'resnet'", "wrn-16-4"),
    ("pretrain", ["--arch", "wrn-15-3"], 2, "depth 15", "16"),
    ("pretrain", ["--arch", "wrn-a-b"], 2, "'wrn-a-b'", "wrn-16-4"),
    ("prob", ["--eps", "1"], 2, "No such command 'prob'", "Did you mean 'probe'"),
]
BEFORE = {"pretrain": "generate", "probe": "pretrain", "finetune": "probe"}


@pytest.mark.parametrize("case", REFUSED, ids=lambda case: " ".join([case[0], *case[1]])[:40])
def test_a_stage_refuses(dprandp: Dprandp, run_after: RunAfter, tmp_path: Path, case: tuple) -> None:
    stage, flags, code, *fragments = case
    run = run_after(BEFORE[stage]) if stage in BEFORE else tmp_path / "new"
    data = ["--data", "npz:tiny.npz"] if stage == "probe" else []
    before = state_of(run)
    refused(dprandp(stage, "--config", "small.toml", "--run", run, *data, *flags), code, *fragments)
    assert state_of(run) == before


def test_config_file_refused(dprandp: Dprandp, run_after: RunAfter, tmp_path: Path) -> None:
    """The file's own limits and types are tried in tests/config."""
    run, file = run_after("pretrain"), tmp_path / "bad.toml"
    before = state_of(run)
    for text, code, *fragments in (
        ("[probe\nsteps = 1", 3, "is not valid TOML", "line 1"),
        ("[probe]\nstpes = 3", 2, "[probe] has no setting 'stpes'", "did you mean 'steps'"),
        ("[probe]\nsteps = 'five'", 2, "steps = 'five' is not of type int"),
        (f"[probe]\nlr = 1{'0' * 400}", 2, "lr has more than 64 bits"),
    ):
        file.write_text(text)
        refused(dprandp("probe", "--run", run, "--config", file), code, *fragments)
    refused(dprandp("probe", "--run", run, "--config", "none.toml"), 3, "none.toml", "No such file", "check the path")
    assert state_of(run) == before


def test_stage_without_its_predecessor(dprandp: Dprandp, run_after: RunAfter, tmp_path: Path) -> None:
    run = tmp_path / "new"
    refused(dprandp("pretrain", "--run", run), 3, "there is no run at", f"dprandp generate --run {run}")
    assert not run.exists()
    run.mkdir()
    refused(dprandp("pretrain", "--run", run), 3, "needs stage 'generate'", f"run: dprandp generate --run {run}")
    refused(dprandp("report", "--run", run), 3, "dprandp generate")
    assert not (run / "report.html").exists()
    run = run_after("generate")
    refused(dprandp("probe", "--run", run), 3, "needs stage 'pretrain'", f"run: dprandp pretrain --run {run}")
    run = run_after("pretrain")
    refused(dprandp("finetune", "--run", run), 3, "needs stage 'probe'", f"run: dprandp probe --run {run}")
    assert not (run / "4-finetune").exists()


def test_another_configuration_than_that_of_a_finished_stage(
    dprandp: Dprandp, run_after: RunAfter, folder: Path, tmp_path: Path
) -> None:
    run = run_after("finetune")
    before = state_of(run)
    for stage, flags, fragment in (
        ("generate", ["--seed", "1", "--count", "7"], "count was 120, is now 7; seed was 0, is now 1"),
        ("pretrain", ["--arch", "wrn-10-1"], 'arch was "patchnet", is now "wrn-10-1"'),
        ("probe", ["--share", "0.5"], "share was unset, is now 0.5"),
        ("finetune", ["--views", "2"], "views was 1, is now 2"),
    ):
        done = dprandp(stage, "--config", "small.toml", "--run", run, *flags)
        refused(done, 2, fragment, "--resume to continue with the recorded settings", "--overwrite to restart")
    # neither does a file pass in silence that asks for another budget or architecture
    settings = (folder / "small.toml").read_text().replace("[probe]", "[probe]\nepsilon = 3")
    other = tmp_path / "other.toml"
    other.write_text(settings.replace("[pretrain]", "[pretrain]\narch = 'wrn-10-1'"))
    refused(dprandp("probe", "--config", other, "--run", run), 5, "fixed at ε = 2", "ε = 3")
    refused(dprandp("pretrain", "--config", other, "--run", run), 2, 'is now "wrn-10-1"')
    assert state_of(run) == before
    done = dprandp("probe", "--run", run, "--resume", "--json")
    assert (done.code, done.json["steps"]) == (0, 5)  # as recorded


@pytest.mark.parametrize(
    "case",
    [
        ([], "exactly one of --eps and --noise-multiplier"),
        (["--eps", "1", "--noise-multiplier", "1"], "exactly one of --eps and --noise-multiplier"),
        (["--eps", "nan"], "nan", "above 0"),
        (["--eps", "1", "--delta", "2"], "2.0", "between 0 and 1"),
        (["--eps", "1", "--sample-rate", "nan"], "nan", "at most 1"),
        (["--eps", "1", "--steps", "0"], "steps", "at least one"),
        (["--noise-multiplier", "-1"], "-1.0", "at least 1e-100"),
        (["--eps", "1", "--adjacency", "swap"], "adjacency is 'swap'", "zero-out, add-remove or replace-one"),
        (["--eps", "1", "--group-size", "0"], "size of a group is 0"),
    ],
    ids=lambda case: " ".join(case[0]),
)
def test_account_refuses(dprandp: Dprandp, case: tuple) -> None:
    flags, *fragments = case
    refused(dprandp("account", *flags), 2, *fragments)


def test_no_run_to_look_at(dprandp: Dprandp, folder: Path, tmp_path: Path) -> None:
    for command in ("status", "report"):
        refused(dprandp(command, "--run", tmp_path / "no"), 3, "there is no run at", "dprandp generate --run")
    refused(dprandp("status", "--run", folder / "tiny.npz"), 3, "is a file, not a run directory", "--run")
    (tmp_path / "holiday.jpg").touch()
    refused(dprandp("report", "--run", tmp_path), 2, "not a run directory", "'holiday.jpg'", "--run")
    assert [path.name for path in tmp_path.iterdir()] == ["holiday.jpg"]
