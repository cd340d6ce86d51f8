#!/usr/bin/env python3
"""The README's table: the probe on real data, against the majority class, a random extractor and no privacy.

    python scripts/results_table.py --out runs/results --size small --seeds 3 digits pneumoniamnist
    python scripts/results_table.py --out runs/results --table          # print the table of what is there

Every cell is a run of the command line with ``--share 1`` (the whole budget for the probe) or, with ``--finetune``, of
probe and fine-tune with the default share. Seeds change images, extractor, whitener and (from the operating system)
the noise. Nothing is chosen on a test split: each run reads it once, at its end. Finished runs are kept in
``results.jsonl`` and skipped, so the script can be stopped and started.
"""

from __future__ import annotations

import argparse
import hashlib
import shutil
from functools import partial
from pathlib import Path

import experiment
from experiment import add_row, has_row, log_of, parser, read, spread

from dprandp.runs import checkpoint
from dprandp.runs.checkpoint import tensors_to_bytes
from dprandp.sweep import keep_features, start_from

EPSILONS = ("1", "8", "inf")
EXTRACTORS = ("learned", "random")

dprandp = partial(experiment.dprandp, aloud=True)


def main() -> None:
    """Run what is missing, then print the table."""
    flags = parser(__doc__, "runs/results")
    flags.add_argument("datasets", nargs="*", help="names as for --data")
    flags.add_argument("--size", default="small", choices=("tiny", "small", "paper"))
    flags.add_argument("--epsilons", nargs="+", default=EPSILONS)
    flags.add_argument("--extractors", nargs="+", default=EXTRACTORS, help="learned, random, an --arch (wrn-16-4), "
                        "or a shipped prior (prior:patchnet-tiny)")  # fmt: skip
    flags.add_argument("--finetune", action="store_true", help="probe and fine-tune with the default share")
    args = flags.parse_args()
    log = log_of(args)
    if not args.table:
        for data in args.datasets:
            for seed in range(args.seeds):
                for extractor in args.extractors:
                    for epsilon in args.epsilons:
                        run_cell(args, log, data, seed, extractor, epsilon)
    print_table(read(log))


def run_cell(args: argparse.Namespace, log: Path, data: str, seed: int, extractor: str, epsilon: str) -> None:
    """One run, unless its result is there already."""
    stage = "finetune" if args.finetune else "probe"
    key = {
        "data": data, "size": args.size, "seed": seed, "extractor": extractor, "epsilon": epsilon, "stage": stage,
    }  # fmt: skip
    if has_row(log, key):
        return
    public = public_run(args, data, seed, extractor)
    run = args.out / "-".join([data, args.size, extractor.replace(":", "-"), f"s{seed}", f"eps{epsilon}", stage])
    shutil.rmtree(run, ignore_errors=True)
    start_from(public, run)
    common = ["--run", run, "--data", data, "--data-dir", args.data_dir, "--eps", epsilon, "--seed", seed]
    common += ["--size", args.size]
    share = [] if args.finetune else ["--share", "1"]
    result = dprandp("probe", *common, *share)
    keep_features(run, public)
    if args.finetune:
        result = dprandp("finetune", "--run", run, "--data-dir", args.data_dir)
    names = ("accuracy", "balanced_accuracy", "auc", "loss", "majority_accuracy", "seconds")
    spent = {"spent": result["epsilon"], "delta": result["delta"]}
    made = checkpoint.load_finished(run / "2-pretrain", "extractor", "pretrain")
    spent["extractor_sha256"] = hashlib.sha256(tensors_to_bytes(made.tensors)).hexdigest()
    add_row(log, {**key, **spent, **{name: result[name] for name in names}})
    shutil.rmtree(run)


def public_run(args: argparse.Namespace, data: str, seed: int, extractor: str) -> Path:
    """A run with Phase I done: images shared by all data sets, an extractor for the colour that the data declare."""
    if extractor.startswith("prior:"):
        run = args.out / f"public-{data}-{args.size}-{extractor.replace(':', '-')}-s{seed}"
        dprandp("pretrain", "--run", run, "--size", args.size, "--prior", extractor.removeprefix("prior:"))
        return run
    images = args.out / f"public-{args.size}-s{seed}"
    dprandp("generate", "--run", images, "--size", args.size, "--seed", seed)
    run = args.out / f"public-{data}-{args.size}-{extractor}-s{seed}"
    start_from(images, run)
    how = {"learned": [], "random": ["--random-init"]}.get(extractor, ["--arch", extractor])
    dprandp("pretrain", "--run", run, "--size", args.size, "--data", data, "--seed", seed, *how)
    return run


def print_table(rows: list[dict]) -> None:
    """Markdown: a line per data set, extractor, stage and ε; mean ± sample standard deviation over seeds, per cent."""
    print("| data | extractor | stage | ε | test accuracy | AUC | majority | seeds |")
    print("|---|---|---|---|---|---|---|---|")
    cells: dict[tuple, list[dict]] = {}
    for row in rows:
        cell = (row["data"], row["size"], row["extractor"], row["stage"], float(row["epsilon"]))
        cells.setdefault(cell, []).append(row)
    for (data, size, extractor, stage, epsilon), chosen in sorted(cells.items(), key=lambda item: item[0]):
        print(
            f"| {data} ({size}) | {extractor} | {stage} | {epsilon:g} | {per_cent(chosen, 'accuracy')} "
            f"| {per_cent(chosen, 'auc')} | {100 * chosen[0]['majority_accuracy']:.1f} | {len(chosen)} |"
        )


def per_cent(rows: list[dict], name: str) -> str:
    """'68.1 ± 0.2', or a dash for no rows."""
    return spread([100 * row[name] for row in rows if row[name] is not None])


if __name__ == "__main__":
    main()
