"""``dprandp bench`` in real processes."""

from __future__ import annotations

import pytest
from cli_process import Dprandp, refused

SLOW_PROBE = """
from dprandp.benchmark import bounds, suite
from dprandp.benchmark.cases import Limit
suite.QUICK = ("patchnet",)
bounds.BOUNDS = {key: Limit(1e6) for key in bounds.BOUNDS}
"""


@pytest.mark.slow
def test_a_bound_that_is_passed_ends_with_1(dprandp: Dprandp) -> None:
    done = dprandp("bench", "--quick", "--rounds", 1, "--json", before=SLOW_PROBE)
    assert done.code == 1
    assert "regressed past a bound (patchnet time ordinary layers" in done.err
    assert "fix: " in done.err
    result = done.json
    assert result["regressions"] == ["patchnet time ordinary layers"]
    assert [row["held"] for row in result["figures"]] == [False]


def test_the_parts_are_listed_and_others_refused(dprandp: Dprandp) -> None:
    done = dprandp("bench", "--list", "--json")
    assert done.code == 0
    assert {"generator", "probe", "finetune", "ranks", "curves"} <= set(done.json["parts"])
    refused(dprandp("bench", "--only", "nothing"), 2, "no part 'nothing'")
    refused(dprandp("bench", "--only", "curves", "--quick"), 2, "--quick has no curves")


@pytest.mark.slow
def test_the_quick_benchmark_holds_its_bounds(dprandp: Dprandp) -> None:
    done = dprandp("bench", "--quick", "--json")
    assert done.code == 0, done.err
    assert done.json["regressions"] == []
    assert len(done.json["figures"]) >= 10
