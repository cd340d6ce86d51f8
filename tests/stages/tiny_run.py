"""A run of seconds: tiny data, tiny stages called in this process, a recorder of everything private that happens."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dprandp import data as datasets
from dprandp import generate, pretrain, tune
from dprandp.config import schema
from dprandp.dpsgd import clipped_sums
from dprandp.pipeline import RUNNERS
from dprandp.privacy.accounting import GaussianEvent
from dprandp.privacy.ledger import Ledger
from dprandp.privacy.mechanism import PrivateStep
from dprandp.privacy.randomness import PoissonSampler
from dprandp.probe import head
from dprandp.runs import faults
from dprandp.runs.console import Console
from dprandp.runs.context import Context
from dprandp.runs.directory import RunDir, frozen, thawed
from dprandp.tune import TuneConfig

Copy = Callable[[Path], Path]
"""A run -> a copy of it to work on; a fixture, like ``record``."""
Patch = pytest.MonkeyPatch

TRAIN, TEST, CLASSES, SIDE = 120, 40, 3, 16

GENERATE = {"process": "dead-leaves", "count": 60, "resolution": 32}
PRETRAIN = {"filters": 16, "layers": 1, "dictionary_patches": 2000, "dictionary_iterations": 2}
DEEP = {"arch": "patchnet", "layers": 2, "second_filters": 12}
PROBE = {"epsilon": 4.0, "steps": 8, "dims": 32, "statistics_images": 25, "statistics_views": 2}
FINETUNE = {"epsilon": 4.0, "steps": 4, "refit_steps": 6, "batch_size": 24, "checkpoint_every": 2}
SCRATCH = {"source": "scratch", "arch": "wrn-10-1", "epsilon": 8.0, "steps": 3, "batch_size": 12, "checkpoint_every": 1}
CONTINUE = {
    "public": "fraction:0.2", "epsilon": 8.0, "steps": 8, "switch": "4", "check_every": 2, "batch_size": 24,
    "public_batch_size": 8, "instances": 20, "checkpoint_every": 2,
}  # fmt: skip


def blobs(seed: int = 0, train: int = TRAIN, test: int = TEST) -> dict[str, np.ndarray]:
    """Images of noise with a blob whose colour tells the class; equal for equal seeds."""
    random = np.random.default_rng(seed)
    made: dict[str, np.ndarray] = {"num_classes": np.array(CLASSES)}
    for split, count in (("train", train), ("test", test)):
        labels = random.permutation(np.arange(count) % CLASSES)
        images = random.integers(0, 90, (count, SIDE, SIDE, 3))
        for image, label in zip(images, labels, strict=True):
            top, left = random.integers(0, SIDE - 8, 2)
            image[top : top + 8, left : left + 8, label] += 150
        made |= {f"x_{split}": images.astype(np.uint8), f"y_{split}": labels}
    return made


def write_blobs(path: Path, **options: Any) -> str:
    """Save ``blobs`` and return their name for ``--data``."""
    np.savez(path, **blobs(**options))
    return f"npz:{path}"


@contextlib.contextmanager
def context(run: Path, **options: Any) -> Iterator[Context]:
    """A context on a run, locked."""
    rundir = RunDir.open(run, create=True)
    with rundir.lock():
        yield Context(
            rundir=rundir, console=Console(quiet=True), device=torch.device("cpu"), data_dir=run.parent, **options
        )


class Stopped(BaseException):
    """What ``stop_at`` raises."""


def stop_at(patch: pytest.MonkeyPatch, update: int) -> None:
    """Break off once a noisy update was applied this often."""
    done: list[str] = []
    point = faults.point

    def stopping(name: str) -> None:
        done.extend([name] if name == "update-applied" else [])
        if len(done) == update:
            raise Stopped
        point(name)

    patch.setattr(faults, "point", stopping)


def make_public(run: Path, **changes: Any) -> None:
    with context(run) as given:
        generate.run(schema.build("generate", GENERATE), given)
        pretrain.run(schema.build("pretrain", PRETRAIN | changes), given)


def _runner(stage: str, defaults: dict[str, Any]) -> Callable[..., dict[str, Any]]:
    def run(run: Path, data: str, options: dict[str, Any] | None = None, **changes: Any) -> dict[str, Any]:
        """The result of the stage in this process; ``options`` go to the context, ``changes`` to the configuration."""
        with context(run, **(options or {})) as given:
            return thawed(frozen(RUNNERS[stage](schema.build(stage, defaults | {"data": data} | changes), given)))

    return run


run_probe, run_continue = _runner("probe", PROBE), _runner("continue", CONTINUE)
run_finetune, run_scratch = _runner("finetune", FINETUNE), _runner("finetune", SCRATCH)


def run_tune(run: Path, data: str, options: dict[str, Any] | None = None, asked: dict | None = None, **changes: Any):
    how = TuneConfig(**({"trials": 4} | (asked or {})))
    with context(run, **(options or {})) as given:
        return thawed(tune.as_json(tune.run(schema.build("probe", PROBE | {"data": data} | changes), how, given)))


def ledger_of(run: Path) -> Ledger:
    return Ledger.open(run / "privacy/ledger.jsonl", read_only=True)


def plans_of(run: Path) -> dict[str, dict[str, Any]]:
    """Mechanism -> its entry in plan.json, without the time."""
    stages = json.loads((run / "privacy/plan.json").read_text(encoding="utf-8"))["stages"]
    return {name: {key: value for key, value in entry.items() if key != "started"} for name, entry in stages.items()}


def read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def metrics_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


@dataclass
class Release:
    """One call of ``PrivateStep.release``, seen from outside."""

    mechanism: str
    indices: np.ndarray
    sums: dict[str, torch.Tensor]
    released: dict[str, torch.Tensor]
    divisor: float

    @property
    def noise(self) -> torch.Tensor:
        """What was added to the sum, in every coordinate, with the public divisor undone."""
        parts = [self.released[name].double() * self.divisor - self.sums[name].double() for name in self.sums]
        return torch.cat([part.flatten() for part in parts])


@dataclass
class Recorder:
    """Wraps sampler, clip, noise and test reader of this process.

    Attributes:
        draws: (N, q, indices) of each call of the sampler.
        charged: steps in the ledger on disk at each of these calls.
        clips: (C, records) of each clipped sum.
        lengths: for each clipped sum, norm of the largest single record's part (closed-form sums only).
        releases: noisy steps.
        tests: number of releases and of charged steps at each reading of the test split.
    """

    run: Path
    draws: list[tuple[int, float, np.ndarray]] = field(default_factory=list)
    charged: list[int] = field(default_factory=list)
    clips: list[tuple[float, int]] = field(default_factory=list)
    lengths: list[float] = field(default_factory=list)
    releases: list[Release] = field(default_factory=list)
    tests: list[tuple[int, int]] = field(default_factory=list)

    def install(self, patch: pytest.MonkeyPatch) -> Recorder:
        draw, release = PoissonSampler.draw, PrivateStep.release
        softmax_sum, sum_of, test = head.clipped_softmax_sum, clipped_sums.sum_of_clipped, datasets.Dataset.test

        def recorded_draw(sampler: PoissonSampler) -> np.ndarray:
            indices = draw(sampler)
            self.draws.append((sampler.examples, sampler.sample_rate, indices))
            self.charged.append(self._charged())
            return indices

        def recorded_release(step: PrivateStep, sums: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
            before = {name: value.clone() for name, value in sums.items()}
            released = release(step, sums)
            plan = step._plan
            kept = {name: value.clone() for name, value in released.items()}
            self.releases.append(Release(plan.stage, step.indices, before, kept, plan.sample_rate * plan.examples))
            return released

        def recorded_softmax_sum(features, labels, weight, clip_norm, rows=None, **options):
            if rows is not None:
                features, labels = features[rows], labels[rows]
            self.clips.append((clip_norm, len(features)))
            singles = [softmax_sum(features[i : i + 1], labels[i : i + 1], weight, clip_norm) for i in range(5)]
            self.lengths.append(max((float(one.norm()) for one in singles[: len(features)]), default=0.0))
            return softmax_sum(features, labels, weight, clip_norm, **options)

        def recorded_sum_of(microbatches, parameters, clip_norm, **options):
            seen: list[int] = []

            def counted():
                for gradients in microbatches:
                    seen.append(len(gradients["head"]))
                    yield gradients

            total = sum_of(counted(), parameters, clip_norm, **options)
            self.clips.append((clip_norm, sum(seen)))
            return total

        def recorded_test(dataset: datasets.Dataset) -> datasets.Split:
            self.tests.append((len(self.releases), self._charged()))
            return test(dataset)

        patch.setattr(PoissonSampler, "draw", recorded_draw)
        patch.setattr(PrivateStep, "release", recorded_release)
        patch.setattr(head, "clipped_softmax_sum", recorded_softmax_sum)
        patch.setattr(clipped_sums, "sum_of_clipped", recorded_sum_of)
        patch.setattr(datasets.Dataset, "test", recorded_test)
        return self

    def _charged(self) -> int:
        return sum(charge.steps for charge in ledger_of(self.run).charges)

    def of(self, mechanism: str) -> list[Release]:
        return [release for release in self.releases if release.mechanism == mechanism]

    def observed_event(self, mechanism: str) -> GaussianEvent:
        """(σ, q, T) from what was seen alone: clip norm as it was passed, noise as it was measured."""
        places = [i for i, release in enumerate(self.releases) if release.mechanism == mechanism]
        (rate,) = {self.draws[i][1] for i in places}
        (clip_norm,) = {self.clips[i][0] for i in places}
        noise = torch.cat([self.releases[i].noise for i in places])
        return GaussianEvent(float(noise.square().mean().sqrt()) / clip_norm, rate, len(places))


Record = Callable[[Path], Recorder]
"""Record everything private that happens in a run from now on."""


class NothingRead(AssertionError):
    """Private values were read where none may be."""


def forbid_reading(patch: pytest.MonkeyPatch) -> None:
    """Make every reader of pixels and labels raise."""

    def refuse(*arguments: object) -> None:
        raise NothingRead("private values were read")

    for name in ("train", "test", "fingerprint"):
        patch.setattr(datasets.Dataset, name, refuse)
