#!/usr/bin/env python3
"""Continual pre-training (Bu et al. 2024): what a tenth of public images is worth, and when to begin private steps.

    python scripts/continual_finding.py digits --seeds 3
    python scripts/continual_finding.py fashion-mnist --subset 6000 --arch vit-2-32-8 wrn-10-1 --epsilons 1 4
    python scripts/continual_finding.py --table

Every row is one `dprandp continue` from the same random weights, with as many steps in all, public and private
together, on the same split: a random tenth of the training images is public in every row, and never among the private
ones.

* from scratch: all steps private. From scratch, no privacy: the same without noise.
* public until step s: a fixed switch. The last one leaves a single private step: about public training alone.
* plateau, decelerator: the automatic switches. cosine, ratio: a public gradient mixed into every private step.
* a tenth public, no privacy: the plateau's switch without noise.

Each run has a budget of its own and reads the test split once, at its end; nothing is chosen by it. Seeds change the
weights, the public tenth, the batches and the noise. Finished rows are kept in results.jsonl, so the script goes on
where it was stopped.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
from pathlib import Path

import numpy as np
from experiment import add_row, dprandp, has_row, log_of, parser, read, spread

PARTS = (0.1, 0.25, 0.5, 0.75)
"""Fixed switches, as parts of all steps."""

FREE, TENTH_FREE = "from scratch, no privacy", "a tenth public, no privacy"


def ways(steps: int) -> dict[str, list[str]]:
    """Name -> flags of `dprandp continue`."""
    fixed = {f"public until step {round(part * steps)}": ["--switch", str(round(part * steps))] for part in PARTS}
    return {
        "from scratch": ["--mix", "private"],
        **fixed,
        f"public until step {steps - 1}": ["--switch", str(steps - 1)],
        "plateau": ["--switch", "plateau"],
        "decelerator": ["--switch", "decelerator"],
        "cosine": ["--mix", "cosine"],
        "ratio": ["--mix", "ratio"],
        FREE: ["--mix", "private"],
        TENTH_FREE: ["--switch", "plateau"],
    }


def main() -> None:
    """Run what is missing, then print the table and what it says of the findings."""
    flags = parser(__doc__, "runs/continual")
    flags.add_argument("datasets", nargs="*", help="names as for --data")
    flags.add_argument("--subset", type=int, default=None, help="train on so many random images")
    flags.add_argument("--arch", nargs="+", default=["vit-2-32-8"], help="vit-D-W-P, wrn-D-K")
    flags.add_argument("--epsilons", nargs="+", default=["1"])
    flags.add_argument("--steps", type=int, default=200, help="in all, public and private")
    flags.add_argument("--ways", nargs="+", default=None, metavar="NAME", help="; ".join(ways(200)))
    args = flags.parse_args()
    log = log_of(args)
    for data in () if args.table else args.datasets:
        name = subset_of(args, data) if args.subset else data
        for seed in range(args.seeds):
            for arch in args.arch:
                for epsilon in args.epsilons:
                    for way in args.ways or ways(args.steps):
                        measure(args, log, name, arch, epsilon, way, seed)
    print_tables(read(log))


def measure(args: argparse.Namespace, log: Path, data: str, arch: str, epsilon: str, way: str, seed: int) -> None:
    """One run, unless its row is there already."""
    free = way in (FREE, TENTH_FREE)
    cell = {"data": data, "arch": arch, "way": way, "steps": args.steps, "seed": seed}
    cell["epsilon"] = "inf" if free else str(float(epsilon))
    if has_row(log, cell):
        return
    start = args.out / f"start-{arch}-s{seed}"
    if not (start / "2-pretrain" / "extractor.safetensors").exists():
        shutil.rmtree(start, ignore_errors=True)
        dprandp("generate", "--run", start, "--process", "perlin", "--count", 100, "--resolution", 32, "--seed", seed)
        dprandp("pretrain", "--run", start, "--arch", arch, "--random-init", "--seed", seed)
    run = args.out / "run"
    shutil.rmtree(run, ignore_errors=True)
    shutil.copytree(start, run, ignore=shutil.ignore_patterns(".lock"))
    result = dprandp(
        "continue", "--run", run, "--data", data, "--data-dir", args.data_dir, "--public", "fraction:0.1",
        "--eps", cell["epsilon"], "--share", 1, "--steps", args.steps, "--seed", seed, *ways(args.steps)[way],
    )  # fmt: skip
    shutil.rmtree(run)
    kept = {"switch": result["public_training"]["steps"], "why": result["public_training"]["switch"]}
    row = {**cell, "accuracy": result["accuracy"], "spent": result["epsilon"], "seconds": result["seconds"], **kept}
    add_row(log, row)


def subset_of(args: argparse.Namespace, data: str) -> str:
    """A smaller training split of a known data set, as an npz file; by a public seed, whatever the run's."""
    path = args.out / f"{data}-{args.subset}.npz"
    if not path.exists():
        from dprandp.data import open_dataset

        dataset = open_dataset(data, args.data_dir)
        train, test = dataset.train(), dataset.test()
        rows = np.random.default_rng(0).permutation(len(train.labels))[: args.subset]
        np.savez(
            path, x_train=train.images[rows], y_train=train.labels[rows], x_test=test.images, y_test=test.labels,
            classes=np.array(dataset.spec.classes),
        )  # fmt: skip
    return f"npz:{path}"


