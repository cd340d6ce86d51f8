"""What the experiments share: run a command of the package, keep a row for each finished cell, show a spread.

An experiment is a list of cells (facts by name). Each cell's row goes to ``results.jsonl`` as soon as it is there, and
cells that have one are left out: a script that is stopped goes on at the next cell when it is started again.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path


def dprandp(*arguments: object, aloud: bool = False) -> dict:
    """Run a command of the package in a process of its own and return its JSON; end the script where it fails.

    ``seconds`` is what the whole command took; a private stage itself tells one digit of its own.

    Args:
        arguments: command and flags, such as ``"probe", "--run", run, "--eps", 1``.
        aloud: show the command, and let it report its progress.
    """
    command = [sys.executable, "-m", "dprandp", *map(str, arguments), "--json"]
    if aloud:
        print("+", " ".join(command[2:-1]), file=sys.stderr, flush=True)
    else:
        command.append("--quiet")
    started = time.perf_counter()
    done = subprocess.run(command, stdout=subprocess.PIPE, check=False, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(command[2:])} ended with {done.returncode}")
    return {**json.loads(done.stdout), "seconds": round(time.perf_counter() - started, 2)}


def parser(doc: str, out: str) -> argparse.ArgumentParser:
    """Flags of every experiment: how many seeds, where its rows go, and whether to run anything.

    Args:
        doc: of the script; its first line is shown. out: default folder.
    """
    made = argparse.ArgumentParser(description=doc.splitlines()[0])
    made.add_argument("--seeds", type=int, default=3, help="seeds 0 .. n-1")
    made.add_argument("--out", type=Path, default=Path(out), help="folder of the runs and results.jsonl")
    made.add_argument("--data-dir", type=Path, default=Path("data"))
    made.add_argument("--table", action="store_true", help="only print the table")
    return made


def log_of(args: argparse.Namespace) -> Path:
    """The file of the rows, in a folder that is there."""
    args.out.mkdir(parents=True, exist_ok=True)
    return args.out / "results.jsonl"


def read(log: Path) -> list[dict]:
    """All finished rows; none where the file is missing."""
    lines = log.read_text(encoding="utf-8").splitlines() if log.exists() else []
    return [json.loads(line) for line in lines]


def has_row(log: Path, cell: dict) -> bool:
    """Whether a finished row has all of a cell's facts."""
    return any(cell.items() <= row.items() for row in read(log))


def add_row(log: Path, row: dict) -> None:
    """Keep a finished row, and say it."""
    with log.open("a", encoding="utf-8") as rows:
        rows.write(json.dumps(row) + "\n")
    print(json.dumps(row), file=sys.stderr, flush=True)


def spread(values: list[float]) -> str:
    """'68.1 ± 0.2' (mean and sample standard deviation), '68.1' for one value, a dash for none."""
    if not values:
        return "–"
    deviation = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.1f}{deviation}"
