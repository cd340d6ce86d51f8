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

PIXELS = 96e6

SCRIPT = '''
import hashlib, json, os, resource, sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch

from dprandp.config.schema import build
from dprandp.runs.console import Console
from dprandp.data import open_dataset
from dprandp.runs.directory import RunDir
from dprandp import pretrain
from dprandp.pretrain import wrn
from dprandp.runs.context import Context
from dprandp.vision.images import to_input

torch.set_num_threads(1)
RANDOM = np.random.default_rng(0)
PER_SHARD = 64


def generated(folder, count, side):
    """A run that looks as if it had generated; its bytes of pixels."""
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


def steps(context, **settings):
    asked = {"arch": "wrn-10-1", "steps": 2, "batch_size": 8, "projection_hidden": 32, **settings}
    trainer = wrn.begun_trainer(build("pretrain", asked), context)
    for step in range(2):
        trainer.step(step)


def private(path):
    """What a private stage does with a data set before its first step, but for the features themselves."""
    dataset = open_dataset(f"npz:{path}", Path("data"))
    split = dataset.train()
    dataset.fingerprint()
    assert to_input(split.images).shape == (len(split.images), 3, 32, 32)
    to_input(dataset.test().images)


def npz(path, count, channels):
    """Nine tenths for training, as a file that is not compressed."""
    parts = {}
    for split, number in (("train", count - count // 10), ("test", count // 10)):
        parts[f"x_{split}"] = RANDOM.integers(0, 256, (number, 224, 224, channels), dtype=np.uint8)
        parts[f"y_{split}"] = np.arange(number) % 2
    np.savez(path, **parts, num_classes=2)


WORK = {
    "rgb": lambda context: steps(context, colour="rgb"),
    "both": lambda context: steps(context, colour="both"),
    "grey": lambda context: steps(context, colour="grey"),
    "crops": lambda context: pretrain.synthetic_crops(context, 10**5, 0),
    "npz": private,
    "grey npz": private,
}


def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


folder, pixels = Path(sys.argv[1]), float(sys.argv[2])
few, many = generated(folder / "few", 8, 256), generated(folder / "many", int(pixels / (3 * 256**2)), 256)
inputs = dict.fromkeys(WORK, (few, many))
for name, channels in (("npz", 3), ("grey npz", 1)):
    paths = folder / f"few {name}.npz", folder / f"many {name}.npz"
    for path, count in zip(paths, (20, int(pixels / (channels * 224**2)))):
        npz(path, count, channels)
    inputs[name] = paths
for name, work in WORK.items():
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        small, large = inputs[name]
        work(small)
        before = peak()
        work(large)
        os.write(writer, json.dumps({name: (peak() - before) / pixels}).encode() + b"\\n")
        os._exit(0)
    os.close(writer)
    os.waitpid(child, 0)
    print(os.read(reader, 1000).decode(), end="", flush=True)
'''


@pytest.fixture(scope="module")
def copies(tmp_path_factory: pytest.TempPathFactory) -> dict[str, float]:
    """Case -> peak memory, as a multiple of the bytes of its pixels."""
    folder: Path = tmp_path_factory.mktemp("memory")
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(folder), str(PIXELS)], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, float] = {}
    for line in done.stdout.splitlines():
        found |= json.loads(line)
    return found


@pytest.mark.parametrize("colour", ["rgb", "both", "grey"])
def test_training_steps_hold_no_copy_of_the_images(copies: dict[str, float], colour: str) -> None:
    """Two steps of eight images; of the others nothing is read. What is left is the allocator's."""
    assert copies[colour] < 0.6


def test_crops_of_all_images_need_them_once_at_most(copies: dict[str, float]) -> None:
    """Pages of a memory-mapped file count as memory while there is room for them."""
    assert copies["crops"] < 1.4


@pytest.mark.parametrize("file", ["npz", "grey npz"])
def test_a_private_data_set_is_in_memory_once(copies: dict[str, float], file: str) -> None:
    assert copies[file] < 1.6
