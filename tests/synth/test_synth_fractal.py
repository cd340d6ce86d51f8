"""fractal: maps contract, a known attractor, systems that fill too little are drawn again."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from dprandp.synth import fractal
from dprandp.synth.fractal import Systems


def sierpinski() -> Systems:
    """Three maps of factor ½ towards the corners of a triangle, and five that must never be chosen."""
    matrix = np.zeros((1, 8, 2, 2))
    matrix[0, :3] = 0.5 * np.eye(2)
    offset = np.full((1, 8, 2), 9.0)
    offset[0, :3] = [(0.0, 0.0), (0.5, 0.0), (0.25, 0.5)]
    probability = np.zeros((1, 8))
    probability[0, :3] = 1 / 3
    return Systems(matrix, offset, probability)


def test_maps_contract_and_have_the_published_total() -> None:
    systems = fractal.draw_systems(np.random.default_rng(0), 300)
    singular = np.linalg.svd(systems.matrix, compute_uv=False)
    used = systems.probability > 0
    maps = used.sum(axis=1)
    assert (singular[used] > 0.0).all()
    assert singular.max() < 1.0
    total = (singular @ [1.0, 2.0]).sum(axis=1)
    assert (total >= (5 + maps) / 2 - 1e-9).all()
    assert (total <= (6 + maps) / 2 + 1e-9).all()
    np.testing.assert_allclose(systems.probability.sum(axis=1), 1.0)
    determinant = np.abs(np.linalg.det(systems.matrix))
    np.testing.assert_allclose(systems.probability, determinant / determinant.sum(axis=1, keepdims=True), atol=1e-9)
    assert set(maps) == set(range(2, 9))
    assert stats.chisquare(np.bincount(maps)[2:]).pvalue > 1e-3
    mirrored = np.linalg.det(systems.matrix)[used] < 0
    assert 0.4 < mirrored.mean() < 0.6


def test_the_game_plays_sierpinskis_triangle() -> None:
    points, maps = fractal.play(np.random.default_rng(0), sierpinski(), 20_000)
    assert points.shape[1] >= 20_000
    assert set(np.unique(maps)) == {0, 1, 2}
    assert stats.chisquare(np.bincount(maps[0])).pvalue > 1e-3
    # A point made by map k lies in the k-th of the three half-size triangles: its preimage lies in the triangle.
    preimage = 2.0 * (points[0] - sierpinski().offset[0, maps[0]])
    for x, y in (points[0].T, preimage.T):
        assert (y >= -1e-4).all()
        assert (y <= 2.0 * np.minimum(x, 1.0 - x) + 1e-3).all()
    # Box-counting dimension log 3 / log 2; a filled triangle's would be 2.
    counts = [(fractal.count_points(points, maps, 8, size).sum(axis=3) > 0).sum() for size in (16, 32)]
    assert np.log2(counts[1] / counts[0]) == pytest.approx(np.log2(3), abs=0.25)


def test_counts_fill_the_image_and_lose_no_point() -> None:
    points, maps = fractal.play(np.random.default_rng(0), sierpinski(), 5000)
    counts = fractal.count_points(points, maps, 8, 64)
    assert counts.sum() == points.shape[1]
    rows, columns = np.nonzero(counts[0].sum(axis=2))
    assert min(rows.min(), columns.min()) <= 2
    assert max(rows.max(), columns.max()) >= 61
    assert min(rows.min(), columns.min(), 63 - rows.max(), 63 - columns.max()) >= 1  # the margin


def test_degenerate_systems_are_drawn_again(monkeypatch: pytest.MonkeyPatch) -> None:
    counts = fractal.draw_counts(np.random.default_rng(0), 12, 32)
    filled = (counts.sum(axis=3) > 0).mean(axis=(1, 2))
    assert (filled >= fractal.SMALLEST_FILL).all()
    monkeypatch.setattr(fractal, "SMALLEST_FILL", 0.0)
    anything = fractal.draw_counts(np.random.default_rng(0), 40, 32)
    assert ((anything.sum(axis=3) > 0).mean(axis=(1, 2)) < 0.2).any()  # control: some are degenerate


def test_a_pixel_has_the_mean_colour_of_its_maps() -> None:
    counts = np.zeros((1, 4, 4, 8), dtype=np.int64)
    counts[0, 1, 2, 0], counts[0, 1, 2, 3], counts[0, 0, 0, 3] = 3, 1, 1
    image = fractal.paint(np.random.default_rng(0), counts)
    random = np.random.default_rng(0)
    palette, background = random.random((1, 8, 3))[0], random.random((1, 1, 1, 3))[0, 0, 0]
    np.testing.assert_array_equal(image[0, 1, 2], np.rint(255 * (0.75 * palette[0] + 0.25 * palette[3])))
    np.testing.assert_array_equal(image[0, 0, 0], np.rint(255 * palette[3] * (0.4 + 0.6 * np.log(2) / np.log(5))))
    np.testing.assert_array_equal(image[0, 3, 3], np.rint(255 * 0.5 * background))
