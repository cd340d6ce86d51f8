"""Record and replay: D and D with one record zeroed out, through the same steps with the same random bits.

A loop runs on D while everything that passes between it and its mechanism is noted: indices, clipped sums, what was
released. It then runs on D with the slot of one record empty (N, q and all positions are the same), with the same
random bits, and is handed the *first* run's releases, so that both runs stand at the same parameters in every step: the
sensitivity that composition speaks of is that of one step, given everything released before. What differs between the
notes must be the one record's clipped part of the sums, and nothing else.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from scipy import stats

from dprandp.privacy.mechanism import PrivateMechanism, PrivatePlan, PrivateStep
from dprandp.privacy.randomness import SystemRandom

Tensors = dict[str, torch.Tensor]

NOISE_SIGNIFICANCE = 1e-6
"""Of the two looks at the noise, each: a sound mechanism is accused this often."""

FLOAT32 = 2.0**-24


class Tape(SystemRandom):
    """Entropy of the operating system that can be played again: kept in memory alone, and gone with the audit."""

    def __init__(self, words: list[np.ndarray] | None = None) -> None:
        self._kept: list[np.ndarray] = [] if words is None else words
        self._played = None if words is None else iter(words)

    def again(self) -> Tape:
        """The same bits from the beginning."""
        return Tape(self._kept)

    def words(self, count: int) -> np.ndarray:
        if self._played is None:
            self._kept.append(super().words(count))
            return self._kept[-1]
        kept = next(self._played, None)
        if kept is None or len(kept) != count:
            raise RuntimeError("the second run asked for other randomness than the first")
        return kept


@dataclass(frozen=True)
class Observed:
    """One step, seen from outside.

    Attributes:
        number: of the update. indices: int64 [b], of records.
        sums: name -> float64, what the loop handed in. released: name -> float64, what it got.
    """

    number: int
    indices: np.ndarray
    sums: Tensors
    released: Tensors


class Watch:
    """Stands between a loop and its mechanism: notes what passes, and can hand out an earlier run's releases.

    Args:
        mechanism: the real one, in any state.
        plan: what was accounted.
        most: steps that the loop is given.
        wrap: what the loop is handed instead of each step; see ``Control.step``.
        watched: position of the record that the runs differ in.
        present: put it into every batch, or take it out of every batch.
        follow: the notes of the run to follow, None for the first.
        rows: rows of the loop's arrays that belong to one record.
        keep: False keeps no notes (``total`` is kept in any case).

    Attributes:
        observed: the notes.
        total: name -> float64, sum of all releases.
    """

    def __init__(
        self,
        mechanism: PrivateMechanism,
        plan: PrivatePlan,
        most: int,
        wrap=lambda step, plan: step,
        *,
        watched: int | None = None,
        present: bool = True,
        follow: Sequence[Observed] | None = None,
        rows: int = 1,
        keep: bool = True,
    ) -> None:
        self.plan, self.private = plan, mechanism.private
        self.observed: list[Observed] = []
        self.total: Tensors = {}
        self.next_step = mechanism.next_step
        self._mechanism, self._left, self._wrap = mechanism, most, wrap
        self._watched, self._present, self._follow, self._rows, self._keep = watched, present, follow, rows, keep

    @property
    def remaining_steps(self) -> int:
        """As the mechanism's, but for ``most``."""
        return min(self._left, self._mechanism.remaining_steps)

    def steps(self) -> Iterator[WatchedStep]:
        """The mechanism's steps, watched."""
        steps = self._mechanism.steps()
        while self._left > 0 and (step := next(steps, None)) is not None:
            self._left -= 1
            self.next_step = self._mechanism.next_step
            step.indices = self._batch(step.indices)
            yield WatchedStep(self, self._wrap(step, self.plan), self._rows)

    def _batch(self, indices: np.ndarray) -> np.ndarray:
        if self._watched is None:
            return indices
        others = indices[indices != self._watched]
        if not self._present:
            return others
        return np.insert(others, np.searchsorted(others, self._watched), self._watched)

    def note(self, step: WatchedStep, sums: Mapping[str, torch.Tensor], released: Tensors) -> Tensors:
        """Keep a release; returns what the loop is to be told."""
        for name, value in released.items():
            self.total[name] = self.total.get(name, 0) + value.double()
        if not self._keep:
            return dict(released)
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

    def __init__(self, watch: Watch, step: PrivateStep, rows: int) -> None:
        self.number, self.records = step.number, step.indices
        self.indices = step.indices if rows == 1 else (step.indices[:, None] * rows + np.arange(rows)).ravel()
        self._watch, self._step = watch, step

    def release(self, clipped_sums: Mapping[str, torch.Tensor]) -> Tensors:
        """As ``PrivateStep.release``."""
        return self._watch.note(self, clipped_sums, self._step.release(clipped_sums))


@dataclass(frozen=True)
class Check:
    """One thing that was looked at.

    Attributes:
        name: what has to hold.
        passed: whether it does.
        value, limit: what was found, and up to where it passes.
    """

    name: str
    passed: bool
    value: float
    limit: float


def compare(first: Sequence[Observed], second: Sequence[Observed], plan: PrivatePlan, watched: int) -> list[Check]:
    """Hold two runs against each other and against the plan.

    Args:
        first: notes of the run on D, of at least one step.
        second: notes of the run on D without record ``watched``, which followed the first.
        plan: what was accounted, for the number of records that the runs had.
        watched: position of the record.

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
    noises = [_noise(step, plan) for step in first]
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
        released = _difference(a.released, b.released)
        sums = _difference(a.sums, b.sums)
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


def _noise(step: Observed, plan: PrivatePlan) -> torch.Tensor:
    """What was added to the sum, flat, if the divisor is the public one."""
    return torch.cat([(step.released[n] * plan.expected_batch - step.sums[n]).flatten() for n in step.sums])


def _difference(left: Tensors, right: Tensors) -> Tensors:
    return {name: left[name] - right[name] for name in left}


def _norm(tensors: Tensors) -> float:
    return math.sqrt(sum(float(value.square().sum()) for value in tensors.values()))
