"""``stylegan-oriented``, ``stylegan-highfreq``, ``stylegan-sparse``: untrained StyleGAN2 networks with wavelet filters.

Source: Baradad et al., "Learning to See by Looking at Noise", NeurIPS 2021; skip architecture, filter [1, 3, 3, 1] and
demodulation as in StyleGAN2 (Karras et al., CVPR 2020). The three differ in their draws alone:

==========================  ====================  =============================================  =============
process                     wavelets              noise                                          bias
==========================  ====================  =============================================  =============
``stylegan-oriented``       5 to 40 of the forty  one map for all layers, under an envelope      U(−.2, .2)
``stylegan-highfreq``       all forty signs       pink noise, a map of its own for every layer   0
``stylegan-sparse``         all forty signs       the same under an envelope                     U(0, .2)
==========================  ====================  =============================================  =============

(The released code of the last two keeps 100 noise maps per layer and network and picks one per image; here every image
has its own, which has the same law.)

**Why no weight is ever formed.** The weight of a convolution is W[o, i] = s_o · wavelet(i): it depends on the output
channel only through a scalar, and demodulation divides by |s_o|. Every output channel of a layer is therefore
±S + noise + bias_o with one common map

    S = Σ_i style_i · wavelet(i) ∗ x_i / √(Σ_i style_i² |wavelet(i)|²),

and its activation is x_o = √2·ReLU(v + bias_o) or √2·ReLU(u + bias_o), with v = S + noise and u = −S + noise. All that
a later layer needs of the x_o are weighted sums over o: nine per convolution (one per tap of the 3×3 filter, the weight
of channel i being style_i · wavelet(i)[tap]) and three per RGB layer. A weighted sum of shifted ReLUs of one variable
is piecewise linear: with the biases sorted, cumulative sums of weight and weight·bias give slope and intercept between
any two neighbouring breakpoints (:func:`activation_sums`). It is exact, and avoids the 512×512 filters altogether.

**Order of the upsampling.** As in StyleGAN2: transposed convolution of stride 2 (H → 2H+1), then the FIR filter
[1, 3, 3, 1]/4 along both axes (→ 2H), then noise, bias and ReLU. The plain layers correlate, zero padded.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch.nn import functional

from dprandp.synth.compose import in_chunks

CHUNK = 20  # images drawn and rendered together; part of the random stream: changing it changes every image
GAIN = math.sqrt(2.0)

# ---------------------------------------------------------------------------------------------------------------- draws

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
    """Maps [B, R, R] of mean zero with the amplitude spectrum 1/r^α exactly and the phases of white noise, N(0, 1).

    α is the exponent, float [B]; r is the distance from frequency 0 in cycles per image.
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
    latents = functional.leaky_relu(normal(random, len(network.shapes) + 1, count, LATENT), LEAKY_SLOPE)
    convs, rgb = [], []
    for index, (shape, affine) in enumerate(zip(network.shapes, network.conv_affines, strict=True)):
        convs.append(_draw_conv(random, shape, style_of(latents[index], affine), network.variant))
        if shape.feeds_rgb:
            rgb.append(_draw_rgb(random, style_of(latents[index + 1], next(rgb_affines))))
    one_noise_map = network.variant.one_noise_map
    noise = draw_pink_noise(random, count, network.shapes[-1].resolution) if one_noise_map else None
    return ImageDraws(convs, rgb, noise, *draw_colour(random, count))


# ------------------------------------------------------------------------------------------------------------ rendering


def tap_weights(draws: ConvDraws, variant: Variant, upsamples: bool) -> torch.Tensor:
    """Modulated, demodulated weights of the input channels in each of the nine tap maps: float32 [B, in_channels, 9].

    Tap t is what :func:`combine_taps` adds at offset (t // 3, t % 3); a correlation is a scatter with the taps
    reversed.
    """
    bank = torch.from_numpy(variant.bank).flatten(1)
    taps = (bank if upsamples else bank.flip(1)).to(draws.style.dtype)
    weights = taps[draws.wavelet] * draws.style[:, :, None]
    energy = weights.square().sum(dim=(1, 2), keepdim=True)
    return weights * torch.rsqrt(energy)


