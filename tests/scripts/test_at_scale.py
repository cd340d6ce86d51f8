"""The demonstrations of large data, in small."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import folder_at_scale
import probe_at_scale
import pytest


def said_by(script: str, *arguments: object) -> Any:
    done = subprocess.run([sys.executable, script, *map(str, arguments)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.slow
def test_a_folder_of_files_goes_through_two_kills(tmp_path: Path) -> None:
    (tmp_path / "few.toml").write_text("[probe]\nsteps = 4\ndims = 64\nstatistics_images = 100\n", encoding="utf-8")
    found = said_by(folder_at_scale.__file__, "--images", 12_000, "--classes", 3, "--side", 32, "--limit", 3,
                    "--folder", tmp_path, "--config", tmp_path / "few.toml")  # fmt: skip
    assert found["images"] / 2 <= found["rows_kept_of_decoding"] < found["images"]
    assert found["images"] / 2 <= found["rows_kept_of_features"] < found["images"]
    assert found["result"]["steps"] == 4
    assert found["result"]["epsilon"] <= 8
    assert 0.2 < found["peak_gb"] < 3


@pytest.mark.slow
def test_a_probe_on_a_thousand_classes_in_little_memory() -> None:
    sizes = ("--rows", 20_000, "--dims", 256, "--classes", 100, "--steps", 2)
    made = said_by(probe_at_scale.__file__, *sizes, "--json")
    (row,) = made["sizes"]
    assert row["rows"] == 20_000
    assert row["features_gb"] == pytest.approx(2 * 20_000 * 256 / 1e9, abs=1e-3)
    assert 0 < row["own_memory_gb"] <= row["peak_with_mapped_gb"] < 3
    assert 0 <= row["read_s"] <= row["first_step_s"] < 60
