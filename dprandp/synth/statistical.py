"""``spectrum``, ``wmm`` and their combinations with ``color``: noise made to obey statistics of natural images.

Source: Baradad et al., "Learning to See by Looking at Noise", NeurIPS 2021, and its released code:

* **spectrum**: amplitude 1/(|f_x|^(s+d) + |f_y|^(s−d)) with s ~ U(.5, 3.5), d ~ N(0, .05); the same for the three
  channels, whose variances and phases stay as they are.
* **wmm** (wavelet-marginal model): every band of a steerable pyramid, the low-pass band excepted, gets the marginal
  density exp(−|x/4^z|^ρ) on [−200, 200], z the image's size over the band's, ρ ~ U(.4, .8) per band and channel.
* **color**: every channel gets the histogram of a component of the colour model. This is made of a reference image: 3
  to 22 uniform random colours in random proportions, as stripes, blurred by a random box, with a little noise.

From uniform noise in three channels the constraints are imposed in this order, ten times; then the channels are turned
from the basis of the colour model into RGB (always, with or without **color**) and scaled together to [0, 255].

Each constraint is met by a projection, the two on marginals by giving the k-th smallest value the k-th of the wanted
ones: after **color**, which comes last, it holds exactly, the others approximately.

*The steerable pyramid* has four orientations, as a tight frame in the frequency domain. Source: the polar-separable
filters of Simoncelli and Freeman (ICIP 1995) as Portilla and Simoncelli (IJCV 2000) use them: raised cosines of log₂
radius, one octave wide, times cos³ of the angle. With unitary Fourier transforms the bands carry exactly the energy of
the image, and synthesis is the adjoint of analysis.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from scipy import ndimage

from dprandp.synth.compose import in_chunks

COLOURS = (3, 22)
SMALLEST_PROPORTION = 0.001  # before the proportions are scaled to sum to one
LARGEST_BLUR = 10  # pixels of a 128-pixel image
NOISE = 10.0 / 256.0

CHUNK = 8  # images drawn together; part of the random stream: changing it changes every image
ITERATIONS = 10
SLOPE_RANGE = (0.5, 3.5)
ANISOTROPY = 0.05
SHAPE_RANGE = (0.4, 0.8)
LARGEST_COEFFICIENT = 200.0
_DENSITY_GRID = LARGEST_COEFFICIENT * np.linspace(0.0, 1.0, 601) ** 2


@dataclass(frozen=True)
class ColourModel:
    """The colours of B images, in units of 1/256 of a channel's range."""

    basis: np.ndarray  # float32 [B, 3, 3], orthonormal rows: the principal components, smallest variance first
    mean: np.ndarray  # float32 [B, 3]
    histogram: np.ndarray  # float32 [B, 3, R²], ascending: the values that the pixels take along each component

    def to_rgb(self, components: np.ndarray) -> np.ndarray:
        """Components float32 [B, 3, R, R] along the basis → RGB of the same shape."""
        return np.einsum("bkc,bkyx->bcyx", self.basis, components) + self.mean[:, :, None, None]


def draw_reference(random: np.random.Generator, resolution: int) -> np.ndarray:
    """One striped reference image: float64 [R, R, 3] from 0 to 256."""
    count = random.integers(*COLOURS, endpoint=True)
    proportions = SMALLEST_PROPORTION + random.random(count)
    pixels = random.multinomial(resolution**2, proportions / proportions.sum())
    image = np.repeat(random.random((count, 3)), pixels, axis=0).reshape(resolution, resolution, 3)
    box = max(1, round(random.integers(1, LARGEST_BLUR, endpoint=True) * resolution / 128))
    image = ndimage.uniform_filter(image, (box, box, 1), mode="nearest")
    image += NOISE * random.random(image.shape)
    image -= image.min()
    return image * (256.0 / image.max())


def draw_colour_model(random: np.random.Generator, count: int, resolution: int) -> ColourModel:
    """Draw the colours of `count` images."""
    pixels = np.stack([draw_reference(random, resolution).reshape(-1, 3) for _ in range(count)])
    mean = pixels.mean(axis=1)
    pixels -= mean[:, None]
    # einsum, not @: the sums of a threaded BLAS may depend on the number of threads, and the images must not
    _, vectors = np.linalg.eigh(np.einsum("bpc,bpd->bcd", pixels, pixels))
    histogram = np.sort(np.einsum("bpc,bck->bkp", pixels, vectors).astype(np.float32), axis=2)
    return ColourModel(vectors.transpose(0, 2, 1).astype(np.float32), mean.astype(np.float32), histogram)


