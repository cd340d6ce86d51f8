"""Whole stages on an accelerator, which is emulated: the numbers of the CPU, and no wait that is not known.

The noise is seeded and drawn on the CPU in any case, so the results of both devices are the same but for rounding.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny_run
import torch
from emulated import emulation, own_process
from tiny_run import CONTINUE, DEEP, FINETUNE, GENERATE, PRETRAIN, PROBE

from dprandp import config
from dprandp.stages import continual, features, finetune, generate, pretrain, probe, tune_private, tune_public
from dprandp.stages.context import Context
from dprandp.stages.tune_settings import TuneConfig

CPU = torch.device("cpu")

ARCHITECTURES: dict[str, dict[str, Any]] = {
    "patchnet": PRETRAIN,
    "patchnet, three layers": PRETRAIN | DEEP,
    "wrn, learned": {"arch": "wrn-10-1", "steps": 3, "batch_size": 8, "projection_hidden": 16},
    "vit": {"arch": "vit-1-16-16", "random_init": True},
}

ONCE_A_STAGE = {
    "stages/synthetic_statistics.py add_weights: _to_copy": "the hash of an extractor",
    "tensorfile.py <dictcomp>: _to_copy": "checkpoints are files",
    "stages/release.py <dictcomp>: _to_copy": "the released model is a file",
    "stages/release.py evaluate: _to_copy": "the head that the test features, which lie on the CPU, are scored by",
    "stages/head.py released_head: _local_scalar_dense": "whether there is an average to release",
    "stages/finetune.py _train: _to_copy": "the parameters that are released",
    "stages/continual_loop.py <dictcomp>: _to_copy": "the parameters that are released",
    "stages/masks.py <dictcomp>: _to_copy": "weights are chosen on the CPU, once or every so many steps",
    "stages/masks.py <genexpr>: _local_scalar_dense": "how many weights were chosen, for the disclosure",
    "stages/public_steps.py held_out_loss: _local_scalar_dense": "a look at held-out images, every so many steps",
    "vision/contrastive.py train: _local_scalar_dense": "the mean loss, every ten steps",
    "stages/tune_public.py choose_publicly: _to_copy": "which held-out images a setting got right",
    "privacy/selection.py score: _local_scalar_dense": "a trial's score is a number",
}
ONCE_A_BATCH = {
    "vision/extractors.py extract: _to_copy": "features are collected on the CPU, 256 images at a time",
}
ONCE_A_STEP = {
    "privacy/plan.py release: _local_scalar_dense": "sums that are not finite are not released",
    "privacy/selection.py release: _local_scalar_dense": "the same in a trial",
    "stages/head.py fit_head: _to_copy": "the norms of a step, for metrics.jsonl",
    "stages/finetune.py _train: _to_copy": "the same",
    "stages/continual_loop.py private_steps: _to_copy": "the same",
    "stages/lookahead.py points: _local_scalar_dense": "DP-SAT's reach; the log of the step before has waited already",
}
KNOWN = ONCE_A_STAGE.keys() | ONCE_A_BATCH.keys() | ONCE_A_STEP.keys()


@contextlib.contextmanager
def context(run: Path, device: torch.device, **options: Any) -> Iterator[Context]:
    with tiny_run.context(run, insecure_seed=3, **options) as given:
        yield dataclasses.replace(given, device=device)


def close(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether two results of a stage are the same measurements, but for rounding; each of its own device."""
    assert (one["device"], other["device"]) == ("cpu", "emulated")
    same = all(one[name] == other[name] for name in ("epsilon", "noise_multiplier", "accuracy"))
    return same and abs(one["loss"] - other["loss"]) < 1e-3


def per_step(waits: Counter[str], steps: int) -> bool:
    """Whether nothing unknown was waited for, and the device once a step where it must be."""
    unknown = waits.keys() - KNOWN
    assert not unknown, f"the processor waits for the device: {sorted(unknown)}"
    return waits["privacy/plan.py release: _local_scalar_dense"] == steps


@pytest.mark.parametrize("arch", ARCHITECTURES)
@own_process
def test_probe_and_finetune_are_those_of_the_cpu(tmp_path, arch):
    data = tiny_run.write_blobs(tmp_path / "blobs.npz")

    def stages(run: Path, device: torch.device) -> list[dict[str, Any]]:
        with context(run, device) as given:
            generate.run(config.build("generate", GENERATE), given)
            pretrain.run(config.build("pretrain", ARCHITECTURES[arch]), given)
            probed = probe.run(config.build("probe", PROBE | {"data": data}), given)
            return [probed, finetune.run(config.build("finetune", FINETUNE | {"data": data}), given)]

    expected = stages(tmp_path / "cpu", CPU)
    with emulation() as (device, waits):
        found = stages(tmp_path / "device", device)
    assert all(map(close, expected, found))
    assert found[1]["refit"]["lost_steps"] == 0
    assert per_step(waits, PROBE["steps"] + FINETUNE["steps"] + FINETUNE["refit_steps"])
