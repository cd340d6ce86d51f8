"""Whole stages on an accelerator, which is emulated: the numbers of the CPU, and no wait that is not known. And the
checks of ``scripts/gpu_check.py``: each architecture, each kind of sum.

The noise is seeded and drawn on the CPU in any case, so the results of both devices are the same but for rounding.
"""

from __future__ import annotations

import contextlib
import dataclasses
import signal
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import device_checks
import numpy as np
import pytest
import tiny_run
import torch
from device_checks import Sizes
from emulated import emulation, own_process
from tiny_run import CONTINUE, DEEP, FINETUNE, GENERATE, PRETRAIN, PROBE, SCRATCH

from dprandp import continual, finetune, generate, pretrain, probe, tune
from dprandp.config import schema
from dprandp.dpsgd import features
from dprandp.models.wrn import LAYER_ORDERS
from dprandp.runs.context import Context
from dprandp.runs.results import PrivateResult
from dprandp.runs.signals import Interrupted, Stop
from dprandp.tune import TuneConfig

CPU = torch.device("cpu")

ARCHITECTURES: dict[str, dict[str, Any]] = {
    "patchnet": PRETRAIN,
    "patchnet, two layers": PRETRAIN | DEEP,
    "wrn, learned": {"arch": "wrn-10-1", "steps": 3, "batch_size": 8, "projection_hidden": 16},
    "vit": {"arch": "vit-1-16-16", "random_init": True},
}

ONCE_A_STAGE = {
    "pretrain/__init__.py _save: _to_copy": "the first filters, for their picture",
    "models/extractor.py add_weights: _to_copy": "the hash of an extractor",
    "runs/checkpoint.py <dictcomp>: _to_copy": "checkpoints are files",
    "dpsgd/release.py <dictcomp>: _to_copy": "the released model is a file",
    "dpsgd/release.py <listcomp>: equal": "whether a network has changed its state, once at the end",
    "dpsgd/release.py evaluate: _to_copy": "the head that the test features, which lie on the CPU, are scored by",
    "probe/head.py released_head: _local_scalar_dense": "whether there is an average to release",
    "finetune/__init__.py _train: _to_copy": "the parameters that are released",
    "continual/loop.py <dictcomp>: _to_copy": "the parameters that are released",
    "dpsgd/masks.py <dictcomp>: _to_copy": "weights are chosen on the CPU, once or every so many steps",
    "dpsgd/masks.py <genexpr>: _local_scalar_dense": "how many weights were chosen, for the disclosure",
    "continual/public.py held_out_loss: _local_scalar_dense": "a look at held-out images, every so many steps",
    "pretrain/contrastive.py train: _local_scalar_dense": "the mean loss, every ten steps",
    "tune/__init__.py choose_publicly: _to_copy": "which held-out images a setting got right",
    "privacy/selection.py score: _local_scalar_dense": "a trial's score is a number",
}
ONCE_A_BATCH = {
    "models/extractor.py extract: _to_copy": "features are collected on the CPU, 256 images at a time",
}
ONCE_A_STEP = {
    "privacy/mechanism.py release: _local_scalar_dense": "sums that are not finite are not released",
    "privacy/selection.py release: _local_scalar_dense": "the same in a trial",
    "probe/head.py fit_head: _to_copy": "the norms of a step, for metrics.jsonl",
    "finetune/__init__.py _train: _to_copy": "the same",
    "continual/loop.py private_steps: _to_copy": "the same",
}
KNOWN = ONCE_A_STAGE.keys() | ONCE_A_BATCH.keys() | ONCE_A_STEP.keys()


@contextlib.contextmanager
def context(run: Path, device: torch.device, **options: Any) -> Iterator[Context]:
    with tiny_run.context(run, insecure_seed=3, **options) as given:
        yield dataclasses.replace(given, device=device)


def close(one: PrivateResult, other: PrivateResult) -> bool:
    """Whether two results of a stage are the same measurements, but for rounding; each of its own device."""
    assert (one.device, other.device) == ("cpu", "emulated")
    same = all(getattr(one, name) == getattr(other, name) for name in ("epsilon", "noise_multiplier", "accuracy"))
    return same and abs(one.loss - other.loss) < 1e-3


def per_step(waits: Counter[str], steps: int) -> bool:
    """Whether nothing unknown was waited for, and the device once a step where it must be."""
    unknown = waits.keys() - KNOWN
    assert not unknown, f"the processor waits for the device: {sorted(unknown)}"
    return waits["privacy/mechanism.py release: _local_scalar_dense"] == steps