@dataclass(frozen=True)
class Draws:
    """Everything random about B images; a constraint that a process does not have is None."""

    noise: torch.Tensor  # float32 [B, 3, R, R], U(0, 256): what the iteration starts from
    slope: np.ndarray | None  # float64 [B, 2], (s + d, s − d)
    shape: np.ndarray | None  # float64 [B, 3, 1 + 4·levels], ρ of every band: high-pass, then scale by scale
    colours: ColourModel  # the colour model
    imposes_colour: bool  # whether its histograms are imposed

def draw(
    random: np.random.Generator, count: int, resolution: int, *, spectrum: bool, wmm: bool, colour: bool
) -> Draws:
    """Draw `count` images of the process with the given constraints."""
    noise = 256.0 * random.random((count, 3, resolution, resolution), dtype=np.float32)
    slope = shape = None
    if spectrum:
        middle, difference = random.uniform(*SLOPE_RANGE, count), ANISOTROPY * random.standard_normal(count)
        slope = np.stack([middle + difference, middle - difference], axis=1)
    if wmm:
        bands = 1 + ORIENTATIONS * levels_for(resolution)
        shape = random.uniform(*SHAPE_RANGE, (count, 3, bands))
    colours = draw_colour_model(random, count, resolution)
    return Draws(torch.from_numpy(noise), slope, shape, colours, colour)


def amplitude(slope: np.ndarray, resolution: int) -> torch.Tensor:
    """1/(|f_x|^(s+d) + |f_y|^(s−d)), 0 at frequency 0: float32 [B, R, R/2+1] for slopes [B, 2]."""
    frequency_y, frequency_x = half_plane(resolution)
    slope_x, slope_y = torch.from_numpy(slope).T[:, :, None, None]
    denominator = frequency_x.abs() ** slope_x + frequency_y.abs() ** slope_y
    denominator[:, 0, 0] = torch.inf
    return (1.0 / denominator).float()


def _energy(squared: torch.Tensor) -> torch.Tensor:
    """Sum over the whole plane of a symmetric function given on the half plane, frequency 0 left out."""
    total = 2.0 * squared.sum(dim=(-2, -1)) - squared[..., 0].sum(dim=-1) - squared[..., -1].sum(dim=-1)
    return total - squared[..., 0, 0]


