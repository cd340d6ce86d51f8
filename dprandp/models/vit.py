"""A small Vision Transformer (Dosovitskiy et al. 2021, arXiv 2010.11929), as an extractor.

Patches -> a linear map -> learned positions -> ``depth`` pre-norm blocks (self-attention over the patches of one image,
then two dense layers with GELU) -> LayerNorm. There is no class token: features are the mean over patches and the means
over the four quarters of the image, like those of ``wrn.py``. Attention is written out in products and a softmax, so
that second derivatives and ``torch.func.vmap(grad)`` exist on every device.

No layer mixes examples: LayerNorm takes the statistics of one patch, attention sees the patches of one image.
"""

from __future__ import annotations

import math
import re

import torch
from torch import Tensor, nn
from torch.nn import functional

from dprandp.errors import UsageError
from dprandp.models.whitening import Part
from dprandp.models.wrn import initialise, normalise

HEAD_WIDTH = 16
"""Channels of an attention head; published: 64, for networks of 384 channels and more."""

EXPANSION = 2
"""Hidden over outer width of the dense layers; published: 4, for networks trained on more data."""


def parse_vit(name: str, input_size: int) -> tuple[int, int, int]:
    """Read ``"vit-DEPTH-WIDTH-PATCH"``, e.g. ``"vit-4-64-4"`` -> ``(4, 64, 4)``.

    Raises:
        UsageError: another spelling, a width that is no multiple of 16, or a patch that leaves no even grid.
    """
    match = re.fullmatch(r"vit-(\d{1,2})-(\d{1,4})-(\d{1,2})", name)
    if match is None:
        raise UsageError(
            f"architecture {name!r} is not of the form vit-DEPTH-WIDTH-PATCH", fix="write for example vit-4-64-4"
        )
    depth, width, patch = (int(part) for part in match.groups())
    if depth < 1 or width < HEAD_WIDTH or width % HEAD_WIDTH:
        raise UsageError(
            f"{name}: depth {depth}, width {width} do not fit",
            fix=f"give a depth of 1 or more and a width that is a multiple of {HEAD_WIDTH}",
        )
    if patch < 1 or input_size % (2 * patch):
        fitting = [str(side) for side in range(2, input_size // 2 + 1) if input_size % (2 * side) == 0]
        raise UsageError(
            f"{name}: patches of {patch} pixels leave no even grid of {input_size} pixels",
            fix=f"use {' or '.join([', '.join(fitting[:-1]), fitting[-1]])}" if len(fitting) > 1
            else "give another --input-size",
        )
    return depth, width, patch


class _Block(nn.Module):
    """Attention and dense layers, each behind a LayerNorm and beside a shortcut."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.heads = width // HEAD_WIDTH
        self.norm1 = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width)
        self.dense1 = nn.Linear(width, EXPANSION * width)
        self.dense2 = nn.Linear(EXPANSION * width, width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.out(self._attend(self.norm1(x)))
        return x + self.dense2(functional.gelu(self.dense1(self.norm2(x))))

    def _attend(self, x: Tensor) -> Tensor:
        """[B, patches, width] -> the same: softmax(Q Kᵀ/√d) V in each head, heads side by side."""
        query, key, value = self.qkv(x).unflatten(-1, (3, self.heads, HEAD_WIDTH)).permute(2, 0, 3, 1, 4)
        weights = (query @ key.mT / math.sqrt(HEAD_WIDTH)).softmax(dim=-1)
        return (weights @ value).transpose(1, 2).flatten(2)


class VisionTransformer(nn.Module):
    """A ViT of the name vit-DEPTH-WIDTH-PATCH, as ``parse_vit`` reads it, as a feature extractor.

    ``feature_dim`` is 5 · width: the whole image and its four quarters. ``input_size`` is the side of an image in
    pixels. The generator is of the initial weights.
    """

    def __init__(
        self, depth: int, width: int, patch: int, *, input_size: int = 32, generator: torch.Generator | None = None
    ) -> None:
        super().__init__()
        self.grid, self.input_size = input_size // patch, input_size
        self.embed = nn.Conv2d(3, width, patch, stride=patch)
        self.position = nn.Parameter(torch.zeros(self.grid**2, width))
        self.blocks = nn.Sequential(*(_Block(width) for _ in range(depth)))
        self.final_norm = nn.LayerNorm(width)
        self.feature_dim = 5 * width
        self.parts = (Part(self.feature_dim, 1.0),)
        initialise(self, generator)
        nn.init.normal_(self.position, std=0.02, generator=generator)

    @staticmethod
    def normalise(images: Tensor) -> Tensor:
        """Pixels to this network's input: as for ``wrn.py``."""
        return normalise(images)

    def trunk(self, x: Tensor) -> Tensor:
        """The residual stream after the last block, float [B, 3, 32, 32] -> [B, width, grid, grid]."""
        patches = self.embed(x).flatten(2).mT + self.position
        return self.blocks(patches).mT.unflatten(2, (self.grid, self.grid))

    def features(self, x: Tensor) -> Tensor:
        """Means over all patches, then over those of each quarter: float [B, 3, 32, 32] -> [B, 5 · width]."""
        tokens = self.final_norm(self.trunk(x).permute(0, 2, 3, 1))  # [B, grid, grid, width]
        rows = tokens.unflatten(1, (2, -1)).mean(dim=2)
        quarters = rows.unflatten(2, (2, -1)).mean(dim=3)  # [B, 2, 2, width]
        return torch.cat([quarters.mean(dim=(1, 2))[:, None], quarters.flatten(1, 2)], dim=1).flatten(1)

    forward = features
