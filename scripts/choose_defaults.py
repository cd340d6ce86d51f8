#!/usr/bin/env python3
"""Where the probe's defaults come from: clip norm, rate, steps, dimensions and whitening floor, on Fashion-MNIST.

    python scripts/choose_defaults.py --out runs/defaults --data-dir data

Only Fashion-MNIST's *training* split is read, as public data: 10,000 images are fitted, 4,000 others decide. The
private set that a setting is meant for enters through two numbers, N and ε; what matters is μN, the weight of N images
beside the noise, so n images with noise scaled by n/N stand for N. Finished rows are kept.
"""

from __future__ import annotations

import argparse
import itertools
from pathlib import Path

import torch
from experiment import add_row, dprandp, has_row, log_of, parser, read

from dprandp.cli import session
from dprandp.cli.flags import Options
from dprandp.config.presets import INPUT_SIZE
from dprandp.config.schema import ProbeConfig
from dprandp.data import open_dataset
from dprandp.dpsgd.features import public_whitener
from dprandp.models.extractor import extract
from dprandp.models.whitening import Whitener
from dprandp.pretrain import load_extractor
from dprandp.privacy.gaussian_dp import gaussian_dp_mu
from dprandp.probe.head import HeadSettings, lr_at
from dprandp.tune import simulate
from dprandp.vision.images import colour_of, to_input

DATA = "fashion-mnist"
FIT, HELD_OUT = 10_000, 4_000
DELTA = 1e-5
DEFAULT = {"clip_norm": 0.5, "lr_factor": 1.0, "steps": 120, "dims": 1024, "floor": 0.1}
TARGETS = [(1_400, 1.0), (5_000, 1.0), (5_000, 8.0), (50_000, 1.0), (50_000, 8.0)]
"""(N, ε): small and large data, little and much noise."""

VARIATIONS = [
    *({**DEFAULT, "lr_factor": lr, "steps": steps} for lr, steps in itertools.product((0.5, 1, 2), (60, 120))),
    *({**DEFAULT, "clip_norm": clip, "lr_factor": lr} for clip, lr in itertools.product((1, 0.25, 0.1), (0.5, 1, 2))),
    *({**DEFAULT, "dims": dims} for dims in (128, 512)),
    *({**DEFAULT, "floor": floor} for floor in (0.03, 0.3, 1.0)),
]


def main() -> None:
    """Fit what is missing, then print a line per setting and a column per target."""
    args = parser(__doc__, "runs/defaults").parse_args()
    log = log_of(args)
    if not args.table:
        dprandp("generate", "--run", args.out / "run")
        dprandp("pretrain", "--run", args.out / "run", "--data", DATA)
        for floor in sorted({setting["floor"] for setting in VARIATIONS}):
            measure(args, log, floor)
    print_table(read(log))


def measure(args: argparse.Namespace, log: Path, floor: float) -> None:
    """All missing rows of one whitening floor."""
    wanted = [
        (setting, target)
        for setting in VARIATIONS
        for target in TARGETS
        if setting["floor"] == floor and not has_row(log, {"setting": setting, "target": list(target)})
    ]
    if not wanted:
        return
    features, labels, whitener = public_features(args, floor)
    for setting, (examples, epsilon) in wanted:
        count = min(FIT, examples)
        mu = gaussian_dp_mu(epsilon, DELTA)
        lr = setting["lr_factor"] * lr_at(mu, examples, setting["steps"], setting["clip_norm"])
        rule = HeadSettings(lr, momentum=0.9, released="average")
        seen = whitener.cut(features, setting["dims"])
        head = simulate(
            seen[:count], labels[:count], 10, setting["steps"], setting["clip_norm"], mu, examples, rule,
            torch.Generator().manual_seed(0),
        )  # fmt: skip
        right = (seen[FIT:] @ head).argmax(dim=1) == labels[FIT:]
        row = {"setting": setting, "target": [examples, epsilon], "accuracy": float(right.float().mean())}
        add_row(log, row)


def public_features(args: argparse.Namespace, floor: float) -> tuple[torch.Tensor, torch.Tensor, Whitener]:
    """Whitened features of the first images of the training split, their labels, and the whitener."""
    dataset = open_dataset(DATA, args.data_dir)
    split = dataset.train()
    images = to_input(split.images[: FIT + HELD_OUT], INPUT_SIZE)
    labels = torch.from_numpy(split.labels[: FIT + HELD_OUT])
    options = Options(quiet=True, data_dir=args.data_dir)
    console = session.console(options)
    with session.opened(args.out / "run") as rundir:
        context = session.context(rundir, console, options)
        extractor, _ = load_extractor(context, colour_of(dataset.spec.channels))
        config = ProbeConfig(data=DATA, dims=DEFAULT["dims"], whitening_floor=floor)
        mirror = dataset.spec.flip_ok
        whitener = public_whitener(config, context, extractor, mirror, dataset.spec)
        return extract(extractor, images, mirror=mirror, after=whitener), labels, whitener


def print_table(rows: list[dict]) -> None:
    """Markdown: held-out accuracy in per cent."""
    print("| C | lr factor | steps | dims | floor | " + " | ".join(f"N = {n:,}, ε = {e:g}" for n, e in TARGETS) + " |")
    print("|---" * (5 + len(TARGETS)) + "|")
    for setting in VARIATIONS:
        cells = []
        for target in TARGETS:
            found = [r["accuracy"] for r in rows if r["setting"] == setting and r["target"] == list(target)]
            cells.append(f"{100 * found[0]:.1f}" if found else "–")
        print("| " + " | ".join([*(f"{value:g}" for value in setting.values()), *cells]) + " |")


if __name__ == "__main__":
    main()
