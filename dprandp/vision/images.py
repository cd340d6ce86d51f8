"""Pixels to the extractor's input, the same way for private and synthetic images, one image at a time.

Everything here works on each image alone and uses nothing but declared constants (size, channels), so it may be
applied to private images at no privacy cost.
"""

from __future__ import annotations

import math
from typing import Protocol

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from dprandp.errors import UsageError

INPUT_SIZE = 32
"""Side of every extractor's input in pixels."""

WORKED_BYTES = 2**22
"""Of pixels that are converted at a time; as floats they take four times that, and about as much again to resize."""


class Crops(Protocol):
    """Images that need not be in memory: what ``image_set.ImageSet`` has, and ``random_crops`` asks for."""

    shape: tuple[int, int, int, int]

    def crops(self, chosen: Tensor, corners: Tensor, side: int) -> Tensor:
        """Squares of some images, uint8 [b, C, side, side]."""


Pictures = Tensor | Crops

_GREY = torch.tensor([0.299, 0.587, 0.114]).view(1, 3, 1, 1)  # ITU-R BT.601 luma, as PIL's convert("L")


def to_input(images: np.ndarray, size: int = INPUT_SIZE) -> Tensor:
    """Resize to a square and give grey images three equal channels.

    Args:
        images: uint8 [N, H, W, 1 or 3].
        size: side of the output in pixels.

    Returns:
        uint8 [N, 3, size, size] (bilinear, antialiased where it shrinks).
    """
    count, height, width, channels = images.shape
    out = torch.empty(count, size, size, 3, dtype=torch.uint8).permute(0, 3, 1, 2)  # channels last, as images come
    out = out.contiguous() if channels == 1 else out
    rows = max(1, WORKED_BYTES // max(1, height * width * channels))
    for start in range(0, count, rows):
        batch = torch.from_numpy(np.ascontiguousarray(images[start : start + rows])).permute(0, 3, 1, 2)
        out[start : start + rows] = resize(batch, size, size)
    return out


def resize(images: Tensor, height: int, width: int) -> Tensor:
    """Bilinear, antialiased resize of uint8 [N, C, H, W]; unchanged where the size already fits."""
    if images.shape[-2:] == (height, width):
        return images
    resized = functional.interpolate(
        images.to(torch.float32), size=(height, width), mode="bilinear", antialias=True, align_corners=False
    )
    return resized.round_().clamp_(0, 255).to(torch.uint8)


def to_grey(images: Tensor) -> Tensor:
    """uint8 [N, 3, H, W] to uint8 [N, 3, H, W] with three equal channels."""
    out = torch.empty(images.shape, dtype=torch.uint8, device=images.device)
    weights = _GREY.to(images.device)
    rows = max(1, WORKED_BYTES // max(1, images[:1].numel()))
    for start in range(0, len(images), rows):
        grey = (images[start : start + rows].to(torch.float32) * weights).sum(dim=1, keepdim=True)
        out[start : start + rows] = grey.round_().clamp_(0, 255).to(torch.uint8)
    return out


def colour_of(channels: int) -> str:
    """'grey' or 'rgb', by the number of channels that a data set declares."""
    return "grey" if channels == 1 else "rgb"


def colour_mode(images: Tensor, mode: str) -> Tensor:
    """'rgb' leaves uint8 [N, 3, H, W] as it is, 'grey' removes the colour, 'both' does so for every second image."""
    if mode == "rgb":
        return images
    if mode == "grey":
        return to_grey(images)
    if mode == "both":
        images = images.clone()
        images[::2] = to_grey(images[::2])
        return images
    raise UsageError(f"colour = {mode!r} is unknown", fix="choose rgb, grey or both")


def random_crops(
    images: Pictures, generator: torch.Generator, *, size: int = INPUT_SIZE, min_area: float = 0.25
) -> Tensor:
    """One random square crop of each image, resized: objects of many scales at the size the extractor sees.

    Args:
        images: uint8 [N, C, R, R], or a set of them that gives crops (``image_set.ImageSet``).
        generator: public randomness.
        size: side of the output.
        min_area: smallest crop as a part of the image's area; crops are never smaller than ``size`` pixels unless the
            image is.

    Returns:
        uint8 [N, C, size, size].
    """
    count, channels, side, _ = images.shape
    area = min_area + (1 - min_area) * torch.rand(count, generator=generator)
    sides = (side * area.sqrt()).round().long().clamp(min(size, side), side)
    corners = (torch.rand(count, 2, generator=generator) * (side - sides + 1)[:, None]).long()
    out = torch.empty(count, channels, size, size, dtype=torch.uint8)
    for crop in sides.unique().tolist():  # crops of one side go through one resize
        alike = (sides == crop).nonzero().flatten()
        for members in alike.split(max(1, WORKED_BYTES // (channels * crop**2))):
            out[members] = resize(_crops(images, members, corners[members], crop), size, size)
    return out


def _crops(images: Pictures, members: Tensor, corners: Tensor, side: int) -> Tensor:
    if not isinstance(images, Tensor):
        return images.crops(members, corners, side)
    rows = corners[:, 0, None] + torch.arange(side)
    columns = corners[:, 1, None] + torch.arange(side)
    return images[members[:, None, None], :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def as_declared(images: Tensor, *, channels: int, height: int, width: int) -> Tensor:
    """Put synthetic images through the same bottleneck as a data set: its channels and its native size.

    Statistics of synthetic features fit the private ones better when both were grey and 28 pixels wide before they
    were resized. Only declared constants are used.

    Args:
        images: uint8 [N, 3, S, S] synthetic.
        channels: 1 or 3, as declared by the data set. height, width: its native size in pixels.

    Returns:
        uint8 [N, 3, S, S].
    """
    size = images.shape[-1]
    if channels == 1:
        images = to_grey(images)
    side = min(height, width)
    if side < size:
        images = resize(resize(images, side, side), size, size)
    return images


def contact_sheet(images: np.ndarray, columns: int) -> np.ndarray:
    """Tile images into one picture, one white pixel between them.

    Args:
        images: uint8 [N, R, R, 3].
        columns: images a row.

    Returns:
        uint8 [rows * (R + 1) - 1, columns * (R + 1) - 1, 3].
    """
    side = images.shape[1]
    rows = math.ceil(len(images) / columns)
    sheet = np.full((rows * (side + 1) - 1, columns * (side + 1) - 1, 3), 255, dtype=np.uint8)
    for index, image in enumerate(images):
        top, left = (index // columns) * (side + 1), (index % columns) * (side + 1)
        sheet[top : top + side, left : left + side] = image
    return sheet
