"""Pixels to the extractor's input, the same way for private and synthetic images, one image at a time.

Everything here works on each image alone and uses nothing but declared constants (size, channels), so it may be
applied to private images at no privacy cost.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from dprandp.errors import UsageError

INPUT_SIZE = 32
"""Side of every extractor's input in pixels."""

_GREY = torch.tensor([0.299, 0.587, 0.114]).view(1, 3, 1, 1)  # ITU-R BT.601 luma, as PIL's convert("L")


def to_input(images: np.ndarray, size: int = INPUT_SIZE) -> Tensor:
    """Resize to a square and give grey images three equal channels.

    Args:
        images: uint8 [N, H, W, 1 or 3].
        size: side of the output in pixels.

    Returns:
        uint8 [N, 3, size, size] (bilinear, antialiased where it shrinks).
    """
    batches = []
    for start in range(0, len(images), 1024):
        batch = torch.from_numpy(np.ascontiguousarray(images[start : start + 1024])).permute(0, 3, 1, 2)
        batches.append(resize(batch, size, size).expand(-1, 3, -1, -1))
    return torch.cat(batches) if batches else torch.empty(0, 3, size, size, dtype=torch.uint8)


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
    grey = (images.to(torch.float32) * _GREY.to(images.device)).sum(dim=1, keepdim=True)
    return grey.round_().clamp_(0, 255).to(torch.uint8).expand_as(images).contiguous()


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
    images: Tensor, generator: torch.Generator, *, size: int = INPUT_SIZE, min_area: float = 0.25
) -> Tensor:
    """One random square crop of each image, resized: objects of many scales at the size the extractor sees.

    Args:
        images: uint8 [N, C, R, R].
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
        members = (sides == crop).nonzero().flatten()
        rows = corners[members, 0, None] + torch.arange(crop)
        columns = corners[members, 1, None] + torch.arange(crop)
        chosen = images[members[:, None, None], :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)
        out[members] = resize(chosen, size, size)
    return out


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
