"""``fractal``: attractors of random iterated function systems (IFS), drawn by the chaos game.

Sources: Kataoka et al., "Pre-training without Natural Images" (ACCV 2020, FractalDB): several affine maps of the plane,
applied one after the other, each with a probability ∝ |det|; systems that fill too little of the image are drawn again.
Anderson and Farrell, "Improving Fractal Pre-training" (WACV 2022): maps are drawn by their singular values, so that all
of them contract and an attractor exists, and Σ(σ₁ + 2σ₂) over n maps is between (5+n)/2 and (6+n)/2, where attractors
have visible structure.

The attractor is scaled to the image. A pixel shows the mean colour of the maps whose images of the attractor meet in
it, brighter (by the logarithm of their number) where the points are denser, on a plain background. (FractalDB paints in
grey, or in colours that do not follow the geometry.)
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from dprandp.synth.compose import in_chunks

CHUNK = 10  # images drawn and rendered together; part of the random stream: changing it changes every image
MAPS = (2, 8)
SMALLEST_FILL = 0.2  # of the pixels
WALKERS = 512
BURN_IN = 24
POINTS_PER_PIXEL = 8
MOST_POINTS = 400_000  # of an image; FractalDB takes 100,000 at 512 px
MARGIN = 0.03  # of the image's side, left free on every side


@dataclass(frozen=True)
class Systems:
    """B iterated function systems; those with fewer than the largest number of maps have maps of probability 0."""

    matrix: np.ndarray  # float64 [B, K, 2, 2], singular values below 1
    offset: np.ndarray  # float64 [B, K, 2], in [−1, 1]
    probability: np.ndarray  # float64 [B, K], rows sum to 1


def draw_singular_values(random: np.random.Generator, maps: int) -> np.ndarray:
    """Uniform over 0 < σ₂ ≤ σ₁ < 1 for every map, given that Σ(σ₁ + 2σ₂) is in range: float64 [maps, 2]."""
    low = 0.5 * (5 + maps)
    while True:
        values = np.sort(random.random((256, maps, 2)), axis=2)[:, :, ::-1]
        total = (values @ [1.0, 2.0]).sum(axis=1)
        found = np.flatnonzero((total >= low) & (total <= low + 0.5))
        if len(found):
            return values[found[0]]


def draw_systems(random: np.random.Generator, count: int) -> Systems:
    """Draw `count` systems."""
    most = MAPS[1]
    singular = np.zeros((count, most, 2))
    for system in singular:
        maps = random.integers(*MAPS, endpoint=True)
        system[:maps] = draw_singular_values(random, maps)
    turn = random.uniform(-np.pi, np.pi, (2, count, most))
    mirror = np.where(random.random((count, most, 2)) < 0.5, -1.0, 1.0)
    cosine, sine = np.cos(turn), np.sin(turn)
    rotation = np.stack([np.stack([cosine, -sine], axis=-1), np.stack([sine, cosine], axis=-1)], axis=-2)
    matrix = (rotation[0] * singular[:, :, None, :]) @ rotation[1] * mirror[:, :, None, :]
    weight = singular.prod(axis=2)
    offset = random.uniform(-1.0, 1.0, (count, most, 2))
    return Systems(matrix, offset, weight / weight.sum(axis=1, keepdims=True))


def play(random: np.random.Generator, systems: Systems, points: int) -> tuple[np.ndarray, np.ndarray]:
    """The chaos game: 512 walkers per system start at 0, forget 24 steps, and leave a point at every later one.

    Returns:
        points float32 [B, P, 2] and the maps that made them, int64 [B, P], P ≥ `points`.
    """
    count = len(systems.matrix)
    steps = BURN_IN + -(-points // WALKERS)
    choice = np.empty((steps, count, WALKERS), dtype=np.int64)
    uniform = random.random((steps, count, WALKERS), dtype=np.float32)
    for index, limits in enumerate(np.cumsum(systems.probability, axis=1)[:, :-1]):
        choice[:, index] = np.searchsorted(limits, uniform[:, index], side="right")
    row = choice + systems.probability.shape[1] * np.arange(count)[None, :, None]
    table = np.concatenate([systems.matrix.reshape(-1, 4), systems.offset.reshape(-1, 2)], axis=1)
    a, b, c, d, e, f = np.ascontiguousarray(table.T, dtype=np.float32)
    x = y = np.zeros((count, WALKERS), dtype=np.float32)
    path = np.empty((steps - BURN_IN, count, WALKERS, 2), dtype=np.float32)
    for step, chosen in enumerate(row):
        x, y = a[chosen] * x + b[chosen] * y + e[chosen], c[chosen] * x + d[chosen] * y + f[chosen]
        if step >= BURN_IN:
            path[step - BURN_IN, ..., 0], path[step - BURN_IN, ..., 1] = x, y
    path = path.transpose(1, 0, 2, 3).reshape(count, -1, 2)
    return path, choice[BURN_IN:].transpose(1, 0, 2).reshape(count, -1)


def count_points(points: np.ndarray, maps: np.ndarray, kinds: int, resolution: int) -> np.ndarray:
    """Scale every attractor to the image and count points by pixel and map: int64 [B, R, R, kinds]."""
    low, high = points.min(axis=1, keepdims=True), points.max(axis=1, keepdims=True)
    scale = (1.0 - 2.0 * MARGIN) * resolution / np.maximum(high - low, 1e-6)
    place = ((points - low) * scale + MARGIN * resolution).astype(np.int64)
    np.clip(place, 0, resolution - 1, out=place)
    cell = ((np.arange(len(points))[:, None] * resolution + place[..., 1]) * resolution + place[..., 0]) * kinds + maps
    shape = (len(points), resolution, resolution, kinds)
    return np.bincount(cell.ravel(), minlength=int(np.prod(shape))).reshape(shape)


def draw_counts(random: np.random.Generator, count: int, resolution: int) -> np.ndarray:
    """Point counts of `count` systems that fill enough of the image; others are drawn again: [count, R, R, 8]."""
    counts = np.empty((0, resolution, resolution, MAPS[1]), dtype=np.int64)
    while len(counts) < count:
        systems = draw_systems(random, count)
        points, maps = play(random, systems, min(POINTS_PER_PIXEL * resolution**2, MOST_POINTS))
        drawn = count_points(points, maps, MAPS[1], resolution)
        filled = (drawn.sum(axis=3) > 0).mean(axis=(1, 2))
        counts = np.concatenate([counts, drawn[filled >= SMALLEST_FILL]])
    return counts[:count]


def paint(random: np.random.Generator, counts: np.ndarray) -> np.ndarray:
    """Colour point counts [B, R, R, K]: uint8 [B, R, R, 3]."""
    palette = random.random((len(counts), counts.shape[3], 3))
    background = random.random((len(counts), 1, 1, 3))
    total = counts.sum(axis=3, keepdims=True)
    mean = np.einsum("byxk,bkc->byxc", counts / np.maximum(total, 1), palette)
    density = np.log1p(total) / np.log1p(total.max(axis=(1, 2), keepdims=True))
    shade = 0.4 + 0.6 * density
    return np.rint(255.0 * np.where(total > 0, mean * shade, background * 0.5)).astype(np.uint8)


def render(random: np.random.Generator, count: int, resolution: int) -> np.ndarray:
    """The ``Process``: independent images."""
    return in_chunks(count, lambda: paint(random, draw_counts(random, CHUNK, resolution)))
