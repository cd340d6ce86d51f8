"""Which weights a step trains: differential privacy meets pruning (Adamczewski & Park 2023, arXiv 2303.04612).

*Freeze* chooses once and trains the chosen weights alone; *select* keeps the network dense and updates another choice
every R steps. Matrices and filters of the extractor are chosen from; head, norms, gains and biases are always trained.

A choice is a mask, m. The gradient of a record is multiplied by m *before* its norm is taken, and so is the noisy sum:
what is left is a Gaussian mechanism in as many dimensions as there are chosen weights.

Guarantee:
    A mask never depends on private data but through what was released before: at random it depends on the public seed,
    by magnitude on public weights (freeze) or on the parameters that noisy updates have made (select). Given the mask,
    a masked gradient is no longer than the whole one, so the sensitivity of the clipped sum is that of
    ``privacy.clipping``; dropping noisy coordinates is post-processing. A mask made from private gradients would be a
    release of its own, which no step pays for: it is refused.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dprandp.config import FinetuneConfig
from dprandp.errors import UsageError, nearest

CRITERIA, PRUNES = ("random", "magnitude"), ("hold", "zero")
SCOPES = ("global", "layer", "block")
BLOCK_CRITERIA = (*CRITERIA, "last")
DEFAULT_EVERY = 10

Masks = dict[str, Tensor]
"""Tensor name -> bool, of its shape: which weights are trained. A tensor not named is trained whole."""


@dataclass(frozen=True)
class MaskRule:
    """How weights are chosen; public.

    Attributes:
        mode: 'freeze' or 'select'. criterion: 'random' or 'magnitude' (for blocks also 'last').
        keep: part of the weights that is chosen, in (0, 1).
        scope: 'global' or 'layer', of what it is a part; 'block' for whole blocks (``frozen_blocks`` chooses them).
        every: steps between two choices of select. seed: public randomness.
        zero: weights that freeze does not choose become zero.
    """

    mode: str
    criterion: str
    keep: float
    scope: str
    every: int
    seed: int
    zero: bool

    def due(self, step: int) -> bool:
        """Whether another choice holds from this step on."""
        return self.mode == "select" and step > 0 and step % self.every == 0

    def choose(self, parameters: Mapping[str, Tensor], step: int) -> Masks:
        """The weights that are trained from a step on.

        Args:
            parameters: name -> float tensor, all that are trained: public ones for freeze, released ones for select.
            step: number of the step.

        Returns:
            ⌊keep · n + ½⌋ of the n weights are chosen, at least one; of equal magnitudes the first. On their device.

        Raises:
            UsageError: there is nothing to choose from.
        """
        of = {name: value for name, value in parameters.items() if name.startswith("extractor.") and value.ndim >= 2}
        if not of:
            raise UsageError("no weight of the extractor is trained, so none can be chosen", fix="leave --keep out")
        random = np.random.default_rng([self.seed, step])
        scores = {
            name: torch.from_numpy(random.random(tuple(value.shape)))
            if self.criterion == "random"
            else value.detach().abs().double().cpu()
            for name, value in of.items()
        }
        if self.scope == "layer":
            masks = {name: _largest(score.flatten(), self.keep) for name, score in scores.items()}
        else:
            together = _largest(torch.cat([score.flatten() for score in scores.values()]), self.keep)
            parts = together.split([score.numel() for score in scores.values()])
            masks = dict(zip(scores, parts, strict=True))
        return {name: mask.view(of[name].shape).to(of[name].device) for name, mask in masks.items()}

    def in_words(self, masks: Masks) -> str:
        """For the disclosure."""
        chosen, of = sum(int(mask.sum()) for mask in masks.values()), sum(mask.numel() for mask in masks.values())
        how = "at random from a public seed" if self.criterion == "random" else "by magnitude"
        when = "once, before the training" if self.mode == "freeze" else f"anew every {self.every} steps"
        after = "" if self.mode == "select" else "; the others are zero" if self.zero else "; the others stay"
        return f"{chosen:,} of {of:,} weights of the extractor, chosen {how} {when}{after}; and head, norms, biases"


ALL_WEIGHTS = "all"


def rule_of(config: FinetuneConfig) -> MaskRule | None:
    """The rule that a configuration asks for; None where every weight is trained.

    Raises:
        UsageError: values out of range, or settings that contradict each other or would do nothing.
    """
    for name in ("freeze", "select"):
        if getattr(config, name) == "gradient":
            raise UsageError(
                f"--{name} gradient is refused: a mask made from the private gradients would be one more release about "
                "the data, which epsilon does not count",
                fix=f"give --{name} random, or --{name} magnitude: both cost nothing",
            )
    blocks = config.scope == "block"
    freeze = BLOCK_CRITERIA if blocks else CRITERIA
    if config.freeze == "last" and not blocks:
        raise UsageError("--freeze last chooses whole blocks", fix="give --scope block with it")
    for name, known in (("freeze", freeze), ("select", CRITERIA), ("scope", SCOPES), ("prune", PRUNES)):
        value = getattr(config, name)
        if value is not None and value not in known:
            raise UsageError(f"--{name} {value!r} is unknown", fix=nearest(value, known))
    if config.freeze is not None and config.select is not None:
        raise UsageError("--freeze and --select exclude each other", fix="give one of them")
    criterion = config.freeze or config.select
    if (criterion is None) != (config.keep is None):
        problem = "--keep chooses nothing by itself" if criterion is None else "nobody said how much is to be trained"
        raise UsageError(problem, fix="give --freeze or --select, and --keep with it, such as --keep 0.1")
    for name, wanted in (("prune", "freeze"), ("every", "select"), ("scope", "keep")):
        if getattr(config, name) is not None and getattr(config, wanted) is None:
            raise UsageError(f"--{name} belongs to --{wanted}, which was not given", fix=f"give --{wanted}, or drop it")
    if criterion is None:
        return None
    if not 0 < config.keep < 1:
        raise UsageError(f"--keep {config.keep:g} lies outside (0, 1)", fix="give a part such as --keep 0.1")
    if config.every is not None and not 1 <= config.every <= 10**9:
        raise UsageError(f"--every {config.every} is no number of steps", fix="give one of 1 or more")
    if blocks and config.select is not None:
        raise UsageError("--select chooses single weights, not blocks", fix="give --freeze with --scope block")
    if blocks and config.prune == "zero":
        raise UsageError("a network without whole blocks computes nothing", fix="give --prune hold with --scope block")
    if config.extractor_scale == 0:
        raise UsageError("extractor_scale = 0 freezes the extractor whole", fix="leave it out, or --keep")
    return MaskRule(
        mode="freeze" if config.freeze else "select",
        criterion=criterion,
        keep=config.keep,
        scope=config.scope or "global",
        every=config.every or DEFAULT_EVERY,
        seed=config.seed,
        zero=config.prune == "zero",
    )


@torch.no_grad()
def apply(masks: Masks, tensors: Mapping[str, Tensor]) -> None:
    """Set to zero what is not chosen, in place; [B, ...] tensors of a batch are masked row by row."""
    for name, mask in masks.items():
        tensors[name].mul_(mask)


def _largest(scores: Tensor, keep: float) -> Tensor:
    """bool [n]: the largest scores; of equal ones the first."""
    count = max(1, math.floor(keep * len(scores) + 0.5))
    mask = torch.zeros(len(scores), dtype=torch.bool)
    mask[torch.sort(scores, descending=True, stable=True).indices[:count]] = True
    return mask
