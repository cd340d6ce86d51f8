"""How many images does a head need at an ε? The probe of a shipped prior, simulated on parts of Fashion-MNIST.

For each number of classes K, number of images N and ε: the accuracy on held-out training images of a head that is
fitted with the probe's arithmetic and noise (``tune.simulate``), and which part of the gain over guessing it
keeps, compared with the same head on the same images without noise. ``dprandp/dpsgd/budget.py`` holds the result.

    python scripts/small_data.py --data-dir data
"""

from __future__ import annotations

import argparse
import math
import tempfile
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from dprandp import pipeline, priors
from dprandp.config.presets import INPUT_SIZE
from dprandp.config.schema import ProbeConfig
from dprandp.data import open_dataset
from dprandp.dpsgd.budget import default_delta
from dprandp.models.extractor import extract
from dprandp.privacy.gaussian_dp import gaussian_dp_mu
from dprandp.probe import public_part
from dprandp.probe.head import HeadSettings, default_lr
from dprandp.runs.console import Console
from dprandp.runs.context import Context
from dprandp.runs.directory import RunDir
from dprandp.tune import simulate
from dprandp.vision.images import as_declared, to_input

COUNTS = (100, 300, 1000, 3000)
EPSILONS = (0.5, 1.0, 3.0, 8.0)
TASKS = {10: range(10), 4: (0, 2, 4, 6), 2: (0, 6)}
"""Classes of a task, by their number; the fewer, the more alike (shirts and coats)."""
HELD_OUT, SEEDS = 4000, 3


def features_of(data_dir: Path, prior: str, count: int) -> tuple[Tensor, Tensor]:
    """Whitened features and labels of random training images."""
    with tempfile.TemporaryDirectory() as folder:
        rundir = RunDir.open(Path(folder) / "run", create=True)
        with rundir.lock():
            context = Context(rundir, Console(), torch.device("cpu"), data_dir)
            config = ProbeConfig(data="fashion-mnist")
            pipeline.adopt(priors.public_stages(prior, config.statistics_images), context)
            dataset = open_dataset("fashion-mnist", data_dir)
            split = dataset.train()
            chosen = np.random.default_rng(0).permutation(len(split.labels))[:count]
            spec = dataset.spec
            images = as_declared(
                to_input(split.images[chosen], INPUT_SIZE), channels=spec.channels, height=spec.height, width=spec.width
            )
            extractor, mirror, whitener = public_part(config, context, spec)
            with context.console.progress(len(images), "features") as progress:
                rows = extract(extractor, images, mirror=mirror, after=whitener, on_batch=progress.advance)
    return rows, torch.from_numpy(split.labels[chosen])


def accuracy(
    features: Tensor, labels: Tensor, classes: tuple[int, ...], count: int, epsilon: float, delta: float, seed: int
) -> float:
    """Of the head on held-out images; an infinite ε is a head without noise."""
    config, generator = ProbeConfig(), torch.Generator().manual_seed(seed)
    of = torch.full((10,), -1)
    of[torch.tensor(classes)] = torch.arange(len(classes))
    targets = of[labels]
    rows = torch.nonzero(targets >= 0).flatten()
    held, rows = rows[rows < HELD_OUT], rows[rows >= HELD_OUT]
    rows = rows[torch.randperm(len(rows), generator=generator)[:count]]
    mu = math.inf if math.isinf(epsilon) else gaussian_dp_mu(epsilon, delta)
    lr = default_lr(epsilon, delta, count, config.steps, config.clip_norm)
    settings = HeadSettings(lr, config.momentum, config.released)
    head = simulate(
        features[rows], targets[rows], len(classes), config.steps, config.clip_norm, mu, len(rows), settings, generator
    )
    return float(((features[held] @ head).argmax(dim=1) == targets[held]).float().mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path, default=Path("data"))
    parser.add_argument("--prior", default="patchnet-tiny-grey")
    given = parser.parse_args()
    features, labels = features_of(given.data_dir, given.prior, HELD_OUT + 16_000)
    print("| K | N | ε | μN/K | accuracy | without noise | part of the gain that is kept |")
    print("|---|---|---|---|---|---|---|")
    for classes in TASKS.values():
        for count in COUNTS:
            delta, chance = default_delta(count), 1 / len(classes)
            free = [accuracy(features, labels, tuple(classes), count, math.inf, delta, s) for s in range(SEEDS)]
            for epsilon in EPSILONS:
                found = [accuracy(features, labels, tuple(classes), count, epsilon, delta, s) for s in range(SEEDS)]
                kept = (np.mean(found) - chance) / (np.mean(free) - chance)
                signal = gaussian_dp_mu(epsilon, delta) * count / len(classes)
                print(
                    f"| {len(classes)} | {count} | {epsilon:g} | {signal:.3g} | {100 * np.mean(found):.1f} "
                    f"| {100 * np.mean(free):.1f} | {kept:.2f} |", flush=True,
                )  # fmt: skip


if __name__ == "__main__":
    main()