PROBE_HERE = PROBE | {"steps": 4, "statistics_images": 12}
FINETUNE_HERE = FINETUNE | {"steps": 2, "batch_size": 8, "refit_steps": 3}

Work = Callable[[Context], Any]


@contextlib.contextmanager
def on_both(tmp_path: Path, work: Work, arch: str | None = None) -> Iterator[tuple[Any, Any, Counter[str]]]:
    """What the work gives on the CPU and on the device, in runs with images and an extractor, and its waits."""

    def done(run: Path, device: torch.device) -> Any:
        with context(run, device) as given:
            if arch is not None:
                generate.run(schema.build("generate", GENERATE), given)
                pretrain.run(schema.build("pretrain", ARCHITECTURES[arch]), given)
            return work(given)

    expected = done(tmp_path / "cpu", CPU)
    with emulation() as (device, waits):
        yield expected, done(tmp_path / "device", device), waits


def blobs(tmp_path: Path) -> str:
    return tiny_run.write_blobs(tmp_path / "blobs.npz", train=48, test=16)


def interrupted(stage: Any, values: Any, steps: int) -> Work:
    """A stage that a signal stops after some steps, and that goes on."""

    def work(given: Context) -> dict[str, Any]:
        with stopped_after(steps), pytest.raises(Interrupted):
            stage.run(values, given)
        return stage.run(values, given)

    return work


@contextlib.contextmanager
def stopped_after(steps: int) -> Iterator[None]:
    """A signal that comes in a step of a training."""
    end_step, made = Stop.end_step, []

    def counted(stop: Stop, due: bool, save: Any) -> None:
        made.append(due)
        if len(made) == steps:
            stop.requested = signal.SIGTERM
        end_step(stop, due, save)

    Stop.end_step = counted
    try:
        yield
    finally:
        Stop.end_step = end_step


@pytest.mark.slow  # the sums are among the checks below
@pytest.mark.parametrize("arch", ARCHITECTURES)
@own_process
def test_probe_and_finetune_are_those_of_the_cpu(tmp_path, arch):
    data = blobs(tmp_path)

    def stages(given: Context) -> list[dict[str, Any]]:
        probed = probe.run(schema.build("probe", PROBE_HERE | {"data": data}), given)
        return [probed, finetune.run(schema.build("finetune", FINETUNE_HERE | {"data": data}), given)]

    with on_both(tmp_path, stages, arch) as (expected, found, waits):
        assert all(map(close, expected, found))
        assert found[1].refit.lost_steps == 0
        assert per_step(waits, PROBE_HERE["steps"] + FINETUNE_HERE["steps"] + FINETUNE_HERE["refit_steps"])


OPTIONS: dict[str, dict[str, Any]] = {
    "views": {"views": 2},
    "discrete noise": {"noise": "discrete", "clipping": "automatic"},
    "some weights": {"select": "magnitude", "keep": 0.3, "every": 2, "scope": "layer", "optimizer": "adam"},
    "some blocks": {"freeze": "last", "scope": "block", "keep": 0.5},
    "rescaled": {"clipping": "rescaled", "momentum": 0.9},
}


@pytest.mark.slow
@pytest.mark.parametrize("options", OPTIONS)
@own_process
def test_every_option_goes_on_after_an_interruption(tmp_path, options):
    """Three steps, interrupted after the second: checkpoints come back to the device."""
    values = schema.build("finetune", SCRATCH | {"data": blobs(tmp_path)} | OPTIONS[options])
    with on_both(tmp_path, interrupted(finetune, values, 2)) as (expected, found, waits):
        assert close(expected, found)
        assert found.lost_steps == 0
        discrete = OPTIONS[options].get("noise") == "discrete"
        unknown = waits.keys() - KNOWN
        assert unknown == ({"privacy/randomness.py add_discrete_noise: _to_copy"} if discrete else set())
        assert waits["privacy/mechanism.py release: _local_scalar_dense"] == 3


