"""The whole benchmark in order, as plain values for JSON and for ``table.py``."""

from __future__ import annotations

import platform
from collections.abc import Callable, Collection
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from benchmark import bounds, curves, pairs, processes, table
from benchmark.cases import Findings
from benchmark.registry import PAIRS
from dprandp.errors import BenchmarkError, UsageError, nearest
from dprandp.models.precision import has_fast_bfloat16
from dprandp.runs.directory import facts

CURVES = "curves"
QUICK = (
    "generator", "pretraining", "patchnet", "patchnet-gradients", "probe", "finetune", "finetune-opacus", "one-view",
    "accountant",
)  # fmt: skip
PEERS = ("opacus", "prv-accountant", "jax-privacy")
FULL_ROUNDS, QUICK_ROUNDS = 5, 3


def names() -> list[str]:
    """Everything that ``--only`` takes, in the order in which it is measured."""
    return [*PAIRS, processes.NAME, CURVES, *(f"{CURVES}:{name}" for name in curves.CURVES)]


def run(only: Collection[str], scale: str, rounds: int, say: Callable[[str], None]) -> dict[str, Any]:
    """Measure.

    Args:
        only: names; none is everything (of ``--quick``: the pairs of ``QUICK``, without memory).
        scale: full, quick or tiny.
        rounds: of every pair.
        say: for progress.

    Returns:
        machine, scale, rounds, figures, curves, left_out: plain values. ``regressions``: keys of the figures past their
        bound, in quick runs. ``failed``: pair and reason where two sides disagree; the other pairs are measured.

    Raises:
        UsageError: an unknown name, or a curve in a quick run.
    """
    for name in only:
        if name not in names():
            raise UsageError(f"the benchmark has no part {name!r}", fix=nearest(name, names()))
    if rounds < 1:
        raise UsageError(f"--rounds {rounds} is below 1", fix="give 1 or more")
    findings, quick = Findings(), scale == "quick"
    failed: list[dict[str, str]] = []

    def add(found: Findings) -> None:
        findings.figures += found.figures
        findings.left_out += found.left_out
        for figure in found.figures:
            say(table.line(figure))

    for name, pair in PAIRS.items():
        if name in only if only else (not quick or name in QUICK):
            try:
                add(pairs.measure(pair, scale, rounds, say, weigh=not quick))
            except BenchmarkError as error:
                failed.append({"pair": name, "reason": error.problem})
                say(f"bench: {name} FAILED: {error.problem}")
    if processes.NAME in only or not (only or quick):
        _refuse_quick(quick, processes.NAME)
        add(processes.measure(scale, rounds, say, processes.cores()))
    for name in curves.CURVES:
        if not {CURVES, f"{CURVES}:{name}"}.isdisjoint(only) or not (only or quick):
            _refuse_quick(quick, CURVES)
            findings.curves.append(curves.measure(name, scale, min(rounds, 3), say))
    figures = bounds.bounded(findings.figures) if quick else findings.figures
    return {
        "machine": machine(),
        "scale": scale,
        "rounds": rounds,
        "figures": [figure.to_dict() for figure in figures],
        "curves": findings.curves,
        "left_out": [entry.to_dict() for entry in findings.left_out],
        "failed": failed,
        "regressions": [figure.key for figure in bounds.regressions(figures)],
    }


def raise_for(result: dict[str, Any]) -> None:
    """End a run in which two sides disagree, or a quick run that regressed.

    Raises:
        BenchmarkError: two sides of a pair do not compute the same numbers, or a ratio is past its bound.
    """
    if result["failed"]:
        told = "; ".join(f"{each['pair']}: {each['reason']}" for each in result["failed"])
        raise BenchmarkError(f"{len(result['failed'])} of the pairs cannot be compared ({told})", fix=pairs.FIX)
    if result["regressions"]:
        past = zip(result["regressions"], (row for row in result["figures"] if row["held"] is False), strict=True)
        told = "; ".join(f"{key}: {row['ratio']:.3g}, bound {row['bound']}" for key, row in past)
        raise BenchmarkError(
            f"{len(result['regressions'])} of the ratios regressed past a bound ({told})",
            fix="measure it again alone with --only; if it stays, the change that slowed it down has to be found",
        )


def machine() -> dict[str, Any]:
    """Hardware and versions; nothing that identifies anybody."""
    versions = {}
    for name in PEERS:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = "not installed"
    return {
        **facts(),
        "processor": _processor(),
        "cores": processes.cores(),
        "threads": torch.get_num_threads(),
        "bfloat16": has_fast_bfloat16("cpu"),
        **versions,
    }


def _processor() -> str:
    lines = Path("/proc/cpuinfo")
    if lines.is_file():
        for line in lines.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _refuse_quick(quick: bool, name: str) -> None:
    if quick:
        raise UsageError(f"--quick has no {name}", fix="leave --quick out")
