"""How fast a device does what the stages do, beside training without privacy: the second part of ``gpu_check.py``.

Every rate is of the package's own code, warmed up, in the precision that it chooses. A private step's plain side is one
forward and backward pass of the same views in the same precision, and SGD.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from device_checks import CLASSES, CLIP_NORM, batch_of, images_of, model_of, stage_context, sums_of
from torch import Tensor
from torch.nn import functional

from dprandp import generate
from dprandp.config import schema
from dprandp.dpsgd import features
from dprandp.dpsgd.clipped_sums import Batch
from dprandp.models.extractor import build_extractor, extract
from dprandp.models.precision import AUTO, autocast, decide
from dprandp.pretrain.contrastive import ContrastiveTrainer
from dprandp.privacy.clipping import clipped_softmax_sum
from dprandp.privacy.randomness import SystemRandom, add_gaussian_noise
from dprandp.probe.head import HeadSettings, begin_head, update_head
from dprandp.vision.views import keyed_uniforms, private_views

DISTINCT = 64
"""Images that are made; larger batches repeat them."""


@dataclass(frozen=True)
class Scale:
    """How much is timed.

    Attributes:
        architectures: name -> settings of ``pretrain``. steps: (records, views) of a private step.
        pretraining: settings of the contrastive training that is timed.
        images: of an extraction. rows, dims: of a head's features. made: images of a process.
        seconds: of each measurement.
    """

    architectures: dict[str, dict[str, Any]]
    steps: tuple[tuple[int, int], ...]
    pretraining: dict[str, Any]
    images: int
    rows: int
    dims: int
    made: int
    seconds: float


FULL = Scale(
    {
        "wrn-16-4": {"arch": "wrn-16-4"},
        "patchnet": {"arch": "patchnet", "filters": 1600, "layers": 1},
        "vit-4-64-4": {"arch": "vit-4-64-4"},
    },
    ((1024, 1), (128, 16)), {"arch": "wrn-16-4", "batch_size": 256, "projection_hidden": 4096, "steps": 10**6},
    images=8192, rows=50_000, dims=4096, made=1000, seconds=2.0,
)  # fmt: skip
QUICK = Scale(
    {"wrn-10-1": {"arch": "wrn-10-1"}},
    ((2, 1), (2, 2)), {"arch": "wrn-10-1", "batch_size": 2, "projection_hidden": 16, "steps": 10**6},
    images=8, rows=50, dims=8, made=8, seconds=0.0,
)  # fmt: skip


def rates(device: torch.device, scale: Scale) -> Iterator[tuple[str, Callable[[], dict[str, Any]]]]:
    """Name and work of each measurement; the work returns a row: unit, rate (units a second), peak_gb, maybe more."""
    yield "pretraining step", lambda: _pretraining(device, scale)
    for name, settings in scale.architectures.items():
        for records, views in scale.steps:
            yield f"private step, {name}, {views} views", lambda s=settings, n=records, k=views: _private(
                device, scale, s, n, k
            )
    for name, settings in scale.architectures.items():
        yield f"features, {name}", lambda s=settings: _features(device, scale, s)
    for where in ("on the device", "sent in blocks"):
        yield f"head step, features {where}", lambda at=where: _head(device, scale, at == "on the device")
    yield "noise", lambda: _noise(device, scale)
    yield "images of the process", lambda: _images(device, scale)


def timed(work: Callable[[], object], count: int, device: torch.device, seconds: float) -> dict[str, Any]:
    """Units of ``work``, which does ``count`` a call, a second; and the peak memory of the device in GB."""
    cuda = device.type == "cuda"
    work()
    if cuda:
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
    started, calls = time.perf_counter(), 0
    while not calls or time.perf_counter() - started < seconds:
        work()
        calls += 1
        if cuda:
            torch.cuda.synchronize(device)  # calls would pile up
    rate = calls * count / (time.perf_counter() - started)
    return {"rate": rate, "peak_gb": torch.cuda.max_memory_allocated(device) / 1e9 if cuda else None}


def _repeated(resolution: int, count: int) -> Tensor:
    made = images_of(resolution, min(count, DISTINCT))
    return made.repeat(-(-count // len(made)), 1, 1, 1)[:count]


def _pretraining(device: torch.device, scale: Scale) -> dict[str, Any]:
    """A whole contrastive step, and nothing but forward and backward of the same views."""
    kind = decide(AUTO, device.type)
    given = schema.build("pretrain", scale.pretraining | {"precision": kind})
    network = build_extractor(given, torch.Generator().manual_seed(0))
    trainer = ContrastiveTrainer(network, given, _repeated(64, 2 * given.batch_size).to(device))
    steps, views = iter(range(given.steps)), 2 * given.batch_size
    found = timed(lambda: trainer.step(next(steps)), views, device, scale.seconds)
    chosen, first, second = trainer.draw(0)
    ready = torch.cat([trainer.views.apply(trainer.images[chosen], each) for each in (first, second)])

    def plain() -> None:
        trainer.optimizer.zero_grad(set_to_none=True)
        with autocast(network, device):
            seen = network.normalise(ready).to(memory_format=torch.channels_last)
            embedded = trainer.head(network.trunk(seen))
        embedded.float().square().mean().backward()

    return {"unit": "views", **found, "plain": timed(plain, views, device, scale.seconds)["rate"]}


def _private(
    device: torch.device, scale: Scale, settings: dict[str, Any], records: int, views: int
) -> dict[str, Any]:
    """A clipped sum with its noise, and a plain SGD step on the same views."""
    sums, parameters = sums_of(model_of(settings, device), views)
    kept = batch_of(min(records, DISTINCT))
    repeats = -(-records // len(kept.members))
    images = kept.images.repeat(repeats, 1, 1, 1)[:records].to(device)
    labels, members = kept.labels.repeat(repeats)[:records].to(device), torch.arange(records)
    batch, random, count = Batch(images, labels, members), SystemRandom(), records * views

    def private() -> None:
        add_gaussian_noise(sums.of(parameters, 0, batch), 9 * CLIP_NORM, random)

    found = timed(private, count, device, scale.seconds)
    model = model_of(settings, device)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    at_once = 512

    def plain() -> None:
        optimizer.zero_grad(set_to_none=True)
        draws = keyed_uniforms(members, 0, 0, views)
        seen = private_views(images, views, draws, flip=True).flatten(0, 1)
        answers = labels.repeat_interleave(views, output_size=count)
        for start in range(0, count, at_once):  # as many views together as a private step has
            part = slice(start, start + at_once)
            scores = model(model.extractor.normalise(seen[part]).contiguous(memory_format=torch.channels_last))
            (functional.cross_entropy(scores, answers[part], reduction="sum") / count).backward()
        optimizer.step()

    return {"unit": "views", **found, "plain": timed(plain, count, device, scale.seconds)["rate"]}


def _features(device: torch.device, scale: Scale, settings: dict[str, Any]) -> dict[str, Any]:
    model, images = model_of(settings, device), _repeated(32, scale.images)

    def work() -> None:
        extract(model.extractor, images, mirror=False, after=model.whitener)

    return {"unit": "images", **timed(work, scale.images, device, scale.seconds)}


def _head(device: torch.device, scale: Scale, here: bool) -> dict[str, Any]:
    """A full-batch step of the probe, noise and update included."""
    rows = functional.normalize(torch.randn(scale.rows, scale.dims), dim=1)
    labels = torch.randint(CLASSES, (scale.rows,))
    placed, answers = features.placed(rows, labels, CLASSES, device)
    seen = placed if here else rows
    state, random = begin_head(torch.zeros(scale.dims, CLASSES, device=device)), SystemRandom()

    def work() -> None:
        clipped = clipped_softmax_sum(seen, answers, state["head"], CLIP_NORM)
        noisy = add_gaussian_noise({"head": clipped}, 9 * CLIP_NORM, random)["head"]
        update_head(state, noisy / scale.rows, HeadSettings(1.0, 0.9, "average"), 0, 2)

    return {"unit": "steps", **timed(work, 1, device, scale.seconds)}


def _noise(device: torch.device, scale: Scale) -> dict[str, Any]:
    """Noise for a wrn-16-4, drawn on the CPU and sent: a private step cannot be faster."""
    sums, random = {"w": torch.zeros(2_750_000 if scale.seconds else 100, device=device)}, SystemRandom()
    return {"unit": "steps", **timed(lambda: add_gaussian_noise(sums, 1.0, random), 1, device, scale.seconds)}


def _images(device: torch.device, scale: Scale) -> dict[str, Any]:
    """``generate``, on the CPU's cores."""
    with tempfile.TemporaryDirectory() as folder, stage_context(
        Path(folder) / "run", device, len(os.sched_getaffinity(0))
    ) as given:
        process = "stylegan-oriented" if scale.seconds else "dead-leaves"
        values = {"process": process, "count": scale.made, "resolution": 64 if scale.seconds else 32}
        made = generate.run(schema.build("generate", values), given)
    return {"unit": "images", "rate": made.images_per_second, "peak_gb": None}
