"""Pink noise: its amplitude spectrum, its phases, its envelope."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from dprandp.synth.stylegan import (
    area_resize,
    draw_pink_noise,
    enveloped_pink_noise,
    lanczos_matrix,
    pink_spectrum_noise,
)

RESOLUTION = 32


def white_noise(count: int) -> torch.Tensor:
    random = np.random.default_rng(3)
    return torch.from_numpy(random.standard_normal((count, RESOLUTION, RESOLUTION)))


def amplitude_slope(image: np.ndarray) -> float:
    """Least-squares slope of log |F| against log r over every frequency but 0."""
    frequency = np.fft.fftfreq(RESOLUTION) * RESOLUTION
    radius = np.hypot(frequency[:, None], frequency[None, :]).ravel()[1:]
    amplitude = np.abs(np.fft.fft2(image)).ravel()[1:]
    return np.polyfit(np.log(radius), np.log(amplitude), 1)[0]


@pytest.mark.parametrize("exponent", [0.5, 1.0, 1.5])
def test_slope_is_minus_the_exponent(exponent: float) -> None:
    white = white_noise(3)
    pink = pink_spectrum_noise(white, torch.full((3,), exponent, dtype=torch.float64)).numpy()
    for before, after in zip(white.numpy(), pink, strict=True):
        assert amplitude_slope(after) == pytest.approx(-exponent, abs=1e-6)
        assert abs(amplitude_slope(before)) < 0.2  # control: the measure finds no slope in white noise
        assert after.mean() == pytest.approx(0.0, abs=1e-12)


def test_envelope_equals_pillow_lanczos() -> None:
    grid = np.random.default_rng(0).laplace(size=(4, 4)).astype(np.float32)
    matrix = lanczos_matrix(RESOLUTION, 4).numpy()
    wanted = np.asarray(Image.fromarray(grid).resize((RESOLUTION, RESOLUTION), Image.Resampling.LANCZOS))
    np.testing.assert_allclose(matrix @ grid @ matrix.T, wanted, atol=1e-4)
    other = np.asarray(Image.fromarray(grid).resize((RESOLUTION, RESOLUTION), Image.Resampling.BICUBIC))
    assert np.abs(wanted - other).max() > 0.02  # control


def test_envelope_multiplies_the_noise_of_drawn_maps_of_unit_deviation() -> None:
    white, exponent = white_noise(1), torch.ones(1, dtype=torch.float64)
    envelope = torch.zeros(1, 4, 4, dtype=torch.float64)
    envelope[0, 0, 0] = 1.0
    noise = enveloped_pink_noise(white, exponent, envelope)[0].numpy()
    assert np.std(noise[:8, :8]) > 20 * np.std(noise[-8:, -8:])
    unevenness = []
    for enveloped in (True, False):
        maps = draw_pink_noise(np.random.default_rng(0), 200, RESOLUTION, enveloped).numpy()
        assert maps.dtype == np.float32
        np.testing.assert_allclose(maps.std(axis=(1, 2)), 1.0, atol=1e-4)
        assert np.abs(np.corrcoef(maps.reshape(200, -1)) - np.eye(200)).max() < 0.95
        energy = (maps**2).reshape(200, 2, 16, 2, 16).mean(axis=(2, 4)).reshape(200, 4)
        unevenness.append(float(np.median(energy.std(axis=1) / energy.mean(axis=1))))
    assert unevenness[0] > 1.5 * unevenness[1]


def test_area_resize_averages_squares() -> None:
    maps = white_noise(2)
    small = area_resize(maps, 8).numpy()
    wanted = maps.numpy().reshape(2, 8, 4, 8, 4).mean(axis=(2, 4))
    np.testing.assert_allclose(small, wanted, atol=1e-12)
    assert area_resize(maps, RESOLUTION) is maps
