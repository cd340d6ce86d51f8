"""Event files say what metrics.jsonl says, and nothing else."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import pytest
from fake_run import make_run
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from dprandp.errors import UsageError
from dprandp.report.run import write_events


def test_every_number_of_the_metrics_is_a_scalar_and_no_other(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    write_events(run, tmp_path / "events")
    for folder in (tmp_path / "events").iterdir():
        events = EventAccumulator(str(folder)).Reload()
        found = {name: [(each.step, each.value) for each in events.Scalars(name)] for name in events.Tags()["scalars"]}
        path = run.stage_dir(folder.name) / "metrics.jsonl"
        lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
        names = {name for line in lines for name, value in line.items() if type(value) in (int, float)} - {"step"}
        assert set(found) - {"accuracy", "epsilon"} == names
        for name in names:
            expected = [(line["step"], line[name]) for line in lines if type(line.get(name)) in (int, float)]
            assert [step for step, _ in found[name]] == [step for step, _ in expected]
            assert all(math.isclose(one[1], two[1], rel_tol=1e-6, abs_tol=1e-30)
                       for one, two in zip(found[name], expected, strict=True))  # fmt: skip
    assert (tmp_path / "events/probe").is_dir()
    with pytest.raises(UsageError, match="exists"):
        write_events(run, tmp_path / "events")


def test_without_the_extra_it_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(UsageError, match="not installed") as caught:
        write_events(make_run(tmp_path / "run"), tmp_path / "events")
    assert "dprandp[tensorboard]" in str(caught.value)
    assert not (tmp_path / "events").exists()
