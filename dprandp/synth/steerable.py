"""A steerable pyramid with four orientations, as a tight frame in the frequency domain.

Source: the polar-separable filters of Simoncelli and Freeman (ICIP 1995) as Portilla and Simoncelli (IJCV 2000) use
them: raised cosines of log₂ radius, one octave wide, times cos³ of the angle. With unitary Fourier transforms the bands
carry exactly the energy of the image, and synthesis is the adjoint of analysis.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import torch

ORIENTATIONS = 4
_ANGULAR_GAIN = math.sqrt(4.0 / 5.0)  # Σ_k cos⁶(θ − kπ/4) = 5/4


def levels_for(resolution: int) -> int:
    """Scales of the pyramid: 4 from 256 px on and 3 below, as published; fewer where a band would be 2 px wide."""
    return min(4 if resolution >= 256 else 3, round(math.log2(resolution)) - 1)


@dataclass(frozen=True)
class Filters:
    """Real masks on the half plane of :func:`torch.fft.rfft2`."""

    high: torch.Tensor  # float32 [R, R/2+1], the high-pass residual
    oriented: list[torch.Tensor]  # float32 [4, r, r/2+1] for r = R, R/2, …; the filter is i times it
    low_energy: torch.Tensor  # float32 [R, R/2+1], squared low-pass mask: what the bands leave out


def half_plane(resolution: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Frequencies (f_y [R, 1], f_x [1, R/2+1]) of :func:`torch.fft.rfft2`, in cycles per pixel, float64."""
    frequency_y = torch.fft.fftfreq(resolution, dtype=torch.float64)
    frequency_x = torch.fft.rfftfreq(resolution, dtype=torch.float64)
    return frequency_y[:, None], frequency_x[None, :]


def _high_pass(radius: torch.Tensor, cutoff: float) -> torch.Tensor:
    """1 from `cutoff` on, 0 up to half of it, a quarter of a cosine in log₂ between."""
    octave = torch.log2((radius / cutoff).clamp(0.5, 1.0))
    return torch.cos(0.5 * math.pi * octave)


@lru_cache(maxsize=8)
def filters(resolution: int, levels: int) -> Filters:
    """The masks of an R×R image with `levels` scales."""
    frequency_y, frequency_x = half_plane(resolution)
    radius = torch.hypot(frequency_y, frequency_x).clamp(min=1e-9)
    angle = torch.atan2(frequency_y, frequency_x)
    cutoff = 0.5
    high = _high_pass(radius, cutoff)
    low_energy = 1.0 - high.square()
    oriented = []
    for level in range(levels):
        cutoff /= 2.0
        band = _high_pass(radius, cutoff)
        gain = (low_energy.sqrt() * band * _ANGULAR_GAIN)[None]
        turn = torch.arange(ORIENTATIONS)[:, None, None] * (math.pi / ORIENTATIONS)
        oriented.append(crop(gain * torch.cos(angle - turn) ** 3, resolution >> level).float().contiguous())
        low_energy = low_energy * (1.0 - band.square())
    return Filters(high.float(), oriented, low_energy.float())


def crop(spectrum: torch.Tensor, size: int) -> torch.Tensor:
    """The lowest frequencies [..., r, r/2+1] of a half plane [..., R, R/2+1]."""
    if size == spectrum.shape[-2]:
        return spectrum
    columns = spectrum[..., : size // 2 + 1]
    return torch.cat([columns[..., : size // 2, :], columns[..., -(size // 2) :, :]], dim=-2)


def _add_cropped(spectrum: torch.Tensor, part: torch.Tensor) -> None:
    half = part.shape[-2] // 2
    spectrum[..., :half, : half + 1] += part[..., :half, :]
    spectrum[..., -half:, : half + 1] += part[..., half:, :]


def analyse(spectrum: torch.Tensor, masks: Filters) -> list[torch.Tensor]:
    """The bands of images that are given by their unitary transforms.

    Args:
        spectrum: complex64 [..., R, R/2+1], ``torch.fft.rfft2(images, norm="ortho")``.

    Returns:
        the high-pass residual float32 [..., R, R], then per scale [..., 4, r, r]. The low-pass band is left out.
    """
    bands = [torch.fft.irfft2(spectrum * masks.high, norm="ortho")]
    for mask in masks.oriented:
        part = crop(spectrum, mask.shape[-2])[..., None, :, :]
        bands.append(torch.fft.irfft2(1j * (part * mask), norm="ortho"))
    return bands


def synthesise(bands: list[torch.Tensor], spectrum: torch.Tensor, masks: Filters) -> torch.Tensor:
    """The adjoint of :func:`analyse`: bands as it returned them give back the spectrum, complex64 [..., R, R/2+1].

    The low-pass band is taken from ``spectrum``.
    """
    result = spectrum * masks.low_energy
    result += torch.fft.rfft2(bands[0], norm="ortho") * masks.high
    for band, mask in zip(bands[1:], masks.oriented, strict=True):
        part = (torch.fft.rfft2(band, norm="ortho") * mask).sum(dim=-3)
        _add_cropped(result, -1j * part)
    return result
