"""Promises 9 and 17: nothing is learned from private data but through noise, and nothing private is released."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import tripwire
from private_runs import KINDS, kinds_but_slow, run_kind, write_records
from tiny_run import (
    TEST,
    Copy,
    Patch,
    Record,
    blobs,
    context,
    ledger_of,
    read_json,
    run_finetune,
    run_probe,
    write_blobs,
)
from torch import Tensor

from dprandp import probe
from dprandp.dpsgd import release
from dprandp.models import whitening
from dprandp.models.extractor import extract
from dprandp.pretrain import load_extractor
from dprandp.privacy.randomness import PoissonSampler
from dprandp.runs.signals import Interrupted, Stop

# --------------------------------------------------------------------------------------------- 9: no private statistics


@pytest.mark.parametrize(
    "name",
    kinds_but_slow(
        "fine-tune with discrete noise", "fine-tune of a wrn", "fine-tune with Adam, rescaled",
        "fine-tune of chosen weights", "continue by the decelerator",
    ),
)  # fmt: skip
def test_9_nothing_is_computed_over_private_examples(
    request: pytest.FixtureRequest, copy: Copy, tmp_path: Path, monkeypatch: Patch, name: str
) -> None:
    kind = KINDS[name]
    run = tmp_path / "empty" if kind.source is None else copy(request.getfixturevalue(kind.source))
    data = write_records(tmp_path / "watched.npz", kind, tripwire.EXAMPLES)
    sums = tripwire.install(monkeypatch)
    with tripwire.watching():
        run_kind(kind, run, data)
    charged = ledger_of(run)
    assert charged.examples == tripwire.EXAMPLES
    steps = sum(charge.steps for charge in charged.charges)
    assert len(sums) == steps if name != "tune" else sums.count("score") >= 1


def numbers(*shape: int) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(0)) + 0.1


def watched(*shape: int) -> np.ndarray:
    return np.ones(shape).view(tripwire.Watched)


STATISTICS: list[Callable[[], Any]] = [
    lambda: numbers(117, 5).mean(dim=0),
    lambda: numbers(117, 5).amax(),
    lambda: numbers(29, 5).var(dim=0),
    lambda: torch.cov(numbers(117, 5).T),
    lambda: numbers(117, 5).T @ numbers(117, 5),
    lambda: numbers(117, 5).quantile(0.9),
    lambda: torch.arange(117).remainder(3).unique(),
    lambda: torch.bincount(torch.arange(117) % 3),
    lambda: torch.zeros(3, 5).index_add_(0, torch.arange(117) % 3, numbers(117, 5)),
    lambda: whitening.fit(numbers(117, 5), 4),
    lambda: torch.nn.BatchNorm1d(5)(numbers(29, 5)),
    lambda: numbers(117).sum().item(),
    lambda: np.unique(watched(117)),
    lambda: np.mean(watched(117, 4), axis=0),
    lambda: watched(117, 4).max(),
    lambda: np.cov(watched(117, 4).T),
    lambda: watched(117).tolist(),
]
HARMLESS: list[Callable[[Tensor], Tensor]] = [
    lambda x: x[3], lambda x: x[:40], lambda x: x * 2 - 1, lambda x: x @ numbers(5, 4), lambda x: x.mean(dim=1),
    lambda x: torch.nn.functional.normalize(x, dim=1), lambda x: x[torch.arange(29)], lambda x: x.unsqueeze(1),
]  # fmt: skip


def test_9_control_statistics_trip_and_work_on_single_examples_does_not() -> None:
    with tripwire.watching():
        for statistic in STATISTICS:
            with pytest.raises(tripwire.Tripped):
                statistic()
        for harmless in HARMLESS:
            harmless(numbers(117, 5))


@pytest.mark.parametrize("where", ["features", "classes"])
def test_9_control_a_stage_that_cheats_trips(
    copy: Copy, public_run: Path, tmp_path: Path, monkeypatch: Patch, where: str
) -> None:
    """The mistakes people make: standardise or count with the private split."""
    data = write_blobs(tmp_path / "watched.npz", train=tripwire.EXAMPLES)
    tripwire.install(monkeypatch)
    honest = probe.private_features

    def cheating(stage, *arguments, **options):
        rows, labels = honest(stage, *arguments, **options)
        if where == "classes":
            assert len(np.unique(stage.dataset.train().labels)) == 3
        return (rows - rows.mean(dim=0)) / rows.std(dim=0), labels

    monkeypatch.setattr(probe, "private_features", cheating)
    with tripwire.watching(), pytest.raises(tripwire.Tripped):
        run_probe(copy(public_run), data)


def test_9_extraction_is_isolated(public_run: Path, wide_run: Path) -> None:
    """A feature row is a function of its own image (what the tripwire cannot see inside threads)."""
    images = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (9, 3, 32, 32), dtype=np.uint8))
    for run in (public_run, wide_run):
        with context(run) as given:
            extractor, _ = load_extractor(given, "rgb")
        changed = images.clone()
        changed[4] = 0
        for mirror in (False, True):
            before, after = (extract(extractor, batch, mirror=mirror) for batch in (images, changed))
            same = [i for i in range(9) if i != 4]
            assert torch.allclose(before[same], after[same], rtol=1e-5, atol=1e-6)
            assert not torch.allclose(before[4], after[4])


# ------------------------------------------------------------------------------------------- 17: only releasable things

DISCLOSED = {
    "epsilon", "delta", "epsilon_target", "epsilon_total", "accountant", "noise_multiplier", "sample_rate", "steps",
    "charged_steps", "lost_steps", "clip_norm", "views", "adjacency", "unit", "train_units", "noise", "random",
    "private", "tuned", "tuned_on", "also_charged", "ledger_head",
}  # fmt: skip


def test_17_model_holds_the_allow_list_and_nothing_else(probed_run: Path, tuned_run: Path) -> None:
    assert release.MODEL_FILES == ("model.safetensors", "config.json", "MODEL_CARD.md")
    for run in (probed_run, tuned_run):
        assert sorted(path.name for path in (run / "model").iterdir()) == sorted(release.MODEL_FILES)
        config = read_json(run / "model/config.json")
        assert set(config) == {"format", "arch", "extractor", "classes", "input", "precision", "result", "sha256"}
        assert set(config["result"]) >= DISCLOSED
        assert config["extractor"]["arch"] == config["arch"] == "patchnet"


def test_17_the_test_split_is_read_once_at_the_end(copy: Copy, public_run: Path, data: str, record: Record) -> None:
    run = copy(public_run)
    seen = record(run)
    run_probe(run, data)
    assert seen.tests == [(8, 8)]
    run_finetune(run, data)
    assert seen.tests == [(8, 8), (18, 18)]
    run_probe(run, data)  # finished: nothing is read again
    assert len(seen.tests) == 2


def test_17_the_test_split_decides_nothing(copy: Copy, public_run: Path, tmp_path: Path) -> None:
    """Other test images, same everything else: the same weights."""
    heads = []
    for seed in (0, 1):
        made = blobs(0)
        other = blobs(seed + 10)
        made |= {"x_test": other["x_test"], "y_test": other["y_test"]}
        np.savez(tmp_path / "blobs.npz", **made)
        run = copy(public_run)
        result = run_probe(run, f"npz:{tmp_path / 'blobs.npz'}", {"insecure_seed": 1})
        assert sum(map(sum, result["confusion"])) == TEST
        heads.append((run / "model/model.safetensors").read_bytes())
    assert heads[0] == heads[1]


def test_21_a_bug_inside_a_stage_is_not_swallowed_and_pays(
    copy: Copy, public_run: Path, data: str, monkeypatch: Patch
) -> None:
    """An exception in the middle leaves the charged steps charged."""
    run = copy(public_run)
    draw, count = PoissonSampler.draw, iter(range(100))

    def failing(sampler: PoissonSampler) -> np.ndarray:
        if next(count) == 3:
            raise RuntimeError("broken")
        return draw(sampler)

    monkeypatch.setattr(PoissonSampler, "draw", failing)
    with pytest.raises(RuntimeError, match="broken"):
        run_probe(run, data, steps=16)
    assert ledger_of(run).charged_steps("probe", 1) == 4
    monkeypatch.setattr(PoissonSampler, "draw", draw)
    result = run_probe(run, data, steps=16)
    assert (result["charged_steps"], result["lost_steps"]) == (16, 2)  # checkpoints are every second step
    assert result["epsilon"] <= 1.2


class Late(Stop):
    """After the third step, no signal at the first look and one right after it."""

    def __init__(self) -> None:
        self.looks = 0
        super().__init__()

    @property
    def requested(self) -> signal.Signals | None:
        self.looks += 1
        return signal.SIGTERM if self.looks > 3 else None

    @requested.setter
    def requested(self, value: object) -> None:
        pass


def test_21_a_step_is_saved_before_a_late_signal_ends_the_stage(
    copy: Copy, public_run: Path, data: str, monkeypatch: Patch
) -> None:
    """The signal arrives between the look whether to save and the end of a step, of so many that not each is saved."""
    run = copy(public_run)
    with monkeypatch.context() as patch:
        patch.setattr(probe, "graceful_stop", lambda: contextlib.nullcontext(Late()))
        with pytest.raises(Interrupted):
            run_probe(run, data, steps=100)
    assert run_probe(run, data, steps=100)["lost_steps"] == 0
