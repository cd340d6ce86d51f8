"""Arguments that make no sense: refused in words, before anything is written or spent."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from cli_process import Dprandp, refused, state_of

PROBE = ("probe", "--config", "small.toml", "--data", "npz:tiny.npz")


RunAfter = Callable[[str], Path]


# (flags, what the message has to say): before the first look at the data
BAD_PROBE = [
    (["--eps", "0"], "epsilon = 0.0", "--eps inf for a model without privacy"),
    (["--eps", "-1"], "epsilon = -1.0", "a number above 0"),
    (["--eps", "nan"], "epsilon = nan", "a number above 0"),
    (["--eps", "much"], "Invalid value for '--eps'"),
    (["--delta", "0"], "delta = 0.0", "such as 1e-5"),
    (["--delta", "nan"], "delta = nan", "such as 1e-5"),
    (["--delta", "2"], "delta = 2.0", "such as 1e-5"),
    (["--delta", "0.00834"], "delta is 0.00834", "1/120 = 0.00833", "for instance 1e-05"),
    (["--share", "0"], "share = 0.0 lies outside (0, 1]", "such as 0.3"),
    (["--share", "1.5"], "share = 1.5 lies outside (0, 1]", "such as 0.3"),
    (["--share", "nan"], "share = nan lies outside (0, 1]", "such as 0.3"),
    (["--clip", "0"], "clip_norm = 0.0"),
    (["--clip", "-1"], "clip_norm = -1.0"),
    (["--clip", "nan"], "clip_norm = nan"),
    (["--lr", "inf"], "lr = inf"),
    (["--steps", "0"], "steps = 0"),
    (["--steps", "1.5"], "Invalid value for '--steps'"),
    (["--views", "0"], "views = 0"),
    (["--batch-size", "0"], "batch_size = 0"),
    (["--classes", "0"], "classes = 0 lies outside [2"),
    (["--classes", "1"], "classes = 1 lies outside [2"),
    (["--seed", "-1"], "seed = -1"),
    (["--seed", str(10**30)], "seed has more than 64 bits", "at most 9223372036854775807"),
    (["--insecure-seed", "-1"], "--insecure-seed -1"),
    (["--size", "huge"], "unknown size 'huge'", "tiny, small, paper"),
    (["--data", "cifar1"], "there is no data set 'cifar1'", "did you mean 'cifar10'"),
    (["--data", "npz:"], "npz: names no path", "npz:PATH"),
    (["--data", "chestmnist"], "chestmnist"),
    (["--device", "tpu"], "--device 'tpu' is unknown", "auto, cpu, cuda"),
    (["--device", "cuda:99"], "--device cuda:99", "--device cpu"),
    (["--epss", "1"], "No such option: --epss", "--eps"),
]


@pytest.mark.parametrize("case", BAD_PROBE, ids=lambda case: " ".join(case[0])[:30])
def test_probe_refuses(dprandp: Dprandp, run_after: RunAfter, case: tuple) -> None:
    flags, *fragments = case
    run = run_after("pretrain")
    before = state_of(run)
    refused(dprandp(*PROBE, "--run", run, *flags), 2, *fragments)
    assert state_of(run) == before


# Known only once N is.
BAD_FOR_THE_DATA = [
    (["--clip", "1e9"], "1000000000.0", "1e8"),
    (["--batch-size", "121"], "--batch-size 121 exceeds the 120 training examples", "at most 120"),
    (["--resume", "--overwrite"], "--resume and --overwrite exclude each other", "give one of them"),
]


@pytest.mark.parametrize("case", BAD_FOR_THE_DATA, ids=lambda case: " ".join(case[0]))
def test_refused_probe_opens_no_ledger(dprandp: Dprandp, run_after: RunAfter, case: tuple) -> None:
    """A ledger fixes N for the whole run: a command that was refused must not leave one behind."""
    flags, *fragments = case
    run = run_after("pretrain")
    before = state_of(run)
    refused(dprandp(*PROBE, "--run", run, *flags), 2, *fragments)
    assert state_of(run) == before


BAD_FINETUNE = [
    (["--microbatch", "0"], 2, "--microbatch '0'", "give auto, or 1, 2"),
    (["--microbatch", "-1"], 2, "--microbatch '-1'", "give auto, or 1, 2"),
    (["--microbatch", "²"], 2, "--microbatch '²'", "give auto, or 1, 2"),
    (["--from", "scrach"], 2, "'scrach' is unknown", "did you mean 'scratch'?"),
    (["--from", "scratch", "--arch", "patchnet"], 2, "cannot train 'patchnet'", "wrn-16-4"),
    (["--freeze", "gradient", "--keep", "0.1"], 2, "further release about the data", "--freeze random"),
    (["--freeze", "random"], 2, "need --keep", "--keep 0.1"),
    (["--select", "random", "--keep", "0.1", "--prune", "zero"], 2, "--prune needs --freeze"),
    (["--freeze", "magnitude", "--keep", "1.5"], 2, "--keep 1.5 lies outside (0, 1)"),
    (["--freeze", "random", "--keep", "0.1", "--scope", "blck"], 2, "'blck' is unknown", "block"),
    (["--select", "random", "--keep", "0.1", "--every", "0"], 2, "--every 0"),
    (["--clipping", "automatc"], 2, "'automatc' is unknown", "did you mean 'automatic'?"),
    (["--eps", "3"], 5, "fixed at ε = 2", "ε = 3", "leave --eps and --delta out", "new --run"),
    (["--delta", "1e-6"], 5, "δ = 1e-05", "δ = 1e-06", "new --run"),
    (["--data", "digits"], 2, "this run is about npz:tiny.npz", "not digits", "another --run"),
]


@pytest.mark.parametrize("case", BAD_FINETUNE, ids=lambda case: " ".join(case[0])[:30])
def test_finetune_refuses(dprandp: Dprandp, run_after: RunAfter, case: tuple) -> None:
    flags, code, *fragments = case
    run = run_after("probe")
    before = state_of(run)
    refused(dprandp("finetune", "--config", "small.toml", "--run", run, *flags), code, *fragments)
    assert state_of(run) == before


BAD_PUBLIC = [
    (["generate", "--process", "dead-leafs"], "'dead-leafs'", "did you mean 'dead-leaves'"),
    (["generate", "--process", "zzz"], "'zzz'", "known: stylegan-oriented, stylegan-random"),
    (["generate", "--count", "0"], "count = 0"),
    (["generate", "--count", "-3"], "count = -3"),
    (["generate", "--count", "many"], "Invalid value for '--count'"),
    (["generate", "--resolution", "33"], "resolution = 33", "64"),
    (["generate", "--workers", "0"], "--workers 0", "1 or more"),
    (["generate", "--seed", str(2**70)], "seed has more than 64 bits"),
    (["pretrain", "--arch", "resnet"], "unknown architecture 'resnet'", "wrn-16-4"),
    (["pretrain", "--arch", "wrn-15-3"], "depth 15", "16"),
    (["pretrain", "--arch", "wrn-a-b"], "'wrn-a-b'", "wrn-16-4"),
    (["pretrain", "--layers", "3"], "layers = 3 lies outside [1, 3)"),
    (["pretrain", "--colour", "blue"], "'blue'", "rgb"),
    (["pretrain", "--lr", "nan"], "lr = nan"),
    (["pretrain", "--steps", "0"], "steps = 0"),
    (["prob", "--eps", "1"], "No such command 'prob'", "Did you mean 'probe'"),
]


@pytest.mark.parametrize("case", BAD_PUBLIC, ids=lambda case: " ".join(case[0])[:30])
def test_public_stages_refuse(dprandp: Dprandp, run_after: RunAfter, tmp_path: Path, case: tuple) -> None:
    arguments, *fragments = case
    run = run_after("generate") if arguments[0] == "pretrain" else tmp_path / "new"
    before = state_of(run)
    refused(dprandp(*arguments, "--config", "small.toml", "--run", run), 2, *fragments)
    assert state_of(run) == before


BAD_TOML = [
    ("[probe\nsteps = 1", 3, "is not valid TOML", "line 1"),
    ("[probe]\nstpes = 3", 2, "[probe] has no setting 'stpes'", "did you mean 'steps'"),
    ("[probes]\nsteps = 3", 2, "[probes]", "did you mean 'probe'?"),
    ("probe = 3", 2, "probe is not a table", "[probe]"),
    ("[probe]\nsteps = 'five'", 2, "steps = 'five' is not of type int"),
    ("[probe]\nsteps = 2.5", 2, "steps = 2.5 is not of type int"),
    ("[probe]\nsteps = true", 2, "steps = True is not of type int"),
    ("[probe]\nmirror = 1", 2, "mirror = 1 is not of type bool"),
    ("[probe]\ndata = ['digits']", 2, "data = ['digits'] is not of type str"),
    ("[probe]\nepsilon = -2", 2, "epsilon = -2"),
    ("[probe]\nlr = nan", 2, "lr = nan"),
    (f"[probe]\nlr = 1{'0' * 400}", 2, "lr has more than 64 bits"),
    (f"[probe]\nsteps = 1{'0' * 400}", 2, "steps has more than 64 bits"),
    ("[probe]\nreleased = 'best'", 2, "released = 'best' is unknown", "last"),
]


@pytest.mark.parametrize("case", BAD_TOML, ids=lambda case: case[0][:30].replace("\n", " "))
def test_config_file_refused(dprandp: Dprandp, run_after: RunAfter, tmp_path: Path, case: tuple) -> None:
    text, code, *fragments = case
    (tmp_path / "bad.toml").write_text(text)
    run = run_after("pretrain")
    before = state_of(run)
    refused(dprandp("probe", "--run", run, "--config", tmp_path / "bad.toml"), code, *fragments)
    assert state_of(run) == before


def test_config_file_missing_or_no_text(dprandp: Dprandp, run_after: RunAfter, tmp_path: Path) -> None:
    run = run_after("pretrain")
    refused(dprandp("probe", "--run", run, "--config", "none.toml"), 3, "none.toml", "No such file", "check the path")
    refused(dprandp("probe", "--run", run, "--config", tmp_path), 3, "directory", "check the path")
    (tmp_path / "latin.toml").write_bytes(b"[probe]\ndata = '\xe9'")
    refused(dprandp("probe", "--run", run, "--config", tmp_path / "latin.toml"), 3, "not valid TOML")


def test_stage_without_its_predecessor(dprandp: Dprandp, run_after: RunAfter, tmp_path: Path) -> None:
    run = tmp_path / "new"
    refused(dprandp("pretrain", "--run", run), 3, "there is no run at", f"dprandp generate --run {run}")
    assert not run.exists()
    run.mkdir()
    refused(dprandp("pretrain", "--run", run), 3, "needs stage 'generate'", f"run: dprandp generate --run {run}")
    run = run_after("generate")
    refused(dprandp("probe", "--run", run), 3, "needs stage 'pretrain'", f"run: dprandp pretrain --run {run}")
    run = run_after("pretrain")
    refused(dprandp("finetune", "--run", run), 3, "needs stage 'probe'", f"run: dprandp probe --run {run}")
    assert not (run / "4-finetune").exists()


# what is finished, and then asked for with another setting
OTHER = [
    ("generate", ["--count", "130"], "count was 120, is now 130"),
    ("generate", ["--process", "stylegan-oriented"], 'process was "dead-leaves", is now "stylegan-oriented"'),
    ("generate", ["--seed", "1", "--count", "7"], "count was 120, is now 7; seed was 0, is now 1"),
    ("pretrain", ["--arch", "wrn-10-1"], 'arch was "patchnet", is now "wrn-10-1"'),
    ("probe", ["--steps", "6", "--data", "npz:tiny.npz"], "steps was 5, is now 6"),
    ("probe", ["--share", "0.5"], "share was unset, is now 0.5"),
    ("finetune", ["--lr", "2"], "lr was unset, is now 2.0"),
    ("finetune", ["--views", "2"], "views was 1, is now 2"),
]


@pytest.mark.parametrize("case", OTHER, ids=lambda case: " ".join((case[0], *case[1])))
def test_another_configuration(dprandp: Dprandp, run_after: RunAfter, case: tuple) -> None:
    stage, flags, *fragments = case
    run = run_after("finetune")
    before = state_of(run)
    done = dprandp(stage, "--config", "small.toml", "--run", run, *flags)
    refused(done, 2, *fragments, "--resume to continue with the recorded settings", "--overwrite to restart")
    assert state_of(run) == before


def test_config_file_is_not_overruled_by_the_run(
    dprandp: Dprandp, run_after: RunAfter, folder: Path, tmp_path: Path
) -> None:
    """A file that asks for another budget or architecture than the run's is refused, not passed over in silence."""
    run = run_after("finetune")
    settings = (folder / "small.toml").read_text()
    settings = settings.replace("[probe]", "[probe]\nepsilon = 3")
    (tmp_path / "other.toml").write_text(settings.replace("[pretrain]", "[pretrain]\narch = 'wrn-10-1'"))
    refused(dprandp("probe", "--config", tmp_path / "other.toml", "--run", run), 5, "fixed at ε = 2", "ε = 3")
    refused(dprandp("pretrain", "--config", tmp_path / "other.toml", "--run", run), 2, 'is now "wrn-10-1"')


