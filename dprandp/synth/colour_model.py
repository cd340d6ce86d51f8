"""Which colours the statistical processes use, and in which proportions.

Source: Baradad et al., "Learning to See by Looking at Noise", NeurIPS 2021, the *color* constraint: 3 to 22 uniform
random colours in random proportions, sorted into a striped reference image, blurred by a random box and sprinkled with
a little noise. Its principal components are the colour basis, its values along each of them a histogram.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy import ndimage

COLOURS = (3, 22)
SMALLEST_PROPORTION = 0.001  # before the proportions are scaled to sum to one
LARGEST_BLUR = 10  # pixels of a 128-pixel image
NOISE = 10.0 / 256.0


@dataclass(frozen=True)
class ColourModel:
    """The colours of B images, in units of 1/256 of a channel's range.

    Attributes:
        basis: float32 [B, 3, 3], orthonormal rows: the principal components, smallest variance first.
        mean: float32 [B, 3].
        histogram: float32 [B, 3, R²], ascending: the values that the pixels take along each component.
    """

    basis: np.ndarray
    mean: np.ndarray
    histogram: np.ndarray

    def part(self, start: int, stop: int) -> ColourModel:
        """Those of some of the images."""
        return ColourModel(self.basis[start:stop], self.mean[start:stop], self.histogram[start:stop])

    def to_rgb(self, components: np.ndarray) -> np.ndarray:
        """Components float32 [B, 3, R, R] along the basis → RGB of the same shape."""
        return np.einsum("bkc,bkyx->bcyx", self.basis, components) + self.mean[:, :, None, None]


def draw_reference(random: np.random.Generator, resolution: int) -> np.ndarray:
    """One striped reference image: float64 [R, R, 3] from 0 to 256."""
    count = random.integers(*COLOURS, endpoint=True)
    proportions = SMALLEST_PROPORTION + random.random(count)
    pixels = random.multinomial(resolution**2, proportions / proportions.sum())
    image = np.repeat(random.random((count, 3)), pixels, axis=0).reshape(resolution, resolution, 3)
    box = max(1, round(random.integers(1, LARGEST_BLUR, endpoint=True) * resolution / 128))
    image = ndimage.uniform_filter(image, (box, box, 1), mode="nearest")
    image += NOISE * random.random(image.shape)
    image -= image.min()
    return image * (256.0 / image.max())


def draw_colour_model(random: np.random.Generator, count: int, resolution: int) -> ColourModel:
    """Draw the colours of `count` images."""
    pixels = np.stack([draw_reference(random, resolution).reshape(-1, 3) for _ in range(count)])
    mean = pixels.mean(axis=1)
    pixels -= mean[:, None]
    # einsum, not @: the sums of a threaded BLAS may depend on the number of threads, and the images must not
    _, vectors = np.linalg.eigh(np.einsum("bpc,bpd->bcd", pixels, pixels))
    histogram = np.sort(np.einsum("bpc,bck->bkp", pixels, vectors).astype(np.float32), axis=2)
    return ColourModel(vectors.transpose(0, 2, 1).astype(np.float32), mean.astype(np.float32), histogram)