def print_tables(rows: list[dict]) -> None:
    """A Markdown table for each data set, architecture and number of steps; below it, whether the findings hold."""
    for data, arch, steps in sorted({(row["data"], row["arch"], row["steps"]) for row in rows}):
        chosen = [row for row in rows if (row["data"], row["arch"], row["steps"]) == (data, arch, steps)]
        epsilons = sorted({row["epsilon"] for row in chosen if row["epsilon"] != "inf"}, key=float)
        print(f"\n{Path(data).name}, {arch}, {steps} steps; test accuracy in %, mean ± sample standard deviation\n")
        print("| way | " + " | ".join(f"ε = {float(e):g}, switch" for e in epsilons) + " | no privacy | s | seeds |")
        print("|---" * (len(epsilons) + 4) + "|")
        for way in ways(steps):
            group = [row for row in chosen if row["way"] == way]
            if group:
                cells = [shown([row for row in group if row["epsilon"] == e]) for e in [*epsilons, "inf"]]
                seconds = statistics.mean(row["seconds"] for row in group)
                seeds = len({row["seed"] for row in group})
                print("| " + " | ".join([way, *cells, f"{seconds:.0f}", f"{seeds}"]) + " |")
        for epsilon in epsilons:
            print(f"\nε = {float(epsilon):g}: " + verdict(chosen, epsilon, steps))


def shown(group: list[dict]) -> str:
    """'68.1 ± 0.2 at 57', or a dash for none; the mean step of the switch."""
    if not group:
        return "–"
    accuracy = spread([100 * row["accuracy"] for row in group])
    return f"{accuracy} at {statistics.mean(row['switch'] for row in group):.0f}"


def verdict(rows: list[dict], epsilon: str, steps: int) -> str:
    """Whether the published findings hold in these rows, in words; differences are paired by seed."""
    at: dict[str, dict[int, float]] = {way: {} for way in ways(steps)}
    for row in rows:
        if row["epsilon"] == ("inf" if row["way"] in (FREE, TENTH_FREE) else epsilon):
            at[row["way"]][row["seed"]] = 100 * row["accuracy"]
    said = []
    for low, high in (("from scratch", "plateau"), ("from scratch", "decelerator"), ("plateau", FREE)):
        said.append(f"{high} − {low}: {paired(at[low], at[high])}")
    fixed = {way: statistics.mean(values.values()) for way, values in at.items() if "until" in way and values}
    if fixed:
        best = max(fixed, key=lambda way: fixed[way])
        for rule in ("plateau", "decelerator"):
            said.append(f"{rule} − best fixed ({best}): {paired(at[best], at[rule])}")
    return "; ".join(said)


def paired(low: dict[int, float], high: dict[int, float]) -> str:
    """'12.3 ± 0.5 (3 seeds)': mean and sample standard deviation of the differences."""
    gaps = [high[seed] - low[seed] for seed in sorted(low.keys() & high.keys())]
    if not gaps:
        return "not measured"
    deviation = f" ± {statistics.stdev(gaps):.1f}" if len(gaps) > 1 else ""
    return f"{statistics.mean(gaps):+.1f}{deviation} ({len(gaps)} seeds)"


if __name__ == "__main__":
    main()
