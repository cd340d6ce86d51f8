"""Dead leaves: opaque shapes of power-law size that fall on one another until no pixel is bare.

``dead-leaves`` (``dead-leaves-shapes``) has six kinds of shapes, ``dead-leaves-squares`` only axis-aligned squares,
``dead-leaves-oriented`` only rotated ones; in ``dead-leaves-textures`` every leaf shows an image of
``spectrum-color-wmm``.

Source: the dead-leaves process of Lee, Mumford and Huang (IJCV 2001) as Baradad et al., "Learning to See by Looking at
Noise" (NeurIPS 2021), use it: circle, square, oriented square, rectangle, triangle or quadrilateral with equal
probability, one uniform RGB colour each, centre uniform over the image, circumscribed radius r·R with r on a grid of
200 points in [.03, 1] and probability ∝ r⁻³ − 1. Every polygon is inscribed in its circle: squares and rectangles lie
along the axes unless called oriented, a rectangle's diagonal has a uniform angle, triangles and quadrilaterals have
their corners at uniform angles. A pixel is covered when its centre is, and lengths are not rounded to whole pixels.

**Painting order.** A later shape hides an earlier one, and the shape that covers the last bare pixel is the last one.
(Painting fresh shapes from the top down until nothing is bare has another law: there the shape that finishes the image
lies at the bottom.) All shapes are convex, so a shape is one span of pixels per row; the spans of many shapes are found
together, and what is seen at a pixel is the largest number among the shapes that cover it.

**Textures.** The published images share a pool of 10,000 textures. Here the 400 images of a block share 32, so that a
set of the published size shows 8,400; the textures are periodic, and every leaf shows its own shifted by a random
vector, which leaves their law as it is.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import numpy as np

from dprandp.synth import statistical
from dprandp.synth.compose import in_chunks

KINDS = ("circle", "square", "oriented-square", "rectangle", "triangle", "quadrilateral")
MAX_SHAPES = 5000
SHAPES_PER_DRAW = 500
TEXTURES = 32
RADIUS_GRID = np.linspace(0.03, 1.0, 200)
RADIUS_PROBABILITY = (RADIUS_GRID**-3 - 1.0) / (RADIUS_GRID**-3 - 1.0).sum()
_RADIUS_CUMULATIVE = np.cumsum(RADIUS_PROBABILITY)


@dataclass(frozen=True)
class Shapes:
    """n shapes in the order in which they fall, in pixels of an R×R image."""

    kind: np.ndarray  # int64 [n], index into :data:`KINDS`
    centre: np.ndarray  # float64 [n, 2], (x, y) in [0, R)
    radius: np.ndarray  # float64 [n], of the circumscribed circle
    corners: np.ndarray  # float64 [n, 4], ascending angles on it; a triangle repeats its last one
    colour: np.ndarray  # uint8 [n, 3]

    def __len__(self) -> int:
        return len(self.kind)

    def __getitem__(self, which: slice) -> Shapes:
        return Shapes(self.kind[which], self.centre[which], self.radius[which], self.corners[which], self.colour[which])

    def edges(self) -> tuple[np.ndarray, np.ndarray]:
        """Outward normals [n, 4, 2] and offsets [n, 4]: inside a polygon, (point − centre) · normal ≤ offset."""
        following = np.roll(self.corners, -1, axis=1)
        following[:, -1] += 2.0 * np.pi
        middle = 0.5 * (self.corners + following)
        offset = self.radius[:, None] * np.cos(0.5 * (following - self.corners))
        offset[self.kind == KINDS.index("circle")] = np.inf
        return np.stack([np.cos(middle), np.sin(middle)], axis=-1), offset


def draw_radii(random: np.random.Generator, count: int) -> np.ndarray:
    """Radii as a fraction of the image side, with probability ∝ r⁻³ − 1 on the grid: float64 [count]."""
    position = np.searchsorted(_RADIUS_CUMULATIVE, random.random(count), side="right")
    return RADIUS_GRID[np.minimum(position, len(RADIUS_GRID) - 1)]


def draw_shapes(random: np.random.Generator, count: int, resolution: int, kinds: tuple[str, ...] = KINDS) -> Shapes:
    """Draw `count` independent shapes of the given kinds for an image of `resolution` × `resolution` pixels."""
    kind = np.array([KINDS.index(name) for name in kinds])[random.integers(len(kinds), size=count)]
    centre = random.random((count, 2)) * resolution
    radius = draw_radii(random, count) * resolution
    uniform = random.random((count, 4))
    colour = random.integers(256, size=(count, 3), dtype=np.uint8)

    square = np.pi * np.array([0.25, 0.75, 1.25, 1.75])
    half_angle = 0.5 * np.pi * uniform[:, 0]
    rectangle = np.stack([half_angle, np.pi - half_angle, np.pi + half_angle, 2.0 * np.pi - half_angle], axis=1)
    quadrilateral = np.sort(2.0 * np.pi * uniform, axis=1)
    triangle = np.sort(2.0 * np.pi * uniform[:, :3], axis=1)[:, [0, 1, 2, 2]]
    corners = np.select(
        [(kind == KINDS.index(name))[:, None] for name in KINDS[2:]],
        [square + half_angle[:, None], rectangle, triangle, quadrilateral],
        default=square,
    )
    return Shapes(kind, centre, radius, corners, colour)


def _ranges(first: np.ndarray, last: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Concatenate the integer ranges first[j] … last[j], empty where last < first: (j of every entry, entry)."""
    lengths = np.maximum(last - first + 1, 0)
    owner = np.repeat(np.arange(len(lengths)), lengths)
    before = np.cumsum(lengths) - lengths
    return owner, np.arange(len(owner)) + np.repeat(first - before, lengths)


