#!/usr/bin/env python3
"""Ways to train on the same data, ε and seeds: DP-RandP, De et al. 2022, parts of the weights, continual pre-training.

    python scripts/compare_systems.py digits --out runs/systems
    python scripts/compare_systems.py digits --groups de2022 --epsilons 8 --seeds 3
    python scripts/compare_systems.py fashion-mnist --groups de2022 --scratch-flags="--steps 40 --lr 1"
    python scripts/compare_systems.py digits --systems probe "all phases" --epsilons 1
    python scripts/compare_systems.py --table

A system is a list of commands of the package, each with the flags that make the difference; Phase I is made once for a
seed and shared. Each run has a budget of its own, and reads the test split once, at its end; nothing is chosen by it.
Finished rows are kept in results.jsonl, and a run goes on where it was stopped: at the next row. Table and plot
(systems.png) are made of all rows. Seconds are of the private stages (of ``continue`` with its public steps), on
whatever else the machine was doing.

Training from scratch and continual pre-training are done with small networks and few steps, so that a cell is a minute
on a CPU. What De et al. and others found is looked for as *differences* between cells that share everything else; no
cell is tuned. In every row of the group ``continual`` the same tenth of the training images is declared public, and is
not among the private ones; ``continual_finding.py`` compares more ways to switch.
"""

from __future__ import annotations

import argparse
import shlex
import shutil
import statistics
import sys
from pathlib import Path

from experiment import add_row, dprandp, has_row, log_of, parser, read, spread

from dprandp.sweep import start_from

SCRATCH = [
    "finetune", "--from", "scratch", "--arch", "wrn-10-1", "--padding", "same",
    "--clipping", "rescaled", "--steps", "60", "--batch-size", "128", "--lr", "2", "--microbatch", "16",
]  # fmt: skip
"""De et al. 2022 at CPU scale; a flag given again wins. Unlike there, the head sees the averages of
the four quarters beside the global one: this network has 64 channels."""

CONTINUE = ["continue", "--public", "fraction:0.1", "--steps", "200"]
CONTINUED_ARCH = "vit-2-32-8"
"""From random weights; a patchnet cannot go on learning."""

MASKS = [
    (mode, how, keep, more)
    for mode, more in (("freeze", ()), ("select", ("--every", "2")))
    for how in ("random", "magnitude")
    for keep in ("0.1", "0.3", "0.6")
]


def scratch(*flags: str) -> list[list[str]]:
    """The one command of a system from scratch."""
    return [[*SCRATCH, *flags]]


GROUPS: dict[str, dict[str, list[list[str]]]] = {
    "phases": {
        "probe": [["probe", "--share", "1"]],
        "all phases": [["probe"], ["finetune"]],
        "all phases, automatic clipping": [["probe"], ["finetune", "--clipping", "automatic"]],
    },
    "shares": {
        f"all phases, probe with {share} of ε": [["probe", "--share", share], ["finetune"]]
        for share in ("0.1", "0.2", "0.3", "0.5", "0.7")
    },
    "de2022": {
        "scratch, K = 1": scratch(),
        "scratch, K = 2": scratch("--views", "2"),
        "scratch, K = 4": scratch("--views", "4"),
        "scratch, K = 8": scratch("--views", "8"),
        "scratch, K = 4, no EMA": scratch("--views", "4", "--ema", "0"),
        "scratch, K = 4, batch 32": scratch("--views", "4", "--batch-size", "32"),
        "scratch, K = 4, batch 64": scratch("--views", "4", "--batch-size", "64"),
        "scratch, K = 4, batch 256": scratch("--views", "4", "--batch-size", "256"),
    },
    "pruning": {
        **{
            f"scratch, K = 1, {mode} {how} {keep}": scratch(f"--{mode}", how, "--keep", keep, *more)
            for mode, how, keep, more in MASKS
        },
        **{
            f"all phases, {mode} {how} {keep}": [["probe"], ["finetune", f"--{mode}", how, "--keep", keep, *more]]
            for mode, how, keep, more in MASKS
        },
        "scratch, K = 1, last half of the blocks": scratch("--freeze", "last", "--scope", "block", "--keep", "0.5"),
    },
    "ingredients": {
        "scratch, K = 2": scratch("--views", "2"),
        "+ automatic clipping": scratch("--views", "2", "--clipping", "automatic"),
        "+ layer order 3": scratch("--views", "2", "--layer-order", "relu-norm-conv+norm-relu-skip"),
        "+ momentum 0.8": scratch("--views", "2", "--momentum", "0.8", "--lr", "0.4"),
        "+ Adam": scratch("--views", "2", "--optimizer", "adam", "--lr", "0.01"),
    },
    "continual": {
        "continual, from scratch": [[*CONTINUE, "--mix", "private", "--share", "1"]],
        "continual, a tenth public": [[*CONTINUE, "--switch", "plateau", "--share", "1"]],
        "continual, a tenth public, decelerator": [[*CONTINUE, "--switch", "decelerator", "--share", "1"]],
        "continual, then probe": [CONTINUE, ["probe", "--share", "1"]],
    },
}
"""Group -> name -> commands after Phase I. A further system is a further entry."""