def test_resume_keeps_the_recorded_settings(dprandp: Dprandp, run_after: RunAfter) -> None:
    done = dprandp("probe", "--run", run_after("finetune"), "--resume", "--json")
    assert (done.code, done.json["steps"]) == (0, 5)


BAD_ACCOUNT = [
    ([], "exactly one of --eps and --noise-multiplier"),
    (["--eps", "1", "--noise-multiplier", "1"], "exactly one of --eps and --noise-multiplier"),
    (["--eps", "0"], "0.0", "above 0"),
    (["--eps", "nan"], "nan", "above 0"),
    (["--eps", "1", "--delta", "2"], "2.0", "between 0 and 1"),
    (["--eps", "1", "--delta", "0"], "0.0", "between 0 and 1"),
    (["--eps", "1", "--sample-rate", "1.5"], "1.5", "at most 1"),
    (["--eps", "1", "--sample-rate", "nan"], "nan", "at most 1"),
    (["--eps", "1", "--steps", "0"], "steps", "at least one"),
    (["--noise-multiplier", "-1"], "-1.0", "at least 1e-100"),
    (["--noise-multiplier", "inf"], "inf", "finite"),
    (["--noise-multiplier", "1", "--steps", "-2"], "-2", "from 0 to 2^53"),
    (["--eps", "1", "--adjacency", "swap"], "adjacency is 'swap'", "zero-out, add-remove or replace-one"),
]


@pytest.mark.parametrize("case", BAD_ACCOUNT, ids=lambda case: " ".join(case[0]))
def test_account_refuses(dprandp: Dprandp, case: tuple) -> None:
    flags, *fragments = case
    refused(dprandp("account", *flags), 2, *fragments)


@pytest.mark.parametrize("command", ["status", "report"])
def test_no_run_to_look_at(dprandp: Dprandp, folder: Path, tmp_path: Path, command: str) -> None:
    refused(dprandp(command, "--run", tmp_path / "no"), 3, "there is no run at", "dprandp generate --run")
    assert not (tmp_path / "no").exists()
    refused(dprandp(command, "--run", folder / "tiny.npz"), 3, "is a file, not a run directory", "--run")
    (tmp_path / "holiday.jpg").touch()
    refused(dprandp(command, "--run", tmp_path), 2, "not a run directory", "'holiday.jpg'", "--run")
    assert [path.name for path in tmp_path.iterdir()] == ["holiday.jpg"]


def test_report_before_the_first_stage(dprandp: Dprandp, tmp_path: Path) -> None:
    refused(dprandp("report", "--run", tmp_path), 3, "dprandp generate")
    assert not (tmp_path / "report.html").exists()