def impose_spectrum(spectrum: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """Give every channel, complex64 [B, 3, R, R/2+1], an amplitude spectrum, float32 [B, R, R/2+1], up to a factor that
    keeps its variance; phases and mean stay.
    """
    magnitude = spectrum.abs().clamp_(min=torch.finfo(torch.float32).tiny)
    gain = torch.sqrt(_energy(magnitude.square()) / _energy(wanted.double().square())[:, None]).float()
    result = spectrum * (wanted[:, None] * gain[:, :, None, None] / magnitude)
    result[..., 0, 0] = spectrum[..., 0, 0]
    return result


def band_quantiles(shape: np.ndarray, scale: int, count: int) -> np.ndarray:
    """Quantiles (k + ½)/n of the density exp(−|x/4^scale|^ρ) on [−200, 200], ascending: float32 [N, n].

    Args:
        shape: float64 [N], ρ. scale: z, the image's size over the band's. count: n, even.
    """
    density = np.exp(-((_DENSITY_GRID / 4.0**scale) ** shape[:, None]))
    mass = np.cumsum(0.5 * (density[:, 1:] + density[:, :-1]) * np.diff(_DENSITY_GRID), axis=1)
    half = np.empty((len(shape), count // 2), dtype=np.float32)
    probability = (np.arange(count // 2) + 0.5) * (2.0 / count)
    for row, cumulated in zip(half, mass, strict=True):
        row[:] = np.interp(probability * cumulated[-1], cumulated, _DENSITY_GRID[1:])
    return np.concatenate([-half[:, ::-1], half], axis=1)


def match_ranks(values: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """Replace the k-th smallest value of every row by the k-th of `wanted`.

    Value and position are packed into one integer and sorted together, several times faster than an argsort. Values are
    rounded to 2^18 steps of a row's range for it (2^40 in rows of more than 8192); equal ones go by position.

    Args:
        values: float32 [N, n], n a power of two. wanted: float32 [N, n], ascending rows.
    """
    rows = values.numpy()
    count = rows.shape[1]
    steps, kind = (2.0**18, np.int32) if count <= 8192 else (2.0**40, np.int64)
    low = rows.min(axis=1, keepdims=True)
    width = rows.max(axis=1, keepdims=True) - low
    width[width < 1e-30] = 1.0
    scaled = (rows - low) * ((steps - 1.0) / width).astype(np.float32 if kind is np.int32 else np.float64)
    keys = scaled.astype(kind)
    keys *= count
    keys += np.arange(count, dtype=kind)
    keys.sort(axis=1)
    order = np.empty(keys.shape, dtype=np.int64)
    np.bitwise_and(keys, count - 1, out=order)
    return torch.empty_like(values).scatter_(1, torch.from_numpy(order), wanted)


class _Marginals:
    """The wavelet-marginal constraint of a batch, its quantiles computed once."""

    def __init__(self, shape: np.ndarray, resolution: int) -> None:
        self.masks = filters(resolution, levels_for(resolution))
        sizes = [resolution, *(mask.shape[-2] for mask in self.masks.oriented)]
        splits = np.cumsum([1, *[ORIENTATIONS] * len(self.masks.oriented)])[:-1]
        self.quantiles = [
            torch.from_numpy(band_quantiles(part.ravel(), resolution // size, size**2))
            for part, size in zip(np.split(shape, splits, axis=2), sizes, strict=True)
        ]

    def impose(self, spectrum: torch.Tensor) -> torch.Tensor:
        bands = analyse(spectrum, self.masks)
        matched = [
            match_ranks(band.reshape(wanted.shape), wanted).view(band.shape)
            for band, wanted in zip(bands, self.quantiles, strict=True)
        ]
        return synthesise(matched, spectrum, self.masks)


def impose(draws: Draws) -> torch.Tensor:
    """Impose the constraints ten times, once where there is only one that holds for good: float32 [B, 3, R, R]."""
    resolution = draws.noise.shape[-1]
    wanted = None if draws.slope is None else amplitude(draws.slope, resolution)
    marginals = None if draws.shape is None else _Marginals(draws.shape, resolution)
    histogram = torch.from_numpy(draws.colours.histogram).reshape(-1, resolution**2)
    spectrum = torch.fft.rfft2(draws.noise, norm="ortho")
    channels = None
    for _ in range(ITERATIONS if marginals or draws.imposes_colour else 1):
        if wanted is not None:
            spectrum = impose_spectrum(spectrum, wanted)
        if marginals:
            spectrum = marginals.impose(spectrum)
        if draws.imposes_colour:
            channels = torch.fft.irfft2(spectrum, norm="ortho")
            channels = match_ranks(channels.reshape(histogram.shape), histogram).view(channels.shape)
            spectrum = torch.fft.rfft2(channels, norm="ortho")
    return torch.fft.irfft2(spectrum, norm="ortho") if channels is None else channels


def to_bytes(images: np.ndarray) -> np.ndarray:
    """Scale every image [B, 3, R, R] to the full range, its channels together: uint8 [B, R, R, 3]."""
    low = images.min(axis=(1, 2, 3), keepdims=True)
    width = np.maximum(images.max(axis=(1, 2, 3), keepdims=True) - low, np.finfo(np.float32).tiny)
    return np.rint((images - low) * (255.0 / width)).astype(np.uint8).transpose(0, 2, 3, 1)


def render(
    random: np.random.Generator, count: int, resolution: int, *, spectrum: bool, wmm: bool, colour: bool
) -> np.ndarray:
    """The ``Process`` with these constraints: independent images, of a power of two from 8 pixels on."""

    def chunk() -> np.ndarray:
        draws = draw(random, CHUNK, resolution, spectrum=spectrum, wmm=wmm, colour=colour)
        return to_bytes(draws.colours.to_rgb(impose(draws).numpy()))

    return in_chunks(count, chunk)


# ------------------------------------------------------------------------------------------------ the steerable pyramid

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
