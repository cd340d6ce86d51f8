#!/usr/bin/env python3
"""Random processes and extractors compared at a fixed budget, on a training split used as public data.

    python scripts/compare_priors.py --data fashion-mnist --out runs/compare --data-dir data
    python scripts/compare_priors.py --processes dead-leaves spectrum --variants "one layer" "two layers"
    python scripts/compare_priors.py --table

A cell is a process, a variant of the extractor and a seed: 4,000 images are generated, the extractor is learned, the
whitener fitted to synthetic images, and heads are fitted to 10,000 real images of the *training* split with the noise
that the whole split would have at each ε (n images with noise scaled by n/N stand for N); 4,000 other images of the
training split decide. No test split is read. Finished cells are kept; images are shared between variants, and so are
the features of an extractor that stands alone in one variant and beside another in the next.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from experiment import add_row, dprandp, has_row, log_of, parser, read, spread
from torch import Tensor

from dprandp.cli import session
from dprandp.cli.flags import Options
from dprandp.config import toml
from dprandp.config.presets import INPUT_SIZE
from dprandp.config.schema import ProbeConfig
from dprandp.data import DataSpec, open_dataset
from dprandp.dpsgd.features import public_whitener
from dprandp.models.extractor import extract
from dprandp.pretrain import load_extractor
from dprandp.privacy.gaussian_dp import gaussian_dp_mu
from dprandp.probe.head import HeadSettings, default_lr
from dprandp.tune import simulate
from dprandp.vision.images import colour_of, to_input

DELTA = 1e-5
STEPS = 120
EPSILONS = (1.0, 2.0, 4.0, 8.0, math.inf)

ONE = {"layers": 1, "filters": 400}
LESS = {"dims": 1024}
VARIANTS: dict[str, dict[str, dict]] = {
    "default": {},
    "random filters": {"pretrain": {"random_init": True}},
    "one layer": {"pretrain": ONE, "probe": LESS},
    "one layer, random filters": {"pretrain": ONE | {"random_init": True}, "probe": LESS},
    "two layers": {"pretrain": {"filters": 400, "second_filters": 400}, "probe": LESS},
    "800 filters": {"pretrain": ONE | {"filters": 800}, "probe": LESS},
    "patches of 4": {"pretrain": ONE | {"patch_size": 4, "patch_dims": 48}, "probe": LESS},
    "patches of 8": {"pretrain": ONE | {"patch_size": 8}, "probe": LESS},
    "all components of a patch": {"pretrain": ONE | {"patch_dims": 108}, "probe": LESS},
    "stride 2": {"pretrain": ONE | {"stride": 2}, "probe": LESS},
    "no mirror images": {"pretrain": ONE, "probe": LESS | {"mirror": False}},
    "512 components": {"probe": {"dims": 512}},
    "1,024 components": {"probe": LESS},
    "floor 0.3": {"pretrain": ONE, "probe": LESS | {"whitening_floor": 0.3}},
    "statistics of crops": {"pretrain": ONE, "probe": LESS | {"statistics_images": 4000, "statistics_views": 1}},
    "wrn-16-4": {"pretrain": {"arch": "wrn-16-4"}, "probe": LESS},
    "patches beside a wrn-10-2": {"pretrain": ONE, "probe": LESS, "beside": {"arch": "wrn-10-2"}},
    "patches beside a random wrn-10-2": {
        "pretrain": ONE, "probe": LESS, "beside": {"arch": "wrn-10-2", "random_init": True},
    },
    "wrn-10-2": {"pretrain": {"arch": "wrn-10-2"}, "probe": LESS},
}  # fmt: skip
"""Name -> settings of pretrain and probe that differ from those of ``--size tiny``. *beside*: those of a second
extractor; each has half of the squared length of the features."""


def main() -> None:
    """Make what is missing, then print the table."""
    flags = grid_parser(__doc__, "runs/compare")
    flags.add_argument("--variants", nargs="+", default=["default", "one layer", "random filters"],
                       help="; ".join(VARIANTS), metavar="NAME", choices=VARIANTS)  # fmt: skip
    args = flags.parse_args()
    log = log_of(args)
    if not args.table:
        torch.set_flush_denormal(True)
        for seed in range(args.seeds):
            for process in args.processes:
                kept: dict[str, Side] = {}
                for variant in args.variants:
                    cell = {"data": args.data, "fit": args.fit, "process": process, "variant": variant, "seed": seed,
                            "clip_norm": args.clip_norm}  # fmt: skip
                    if not has_row(log, cell):
                        measure(args, cell, log, kept)
    print_table(read(log))


def grid_parser(doc: str, out: str) -> argparse.ArgumentParser:
    """Flags of the experiments that fit heads to features of a training split, taken as public."""
    made = parser(doc, out)
    made.add_argument("--data", default="cifar10", help="whose training split is taken as public")
    made.add_argument("--processes", nargs="+", default=["stylegan-oriented"], help="as for --process")
    made.add_argument("--fit", type=int, default=10_000, help="training images that heads are fitted to")
    made.add_argument("--held-out", type=int, default=4_000, help="training images that decide")
    made.add_argument("--clip-norm", type=float, default=ProbeConfig.clip_norm, help="of the heads")
    return made


def run_of(args: argparse.Namespace, cell: dict) -> Path:
    """The run of a cell's process and seed."""
    return args.out / "".join(letter if letter.isalnum() else "-" for letter in f"{cell['process']}-s{cell['seed']}")


