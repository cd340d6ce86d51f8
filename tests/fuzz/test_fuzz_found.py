"""What the generated cases found, each as one small case: a bug that was there once, and its refusal."""

from __future__ import annotations

import json
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from fuzzing import attempt, command

from dprandp.config import schema
from dprandp.data import open_dataset
from dprandp.dpsgd.budget import BUDGET_KEYS, read_plan_file
from dprandp.dpsgd.stage import PrivatePlan
from dprandp.errors import DprandpError
from dprandp.inspection import overview
from dprandp.privacy.ledger import FIRST_PREVIOUS, FORMAT, Ledger, seal
from dprandp.runs import checkpoint
from dprandp.runs.context import recorded
from dprandp.runs.directory import RunDir
from dprandp.runs.files import from_json


def refused(call: Callable[[], object], code: int, *fragments: str) -> DprandpError:
    error = attempt(call)
    assert error is not None
    assert error.exit_code == code
    for fragment in fragments:
        assert fragment in str(error)
    return error


CHARGE = {
    "kind": "charge", "stage": "probe", "attempt": 1, "step": 0, "steps": 1, "planned": 1,
    "noise_multiplier": 4.0, "sample_rate": 1.0, "clip_norm": 1.0, "noise": "gaussian", "random": "os-entropy",
    "time": "now",
}  # fmt: skip
HEADER = {
    "kind": "header", "format": FORMAT, "data_unit": "image", "adjacency": "zero-out", "examples": 100, "budget": None,
}  # fmt: skip


def ledger_at(path: Path, *records: dict[str, Any]) -> Path:
    """A ledger with these lines, sealed as real ones are."""
    previous, content = FIRST_PREVIOUS, b""
    for record in records:
        line, previous = seal(record, previous)
        content += line
    path.write_bytes(content)
    return path


CHANGES_OF_A_CHARGE: list[dict[str, Any]] = [
    {"attempt": [1]}, {"attempt": "1"}, {"attempt": True}, {"attempt": 0}, {"stage": {"a": 1}}, {"stage": None},
    {"noise_multiplier": 10**400}, {"noise_multiplier": "4"}, {"sample_rate": True}, {"steps": 1.0}, {"steps": 0},
    {"clip_norm": "1"}, {"random": 3}, {"step": [0]},
]  # fmt: skip


def test_ledger_lines_of_other_types(tmp_path: Path) -> None:
    path = ledger_at(tmp_path / "ledger.jsonl", HEADER, CHARGE)
    assert Ledger.open(path).charged_steps("probe", 1) == 1
    for change in CHANGES_OF_A_CHARGE:
        ledger_at(path, HEADER, CHARGE | change)
        refused(lambda: Ledger.open(path), 4, "Line 2", "its values make no sense")
    for examples in ("100", None, 0, -5, 1.5, True):
        ledger_at(path, HEADER | {"examples": examples})
        refused(lambda: Ledger.open(path), 4, "Line 1", "number of examples")
    for unit in (None, 3, ["image"]):
        ledger_at(path, HEADER | {"data_unit": unit})
        refused(lambda: Ledger.open(path), 4, "Line 1", "the unit")


PLAN = PrivatePlan("probe", 100, 1.0, 5, 4.0, 1.0, 1, 2.0, 1e-5).to_dict()
ENTRY = {"attempt": 1, "started": "2026-01-01T00:00:00+00:00", "plan": PLAN}
BUDGET = {
    "format": 1, "data": "digits", "epsilon": 2.0, "delta": 1e-5, "examples": 100, "unit": "image",
    "stages": {"probe": ENTRY},
}  # fmt: skip


