#!/usr/bin/env python3
"""Random processes and extractors compared at a fixed budget, on a training split used as public data.

    python scripts/compare_priors.py --data fashion-mnist --out runs/compare --data-dir data
    python scripts/compare_priors.py --processes dead-leaves spectrum --variants "one layer" "two layers"
    python scripts/compare_priors.py --table

A cell is a process, a variant of the extractor and a seed: 4,000 images are generated, the extractor is learned, the
whitener fitted to synthetic images, and heads are fitted to 10,000 real images of the *training* split with the noise
that the whole split would have at each ε (n images with noise scaled by n/N stand for N); 4,000 other images of the
training split decide. No test split is read. Finished cells are kept; images are shared between variants.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
import time
from pathlib import Path

import torch
from experiment import add_row, dprandp, has_row, read, spread

from dprandp import toml
from dprandp.cli import session
from dprandp.config import ProbeConfig
from dprandp.datasets import open_dataset
from dprandp.privacy.gaussian_dp import equivalent_mu
from dprandp.stages.head import HeadSettings, default_lr
from dprandp.stages.pretrain import load_extractor
from dprandp.stages.synthetic_statistics import public_whitener
from dprandp.stages.tune_public import simulate
from dprandp.vision.extractors import extract
from dprandp.vision.images import to_input

FIT, HELD_OUT = 10_000, 4_000
DELTA = 1e-5
EPSILONS = (1.0, 2.0, 4.0, 8.0, math.inf)

VARIANTS: dict[str, dict[str, dict]] = {
    "one layer": {},
    "random filters": {"pretrain": {"random_init": True}},
    "two layers": {"pretrain": {"layers": 2}},
    "two layers, random filters": {"pretrain": {"layers": 2, "random_init": True}},
    "800 filters": {"pretrain": {"filters": 800}},
    "patches of 4": {"pretrain": {"patch_size": 4, "patch_dims": 48}},
    "patches of 8": {"pretrain": {"patch_size": 8}},
    "all axes of a patch": {"pretrain": {"patch_dims": 108}},
    "stride 2": {"pretrain": {"stride": 2}},
    "no mirror images": {"probe": {"mirror": False}},
    "512 axes": {"probe": {"dims": 512}},
    "2,048 axes": {"probe": {"dims": 2048}},
    "floor 0.3": {"probe": {"whitening_floor": 0.3}},
    "statistics of crops": {"probe": {"statistics_images": 4000, "statistics_views": 1}},
    "wrn-16-4": {"pretrain": {"arch": "wrn-16-4"}},
    "patches beside a wrn-10-2": {"beside": {"arch": "wrn-10-2"}},
    "patches beside a random wrn-10-2": {"beside": {"arch": "wrn-10-2", "random_init": True}},
    "wrn-10-2": {"pretrain": {"arch": "wrn-10-2"}},
}
"""Name -> settings of pretrain and probe that differ from those of ``--size tiny``. *beside*: those of a second
extractor; each has half of the squared length of the features."""


def main() -> None:
    """Make what is missing, then print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", default="cifar10", help="whose training split is taken as public")
    parser.add_argument("--processes", nargs="+", default=["stylegan-oriented"], help="as for --process")
    parser.add_argument("--variants", nargs="+", default=["one layer", "two layers", "random filters"],
                        help="; ".join(VARIANTS), metavar="NAME", choices=VARIANTS)  # fmt: skip
    parser.add_argument("--seeds", type=int, default=3, help="seeds 0 .. n-1")
    parser.add_argument("--out", type=Path, default=Path("runs/compare"), help="folder of the runs and results.jsonl")
    parser.add_argument("--data-dir", type=Path, default=Path("data"))
    parser.add_argument("--table", action="store_true", help="only print the table")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    log = args.out / "results.jsonl"
    if not args.table:
        torch.set_flush_denormal(True)
        for seed in range(args.seeds):
            for process in args.processes:
                for variant in args.variants:
                    cell = {"data": args.data, "process": process, "variant": variant, "seed": seed}
                    if not has_row(log, cell):
                        measure(args, cell, log)
    print_table(read(log))


