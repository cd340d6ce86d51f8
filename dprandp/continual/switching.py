"""When public steps end and private ones begin, and how the two are mixed (Bu et al. 2024).

Both are functions of the configuration, of step numbers and of *public* images: they cost no privacy.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

from dprandp.config.schema import ContinueConfig, switch_step

LATEST = 0.8
"""Fraction of all steps after which private ones begin under every rule, so that no run is without them."""

PATIENCE = 3
"""Evaluations of the public validation loss without progress that make a plateau."""

PROGRESS = 0.01
"""Smallest relative decrease of the loss below its earlier minimum that counts as progress."""

FEW = 0.1
"""The decelerator over the other terms (``LossTerms.slowdown``) at which private steps begin: a step then
achieves nine tenths of the improvement without noise. The median of the last ``PATIENCE`` evaluations decides."""


@dataclass(frozen=True)
class Look:
    """One evaluation of the public training."""

    step: int  # public steps done
    loss: float  # mean loss of the held-out public images
    slowdown: float | None = None  # of ``LossTerms``; NaN where undefined, None where not estimated

    def to_list(self) -> list[float | None]:
        """For a checkpoint; NaN becomes null there, which ``from_list`` undoes."""
        return [self.step, self.loss, self.slowdown, self.slowdown is not None]

    @classmethod
    def from_list(cls, values: Sequence[float | None]) -> Look:
        """From the result of ``to_list``, after conversion to JSON and back."""
        step, loss, slowdown, estimated = values
        found = None if not estimated else math.nan if slowdown is None else slowdown
        return cls(int(step), math.nan if loss is None else float(loss), found)


def plateau(losses: Sequence[float]) -> bool:
    """Whether the last ``PATIENCE`` losses show no progress over the best one before them; NaN is no progress."""
    if len(losses) <= PATIENCE:
        return False
    before = min((loss for loss in losses[:-PATIENCE] if not math.isnan(loss)), default=math.inf)
    return not any(loss < before * (1 - PROGRESS) for loss in losses[-PATIENCE:])


def few(looks: Sequence[Look]) -> bool:
    """Whether noise costs a private step little in the last ``PATIENCE`` evaluations; False for NaN."""
    if len(looks) < PATIENCE:
        return False
    ratios = [math.inf if look.slowdown is None else look.slowdown for look in looks[-PATIENCE:]]
    return median(math.inf if math.isnan(ratio) else ratio for ratio in ratios) <= FEW


def switch_now(config: ContinueConfig, looks: Sequence[Look], step: int) -> str | None:
    """The reason, in words, for beginning private steps before this step (from 0), or None; after these evaluations."""
    if config.mix == "private":
        return "no public step was given"
    if config.mix in ("cosine", "ratio"):
        return f"every step is private (mix = {config.mix})"
    if config.mix == "public":
        return None
    fixed = switch_step(config)
    if fixed is not None:
        return f"at step {fixed}, as given" if step >= fixed else None
    fresh = bool(looks) and looks[-1].step == step
    if fresh and config.switch == "plateau" and plateau([look.loss for look in looks]):
        return f"at step {step}: the public validation loss has reached a plateau"
    if fresh and config.switch == "decelerator" and few(looks):
        return f"at step {step}: the decelerator has become small, on public images ({looks[-1].slowdown:.2g})"
    latest = latest_switch(config)
    if step >= latest:
        return f"at step {latest}, the latest possible: the rule ({config.switch}) did not switch before"
    return None


def latest_switch(config: ContinueConfig) -> int:
    """The latest step at which private ones begin."""
    fixed = switch_step(config)
    return min(config.steps - 1, math.ceil(LATEST * config.steps)) if fixed is None else fixed


def most_private_steps(config: ContinueConfig) -> int:
    """The largest number of private steps: that of a rule at its first evaluation, or of a given step."""
    if config.mix == "public":
        return 0
    if config.mix != "step":
        return config.steps
    fixed = switch_step(config)
    return config.steps - (first_look(config) if fixed is None else fixed)


def first_look(config: ContinueConfig) -> int:
    """The first step at which a rule may switch."""
    looks = PATIENCE if config.switch == "plateau" else PATIENCE - 1  # beside the one at step 0
    return min(looks * config.check_every, latest_switch(config))


def public_weight(config: ContinueConfig, step: int, switch: int, public: int, private: int) -> float:
    """α of g = α g_public + (1 − α) g_private, in [0, 1], from numbers of public and private examples.

    Mix 'step': 1 before the switch (the first private step), then 0. 'cosine': 1 − cos(πt/2T), from 0 to 1 (Amid et al.
    2022, DPMD). 'ratio': the public part of all examples.
    """
    if config.mix == "cosine":
        return 1 - math.cos(math.pi * step / (2 * config.steps))
    if config.mix == "ratio":
        return public / (public + private)
    return 1.0 if step < switch or config.mix == "public" else 0.0
