"""The released model: extractor, public whitening, private linear head."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dprandp.models.extractor import extract
from dprandp.models.precision import autocast, full_precision
from dprandp.models.whitening import Whitener


class Classifier(nn.Module):
    """Scores = unit-norm whitened features times the head.

    Args:
        extractor: see ``models/extractor.py``.
        whitener: fitted to synthetic images; not trained.
        classes: number of classes.

    Attributes:
        head: [dims, classes] float32 without bias, zero at the start: the first private gradient then points along the
            class means and does not have to undo a random head.
    """

    def __init__(self, extractor: nn.Module, whitener: Whitener, classes: int) -> None:
        super().__init__()
        self.extractor, self.whitener = extractor, whitener
        self.head = nn.Parameter(torch.zeros(whitener.dims, classes))

    def forward(self, images: Tensor) -> Tensor:
        """Scores of images that ``extractor.normalise`` has prepared.

        Args:
            images: float [B, 3, 32, 32].

        Returns:
            [B, classes]; features in the extractor's precision, the rest in the head's.
        """
        with autocast(self.extractor, images.device):
            features = self.extractor.features(images)
        with full_precision(images.device):
            return self.whitener(features.to(self.head.dtype)) @ self.head

    def predict(self, images: Tensor, *, mirror: bool, on_batch=lambda count: None) -> Tensor:
        """Scores of uint8 images, without gradients.

        Args:
            images: uint8 [N, 3, 32, 32].
            mirror: average the features of an image and its mirror image (only where mirroring keeps the label).

        Returns:
            float32 [N, classes] on the CPU.
        """
        with torch.no_grad():
            return extract(
                self.extractor,
                images,
                mirror=mirror,
                after=lambda features: self.whitener(features) @ self.head,
                on_batch=on_batch,
            )
