"""``bench.py`` in real processes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"

SLOW_PROBE = """
from benchmark import bounds, suite
from benchmark.cases import Limit
suite.QUICK = ("patchnet",)
bounds.BOUNDS = {key: Limit(1e6) for key in bounds.BOUNDS}
"""


def bench(*arguments: object, before: str = "") -> subprocess.CompletedProcess[str]:
    """``python scripts/bench.py``, with Python to execute before it."""
    start = f"import sys; sys.path.insert(0, {str(SCRIPTS)!r})\n{before}\nimport bench\nbench.main(bench.app)"
    command = [sys.executable, "-c", start, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.mark.slow
def test_a_bound_that_is_passed_ends_with_1() -> None:
    done = bench("--quick", "--rounds", 1, "--json", before=SLOW_PROBE)
    assert done.returncode == 1
    assert "regressed past a bound (patchnet time ordinary layers" in done.stderr
    assert "fix: " in done.stderr
    result = json.loads(done.stdout)
    assert result["regressions"] == ["patchnet time ordinary layers"]
    assert [row["held"] for row in result["figures"]] == [False]


def test_the_parts_are_listed_and_others_refused() -> None:
    done = subprocess.run(
        [sys.executable, str(SCRIPTS / "bench.py"), "--list", "--json"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert {"generator", "probe", "finetune", "ranks", "curves"} <= set(json.loads(done.stdout)["parts"])
    done = bench("--only", "curves", "--quick")
    assert done.returncode == 2
    assert "--quick has no curves" in done.stderr


@pytest.mark.slow
def test_the_quick_benchmark_holds_its_bounds() -> None:
    done = bench("--quick", "--json")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["regressions"] == []
    assert len(result["figures"]) >= 10
