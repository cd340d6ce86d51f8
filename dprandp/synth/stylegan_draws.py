"""All random choices of the wavelet StyleGANs: the networks and the per-image draws, without rendering.

The renderer (``stylegan.py``) and the dense oracle of the tests read the same draws. Source: Baradad et al.,
"Learning to See by Looking at Noise", NeurIPS 2021; the architecture is StyleGAN2's (Karras et al., CVPR 2020).

==========================  ====================  =============================================  =============
process                     wavelets              noise                                          bias
==========================  ====================  =============================================  =============
``stylegan-oriented``       5 to 40 of the forty  one map for all layers, under an envelope      U(−.2, .2)
``stylegan-highfreq``       all forty signs       pink noise, a map of its own for every layer   0
``stylegan-sparse``         all forty signs       the same under an envelope                     U(0, .2)
==========================  ====================  =============================================  =============

(The released code of the last two keeps 100 noise maps per layer and network and picks one per image; here every image
has its own, which has the same law.)
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

ORIENTATIONS = 8
ANGLE_STEP = np.pi / ORIENTATIONS  # 22.5°


def _edges_and_lines() -> tuple[np.ndarray, np.ndarray]:
    """The eight edges and the eight lines, float64 [8, 3, 3] each, before their means are taken off."""
    offset_y, offset_x = np.meshgrid([-1.0, 0.0, 1.0], [-1.0, 0.0, 1.0], indexing="ij")
    edges, lines = [], []
    for orientation in range(ORIENTATIONS):
        angle = orientation * ANGLE_STEP
        distance = offset_x * np.cos(angle) + offset_y * np.sin(angle)
        edges.append(-np.clip(distance, -1.0, 1.0))
        lines.append(1.0 - 2.0 * np.clip(1.0 - np.abs(distance), 0.0, None))
    return np.stack(edges), np.stack(lines)


def _unoriented() -> np.ndarray:
    """Delta, centre against the rest, plus, signed plus: float64 [4, 3, 3]."""
    delta = np.zeros((3, 3))
    delta[1, 1] = 1.0
    plus = np.ones((3, 3))
    plus[::2, ::2] = 0.0
    return np.stack([delta, 2.0 * delta - 1.0, plus, np.sign(plus - 0.5)])


def base_wavelets() -> np.ndarray:
    """The twenty wavelets before negation, float64 [20, 3, 3]: 8 edges, 8 lines (zero mean), ``_unoriented``."""
    oriented = np.concatenate(_edges_and_lines())
    oriented -= oriented.mean(axis=(1, 2), keepdims=True)
    return np.concatenate([oriented, _unoriented()])


def wavelets() -> np.ndarray:
    """All forty, float64 [40, 3, 3]: the twenty of :func:`base_wavelets`, then their negatives in the same order."""
    base = base_wavelets()
    return np.concatenate([base, -base])


def sign_wavelets() -> np.ndarray:
    """The forty of *highfreq* and *sparse*: every value replaced by its sign, float64 [40, 3, 3] of −1, 0 and 1.

    An edge keeps the mean zero (a pixel on the edge itself is 0); a line is quantised before its mean is taken off, so
    that it has −1 on the line and +1 beside it.
    """
    edges, lines = _edges_and_lines()
    base = np.concatenate([np.sign(np.round(edges, 9)), np.sign(lines), _unoriented()])
    return np.concatenate([base, -base])


LATENT = 512
MAX_CHANNELS = 512
START_RESOLUTION = 4
WAVELETS = len(wavelets())
WAVELETS_PER_LAYER = (5, 40)
NOISE_SCALE_MAX = 0.3
ENVELOPE_GRID = 4
EXPONENT_RANGE = (0.5, 1.5)
LEAKY_SLOPE = 0.2
COLOUR_MEAN = ((0.483, 0.145), (0.455, 0.142), (0.401, 0.161))  # (mean, std) of the normal, per channel R, G, B
COLOUR_STD = ((0.219, 0.063), (0.213, 0.062), (0.213, 0.069))


@dataclass(frozen=True)
class Variant:
    """The differences between the processes."""

    bank: np.ndarray  # float64 [40, 3, 3], the filters
    chooses: bool  # whether every image and layer draws its own 5 to 40 of them first
    one_noise_map: bool  # whether all layers of an image share one noise map
    envelope: bool  # whether noise maps lie under a Laplace envelope
    bias: tuple[float, float]  # lowest and highest bias, uniform in between


ORIENTED = Variant(wavelets(), chooses=True, one_noise_map=True, envelope=True, bias=(-0.2, 0.2))
HIGHFREQ = Variant(sign_wavelets(), chooses=False, one_noise_map=False, envelope=False, bias=(0.0, 0.0))
SPARSE = Variant(sign_wavelets(), chooses=False, one_noise_map=False, envelope=True, bias=(0.0, 0.2))


@dataclass(frozen=True)
class LayerShape:
    """One 3×3 convolution: output `resolution`, whether it upsamples ×2 first, whether an RGB layer reads it."""

    resolution: int
    in_channels: int
    out_channels: int
    upsamples: bool
    feeds_rgb: bool


def channels_at(resolution: int) -> int:
    """min(32768 / resolution, 512) feature channels."""
    return min(32768 // resolution, MAX_CHANNELS)


def layer_shapes(resolution: int) -> list[LayerShape]:
    """The convolutions of a network that renders `resolution`: one at 4×4, then two per doubling."""
    channels = channels_at(START_RESOLUTION)
    shapes = [LayerShape(START_RESOLUTION, channels, channels, upsamples=False, feeds_rgb=True)]
    size = 2 * START_RESOLUTION
    while size <= resolution:
        channels, previous = channels_at(size), channels
        shapes.append(LayerShape(size, previous, channels, upsamples=True, feeds_rgb=False))
        shapes.append(LayerShape(size, channels, channels, upsamples=False, feeds_rgb=True))
        size *= 2
    return shapes


@dataclass(frozen=True)
class Network:
    """The common parameters of the images of one block."""

    shapes: list[LayerShape]  # the convolutions, first to last
    constant: torch.Tensor  # float32 [512, 4, 4], the input of the first one, N(0, 1)
    conv_affines: list[torch.Tensor]  # per convolution float32 [in_channels, 512], N(0, 1)/√512: style = affine · w + 1
    rgb_affines: list[torch.Tensor]  # the same per RGB layer, [channels, 512]
    variant: Variant = ORIENTED  # of the process


@dataclass(frozen=True)
class ConvDraws:
    """One convolution of a batch of B images."""

    style: torch.Tensor  # float32 [B, in_channels]
    wavelet: torch.Tensor  # int64 [B, in_channels], which of the forty wavelets every input channel gets
    negative: torch.Tensor  # bool [B, out_channels], the sign of s_o; demodulation removes |s_o|, so it is never drawn
    bias: torch.Tensor  # float32 [B, out_channels]
    noise_scale: torch.Tensor  # float32 [B], U(0, .3)
    noise: torch.Tensor | None = None  # float32 [B, r, r], of this layer; None where those of an image share one


@dataclass(frozen=True)
class ImageDraws:
    """All draws of a batch of B images."""

    convs: list[ConvDraws]  # one entry per convolution
    rgb: list[torch.Tensor]  # per RGB layer float32 [B, channels, 3], weights, modulated and over √channels
    noise: torch.Tensor | None  # float32 [B, R, R], of standard deviation 1; None where layers have their own
    colour_mean: torch.Tensor  # float32 [B, 3]
    colour_std: torch.Tensor  # float32 [B, 3]


def normal(random: np.random.Generator, *shape: int) -> torch.Tensor:
    """Independent N(0, 1), float32 of this shape."""
    return torch.from_numpy(random.standard_normal(shape, dtype=np.float32))


def pink_spectrum_noise(white: torch.Tensor, exponent: torch.Tensor) -> torch.Tensor:
    """Give every map the amplitude spectrum 1/r^α exactly, with the phases of white noise.

    Args:
        white: float [B, R, R], independent N(0, 1). exponent: float [B], α.

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

    Centres lie at half-integers; weights outside the grid are left out and the others scaled to sum to one.
    """
    position = (torch.arange(resolution) + 0.5) * (grid / resolution) - 0.5
    distance = position[:, None] - torch.arange(grid)
    weights = torch.where(distance.abs() < 3.0, torch.sinc(distance) * torch.sinc(distance / 3.0), 0.0)
    return weights / weights.sum(dim=1, keepdim=True)


def enveloped_pink_noise(white: torch.Tensor, exponent: torch.Tensor, envelope: torch.Tensor) -> torch.Tensor:
    """Pink noise [B, R, R] times its envelope [B, 4, 4], which is upsampled (Lanczos), of standard deviation 1."""
    upsample = lanczos_matrix(white.shape[-1], envelope.shape[-1]).to(envelope.dtype)
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


def draw_network(random: np.random.Generator, resolution: int, variant: Variant = ORIENTED) -> Network:
    """Draw the constant input and the style affines that the images of one block share."""
    shapes = layer_shapes(resolution)
    constant = normal(random, shapes[0].in_channels, START_RESOLUTION, START_RESOLUTION)
    conv_affines = [normal(random, shape.in_channels, LATENT) / LATENT**0.5 for shape in shapes]
    rgb_affines = [normal(random, shape.out_channels, LATENT) / LATENT**0.5 for shape in shapes if shape.feeds_rgb]
    return Network(shapes, constant, conv_affines, rgb_affines, variant)


def style_of(latent: torch.Tensor, affine: torch.Tensor) -> torch.Tensor:
    """Styles [B, channels] from latents [B, 512] and an affine map [channels, 512]."""
    return latent @ affine.T + 1.0


def draw_wavelet_choice(random: np.random.Generator, count: int, channels: int) -> np.ndarray:
    """Per image draw n ~ U{5…40} different wavelets, then one of those n for every channel: int64 [count, channels]."""
    low, high = WAVELETS_PER_LAYER
    kept = random.integers(low, high, size=(count, 1), endpoint=True)
    shuffled = random.permuted(np.tile(np.arange(WAVELETS), (count, 1)), axis=1)
    return np.take_along_axis(shuffled, random.integers(0, kept, size=(count, channels)), axis=1)


def _draw_conv(random: np.random.Generator, shape: LayerShape, style: torch.Tensor, variant: Variant) -> ConvDraws:
    count, size = len(style), shape.resolution
    out = (count, shape.out_channels)
    if variant.chooses:
        choice = draw_wavelet_choice(random, count, shape.in_channels)
    else:
        choice = random.integers(0, WAVELETS, size=(count, shape.in_channels))
    middle, spread = (sum(variant.bias) / 2.0, (variant.bias[1] - variant.bias[0]) / 2.0)
    negative = random.integers(0, 2, size=out, dtype=bool)
    bias = np.float32(middle) + (random.random(out, dtype=np.float32) * 2.0 - 1.0) * np.float32(spread)
    noise_scale = random.random(count, dtype=np.float32) * np.float32(NOISE_SCALE_MAX)
    return ConvDraws(
        style=style,
        wavelet=torch.from_numpy(choice),
        negative=torch.from_numpy(negative),
        bias=torch.from_numpy(bias),
        noise_scale=torch.from_numpy(noise_scale),
        noise=None if variant.one_noise_map else draw_pink_noise(random, count, size, variant.envelope),
    )


def _draw_rgb(random: np.random.Generator, style: torch.Tensor) -> torch.Tensor:
    count, channels = style.shape
    return normal(random, count, channels, 3) * (style / channels**0.5)[:, :, None]


def draw_colour(random: np.random.Generator, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw the mean and the standard deviation of every channel: float32 [count, 3] each."""
    laws = (torch.tensor(law, dtype=torch.float32).T for law in (COLOUR_MEAN, COLOUR_STD))
    mean, std = (centre + spread * normal(random, count, 3) for centre, spread in laws)
    return mean, std


def draw_images(random: np.random.Generator, network: Network, count: int) -> ImageDraws:
    """Draw `count` images of one network.

    As in StyleGAN2 every convolution has a latent w of its own, and an RGB layer shares that of the next convolution.
    """
    rgb_affines = iter(network.rgb_affines)
    latents = torch.nn.functional.leaky_relu(normal(random, len(network.shapes) + 1, count, LATENT), LEAKY_SLOPE)
    convs, rgb = [], []
    for index, (shape, affine) in enumerate(zip(network.shapes, network.conv_affines, strict=True)):
        convs.append(_draw_conv(random, shape, style_of(latents[index], affine), network.variant))
        if shape.feeds_rgb:
            rgb.append(_draw_rgb(random, style_of(latents[index + 1], next(rgb_affines))))
    one_noise_map = network.variant.one_noise_map
    noise = draw_pink_noise(random, count, network.shapes[-1].resolution) if one_noise_map else None
    return ImageDraws(convs, rgb, noise, *draw_colour(random, count))
