"""Images of untrained StyleGAN2 networks whose filters are wavelets.

``stylegan-oriented``, ``stylegan-highfreq`` and ``stylegan-sparse`` differ in their draws alone
(``stylegan_draws.py``); ``stylegan-random``, whose filters are not wavelets, is in ``stylegan_random.py``.

Source: Baradad et al., "Learning to See by Looking at Noise", NeurIPS 2021; skip architecture, filter [1, 3, 3, 1] and
demodulation as in StyleGAN2 (Karras et al., CVPR 2020).

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

import numpy as np
import torch
from torch.nn import functional

from dprandp.synth.compose import in_chunks
from dprandp.synth.stylegan_draws import ORIENTED, ConvDraws, ImageDraws, Network, Variant, draw_images, draw_network

CHUNK = 20  # images drawn and rendered together; part of the random stream: changing it changes every image
GAIN = math.sqrt(2.0)


def tap_weights(draws: ConvDraws, variant: Variant, upsamples: bool) -> torch.Tensor:
    """Weight of every input channel in each of the nine tap maps, modulated and demodulated: float32 [B, in_channels,
    9].

    Tap t is what :func:`combine_taps` adds at offset (t // 3, t % 3); a correlation is a scatter with the taps in
    reverse order.
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
    """Standardise each channel of float32 [B, 3, R, R], give it the drawn mean and standard deviation [B, 3], clip to
    [0, 1].
    """
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