@dataclass(frozen=True)
class Side:
    """An extractor's whitened features of the images, and the seconds that learning it took, and all of it."""

    features: Tensor
    pretraining_seconds: float
    seconds: float


def measure(args: argparse.Namespace, cell: dict, log: Path, kept: dict[str, Side]) -> None:
    """One cell: a row of the accuracies at each ε; ``kept`` has the sides made so far of this process and seed."""
    changes = VARIANTS[cell["variant"]]
    run = run_of(args, cell)
    dprandp("generate", "--run", run, "--process", cell["process"], "--seed", cell["seed"])
    dataset = open_dataset(cell["data"], args.data_dir)
    spec, labels = dataset.spec, torch.from_numpy(dataset.train().labels[: args.fit + args.held_out])
    if len(labels) < args.fit + args.held_out:
        sys.exit(f"{cell['data']} has {len(labels)} training images; {args.fit + args.held_out} are needed")
    sides = []
    for settings in [changes.get("pretrain", {}), *([changes["beside"]] if "beside" in changes else [])]:
        key = repr((settings, changes.get("probe", {})))
        if key not in kept:
            kept[key] = made_side(args, run, cell, settings, changes.get("probe", {}))
        sides.append(kept[key])
    features = torch.cat([side.features for side in sides], dim=1) / math.sqrt(len(sides))
    accuracy = {f"{epsilon:g}": held_out_accuracy(cell, spec, features, labels, epsilon) for epsilon in EPSILONS}
    seconds = {key: round(sum(getattr(side, key) for side in sides), 1) for key in ("pretraining_seconds", "seconds")}
    add_row(log, {**cell, "accuracy": accuracy, "dims": features.shape[1], **seconds})


def held_out_accuracy(cell: dict, spec: DataSpec, features: Tensor, labels: Tensor, epsilon: float) -> float:
    """Of a head fitted to the first images of a cell, under the noise of one ε.

    Args:
        cell: its facts fit, clip_norm and seed count here.
        spec: of the data; as many images as its training split has are stood for.
        features: float32 [n, d], unit norm. labels: int64 [n]. All of them after the first ``fit`` are held out.
        epsilon: inf for no noise.
    """
    fit, clip_norm, examples = cell["fit"], cell["clip_norm"], spec.train_examples
    mu = gaussian_dp_mu(epsilon, DELTA) if math.isfinite(epsilon) else math.inf
    rule = HeadSettings(default_lr(epsilon, DELTA, examples, STEPS, clip_norm), momentum=0.9, released="average")
    head = simulate(
        features[:fit], labels[:fit], len(spec.classes), STEPS, clip_norm, mu, examples, rule,
        torch.Generator().manual_seed(cell["seed"]),
    )  # fmt: skip
    return float(((features[fit:] @ head).argmax(dim=1) == labels[fit:]).float().mean())


def made_side(args: argparse.Namespace, run: Path, cell: dict, settings: dict, probe: dict) -> Side:
    """Learn an extractor, and take the features of the first images of the training split."""
    started = time.perf_counter()
    file = args.out / "pretrain.toml"
    file.write_text(toml.dumps({"pretrain": settings}), encoding="utf-8")
    given = ("--data", cell["data"], "--seed", cell["seed"], "--config", file)
    dprandp("pretrain", "--run", run, *given, "--overwrite")
    pretraining = time.perf_counter() - started
    dataset = open_dataset(cell["data"], args.data_dir)
    images = to_input(dataset.train().images[: args.fit + args.held_out], INPUT_SIZE)
    config = ProbeConfig(data=cell["data"], seed=cell["seed"], **probe)
    with session.opened(run) as rundir:
        options = Options(quiet=True, data_dir=args.data_dir)
        context = session.context(rundir, session.console(options), options)
        extractor, _ = load_extractor(context, colour_of(dataset.spec.channels))
        mirror = dataset.spec.flip_ok if config.mirror is None else config.mirror
        whitener = public_whitener(config, context, extractor, mirror, dataset.spec)
        features = extract(extractor, images, mirror=mirror, after=whitener)
    return Side(features, pretraining, time.perf_counter() - started)


def print_table(rows: list[dict]) -> None:
    """Markdown: held-out accuracy in per cent, mean ± sample standard deviation over seeds; a line per cell."""
    columns = " | ".join(f"ε = {e:g}" for e in EPSILONS)
    print(f"| data | fitted to | C | process | extractor | {columns} | dims | s | seeds |")
    print("|---" * (8 + len(EPSILONS)) + "|")
    cells: dict[tuple, list[dict]] = {}
    for row in rows:
        facts = (row["data"], f"{row['fit']:,}", f"{row['clip_norm']:g}", row["process"], row["variant"])
        cells.setdefault(facts, []).append(row)
    for key, chosen in cells.items():
        columns = [spread([100 * row["accuracy"][f"{epsilon:g}"] for row in chosen]) for epsilon in EPSILONS]
        seconds = statistics.mean(row["seconds"] for row in chosen)
        print("| " + " | ".join([*key, *columns, f"{chosen[0]['dims']:,}", f"{seconds:.0f}", f"{len(chosen)}"]) + " |")


if __name__ == "__main__":
    main()
