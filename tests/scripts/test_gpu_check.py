"""The script that is run on a machine with a GPU: all of it, in tiny sizes, on the CPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import device_checks
import device_rates
import gpu_check
import pytest
import torch
from experiment import read

from dprandp.runs.checkpoint import tensors_from_bytes

SCRIPT = Path(gpu_check.__file__)


def called(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", ["gpu_check.py", *map(str, arguments)])
    return gpu_check.main()


@pytest.mark.slow
def test_the_whole_script_in_tiny_sizes(tmp_path):
    command = [sys.executable, str(SCRIPT), "--out", str(tmp_path), "--device", "cpu", "--quick", "--pretrain", "5"]
    one_thread = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=one_thread)
    assert done.returncode == 0, done.stderr
    rows = read(tmp_path / "results.jsonl")
    cpu = torch.device("cpu")
    expected = [name for name, _ in device_checks.checks(cpu, device_checks.QUICK)]
    expected += [name for name, _ in device_rates.rates(cpu, device_rates.QUICK)]
    assert [row["name"] for row in rows] == [*expected, "tiny"]
    assert all(row["passed"] for row in rows)
    assert all(row["rate"] > 0 for row in rows if row["kind"] == "rate")
    facts = json.loads((tmp_path / "facts.json").read_text(encoding="utf-8"))
    assert facts["failed"] == []
    assert (tmp_path / "table.txt").read_text(encoding="utf-8") in done.stdout
    extractor = tmp_path / "pretrain/extractor.safetensors"
    assert tensors_from_bytes(extractor.read_bytes(), extractor)
    assert rows[-1]["finished"]


def test_a_machine_without_a_device_says_so(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert called(monkeypatch, "--out", tmp_path / "out") == 3
    assert "no CUDA device" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_failure_is_a_row_and_the_others_run(tmp_path, monkeypatch, capsys):
    def broken() -> dict:
        raise RuntimeError("no kernel")

    works = [("broken", broken), ("sound", lambda: {"passed": True}), ("wrong", lambda: {"passed": False})]
    monkeypatch.setattr(device_checks, "checks", lambda device, sizes: iter(works))
    monkeypatch.setattr(device_rates, "rates", lambda device, scale: iter([("rate", lambda: {"rate": 2.0})]))
    assert called(monkeypatch, "--out", tmp_path, "--device", "cpu") == 1
    rows = {row["name"]: row for row in read(tmp_path / "results.jsonl")}
    assert {name: row["passed"] for name, row in rows.items()} == {
        "broken": False, "sound": True, "wrong": False, "rate": True,
    }  # fmt: skip
    assert rows["broken"]["problem"] == "RuntimeError: no kernel"
    assert "FAILED RuntimeError: no kernel" in capsys.readouterr().out


def test_what_there_is_no_time_for_is_said_to_be_left_out(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_check, "CHECK_SECONDS", -1.0)
    monkeypatch.setattr(device_checks, "checks", lambda device, sizes: iter([("late", lambda: {"passed": True})]))
    monkeypatch.setattr(device_rates, "rates", lambda device, scale: iter([]))
    assert called(monkeypatch, "--out", tmp_path, "--device", "cpu") == 1
    (row,) = read(tmp_path / "results.jsonl")
    assert (row["passed"], row["problem"]) == (False, "no time was left")


def test_large_files_come_back_in_pieces(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_check, "PIECE", 4)
    (tmp_path / "from").mkdir()
    (tmp_path / "from/step.safetensors").write_bytes(b"0123456789")
    (tmp_path / "from/step.json").write_bytes(b"{}")
    gpu_check._bring(sorted((tmp_path / "from").glob("*")), tmp_path / "to")
    pieces = {path.name: path.read_bytes() for path in (tmp_path / "to").iterdir()}
    assert pieces.pop("step.json") == b"{}"
    assert b"".join(pieces[name] for name in sorted(pieces)) == b"0123456789"
    assert sorted(pieces) == [f"step.safetensors.00{number}" for number in range(3)]
