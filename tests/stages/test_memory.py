"""How much memory a set of large images takes, as a multiple of its own bytes: once where it has to be read, else less.

Each case runs in a process of its own, which has done the same work on a few images before; what is measured is the
peak of its resident memory above that.
"""

from __future__ import annotations

import hashlib
import json
import resource
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rank_processes import process_of

from dprandp import pretrain
from dprandp.config.schema import build
from dprandp.data import open_dataset
from dprandp.pretrain import wrn
from dprandp.runs.console import Console
from dprandp.runs.context import Context
from dprandp.runs.directory import RunDir
from dprandp.vision.images import to_input

RANDOM, PER_SHARD, PIXELS = np.random.default_rng(0), 64, 96e6


def generated(folder: Path, count: int, side: int = 256) -> Path:
    """A run that looks as if it had generated."""
    stage = RunDir.open(folder, create=True).stage_dir("generate")
    stage.mkdir()
    shards = []
    for start in range(0, count, PER_SHARD):
        path = stage / f"shard-{len(shards):05d}.npy"
        number = min(PER_SHARD, count - start)
        np.save(path, RANDOM.integers(0, 256, (number, side, side, 3), dtype=np.uint8))
        with open(path, "rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        shards.append({"file": path.name, "count": number, "sha256": digest})
    made = {"process": "dead-leaves", "seed": 0, "count": count, "resolution": side, "shards": shards}
    (stage / "manifest.json").write_text(json.dumps(made))
    return folder


def context_of(run: Path) -> Context:
    return Context(RunDir.open(run, create=False), Console(quiet=True), torch.device("cpu"), Path("data"))


def steps(run: Path) -> None:
    """Of training on eight images: of the others nothing is read."""
    asked = {"arch": "wrn-10-1", "steps": 2, "batch_size": 8, "projection_hidden": 32, "colour": "both"}
    trainer = wrn.begun_trainer(build("pretrain", asked), context_of(run))
    for step in range(2):
        trainer.step(step)


def crops(run: Path) -> None:
    pretrain.synthetic_crops(context_of(run), 10**5, 0)


def private(path: Path) -> None:
    """What a private stage does with a data set before its first step, but for the features themselves."""
    dataset = open_dataset(f"npz:{path}", Path("data"))
    split = dataset.train()
    dataset.fingerprint()
    assert to_input(split.images).shape == (len(split.images), 3, 32, 32)
    to_input(dataset.test().images)


def npz(path: Path, count: int, channels: int) -> Path:
    """Nine tenths for training, as a file that is not compressed."""
    parts = {}
    for split, number in (("train", count - count // 10), ("test", count // 10)):
        parts[f"x_{split}"] = RANDOM.integers(0, 256, (number, 224, 224, channels), dtype=np.uint8)
        parts[f"y_{split}"] = np.arange(number) % 2
    np.savez(path, **parts, num_classes=2)
    return path


def peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def measured(sender: Connection, work: Callable[[Path], Any], few: Path, many: Path) -> None:
    torch.set_num_threads(1)
    work(few)
    before = peak()
    work(many)
    sender.send((peak() - before) / PIXELS)


# Work, channels of the data set it works on (None: a run), and most memory as a multiple of the bytes of the pixels.
# Steps hold no copy of the images: what is left is the allocator's. Crops of all need them once: pages of a mapped file
# count while there is room.
CASES = {"steps": (steps, None, 0.6), "crops": (crops, None, 1.4), "npz": (private, 3, 1.6), "grey": (private, 1, 1.6)}


@pytest.mark.parametrize("name", CASES)
def test_large_images_are_in_memory_once_at_most(tmp_path: Path, name: str) -> None:
    work, channels, most = CASES[name]
    if channels is None:
        few, many = generated(tmp_path / "few", 8), generated(tmp_path / "many", int(PIXELS / (3 * 256**2)))
    else:
        counts = 20, int(PIXELS / (channels * 224**2))
        few, many = (npz(tmp_path / f"{count}.npz", count, channels) for count in counts)
    process, receiver = process_of(measured, work, few, many)
    found = receiver.recv()
    process.join()
    assert found < most
