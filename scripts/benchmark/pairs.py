"""The measurement of a pair: make the sides, show that they agree, time them in turn, weigh them one by one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from benchmark.cases import OURS, Case, Comparison, Figure, Findings, LeftOut, PeerMissing
from benchmark.memory import peak_in_child
from benchmark.timing import Sample, Work, alternate, ratios, spread
from dprandp.errors import BenchmarkError

Say = Callable[[str], None]


@dataclass(frozen=True)
class Pair:
    """A pair under its name.

    Attributes:
        name: as ``--only`` takes it.
        summary: one line.
        build: scale (full, quick or tiny) -> the case.
    """

    name: str
    summary: str
    build: Callable[[str], Case]


def measure(pair: Pair, scale: str, rounds: int, say: Say, *, weigh: bool = True) -> Findings:
    """All figures of a pair.

    Args:
        pair: which.
        scale: full, quick or tiny.
        rounds: at most; a case may want fewer.
        say: for progress.
        weigh: measure peak memory too, where the case wants it.

    Raises:
        BenchmarkError: the sides do not compute the same.
    """
    findings = Findings()
    case = pair.build(scale)
    threads = torch.get_num_threads()
    try:
        if case.threads is not None:
            torch.set_num_threads(case.threads)
        differences = case.check()
        works = _made(pair, case, findings)
        say(f"bench: {pair.name} ({case.sizes})")
        samples = alternate(works, min(rounds, case.rounds or rounds), warm_up=case.warm_up)
    finally:
        torch.set_num_threads(threads)
    for comparison in case.comparisons:
        if comparison.against in samples:
            findings.figures.append(_time_figure(pair, case, comparison, samples, differences))
    for absolute in case.absolutes:
        own = [sample.wall / case.ours.units for sample in samples[OURS]]
        findings.figures.append(
            Figure(
                pair.name, "time", absolute.against, f"× {absolute.against}",
                ratios(own, [absolute.seconds] * len(own)), spread(own).median, absolute.seconds,
                f"seconds per {case.unit}", case.sizes, target=absolute.target,
            )
        )
    if weigh:
        _weigh(pair, case, scale, set(works), findings, say)
    return findings


def agree(name: str, ours: torch.Tensor, theirs: torch.Tensor, tolerance: float) -> float:
    """How far two results are apart, in L2 relative to the second.

    Raises:
        BenchmarkError: further than ``tolerance``, or NaN: the two sides do not do the same work.
    """
    ours, theirs = ours.detach().double().flatten(), theirs.detach().double().flatten()
    if ours.shape != theirs.shape:
        raise BenchmarkError(f"{name}: results of {len(ours)} and {len(theirs)} numbers", fix=FIX)
    difference = float((ours - theirs).norm() / theirs.norm().clamp_min(1e-30))
    if not difference <= tolerance:
        raise BenchmarkError(f"{name}: the two sides differ by {difference:.2g}, not at most {tolerance:g}", fix=FIX)
    return difference


FIX = "the sides of a pair must compute the same numbers before their times mean anything: one of them is broken"


def _made(pair: Pair, case: Case, findings: Findings) -> dict[str, Work]:
    works = {case.ours.name: case.ours.make()}
    for side in case.others:
        try:
            works[side.name] = side.make()
        except PeerMissing as missing:
            findings.left_out.append(LeftOut(pair.name, side.name, str(missing)))
    return works


def _time_figure(
    pair: Pair,
    case: Case,
    comparison: Comparison,
    samples: Mapping[str, list[Sample]],
    differences: Mapping[str, float],
) -> Figure:
    def per_unit(name: str, clock: str) -> list[float]:
        units = case.side(name).units
        return [getattr(sample, clock) / units for sample in samples[name]]

    def ratio(clock: str):
        ours, theirs = per_unit(OURS, clock), per_unit(comparison.against, clock)
        return ratios(ours, theirs) if comparison.cost else ratios(theirs, ours)

    return Figure(
        pair=pair.name,
        quantity="time",
        against=comparison.against,
        wording=comparison.wording,
        ratio=ratio("wall"),
        cpu_ratio=ratio("cpu").median,
        ours=spread(per_unit(OURS, "wall")).median,
        theirs=spread(per_unit(comparison.against, "wall")).median,
        unit=f"seconds per {case.unit}",
        sizes=case.sizes,
        difference=differences.get(comparison.against),
        target=comparison.target,
    )


def _weigh(pair: Pair, case: Case, scale: str, present: set[str], findings: Findings, say: Say) -> None:
    wanted = [entry for entry in case.memory if entry.bytes is not None or entry.against in present]
    if not wanted:
        return
    say(f"bench: {pair.name}, memory")
    ours = peak_in_child(pair.name, scale, OURS).bytes
    for entry in wanted:
        theirs = peak_in_child(pair.name, scale, entry.against).bytes if entry.bytes is None else entry.bytes
        findings.figures.append(
            Figure(
                pair.name, "memory", entry.against, "× the memory", spread([ours / max(1, theirs)]),
                ours, theirs, "bytes", case.sizes, target=entry.target,
            )
        )
