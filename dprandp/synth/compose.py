"""What a process is, and processes made of others: ``kml:P``, ``kml-mixup:P`` and ``mixture:P,Q,...``.

Source of the first two: K-Means Leaves (ICML 2025). Two clusters of the colours of one image make a mask; blurred, it
mixes two further images. ``kml-mixup`` is the mean of two such images.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextvars import ContextVar

import numpy as np
import torch
from torch.nn import functional

Process = Callable[[np.random.Generator, int, int], np.ndarray]
"""(random, count, resolution) → uint8 [count, resolution, resolution, 3].

The generator is consumed; the same state gives the same bytes, and a smaller count a prefix of them.
"""

CHUNK = 20  # images mixed together; part of the random stream: changing it changes every image
SOURCES_PER_CHUNK = 30  # images that the three roles of a chunk are drawn from
KMEANS_STEPS = 10
BLURS = 2


on_images: ContextVar[Callable[[int], None]] = ContextVar("on_images", default=lambda count: None)
"""Told of images as they are made, for a progress bar; ``render_block`` sets it."""


def in_chunks(count: int, draw: Callable[[], np.ndarray]) -> np.ndarray:
    """``count`` images from as many chunks as it takes; these are drawn whole, so a smaller count gives a prefix."""
    chunks: list[np.ndarray] = []
    while sum(map(len, chunks)) < count:
        chunks.append(draw())
        on_images.get()(len(chunks[-1]))
    return np.concatenate(chunks)[:count]


def fork(random: np.random.Generator) -> np.random.Generator:
    """A generator whose stream does not depend on how much is taken from another one."""
    return np.random.Generator(np.random.Philox(key=int.from_bytes(random.bytes(16), "little")))


def two_means(images: torch.Tensor) -> torch.Tensor:
    """Cluster the colours of float32 [B, 3, P] in two, by Lloyd's algorithm from a cut across the main component.

    Returns bool [B, P], one of the clusters; neither is empty unless all pixels have the same colour.
    """
    centred = images - images.mean(dim=2, keepdim=True)
    _, vectors = torch.linalg.eigh(centred @ centred.transpose(1, 2))
    mask = (vectors[:, None, :, -1] @ centred)[:, 0] > 0.0
    for _ in range(KMEANS_STEPS):
        inside = mask[:, None].float()
        size = inside.sum(dim=2)
        first = (centred * inside).sum(dim=2) / size.clamp(min=1.0)
        second = (centred * (1.0 - inside)).sum(dim=2) / (images.shape[2] - size).clamp(min=1.0)
        # nearer to the first centre: on its side of the plane half-way between the two
        normal = first - second
        middle = 0.5 * ((first + second) * normal).sum(dim=1)
        mask = (normal[:, None] @ centred)[:, 0] > middle[:, None]
    return mask


def soft_masks(images: torch.Tensor) -> torch.Tensor:
    """Masks float32 [B, R, R, 1] in [0, 1] of uint8 [B, R, R, 3]: two clusters of colours, a 3×3 box blur twice."""
    batch, height, width, _ = images.shape
    mask = two_means(images.float().flatten(1, 2).transpose(1, 2)).float().view(batch, 1, height, width)
    for _ in range(BLURS):
        mask = functional.avg_pool2d(functional.pad(mask, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
    return mask.permute(0, 2, 3, 1)


def mix(masks: torch.Tensor, first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """mask · first + (1 − mask) · second of uint8 [B, R, R, 3] images: float32 of that shape."""
    return second.float() + masks * (first.float() - second.float())


def draw_roles(random: np.random.Generator, count: int, sources: int, leaves: int) -> torch.Tensor:
    """Which sources make the mask, the first and the second image of every leaf: int64 [count, 3·leaves], distinct."""
    return torch.from_numpy(random.permuted(np.tile(np.arange(sources), (count, 1)), axis=1)[:, : 3 * leaves])


def kmeans_leaves(source: Process, leaves: int) -> Process:
    """K-Means Leaves over a process; with 2 leaves the mean of two images.

    The images of a chunk draw their three (or six) different sources from 30 images of the process: each of those
    appears in several images, but hardly ever twice in the same role beside the same others.
    """

    def render(random: np.random.Generator, count: int, resolution: int) -> np.ndarray:
        chunks = -(-count // CHUNK)
        roles_random = fork(random)
        pool = torch.from_numpy(source(fork(random), SOURCES_PER_CHUNK * chunks, resolution))
        mixed = []
        for sources in pool.split(SOURCES_PER_CHUNK):
            masks = soft_masks(sources)
            roles = draw_roles(roles_random, CHUNK, SOURCES_PER_CHUNK, leaves)
            parts = [
                mix(masks[mask], sources[first], sources[second])
                for mask, first, second in (roles[:, 3 * leaf : 3 * leaf + 3].T for leaf in range(leaves))
            ]
            mixed.append(torch.stack(parts).mean(dim=0).round_().to(torch.uint8))
        return torch.cat(mixed)[:count].numpy()

    return render


def mixture(parts: Sequence[Process]) -> Process:
    """Images of several processes in turn: image j is one of process j mod n."""

    def render(random: np.random.Generator, count: int, resolution: int) -> np.ndarray:
        generators = [fork(random) for _ in parts]
        images = np.empty((count, resolution, resolution, 3), dtype=np.uint8)
        for index, (part, generator) in enumerate(zip(parts, generators, strict=True)):
            own = images[index :: len(parts)]
            if len(own):
                own[:] = part(generator, len(own), resolution)
        return images

    return render
