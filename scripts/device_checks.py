"""Whether a device computes what the CPU does: the correctness part of ``gpu_check.py``.

The reference is the CPU in float32. The device is held against it in float32 (no TF32), where it must agree but for the
order of additions, and in the precision that the package chooses for it, where it may be off by bfloat16's rounding.
"""

from __future__ import annotations

import contextlib
import functools
import math
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from benchmark import generator
from torch import Tensor

from dprandp import finetune, generate, pretrain, probe
from dprandp.config import schema
from dprandp.dpsgd import features
from dprandp.dpsgd.clipped_sums import Batch, ClippedSums, SumSettings
from dprandp.models import whitening
from dprandp.models.classifier import Classifier
from dprandp.models.extractor import build_extractor, extract
from dprandp.models.precision import AUTO, FLOAT32, decide
from dprandp.pretrain.contrastive import ContrastiveTrainer
from dprandp.privacy.clipping import clipped_softmax_sum, clipped_softmax_sum_of_units
from dprandp.privacy.randomness import SystemRandom, add_gaussian_noise
from dprandp.probe.head import HeadSettings, begin_head, update_head
from dprandp.runs.console import Console
from dprandp.runs.context import Context
from dprandp.runs.directory import RunDir
from dprandp.vision.views import ViewChoices

CPU = torch.device("cpu")
CLASSES, DIMS, CLIP_NORM = 10, 20, 0.5
TOLERANCE = {FLOAT32: 2e-3, AUTO: 0.2}
"""Relative to the norm of the CPU's result. Float32: at depth some ReLUs open on the other side."""

DEEP = {"layers": 2, "second_filters": 400}
PLAIN_PATCHNET = {"arch": "patchnet", "layers": 1}


@dataclass(frozen=True)
class Sizes:
    """What is checked, and how large.

    Attributes:
        architectures: name -> settings of ``pretrain``.
        records: of a clipped sum. views: K of each.
        images: of an extraction. rows, dims: of a head's features.
    """

    architectures: dict[str, dict[str, Any]]
    records: int
    views: tuple[int, ...]
    images: int
    rows: int
    dims: int


FULL = Sizes(
    {
        "patchnet": PLAIN_PATCHNET,
        "patchnet, two layers": PLAIN_PATCHNET | DEEP,
        "wrn-16-4": {"arch": "wrn-16-4"},
        "wrn-16-4, all stages": {"arch": "wrn-16-4", "feature_stages": "all", "layer_order": "norm-relu-conv"},
        "vit-4-64-4": {"arch": "vit-4-64-4"},
        "nf-resnet-50": {"arch": "nf-resnet-50"},
    },
    records=4, views=(1, 16), images=300, rows=20_000, dims=1024,
)  # fmt: skip
QUICK = Sizes(
    {
        "patchnet": PLAIN_PATCHNET | {"filters": 8},
        "patchnet, two layers": PLAIN_PATCHNET | {"filters": 8, "layers": 2, "second_filters": 8},
        "wrn-10-1, all stages": {"arch": "wrn-10-1", "feature_stages": "all"},
        "vit-1-16-16": {"arch": "vit-1-16-16"},
    },
    records=2, views=(1, 2), images=6, rows=200, dims=16,
)  # fmt: skip


@functools.cache
def images_of(resolution: int, count: int) -> Tensor:
    """Synthetic images, uint8 [count, 3, resolution, resolution]."""
    return generator.images(resolution, count)


@contextlib.contextmanager
def convolutions(asked: str) -> Iterator[None]:
    """With 'float32', no TF32 in convolutions either, which cuDNN uses by default."""
    default = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = default and asked != FLOAT32
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = default


def model_of(settings: dict[str, Any], device: torch.device, asked: str = AUTO) -> Classifier:
    """A classifier with random weights, whitened by images of a process; equal on all devices.

    Args:
        settings: of ``pretrain``. device: where it is put.
        asked: 'float32', or 'auto' for the precision that a stage would decide for.
    """
    extractor = build_extractor(schema.build("pretrain", settings), torch.Generator().manual_seed(0))
    seen = extract(extractor, images_of(32, 24), mirror=False)
    whitener = whitening.fit(seen, DIMS, parts=extractor.parts)
    extractor.precision = decide(asked, device.type)
    model = Classifier(extractor, whitener, CLASSES)
    model.head.data.normal_(std=0.5, generator=torch.Generator().manual_seed(1))
    return model.to(device).eval()


def batch_of(records: int) -> Batch:
    """Synthetic images with random labels."""
    labels = torch.randint(CLASSES, (records,), generator=torch.Generator().manual_seed(2))
    return Batch(images_of(32, records), labels, torch.arange(records))