CHANGES_OF_A_PLAN: list[dict[str, Any]] = [
    {"stages": {"probe": {key: value for key, value in ENTRY.items() if key != "started"}}},
    {"stages": {"probe": []}}, {"stages": {"probe": ENTRY | {"attempt": "1"}}},
    {"stages": {"probe": ENTRY | {"plan": PLAN | {"steps": "5"}}}},
    {"stages": {"probe": ENTRY | {"plan": PLAN | {"examples": 99}}}},
    {"stages": {"finetune": ENTRY}}, {"epsilon": -1}, {"epsilon": 10**400}, {"delta": 0.5}, {"data": 7},
    {"data": "\ud800"}, {"examples": 1.5}, {"format": 2}, {"stages": [[]]}, {"unit": None}, {"unit": 1},
]  # fmt: skip


def test_plans_of_other_types(tmp_path: Path) -> None:
    run = RunDir.open(tmp_path / "run", create=True)
    file = run.privacy_dir / "plan.json"
    file.write_text(json.dumps(BUDGET))
    assert vars(read_plan_file(run).budget).items() >= {key: BUDGET[key] for key in BUDGET_KEYS}.items()
    for change in CHANGES_OF_A_PLAN:
        file.write_text(json.dumps(BUDGET | change))
        error = attempt(lambda: read_plan_file(run))
        assert error is not None, change
        assert error.exit_code in (3, 4), change
    file.write_text(json.dumps({key: BUDGET[key] for key in BUDGET if key != "unit"}))
    refused(lambda: read_plan_file(run), 4, "plan.json is damaged")


def test_whole_numbers_beyond_all_floats() -> None:
    """Every file's JSON: no arithmetic could take such a number, and nothing writes one."""
    assert from_json(b'{"examples": %d}' % 10**300) == {"examples": 10**300}
    for digits in (309, 4000, 5000):
        with pytest.raises(ValueError, match="digits"):
            from_json(b'{"examples": 1%s}' % (b"0" * digits))


RECORD = {
    "state": "done", "config": {"size": "tiny", "seed": 1}, "inputs": {}, "outputs": {},
    "result": {"count": 60, "process": "dead-leaves", "resolution": 32, "seconds": 1.5, "images_per_second": None},
    "started": "2026-01-01T00:00:00.000001+00:00", "finished": "2026-01-01T00:00:01.000001+00:00",
}  # fmt: skip


def write_run(folder: Path, change: dict[str, Any], stage: str = "generate", **top: Any) -> RunDir:
    document = {"format": 1, "dprandp": "0.1.0", "stages": {stage: RECORD | change}} | top
    folder.mkdir(exist_ok=True)
    (folder / "run.json").write_text(json.dumps(document))
    return RunDir.open(folder, create=False)


CHANGES_OF_A_RECORD: list[tuple[dict[str, Any], str]] = [
    ({"result": {"accuracy": "0.5"}}, "'accuracy'"), ({"result": {"accuracy": 7}}, "'accuracy'"),
    ({"result": {"count": "60"}}, "'count'"), ({"result": {"private": "yes"}}, "'private'"),
    ({"result": {"epsilon": 10**400}}, "no valid JSON"), ({"result": {"confusion": [[1], [2]]}}, "'confusion'"),
    ({"result": {"classes": ["a"], "confusion": [[1, 0], [0, 1]]}}, "'confusion'"),
    ({"result": {"process": "\x1b[2J"}}, "'process'"), ({"result": {"refit": {"lost_steps": "1"}}}, "'refit'"),
    ({"result": {"refit": {"lost_steps": 0, "steps": 3, "sample_rate": 1.0, "noise_multiplier": 4.0}}}, "'refit'"),
    ({"outputs": {"x" * 300: "0"}}, "files"), ({"outputs": {"../../../etc/passwd": "0"}}, "files"),
    ({"outputs": {"/etc/passwd": "0"}}, "files"), ({"outputs": {"a\0b": "0"}}, "files"),
    ({"started": None}, "times"), ({"finished": "2026-13-45T99:99"}, "times"), ({"finished": 7}, "times"),
    ({"config": {"data": "\ud800"}}, "no valid JSON"),
]  # fmt: skip


