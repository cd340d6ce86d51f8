"""The released model: extractor, public whitening, private linear head."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dprandp.models.extractor import extract
from dprandp.models.precision import autocast, full_precision
from dprandp.models.whitening import Whitener


class Classifier(nn.Module):
    """Scores = unit-norm whitened features times the head.

    Attributes:
        head: [dims, classes] float32 without bias, zero at the start: the first private gradient then points along the
            class means and does not have to undo a random head.
    """

    def __init__(self, extractor: nn.Module, whitener: Whitener, classes: int) -> None:
        super().__init__()
        self.extractor, self.whitener = extractor, whitener
        self.head = nn.Parameter(torch.zeros(whitener.dims, classes))

    def forward(self, images: Tensor, *, precise: bool = False) -> Tensor:
        """Scores [B, classes] of images that ``extractor.normalise`` has prepared, float [B, 3, 32, 32].

        Features are in the extractor's precision, the rest in the head's. ``precise``: scores are float64, for
        gradients record by record (``losses.through_head`` says why).
        """
        with autocast(self.extractor, images.device):
            features = self.extractor.features(images)
        with full_precision(images.device):
            unit = self.whitener(features.to(self.head.dtype))
            return unit.double() @ self.head.double() if precise else unit @ self.head

    @torch.no_grad()
    def predict(self, images: Tensor, *, mirror: bool) -> Tensor:
        """Scores of uint8 [N, 3, 32, 32], without gradients: float32 [N, classes] on the CPU.

        ``mirror`` averages the features of an image and its mirror image (only where mirroring keeps the label).
        """
        return extract(self.extractor, images, mirror=mirror, after=lambda found: self.whitener(found) @ self.head)
