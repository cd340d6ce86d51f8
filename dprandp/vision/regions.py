"""Regions of an image that a patch layer averages its responses over, as weights over the positions of patches.

Quarters that overlap, and a centre that fades out, change little where an object moves a little; hard borders let all
of a response jump from one average to another. Experiment in ``scripts/README.md``, "Regions".
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

CENTRE = 0.25
"""Standard deviation of the centre's Gaussian, as a part of the side."""


def region_weights(positions: int) -> Tensor:
    """Four quarters that pass into each other between a quarter and three quarters of each side, then the centre.

    Args:
        positions: of patches, per side.

    Returns:
        float32 [5, positions**2], each row of sum 1.
    """
    places = (torch.arange(positions) + 0.5) / positions
    first = torch.cos(math.pi / 2 * (2 * places - 0.5).clamp(0, 1)).square()
    middle = torch.exp(-(((places - 0.5) / CENTRE) ** 2) / 2)
    halves = torch.stack([first, 1 - first])
    quarters = torch.einsum("ai,bj->abij", halves, halves).flatten(0, 1)
    weights = torch.cat([quarters, torch.outer(middle, middle)[None]]).flatten(1)
    return weights / weights.sum(dim=1, keepdim=True)
