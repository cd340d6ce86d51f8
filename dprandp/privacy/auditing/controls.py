"""Positive controls: the run's mechanism with one known fault, wrapped around it from outside.

Nothing in the production code can be switched to these faults. Each is made by handing the real pieces something
other than what was accounted: another plan to the mechanism, another clip norm or separated views to the loop, noise
that comes round again, or an output divided once more.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from dprandp.privacy.noise import RandomMode, RandomSource
from dprandp.privacy.plan import PrivatePlan, PrivateStep

SEPARATE_VIEWS = 4
"""Views of a record in the control that clips each of them, where the plan has fewer."""


class _SameNoise:
    """Noise of one shape is drawn once and then handed out again; batches stay fresh."""

    mode: RandomMode = "os-entropy"
    private = False

    def __init__(self, source: RandomSource) -> None:
        self._source = source
        self._kept: dict[tuple[int, ...], torch.Tensor] = {}

    def uniform(self, count: int):
        return self._source.uniform(count)

    def gaussian(self, shape: Sequence[int]) -> torch.Tensor:
        key = tuple(shape)
        if key not in self._kept:
            self._kept[key] = self._source.gaussian(shape)
        return self._kept[key].clone()


class _DividedByBatch:
    """A step whose sum is divided by the batch that was drawn, not by the public expected batch."""

    def __init__(self, step: PrivateStep, plan: PrivatePlan) -> None:
        self.number, self.indices = step.number, step.indices
        self._step, self._plan = step, plan

    def release(self, clipped_sums: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        factor = self._plan.expected_batch / max(1, len(self.indices))
        return {name: value * factor for name, value in self._step.release(clipped_sums).items()}


@dataclass(frozen=True)
class Control:
    """A mechanism with at most one fault; ``FAITHFUL`` has none.

    Attributes:
        name: as the report calls it.
        noise_factor: the noise is this many times what was accounted.
        clip_factor: the loop clips at this many times the clip norm.
        separate_views: the K views of a record are clipped one by one and added up, as if they were records. (Clipping
            each view and then *averaging* would keep the sensitivity; added up, it is K C.)
        same_noise: every step gets the noise of the first.
        actual_divisor: the sum is divided by the number of records that were drawn.
    """

    name: str
    noise_factor: float = 1.0
    clip_factor: float = 1.0
    separate_views: bool = False
    same_noise: bool = False
    actual_divisor: bool = False

    def mechanism_plan(self, plan: PrivatePlan) -> PrivatePlan:
        """What the mechanism is given instead of the plan."""
        return replace(plan, noise_multiplier=plan.noise_multiplier * self.noise_factor)

    def clip_norm(self, plan: PrivatePlan) -> float:
        """What the loop clips at."""
        return min(1e8, plan.clip_norm * self.clip_factor)

    def views(self, plan: PrivatePlan) -> int:
        """Views of a record that a loop is to be given."""
        return max(SEPARATE_VIEWS, plan.views) if self.separate_views else plan.views

    def random(self, source: RandomSource) -> RandomSource:
        """Where the mechanism takes its randomness from."""
        return _SameNoise(source) if self.same_noise else source

    def step(self, step: PrivateStep, plan: PrivatePlan) -> PrivateStep | _DividedByBatch:
        """What the loop is handed instead of the step; its ``indices`` may be changed by the caller afterwards."""
        return _DividedByBatch(step, plan) if self.actual_divisor else step

    def applies(self, plan: PrivatePlan) -> bool:
        """False where the plan leaves no room for the fault: noise cannot be reused in a single step."""
        return plan.steps > 1 or not self.same_noise


FAITHFUL = Control("none")
CONTROLS = (
    Control("noise off", noise_factor=0.0),
    Control("noise of a tenth", noise_factor=0.1),
    Control("clip off", clip_factor=1e6),
    Control("clip per view", separate_views=True),
    Control("noise reused", same_noise=True),
    Control("divisor from the actual batch", actual_divisor=True),
)
