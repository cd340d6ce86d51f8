"""One call on a machine with a GPU: does it compute what the CPU does, how fast is it, and, if asked, pretrain on it.

    python scripts/gpu_check.py --out DIR                       correctness, then rates: 10 minutes at most
    python scripts/gpu_check.py --out DIR --pretrain 6          then six minutes of pretraining at size paper
    python scripts/gpu_check.py --out DIR --device cpu --quick  the same code in seconds, on tiny sizes

DIR gets a row of ``results.jsonl`` as soon as it is there, ``facts.json`` (machine, versions, outcome), ``table.txt``,
and ``pretrain/``: the extractor, or the last checkpoint where time ran out, in files of at most 16 MiB
(``NAME.000``, ``NAME.001``, …: put together with ``cat``). A check that fails does not keep the others from running.

Exit codes: 0 all is well, 1 a check failed or did not finish, 3 there is no CUDA device here.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import device_checks
import device_rates
import torch
from experiment import add_row, read

from dprandp import generate, pretrain
from dprandp.config import schema
from dprandp.errors import DprandpError
from dprandp.runs import directory
from dprandp.runs.context import prepare_device
from dprandp.runs.signals import Interrupted

NO_DEVICE = 3
PIECE = 16 * 2**20
"""Bytes of a file that is brought back."""

CHECK_SECONDS, ALL_SECONDS = 180.0, 420.0
"""From the start: what is not begun by then is left out, and said to be."""

RESERVE = 45.0
"""Seconds of pretraining that are kept for what comes after its last step."""


def main() -> int:
    """Run everything; the exit code."""
    asked = _arguments()
    if asked.device == "cuda" and not torch.cuda.is_available():
        print("gpu_check: this machine has no CUDA device", file=sys.stderr)
        return NO_DEVICE
    device = prepare_device(asked.device)
    device = torch.device("cuda", 0) if device.type == "cuda" else device
    asked.out.mkdir(parents=True, exist_ok=True)
    log, started = asked.out / "results.jsonl", time.monotonic()
    log.unlink(missing_ok=True)
    sizes, scale = (device_checks.QUICK, device_rates.QUICK) if asked.quick else (device_checks.FULL, device_rates.FULL)
    _run("check", device_checks.checks(device, sizes), log, started + CHECK_SECONDS)
    _run("rate", device_rates.rates(device, scale), log, started + ALL_SECONDS)
    if asked.pretrain:
        work = [("paper" if not asked.quick else "tiny", lambda: _pretrain(asked, device, log))]
        _run("pretrain", work, log, float("inf"))
    rows = read(log)
    failed = [f"{row['kind']}: {row['name']}" for row in rows if not row["passed"]]
    table = _table(rows)
    (asked.out / "table.txt").write_text(table + "\n", encoding="utf-8")
    facts = {**directory.facts(), "seconds": round(time.monotonic() - started, 1), "failed": failed}
    (asked.out / "facts.json").write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    print(table)
    print(f"{len(rows) - len(failed)} of {len(rows)} passed on {facts['device']} in {facts['seconds']} s")
    return 1 if failed else 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of the results")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, for a test of the script")
    parser.add_argument("--pretrain", type=float, metavar="MINUTES", help="then pretrain at size paper")
    parser.add_argument("--images", type=int, default=20_000, help="synthetic images to pretrain on")
    return parser.parse_args()


def _run(
    kind: str, works: Iterable[tuple[str, Callable[[], dict[str, Any]]]], log: Path, deadline: float
) -> None:
    """Do each work that there is time for and keep its row; whatever goes wrong in one is its row."""
    for name, work in works:
        row: dict[str, Any] = {"kind": kind, "name": name}
        began = time.monotonic()
        if began > deadline:
            add_row(log, row | {"passed": False, "problem": "no time was left"})
            continue
        try:
            row |= {"passed": True, **work()}
        except Exception as error:  # of any kind: the others are to run, and the row says what it was
            traceback.print_exc()
            row |= {"passed": False, "problem": f"{type(error).__name__}: {error}"[:300]}
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        add_row(log, row | {"seconds": round(time.monotonic() - began, 2)})


def _pretrain(asked: argparse.Namespace, device: torch.device, log: Path) -> dict[str, Any]:
    """As many steps of the published recipe as there is time for, with its whole schedule; the files to ``--out``."""
    ends = time.monotonic() + 60 * asked.pretrain
    size, flags = ("tiny", {"arch": "wrn-10-1", "steps": 2}) if asked.quick else ("paper", {})
    count, workers = (16 if asked.quick else asked.images), len(os.sched_getaffinity(0))
    with tempfile.TemporaryDirectory() as folder, device_checks.stage_context(Path(folder), device, workers) as given:
        process = {"process": "dead-leaves", "resolution": 32} if asked.quick else {"resolution": 64}
        generate.run(schema.resolve("generate", size, None, process | {"count": count}), given)
        planned = schema.resolve("pretrain", size, None, flags)
        left = ends - time.monotonic()
        measured = [row for row in read(log) if (row["kind"], row["name"]) == ("rate", "pretraining step")]
        if not asked.quick and measured and measured[0]["passed"]:
            steps = int(0.9 * max(1.0, left - RESERVE) * measured[0]["rate"] / (2 * planned.batch_size))
            planned = schema.resolve("pretrain", size, None, flags | {"steps": max(1, min(planned.steps, steps))})
        clock = threading.Timer(max(1.0, left), os.kill, (os.getpid(), signal.SIGTERM))  # saves a checkpoint
        clock.start()
        stage = given.rundir.stage_dir(pretrain.STAGE)
        try:
            facts = {"finished": True, **directory.frozen(pretrain.run(planned, given))}
        except Interrupted:
            facts = {"finished": False}
        finally:
            clock.cancel()
            _bring(sorted(stage.glob("*")), asked.out / "pretrain")
    return {"planned_steps": planned.steps, **facts}


def _bring(files: Iterable[Path], folder: Path) -> None:
    """Copy files, those above ``PIECE`` cut into pieces of that size."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for file in (each for each in files if each.is_file()):
        if file.stat().st_size <= PIECE:
            shutil.copyfile(file, folder / file.name)
            continue
        with file.open("rb") as source:
            for number, piece in enumerate(iter(lambda: source.read(PIECE), b"")):
                (folder / f"{file.name}.{number:03d}").write_bytes(piece)


