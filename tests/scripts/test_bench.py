"""``bench.py``: its parts, and its bounds in real processes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import bench
import pytest

from dprandp.errors import UsageError

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"

SLOW_PROBE = """
from benchmark import bounds, suite
from benchmark.cases import Limit
suite.QUICK = ("patchnet",)
bounds.BOUNDS = {key: Limit(1e6) for key in bounds.BOUNDS}
"""


def started(*arguments: object, before: str = "") -> subprocess.CompletedProcess[str]:
    """``python scripts/bench.py``, with Python to execute before it."""
    start = f"import sys; sys.path.insert(0, {str(SCRIPTS)!r})\n{before}\nimport bench\nbench.main(bench.app)"
    command = [sys.executable, "-c", start, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.mark.slow
def test_a_bound_that_is_passed_ends_with_1() -> None:
    done = started("--quick", "--rounds", 1, "--json", before=SLOW_PROBE)
    assert done.returncode == 1
    assert "regressed past a bound (patchnet time ordinary layers" in done.stderr
    assert "fix: " in done.stderr
    result, error = map(json.loads, done.stdout.splitlines())
    assert error["error"]["exit_code"] == 1
    assert result["regressions"] == ["patchnet time ordinary layers"]
    assert [row["held"] for row in result["figures"]] == [False]


def test_the_parts_are_listed_and_others_refused(capsys: pytest.CaptureFixture[str]) -> None:
    bench.app(["--list", "--json"], standalone_mode=False)
    parts = json.loads(capsys.readouterr().out)["parts"]
    assert {"generator", "probe", "finetune", "ranks", "curves"} <= set(parts)
    with pytest.raises(UsageError, match="--quick has no curves"):
        bench.app(["--only", "curves", "--quick"], standalone_mode=False)


@pytest.mark.slow
def test_the_quick_benchmark_holds_its_bounds() -> None:
    done = started("--quick", "--json")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["regressions"] == []
    assert len(result["figures"]) >= 10
