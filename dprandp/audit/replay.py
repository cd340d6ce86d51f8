"""Record and replay: D and D with one record zeroed out, through the same steps with the same random bits.

A stage's own loop runs on D while everything that passes between it and its mechanism is noted. It then runs on D with
the slot of one record empty (N, q and all positions are the same), with the same random bits, and is handed the *first*
run's releases, so that both runs stand at the same parameters in every step: the sensitivity that composition speaks
of is that of one step, given everything released before. What differs between the notes must be the one record's
clipped part of the sums, and nothing else. Each run has a temporary folder with a ledger of its own, and is thrown
away, so nothing of it reaches the audited run, and nothing is charged.
"""

from __future__ import annotations

import math
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from scipy import stats

from dprandp.audit.canaries import FAITHFUL, Control, Tape, rehearsal_plan
from dprandp.data import Dataset
from dprandp.dpsgd.budget import Budget
from dprandp.dpsgd.stage import PrivateStage
from dprandp.privacy.ledger import Ledger
from dprandp.privacy.mechanism import PrivatePlan, PrivateStep
from dprandp.runs.console import Console
from dprandp.runs.context import Context
from dprandp.runs.directory import RunDir

Tensors = dict[str, torch.Tensor]

NOISE_SIGNIFICANCE = 1e-6
"""Of the two looks at the noise, each: a sound mechanism is accused this often."""

FLOAT32 = 2.0**-24

REPLAYED_STEPS = 3

ROOM = 2**30
"""Free bytes of memory from which on temporary files are kept there."""


@contextmanager
def scratch_folder() -> Iterator[Path]:
    """A temporary folder, in memory where there is room: hundreds of small ledgers need not reach a disk."""
    memory = Path("/dev/shm")
    roomy = memory.is_dir() and os.access(memory, os.W_OK) and shutil.disk_usage(memory).free >= ROOM
    with tempfile.TemporaryDirectory(prefix="dprandp-audit-", dir=memory if roomy else None) as folder:
        yield Path(folder)


@dataclass(frozen=True)
class Observed:
    """One step, seen from outside: the indices of its records, int64 [b], what the loop handed in and what it got."""

    number: int
    indices: np.ndarray
    sums: Tensors
    released: Tensors


class Rehearsal(PrivateStage):
    """A private stage whose loop is watched: it notes what passes, and can hand out an earlier run's releases.

    Args:
        plan: what was accounted, for the number of records at hand (``rehearsal_plan``).
        context: of a temporary run directory.
        dataset: what the loop reads; None for one that is given its features.
        most: steps that the loop is given.
        watched: position of the record that the runs differ in; None keeps no notes.
        present: put it into every batch, or take it out of every batch.
        follow: the notes of the run to follow, None for the first.
        rows: rows of the loop's arrays that belong to one record.
    """

    def __init__(
        self,
        plan: PrivatePlan,
        context: Context,
        dataset: Dataset | None = None,
        control: Control = FAITHFUL,
        tape: Tape | None = None,
        most: int = REPLAYED_STEPS,
        watched: int | None = None,
        present: bool = True,
        follow: Sequence[Observed] | None = None,
        rows: int = 1,
    ) -> None:
        budget = Budget("an audit", math.inf, plan.delta, plan.examples, "one record")
        ledger = Ledger.create(context.rundir.privacy_dir / "ledger.jsonl", plan.examples)
        clipping = replace(plan, clip_norm=control.clip_norm(plan))  # what the loop clips at
        super().__init__(plan.stage, dataset, budget, context, clipping, ledger=ledger)
        self._mechanism = control.mechanism(plan, ledger, tape or Tape())
        self._accounted, self._control, self._left = plan, control, min(most, plan.steps)
        self._follow, self._watched, self._rows = follow, watched, rows
        self.present, self.observed = present, []
        self.private, self.next_step = self._mechanism.private, 0

    def mechanism(self, updates_done: int, ledger_head: str | None = None) -> Rehearsal:
        """Itself, in place of the mechanism; a rehearsal begins at the beginning."""
        return self

    @property
    def remaining_steps(self) -> int:
        return min(self._left, self._mechanism.remaining_steps)

    def steps(self) -> Iterator[WatchedStep]:
        steps = self._mechanism.steps()
        while self._left > 0 and (step := next(steps, None)) is not None:
            self._left -= 1
            self.next_step = self._mechanism.next_step
            if self._watched is not None:
                others = step.indices[step.indices != self._watched]
                place = np.searchsorted(others, self._watched)
                step.indices = np.insert(others, place, self._watched) if self.present else others
            yield WatchedStep(self, self._control.step(step, self._accounted), self._rows)

    def note(self, step: WatchedStep, sums: Mapping[str, torch.Tensor], released: Tensors) -> Tensors:
        """Keep a release; returns what the loop is to be told."""
        if self._watched is None:
            return released
        kept = [{name: value.detach().double().clone() for name, value in part.items()} for part in (sums, released)]
        self.observed.append(Observed(step.number, step.records, *kept))
        if self._follow is None:
            return dict(released)
        if len(self.observed) > len(self._follow):
            raise RuntimeError("the second run made more steps than the first")
        told = self._follow[len(self.observed) - 1].released
        return {name: told[name].to(value.dtype) for name, value in released.items()}


class WatchedStep:
    """A step whose ``indices`` name rows of the loop's arrays, and whose release is noted."""

    def __init__(self, watch: Rehearsal, step: PrivateStep, rows: int) -> None:
        self.number, self.records = step.number, step.indices
        self.indices = step.indices if rows == 1 else (step.indices[:, None] * rows + np.arange(rows)).ravel()
        self._watch, self._step = watch, step

    def release(self, clipped_sums: Mapping[str, torch.Tensor]) -> Tensors:
        return self._watch.note(self, clipped_sums, self._step.release(clipped_sums))


