"""dead-leaves against the plain painter's algorithm, and the laws of its shapes."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from dprandp.synth import dead_leaves
from dprandp.synth.dead_leaves import KINDS, Shapes


def inside(shapes: Shapes, index: int, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """The obvious test: the disc, or left of every edge of the polygon with these corners."""
    delta_x, delta_y = x - shapes.centre[index, 0], y - shapes.centre[index, 1]
    radius = shapes.radius[index]
    if KINDS[shapes.kind[index]] == "circle":
        return np.hypot(delta_x, delta_y) <= radius
    corners = radius * np.stack([np.cos(shapes.corners[index]), np.sin(shapes.corners[index])], axis=1)
    left_of_all = np.ones(x.shape, dtype=bool)
    for (ax, ay), (bx, by) in zip(corners, np.roll(corners, -1, axis=0), strict=True):
        left_of_all &= (bx - ax) * (delta_y - ay) - (by - ay) * (delta_x - ax) >= -1e-9
    return left_of_all


def grid(resolution: int) -> tuple[np.ndarray, np.ndarray]:
    y, x = np.meshgrid(np.arange(resolution) + 0.5, np.arange(resolution) + 0.5, indexing="ij")
    return x, y


def painter(random: np.random.Generator, resolution: int) -> tuple[np.ndarray, int]:
    """Paint shape after shape over the image, from the bottom up, until no pixel is bare."""
    image = np.zeros((resolution, resolution, 3), dtype=np.uint8)
    bare = np.ones((resolution, resolution), dtype=bool)
    x, y = grid(resolution)
    count = 0
    while count < dead_leaves.MAX_SHAPES:
        batch = dead_leaves.draw_shapes(random, dead_leaves.SHAPES_PER_DRAW, resolution)
        for index in range(len(batch)):
            mask = inside(batch, index, x, y)
            image[mask] = batch.colour[index]
            bare &= ~mask
            count += 1
            if not bare.any():
                return image, count
    return image, count


def front_to_back(shapes: Shapes, resolution: int) -> np.ndarray:
    """The same picture from the top down: a pixel takes the colour of the first shape met."""
    image = np.zeros((resolution, resolution, 3), dtype=np.uint8)
    bare = np.ones((resolution, resolution), dtype=bool)
    x, y = grid(resolution)
    for index in reversed(range(len(shapes))):
        mask = inside(shapes, index, x, y) & bare
        image[mask] = shapes.colour[index]
        bare &= ~mask
    assert not bare.any()
    return image


@pytest.mark.slow
@pytest.mark.parametrize("resolution", [16, 33])
def test_equals_the_painter_and_front_to_back(resolution: int) -> None:
    for seed in range(3):
        image, shapes = dead_leaves.draw_image(np.random.default_rng(seed), resolution)
        wanted, count = painter(np.random.default_rng(seed), resolution)
        assert len(shapes) == count
        np.testing.assert_array_equal(image, wanted)
        np.testing.assert_array_equal(image, front_to_back(shapes, resolution))
        assert (front_to_back(shapes[::-1], resolution) != image).mean() > 0.3  # control: the order matters


def test_areas() -> None:
    """On a fine grid with shapes well inside, a circle covers πr² and a square 2r² (side r√2), oriented or not."""
    resolution, radius = 400, 80.0
    shapes = dead_leaves.draw_shapes(np.random.default_rng(0), 300, resolution)
    shapes = Shapes(shapes.kind, np.full((300, 2), resolution / 2), np.full(300, radius), shapes.corners, shapes.colour)
    owner, pixel = dead_leaves.covered_pixels(shapes, resolution)
    area = np.bincount(owner, minlength=300) / radius**2
    np.testing.assert_allclose(area[shapes.kind == 0], np.pi, rtol=0.01)
    np.testing.assert_allclose(area[shapes.kind == 1], 2.0, rtol=0.02)
    np.testing.assert_allclose(area[shapes.kind == 2], 2.0, rtol=0.02)
    # Inscribed polygons of uniform corners, resp. diagonal, have these mean areas: 4/π, 3/(2π) and 3/π.
    for kind, mean in ((3, 4 / np.pi), (4, 1.5 / np.pi), (5, 3 / np.pi)):
        values = area[shapes.kind == kind]
        assert abs(values.mean() - mean) < 4 * values.std() / len(values) ** 0.5
        assert values.std() > 0.1
    # Only the oriented square of the two turns.
    widths = {
        kind: [np.ptp(pixel[owner == index] % resolution) + 1 for index in np.flatnonzero(shapes.kind == kind)]
        for kind in (1, 2)
    }
    assert set(widths[1]) <= {113, 114}
    assert np.std(widths[2]) > 5


def test_radius_law() -> None:
    radii = dead_leaves.draw_radii(np.random.default_rng(0), 40_000)
    points = [0.03 + 0.97 * index / 199 for index in range(200)]
    weight = [point**-3 - 1.0 for point in points]
    wanted = np.cumsum(weight) / sum(weight)
    empirical = np.searchsorted(np.sort(radii), np.array(points) + 1e-9) / len(radii)
    critical = 1.63 / len(radii) ** 0.5  # Kolmogorov–Smirnov at 1 %, conservative for a grid
    assert np.abs(empirical - wanted).max() < critical
    other = np.cumsum([point**-2.9 - 1.0 for point in points])
    assert np.abs(empirical - other / other[-1]).max() > critical  # control
    assert radii.min() == pytest.approx(0.03)
    assert radii.max() <= 1.0


def test_kinds_centres_and_colours_are_uniform() -> None:
    shapes = dead_leaves.draw_shapes(np.random.default_rng(0), 20_000, 64)
    assert stats.chisquare(np.bincount(shapes.kind, minlength=6)).pvalue > 0.01
    assert stats.chisquare(np.bincount(shapes.kind[shapes.radius > 10], minlength=6)).pvalue > 0.01
    for axis in (0, 1):
        assert stats.kstest(shapes.centre[:, axis] / 64, "uniform").pvalue > 0.01
        assert stats.kstest(shapes.centre[:, axis] / 65, "uniform").pvalue < 1e-3  # control
    for channel in range(3):
        assert stats.chisquare(np.bincount(shapes.colour[:, channel], minlength=256)).pvalue > 0.01


def test_stops_at_the_largest_number_of_shapes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dead_leaves, "MAX_SHAPES", 20)
    monkeypatch.setattr(dead_leaves, "SHAPES_PER_DRAW", 10)
    image, shapes = dead_leaves.draw_image(np.random.default_rng(0), 64)
    wanted, count = painter(np.random.default_rng(0), 64)
    assert len(shapes) == count == 20
    assert (image == 0).all(axis=2).any()
    np.testing.assert_array_equal(image, wanted)


# ----------------------------------------------------------------------------------------------------------- one kind


@pytest.mark.parametrize("kind", ["square", "oriented-square"])
def test_one_kind_alone_equals_front_to_back(kind: str) -> None:
    image, shapes = dead_leaves.draw_image(np.random.default_rng(2), 32, (kind,))
    assert set(shapes.kind) == {KINDS.index(kind)}
    np.testing.assert_array_equal(image, front_to_back(shapes, 32))


# ----------------------------------------------------------------------------------------------------------- textures


def test_textured_leaves_show_their_own_shifted_textures() -> None:
    random = np.random.default_rng(0)
    textures = random.integers(256, size=(5, 16, 16, 3), dtype=np.uint8)
    visible, shapes = dead_leaves.let_fall(np.random.default_rng(1), 16)
    visible[3, 4] = -1  # bare
    choice, shift = random.integers(5, size=len(shapes)), random.integers(16, size=(len(shapes), 2))
    image = dead_leaves.texture_leaves(visible, textures, choice, shift)
    for y in range(16):
        for x in range(16):
            leaf = visible[y, x]
            wanted = textures[choice[leaf], (y + shift[leaf, 0]) % 16, (x + shift[leaf, 1]) % 16]
            np.testing.assert_array_equal(image[y, x], [0, 0, 0] if leaf < 0 else wanted)


def test_textures_are_spectrum_color_wmm_and_leave_no_pixel_bare(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def pool(random: np.random.Generator, count: int, resolution: int, **constraints: bool) -> np.ndarray:
        seen.append((count, constraints))
        colours = np.arange(1, count + 1, dtype=np.uint8)[:, None, None, None]
        return np.broadcast_to(colours, (count, resolution, resolution, 3))

    monkeypatch.setattr(dead_leaves.statistical, "render", pool)
    images = dead_leaves.render_textures(np.random.default_rng(0), 3, 32)
    assert seen == [(dead_leaves.TEXTURES, {"spectrum": True, "wmm": True, "colour": True})]
    assert (images > 0).all()
    assert len(np.unique(images)) > 20  # the leaves draw from the whole pool
