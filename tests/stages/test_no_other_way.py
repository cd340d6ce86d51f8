"""Promises 9 and 17, by exchange: private data leave a stage through ``release`` and by no other way.

Every stage runs twice, on other private images, labels, units and batches of the same declaration, with one change:
what ``release`` returns is made up, and the same both times. Whatever differs in what is written outside ``private/``
came another way, be it a norm before the noise, the size of a batch, a statistic or a choice. So did whatever differs
in the points at which gradients are taken, and in the masks that cut them down: a step may know of the ones before it
what was released, and no more.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from private_runs import KINDS, Kind, kinds_but_slow, run_kind, write_records

from dprandp import tune
from dprandp.dpsgd import release, units
from dprandp.dpsgd.clipped_sums import ClippedSums
from dprandp.privacy.mechanism import PrivateStep
from dprandp.privacy.selection import Trial
from dprandp.probe import head
from dprandp.runs.console import MetricsLog

RECORDS = 60
LOGGED = {"step", "update_norm", "weight_norm", "public_loss", "slowdown"}
"""All that a log may hold: norms of noisy updates and released weights; losses and estimates of public images."""

CLOCKS = {
    "started", "finished", "seconds", "time", "created", "hash", "previous", "nonce", "ledger", "ledger_head", "digest",
    "cpu_seconds", "updated", "data_record",
}  # fmt: skip
"""Entries that tell when a run was made, or hash something that does; the last one, something with a secret salt."""

Copy = Callable[[Path], Path]
Patch = pytest.MonkeyPatch


def made_up(number: int, sums: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Numbers in place of a release, by the step's number and the tensors' names alone."""
    out = {}
    for name, total in sums.items():
        generator = torch.Generator().manual_seed(1_000 * zlib.crc32(name.encode()) + number)
        out[name] = 0.01 * torch.randn(total.shape, generator=generator)
    return out