def sums_of(model: Classifier, views: int) -> tuple[ClippedSums, dict[str, Tensor]]:
    """The package's clipped sums of a model, and the parameters to take them at."""
    parameters = {name: value.detach().clone() for name, value in model.named_parameters()}
    return ClippedSums(model, SumSettings(1.0, views, 0, True, CLIP_NORM)), parameters


def apart(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """The norm of the difference over that of what is expected; inf where a number is missing or not finite."""
    pairs = [(found[name].detach().double().cpu(), expected[name].detach().double().cpu()) for name in expected]
    difference, size = (torch.stack([value.norm() for value in each]).norm() for each in
                        ([a - b for a, b in pairs], [b for _, b in pairs]))  # fmt: skip
    relative = float(difference / size)
    return relative if relative == relative else float("inf")


def compared(
    made: Callable[[torch.device, str], dict[str, Tensor]], device: torch.device, kinds: Sequence[str] = (FLOAT32, AUTO)
) -> dict[str, Any]:
    """``made`` on the CPU in float32, and on the device in float32 and in the precision that a stage would choose."""
    expected = made(CPU, FLOAT32)
    found: dict[str, Any] = {"passed": True}
    for name in kinds:
        with convolutions(name):
            error = apart(made(device, name), expected)
        found[f"{name} error"], found["passed"] = error, found["passed"] and error <= TOLERANCE[name]
    return found


def checks(device: torch.device, sizes: Sizes) -> Iterator[tuple[str, Callable[[], dict[str, Any]]]]:
    """Name and work of each check; the work returns facts, among them ``passed``."""
    wide = next(s for s in sizes.architectures.values() if s["arch"].startswith("wrn"))
    yield "stages", lambda: _stages(device, wide)
    # The contrast's gradient is a small difference of large parts, so it is compared in float32 alone.
    yield "pretraining step", lambda: compared(
        lambda where, asked: _pretraining(where, asked, wide, sizes.records)[0], device, (FLOAT32,)
    )
    yield "pretraining embeddings", lambda: compared(
        lambda where, asked: _pretraining(where, asked, wide, sizes.records)[1], device
    )
    yield "noise", lambda: _noise(device)
    for views in (None, *sizes.views[1:]):
        yield f"head steps, {views or 1} views", lambda views=views: compared(
            lambda where, asked: _head_steps(where, sizes, views), device
        )
    yield "head steps, sent in blocks", lambda: compared(
        lambda where, asked: _head_steps(where, sizes, None, stay=True), device
    )
    yield "head step, units", lambda: compared(lambda where, asked: _units(where, sizes), device)
    for name, settings in sizes.architectures.items():
        yield f"features, {name}", lambda s=settings: compared(
            lambda where, asked: _features(where, asked, s, sizes.images), device
        )
        for views in sizes.views if settings["arch"] != "nf-resnet-50" else sizes.views[:1]:
            yield f"clipped sum, {name}, {views} views", lambda s=settings, k=views: compared(
                lambda where, asked: _clipped_sum(where, asked, s, sizes.records, k), device
            )


def _noise(device: torch.device) -> dict[str, Any]:
    values = add_gaussian_noise({"w": torch.zeros(40_000, device=device)}, 3.0, SystemRandom())["w"]
    deviation = float(values.std())
    return {"passed": values.device.type == device.type and abs(deviation - 3) < 0.1, "deviation of 3": deviation}


def _head_steps(device: torch.device, sizes: Sizes, views: int | None, stay: bool = False) -> dict[str, Tensor]:
    """Three noiseless steps of a head; ``stay``: its features stay on the CPU."""
    rows, labels = _rows(sizes, views)
    if stay:
        labels = labels.to(device)
    else:
        rows, labels = features.placed(rows, labels, CLASSES, device)
    state = begin_head(torch.zeros(sizes.dims, CLASSES, device=device))
    settings, batch = HeadSettings(10.0, 0.9, "average"), torch.arange(0, len(rows), 2)
    for number in range(3):
        chosen = batch if number % 2 else None
        clipped = clipped_softmax_sum(rows, labels, state["head"], CLIP_NORM, rows=chosen)
        update_head(state, clipped / len(rows), settings, number, 3)
    return state


def _rows(sizes: Sizes, views: int | None) -> tuple[Tensor, Tensor]:
    shape = (sizes.rows, sizes.dims) if views is None else (sizes.rows // views, views, sizes.dims)
    random = torch.Generator().manual_seed(3)
    rows = torch.nn.functional.normalize(torch.randn(shape, generator=random), dim=-1)
    return rows, torch.randint(CLASSES, (len(rows),), generator=random)


def _units(device: torch.device, sizes: Sizes) -> dict[str, Tensor]:
    rows, labels = _rows(sizes, None)
    images = torch.arange(0, len(rows) - len(rows) % 4)
    offsets = torch.cat([torch.arange(0, len(images) // 2, 1), torch.arange(len(images) // 2, len(images) + 1, 2)])
    rows, labels = features.placed(rows, labels, CLASSES, device)
    weight = torch.randn(sizes.dims, CLASSES, generator=torch.Generator().manual_seed(4)).to(device)
    return {"sum": clipped_softmax_sum_of_units(rows, labels, offsets, weight, CLIP_NORM, rows=images)}


def _features(device: torch.device, asked: str, settings: dict[str, Any], images: int) -> dict[str, Tensor]:
    model = model_of(settings, device, asked)
    return {"features": extract(model.extractor, images_of(32, images), mirror=True, after=model.whitener)}


def _clipped_sum(
    device: torch.device, asked: str, settings: dict[str, Any], records: int, views: int
) -> dict[str, Tensor]:
    sums, parameters = sums_of(model_of(settings, device, asked), views)
    return sums.of(parameters, 0, batch_of(records))


def _pretraining(
    device: torch.device, asked: str, settings: dict[str, Any], images: int
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The gradient of a step, and its embeddings, for choices of views that were drawn on the CPU."""
    kind = decide(asked, device.type)
    sizes = {"steps": 4, "batch_size": 4 * images, "projection_hidden": 32}
    given = schema.build("pretrain", settings | sizes | {"precision": kind})

    def trainer(where: torch.device) -> ContrastiveTrainer:
        network = build_extractor(given, torch.Generator().manual_seed(0))
        return ContrastiveTrainer(network, given, images_of(64, 4 * images).to(where))

    chosen, *views = trainer(CPU).draw(0)
    made = trainer(device)
    drawn = chosen.to(device), *(_moved(each, device) for each in views)
    with torch.no_grad():
        embedded = torch.cat(made.embed(*drawn))
    made.backward(*drawn)
    gradients = {name: value.grad.clone() for name, value in made.network.named_parameters() if value.grad is not None}
    if not torch.isfinite(made.step(1)):
        raise RuntimeError("a whole step has no finite loss")
    return gradients, {"embeddings": embedded}


def _moved(choices: ViewChoices, device: torch.device) -> ViewChoices:
    names = ("boxes", "flip", "factors", "grey")
    return replace(choices, **{name: getattr(choices, name).to(device) for name in names})


def _stages(device: torch.device, settings: dict[str, Any]) -> dict[str, Any]:
    """Generate to fine-tune by the stages themselves, without noise, the same batches on both devices."""
    losses: list[list[float]] = []
    with tempfile.TemporaryDirectory() as folder:
        public, data = Path(folder) / "public", _data(Path(folder) / "data.npz")
        with stage_context(public, CPU) as given:
            generate.run(schema.build("generate", {"process": "dead-leaves", "count": 60, "resolution": 32}), given)
            pretrain.run(schema.build("pretrain", settings | {"random_init": True}), given)
        for where, kind in ((CPU, FLOAT32), *((device, kind) for kind in TOLERANCE)):
            run = Path(shutil.copytree(public, Path(folder) / str(len(losses))))
            with stage_context(run, where) as given, convolutions(kind):
                values = {"data": data, "epsilon": math.inf, "precision": kind}
                fitted = probe.run(schema.build("probe", values | PROBE), given)
                tuned = finetune.run(schema.build("finetune", values | FINETUNE), given)
            losses.append([fitted.loss, tuned.loss])
    expected, *found = losses
    errors = [max(abs(a / b - 1) for a, b in zip(each, expected, strict=True)) for each in found]
    facts = {f"{kind} error": error for kind, error in zip(TOLERANCE, errors, strict=True)}
    return {"passed": all(e <= most for e, most in zip(errors, TOLERANCE.values(), strict=True)), **facts}


def _data(path: Path) -> str:
    """Synthetic images with random labels as a data set; its name."""
    shown = images_of(32, 48).permute(0, 2, 3, 1).numpy()
    labels = np.arange(48) % 3
    np.savez(path, x_train=shown, y_train=labels, x_test=shown[:24], y_test=labels[:24], num_classes=np.array(3))
    return f"npz:{path}"


PROBE = {"steps": 6, "dims": 32, "statistics_images": 30, "statistics_views": 2}
FINETUNE = {"steps": 2, "batch_size": 16, "views": 2, "refit_steps": 4}


@contextlib.contextmanager
def stage_context(run: Path, device: torch.device, workers: int = 1) -> Iterator[Context]:
    """A context on a run, locked, whose randomness repeats."""
    rundir = RunDir.open(run, create=True)
    with rundir.lock():
        yield Context(rundir=rundir, console=Console(quiet=True), device=device, data_dir=run, workers=workers,
                      insecure_seed=5)  # fmt: skip
