"""The steerable pyramid: a tight frame whose bands see one scale and one orientation each."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from dprandp.synth import statistical

RESOLUTION, LEVELS = 32, 2


def transform(images: np.ndarray) -> torch.Tensor:
    return torch.fft.rfft2(torch.from_numpy(images.astype(np.float32)), norm="ortho")


def noise(count: int) -> np.ndarray:
    return np.random.default_rng(0).standard_normal((count, RESOLUTION, RESOLUTION))


def slow_band(image: np.ndarray, level: int, orientation: int) -> np.ndarray:
    """One oriented band on the whole plane, frequency by frequency from the definition."""
    size = RESOLUTION >> level
    spectrum = np.fft.fft2(image, norm="ortho")
    small = np.zeros((size, size), dtype=complex)

    def high(radius: float, cutoff: float) -> float:
        return np.cos(0.5 * np.pi * np.log2(np.clip(radius / cutoff, 0.5, 1.0)))

    for row in range(-size // 2, size // 2):
        for column in range(-size // 2, size // 2):
            radius, angle = np.hypot(row, column) / RESOLUTION, np.arctan2(row, column)
            if radius == 0.0:
                continue
            gain = np.sqrt(1.0 - high(radius, 0.5) ** 2)
            for outer in range(level):
                gain *= np.sqrt(1.0 - high(radius, 0.25 / 2**outer) ** 2)
            gain *= high(radius, 0.25 / 2**level) * np.sqrt(0.8) * np.cos(angle - orientation * np.pi / 4) ** 3
            small[row, column] = 1j * gain * spectrum[row, column]
    band = np.fft.ifft2(small, norm="ortho")
    assert np.abs(band.imag).max() < 1e-12  # the band is real
    return band.real


def test_bands_equal_the_definition() -> None:
    image = noise(1)
    bands = statistical.analyse(transform(image), statistical.filters(RESOLUTION, LEVELS))
    assert [tuple(band.shape) for band in bands] == [(1, 32, 32), (1, 4, 32, 32), (1, 4, 16, 16)]
    for level in range(LEVELS):
        for orientation in range(4):
            wanted = slow_band(image[0], level, orientation)
            np.testing.assert_allclose(bands[1 + level][0, orientation], wanted, atol=2e-5)


@pytest.mark.parametrize("resolution", [8, 16, 64, 256])
def test_tight_frame(resolution: int) -> None:
    levels = statistical.levels_for(resolution)
    assert levels == {8: 2, 16: 3, 64: 3, 256: 4}[resolution]
    masks = statistical.filters(resolution, levels)
    image = np.random.default_rng(1).standard_normal((2, resolution, resolution))
    spectrum = transform(image)
    bands = statistical.analyse(spectrum, masks)
    low = torch.fft.irfft2(spectrum * masks.low_energy.sqrt(), norm="ortho")
    energy = sum(float(band.double().square().sum()) for band in [*bands, low])
    assert energy == pytest.approx(float((image**2).sum()), rel=1e-5)
    torch.testing.assert_close(statistical.synthesise(bands, spectrum, masks), spectrum, atol=1e-5, rtol=0)
    changed = [band * 1.1 for band in bands]  # control
    assert (statistical.synthesise(changed, spectrum, masks) - spectrum).abs().max() > 0.1
