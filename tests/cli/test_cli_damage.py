"""Damaged files, a disk that refuses, a run that is in use: exit 4 or 6, naming the file, and the old state intact."""

from __future__ import annotations

import fcntl
import json
from collections.abc import Callable
from pathlib import Path

import pytest
from cli_process import Dprandp, refused, state_of

RunAfter = Callable[[str], Path]


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-9] ^= 4
    path.write_bytes(content)


def ledger_of(run: Path) -> bytes:
    path = run / "privacy" / "ledger.jsonl"
    return path.read_bytes() if path.exists() else b""


# (finished stage, file, stage that needs it); the data are grey
NEEDED = [
    ("generate", "1-generate/shard-00000.npy", "pretrain"),
    ("generate", "1-generate/manifest.json", "pretrain"),
    ("pretrain", "2-pretrain/grey/extractor.safetensors", "probe"),
    ("pretrain", "1-generate/shard-00001.npy", "probe"),
    pytest.param("probe", "3-probe/head.safetensors", "finetune", marks=pytest.mark.slow),
    ("probe", "3-probe/statistics/whitener.safetensors", "finetune"),
    pytest.param("probe", "2-pretrain/grey/extractor.safetensors", "finetune", marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("after", "file", "stage"), NEEDED)
def test_damaged_input(dprandp: Dprandp, run_after: RunAfter, after: str, file: str, stage: str) -> None:
    run = run_after(after)
    before, whole = ledger_of(run), (run / file).read_bytes()
    data = ["--data", "npz:tiny.npz"] if stage == "probe" else []
    for damage in (truncate, flip_a_bit):
        (run / file).write_bytes(whole)
        damage(run / file)
        done = dprandp(stage, "--config", "small.toml", "--run", run, *data)
        if file.endswith("manifest.json") and damage is flip_a_bit:
            assert done.code == 4, done.err  # a digit of a hash: it is the shard that then does not fit
        else:
            refused(done, 4, Path(file).name)
        assert ledger_of(run).count(b'"charge"') == before.count(b'"charge"')
        assert not (run / "4-finetune" / "model.safetensors").exists()
    states = {row["stage"]: row["state"] for row in dprandp("status", "--run", run, "--json").json["stages"]}
    assert states[stage] != "done"


def test_advice_after_a_damaged_extractor_names_the_stage_that_makes_it(dprandp: Dprandp, run_after: RunAfter) -> None:
    """The message must send to the stage that makes the file, not to the one that reads it."""
    run = run_after("pretrain")
    truncate(run / "2-pretrain" / "grey" / "extractor.safetensors")
    probe = ("probe", "--config", "small.toml", "--run", run, "--data", "npz:tiny.npz")
    refused(dprandp(*probe), 4, "dprandp pretrain --overwrite")
    assert dprandp("pretrain", "--config", "small.toml", "--run", run, "--overwrite").code == 0
    assert dprandp(*probe, "--overwrite").code == 0


def test_missing_files(dprandp: Dprandp, run_after: RunAfter) -> None:
    run = run_after("probe")
    (run / "3-probe" / "head.safetensors").unlink()
    refused(dprandp("finetune", "--run", run), 3, "its file head.safetensors is missing", "--overwrite")
    assert "stale" in dprandp("status", "--run", run).out
    (run / "1-generate" / "manifest.json").unlink()
    refused(dprandp("pretrain", "--config", "small.toml", "--run", run), 3, "manifest.json is missing", "generate")


BROKEN_RECORDS = [
    ("run.json", lambda text: text[:-20], "run.json is corrupt"),
    ("run.json", lambda text: text.replace('"format": 1', '"format": 99'), "format 99"),
    ("privacy/plan.json", lambda text: text[:-20], "plan.json is damaged"),
    ("privacy/plan.json", lambda text: "[]", "plan.json is damaged"),
    ("privacy/plan.json", lambda text: text.replace('"delta"', '"detla"', 1), "plan.json is damaged"),
    ("privacy/ledger.jsonl", lambda text: text.replace('"steps":1', '"steps":0', 1), "Line 2 of the privacy ledger"),
    ("privacy/ledger.jsonl", lambda text: "\n".join(text.split("\n")[1:]), "Line 1 of the privacy ledger"),
    ("privacy/ledger.jsonl", lambda text: "", "Line 1 of the privacy ledger"),
]


@pytest.mark.parametrize("case", BROKEN_RECORDS, ids=lambda case: case[0] + " " + case[2])
def test_broken_record(dprandp: Dprandp, run_after: RunAfter, case: tuple) -> None:
    file, change, fragment = case
    run = run_after("probe")
    text = (run / file).read_text()
    changed = change(text)
    assert changed != text
    (run / file).write_text(changed)
    before = state_of(run)
    for command in (("status",), ("finetune", "--config", "small.toml")):
        refused(dprandp(*command, "--run", run), 4, fragment)
    assert state_of(run) == before


def test_torn_feature_cache_is_made_again(dprandp: Dprandp, run_after: RunAfter) -> None:
    run = run_after("probe")
    truncate(run / "private" / "features.npy")
    done = dprandp("probe", "--config", "small.toml", "--run", run, "--overwrite")
    assert done.code == 0, done.err
    assert "features.npy" in done.err
    assert "private features 120/120" in done.err


# ---------------------------------------------------------------------------------------------------------- the disk


@pytest.mark.parametrize(("after", "stage", "bytes_"), [("", "generate", 99_999), ("pretrain", "probe", 9_000)])
def test_file_size_limit(
    dprandp: Dprandp, run_after: RunAfter, tmp_path: Path, after: str, stage: str, bytes_: int
) -> None:
    """EFBIG half-way through a large file: nothing half-written, nothing charged; without the limit it goes on."""
    run = run_after(after) if after else tmp_path / "new"
    flags = {"generate": ["--workers", 1], "probe": ["--data", "npz:tiny.npz"]}.get(stage, [])
    command = (stage, "--config", "small.toml", "--run", run, *flags)
    refused(dprandp(*command, largest_file=bytes_), 6, "cannot write", "ulimit -f")
    assert not list(run.rglob("*.partial*"))
    assert b'"charge"' not in ledger_of(run)
    done = dprandp(*command)
    assert done.code == 0, done.err


def test_ledger_cannot_grow(dprandp: Dprandp, run_after: RunAfter) -> None:
    """The charge that does not fit is torn, and counted; every update that was made was charged."""
    run = run_after("pretrain")
    probe = ("probe", "--config", "small.toml", "--run", run, "--data", "npz:tiny.npz", "--steps", 200)
    done = dprandp(*probe, "--debug", largest_file=50_000)
    assert done.code == 6, done.err
    assert "ledger" in done.err
    updates = (run / "3-probe" / "metrics.jsonl").read_text().count("\n")
    charged = ledger_of(run).count(b'"kind":"charge"')
    assert 0 < updates <= charged < 200
    done = dprandp(*probe, "--json")
    assert done.code == 0, done.err
    assert "Line" in done.err  # the repair is said aloud
    assert done.json["charged_steps"] == 200
    assert done.json["epsilon"] <= done.json["epsilon_target"]


def test_stdout_is_full(dprandp: Dprandp, run_after: RunAfter) -> None:
    full = "import os; os.dup2(os.open('/dev/full', os.O_WRONLY), 1)"
    refused(dprandp("status", "--run", run_after("probe"), before=full), 6, "cannot write stdout", "disk is full")


def test_folders_that_are_files(dprandp: Dprandp, run_after: RunAfter, tmp_path: Path) -> None:
    """What a user can get wrong about folders without any file permissions, so that root notices too."""
    (tmp_path / "file").touch()
    refused(dprandp("generate", "--run", tmp_path / "file"), 3, "is a file, not a run directory")
    refused(dprandp("generate", "--run", tmp_path / "file" / "run"), 6, "cannot", "file/run")
    run = run_after("pretrain")
    (run / "privacy").touch()
    probe = ("probe", "--config", "small.toml", "--run", run, "--data", "npz:tiny.npz")
    refused(dprandp(*probe), 6, "privacy")
    (run / "privacy").unlink()
    assert dprandp(*probe).code == 0


def test_locked_run(dprandp: Dprandp, run_after: RunAfter) -> None:
    run = run_after("finetune")
    before = state_of(run)
    with open(run / ".lock", "w") as lock:
        lock.write("4711\n")
        lock.flush()
        fcntl.flock(lock, fcntl.LOCK_EX)
        for command in ("generate", "pretrain", "probe", "finetune", "run", "report"):
            refused(dprandp(command, "--run", run), 6, "another dprandp process (pid 4711)", "wait until")
        assert json.loads(dprandp("status", "--run", run, "--json").out)["budget"]["private"]
        assert dprandp("finetune", "--run", run, "--resume", "--plan").code == 0  # reads, so needs no lock
    assert state_of(run) == before
