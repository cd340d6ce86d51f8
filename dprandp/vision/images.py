"""Pixels to the extractor's input, in the same way for private and synthetic images.

Everything here works on each image independently and uses only declared constants (size, channels), so it may be
applied to private images at no privacy cost.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from dprandp.errors import UsageError

INPUT_SIZE = 32
"""Side of every extractor's input in pixels."""

WORKED_BYTES = 2**22
"""Bytes of pixels that are converted at a time; as floats they take four times that, and as much again to resize."""


class Crops(Protocol):
    """Images that need not be in memory, such as an ``ImageSet``, for ``random_crops``."""

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
        images: uint8 [N, C, R, R], or a set of them that gives crops (``ImageSet``).
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

    Statistics of synthetic features fit the private ones better if both had the same channels and size before resizing.
    Only declared constants are used.

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


# ----------------------------------------------------------------------------------------------------------- image set
#
# Synthetic images by position, in their memory-mapped shards, or copied once to an accelerator.
#
# A set of large images may take most of the memory, so only the requested images or crops are copied, transposed or
# recoloured.

class ImageSet:
    """Images by position, in a colour mode.

    Args:
        parts: uint8 [n, R, R, 3] each, at least one; memory-mapped files as a rule. They are only read.
        colour: as for ``colour_mode``; 'both' takes the colour from every second image, counted from the first image
            of the whole set.
        first: the position in the whole set of this set's first image, where it is a part of it.
    """

    def __init__(self, parts: Sequence[np.ndarray], colour: str = "rgb", first: int = 0) -> None:
        self._parts, self.colour, self.first = list(parts), colour, first
        self._starts = np.cumsum([0, *(len(part) for part in self._parts)])
        self._moved: Tensor | None = None  # all of them, uint8 [N, R, R, 3] on an accelerator

    def __len__(self) -> int:
        return int(self._starts[-1])

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """(N, 3, R, R)."""
        _, height, width, channels = self._parts[0].shape
        return len(self), channels, height, width

    @property
    def device(self) -> torch.device:
        """The device of the returned images."""
        return torch.device("cpu") if self._moved is None else self._moved.device

    def to(self, device: torch.device) -> ImageSet:
        """The same on a device: on the CPU itself; on an accelerator one copy there, made part by part."""
        if device.type == "cpu":
            return self
        moved = ImageSet([np.empty((0, *self._parts[0].shape[1:]), np.uint8)], self.colour, self.first)
        moved._starts = self._starts[[0, -1]]
        moved._moved = torch.empty(len(self), *self._parts[0].shape[1:], dtype=torch.uint8, device=device)
        for part, start in zip(self._parts, self._starts, strict=False):
            moved._moved[start : start + len(part)] = torch.from_numpy(np.array(part))
        return moved

    def part(self, rows: slice) -> ImageSet:
        """The images of a range of positions, on the CPU; nothing is copied."""
        pieces = [
            part[max(0, rows.start - start) : max(0, rows.stop - start)]
            for part, start in zip(self._parts, self._starts.tolist(), strict=False)
        ]
        kept = [piece for piece in pieces if len(piece)] or pieces[:1]
        return ImageSet(kept, self.colour, self.first + rows.start)

    def pixels(self, rows: slice) -> np.ndarray:
        """A copy of a range of images as they are stored, uint8 [n, R, R, 3], colours untouched."""
        return np.concatenate(self.part(rows)._parts)

    def __getitem__(self, chosen: Tensor) -> Tensor:
        """The images at these positions.

        Args:
            chosen: int64 [b].

        Returns:
            uint8 [b, 3, R, R] on ``device``, contiguous.
        """
        if self._moved is not None:
            pixels = self._moved[chosen]
        else:
            pixels = torch.empty(len(chosen), *self._parts[0].shape[1:], dtype=torch.uint8)
            positions = chosen.cpu().numpy()
            owners = np.searchsorted(self._starts, positions, side="right") - 1
            for owner in np.unique(owners):
                members = np.flatnonzero(owners == owner)
                pixels.numpy()[members] = self._parts[owner][positions[members] - self._starts[owner]]
        return self._coloured(pixels.permute(0, 3, 1, 2).contiguous(), chosen)

    def crops(self, chosen: Tensor, corners: Tensor, side: int) -> Tensor:
        """A square of each of some images; nothing else of them is read. On the CPU alone.

        Args:
            chosen: int64 [b]. corners: int64 [b, 2], row and column of the upper left pixel. side: in pixels.

        Returns:
            uint8 [b, 3, side, side], its channels last in memory.
        """
        pixels = torch.empty(len(chosen), side, side, self._parts[0].shape[-1], dtype=torch.uint8)
        for out, position, (top, left) in zip(pixels.numpy(), chosen.tolist(), corners.tolist(), strict=True):
            owner = int(np.searchsorted(self._starts, position, side="right")) - 1
            out[:] = self._parts[owner][position - self._starts[owner], top : top + side, left : left + side]
        crops = pixels.permute(0, 3, 1, 2)
        if self.colour == "rgb":
            return crops
        return self._coloured(crops.contiguous(), chosen).contiguous(memory_format=torch.channels_last)

    def picked(self, positions: Tensor) -> Picked:
        """Images of the set in another order, some of them several times (int64 [n]); nothing is copied."""
        return Picked(self, positions)

    def _coloured(self, images: Tensor, chosen: Tensor) -> Tensor:
        """The colour mode applied to a copy of the images at these positions, contiguous."""
        if self.colour == "grey":
            return to_grey(images)
        if self.colour == "both":
            without = ((chosen + self.first) % 2 == 0).view(-1, 1, 1, 1)
            return torch.where(without, to_grey(images), images)  # a mask as an index would wait for an accelerator
        return images


@dataclass(frozen=True)
class Picked:
    """Images of a set by position, for ``random_crops``."""

    images: ImageSet
    positions: Tensor

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """(n, 3, R, R)."""
        return (len(self.positions), *self.images.shape[1:])

    def crops(self, chosen: Tensor, corners: Tensor, side: int) -> Tensor:
        """As ``ImageSet.crops``."""
        return self.images.crops(self.positions[chosen], corners, side)
