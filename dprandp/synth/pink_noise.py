"""Pink-noise maps under a coarse Laplace envelope: the additive noise of the wavelet StyleGANs."""

from __future__ import annotations

import numpy as np
import torch
from torch.nn import functional

ENVELOPE_GRID = 4
EXPONENT_RANGE = (0.5, 1.5)


def pink_spectrum_noise(white: torch.Tensor, exponent: torch.Tensor) -> torch.Tensor:
    """Give every map the amplitude spectrum 1/r^α exactly, with the phases of white noise.

    The phases of real Gaussian white noise are independent, uniform and Hermitian, so taking them from a transform of
    white noise needs no special case for the frequencies that are their own conjugates.

    Args:
        white: float [B, R, R], independent N(0, 1).
        exponent: float [B], α.

    Returns:
        float [B, R, R] of mean zero; r is the distance from frequency 0 in cycles per image.
    """
    resolution = white.shape[-1]
    spectrum = torch.fft.rfft2(white)
    frequency_y = torch.fft.fftfreq(resolution, 1.0 / resolution, dtype=white.dtype)
    frequency_x = torch.fft.rfftfreq(resolution, 1.0 / resolution, dtype=white.dtype)
    radius = torch.hypot(frequency_y[:, None], frequency_x[None, :])
    log_radius = torch.log(radius.clamp(min=1.0))
    amplitude = torch.exp(-exponent[:, None, None] * log_radius)
    amplitude[:, 0, 0] = 0.0
    magnitude = spectrum.abs().clamp(min=torch.finfo(white.dtype).tiny)
    return torch.fft.irfft2(spectrum * (amplitude / magnitude), s=(resolution, resolution))


def lanczos_matrix(resolution: int, grid: int) -> torch.Tensor:
    """Lanczos-3 interpolation from `grid` samples to `resolution` pixels along an axis: float32 [resolution, grid].

    Pixel and sample centres lie at half-integers; weights that would fall outside the grid are left out and the others
    scaled to sum to one.
    """
    position = (torch.arange(resolution) + 0.5) * (grid / resolution) - 0.5
    distance = position[:, None] - torch.arange(grid)
    weights = torch.where(distance.abs() < 3.0, torch.sinc(distance) * torch.sinc(distance / 3.0), 0.0)
    return weights / weights.sum(dim=1, keepdim=True)


def enveloped_pink_noise(white: torch.Tensor, exponent: torch.Tensor, envelope: torch.Tensor) -> torch.Tensor:
    """Pink noise times its envelope, upsampled (Lanczos) to full size, divided by its standard deviation.

    Args:
        white: float [B, R, R], independent N(0, 1).
        exponent: float [B], α of the amplitude 1/r^α.
        envelope: float [B, 4, 4], independent Laplace(0, 1).

    Returns:
        float [B, R, R] with standard deviation 1 per map.
    """
    resolution = white.shape[-1]
    upsample = lanczos_matrix(resolution, envelope.shape[-1]).to(envelope.dtype)
    noise = pink_spectrum_noise(white, exponent) * (upsample @ envelope @ upsample.T)
    return noise / noise.std(dim=(1, 2), correction=0, keepdim=True)


def draw_pink_noise(random: np.random.Generator, count: int, resolution: int, envelope: bool = True) -> torch.Tensor:
    """Draw `count` maps of standard deviation 1, with or without the envelope: float32 [count, R, R]."""
    white = torch.from_numpy(random.standard_normal((count, resolution, resolution), dtype=np.float32))
    exponent = torch.from_numpy(random.uniform(*EXPONENT_RANGE, count).astype(np.float32))
    if envelope:
        grid = random.laplace(size=(count, ENVELOPE_GRID, ENVELOPE_GRID)).astype(np.float32)
        return enveloped_pink_noise(white, exponent, torch.from_numpy(grid))
    noise = pink_spectrum_noise(white, exponent)
    return noise / noise.std(dim=(1, 2), correction=0, keepdim=True)


def area_resize(maps: torch.Tensor, resolution: int) -> torch.Tensor:
    """Shrink maps [B, R, R] to [B, resolution, resolution] by averaging squares; `resolution` divides R."""
    factor = maps.shape[-1] // resolution
    return maps if factor == 1 else functional.avg_pool2d(maps[:, None], factor)[:, 0]