def _table(rows: list[dict[str, Any]]) -> str:
    lines = [f"{'check':<44} {'float32':>9} {'auto':>9}"]
    for row in (row for row in rows if row["kind"] == "check"):
        errors = [row.get("float32 error"), row.get("auto error")]
        shown = " ".join(f"{'' if error is None else format(error, '.1e'):>9}" for error in errors)
        lines.append(f"{row['name']:<44} {shown} {_outcome(row)}")
    lines += ["", f"{'rate (units a second)':<44} {'ours':>12} {'plain':>12} {'× time':>7} {'GB':>6}"]
    for row in (row for row in rows if row["kind"] == "rate"):
        ours, plain, peak = row.get("rate"), row.get("plain"), row.get("peak_gb")
        cost = plain / ours if plain and ours else None
        numbers = ((ours, ">12,.1f"), (plain, ">12,.1f"), (cost, ">7.2f"), (peak, ">6.2f"))
        shown = " ".join(format("" if n is None else n, form if n is not None else form[:3].rstrip(",."))
                         for n, form in numbers)  # fmt: skip
        lines.append(f"{row['name']:<44} {shown} {row.get('unit', '')} {_outcome(row)}")
    for row in (row for row in rows if row["kind"] == "pretrain"):
        seen = row.get("views_per_second")
        lines += ["", f"pretraining, size {row['name']}: {row.get('planned_steps')} steps, {seen} views/s, "
                  f"k-NN {row.get('knn_accuracy')} {_outcome(row)}"]  # fmt: skip
    return "\n".join(lines)


def _outcome(row: dict[str, Any]) -> str:
    return "" if row["passed"] else f"FAILED {row.get('problem', '')}".rstrip()


if __name__ == "__main__":
    try:
        sys.exit(main())
    except DprandpError as error:
        sys.exit(str(error))
