"""The second layer: a dictionary over patches of the responses to the patches below.

The same recipe once more (Coates & Ng 2011, "Selecting receptive fields in deep networks", stack it likewise): a small
dictionary of the patches below answers at every position, its two-sided responses are averaged over overlapping 3 x 3
windows and their roots taken, the channels are whitened, and patches of these maps get a dictionary of their own.
Everything is learned from images of a random process (``dictionary.py``).

    filters on patches -> two-sided ReLU -> 3 x 3 averages at every second position -> root -> whitened channels
    -> patches of 3 x 3 positions, each divided by its length -> ``PatchLayer``

The features say what lies next to what, which those of one layer do not, and are whitened as a part of their own. On a
32-pixel image a first layer of 6-pixel patches has 27 x 27 of them, the second 11 x 11 (of 12 pixels).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from dprandp.vision.patchnet import ROOT_FLOOR, PatchExtractor, PatchLayer, PatchNet
from dprandp.vision.whitening import Part

WINDOW, STEP = 3, 2
"""Responses are averaged over WINDOW x WINDOW positions, at every STEP-th."""

RESPONSE_PATCH = 3
"""Side of a patch of responses, in positions of the maps."""

LENGTH_FLOOR = 0.1
"""Of a patch of responses, relative to √d, the length of one with unit variance: empty patches stay short."""

SHARE = 0.5
"""Of the squared length of all features, for each layer. Experiments on CIFAR-10's training split at ε = 1: with 1,600
filters in both (10,000 images fitted, 4,000 held out) 70.2, 70.7, 70.3 % for .2, .4, .6 to the second, where the first
layer alone had 68.5 and the second alone 67.4; with 2,400 and 3,200 (20,000 fitted, 10,000 held out) 71.1 for .4 and
71.3 for .5."""


class ResponseLayer(PatchLayer):
    """A dictionary over patches of responses.

    Args:
        filters: size of the dictionary, F.
        below: the layer whose patches get the small dictionary that the maps are of; it is looked at and not kept.
        map_filters: size M of the small dictionary; the maps have 2 M channels, one for each sign.
        map_dims: channels kept after whitening, C.
        response_patch: side k of a patch of responses, in positions of the maps.
        patch_dims: axes r that these are whitened to; at most C k**2.
        threshold: see ``PatchLayer``; of the maps too.

    Attributes:
        map_weight: [M, d of the layer below] float32 on patches before whitening, map_bias: [M].
        channel_basis: [C, 2 M] float32, channel_centre: [C]: whitening of the channels.
        None of the four is trained: what lies below this dictionary stays as Phase I left it.
    """

    def __init__(
        self,
        filters: int,
        below: PatchLayer,
        *,
        map_filters: int = 256,
        map_dims: int = 64,
        response_patch: int = RESPONSE_PATCH,
        patch_dims: int = 192,
        threshold: float = 0.25,
    ) -> None:
        width = map_dims * response_patch**2
        super().__init__(
            filters,
            width=width,
            patch_dims=min(patch_dims, width),
            positions=positions_above(below.positions, response_patch),
            threshold=threshold,
        )
        self.below_positions, self.response_patch = below.positions, response_patch
        self.register_buffer("map_weight", torch.zeros(map_filters, below.basis.shape[1]))
        self.register_buffer("map_bias", torch.zeros(map_filters))
        self.register_buffer("channel_basis", torch.eye(map_dims, 2 * map_filters))
        self.register_buffer("channel_centre", torch.zeros(map_dims))

    def maps(self, below: Tensor) -> Tensor:
        """Patches below [B, d, L] to roots of averaged responses, [B, 2 M, S, S]; first all positive ones."""
        responses = self.map_weight @ below + self.map_bias[:, None]
        responses = responses.unflatten(2, (self.below_positions, self.below_positions))
        both = torch.cat([responses - self.threshold, -responses - self.threshold], dim=1)
        return functional.avg_pool2d(functional.relu(both), WINDOW, STEP).add(ROOT_FLOOR).sqrt()

    def lift(self, below: Tensor) -> Tensor:
        """Patches below [B, d, L] to patches of responses [B, C k**2, L'], each u made u / (‖u‖ / √(C k**2) + floor).

        The floor is ``LENGTH_FLOOR``.
        """
        maps = self.maps(below)
        channels = self.channel_basis @ maps.flatten(2) - self.channel_centre[:, None]
        patches = functional.unfold(channels.unflatten(2, maps.shape[2:]), self.response_patch)
        return patches / (patches.norm(dim=1, keepdim=True) / math.sqrt(patches.shape[1]) + LENGTH_FLOOR)

    @torch.no_grad()
    def lift_rows(self, below: Tensor) -> Tensor:
        """The same of one image, faster on a CPU: [L, d] to [L', C k**2], patch after patch.

        With the channels last, windows are sums of whole rows of memory.
        """
        side, filters = self.below_positions, len(self.map_weight)
        responses = torch.addmm(self.map_bias, below, self.map_weight.t()).view(side, side, filters)
        excess = torch.clamp(responses, min=self.threshold)  # relu(r - t) + t, as in ``excess_rows``
        positive = window_means(excess)
        maps = positive.new_empty(*positive.shape[:2], 2 * filters)
        torch.sub(positive, self.threshold - ROOT_FLOOR, out=maps[..., :filters])
        torch.clamp(responses, max=-self.threshold, out=excess)
        torch.sub(window_means(excess).neg_(), self.threshold - ROOT_FLOOR, out=maps[..., filters:])
        maps = maps.clamp_(min=ROOT_FLOOR).sqrt_().flatten(0, 1)
        channels = torch.addmm(-self.channel_centre, maps, self.channel_basis.t())
        windows = channels.view(*positive.shape[:2], -1).unfold(0, self.response_patch, 1)
        patches = windows.unfold(1, self.response_patch, 1).reshape(self.positions**2, -1)
        return patches.div_(patches.norm(dim=1, keepdim=True).div_(math.sqrt(patches.shape[1])).add_(LENGTH_FLOOR))


class DeepPatchNet(PatchExtractor, nn.Module):
    """A ``PatchNet`` and a ``ResponseLayer`` on top: the features of both, side by side.

    Args:
        first: over patches of pixels. second: over patches of responses to those.

    Attributes:
        feature_dim: the sum of theirs. parts: each is whitened apart.
    """

    def __init__(self, first: PatchNet, second: ResponseLayer) -> None:
        super().__init__()
        self.first, self.second = first, second
        self.feature_dim = first.feature_dim + second.feature_dim
        self.parts = tuple(Part(layer.feature_dim, SHARE) for layer in self.chain)

    @property
    def chain(self) -> tuple[PatchLayer, ...]:
        """The layers from the pixels upwards."""
        return (self.first, self.second)


def window_means(maps: Tensor) -> Tensor:
    """``avg_pool2d(maps, 3, 2)`` of float [S, S, channels]."""
    rows = (maps[:-2:2] + maps[1:-1:2]).add_(maps[2::2])
    return (rows[:, :-2:2] + rows[:, 1:-1:2]).add_(rows[:, 2::2]).div_(WINDOW**2)


def positions_above(positions: int, response_patch: int = RESPONSE_PATCH) -> int:
    """Patches of responses per side over so many patches below; under 1 where there is no room for any."""
    return (positions - WINDOW) // STEP + 1 - response_patch + 1