@contextmanager
def rehearsal_context(like: Context | None = None) -> Iterator[Context]:
    """A context in a temporary folder, locked, with the device and the microbatch of another one."""
    device, microbatch = (torch.device("cpu"), None) if like is None else (like.device, like.microbatch)
    with scratch_folder() as folder:
        rundir = RunDir.open(folder, create=True)
        with rundir.lock():
            yield Context(rundir, Console(quiet=True), device, data_dir=folder, microbatch=microbatch)


def paired_run(
    plan: PrivatePlan,
    examples: int,
    watched: int,
    loop: Callable[[Rehearsal], None],
    *,
    dataset: Dataset | None = None,
    like: Context | None = None,
    most: int = REPLAYED_STEPS,
    control: Control = FAITHFUL,
    rows: int = 1,
) -> list[Check]:
    """Run a loop with and without record ``watched`` of ``examples``, with the same random bits; compare.

    Args:
        plan: what was accounted, for any number of records.
        loop: makes the steps of the stage that it is given; where that is not ``present``, without the record.
        like: of the run, for device and microbatch. The rest: as for ``Rehearsal``.
    """
    plan, tape, notes = rehearsal_plan(plan, examples), Tape(), []
    for present in (True, False):
        tape.rewind()
        with rehearsal_context(like) as context:
            follow = None if present else notes[0]
            stage = Rehearsal(plan, context, dataset, control, tape, most, watched, present, follow, rows)
            loop(stage)
        notes.append(stage.observed)
    return compare(*notes, plan, watched)


@dataclass(frozen=True)
class Check:
    """One thing that was looked at: what has to hold, whether it does, what was found, and up to where it passes."""

    name: str
    passed: bool
    value: float
    limit: float


def compare(first: Sequence[Observed], second: Sequence[Observed], plan: PrivatePlan, watched: int) -> list[Check]:
    """Hold the notes of a run on D, and of one that followed it without ``watched``, against each other and the plan.

    Returns:
        Checks, always the same: steps, batches, difference of the sums (in clip norms), what else moved in the
        releases (in the noise's standard deviations), size of the noise (as a p-value's distance), repetition.
    """
    together = list(zip(first, second, strict=False))
    steps_differ = len(first) != len(second) or any(a.number != b.number for a, b in together) or not first
    batches = sum(not np.array_equal(a.indices[a.indices != watched], b.indices) for a, b in together)
    most = max((len(a.indices) for a in first), default=0)
    moved = max((_norm(_difference(a.sums, b.sums)) for a, b in together), default=math.inf) / plan.clip_norm
    # float32 rounding of a sum of b parts of norm C, in both runs; see the Guarantee of ``clipping``
    limit = 1 + 1e-6 + 4 * FLOAT32 * most
    noises = [
        torch.cat([(step.released[n] * plan.expected_batch - step.sums[n]).flatten() for n in step.sums])
        for step in first
    ]
    return [
        Check("both runs make the same steps", not steps_differ, float(len(second)), float(len(first))),
        Check("the batches differ in the record alone", batches == 0, float(batches), 0.0),
        Check("the sums differ by at most the clip norm", moved <= limit, moved, limit),
        _nothing_else(together, plan),
        _noise_size(noises, plan),
        _noise_fresh(noises),
    ]


def _nothing_else(together: Sequence[tuple[Observed, Observed]], plan: PrivatePlan) -> Check:
    """Divisor and noise are the same in both runs: the releases differ by the difference of the sums over qN."""
    worst = 0.0
    for a, b in together:
        released, sums = _difference(a.released, b.released), _difference(a.sums, b.sums)
        left = {name: released[name] * plan.expected_batch - sums[name] for name in sums}
        size = sum(value.numel() for value in sums.values())
        rounding = 8 * FLOAT32 * (_norm(a.sums) + _norm(b.sums) + 2 * plan.noise_std * math.sqrt(size))
        worst = max(worst, _norm(left) / rounding)
    return Check("divisor and noise do not depend on the record", worst <= 1, worst, 1.0)


def _noise_size(noises: Sequence[torch.Tensor], plan: PrivatePlan) -> Check:
    """Σ of the noise's squares over (σC)² is χ² distributed."""
    values = torch.cat(list(noises)) if noises else torch.zeros(1)
    squares = float(values.square().sum()) / plan.noise_std**2
    distribution = stats.chi2(values.numel())
    p = 2 * min(distribution.cdf(squares), distribution.sf(squares))
    found = math.sqrt(squares / values.numel())
    return Check("the noise has the standard deviation that was accounted", p > NOISE_SIGNIFICANCE, found, 1.0)


def _noise_fresh(noises: Sequence[torch.Tensor]) -> Check:
    """No step's noise is correlated with that of the step before, nor one coordinate's with its neighbour's."""
    pairs = [*pairwise(noises), *((noise[1:], noise[:-1]) for noise in noises if noise.numel() > 2)]
    limit = float(stats.norm.isf(NOISE_SIGNIFICANCE / 2 / max(1, len(pairs))))
    worst = 0.0
    for one, other in pairs:
        scale = float(one.norm() * other.norm())
        worst = max(worst, abs(float(one @ other)) / scale * math.sqrt(one.numel()) if scale > 0 else math.inf)
    return Check("the noise is fresh in every step and coordinate", worst <= limit, worst, limit)


def _difference(left: Tensors, right: Tensors) -> Tensors:
    return {name: left[name] - right[name] for name in left}


def _norm(tensors: Tensors) -> float:
    return math.sqrt(sum(float(value.square().sum()) for value in tensors.values()))
