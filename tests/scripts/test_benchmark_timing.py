"""Timing on a clock that the test moves: order, units, repeats, and ratios within a round."""

from __future__ import annotations

import math

import pytest
from benchmark.timing import LEAST_SECONDS, MOST_CALLS, Sample, alternate, ratios, spread


class Machine:
    """A clock that stands still but for the works: each takes its seconds times how slow the machine is by now."""

    def __init__(self) -> None:
        self.now, self.slowness, self.calls = 0.0, 1.0, []

    def work(self, name: str, seconds: float, slower: float = 1.0):
        def call() -> None:
            self.calls.append(name)
            self.now += seconds * self.slowness
            self.slowness *= slower

        return call

    def time(self, works, rounds: int, **options) -> dict[str, list[Sample]]:
        return alternate(works, rounds, clock=lambda: self.now, cpu_clock=lambda: self.now / 2, **options)


def test_works_are_called_in_turn_after_one_uncounted_call_each() -> None:
    machine = Machine()
    samples = machine.time({"a": machine.work("a", 1.0), "b": machine.work("b", 3.0)}, 3)
    assert "".join(machine.calls) == "ab" + "ab" * 3
    assert samples == {"a": [Sample(1.0, 0.5)] * 3, "b": [Sample(3.0, 1.5)] * 3}


def test_short_works_are_repeated_and_the_seconds_are_of_one_call() -> None:
    machine = Machine()
    samples = machine.time({"short": machine.work("s", LEAST_SECONDS / 3.5), "none": machine.work("n", 0.0)}, 2)
    assert machine.calls.count("s") == 1 + 2 * 4
    assert machine.calls.count("n") == 1 + 2 * MOST_CALLS
    assert samples["short"][0].wall == pytest.approx(LEAST_SECONDS / 3.5)


def test_a_machine_that_slows_down_does_not_move_the_ratio_much() -> None:
    """Ratios within a round; that of all of one side before all of the other would be off by far (the control)."""
    machine = Machine()
    works = {"ours": machine.work("o", 1.0, slower=1.05), "theirs": machine.work("t", 4.0, slower=1.05)}
    samples = machine.time(works, 15)
    ours, theirs = ([sample.wall for sample in samples[name]] for name in works)
    assert ratios(theirs, ours).median == pytest.approx(4 * 1.05)
    assert theirs[-1] / ours[0] > 3 * 4


def test_median_and_range() -> None:
    found = spread([3.0, 1.0, 2.0])
    assert (found.median, found.lowest, found.highest, found.rounds) == (2.0, 1.0, 3.0, 3)
    assert ratios([4.0, 9.0], [2.0, 3.0]) == spread([2.0, 3.0])
    assert ratios([1.0], [0.0]).median == math.inf
    with pytest.raises(ValueError, match="argument 2"):
        ratios([1.0], [1.0, 2.0])
    with pytest.raises(ValueError, match="0 rounds"):
        alternate({}, 0)
