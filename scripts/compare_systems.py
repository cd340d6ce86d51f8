#!/usr/bin/env python3
"""Ways to train on the same data, ε and seeds: DP-RandP's phases, training from scratch, parts of the weights.

    python scripts/compare_systems.py digits --out runs/systems
    python scripts/compare_systems.py digits --systems probe "all phases" --epsilons 1 --seeds 3
    python scripts/compare_systems.py --table

A system is a list of commands of the package, each with the flags that make the difference; Phase I is made once for a
seed and shared. Each run has a budget of its own, and reads the test split once, at its end; nothing is chosen by it.
Finished rows are kept in results.jsonl. Seconds are of the private stages, on whatever else the machine was doing.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
from pathlib import Path

SCRATCH = ["finetune", "--from", "scratch", "--arch", "wrn-10-1"]

SYSTEMS: dict[str, list[list[str]]] = {
    "probe": [["probe", "--share", "1"]],
    "all phases": [["probe"], ["finetune"]],
    "all phases, automatic clipping": [["probe"], ["finetune", "--clipping", "automatic"]],
    "from scratch, K = 1": [SCRATCH],
    "from scratch, K = 4": [[*SCRATCH, "--views", "4"]],
    "from scratch, automatic clipping": [[*SCRATCH, "--clipping", "automatic"]],
    **{
        f"all phases, {mode} {how} {keep:g}": [["probe"], ["finetune", f"--{mode}", how, "--keep", str(keep), *more]]
        for mode, more in (("freeze", ()), ("select", ("--every", "2")))
        for how in ("random", "magnitude")
        for keep in (0.1, 0.3, 0.6)
    },
    **{
        f"from scratch, freeze {how} {keep:g}": [[*SCRATCH, "--freeze", how, "--keep", str(keep)]]
        for how in ("random", "magnitude")
        for keep in (0.1, 0.3, 0.6)
    },
}
"""Name -> commands after Phase I."""


def main() -> None:
    """Run what is missing, then print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("datasets", nargs="*", help="names as for --data")
    parser.add_argument("--systems", nargs="+", choices=SYSTEMS, default=list(SYSTEMS), metavar="NAME",
                        help="; ".join(SYSTEMS))  # fmt: skip
    parser.add_argument("--epsilons", nargs="+", default=["1", "8"])
    parser.add_argument("--seeds", type=int, default=3, help="seeds 0 .. n-1")
    parser.add_argument("--size", default="tiny")
    parser.add_argument("--out", type=Path, default=Path("runs/systems"))
    parser.add_argument("--data-dir", type=Path, default=Path("data"))
    parser.add_argument("--table", action="store_true", help="only print the table")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    log = args.out / "results.jsonl"
    for data in () if args.table else args.datasets:
        for seed in range(args.seeds):
            for epsilon in args.epsilons:
                for system in args.systems:
                    measure(args, log, {"data": data, "system": system, "epsilon": float(epsilon), "seed": seed})
    print_table(read(log))


def measure(args: argparse.Namespace, log: Path, cell: dict) -> None:
    """One run, unless its row is there already."""
    cell["size"] = args.size
    if any(cell.items() <= row.items() for row in read(log)):
        return
    public = args.out / f"public-{cell['data']}-{args.size}-s{cell['seed']}"
    commands = SYSTEMS[cell["system"]]
    needs_phase_one = commands[0][0] == "probe"
    run = args.out / "run"
    shutil.rmtree(run, ignore_errors=True)
    common = ["--size", args.size, "--seed", cell["seed"]]
    if needs_phase_one:
        dprandp("generate", "--run", public, *common)
        dprandp("pretrain", "--run", public, *common, "--data", cell["data"])
        shutil.copytree(public, run, copy_function=os.link, ignore=shutil.ignore_patterns(".lock"))
    seconds = 0.0
    for command in commands:
        first = command is commands[0]
        budget = ["--data", cell["data"], "--eps", cell["epsilon"]] if first else []
        result = dprandp(*command, "--run", run, "--data-dir", args.data_dir, *common, *budget)
        seconds += result["seconds"]
    shutil.rmtree(run)
    row = {**cell, "accuracy": result["accuracy"], "spent": result["epsilon"], "seconds": round(seconds, 1)}
    with log.open("a", encoding="utf-8") as rows:
        rows.write(json.dumps(row) + "\n")
    print(json.dumps(row), file=sys.stderr, flush=True)


def dprandp(*arguments: object) -> dict:
    """Run a command of the package and return its JSON."""
    command = [sys.executable, "-m", "dprandp", *map(str, arguments), "--json", "--quiet"]
    done = subprocess.run(command, stdout=subprocess.PIPE, check=False, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(command[2:])} ended with {done.returncode}")
    return json.loads(done.stdout)


def read(log: Path) -> list[dict]:
    """All finished rows."""
    return [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()] if log.exists() else []


def print_table(rows: list[dict]) -> None:
    """Markdown: test accuracy in per cent, mean ± sample standard deviation over seeds; a line per data and system."""
    epsilons = sorted({row["epsilon"] for row in rows})
    print("| data | system | " + " | ".join(f"ε = {epsilon:g}" for epsilon in epsilons) + " | s | seeds |")
    print("|---" * (4 + len(epsilons)) + "|")
    groups: dict[tuple, list[dict]] = {}
    for row in rows:
        groups.setdefault((row["data"], row["size"], row["system"]), []).append(row)
    for (data, size, system), group in groups.items():
        columns = [spread([100 * row["accuracy"] for row in group if row["epsilon"] == each]) for each in epsilons]
        seconds = statistics.mean(row["seconds"] for row in group)
        seeds = len({row["seed"] for row in group})
        print("| " + " | ".join([f"{data} ({size})", system, *columns, f"{seconds:.0f}", f"{seeds}"]) + " |")


def spread(values: list[float]) -> str:
    """'68.1 ± 0.2', or a dash for none."""
    if not values:
        return "–"
    deviation = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.1f}{deviation}"


if __name__ == "__main__":
    main()
