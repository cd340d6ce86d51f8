"""``dead-leaves-textures``: dead leaves whose every leaf shows an image of ``spectrum-color-wmm``.

Source: Baradad et al., "Learning to See by Looking at Noise", NeurIPS 2021. The published images share a pool of 10,000
textures. Here the 400 images of a block share 32, so that a set of the published size shows 8,400; the textures are
periodic, and every leaf shows its own shifted by a random vector, which leaves their law as it is.
"""

from __future__ import annotations

import numpy as np

from dprandp.synth import statistical
from dprandp.synth.dead_leaves import let_fall

TEXTURES = 32


def texture_leaves(visible: np.ndarray, textures: np.ndarray, choice: np.ndarray, shift: np.ndarray) -> np.ndarray:
    """Cut textures into the shapes of leaves.

    Args:
        visible: int64 [R, R], the leaf that is seen; −1 stays black.
        textures: uint8 [T, R, R, 3].
        choice: int64 [L], the texture of every leaf.
        shift: int64 [L, 2], (rows, columns) by which it is rolled, backwards.

    Returns:
        uint8 [R, R, 3].
    """
    resolution = len(visible)
    row, column = np.indices(visible.shape)
    row = (row + shift[visible, 0]) % resolution
    column = (column + shift[visible, 1]) % resolution
    return np.where((visible >= 0)[:, :, None], textures[choice[visible], row, column], 0).astype(np.uint8)


def render(random: np.random.Generator, count: int, resolution: int) -> np.ndarray:
    """Images of one pool of textures, drawn one after the other: a smaller `count` gives a prefix.

    Args:
        random: consumed; the same state gives the same bytes.
        count: images.
        resolution: pixels per side, a power of two, at least 8.

    Returns:
        uint8 [count, resolution, resolution, 3].
    """
    textures = statistical.render(random, TEXTURES, resolution, spectrum=True, wmm=True, colour=True)
    images = np.empty((count, resolution, resolution, 3), dtype=np.uint8)
    for index in range(count):
        visible, shapes = let_fall(random, resolution)
        choice = random.integers(TEXTURES, size=len(shapes))
        shift = random.integers(resolution, size=(len(shapes), 2))
        images[index] = texture_leaves(visible, textures, choice, shift)
    return images