def ascending(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Sort each row of [B, C], equal values by position: the sorted values, and where they were (int64).

    float32 goes as whole numbers that hold value and position, which are sorted several times faster.
    """
    if values.dtype != torch.float32:
        return torch.sort(values, dim=1, stable=True)
    bits = (values + 0.0).numpy().view(np.int32).astype(np.int64)  # + 0.0: there are two zeros, one value
    bits ^= (bits >> 31) & 0x7FFFFFFF  # of negative numbers: the larger bits, the smaller the number
    keys = (bits << 32) | np.arange(values.shape[1])
    keys.sort(axis=1)
    order = torch.from_numpy(keys & 0xFFFFFFFF)
    return values.gather(1, order), order


def activation_sums(common: torch.Tensor, noise: torch.Tensor, draws: ConvDraws, weights: torch.Tensor) -> torch.Tensor:
    """Σ_o weights[o, f] · √2·ReLU(±S + noise + bias_o), for every pixel and every f: float32 [B, P, F].

    Args:
        common: float32 [B, P], the map S at P pixels. noise: float32 [B, P].
        draws: signs and biases of the C channels. weights: float32 [B, C, F].
    """
    batch, channels, functions = weights.shape
    # A channel is active where ±S + noise > −bias: by descending bias, the active ones of a sign are a prefix.
    threshold, order = ascending(-draws.bias)
    from_row = (order + torch.arange(0, batch * channels, channels)[:, None]).view(-1)
    weights = weights.reshape(-1, functions).index_select(0, from_row).view(weights.shape)
    negative = draws.negative.gather(1, order).to(weights.dtype)
    gain = GAIN * torch.stack([1.0 - negative, negative], dim=-1)
    gain = torch.stack([gain, gain * -threshold[:, :, None]], dim=-1).view(batch, channels, 4, 1)
    # Row r of the table: (slope, intercept) of the + channels, then of the − channels, when the first r are active.
    table = torch.empty(batch, channels + 1, 4, functions, dtype=weights.dtype)
    table[:, 0] = 0.0
    torch.mul(weights[:, :, None], gain, out=table[:, 1:])
    table = table.cumsum_(dim=1).view(-1, functions)

    pixels = common.shape[1]
    first_row = torch.arange(0, batch * (channels + 1), channels + 1, dtype=torch.int32)[:, None]
    rows = torch.empty(batch, pixels, 4, dtype=torch.int32)
    factors = torch.ones(batch, pixels, 4, dtype=weights.dtype)
    for sign, argument in enumerate((noise + common, noise - common)):
        active = torch.searchsorted(threshold, argument, out_int32=True).add_(first_row).mul_(4)
        torch.add(active, 2 * sign, out=rows[:, :, 2 * sign])
        torch.add(active, 2 * sign + 1, out=rows[:, :, 2 * sign + 1])
        factors[:, :, 2 * sign] = argument
    sums = functional.embedding_bag(
        rows.view(-1, 4), table, per_sample_weights=factors.view(-1, 4), mode="sum"
    )  # slope · argument + intercept, for both signs, in one pass over the pixels
    return sums.view(batch, pixels, functions)


def fir_filter(maps: torch.Tensor) -> torch.Tensor:
    """[1, 3, 3, 1]/4 along the last two axes, without padding: [B, N, M] → [B, N−3, M−3]."""
    for axis in (1, 2):
        length = maps.shape[axis] - 3
        outer = maps.narrow(axis, 0, length) + maps.narrow(axis, 3, length)
        inner = maps.narrow(axis, 1, length) + maps.narrow(axis, 2, length)
        maps = outer.add_(inner, alpha=3.0).mul_(0.25)
    return maps


def combine_taps(taps: torch.Tensor, size: int, upsamples: bool) -> torch.Tensor:
    """Scatter the nine tap maps [B, size², 9] and add them up, the convolution itself: float32 [B, R, R].

    R = 2·size when `upsamples`, else `size`.
    """
    columns = taps.transpose(1, 2).contiguous()
    if not upsamples:
        return functional.fold(columns, (size, size), kernel_size=3, padding=1)[:, 0]
    grown = functional.fold(columns, (2 * size + 1, 2 * size + 1), kernel_size=3, stride=2)[:, 0]
    return fir_filter(functional.pad(grown, (1, 1, 1, 1)))


def area_resize(maps: torch.Tensor, resolution: int) -> torch.Tensor:
    """Shrink maps [B, R, R] to [B, resolution, resolution] by averaging squares; `resolution` divides R."""
    factor = maps.shape[-1] // resolution
    return maps if factor == 1 else functional.avg_pool2d(maps[:, None], factor)[:, 0]


def upsample_rgb(image: torch.Tensor) -> torch.Tensor:
    """StyleGAN2's skip upsampling: zeros between the pixels, then the FIR filter. [B, 3, H, H] → [B, 3, 2H, 2H]."""
    batch, channels, size, _ = image.shape
    grown = image.new_zeros(batch * channels, 2 * size + 3, 2 * size + 3)
    grown[:, 2:-1:2, 2:-1:2] = image.reshape(-1, size, size)
    return fir_filter(grown).view(batch, channels, 2 * size, 2 * size)


def synthesise(network: Network, draws: ImageDraws) -> torch.Tensor:
    """Run the networks up to the RGB image, before the colour step: [B, 3, R, R] in the precision of the draws."""
    batch = draws.colour_mean.shape[0]
    taps = network.constant.flatten(1).T @ tap_weights(draws.convs[0], network.variant, upsamples=False)
    image = network.constant.new_zeros(batch, 3, 2, 2)
    rgb_weights = iter(draws.rgb)
    size = network.shapes[0].resolution
    last = len(network.shapes) - 1
    for index, (shape, conv) in enumerate(zip(network.shapes, draws.convs, strict=True)):
        common = combine_taps(taps, size, shape.upsamples)
        size = shape.resolution
        noise = area_resize(draws.noise, size) if conv.noise is None else conv.noise
        noise = noise * conv.noise_scale[:, None, None]
        weights = [next(rgb_weights)] if shape.feeds_rgb else []
        if index < last:
            upsamples = network.shapes[index + 1].upsamples
            weights.append(tap_weights(draws.convs[index + 1], network.variant, upsamples))
        sums = activation_sums(common.flatten(1), noise.flatten(1), conv, torch.cat(weights, dim=2))
        if shape.feeds_rgb:
            rgb, sums = sums[:, :, :3], sums[:, :, 3:]
            image = upsample_rgb(image) + rgb.transpose(1, 2).reshape(batch, 3, size, size)
        taps = sums
    return image


def colour(image: torch.Tensor, mean: torch.Tensor, std: torch.Tensor) -> torch.Tensor:
    """Standardise each channel of float32 [B, 3, R, R], give it a mean and a deviation, each [B, 3], clip to [0, 1]."""
    spread, centre = torch.std_mean(image, dim=(2, 3), correction=0, keepdim=True)
    scale = std[:, :, None, None] / spread.clamp(min=torch.finfo(torch.float32).tiny)
    return ((image - centre) * scale + mean[:, :, None, None]).clamp_(0.0, 1.0)


def to_bytes(images: torch.Tensor) -> np.ndarray:
    """Round images float32 [B, 3, R, R] in [0, 1] to uint8 [B, R, R, 3]; overwrites its argument."""
    return images.mul_(255.0).round_().to(torch.uint8).permute(0, 2, 3, 1).numpy()


def render(random: np.random.Generator, count: int, resolution: int, variant: Variant = ORIENTED) -> np.ndarray:
    """The ``Process``: images of one network, of a power of two from 4 to 1024 pixels."""
    network = draw_network(random, resolution, variant)

    def chunk() -> np.ndarray:
        draws = draw_images(random, network, CHUNK)
        return to_bytes(colour(synthesise(network, draws), draws.colour_mean, draws.colour_std))

    return in_chunks(count, chunk)
