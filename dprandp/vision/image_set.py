"""Synthetic images to choose from, left where they are: in their memory-mapped shards, or once on an accelerator.

A set of large images may take most of the memory, so no step copies, transposes or recolours it as a whole: that is
done to the images, or crops, that are asked for.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dprandp.vision.images import to_grey


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
        """Where chosen images come out."""
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