@pytest.mark.slow
@pytest.mark.parametrize("fits", [True, False])
@own_process
def test_a_probe_of_units_and_views_goes_on_on_the_device(tmp_path, fits):
    """Features that fit into the device's memory, and features that are sent in blocks."""
    made = tiny_run.blobs(train=48, test=16)
    np.savez(tmp_path / "blobs.npz", **made, groups_train=np.arange(48) // 3)
    values = schema.build("probe", PROBE_HERE | {"data": f"npz:{tmp_path / 'blobs.npz'}", "views": 2})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(features, "free_on_device", lambda device: 10**9 if fits else 0)
        with on_both(tmp_path, interrupted(probe, values, 2), "vit") as (expected, found, waits):
            assert close(expected, found)
            assert found.unit == "one group (column groups_train)"
            assert per_step(waits, PROBE_HERE["steps"])


@pytest.mark.slow
@own_process
def test_several_labels_of_declared_shares_are_those_of_the_cpu(tmp_path):
    made = tiny_run.blobs(train=48, test=16)
    for split in ("train", "test"):
        made[f"y_{split}"] = np.eye(3, dtype=np.uint8)[made[f"y_{split}"]]
    np.savez(tmp_path / "blobs.npz", **made, groups_train=np.arange(48) // 3)
    data = {"data": f"npz:{tmp_path / 'blobs.npz'}", "class_shares": "0.3,0.3,0.3"}

    def stages(given: Context) -> list[dict[str, Any]]:
        probed = probe.run(schema.build("probe", PROBE_HERE | data), given)
        return [probed, finetune.run(schema.build("finetune", FINETUNE_HERE | data | {"refit_steps": 2}), given)]

    with on_both(tmp_path, stages, "vit") as (expected, found, waits):
        assert all(map(close, expected, found))
        assert found[1].multi_label
        assert per_step(waits, PROBE_HERE["steps"] + FINETUNE_HERE["steps"] + 2)


@pytest.mark.slow
@own_process
def test_a_continued_training_is_that_of_the_cpu(tmp_path):
    values = schema.build("continue", CONTINUE | {"data": blobs(tmp_path), "steps": 4, "switch": "2", "batch_size": 8})
    with on_both(tmp_path, interrupted(continual, values, 3), "vit") as (expected, found, waits):
        assert close(expected, found)
        assert per_step(waits, 2)


@pytest.mark.parametrize("on", ["private", "synthetic"])
@own_process
def test_tuning_finds_what_it_finds_on_the_cpu(tmp_path, on):
    choose = {"private": tune.choose_privately, "synthetic": tune.choose_publicly}[on]
    asked = schema.build("probe", PROBE_HERE | {"data": blobs(tmp_path)})
    with on_both(tmp_path, lambda given: choose(asked, TuneConfig(on=on, trials=2), given, {}), "vit") as results:
        expected, found, waits = results
        assert found.chosen == expected.chosen
        assert not waits.keys() - KNOWN


# ----------------------------------------------------------------------------------------------- checks

WIDE = {"arch": "wrn-10-1", "feature_stages": "all"}
FURTHER: dict[str, dict] = {
    **{order: WIDE | {"layer_order": order, "padding": "same"} for order in LAYER_ORDERS},
    "plain filters": WIDE | {"weight_standardisation": False},
    "nf-resnet-50": {"arch": "nf-resnet-50"},
}
NAMES = [name for name, _ in device_checks.checks(torch.device("cpu"), device_checks.QUICK)]


def run_check(sizes: Sizes, name: str) -> None:
    """One check on the device; nothing in it waits but what is known to."""
    with emulation() as (device, waits):
        found = dict(device_checks.checks(device, sizes))[name]()
    assert found["passed"], found
    unknown = {place for place in waits if not place.startswith("outside")} - KNOWN
    assert not unknown, f"the processor waits for the device: {sorted(unknown)}"


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow) if name == "stages" else name for name in NAMES]
)  # the stages have tests of their own
@own_process
def test_a_check_passes(name):
    run_check(device_checks.QUICK, name)


@pytest.mark.slow
@pytest.mark.parametrize("kind", FURTHER)
@own_process
def test_a_clipped_sum_is_that_of_the_cpu(kind):
    architectures = {"wrn": WIDE, kind: FURTHER[kind]}
    sizes = dataclasses.replace(device_checks.QUICK, architectures=architectures, views=(1,), records=2)
    run_check(sizes, f"clipped sum, {kind}, 1 views")


@own_process
def test_what_differs_is_noticed():
    """A device that computes other numbers does not pass."""
    wrong = iter((1.0, 1.0, 1.2))
    found = device_checks.compared(lambda where, asked: {"x": torch.full((2,), next(wrong))}, torch.device("cpu"))
    assert not found["passed"]
    assert found["float32 error"] == 0