def covered_pixels(shapes: Shapes, resolution: int) -> tuple[np.ndarray, np.ndarray]:
    """Every pair of a shape and a pixel (row · resolution + column) whose centre it covers: int64 [M] each."""
    normals, offsets = shapes.edges()
    centre_x, centre_y = shapes.centre.T
    top = np.maximum(np.ceil(centre_y - shapes.radius - 0.5), 0.0)
    bottom = np.minimum(np.floor(centre_y + shapes.radius - 0.5), resolution - 1.0)
    shape, row = _ranges(top.astype(np.int64), bottom.astype(np.int64))

    delta_y = row + 0.5 - centre_y[shape]
    half_width = np.sqrt(np.maximum(shapes.radius[shape] ** 2 - delta_y**2, 0.0))
    # Each edge bounds the span of a row on the side its normal points to; edges along the row bound it far outside.
    slope = np.where(np.abs(normals[:, :, 0]) < 1e-12, 1e-12, normals[:, :, 0])[shape]
    bound = (offsets[shape] - normals[shape, :, 1] * delta_y[:, None]) / slope
    left = np.where(slope < 0.0, bound, -np.inf).max(axis=1)
    right = np.where(slope > 0.0, bound, np.inf).min(axis=1)
    left = np.maximum(left, -half_width) + centre_x[shape]
    right = np.minimum(right, half_width) + centre_x[shape]
    first = np.clip(np.ceil(left - 0.5), 0.0, resolution)
    last = np.clip(np.floor(right - 0.5), -1.0, resolution - 1.0)
    span, column = _ranges(first.astype(np.int64), last.astype(np.int64))
    return shape[span], row[span] * resolution + column


def let_fall(
    random: np.random.Generator, resolution: int, kinds: tuple[str, ...] = KINDS
) -> tuple[np.ndarray, Shapes]:
    """Let shapes fall until one covers the last bare pixel, at most 5000.

    Returns which shape is seen, int64 [R, R], −1 where a pixel is bare even then; and the shapes, the last one on top.
    """
    visible = np.full(resolution * resolution, -1)
    fallen: list[Shapes] = []
    count = 0
    while count < MAX_SHAPES and visible.min() < 0:
        batch = draw_shapes(random, SHAPES_PER_DRAW, resolution, kinds)
        shape, pixel = covered_pixels(batch, resolution)
        bare = visible < 0
        first = np.full(len(visible), len(batch))
        np.minimum.at(first, pixel, shape)
        finished_by = first[bare].max()  # len(batch) where this batch leaves a pixel bare
        seen = shape <= finished_by
        np.maximum.at(visible, pixel[seen], shape[seen] + count)
        fallen.append(batch[: finished_by + 1])
        count += len(batch)
    shapes = Shapes(*(np.concatenate([getattr(part, field.name) for part in fallen]) for field in fields(Shapes)))
    return visible.reshape(resolution, resolution), shapes


def draw_image(
    random: np.random.Generator, resolution: int, kinds: tuple[str, ...] = KINDS
) -> tuple[np.ndarray, Shapes]:
    """One image, uint8 [R, R, 3], black where a pixel is bare; and the shapes that fell, the last one on top."""
    visible, shapes = let_fall(random, resolution, kinds)
    return np.where((visible >= 0)[:, :, None], shapes.colour[visible], 0).astype(np.uint8), shapes


def render(random: np.random.Generator, count: int, resolution: int, kinds: tuple[str, ...] = KINDS) -> np.ndarray:
    """The ``Process``: independent images of these kinds of shapes, drawn one after the other."""
    return in_chunks(count, lambda: draw_image(random, resolution, kinds)[0][None])


def texture_leaves(visible: np.ndarray, textures: np.ndarray, choice: np.ndarray, shift: np.ndarray) -> np.ndarray:
    """Cut textures into the shapes of leaves: uint8 [R, R, 3].

    Args:
        visible: int64 [R, R], the leaf that is seen; −1 stays black. textures: uint8 [T, R, R, 3].
        choice: int64 [L], the texture of every leaf.
        shift: int64 [L, 2], (rows, columns) by which it is rolled, backwards.
    """
    resolution = len(visible)
    row, column = np.indices(visible.shape)
    row = (row + shift[visible, 0]) % resolution
    column = (column + shift[visible, 1]) % resolution
    return np.where((visible >= 0)[:, :, None], textures[choice[visible], row, column], 0).astype(np.uint8)


def render_textures(random: np.random.Generator, count: int, resolution: int) -> np.ndarray:
    """The ``Process`` with textures: images of one pool of these, of a power of two from 8 pixels on."""
    textures = statistical.render(random, TEXTURES, resolution, spectrum=True, wmm=True, colour=True)

    def image() -> np.ndarray:
        visible, shapes = let_fall(random, resolution)
        choice = random.integers(TEXTURES, size=len(shapes))
        shift = random.integers(resolution, size=(len(shapes), 2))
        return texture_leaves(visible, textures, choice, shift)[None]

    return in_chunks(count, image)
