"""A realistic run directory, made through the run directory's own interface, without any training."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from dprandp.config import schema
from dprandp.privacy.ledger import Ledger
from dprandp.report import page
from dprandp.runs.console import MetricsLog
from dprandp.runs.directory import RunDir, frozen, result_digest
from dprandp.runs.files import atomic_write
from dprandp.runs.results import GenerateResult, PretrainResult, PrivateResult, StageResult, read_result

EVIL = "<script>alert(1)</script>"
CANARY = "canary-of-the-private-folder"

GENERATED = GenerateResult(
    process="stylegan-oriented", count=4000, resolution=64, images_per_second=212.4, seconds=18.8
)
PRETRAINED = PretrainResult(
    arch="patchnet", random_init=False, parameters=43_600, feature_dim=3200, precision="float32", steps=8,
    views_per_second=None, loss=None, knn_accuracy=0.615, linear_accuracy=0.7, alignment=0.3, uniformity=-2.0,
    effective_rank=None, seconds=41.2,
)  # fmt: skip

# of a private stage on the digits; every number is different from every other
BOTH = {
    "data": "digits", "title": "Handwritten digits", "balanced_accuracy": 0.8573, "auc": 0.9876, "loss": 0.5432,
    "majority_accuracy": 0.1028, "train_examples": 1437, "test_examples": 360, "train_units": 1437, "delta": 1e-5,
    "epsilon_total": 1.0, "attempt": 1, "ledger_head": "0" * 64, "clip_norm": 1.25, "views": 4, "lr": 0.777,
    "momentum": 0.9, "device": "cpu", "private": True, "random": "os-entropy", "adjacency": "zero-out of one record",
    "unit": "one image", "noise": "gaussian", "precision": "float32", "mirror": False, "tuned": None, "tuned_on": None,
}  # fmt: skip
OWN: dict[str, dict[str, Any]] = {
    "probe": {
        "accuracy": 0.8611, "epsilon": 0.2991, "epsilon_target": 0.3, "accountant": "Gaussian DP, closed form",
        "noise_multiplier": 133.7, "sample_rate": 1.0, "steps": 120, "charged_steps": 123, "also_charged": [],
        "lost_steps": 3, "expected_batch": 1437, "seconds": 9.5, "released": "average", "share": 0.3,
        "extractor_colour": "grey",
    },
    "finetune": {
        "accuracy": 0.8917, "epsilon": 0.9987, "epsilon_target": 1.0, "accountant": "PLD (dp-accounting 0.6.0)",
        "noise_multiplier": 2.345, "sample_rate": 0.0207, "steps": 20, "charged_steps": 22, "lost_steps": 2,
        "also_charged": [{"stage": "probe", "attempt": 1, "sample_rate": 1.0, "noise_multiplier": 133.7,
                          "clip_norm": 1.25, "charged_steps": 123}],
        "expected_batch": 29.7459, "seconds": 75.0, "released": "EMA, decay 0.9999", "source": "probe",
        "arch": "patchnet", "extractor_scale": 0.1, "refit": None, "clipping": "norm", "trained_weights": "all",
        "optimizer": "SGD on the noisy gradients, momentum 0.9",
    },
}  # fmt: skip


def private_result(stage: str, **changes: Any) -> PrivateResult:
    """The result of a private stage."""
    classes = changes.pop("classes", [str(digit) for digit in range(10)])
    count = len(classes)
    matrix = (np.eye(count, dtype=int) * 31).tolist()
    for true in range(count):
        matrix[true][(3 * true + 1) % count] += 5
    entries = {"stage": stage, "classes": classes, "confusion": matrix} | BOTH | OWN[stage] | changes
    return read_result(stage, frozen(entries))


def charge(
    ledger: Ledger, stage: str, steps: int, noise_multiplier: float, random: str = "os-entropy", attempt: int = 1
) -> None:
    ledger.charge(
        stage=stage, attempt=attempt, steps=steps, noise_multiplier=noise_multiplier, sample_rate=1.0, clip_norm=1.25,
        random=random, planned=10_000,
    )  # fmt: skip


def complete(run: RunDir, stage: str, result: StageResult, lines: int, **settings: Any) -> None:
    """Run a stage as the real ones do, but for its work; ``lines`` of metrics at most."""
    begun = run.begin(stage, schema.as_dict(schema.build(stage, settings)), {})
    log = MetricsLog(begun.directory / "metrics.jsonl")
    rng = np.random.default_rng(5)
    if stage == "generate":
        sheet = rng.integers(0, 256, (24, 16, 3), dtype=np.uint8)
        Image.fromarray(sheet).resize((1024, 384)).save(begun.directory / "preview.png")
    elif stage == "pretrain":
        for step in range(min(lines, 8)):
            log.write(step=step + 1, similarity=0.6 - 0.2 / (step + 1))
    else:
        for step in range(min(lines, result.steps)):
            norms = {"update_norm": float(rng.normal(3, 0.1)), "weight_norm": 0.4 * math.sqrt(step)}
            log.write(step=step, **norms, secret=12321.5)
    finish(run, stage, result)


def finish(run: RunDir, stage: str, result: StageResult) -> None:
    """As the stages do: a private result is sealed in the ledger."""
    if not isinstance(result, PrivateResult):
        run.finish(stage, {}, result)
        return
    ledger = Ledger.open(run.privacy_dir / "ledger.jsonl")
    ledger.seal_result(stage=stage, attempt=1, digest=result_digest(result))
    run.finish(stage, {}, result, ledger_head=ledger.head)


def make_run(path: Path, stages: int = 4, lines: int = 1, **changes: Any) -> RunDir:
    """A run whose first ``stages`` stages are done; ``changes`` go into the results of the private ones.

    A single line of metrics makes no curve, which saves the time of drawing it.
    """
    run = RunDir.open(path, create=True)
    with run.lock():
        if stages > 0:
            complete(run, "generate", GENERATED, lines)
        if stages > 1:
            complete(run, "pretrain", PRETRAINED, lines)
        if stages > 2:
            budget = {"epsilon": 1.0, "delta": 1e-5, "examples": 1437}
            atomic_write(run.privacy_dir / "plan.json", json.dumps({"format": 1, **budget}))
            atomic_write(run.private_dir / "notes.json", json.dumps({"training_loss": CANARY}))
            ledger = Ledger.create(run.privacy_dir / "ledger.jsonl", examples=1437, budget=budget)
            charge(ledger, "probe", 123, 133.7, changes.get("random", "os-entropy"))
            complete(run, "probe", private_result("probe", **changes), lines, views=4, clip_norm=1.25)
        if stages > 3:
            charge(Ledger.open(ledger.path), "finetune", 22, 30.0)
            complete(run, "finetune", private_result("finetune", **changes), lines, views=4, clip_norm=1.25)
    return run


def written(run: RunDir) -> str:
    return page.write(run).read_text(encoding="utf-8")
