"""Pixels to the extractor's input, in the same way for private and synthetic images.

Everything here works on each image independently and uses only declared constants (size, channels), so it may be
applied to private images at no privacy cost.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from dprandp.errors import UsageError

WORKED_BYTES = 2**22
"""Bytes of pixels that are converted at a time; as floats they take four times that, and as much again to resize."""

MIN_AREA = 0.25
"""Smallest random crop, as a fraction of the image's area."""


_GREY = torch.tensor([0.299, 0.587, 0.114]).view(1, 3, 1, 1)  # ITU-R BT.601 luma, as PIL's convert("L")


def to_input(images: np.ndarray, size: int) -> Tensor:
    """Resize to an extractor's input, bilinear and antialiased, and give grey images three equal channels.

    uint8 [N, H, W, 1 or 3] to uint8 [N, 3, size, size].
    """
    count, height, width, channels = images.shape
    out = torch.empty(count, size, size, 3, dtype=torch.uint8).permute(0, 3, 1, 2)  # channels last
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
    images: Tensor | ImageSet, size: int, generator: torch.Generator, chosen: Tensor | None = None
) -> Tensor:
    """One random square crop of each image, resized: objects of many scales at the size the extractor sees.

    Args:
        images: uint8 [N, 3, R, R].
        size: side S of the extractor's input, in pixels.
        generator: public randomness.
        chosen: int64 [n], positions of the images, some perhaps several times; None: all in order.

    Returns:
        uint8 [n, 3, S, S]. Crops are no smaller than that, unless the image is.
    """
    chosen = torch.arange(len(images)) if chosen is None else chosen
    count, side = len(chosen), images.shape[-1]
    area = MIN_AREA + (1 - MIN_AREA) * torch.rand(count, generator=generator)
    sides = (side * area.sqrt()).round().long().clamp(min(size, side), side)
    corners = (torch.rand(count, 2, generator=generator) * (side - sides + 1)[:, None]).long()
    out = torch.empty(count, 3, size, size, dtype=torch.uint8)
    for crop in sides.unique().tolist():  # crops of one side go through one resize
        alike = (sides == crop).nonzero().flatten()
        for members in alike.split(max(1, WORKED_BYTES // (3 * crop**2))):
            out[members] = resize(_crops(images, chosen[members], corners[members], crop), size, size)
    return out


def _crops(images: Tensor | ImageSet, members: Tensor, corners: Tensor, side: int) -> Tensor:
    if not isinstance(images, Tensor):
        return images.crops(members, corners, side)
    rows = corners[:, 0, None] + torch.arange(side)
    columns = corners[:, 1, None] + torch.arange(side)
    return images[members[:, None, None], :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def as_declared(images: Tensor, *, channels: int, height: int, width: int) -> Tensor:
    """Put synthetic images, uint8 [N, 3, S, S], through the bottleneck of a data set: its channels and native size.

    Statistics of synthetic features then fit the private ones better. Only declared constants are used: 1 or 3
    channels, height and width in pixels.
    """
    size = images.shape[-1]
    if channels == 1:
        images = to_grey(images)
    side = min(height, width)
    if side < size:
        images = resize(resize(images, side, side), size, size)
    return images


def contact_sheet(images: np.ndarray, columns: int) -> np.ndarray:
    """Tile images uint8 [N, R, R, 3] into one picture, ``columns`` a row, one white pixel between them."""
    side = images.shape[1]
    rows = math.ceil(len(images) / columns)
    sheet = np.full((rows * (side + 1) - 1, columns * (side + 1) - 1, 3), 255, dtype=np.uint8)
    for index, image in enumerate(images):
        top, left = (index // columns) * (side + 1), (index % columns) * (side + 1)
        sheet[top : top + side, left : left + side] = image
    return sheet


MOST_FILTERS, FILTER_PIXELS = 640, 24


def filter_sheet(filters: np.ndarray) -> np.ndarray:
    """The first ``MOST_FILTERS`` filters, float [F, 3, k, k], as coloured tiles of one picture, uint8 [H, W, 3].

    Grey is zero; the largest weight of each filter is black or full.
    """
    shown = filters[:MOST_FILTERS].transpose(0, 2, 3, 1)
    largest = np.abs(shown).max(axis=(1, 2, 3), keepdims=True)
    tiles = np.rint(127.5 + 127.5 * shown / np.maximum(largest, 1e-30)).astype(np.uint8)
    times = max(1, FILTER_PIXELS // filters.shape[-1])
    columns = min(len(tiles), max(16, math.ceil(math.sqrt(2.5 * len(tiles)))))
    return contact_sheet(tiles.repeat(times, axis=1).repeat(times, axis=2), columns)


class ImageSet:
    """Synthetic images by position, in their memory-mapped shards, or copied once to an accelerator.

    A set of large images may take most of the memory, so only the requested images or crops are copied, transposed or
    recoloured.

    Args:
        parts: uint8 [n, R, R, 3] each, at least one; they are only read.
        colour: as for ``colour_mode``; 'both' takes the colour from every second image of the set.
    """

    def __init__(self, parts: Sequence[np.ndarray], colour: str = "rgb") -> None:
        self._parts, self.colour = list(parts), colour
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
        moved = ImageSet([np.empty((0, *self._parts[0].shape[1:]), np.uint8)], self.colour)
        moved._starts = self._starts[[0, -1]]
        moved._moved = torch.empty(len(self), *self._parts[0].shape[1:], dtype=torch.uint8, device=device)
        for part, start in zip(self._parts, self._starts, strict=False):
            moved._moved[start : start + len(part)] = torch.from_numpy(np.array(part))
        return moved

    def head(self, count: int) -> ImageSet:
        """The first images, on the CPU; nothing is copied."""
        starts = self._starts.tolist()
        pieces = [part[: max(0, count - start)] for part, start in zip(self._parts, starts, strict=False)]
        return ImageSet(pieces, self.colour)

    def __getitem__(self, chosen: Tensor) -> Tensor:
        """The images at positions ``chosen``, int64 [b]: uint8 [b, 3, R, R] on ``device``, contiguous."""
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
        """A square of each of some images, without reading more of them: uint8 [b, 3, side, side], on the CPU alone.

        Args:
            chosen: int64 [b]. corners: int64 [b, 2], row and column of the upper left pixel. side: in pixels.
        """
        pixels = torch.empty(len(chosen), side, side, self._parts[0].shape[-1], dtype=torch.uint8)
        for out, position, (top, left) in zip(pixels.numpy(), chosen.tolist(), corners.tolist(), strict=True):
            owner = int(np.searchsorted(self._starts, position, side="right")) - 1
            out[:] = self._parts[owner][position - self._starts[owner], top : top + side, left : left + side]
        crops = pixels.permute(0, 3, 1, 2)
        if self.colour == "rgb":
            return crops
        return self._coloured(crops.contiguous(), chosen).contiguous(memory_format=torch.channels_last)

    def _coloured(self, images: Tensor, chosen: Tensor) -> Tensor:
        """The colour mode applied to a copy of the images at these positions, contiguous."""
        if self.colour == "grey":
            return to_grey(images)
        if self.colour == "both":
            without = (chosen % 2 == 0).view(-1, 1, 1, 1)
            return torch.where(without, to_grey(images), images)  # a mask as an index would wait for an accelerator
        return images