def test_records_of_other_types(tmp_path: Path) -> None:
    overview.status_lines(overview.status(write_run(tmp_path, {})))
    for change, says in CHANGES_OF_A_RECORD:
        stage = "generate" if says in ("'count'", "'process'") else "finetune"
        refused(write_run(tmp_path, change, stage).status, 4, "run.json is corrupt", says)
    for version in (0, -1, True, "1", 1.0, None):
        refused(write_run(tmp_path, {}, format=version).status, 4, "no format number")


def test_a_configuration_of_another_version() -> None:
    values = schema.as_dict(schema.GenerateConfig())
    assert recorded("generate", values) == schema.GenerateConfig()
    for change in ({"sharpen": 2}, {"count": "60"}, {"count": 0}):
        refused(lambda change=change: recorded("generate", values | change), 4, "generate", "--overwrite")


def test_a_checkpoint_without_what_is_looked_for(tmp_path: Path) -> None:
    checkpoint.save(tmp_path, "step-1", {"a": torch.zeros(2)}, {"step": 1, "ledger": None})
    loaded = checkpoint.load(tmp_path)
    assert loaded.entry("step", int) == 1
    for name, kind in (("ledger", str), ("config", dict), ("step", bool)):
        refused(lambda name=name, kind=kind: loaded.entry(name, kind), 4, "step-1.safetensors", name)


def npz_with(path: Path, header: bytes, version: bytes = b"\x01\x00") -> Path:
    length = struct.pack("<H" if version == b"\x01\x00" else "<I", len(header))
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("x_train.npy", b"\x93NUMPY" + version + length + header)
    return path


def test_an_array_header_of_megabytes_is_not_read_to_its_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = npz_with(tmp_path / "a.npz", b" " * 6 * 10**6, b"\x02\x00")
    asked: list[int] = []
    original = zipfile.ZipExtFile.read
    monkeypatch.setattr(zipfile.ZipExtFile, "read", lambda file, n=-1: (asked.append(n), original(file, n))[1])
    refused(lambda: open_dataset(f"npz:{path}", tmp_path), 3, "a.npz")
    assert asked
    assert all(0 < count < 20_000 for count in asked)


def test_a_link_to_itself(tmp_path: Path) -> None:
    for split in ("train", "test"):
        for label in ("owl", "wren"):
            (tmp_path / split / label).mkdir(parents=True)
    (tmp_path / "train/owl/patient-4711.png").symlink_to("patient-4711.png")
    error = refused(lambda: open_dataset(f"folder:{tmp_path}", tmp_path), 3, "symbolic link")
    assert "4711" not in str(error)


def test_paths_beyond_the_system(tmp_path: Path) -> None:
    for kind in ("npz", "folder"):
        refused(lambda kind=kind: open_dataset(f"{kind}:{'a' * 300}", tmp_path), 3, "File name too long")
        name = f"{kind}:~nobody-of-this-name/a.npz"
        refused(lambda name=name: open_dataset(name, tmp_path), 2, "unknown home folder")


def test_flags_beyond_all_bounds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for arguments in (("status", "--run"), ("generate", "--run"), ("datasets", "--data-dir"), ("generate", "--config")):
        assert command(*arguments, "a" * 300).code in (2, 3, 6), arguments
    for flag, value in {"--microbatch": "9" * 5000, "--device": "cuda:" + "9" * 20, "--data": "npz:\udcff"}.items():
        assert command("finetune", "--from", "scratch", "--run", "new", flag, value).code in (2, 3, 6), flag


def test_numbers_beyond_all_bounds() -> None:
    """A count of 10**15 would be a table of as many shards before the first one is made."""
    for stage, key in {"generate": "count", "pretrain": "filters", "probe": "dims", "finetune": "refit_steps"}.items():
        refused(lambda stage=stage, key=key: schema.build(stage, {key: 10**15}), 2, "is too large", key)
