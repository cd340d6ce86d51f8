"""Every private stage in every kind that it has: what must hold of one must hold of all of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_run import PROBE, blobs, context, run_continue, run_finetune, run_probe, run_scratch

from dprandp import tune
from dprandp.config import schema
from dprandp.data.base import public_positions
from dprandp.tune import TuneConfig


def run_tune(run: Path, data: str, options: dict[str, Any] | None = None, **changes: Any) -> dict[str, Any]:
    """Tuning on the private data."""
    with context(run, **(options or {})) as given:
        how = TuneConfig(on="private", trials=3)
        return tune.as_json(tune.run(schema.build("probe", PROBE | {"data": data} | changes), how, given))


@dataclass(frozen=True)
class Kind:
    """A stage with its settings.

    Attributes:
        stage: what runs.
        source: the fixture of the run that it begins with; None for an empty folder.
        changes: of the stage's configuration.
        before: what runs first.
        logs: folders of its metrics.
        units: several images are one unit of privacy.
    """

    stage: Callable[..., dict[str, Any]]
    source: str | None
    changes: dict[str, Any] = field(default_factory=dict)
    before: Callable[..., dict[str, Any]] | None = None
    logs: tuple[str, ...] = ()
    units: bool = False

    @property
    def options(self) -> dict[str, Any]:
        """The stage's changes, with what names its unit."""
        return self.changes | ({"unit_column": "patient"} if self.units else {})


PROBED, TUNED, CONTINUED = ("3-probe",), ("4-finetune",), ("2b-continue",)
BOTH = ("4-finetune", "4-finetune/refit")
SHORT = {"steps": 2, "refit_steps": 0, "batch_size": 12}

KINDS: dict[str, Kind] = {
    "probe": Kind(run_probe, "public_run", {"steps": 3}, logs=PROBED),
    "probe of batches and views": Kind(run_probe, "public_run", {"batch_size": 29, "views": 2, "steps": 3},
                                       logs=PROBED),
    "probe of units": Kind(run_probe, "public_run", {"steps": 3}, logs=PROBED, units=True),
    "fine-tune and refit": Kind(run_finetune, "public_run", {"refit_steps": 3}, before=run_probe, logs=BOTH),
    "fine-tune of units": Kind(run_finetune, "public_run", SHORT | {"refit_steps": 2}, before=run_probe, logs=BOTH,
                               units=True),
    "fine-tune with discrete noise": Kind(run_finetune, "public_run", {"noise": "discrete", "refit_steps": 2},
                                          before=run_probe, logs=BOTH),
    "fine-tune of a wrn": Kind(run_finetune, "wide_run", SHORT, before=run_probe, logs=TUNED),
    "fine-tune with Adam, rescaled": Kind(run_finetune, "wide_run", SHORT | {
        "optimizer": "adam", "clipping": "rescaled"}, before=run_probe, logs=TUNED),
    "fine-tune of chosen weights": Kind(run_finetune, "wide_run", SHORT | {
        "select": "magnitude", "keep": 0.5, "every": 1, "momentum": 0.9}, before=run_probe, logs=TUNED),
    "fine-tune without a probe": Kind(run_finetune, "wide_run", SHORT | {
        "source": "pretrain", "steps": 3, "head_steps": 2, "head_lr": 2.0}, logs=TUNED),
    "from scratch, of views": Kind(run_scratch, None, {"steps": 2, "views": 2, "clipping": "automatic"}, logs=TUNED),
    "continue": Kind(run_continue, "vit_run", {"steps": 6, "switch": "3"}, logs=CONTINUED),
    "continue by the decelerator": Kind(run_continue, "vit_run", {"steps": 6, "check_every": 1,
                                                                  "switch": "decelerator"}, logs=CONTINUED),
    "continue, mixed": Kind(run_continue, "vit_run", {"public": "synth", "mix": "ratio", "steps": 3, "views": 2},
                            logs=CONTINUED),
    "continue with units and discrete noise": Kind(run_continue, "vit_run", {
        "public": "synth", "mix": "cosine", "steps": 3, "noise": "discrete"}, logs=CONTINUED, units=True),
    "tune": Kind(run_tune, "public_run"),
}  # fmt: skip


def kinds_but_slow(*slow: str) -> list:
    """All kinds, some of them for the slow tests: one test that is fast takes each."""
    assert set(slow) <= set(KINDS)
    return [pytest.param(name, marks=pytest.mark.slow) if name in slow else name for name in KINDS]


def write_records(path: Path, kind: Kind, records: int, seed: int = 0) -> str:
    """Private data for a kind: equal declared facts, test splits and public parts for every seed; the rest is other.

    Args:
        records: N of its private steps. Units have one image or three.
    """
    part = 0.2 if kind.stage is run_continue and "public" not in kind.changes else 0.0
    images = 2 * records if kind.units else round(records / (1 - part))
    made, other = blobs(0, train=images), blobs(seed, train=images)
    private = np.ones(images, dtype=bool)
    if part:
        private[public_positions(images, part, 0)] = False
    for name in ("x_train", "y_train"):
        made[name] = np.where(private.reshape(-1, *[1] * (made[name].ndim - 1)), other[name], made[name])
    if kind.units:
        of_image = np.concatenate([np.arange(records), np.repeat(np.arange(records // 2), 2)])
        of_image = np.concatenate([of_image, np.arange(images - len(of_image))])
        made["patient_train"] = np.random.default_rng(seed).permutation(of_image)
    np.savez(path, **made)
    return f"npz:{path}"


def run_kind(kind: Kind, run: Path, data: str, options: dict[str, Any] | None = None) -> dict[str, Any]:
    """What comes before the stage, and the stage; returns the stage's result."""
    unit = {"unit_column": "patient"} if kind.units else {}
    if kind.before is not None:
        kind.before(run, data, options, **({"steps": 2} | unit))
    return kind.stage(run, data, options, **kind.options)
