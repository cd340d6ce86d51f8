"""Contrastive pretraining by several ranks: each has a part of the images, and all take every step together.

The loss compares all embeddings of a batch with one another. Each rank embeds the chosen images that it has; the
embeddings are gathered; each rank takes the whole batch's loss and follows its gradient through its own embeddings
alone; the ranks' gradients add up to that of one process with the same batch, as every embedding belongs to one rank.
The ranks begin with the same weights and add the same sum, so they stay equal. Rank 0's state is what is saved.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dprandp.config import PretrainConfig, as_dict, build
from dprandp.ranks import Follower, Leader, shares
from dprandp.vision.contrastive import ContrastiveTrainer
from dprandp.vision.extractors import build_extractor
from dprandp.vision.image_set import ImageSet
from dprandp.vision.losses import align_uniformity
from dprandp.vision.views import ViewChoices

IMAGES, BEGIN, STEP = "contrastive.images", "contrastive.begin", "contrastive.step"
"""Tasks of the other ranks."""

MESSAGE_BYTES = 2**26
"""Of images that are sent at a time."""


class SharedTrainer(ContrastiveTrainer):
    """One rank's part of a contrastive training.

    Args:
        network, config: as for ``ContrastiveTrainer``, equal on all ranks.
        images: n of them, this rank's part of all, in the order of the ranks; n may be 0.
        ranks: all of them.
        count: of all images.
    """

    def __init__(
        self,
        network: nn.Module,
        config: PretrainConfig,
        images: ImageSet | Tensor,
        ranks: Leader | Follower,
        count: int,
    ) -> None:
        super().__init__(network, config, images)
        self.ranks, self.count = ranks, count
        self.starts = [share.start for share in shares(count, ranks.size)]

    def backward(self, chosen: Tensor, first: ViewChoices, second: ViewChoices) -> Tensor:
        """As ``ContrastiveTrainer.backward``; all ranks end up with the gradient of the whole batch."""
        starts = torch.tensor(self.starts[1:], device=chosen.device)
        owner = torch.bucketize(chosen, starts, right=True)
        rank = self.ranks.rank
        mine = torch.nonzero(owner == rank)[:, 0]
        x, y = self.embed(chosen[mine] - self.starts[rank], _rows(first, mine), _rows(second, mine))
        counts = torch.bincount(owner, minlength=self.ranks.size).tolist()
        parts = self.ranks.gathered(torch.cat([x.detach().float(), y.detach().float()], dim=1), counts)
        parts[rank] = torch.cat([x.float(), y.float()], dim=1)  # the same values, with their gradient
        loss = align_uniformity(*torch.cat(parts).chunk(2, dim=1))
        loss.backward()
        parameters = [*self.network.parameters(), *self.head.parameters()]
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]  # not those unused
        total = self.ranks.summed(torch.cat([gradient.flatten() for gradient in gradients]))
        for gradient, part in zip(gradients, total.split([gradient.numel() for gradient in gradients]), strict=True):
            gradient.copy_(part.view_as(gradient))
        return loss.detach()

    def step(self, step: int) -> Tensor:
        """As ``ContrastiveTrainer.step``; rank 0's makes the others take it as well."""
        if self.ranks.rank:
            return super().step(step)
        self.ranks.ask(STEP, [({"step": step}, {})] * (self.ranks.size - 1), together=True)
        loss = super().step(step)
        self.ranks.answers()
        return loss


def lead(
    ranks: Leader,
    network: nn.Module,
    config: PretrainConfig,
    images: ImageSet,
    device: torch.device,
) -> SharedTrainer:
    """The trainer of rank 0, with the images shared out; ``begin`` must follow.

    Args:
        network, config: as for ``ContrastiveTrainer``.
        images: all of them, on the CPU.
        device: of rank 0; the others use one of the same kind.
    """
    own, *others = ranks.shares(len(images))
    most = max(1, MESSAGE_BYTES // math.prod(images.shape[1:]))
    facts = {"device": device.type, "of": len(images), "colour": images.colour}
    for start in range(0, max(share.stop - share.start for share in others), most):
        begins = [min(share.start + start, share.stop) for share in others]
        rows = [slice(begin, min(begin + most, share.stop)) for begin, share in zip(begins, others, strict=True)]
        parts = [torch.from_numpy(images.pixels(each)) for each in rows]
        told = [facts | {"start": start, "first": share.start} for share in others]
        ranks.ask(IMAGES, [(said, {"images": part}) for said, part in zip(told, parts, strict=True)])
        ranks.answers()
    return SharedTrainer(network, config, images.part(own).to(device), ranks, len(images))


def begin(trainer: SharedTrainer) -> None:
    """Give the other ranks the state from which rank 0 is about to go on."""
    facts = {"config": as_dict(trainer.config)}
    trainer.ranks.ask(BEGIN, [(facts, trainer.state())] * (trainer.ranks.size - 1))
    trainer.ranks.answers()


class SharedTraining:
    """What another rank does for ``lead`` and ``begin``, by task."""

    def __init__(self, ranks: Follower) -> None:
        self._ranks = ranks
        self._images: list[np.ndarray] = []
        self._facts: dict[str, Any] = {}
        self._device: torch.device
        self._trainer: SharedTrainer

    def images(self, facts: dict[str, Any], tensors: dict[str, Tensor], device: torch.device) -> dict[str, Tensor]:
        """Take a part of this rank's images; the first part makes it forget those of an earlier training."""
        self._images = [*(self._images if facts["start"] else []), tensors["images"].numpy()]
        self._facts, self._device = facts, device
        return {}

    def begin(self, facts: dict[str, Any], tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Make the trainer."""
        config = build("pretrain", facts["config"])
        colour, first, count = (self._facts[key] for key in ("colour", "first", "of"))
        images = ImageSet(self._images, colour, first).to(self._device)
        self._trainer = SharedTrainer(build_extractor(config), config, images, self._ranks, count)
        self._trainer.load_state(tensors)
        return {}

    def step(self, facts: dict[str, Any], tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Take a step with the others."""
        self._trainer.step(facts["step"])
        return {}


def _rows(choices: ViewChoices, rows: Tensor) -> ViewChoices:
    picked = {name: getattr(choices, name)[rows] for name in ("boxes", "flip", "factors", "grey")}
    return replace(choices, **picked)