def measure(args: argparse.Namespace, cell: dict, log: Path) -> None:
    """One cell: a row for each ε."""
    changes = VARIANTS[cell["variant"]]
    name = "".join(letter if letter.isalnum() else "-" for letter in f"{cell['process']}-s{cell['seed']}")
    run = args.out / name
    dprandp("generate", "--run", run, "--process", cell["process"], "--seed", cell["seed"])
    started, pretraining, sides = time.perf_counter(), 0.0, []
    for settings in [changes.get("pretrain", {}), *([changes["beside"]] if "beside" in changes else [])]:
        file = args.out / "pretrain.toml"
        file.write_text(toml.dumps({"pretrain": settings}), encoding="utf-8")
        begun = time.perf_counter()
        given = ("--data", cell["data"], "--seed", cell["seed"], "--config", file)
        dprandp("pretrain", "--run", run, *given, "--overwrite")
        pretraining += time.perf_counter() - begun
        side, labels, classes, examples = whitened_features(args, run, cell, changes.get("probe", {}))
        sides.append(side)
    features = torch.cat(sides, dim=1) / math.sqrt(len(sides))
    accuracy = {}
    for epsilon in EPSILONS:
        mu = equivalent_mu(epsilon, DELTA) if math.isfinite(epsilon) else math.inf
        rule = HeadSettings(default_lr(epsilon, DELTA, examples), momentum=0.9, released="average")
        generator = torch.Generator().manual_seed(cell["seed"])
        head = simulate(features[:FIT], labels[:FIT], classes, 120, 1.0, mu, examples, rule, generator)
        right = (features[FIT:] @ head).argmax(dim=1) == labels[FIT:]
        accuracy[f"{epsilon:g}"] = float(right.float().mean())
    row = {**cell, "accuracy": accuracy, "dims": features.shape[1], "pretraining_seconds": round(pretraining, 1),
           "seconds": round(time.perf_counter() - started, 1)}  # fmt: skip
    add_row(log, row)


def whitened_features(
    args: argparse.Namespace, run: Path, cell: dict, changes: dict
) -> tuple[torch.Tensor, torch.Tensor, int, int]:
    """Features and labels of the first images of the training split, number of classes, and size of the split."""
    dataset = open_dataset(cell["data"], args.data_dir)
    spec, split = dataset.spec, dataset.train()
    images, labels = to_input(split.images[: FIT + HELD_OUT]), torch.from_numpy(split.labels[: FIT + HELD_OUT])
    if len(labels) < FIT + HELD_OUT:
        sys.exit(f"{cell['data']} has {len(labels)} training images; {FIT + HELD_OUT} are needed")
    config = ProbeConfig(data=cell["data"], seed=cell["seed"], **changes)
    with session.opened(run) as rundir:
        context = session.context(rundir, session.console(quiet=True), data_dir=args.data_dir)
        extractor, _ = load_extractor(context)
        mirror = spec.flip_ok if config.mirror is None else config.mirror
        whitener = public_whitener(config, context, extractor, mirror, spec)
        features = extract(extractor, images, mirror=mirror, after=whitener)
    return features, labels, len(spec.classes), spec.train_examples


def print_table(rows: list[dict]) -> None:
    """Markdown: held-out accuracy in per cent, mean ± sample standard deviation over seeds; a line per cell."""
    print("| data | process | extractor | " + " | ".join(f"ε = {e:g}" for e in EPSILONS) + " | dims | s | seeds |")
    print("|---" * (6 + len(EPSILONS)) + "|")
    cells: dict[tuple, list[dict]] = {}
    for row in rows:
        cells.setdefault((row["data"], row["process"], row["variant"]), []).append(row)
    for key, chosen in cells.items():
        columns = [spread([100 * row["accuracy"][f"{epsilon:g}"] for row in chosen]) for epsilon in EPSILONS]
        seconds = statistics.mean(row["seconds"] for row in chosen)
        print("| " + " | ".join([*key, *columns, f"{chosen[0]['dims']:,}", f"{seconds:.0f}", f"{len(chosen)}"]) + " |")


if __name__ == "__main__":
    main()
