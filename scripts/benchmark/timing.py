"""Seconds of several ways to do the same work, taken in turn (A B C A B C …), and the ratios between them.

A shared machine is now fast, now slow: only what ran next to each other can be compared. Ratios are therefore taken
within a round, and summed up by median and range.

Imports nothing of the package.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

Work = Callable[[], object]
Clock = Callable[[], float]

LEAST_SECONDS = 0.05
"""Shorter works are repeated until one measurement is as long as this."""

MOST_CALLS = 1000


@dataclass(frozen=True)
class Sample:
    """One measurement, for one call of the work.

    Attributes:
        wall: seconds that passed.
        cpu: seconds that all threads of this process computed: steadier where other processes want the same cores,
            blind to waiting.
    """

    wall: float
    cpu: float


@dataclass(frozen=True)
class Spread:
    """Median and range of a ratio over the rounds."""

    median: float
    lowest: float
    highest: float
    rounds: int


def alternate(
    works: Mapping[str, Work],
    rounds: int,
    *,
    warm_up: bool = True,
    clock: Clock = time.perf_counter,
    cpu_clock: Clock = time.process_time,
) -> dict[str, list[Sample]]:
    """Call every work once a round, in the order given.

    Args:
        works: by name.
        rounds: at least 1.
        warm_up: call each once before, uncounted; short works are then repeated within a measurement. Without it every
            call counts, as for what is to be measured cold.
        clock, cpu_clock: seconds; for tests.

    Returns:
        One sample a round for each work, in the order of the rounds.
    """
    if rounds < 1:
        raise ValueError(f"{rounds} rounds")
    calls = dict.fromkeys(works, 1)
    if warm_up:
        for name, work in works.items():
            seconds = _sample(work, 1, clock, cpu_clock).wall
            calls[name] = min(MOST_CALLS, max(1, math.ceil(LEAST_SECONDS / max(seconds, 1e-9))))
    samples: dict[str, list[Sample]] = {name: [] for name in works}
    for _ in range(rounds):
        for name, work in works.items():
            samples[name].append(_sample(work, calls[name], clock, cpu_clock))
    return samples


def _sample(work: Work, calls: int, clock: Clock, cpu_clock: Clock) -> Sample:
    begun, cpu_begun = clock(), cpu_clock()
    for _ in range(calls):
        work()
    return Sample((clock() - begun) / calls, (cpu_clock() - cpu_begun) / calls)


def spread(values: Sequence[float]) -> Spread:
    """Median, lowest and highest of at least one value."""
    return Spread(statistics.median(values), min(values), max(values), len(values))


def ratios(above: Sequence[float], below: Sequence[float]) -> Spread:
    """The ratio of two sides within each round, over all rounds."""
    return spread([over / under if under > 0 else math.inf for over, under in zip(above, below, strict=True)])
