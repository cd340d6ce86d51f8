"""What is compared with what: plain data that the pairs fill in and ``pairs.measure`` works through.

Imports nothing of the package but ``timing``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from benchmark.timing import Spread, Work

OURS = "dprandp"
"""The name of our own side."""


class PeerMissing(Exception):
    """A peer cannot take part here; says why, in words for the table."""


@dataclass(frozen=True)
class Limit:
    """A ratio that is to be reached, or not to be passed."""

    value: float
    at_most: bool = False

    def holds(self, ratio: float) -> bool:
        """Whether a ratio is within the limit; never for NaN."""
        return ratio <= self.value if self.at_most else ratio >= self.value

    def __str__(self) -> str:
        return f"{'≤' if self.at_most else '≥'} {self.value:g}"


@dataclass(frozen=True)
class Side:
    """One way to do the work.

    Attributes:
        name: as in the table.
        make: prepares it (model, buffers) and returns what is measured. Raises PeerMissing where it cannot be here.
        units: how many of the case's unit one call does; sides may differ.
    """

    name: str
    make: Callable[[], Work]
    units: float = 1


@dataclass(frozen=True)
class Comparison:
    """One figure about time.

    Attributes:
        against: name of the other side.
        wording: what the ratio is, after the number: "× as fast", "× the time".
        cost: the ratio is our time over theirs; else theirs over ours.
        target: where one was set for just this quantity.
    """

    against: str
    wording: str = "× as fast"
    cost: bool = False
    target: Limit | None = None


@dataclass(frozen=True)
class MemoryComparison:
    """One figure about peak memory: ours over theirs, or over a number of bytes.

    Attributes:
        against: name of the other side, or of what the bytes are.
        bytes: of what is compared with; None where it is a side.
        target: see ``Comparison``.
    """

    against: str
    bytes: int | None = None
    target: Limit | None = None


@dataclass(frozen=True)
class Absolute:
    """One figure about our time alone, where a target was set in seconds.

    Attributes:
        against: what it is measured by, in words.
        seconds: per unit.
        target: of the ratio of our time to it.
    """

    against: str
    seconds: float
    target: Limit


@dataclass(frozen=True)
class Case:
    """Both sides of a pair at one size, ready to be made.

    Attributes:
        ours: our side.
        others: the others.
        comparisons, memory, absolutes: the figures wanted.
        check: shows that the sides compute the same numbers (or, where they are random, the same from the same draws);
            returns, side by side, how far apart they were (relative). Raises BenchmarkError.
        sizes: shapes and settings, for the table.
        unit: of the seconds: "image", "step".
        rounds: most rounds that make sense (None: any).
        warm_up: see ``alternate``.
        threads: torch threads of all sides; None leaves them.
    """

    ours: Side
    others: tuple[Side, ...]
    comparisons: tuple[Comparison, ...]
    check: Callable[[], Mapping[str, float]]
    sizes: str
    unit: str
    memory: tuple[MemoryComparison, ...] = ()
    absolutes: tuple[Absolute, ...] = ()
    rounds: int | None = None
    warm_up: bool = True
    threads: int | None = None

    def side(self, name: str) -> Side:
        """The side of a name."""
        return next(side for side in (self.ours, *self.others) if side.name == name)


@dataclass(frozen=True)
class Figure:
    """One measured ratio: a line of the table.

    Attributes:
        pair: name of the pair.
        quantity: time, memory or rate.
        against, wording, target: see ``Comparison``.
        ratio: over the rounds.
        cpu_ratio: the same ratio of processor seconds; None where there is none.
        ours, theirs: medians: seconds per unit, or bytes.
        unit: of those.
        sizes: see ``Case``.
        difference: how far apart the two sides' results were.
        met: whether the median holds the target; None without one.
        bound, held: likewise for what ``--quick`` must not fall short of.
    """

    pair: str
    quantity: str
    against: str
    wording: str
    ratio: Spread
    ours: float
    theirs: float
    unit: str
    sizes: str
    cpu_ratio: float | None = None
    difference: float | None = None
    target: Limit | None = None
    bound: Limit | None = None

    @property
    def met(self) -> bool | None:
        return None if self.target is None else self.target.holds(self.ratio.median)

    @property
    def held(self) -> bool | None:
        return None if self.bound is None else self.bound.holds(self.ratio.median)

    @property
    def key(self) -> str:
        """The figure's own name: pair, quantity and other side."""
        return f"{self.pair} {self.quantity} {self.against}"

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "pair": self.pair, "quantity": self.quantity, "against": self.against, "ratio": self.ratio.median,
            "lowest": self.ratio.lowest, "highest": self.ratio.highest, "rounds": self.ratio.rounds,
            "wording": self.wording, "cpu_ratio": self.cpu_ratio, "ours": self.ours, "theirs": self.theirs,
            "unit": self.unit, "sizes": self.sizes, "difference": self.difference,
            "target": None if self.target is None else str(self.target), "met": self.met,
            "bound": None if self.bound is None else str(self.bound), "held": self.held,
        }  # fmt: skip


@dataclass(frozen=True)
class LeftOut:
    """A peer, or a whole measurement, that did not take part, and why."""

    pair: str
    peer: str
    reason: str

    def to_dict(self) -> dict[str, str]:
        """Plain values."""
        return vars(self).copy()


@dataclass
class Findings:
    """What measurements found, in order."""

    figures: list[Figure] = field(default_factory=list)
    left_out: list[LeftOut] = field(default_factory=list)
    curves: list[dict[str, Any]] = field(default_factory=list)
