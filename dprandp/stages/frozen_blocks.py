"""Training whole blocks of a network and leaving the others as they are: what that saves.

A mask over single weights (``masks.py``) lowers the dimension that the noise fills, but every gradient is computed
still. Where whole blocks are frozen, their weights get no gradient; below the first trained block nothing is
back-propagated, nothing is kept for it, and with one view per example (no augmentation) its output never changes: it is
computed once per image and kept.

Guarantee:
    Which blocks are trained depends on public things alone: the seed, the weights at the start, the blocks' order.
    What is kept of a record is a function of that record's pixels and of frozen weights; it is held in memory (of the
    device that computes), used for that record's gradient, and never written.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dprandp.errors import UsageError
from dprandp.stages.masks import MaskRule
from dprandp.vision.classifier import Classifier
from dprandp.vision.precision import autocast

CACHE_BYTES = 2**30
"""Of outputs of frozen blocks that are kept; beyond it they are computed anew."""

FORWARD_VIEWS = 64
"""Views that pass the frozen blocks together."""


@dataclass(frozen=True)
class FrozenBlocks:
    """A choice of blocks; public.

    Attributes:
        frozen: beginnings of the names of parameters that are not trained, such as ``extractor.stem.``.
        first: how many of the network's units come before the first trained one.
        of: how many units there are.
        how: the choice in words.
    """

    frozen: tuple[str, ...]
    first: int
    of: int
    how: str

    def trains(self, name: str) -> bool:
        """Whether a parameter of the classifier is trained."""
        return not name.startswith(self.frozen)

    def in_words(self) -> str:
        """For the disclosure."""
        return (
            f"{self.of - len(self.frozen)} of {self.of} blocks of the extractor (stem and residual blocks), chosen "
            f"{self.how} once, before the training; what comes after them, and the head; the others stay"
        )


def choose_blocks(rule: MaskRule, model: Classifier) -> FrozenBlocks:
    """The blocks that a rule with scope 'block' trains: the stem and each residual block count as one.

    Args:
        rule: criterion 'random' (by the public seed), 'magnitude' (largest mean |θ|), or 'last' (nearest to the head).
        model: as it starts, made of public things.

    Returns:
        ⌊keep · n + ½⌋ of the n blocks are trained, at least one.

    Raises:
        UsageError: the network has no blocks.
    """
    if not hasattr(model.extractor, "units"):
        raise UsageError("this network has no blocks to freeze", fix="give --scope global or layer, or a wrn")
    if model.extractor.reads_earlier_stages:
        raise UsageError(
            "this network's features come from earlier blocks too, so none of them can be left out",
            fix="give --scope global or layer, or an extractor made with feature_stages = last",
        )
    units = model.extractor.units()
    count = max(1, int(rule.keep * len(units) + 0.5))
    if rule.criterion == "random":
        scores = np.random.default_rng([rule.seed, 0]).random(len(units))
    elif rule.criterion == "magnitude":
        weights = [torch.cat([p.detach().flatten() for p in unit.parameters() if p.ndim >= 2]) for _, unit in units]
        scores = np.array([float(each.abs().double().mean()) for each in weights])
    else:
        scores = np.arange(len(units))
    trained = set(np.argsort(-scores, kind="stable")[:count].tolist())
    frozen = tuple(f"extractor.{name}." for place, (name, _) in enumerate(units) if place not in trained)
    how = {"random": "at random from a public seed", "magnitude": "by magnitude", "last": "from the head's end"}
    return FrozenBlocks(frozen, min(trained), len(units), how[rule.criterion])


class FrozenPrefix:
    """The blocks before the first trained one, on one rank.

    Args:
        model: on the device that computes; not changed.
        first: how many units of its extractor are frozen before the first trained one, at least 1.
        keep: whether an image's output never changes, so that it may be kept.
    """

    def __init__(self, model: Classifier, first: int, keep: bool) -> None:
        self.model, self.first, self._keep = model, first, keep
        self._kept: dict[int, Tensor] = {}
        self._room = CACHE_BYTES

    @torch.no_grad()
    def outputs(self, views: Tensor, members: Tensor) -> Tensor:
        """What the first trained block is given.

        Args:
            views: uint8 [B, K, 3, 32, 32].
            members: int64 [B] on the CPU, positions in the data set, by which outputs are kept.

        Returns:
            float32 [B, K, ...] on the device of ``views``.
        """
        places = members.tolist()
        missing = [row for row, place in enumerate(places) if place not in self._kept]
        made: dict[int, Tensor] = {}
        step = max(1, FORWARD_VIEWS // views.shape[1])
        for start in range(0, len(missing), step):
            rows = missing[start : start + step]
            out = self._forward(views[rows].flatten(0, 1)).unflatten(0, (len(rows), views.shape[1]))
            made |= dict(zip(rows, out.unbind(0), strict=True))
        found = [made[row] if row in made else self._kept[place] for row, place in enumerate(places)]
        for row, value in made.items():
            size = value.numel() * value.element_size()
            if self._keep and size <= self._room:
                self._kept[places[row]] = value.clone()  # of its own: a row would keep its whole block
                self._room -= size
        return torch.stack(found) if found else self._forward(views.new_zeros(1, *views.shape[2:]))[None][:0]

    def _forward(self, images: Tensor) -> Tensor:
        extractor = self.model.extractor
        with autocast(extractor, images.device):
            out = extractor.normalise(images)
            for _, unit in extractor.units()[: self.first]:
                out = unit(out)
        return out.float()
