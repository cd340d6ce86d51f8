"""A second layer: a dictionary over patches of the responses of a first one.

The same recipe once more (Coates & Ng 2011, "Selecting receptive fields in deep networks", stack it likewise): a small
dictionary of pixel patches answers at every position, its two-sided responses are averaged over overlapping 3 x 3
windows and their roots taken, the channels are whitened, and patches of these maps get a dictionary of their own.
Everything is learned from images of a random process (``dictionary.py``).

    filters on pixels -> two-sided ReLU -> 3 x 3 averages at every second position -> root -> channels whitened to a few
    -> patches of 3 x 3 positions, each divided by its length -> ``PatchLayer``

The features say what lies next to what, which those of one layer do not, and are whitened as a part of their own.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from dprandp.vision.patchnet import ROOT_FLOOR, PatchLayer, PatchNet, normalise_patches
from dprandp.vision.whitening import Part

WINDOW, STEP = 3, 2
"""Responses are averaged over WINDOW x WINDOW positions, at every STEP-th."""

LENGTH_FLOOR = 0.1
"""Of a patch of responses, relative to √d, the length of one with unit variance: empty patches stay short."""

SECOND_SHARE = 0.5
"""Of the squared length of all features. Two experiments on CIFAR-10's training split at ε = 1: with 1,600 filters in
both layers (10,000 images fitted, 4,000 held out) 70.2, 70.7, 70.3 % for .2, .4, .6, where the first layer alone had
68.5 and the second alone 67.4; with 2,400 and 3,200 (20,000 fitted, 10,000 held out) 71.1 for .4 and 71.3 for .5."""


class ResponseLayer(PatchLayer):
    """A dictionary over patches of responses.

    Args:
        filters: size of the dictionary, F.
        patch_size, stride: of the first layer's patches, in pixels.
        map_filters: size M of the first layer's dictionary; it has 2 M channels, a channel for each sign.
        map_dims: channels kept after whitening, C.
        response_patch: side k of a patch of responses, in positions of the maps.
        patch_dims: axes r that these are whitened to; at most C k**2.
        grids, threshold: see ``PatchLayer``; the first layer has the same threshold.
        image_size: side of the (square) input in pixels.
        channels: 3.

    Attributes:
        map_weight: [M, channels * patch_size**2] float32 on contrast-normalised pixel patches, map_bias: [M].
        channel_basis: [C, 2 M] float32, channel_centre: [C]: whitening of the channels.
        None of the four is trained: the first layer of this network stays as Phase I left it.
    """

    def __init__(
        self,
        filters: int,
        *,
        patch_size: int = 6,
        stride: int = 1,
        map_filters: int = 256,
        map_dims: int = 64,
        response_patch: int = 3,
        patch_dims: int = 192,
        grids: tuple[int, ...] = (2, 1),
        threshold: float = 0.25,
        image_size: int = 32,
        channels: int = 3,
    ) -> None:
        width = map_dims * response_patch**2
        super().__init__(
            filters,
            width=width,
            patch_dims=min(patch_dims, width),
            positions=map_side(patch_size, stride, image_size) - response_patch + 1,
            grids=grids,
            threshold=threshold,
        )
        self.patch_size, self.stride, self.response_patch = patch_size, stride, response_patch
        self.register_buffer("map_weight", torch.zeros(map_filters, channels * patch_size**2))
        self.register_buffer("map_bias", torch.zeros(map_filters))
        self.register_buffer("channel_basis", torch.eye(map_dims, 2 * map_filters))
        self.register_buffer("channel_centre", torch.zeros(map_dims))

    def maps(self, images: Tensor) -> Tensor:
        """Float [B, 3, H, W] in [0, 1] to roots of averaged responses, [B, 2 M, S, S]; first all positive ones."""
        pixels = normalise_patches(functional.unfold(images, self.patch_size, stride=self.stride))
        side = math.isqrt(pixels.shape[2])
        responses = (self.map_weight @ pixels + self.map_bias[:, None]).unflatten(2, (side, side))
        both = torch.cat([responses - self.threshold, -responses - self.threshold], dim=1)
        return window_means(functional.relu(both)).add(ROOT_FLOOR).sqrt()

    def unwhitened(self, images: Tensor) -> Tensor:
        """Patches of responses, [B, C k**2, L], each u made u / (‖u‖ / √d + ``LENGTH_FLOOR``)."""
        maps = self.maps(images)
        channels = self.channel_basis @ maps.flatten(2) - self.channel_centre[:, None]
        patches = functional.unfold(channels.unflatten(2, maps.shape[2:]), self.response_patch)
        return patches / (patches.norm(dim=1, keepdim=True) / math.sqrt(patches.shape[1]) + LENGTH_FLOOR)


class TwoLayerPatchNet(nn.Module):
    """A ``PatchNet`` and a ``ResponseLayer`` side by side: their features, first the former's.

    Args:
        first, second: the two.

    Attributes:
        feature_dim: the sum of theirs. parts: each is whitened apart.
    """

    normalise = staticmethod(PatchLayer.normalise)

    def __init__(self, first: PatchNet, second: ResponseLayer) -> None:
        super().__init__()
        self.first, self.second = first, second
        self.feature_dim = first.feature_dim + second.feature_dim
        self.parts = Part(first.feature_dim, 1 - SECOND_SHARE), Part(second.feature_dim, SECOND_SHARE)

    def features(self, images: Tensor) -> Tensor:
        """Differentiable features, float [B, 3, H, W] in [0, 1] to [B, feature_dim]."""
        return torch.cat([self.first.features(images), self.second.features(images)], dim=1)

    def extract(self, images: Tensor) -> Tensor:
        """The same numbers faster, without gradients: uint8 [B, 3, H, W] to float32 [B, feature_dim]."""
        return torch.cat([self.first.extract(images), self.second.extract(images)], dim=1)


def window_means(maps: Tensor) -> Tensor:
    """``avg_pool2d(maps, 3, 2)`` of float [..., S, S], faster on a CPU: rows first, then columns."""
    rows = maps[..., :-2:2, :] + maps[..., 1:-1:2, :] + maps[..., 2::2, :]
    return (rows[..., :-2:2] + rows[..., 1:-1:2] + rows[..., 2::2]) / WINDOW**2


def map_side(patch_size: int, stride: int, image_size: int) -> int:
    """Positions per side of the maps; below 1 where the image is too small for any."""
    return ((image_size - patch_size) // stride + 1 - WINDOW) // STEP + 1
