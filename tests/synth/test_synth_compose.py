"""K-Means Leaves and mixtures against their definitions, with sources that are easy to follow."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.cluster import KMeans

from dprandp.synth import compose


def noise(random: np.random.Generator, count: int, resolution: int) -> np.ndarray:
    return random.integers(256, size=(count, resolution, resolution, 3), dtype=np.uint8)


def blobs(count: int, resolution: int) -> np.ndarray:
    """Two colours with some noise each, in a random half-plane."""
    random = np.random.default_rng(0)
    y, x = np.mgrid[:resolution, :resolution] - resolution / 2
    angle = random.uniform(0, 2 * np.pi, (count, 1, 1))
    side = (np.cos(angle) * x + np.sin(angle) * y > 1.0)[..., None]
    colours = random.uniform(30, 225, (2, count, 1, 1, 3))
    spread = random.normal(0, 12, (count, resolution, resolution, 3))
    return np.clip(np.where(side, *colours) + spread, 0, 255).astype(np.uint8)


def test_two_means_equal_scikit_learns() -> None:
    images = blobs(8, 16).reshape(8, -1, 3)
    masks = compose.two_means(torch.from_numpy(images).float().transpose(1, 2)).numpy()
    for image, mask in zip(images, masks, strict=True):
        labels = KMeans(2, n_init=5, random_state=0).fit(image.astype(float)).labels_.astype(bool)
        assert max((mask == labels).mean(), (mask != labels).mean()) > 0.99
    assert compose.two_means(torch.full((1, 3, 9), 7.0)).sum() == 0  # one colour: everything in one cluster


def test_masks_are_blurred_twice_with_edges_repeated() -> None:
    images = torch.from_numpy(blobs(3, 12))
    masks = compose.soft_masks(images).numpy()[..., 0]
    hard = compose.two_means(images.float().flatten(1, 2).transpose(1, 2)).view(3, 12, 12).double().numpy()
    for _ in range(2):
        padded = np.pad(hard, ((0, 0), (1, 1), (1, 1)), mode="edge")
        hard = sum(padded[:, 1 + dy : 13 + dy, 1 + dx : 13 + dx] for dy in (-1, 0, 1) for dx in (-1, 0, 1)) / 9
    np.testing.assert_allclose(masks, hard, atol=1e-6)
    assert ((masks > 0.01) & (masks < 0.99)).any()


@pytest.mark.parametrize("leaves", [1, 2])
def test_every_pixel_is_a_convex_combination_of_two_sources(leaves: int) -> None:
    sources = []

    def source(random: np.random.Generator, count: int, resolution: int) -> np.ndarray:
        sources.append(noise(random, count, resolution))
        return sources[-1]

    images = compose.kmeans_leaves(source, leaves)(np.random.default_rng(0), 25, 8)
    assert len(sources[0]) == 2 * compose.SOURCES_PER_CHUNK
    random = np.random.default_rng(0)
    roles_random = compose.fork(random)
    for index, image in enumerate(images):
        chunk, place = divmod(index, compose.CHUNK)
        if place == 0:
            roles = compose.draw_roles(roles_random, compose.CHUNK, compose.SOURCES_PER_CHUNK, leaves).numpy()
        pool = sources[0][compose.SOURCES_PER_CHUNK * chunk :]
        assert len(set(roles[place])) == 3 * leaves  # different sources
        wanted = np.zeros((8, 8, 3))
        for leaf in range(leaves):
            mask_of, first, second = pool[roles[place, 3 * leaf : 3 * leaf + 3]].astype(float)
            mask = compose.soft_masks(torch.from_numpy(mask_of[None].astype(np.uint8))).double().numpy()[0]
            assert mask.min() >= 0.0
            assert mask.max() <= 1.0
            wanted += (mask * first + (1 - mask) * second) / leaves
        assert np.abs(image - wanted).max() <= 0.5 + 1e-3
        if leaves == 1:
            low, high = np.minimum(first, second), np.maximum(first, second)
            assert ((image >= low - 0.5) & (image <= high + 0.5)).all()
        other = pool[roles[(place + 1) % compose.CHUNK, 1]]  # control
        assert np.abs(image - other.astype(float)).mean() > 20


def test_mixtures_interleave_their_parts() -> None:
    def constant(value: int) -> compose.Process:
        numbers = value + np.arange(9)[:, None, None, None]
        return lambda random, count, size: np.broadcast_to(numbers[:count], (count, size, size, 3))

    images = compose.mixture([constant(0), constant(100), constant(200)])(np.random.default_rng(0), 8, 4)
    assert images[:, 0, 0, 0].tolist() == [0, 100, 200, 1, 101, 201, 2, 102]
    assert compose.mixture([constant(0), constant(100)])(np.random.default_rng(0), 1, 4)[0, 0, 0, 0] == 0


def test_chunks_are_drawn_whole_until_there_are_enough() -> None:
    for count, drawn in ((1, 1), (3, 1), (4, 2)):
        calls = iter(range(9))
        images = compose.in_chunks(count, lambda calls=calls: np.full((3, 2, 2, 3), next(calls)))
        assert images[:, 0, 0, 0].tolist() == [0, 0, 0, 1][:count]
        assert next(calls) == drawn
