"""How much memory a set of large images takes, as a multiple of its own bytes: once where it has to be read, else less.

Each case runs in a process of its own, forked from one that has loaded the libraries and done the same work on a few
images; what is measured is the peak of its resident memory above that.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = '''
import hashlib, json, os, resource, sys
from pathlib import Path

import numpy as np
import torch

from dprandp.config.schema import build
from dprandp.runs.console import Console
from dprandp.data import open_dataset
from dprandp.runs.directory import RunDir
from dprandp import pretrain
from dprandp.pretrain import contrastive
from dprandp.runs.context import Context
from dprandp.vision.images import to_input

torch.set_num_threads(1)
RANDOM, PER_SHARD, PIXELS = np.random.default_rng(0), 64, 96e6


def generated(folder, count, side=256):
    """A run that looks as if it had generated."""
    rundir = RunDir.open(folder, create=True)
    stage = rundir.stage_dir("generate")
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
    return Context(rundir, Console(quiet=True), torch.device("cpu"), Path("data"))


def steps(context):
    """Of training on eight images: of the others nothing is read."""
    asked = {"arch": "wrn-10-1", "steps": 2, "batch_size": 8, "projection_hidden": 32, "colour": "both"}
    trainer = contrastive.begun_trainer(build("pretrain", asked), context)
    for step in range(2):
        trainer.step(step)


def private(path):
    """What a private stage does with a data set before its first step, but for the features themselves."""
    dataset = open_dataset(f"npz:{path}", Path("data"))
    split = dataset.train()
    dataset.fingerprint()
    assert to_input(split.images, 32).shape == (len(split.images), 3, 32, 32)
    to_input(dataset.test().images, 32)


def npz(path, count, channels):
    """Nine tenths for training, as a file that is not compressed."""
    parts = {}
    for split, number in (("train", count - count // 10), ("test", count // 10)):
        parts[f"x_{split}"] = RANDOM.integers(0, 256, (number, 224, 224, channels), dtype=np.uint8)
        parts[f"y_{split}"] = np.arange(number) % 2
    np.savez(path, **parts, num_classes=2)
    return path


def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


folder = Path(sys.argv[1])
runs = generated(folder / "few", 8), generated(folder / "many", int(PIXELS / (3 * 256**2)))
WORK = {"steps": (steps, runs), "crops": (lambda context: pretrain.synthetic_crops(context, 10**5, 32, 0), runs)}
for name, channels in (("npz", 3), ("grey npz", 1)):
    counts = 20, int(PIXELS / (channels * 224**2))
    WORK[name] = private, [npz(folder / f"{count} {name}.npz", count, channels) for count in counts]
for name, (work, (small, large)) in WORK.items():
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        work(small)
        before = peak()
        work(large)
        os.write(writer, json.dumps({name: (peak() - before) / PIXELS}).encode() + b"\\n")
        os._exit(0)
    os.close(writer)
    os.waitpid(child, 0)
    print(os.read(reader, 1000).decode(), end="", flush=True)
'''

MOST = {"steps": 0.6, "crops": 1.4, "npz": 1.6, "grey npz": 1.6}
"""Peak memory as a multiple of the bytes of the pixels. Steps hold no copy of the images: what is left is the
allocator's. Crops of all need them once: pages of a mapped file count while there is room."""


@pytest.mark.slow
def test_large_images_are_in_memory_once_at_most(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", SCRIPT, str(tmp_path)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    found: dict[str, float] = {}
    for line in done.stdout.splitlines():
        found |= json.loads(line)
    assert found.keys() == MOST.keys()
    assert {name: value for name, value in found.items() if value >= MOST[name]} == {}
