"""Time and memory of our own side against one size at a time, relative to the smallest size.

All points of a curve are timed in turn in one process; each is weighed in a process of its own.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmark import finetuning, probe
from benchmark.memory import peak_in_child
from benchmark.timing import Work, alternate, ratios, spread
from dprandp import generate
from dprandp.config.schema import GenerateConfig, PretrainConfig
from dprandp.models.extractor import build_extractor
from dprandp.pretrain.contrastive import ContrastiveTrainer
from dprandp.runs.console import Console
from dprandp.runs.context import Context
from dprandp.runs.directory import RunDir
from dprandp.synth import stylegan
from dprandp.vision.images import ImageSet

Say = Callable[[str], None]


@dataclass(frozen=True)
class Curve:
    """One curve.

    Attributes:
        title: of what.
        axis: against what.
        values: scale -> sizes, ascending.
        make: (scale, size) -> the work; runs in the child as well.
    """

    title: str
    axis: str
    values: Mapping[str, tuple[int, ...]]
    make: Callable[[str, int], Work]


def _probe(scale: str, count: int) -> Work:
    return probe.our_step(*probe.rows(count, {"full": 2048, "tiny": 8}[scale]))[0]


def _finetune(examples: int, views: int, width: int, scale: str) -> Work:
    arch = f"wrn-16-{width}" if scale == "full" else "wrn-10-1"
    return finetuning.Bench(finetuning.Shape(arch, examples, views)).ours()


def _stylegan(scale: str, resolution: int) -> Work:
    return lambda: stylegan.render(np.random.default_rng(0), stylegan.CHUNK, resolution)


def _stage(scale: str, count: int) -> Work:
    """The stage itself: shards, manifest and preview in a run directory."""
    config = GenerateConfig(process="dead-leaves", count=count, resolution=32)

    def work() -> None:
        with tempfile.TemporaryDirectory() as folder:
            rundir = RunDir.open(Path(folder) / "run", create=True)
            with rundir.lock():
                device = torch.device("cpu")
                generate.run(config, Context(rundir, Console(quiet=True), device, Path(folder), workers=1))

    return work


def _pretraining(scale: str, count: int) -> Work:
    """Five contrastive steps on memory-mapped images of noise, in shards as ``generate`` writes them."""
    arch, resolution, batch, shard = {"full": ("wrn-16-4", 64, 64, 5000), "tiny": ("wrn-10-1", 8, 2, 2)}[scale]
    draw, parts = np.random.default_rng(0), []
    with tempfile.TemporaryDirectory() as folder:
        for block in range(count // shard):
            path = Path(folder) / f"{block}.npy"
            np.save(path, draw.integers(256, size=(shard, resolution, resolution, 3), dtype=np.uint8))
            parts.append(np.load(path, mmap_mode="r"))  # keeps the file after the folder is removed
    config = PretrainConfig(arch=arch, batch_size=batch, projection_hidden=64, steps=10_000, precision="float32")
    trainer = ContrastiveTrainer(build_extractor(config), config, ImageSet(parts))
    steps = iter(range(config.steps))

    def work() -> None:
        for _ in range(5):
            trainer.step(next(steps))

    return work


def _sizes(*full: int, tiny: tuple[int, ...] = (2, 4)) -> dict[str, tuple[int, ...]]:
    return {"full": full, "tiny": tiny}


CURVES: dict[str, Curve] = {
    "probe-examples": Curve("probe step, 2,048 dimensions", "examples N", _sizes(6250, 12_500, 25_000, 50_000), _probe),
    "finetune-views": Curve(
        "fine-tuning step, wrn-16-4, 2 examples", "views K", _sizes(1, 2, 4, 8, 16),
        lambda scale, views: _finetune(2, views, 4, scale),
    ),
    "finetune-batch": Curve(
        "fine-tuning step, wrn-16-4, 4 views", "examples of a batch", _sizes(2, 4, 8, 16),
        lambda scale, examples: _finetune(examples, 4, 4, scale),
    ),
    "finetune-width": Curve(
        "fine-tuning step, wrn-16-k, 2 examples x 4 views", "width factor k (parameters ~ k²)", _sizes(1, 2, 4, 8),
        lambda scale, width: _finetune(2, 4, width, scale),
    ),
    "generator-resolution": Curve(
        f"stylegan-oriented, {stylegan.CHUNK} images", "resolution, pixels", _sizes(32, 64, 128, tiny=(8, 16)),
        _stylegan,
    ),
    "generator-images": Curve(
        "generate, dead-leaves at 32 px", "images", _sizes(500, 1000, 2000, 4000, tiny=(100, 200)), _stage
    ),
    "pretraining-images": Curve(
        "five contrastive steps, wrn-16-4, 64 images of 64 px each", "images, memory-mapped",
        _sizes(10_000, 20_000, 40_000), _pretraining,
    ),
}  # fmt: skip


def measure(name: str, scale: str, rounds: int, say: Say) -> dict[str, Any]:
    """One curve as plain values: curve, title, axis, points (size, seconds, time, bytes, memory).

    ``time`` is a Spread and ``memory`` a number, both relative to the first point.
    """
    curve = CURVES[name]
    sizes = curve.values[scale]
    say(f"bench: curve {name}")
    samples = alternate({str(size): curve.make(scale, size) for size in sizes}, rounds)
    walls = {size: [sample.wall for sample in samples[str(size)]] for size in sizes}
    bytes_of = {size: peak_in_child("curve", name, scale, str(size)).bytes for size in sizes}
    first = sizes[0]
    points = [
        {
            "size": size,
            "seconds": spread(walls[size]).median,
            "time": asdict(ratios(walls[size], walls[first])),
            "bytes": bytes_of[size],
            "memory": bytes_of[size] / max(1, bytes_of[first]),
        }
        for size in sizes
    ]
    return {"curve": name, "title": curve.title, "axis": curve.axis, "points": points}
