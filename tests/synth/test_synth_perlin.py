"""perlin: the definition point by point, octaves."""

from __future__ import annotations

import numpy as np
import torch

from dprandp.synth import perlin


def slow_noise(gradients: np.ndarray, x: float, y: float) -> float:
    """Perlin noise at one point, x and y in cells."""
    cells = len(gradients)
    column, row = int(np.floor(x)), int(np.floor(y))
    t, u = x - column, y - row
    value = 0.0
    for dy in (0, 1):
        for dx in (0, 1):
            gradient = gradients[(row + dy) % cells, (column + dx) % cells]
            ramp = gradient[0] * (t - dx) + gradient[1] * (u - dy)
            weight = 1.0
            for place, corner in ((t, dx), (u, dy)):
                blend = 6 * place**5 - 15 * place**4 + 10 * place**3
                weight *= blend if corner else 1 - blend
            value += weight * ramp
    return value


def noise_at(gradients: torch.Tensor, positions: np.ndarray) -> np.ndarray:
    return perlin.gradient_noise(gradients, tuple(positions)).double().numpy()


def test_equals_the_definition() -> None:
    gradients = perlin.draw_gradients(np.random.default_rng(0), 2, 5)
    np.testing.assert_allclose(gradients.norm(dim=-1), 1.0, atol=1e-6)
    positions = np.random.default_rng(1).random(7)
    values = noise_at(gradients, positions)
    for image in range(2):
        for row, y in enumerate(positions):
            for column, x in enumerate(positions):
                wanted = slow_noise(gradients[image].numpy(), 5 * x, 5 * y)
                assert abs(values[image, row, column] - wanted) < 1e-5
    assert np.abs(values - values.transpose(0, 2, 1)).max() > 0.1  # control: x and y are not the same


def test_octaves_and_persistence_shape_the_spectrum() -> None:
    def high_share(fields: torch.Tensor) -> np.ndarray:
        energy = torch.fft.rfft2(fields).abs().square()
        energy[..., 0, 0] = 0.0
        low = energy[..., :6, :6].sum(dim=(-2, -1)) + energy[..., -5:, :6].sum(dim=(-2, -1))
        return (1.0 - low / energy.sum(dim=(-2, -1))).numpy()

    share = high_share(perlin.draw_fields(np.random.default_rng(0), 60, 64))
    assert share.min() < 0.05  # some images are a few blobs
    assert share.max() > 0.5  # some are fine-grained
    first = share[:, 0]
    assert np.corrcoef(first, share[:, 1])[0, 1] > 0.8  # the channels of an image share octaves


def test_images_are_contrasted_and_differ() -> None:
    many = perlin.render(np.random.default_rng(4), perlin.CHUNK, 32)
    assert np.median(many.std(axis=(1, 2))) > 25
    assert np.abs(np.corrcoef(many.reshape(len(many), -1)) - np.eye(len(many))).max() < 0.95
