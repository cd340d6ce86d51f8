#!/usr/bin/env python3
"""Optimizers, processes and features of a WRN compared at a fixed budget of CPU seconds.

    python scripts/compare_wrn.py --data cifar10 --cpu-seconds 900 --out runs/wrn
    python scripts/compare_wrn.py --arch wrn-16-2 --cpu-seconds 100 --seeds 1 --fit 4000 --held-out 2000
    python scripts/compare_wrn.py --table

A cell is a process, a way to train and a seed. The steps are those that fit into the budget, by the
CPU time of a few steps in this process; cosine schedule. Then, as in ``compare_priors.py``: the whitener is fitted to
synthetic images, heads to images of the *training* split with the noise that the whole split would have at each ε, and
other images of the training split decide. No test split is read. Finished cells are kept.

The features of a cell are tried in four ways: averages of the last stage's map, as they are (scaled to a root mean
square length of 1 on synthetic images) and whitened; of all three stages' maps, each whitened by itself; and the same
whitened together.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch
from compare_priors import EPSILONS, grid_parser, held_out_accuracy, run_of
from experiment import add_row, dprandp, has_row, log_of, read, spread

from dprandp.cli import session
from dprandp.cli.flags import Options
from dprandp.config import toml
from dprandp.config.presets import INPUT_SIZE
from dprandp.config.schema import build, resolve
from dprandp.data import open_dataset
from dprandp.dpsgd.features import synthetic_views
from dprandp.models import whitening
from dprandp.models.extractor import build_extractor, extract, load_weights
from dprandp.models.whitening import Part
from dprandp.pretrain import contrastive, load_extractor
from dprandp.runs.results import PretrainResult
from dprandp.vision.images import as_declared, colour_of, to_input

TIMED_STEPS = 6

TRAININGS: dict[str, dict] = {
    "random weights": {"random_init": True},
    "sgd": {},
    "adamw": {"optimizer": "adamw"},
}
"""Name -> settings of pretrain that differ from those of ``--size tiny``."""

DEFAULT = ["random weights", "sgd", "adamw"]
PLAIN = "last stage, not whitened"
FEATURES = (PLAIN, "last stage", "all, whitened apart", "all, whitened together")


def main() -> None:
    """Make what is missing, then print the table."""
    flags = grid_parser(__doc__, "runs/wrn")
    flags.add_argument("--trainings", nargs="+", default=DEFAULT, help="; ".join(TRAININGS), metavar="NAME",
                       choices=TRAININGS)  # fmt: skip
    flags.add_argument("--arch", default="wrn-16-4")
    flags.add_argument("--batch-size", type=int, default=32)
    flags.add_argument("--cpu-seconds", type=float, default=600.0, help="of all cores together, for the training")
    args = flags.parse_args()
    log = log_of(args)
    if not args.table:
        torch.set_flush_denormal(True)
        for seed in range(args.seeds):
            for process in args.processes:
                for training in args.trainings:
                    cell = {"data": args.data, "fit": args.fit, "process": process, "arch": args.arch,
                            "budget": args.cpu_seconds, "training": training, "seed": seed,
                            "clip_norm": args.clip_norm}  # fmt: skip
                    if not has_row(log, cell):
                        measure(args, cell, log)
    print_table(read(log))


def measure(args: argparse.Namespace, cell: dict, log: Path) -> None:
    """One cell."""
    run = run_of(args, cell)
    dprandp("generate", "--run", run, "--process", cell["process"], "--seed", cell["seed"])
    changes = {"arch": cell["arch"], "batch_size": args.batch_size} | TRAININGS[cell["training"]]
    if not changes.get("random_init"):
        changes["steps"] = steps_within(args, run, changes)
    file = args.out / "pretrain.toml"
    file.write_text(toml.dumps({"pretrain": changes}), encoding="utf-8")
    started = time.perf_counter()
    dprandp("pretrain", "--run", run, "--data", cell["data"], "--seed", cell["seed"], "--config", file, "--overwrite")
    seconds = time.perf_counter() - started
    with session.opened(run) as rundir:
        result = rundir.result(PretrainResult)
    row = {
        **cell, "steps": result.steps, "views": 2 * args.batch_size * result.steps,
        **{key: getattr(result, key) for key in ("loss", "knn_accuracy", "linear_accuracy", "effective_rank")},
        "pretraining_seconds": round(seconds, 1), "accuracy": accuracies(args, run, cell),
        "seconds": round(time.perf_counter() - started, 1),
    }  # fmt: skip
    add_row(log, row)


def steps_within(args: argparse.Namespace, run: Path, changes: dict) -> int:
    """Steps that the budget covers, what comes before them included."""
    config = build("pretrain", {"size": "tiny", "steps": 10**6, **changes})
    with session.opened(run) as rundir:
        context = session.context(rundir, session.console(Options(quiet=True)), Options())
        before = time.process_time()
        trainer = contrastive.begun_trainer(config, context)
        trainer.step(0)
        begun = time.process_time()
        for step in range(1, 1 + TIMED_STEPS):
            trainer.step(step)
        each = (time.process_time() - begun) / TIMED_STEPS
        fixed = begun - before - each
    return max(10, int((args.cpu_seconds - fixed) / each))


def accuracies(args: argparse.Namespace, run: Path, cell: dict) -> dict[str, dict[str, float]]:
    """Held-out accuracy for each kind of features and each ε."""
    dataset = open_dataset(cell["data"], args.data_dir)
    spec, split, count = dataset.spec, dataset.train(), args.fit + args.held_out
    if len(split.labels) < count:
        sys.exit(f"{cell['data']} has {len(split.labels)} training images; {count} are needed")
    images, labels = to_input(split.images[:count], INPUT_SIZE), torch.from_numpy(split.labels[:count])
    probe = resolve("probe", "tiny", None, {"data": cell["data"]})
    with session.opened(run) as rundir:
        options = Options(quiet=True, data_dir=args.data_dir)
        context = session.context(rundir, session.console(options), options)
        trained, config = load_extractor(context, colour_of(spec.channels))
        extractor = build_extractor(replace(config, feature_stages="all"))
        load_weights(extractor, trained.state_dict())
        views = synthetic_views(context, replace(probe, seed=cell["seed"]), INPUT_SIZE)
    views = as_declared(views, channels=spec.channels, height=spec.height, width=spec.width)
    synthetic, real = (extract(extractor.eval(), pixels, mirror=spec.flip_ok) for pixels in (views, images))
    width = extractor.feature_dim
    last = slice(width - extractor.parts[-1].width, width)
    whole = slice(width)
    kinds = zip(FEATURES, (last, last, whole, whole), (None, None, extractor.parts, [Part(width, 1.0)]), strict=True)
    found = {}
    for name, own, parts in kinds:
        chosen = synthetic[:, own].clone()
        if name == PLAIN:
            features = real[:, own] / chosen.square().sum(dim=1).mean().sqrt()
        else:
            whitener = whitening.fit(chosen, probe.dims, probe.whitening_floor, parts, views=probe.statistics_views)
            features = whitener(real[:, own])
        found[name] = {f"{e:g}": held_out_accuracy(cell, spec, features, labels, e) for e in EPSILONS}
    return found


def print_table(rows: list[dict]) -> None:
    """Markdown: held-out accuracy in per cent, mean ± sample standard deviation over seeds."""
    head = ["data", "fitted to", "process", "network", "CPU s", "training", "C", "features",
            *(f"ε = {e:g}" for e in EPSILONS), "views", "k-NN", "linear", "rank", "seeds"]  # fmt: skip
    print("| " + " | ".join(head) + " |\n" + "|---" * len(head) + "|")
    cells: dict[tuple, list[dict]] = {}
    for row in rows:
        key = (row["data"], f"{row['fit']:,}", row["process"], row["arch"], f"{row['budget']:g}", row["training"],
               f"{row['clip_norm']:g}")  # fmt: skip
        cells.setdefault(key, []).append(row)
    for key, chosen in cells.items():
        public = [f"{statistics.mean(row['views'] for row in chosen):,.0f}"]
        public += [f"{100 * statistics.mean(row[name] for row in chosen):.1f}"
                   for name in ("knn_accuracy", "linear_accuracy")]  # fmt: skip
        public += [f"{statistics.mean(row['effective_rank'] for row in chosen):.0f}", f"{len(chosen)}"]
        for kind in FEATURES:
            columns = [spread([100 * row["accuracy"][kind][f"{e:g}"] for row in chosen]) for e in EPSILONS]
            print("| " + " | ".join([*key, kind, *columns, *public]) + " |")


if __name__ == "__main__":
    main()