SYSTEMS = {name: commands for group in GROUPS.values() for name, commands in group.items()}


def main() -> None:
    """Run what is missing, then print the table."""
    flags = parser(__doc__, "runs/systems")
    flags.add_argument("datasets", nargs="*", help="names as for --data")
    flags.add_argument("--groups", nargs="+", choices=GROUPS, default=list(GROUPS))
    flags.add_argument("--systems", nargs="+", choices=SYSTEMS, metavar="NAME",
                       help="instead of groups: " + "; ".join(SYSTEMS))  # fmt: skip
    flags.add_argument("--scratch-flags", default="", metavar="FLAGS",
                        help="instead of those of all systems from scratch; a system's own flags win")  # fmt: skip
    flags.add_argument("--epsilons", nargs="+", default=["1", "8"])
    flags.add_argument("--size", default="tiny")
    args = flags.parse_args()
    chosen = args.systems or list(dict.fromkeys(name for group in args.groups for name in GROUPS[group]))
    log = log_of(args)
    for data in () if args.table else args.datasets:
        for seed in range(args.seeds):
            for epsilon in args.epsilons:
                for system in chosen:
                    measure(args, log, {"data": data, "system": system, "epsilon": float(epsilon), "seed": seed})
    print_table(read(log))
    if rows := read(log):
        draw(rows, args.out / "systems.png")


def measure(args: argparse.Namespace, log: Path, cell: dict) -> None:
    """One run, unless its row is there already."""
    cell["size"] = args.size
    cell["flags"] = args.scratch_flags if SYSTEMS[cell["system"]][0][0] == "finetune" else ""
    if has_row(log, cell):
        return
    commands = SYSTEMS[cell["system"]]
    if cell["flags"]:
        commands = [[*SCRATCH, *shlex.split(cell["flags"]), *command[len(SCRATCH) :]] for command in commands]
    run = args.out / "run"
    shutil.rmtree(run, ignore_errors=True)
    common = ["--size", args.size, "--seed", cell["seed"]]
    if public := phase_one(args, cell, commands, common):
        start_from(public, run)
    seconds = 0.0
    for command in commands:
        first = command is commands[0]
        budget = ["--data", cell["data"], "--eps", cell["epsilon"]] if first else []
        result = dprandp(*command, "--run", run, "--data-dir", args.data_dir, *common, *budget)
        seconds += result["seconds"]
    shutil.rmtree(run)
    row = {**cell, "accuracy": result["accuracy"], "auc": result["auc"], "spent": result["epsilon"]}
    row["seconds"] = round(seconds, 1)
    add_row(log, row)