def install(patch: Patch) -> list[torch.Tensor]:
    """Make up every release from here on; the score of a trial is a number of its setting.

    Returns:
        The points at which gradients are taken, and the masks, as they are asked for.
    """
    points: list[torch.Tensor] = []

    def noted(function: Callable, *places: int) -> Callable:
        def wrapped(*arguments: Any, **options: Any) -> Any:
            for place in places:
                points.extend(tensors_in(arguments[place] if place < len(arguments) else None))
            return function(*arguments, **options)

        return wrapped

    def released(step: PrivateStep, sums: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        step.released = True
        return made_up(step.number, sums)

    def of_trial(trial: Trial, total: torch.Tensor) -> torch.Tensor:
        trial._steps_left -= 1
        return made_up(trial._steps_left, {"head": total})["head"]

    def scored(trial: Trial, right: torch.Tensor) -> None:
        trial._score = float(trial.setting)

    patch.setattr(PrivateStep, "release", released)
    patch.setattr(Trial, "release", of_trial)
    patch.setattr(Trial, "score", scored)
    patch.setattr(ClippedSums, "of", noted(ClippedSums.of, 1, 4))
    patch.setattr(units, "clipped_softmax_sum_of_units", noted(units.clipped_softmax_sum_of_units, 3))
    for module in (head, tune):
        patch.setattr(module, "clipped_softmax_sum", noted(module.clipped_softmax_sum, 2))
    return points


def tensors_in(value: Any) -> list[torch.Tensor]:
    """Copies of the tensors of parameters, masks, or a head."""
    if isinstance(value, torch.Tensor):
        return [value.detach().clone()]
    return [each.detach().clone() for each in (value or {}).values()]


def scrubbed(value: Any) -> Any:
    """JSON without the entries of ``CLOCKS``."""
    if isinstance(value, dict):
        return {key: scrubbed(entry) for key, entry in value.items() if key not in CLOCKS}
    return [scrubbed(entry) for entry in value] if isinstance(value, list) else value


def written(run: Path) -> dict[str, Any]:
    """Everything a run holds outside ``private/``, by file; without clocks."""
    found: dict[str, Any] = {}
    for path in sorted(run.rglob("*")):
        name = str(path.relative_to(run))
        if path.is_dir() or path.name in ("lock", ".ledger-head", "ledger-head") or name.startswith("private/"):
            continue
        if path.suffix in (".json", ".jsonl"):
            lines = path.read_text(encoding="utf-8")
            rows = lines.splitlines() if path.suffix == ".jsonl" else [lines]
            found[name] = [scrubbed(json.loads(row)) for row in rows]
        else:
            found[name] = path.read_bytes()
    return found


def times(value: Any, private: bool = False) -> Iterator[float]:
    """All ``seconds`` of what belongs to private stages."""
    if isinstance(value, dict):
        private = private or "epsilon" in value
        if private and "seconds" in value:
            yield value["seconds"]
    entries = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
    for entry in entries:
        yield from times(entry, private)


def test_a_time_is_rounded_to_one_digit(monkeypatch: Patch) -> None:
    for now, shown in ((100.003, 1.0), (101.49, 1.0), (109.4, 9.0), (109.6, 10.0), (114.9, 10.0), (1360.0, 1000.0)):
        monkeypatch.setattr(release.time, "perf_counter", lambda now=now: now)
        assert release.coarse_seconds(100.0) == shown


def exchanged(
    kind: Kind, request: pytest.FixtureRequest, copy: Copy, tmp_path: Path
) -> tuple[dict[str, Any], dict[str, Any]]:
    """What the stage writes for two private data sets of one declaration."""
    found = []
    for seed in (0, 1):
        run = tmp_path / f"empty-{seed}" if kind.source is None else copy(request.getfixturevalue(kind.source))
        data = write_records(tmp_path / "records.npz", kind, RECORDS, seed)
        # a selection draws its settings, and shows which was best: they must be the same for the same to be seen
        run_kind(kind, run, data, {"insecure_seed": 1} if kind is KINDS["tune"] else None)
        found.append(written(run))
        told = [json.loads(path.read_text(encoding="utf-8")) for path in run.rglob("*.json")]
        assert all(value == float(f"{value:.0e}") >= 1 for value in times(told))  # how long the data took is not told
        assert kind is KINDS["tune"] or len(list(times(told))) >= 2
    return found[0], found[1]


def differing(first: dict[str, Any], second: dict[str, Any]) -> list[str]:
    """Names of files that differ, and of entries in them."""
    assert first.keys() == second.keys()
    return [name for name in first if first[name] != second[name]]


@pytest.mark.parametrize("name", kinds_but_slow("fine-tune and refit", "fine-tune of units"))
def test_nothing_is_written_that_did_not_pass_the_release(
    request: pytest.FixtureRequest, copy: Copy, tmp_path: Path, monkeypatch: Patch, name: str
) -> None:
    points = install(monkeypatch)
    first, second = exchanged(KINDS[name], request, copy, tmp_path)
    assert differing(first, second) == []
    half = len(points) // 2
    assert len(points) == 2 * half > 0
    assert all(torch.equal(left, right) for left, right in zip(points[:half], points[half:], strict=True))
    for folder in KINDS[name].logs:
        assert set().union(*first[f"{folder}/metrics.jsonl"]) <= LOGGED
    assert "run.json" in first
    assert name == "tune" or {"privacy/plan.json", "privacy/ledger.jsonl", "model/config.json"} <= set(first)


@pytest.mark.parametrize("name", ["probe of batches and views", "continue"])
def test_control_without_the_made_up_release_all_of_it_differs(
    request: pytest.FixtureRequest, copy: Copy, tmp_path: Path, name: str
) -> None:
    first, second = exchanged(KINDS[name], request, copy, tmp_path)
    (folder,) = KINDS[name].logs
    assert {f"{folder}/metrics.jsonl", "model/model.safetensors", "model/config.json"} <= set(differing(first, second))


def test_control_what_goes_another_way_is_seen(
    request: pytest.FixtureRequest, copy: Copy, tmp_path: Path, monkeypatch: Patch
) -> None:
    """A norm before the noise in a log, and a mean of private pixels in a result."""
    install(monkeypatch)
    honest, write, evaluate = PrivateStep.release, MetricsLog.write, release.evaluate
    norms: list[float] = []

    def leaking(step: PrivateStep, sums: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        norms.append(float(sums["head"].norm()))
        return honest(step, sums)

    def logged(log: MetricsLog, step: int, **values: Any) -> None:
        write(log, step, **values | ({"update_norm": norms[-1]} if norms else {}))

    def evaluated(model, stage, *arguments, **options):
        leaked = float(stage.dataset.train().images.mean())
        return replace(evaluate(model, stage, *arguments, **options), loss=leaked)

    monkeypatch.setattr(PrivateStep, "release", leaking)
    monkeypatch.setattr(MetricsLog, "write", logged)
    monkeypatch.setattr(release, "evaluate", evaluated)
    first, second = exchanged(KINDS["probe"], request, copy, tmp_path)
    assert {"model/config.json", "3-probe/metrics.jsonl"} <= set(differing(first, second))
