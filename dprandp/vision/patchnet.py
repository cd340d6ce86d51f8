"""PatchNet: a one-layer convolutional network whose filters are a dictionary of synthetic patches.

The classical patch pipeline (Coates & Ng 2011, "The importance of encoding versus training with sparse coding and
vector quantization") with every learned part taken from images of a random process: ZCA whitening and a spherical
k-means dictionary (``dictionary.py``) fold into one linear filter bank, so the network is

    local contrast normalisation -> filters -> two-sided thresholded ReLU -> average pooling on a 2 x 2 grid

and has the same interface as the WRN: ``normalise``, ``features``, ``feature_dim``. Its parameters (filters and biases)
are ordinary ``nn.Parameter``s, so DP-SGD can tune them in Phase III. No layer looks at more than one image.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from dprandp.threads import in_parts

CONTRAST_FLOOR = 10 / 255
"""Added to a patch's standard deviation before dividing by it, in units of [0, 1] pixels: flat patches stay flat."""

TILE = 400
"""Filters handled together in ``extract``: 729 positions x 400 filters x 4 bytes stay inside a core's L2 cache."""


class PatchNet(nn.Module):
    """Filters over contrast-normalised patches, rectified on both sides, pooled on a grid.

    Args:
        filters: size of the dictionary, F.
        patch_size: side of a patch in pixels.
        stride: pixels between neighbouring patches. 2 costs a quarter of 1, so that four times the filters fit.
        grid: the features are averaged over grid x grid regions.
        threshold: responses in [-threshold, threshold] count as zero.
        image_size: side of the (square) input in pixels.
        channels: 3.

    Attributes:
        weight: [F, channels * patch_size**2] float32, the filters in the order of ``torch.nn.functional.unfold``.
        bias: [F] float32.
        feature_dim: 2 * F * grid**2.
    """

    def __init__(
        self,
        filters: int,
        *,
        patch_size: int = 6,
        stride: int = 1,
        grid: int = 2,
        threshold: float = 1.0,
        image_size: int = 32,
        channels: int = 3,
    ) -> None:
        super().__init__()
        self.patch_size, self.stride, self.grid = patch_size, stride, grid
        self.threshold, self.image_size = threshold, image_size
        self.weight = nn.Parameter(torch.zeros(filters, channels * patch_size**2))
        self.bias = nn.Parameter(torch.zeros(filters))
        positions = (image_size - patch_size) // stride + 1
        self.register_buffer("pooling", pooling_matrix(positions, grid), persistent=False)
        self.feature_dim = 2 * filters * grid**2

    @staticmethod
    def normalise(images: Tensor) -> Tensor:
        """uint8 [..., 3, H, W] to float32 in [0, 1]. The patches' own contrast normalisation does the rest."""
        return images.to(torch.float32) / 255

    def patches(self, images: Tensor) -> Tensor:
        """Contrast-normalised patches.

        Args:
            images: float [B, C, H, W] in [0, 1].

        Returns:
            [B, C * patch_size**2, L], each patch minus its mean, over (its standard deviation + ``CONTRAST_FLOOR``).
        """
        return normalise_patches(functional.unfold(images, self.patch_size, stride=self.stride))

    def features(self, images: Tensor) -> Tensor:
        """Differentiable features.

        Args:
            images: float [B, C, image_size, image_size] in [0, 1].

        Returns:
            [B, feature_dim] float: 2 signs x grid**2 regions x F filters, each the mean excess over the threshold.
        """
        responses = (self.weight @ self.patches(images) + self.bias[:, None]).transpose(1, 2)
        positive = self.pooling @ functional.relu(responses - self.threshold)
        negative = self.pooling @ functional.relu(-responses - self.threshold)
        return torch.stack([positive, negative], dim=1).flatten(1)

    @torch.no_grad()
    def extract(self, images: Tensor) -> Tensor:
        """The same numbers as ``features``, several times faster, without gradients.

        One image at a time, a tile of filters at a time, so that the responses never leave the cache; as many threads
        as torch is allowed, each with whole images. On an accelerator this is ``features``.

        Args:
            images: uint8 [B, C, image_size, image_size].

        Returns:
            [B, feature_dim] float32.
        """
        if images.device.type != "cpu":
            return self.features(self.normalise(images))
        out = torch.empty(len(images), 2, self.grid**2, len(self.weight))
        columns = self.weight.detach().t().contiguous()
        in_parts(lambda part, parts: self._extract_slice(images[part::parts], columns, out[part::parts]))
        return out.flatten(1)

    def _extract_slice(self, images: Tensor, columns: Tensor, out: Tensor) -> None:
        """Fill ``out`` [b, 2, grid**2, F] with the features of ``images`` uint8 [b, C, H, W]."""
        with torch.no_grad():
            positions, filters = self.pooling.shape[1], columns.shape[1]
            tile = min(TILE, filters)
            responses, excess = torch.empty(positions, tile), torch.empty(positions, tile)
            for index in range(len(images)):
                patches = self.patches(self.normalise(images[index : index + 1]))[0].t().contiguous()
                for start in range(0, filters, tile):
                    stop = min(start + tile, filters)
                    r, e = responses[:, : stop - start], excess[:, : stop - start]
                    torch.addmm(self.bias[start:stop], patches, columns[:, start:stop], out=r)
                    # max(r, t) - t = relu(r - t): one pass instead of two; the means commute with the constant
                    torch.clamp(r, min=self.threshold, out=e)
                    out[index, 0, :, start:stop] = self.pooling @ e
                    torch.clamp(r, max=-self.threshold, out=e)
                    out[index, 1, :, start:stop] = self.pooling @ e
            out[:, 0].sub_(self.threshold)
            out[:, 1].neg_().sub_(self.threshold)


def normalise_patches(patches: Tensor) -> Tensor:
    """Minus the mean, over (standard deviation + ``CONTRAST_FLOOR``), along dimension -2.

    Args:
        patches: float [..., d, L], pixels in [0, 1].

    Returns:
        float [..., d, L].
    """
    centred = patches - patches.mean(dim=-2, keepdim=True)
    deviation = centred.square().mean(dim=-2, keepdim=True).add(1e-12).sqrt()  # 1e-12: sqrt has no gradient at 0
    return centred / (deviation + CONTRAST_FLOOR)


def pooling_matrix(positions: int, grid: int) -> Tensor:
    """Averaging over a grid of regions as one matrix.

    Args:
        positions: patches per side.
        grid: regions per side; where ``positions`` does not divide, the first regions are the larger ones.

    Returns:
        [grid**2, positions**2] float32, each row sums to 1.
    """
    chunk = -(-positions // grid)
    region = torch.arange(positions) // chunk
    cell = (region[:, None] * grid + region[None, :]).flatten()
    membership = functional.one_hot(cell, grid**2).to(torch.float32).t()
    return membership / membership.sum(dim=1, keepdim=True)
