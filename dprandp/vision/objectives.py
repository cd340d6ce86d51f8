"""What a network is asked of the two views of an image while it is pretrained; chosen by name.

* ``align-uniformity``: views of one image near each other, all together spread over the sphere (published; DP-RandP);
* ``vicreg``: views of one image equal, every dimension alive, no two dimensions alike;
* ``instances``: which of M images a view was made from;
* ``patches``: the whitened features that a dictionary of patches finds in the view's crop before its colours changed.

The first two compare a batch with itself and say a few bits a view; ``patches`` has a dense target for every view. Its
idea is that of Gidaris et al. 2020 (BoWNet: from a perturbed image predict what a dictionary of visual words says of
the image as it was), with the patch dictionary of ``dictionary.py`` in place of a trained network's vocabulary, and
whitened features in place of a histogram.

An objective works on embeddings [B, outputs] of a projection head. Its parameters are trained with the network's; its
buffers are part of a checkpoint. To add one: a class here, its name in ``pretrain_config.OBJECTIVES``.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dprandp.config import PretrainConfig
from dprandp.errors import UsageError, nearest
from dprandp.pretrain_config import OBJECTIVES
from dprandp.vision import dictionary, whitening
from dprandp.vision.losses import align_uniformity, cosine_distance, instance_loss, vicreg
from dprandp.vision.patchnet import PatchNet

TEACHER_FILTERS, TEACHER_PATCHES, TEACHER_CROPS = 400, 50_000, 2000
"""Of the dictionary behind ``patches``: six seconds of a core."""

TEACHER_AXES = 512
"""Whitened dimensions that ``patches`` predicts, where there are crops enough."""


class Objective(nn.Module):
    """One loss with what belongs to it.

    Attributes:
        outputs: dimensions of the embeddings that it takes.
        needs_crops: whether ``targets`` wants to see the crops behind the views.
    """

    needs_crops = False

    def __init__(self, outputs: int) -> None:
        super().__init__()
        self.outputs = outputs

    def targets(self, crops: Tensor) -> Tensor:
        """What is to be predicted for crops float [n, 3, 32, 32] in [0, 1], each by itself: float32 [n, outputs]."""
        raise NotImplementedError

    def forward(self, x: Tensor, y: Tensor, images: Tensor, targets: Tensor | None) -> Tensor:
        """The loss of a batch.

        Args:
            x, y: embeddings [B, outputs] of the two views of each image.
            images: int64 [B], which images they are.
            targets: float32 [B, 2 outputs] for first and second views, where ``needs_crops``; else None.

        Returns:
            float32 scalar with a gradient.
        """
        raise NotImplementedError


class _Pairs(Objective):
    """A loss of the two views' embeddings alone."""

    def __init__(self, outputs: int, loss) -> None:
        super().__init__(outputs)
        self._loss = loss

    def forward(self, x: Tensor, y: Tensor, images: Tensor, targets: Tensor | None) -> Tensor:
        return self._loss(x, y)


class Instances(Objective):
    """A trained unit vector for each image; the views' embeddings are to point to their own.

    Attributes:
        classes: [M, outputs] float32, standard normal at first.
    """

    def __init__(self, outputs: int, count: int, generator: torch.Generator) -> None:
        super().__init__(outputs)
        self.classes = nn.Parameter(torch.randn(count, outputs, generator=generator))

    def forward(self, x: Tensor, y: Tensor, images: Tensor, targets: Tensor | None) -> Tensor:
        return instance_loss(torch.cat([x, y]), self.classes, torch.cat([images, images]))


class Patches(Objective):
    """Predict the whitened patch features of the crop from the view, whose colours are changed: 1 - cosine.

    Attributes:
        teacher: the dictionary; not trained, filled by ``learn``. whitener: of its features.
    """

    needs_crops = True

    def __init__(self, outputs: int) -> None:
        super().__init__(outputs)
        self.teacher = PatchNet(TEACHER_FILTERS, patch_dims=64).requires_grad_(False)
        self.whitener = whitening.Whitener(self.teacher.feature_dim, outputs)

    def learn(self, crops: Tensor, generator: torch.Generator) -> None:
        """Learn dictionary and whitening from crops uint8 [n, 3, 32, 32] of synthetic images, n > outputs."""
        dictionary.learn(self.teacher.chain, crops, TEACHER_PATCHES, 8, generator)
        features = self.teacher.extract(crops)
        self.whitener.load_state_dict(whitening.fit(features, self.outputs).state_dict())

    @torch.no_grad()
    def targets(self, crops: Tensor) -> Tensor:
        """Float [n, 3, 32, 32] in [0, 1] to float32 [n, outputs] of unit norm."""
        with torch.autocast(crops.device.type, enabled=False):
            return self.whitener(self.teacher.extract(crops.mul(255).round().to(torch.uint8)))

    def forward(self, x: Tensor, y: Tensor, images: Tensor, targets: Tensor | None) -> Tensor:
        return cosine_distance(torch.cat([x, y]), torch.cat(targets.chunk(2, dim=1)))


def build_objective(config: PretrainConfig, count: int, outputs: int | None = None) -> Objective:
    """The objective that a configuration names. ``patches`` must still learn, or be given the state of one that has.

    Args:
        config: objective, projection_dim, seed.
        count: images that views are made of.
        outputs: dimensions of the embeddings; None: what the configuration says, or ``patches_axes(count)``.

    Raises:
        UsageError: unknown, or too few images for it.
    """
    width = outputs or config.projection_dim
    if config.objective == "align-uniformity":
        return _Pairs(width, align_uniformity)
    if config.objective == "vicreg":
        return _Pairs(width, vicreg)
    if config.objective == "instances":
        return Instances(width, count, torch.Generator().manual_seed(config.seed + 2))
    if config.objective == "patches":
        return Patches(outputs or patches_axes(count))
    raise UsageError(
        f"there is no objective called {config.objective!r}", fix=nearest(config.objective, OBJECTIVES)
    )


def patches_axes(crops: int) -> int:
    """Dimensions that ``patches`` can learn to predict from so many crops.

    Raises:
        UsageError: there are too few.
    """
    if crops < 4:
        raise UsageError(f"patches cannot be learned from {crops} images", fix="generate at least 4 images")
    return min(TEACHER_AXES, min(crops, TEACHER_CROPS) // 2)
