"""When public steps end and private ones begin, and how the two are mixed (Bu et al. 2024).

Both are functions of the configuration, of step numbers and of *public* images: they cost no privacy, and where private
steps begin says nothing about private data.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

from dprandp.config.schema import ContinueConfig, switch_step

LATEST = 0.8
"""Part of all steps after which private ones begin, whatever the rule says: a run without them would learn nothing."""

PATIENCE = 3
"""Looks at the public validation loss without progress that are a plateau."""

PROGRESS = 0.01
"""Relative: what the loss has to fall below the best before, to count as progress."""

FEW = 0.1
"""The decelerator over the other terms (``LossTerms.slowdown``) at which private steps begin: such a step then does
nine tenths of what it could without noise. The median of the last ``PATIENCE`` looks counts: one estimate may err."""


@dataclass(frozen=True)
class Look:
    """One look at the public training.

    Attributes:
        step: public steps done.
        loss: mean loss of the held-out public images.
        slowdown: of ``LossTerms``; NaN where it says nothing, None where it was not estimated.
    """

    step: int
    loss: float
    slowdown: float | None = None

    def to_list(self) -> list[float | None]:
        """For a checkpoint; NaN becomes null there, which ``from_list`` undoes."""
        return [self.step, self.loss, self.slowdown, self.slowdown is not None]

    @classmethod
    def from_list(cls, values: Sequence[float | None]) -> Look:
        """What ``to_list`` returned, after a round trip through JSON."""
        step, loss, slowdown, estimated = values
        found = None if not estimated else math.nan if slowdown is None else slowdown
        return cls(int(step), math.nan if loss is None else float(loss), found)


def plateau(losses: Sequence[float]) -> bool:
    """Whether the last ``PATIENCE`` losses bring no progress over the best before them; a loss that is NaN is none."""
    if len(losses) <= PATIENCE:
        return False
    before = min((loss for loss in losses[:-PATIENCE] if not math.isnan(loss)), default=math.inf)
    return not any(loss < before * (1 - PROGRESS) for loss in losses[-PATIENCE:])


def few(looks: Sequence[Look]) -> bool:
    """Whether noise costs a private step little, by the last ``PATIENCE`` looks; an estimate that is NaN says no."""
    if len(looks) < PATIENCE:
        return False
    ratios = [math.inf if look.slowdown is None else look.slowdown for look in looks[-PATIENCE:]]
    return median(math.inf if math.isnan(ratio) else ratio for ratio in ratios) <= FEW


def switch_now(config: ContinueConfig, looks: Sequence[Look], step: int) -> str | None:
    """Whether private steps begin, before step ``step`` (counted from 0); why, in words, or None.

    Args:
        looks: so far, in order; the last one may be of this very step.
    """
    if config.mix in ("cosine", "ratio", "private"):
        return f"every step is private (mix = {config.mix})" if config.mix != "private" else "no public step was wanted"
    if config.mix == "public":
        return None
    fixed = switch_step(config)
    if fixed is not None:
        return f"at step {fixed}, as given" if step >= fixed else None
    fresh = bool(looks) and looks[-1].step == step
    if fresh and config.switch == "plateau" and plateau([look.loss for look in looks]):
        return f"at step {step}: the public validation loss has come to a plateau"
    if fresh and config.switch == "decelerator" and few(looks):
        return f"at step {step}: the decelerator has become small, on public images ({looks[-1].slowdown:.2g})"
    latest = latest_switch(config)
    if step >= latest:
        return f"at step {latest}, the latest: the rule ({config.switch}) did not ask for it before"
    return None


def latest_switch(config: ContinueConfig) -> int:
    """The step at which private ones begin at the latest."""
    fixed = switch_step(config)
    return min(config.steps - 1, math.ceil(LATEST * config.steps)) if fixed is None else fixed


def most_private_steps(config: ContinueConfig) -> int:
    """Private steps if the rule asks for them at the first look that it may; as many as there are at a given step."""
    if config.mix == "public":
        return 0
    if config.mix != "step":
        return config.steps
    fixed = switch_step(config)
    return config.steps - (first_look(config) if fixed is None else fixed)


def first_look(config: ContinueConfig) -> int:
    """The first step at which a rule may ask for the switch."""
    looks = PATIENCE if config.switch == "plateau" else PATIENCE - 1  # beside the one at step 0
    return min(looks * config.check_every, latest_switch(config))


def public_weight(config: ContinueConfig, step: int, switch: int, public: int, private: int) -> float:
    """α of g = α g_public + (1 − α) g_private, in [0, 1].

    Args:
        step: from 0.
        switch: the first private step.
        public, private: numbers of examples, both public.

    Returns:
        step: 1 before the switch, then 0. cosine: 1 − cos(πt/2T), from 0 to 1 (Amid et al. 2022, DPMD). ratio: the
        public part of all examples.
    """
    if config.mix == "cosine":
        return 1 - math.cos(math.pi * step / (2 * config.steps))
    if config.mix == "ratio":
        return public / (public + private)
    return 1.0 if step < switch or config.mix == "public" else 0.0
