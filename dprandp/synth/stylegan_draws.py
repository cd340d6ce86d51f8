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

from dprandp.synth.pink_noise import draw_pink_noise

# ------------------------------------------------------------------------------------------------------------ wavelets
#
# The forty 3×3 wavelets that the StyleGAN processes use as filters, as they are and quantised to their signs.
#
# Source: Baradad et al., "Learning to See by Looking at Noise", NeurIPS 2021 (the *oriented* StyleGAN process;
# *highfreq* and *sparse* use the signs).

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
    """The twenty wavelets before negation.

    An 11×11 step (+1 left of the middle column, 0 in it, −1 right of it) or line (ones, middle column −1), rotated
    with bilinear interpolation and cut to its centre 3×3, depends on one coordinate only: the signed distance from
    the rotated middle column. Interpolated between pixels it is a ramp resp. a tent of that distance, which is what
    is evaluated here.

    Returns:
        float64 [20, 3, 3]: 8 edges and 8 lines (each zero mean), delta, centre against the rest, plus, signed plus.
    """
    oriented = np.concatenate(_edges_and_lines())
    oriented -= oriented.mean(axis=(1, 2), keepdims=True)
    return np.concatenate([oriented, _unoriented()])


def wavelets() -> np.ndarray:
    """All forty: the twenty of :func:`base_wavelets`, then their negatives in the same order.

    Returns:
        float64 [40, 3, 3].
    """
    base = base_wavelets()
    return np.concatenate([base, -base])


def sign_wavelets() -> np.ndarray:
    """The forty of *highfreq* and *sparse*: every value replaced by its sign.

    An edge keeps the mean zero (a pixel on the edge itself is 0); a line is quantised before its mean is taken off, so
    that it has −1 on the line and +1 beside it.

    Returns:
        float64 [40, 3, 3] of −1, 0 and 1, in the order of :func:`wavelets`.
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
LEAKY_SLOPE = 0.2
COLOUR_MEAN = ((0.483, 0.145), (0.455, 0.142), (0.401, 0.161))  # (mean, std) of the normal, per channel R, G, B
COLOUR_STD = ((0.219, 0.063), (0.213, 0.062), (0.213, 0.069))


@dataclass(frozen=True)
class Variant:
    """The differences between the processes.

    Attributes:
        bank: float64 [40, 3, 3], the filters.
        chooses: whether every image and layer draws its own 5 to 40 of them first.
        one_noise_map: whether all layers of an image share one noise map.
        envelope: whether noise maps lie under a Laplace envelope.
        bias: lowest and highest bias, uniform in between.
    """

    bank: np.ndarray
    chooses: bool
    one_noise_map: bool
    envelope: bool
    bias: tuple[float, float]


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
    """The common parameters of the images of one block.

    Attributes:
        shapes: the convolutions, first to last.
        constant: float32 [512, 4, 4], the input of the first one, N(0, 1).
        conv_affines: per convolution float32 [in_channels, 512], N(0, 1)/√512: style = affine · w + 1.
        rgb_affines: the same per RGB layer, [channels, 512].
        variant: of the process.
    """

    shapes: list[LayerShape]
    constant: torch.Tensor
    conv_affines: list[torch.Tensor]
    rgb_affines: list[torch.Tensor]
    variant: Variant = ORIENTED


@dataclass(frozen=True)
class ConvDraws:
    """One convolution of a batch of B images.

    Attributes:
        style: float32 [B, in_channels].
        wavelet: int64 [B, in_channels], which of the forty wavelets every input channel gets.
        negative: bool [B, out_channels], the sign of s_o; demodulation removes |s_o|, so it is never drawn.
        bias: float32 [B, out_channels].
        noise_scale: float32 [B], U(0, .3).
        noise: float32 [B, r, r], the noise map of this layer; None where the layers of an image share one.
    """

    style: torch.Tensor
    wavelet: torch.Tensor
    negative: torch.Tensor
    bias: torch.Tensor
    noise_scale: torch.Tensor
    noise: torch.Tensor | None = None


@dataclass(frozen=True)
class ImageDraws:
    """All draws of a batch of B images.

    Attributes:
        convs: one entry per convolution.
        rgb: per RGB layer float32 [B, channels, 3], weights that are already modulated and divided by √channels.
        noise: float32 [B, R, R], pink noise of standard deviation 1; None where every layer has its own.
        colour_mean, colour_std: float32 [B, 3].
    """

    convs: list[ConvDraws]
    rgb: list[torch.Tensor]
    noise: torch.Tensor | None
    colour_mean: torch.Tensor
    colour_std: torch.Tensor


def _normal(random: np.random.Generator, *shape: int) -> torch.Tensor:
    return torch.from_numpy(random.standard_normal(shape, dtype=np.float32))


def draw_network(random: np.random.Generator, resolution: int, variant: Variant = ORIENTED) -> Network:
    """Draw the constant input and the style affines that the images of one block share."""
    shapes = layer_shapes(resolution)
    constant = _normal(random, shapes[0].in_channels, START_RESOLUTION, START_RESOLUTION)
    conv_affines = [_normal(random, shape.in_channels, LATENT) / LATENT**0.5 for shape in shapes]
    rgb_affines = [_normal(random, shape.out_channels, LATENT) / LATENT**0.5 for shape in shapes if shape.feeds_rgb]
    return Network(shapes, constant, conv_affines, rgb_affines, variant)


def _style(latent: torch.Tensor, affine: torch.Tensor) -> torch.Tensor:
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
    return _normal(random, count, channels, 3) * (style / channels**0.5)[:, :, None]


def _draw_law(random: np.random.Generator, count: int, law: tuple[tuple[float, float], ...]) -> torch.Tensor:
    centre, spread = torch.tensor(law, dtype=torch.float32).T
    return centre + spread * _normal(random, count, 3)


def draw_colour(random: np.random.Generator, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw the mean and the standard deviation of every channel: float32 [count, 3] each."""
    return _draw_law(random, count, COLOUR_MEAN), _draw_law(random, count, COLOUR_STD)


def draw_images(random: np.random.Generator, network: Network, count: int) -> ImageDraws:
    """Draw `count` images of one network.

    As in StyleGAN2 every convolution has a latent w of its own, and an RGB layer shares that of the next convolution.
    """
    rgb_affines = iter(network.rgb_affines)
    latents = torch.nn.functional.leaky_relu(_normal(random, len(network.shapes) + 1, count, LATENT), LEAKY_SLOPE)
    convs, rgb = [], []
    for index, (shape, affine) in enumerate(zip(network.shapes, network.conv_affines, strict=True)):
        convs.append(_draw_conv(random, shape, _style(latents[index], affine), network.variant))
        if shape.feeds_rgb:
            rgb.append(_draw_rgb(random, _style(latents[index + 1], next(rgb_affines))))
    one_noise_map = network.variant.one_noise_map
    noise = draw_pink_noise(random, count, network.shapes[-1].resolution) if one_noise_map else None
    return ImageDraws(convs, rgb, noise, *draw_colour(random, count))
