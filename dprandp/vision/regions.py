"""Regions of an image that a patch layer averages its responses over, as weights over the positions of patches.

Quarters that overlap, and a centre that fades out, change little where an object moves a little; hard borders let all
of a response jump from one average to another. Experiment in the README, "Regions".
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional

CENTRE = 0.25
"""Standard deviation of the centre's Gaussian, as a part of the side."""


def quadrants(positions: int) -> Tensor:
    """The four quadrants, row by row, then the whole: 0/1 weights before they are made to sum to 1."""
    chunk = -(-positions // 2)  # the first ones are the larger ones
    halves = functional.one_hot(torch.arange(positions) // chunk, 2).to(torch.float32).t()
    return _regions(halves, torch.ones(1, positions))


def overlapping(positions: int) -> Tensor:
    """Four quarters that pass into each other between a quarter and three quarters of each side, then the centre."""
    places = (torch.arange(positions) + 0.5) / positions
    first = torch.cos(math.pi / 2 * (2 * places - 0.5).clamp(0, 1)).square()
    middle = torch.exp(-(((places - 0.5) / CENTRE) ** 2) / 2)
    return _regions(torch.stack([first, 1 - first]), middle[None])


REGIONS = {"overlapping": overlapping, "quadrants": quadrants}
"""Name -> function from positions per side to weights, float32 [5, positions**2], each row of sum 1."""


def _regions(halves: Tensor, middle: Tensor) -> Tensor:
    """Products of weights [k, positions] along the rows and along the columns, of all pairs of one kind."""
    grids = [torch.einsum("ai,bj->abij", windows, windows).flatten(0, 1).flatten(1) for windows in (halves, middle)]
    weights = torch.cat(grids)
    return weights / weights.sum(dim=1, keepdim=True)