def phase_one(args: argparse.Namespace, cell: dict, commands: list[list[str]], common: list) -> Path | None:
    """A run with images and an extractor, made once for a seed; None for systems that need neither."""
    begins = commands[0][0]
    if begins == "finetune":
        return None
    if begins == "probe":
        public = args.out / f"public-{cell['data']}-{args.size}-s{cell['seed']}"
        dprandp("generate", "--run", public, *common)
        dprandp("pretrain", "--run", public, *common, "--data", cell["data"])
        return public
    # a probe takes its statistics from synthetic images; without one nothing reads them
    probed = any(command[0] == "probe" for command in commands)
    public = args.out / f"start-{CONTINUED_ARCH}-{args.size}-{'probed' if probed else 'alone'}-s{cell['seed']}"
    few = [] if probed else ["--process", "perlin", "--count", 100, "--resolution", 32]
    dprandp("generate", "--run", public, *common, *few)
    dprandp("pretrain", "--run", public, *common, "--arch", CONTINUED_ARCH, "--random-init")
    return public


def print_table(rows: list[dict]) -> None:
    """Markdown: test accuracy in per cent, mean ± sample standard deviation over seeds; a line per data and system."""
    epsilons = sorted({row["epsilon"] for row in rows})
    print("| data | system | " + " | ".join(f"ε = {epsilon:g}" for epsilon in epsilons) + " | s | seeds |")
    print("|---" * (4 + len(epsilons)) + "|")
    groups: dict[tuple, list[dict]] = {}
    for row in rows:
        groups.setdefault((row["data"], row["size"], label(row)), []).append(row)
    for (data, size, system), group in groups.items():
        columns = [spread([100 * row["accuracy"] for row in group if row["epsilon"] == each]) for each in epsilons]
        seconds = statistics.mean(row["seconds"] for row in group)
        seeds = len({row["seed"] for row in group})
        print("| " + " | ".join([f"{data} ({size})", system, *columns, f"{seconds:.0f}", f"{seeds}"]) + " |")


def label(row: dict) -> str:
    """A system, and the flags that it was given instead of its own."""
    return f"{row['system']} ({row['flags']})" if row["flags"] else row["system"]


COLOURS = ("#1b9e77", "#d95f02", "#7570b3", "#666666")


def draw(rows: list[dict], path: Path) -> None:
    """A panel per data set: systems from top to bottom, mean accuracy with the seeds' standard deviation, by ε."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    order = list(SYSTEMS)
    rows = [{**row, "system": label(row)} for row in sorted(rows, key=lambda row: order.index(row["system"]))]
    panels = list(dict.fromkeys((row["data"], row["size"]) for row in rows))
    tallest = max(len({row["system"] for row in rows if (row["data"], row["size"]) == panel}) for panel in panels)
    figure, axes = pyplot.subplots(1, len(panels), figsize=(7 * len(panels), 2 + 0.26 * tallest), squeeze=False)
    for axis, (data, size) in zip(axes[0], panels, strict=True):
        here = [row for row in rows if (row["data"], row["size"]) == (data, size)]
        systems = list(dict.fromkeys(row["system"] for row in here))
        for number, epsilon in enumerate(sorted({row["epsilon"] for row in here})):
            color = COLOURS[number % len(COLOURS)]
            for place, system in enumerate(systems):
                values = [100 * r["accuracy"] for r in here if (r["system"], r["epsilon"]) == (system, epsilon)]
                if values:
                    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
                    style = {"fmt": "o", "ms": 4, "color": color, "capsize": 2}
                    axis.errorbar(statistics.mean(values), -place, xerr=deviation, **style)
            axis.plot([], [], "o", ms=4, color=color, label=f"ε = {epsilon:g}")
        axis.set_yticks([-place for place in range(len(systems))], systems, fontsize=8)
        axis.set_xlabel("test accuracy, % (mean, deviation of seeds)")
        axis.set_title(f"{data} ({size})")
        axis.grid(axis="x", alpha=0.3)
        axis.legend(loc="lower center", bbox_to_anchor=(0.5, 1.06), ncols=len(COLOURS), frameon=False)
    figure.tight_layout()
    figure.savefig(path, dpi=150, bbox_inches="tight")
    print(f"plot: {path}", file=sys.stderr)


if __name__ == "__main__":
    main()
