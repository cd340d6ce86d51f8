"""``stylegan-random``: images of untrained StyleGAN2 networks with Gaussian filters, as they are initialised.

Source: Baradad et al., "Learning to See by Looking at Noise", NeurIPS 2021: StyleGAN2 (Karras et al., CVPR 2020) with
ReLU, without noise and bias; filters and RGB weights N(0, 1) are the network's, only the styles are an image's own.

**Narrower than published.** Here the filters have full rank, so the shortcut of ``stylegan.py`` does not exist and a
layer costs a dense convolution. The published network has 512 channels at 64 px, 32 billion operations an image; this
one has at most :data:`MAX_CHANNELS`, which leaves the law of an output channel given the layer below it as it was
(demodulation removes the width), and averages over fewer of them.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch.nn import functional

from dprandp.synth.compose import in_chunks
from dprandp.synth.stylegan import (
    CHUNK,
    GAIN,
    LATENT,
    LEAKY_SLOPE,
    START_RESOLUTION,
    channels_at,
    colour,
    draw_colour,
    fir_filter,
    normal,
    style_of,
    to_bytes,
    upsample_rgb,
)

MAX_CHANNELS = 64


@dataclass(frozen=True)
class RandomNetwork:
    """One network, shared by the images of a block."""

    constant: torch.Tensor  # float32 [C, 4, 4]
    filters: list[torch.Tensor]  # per convolution float32 [out, in, 3, 3]
    affines: list[torch.Tensor]  # per convolution float32 [in, 512], N(0, 1)/√512: style = affine · w + 1
    upsamples: list[bool]  # per convolution, whether it doubles the resolution; one that does not feeds an RGB layer
    rgb_weights: list[torch.Tensor]  # per RGB layer float32 [3, C]
    rgb_affines: list[torch.Tensor]  # per RGB layer float32 [C, 512]


def draw_network(random: np.random.Generator, resolution: int) -> RandomNetwork:
    """Draw a network that renders `resolution` (a power of two, at least 4)."""

    def width(size: int) -> int:
        return min(channels_at(size), MAX_CHANNELS)

    size, channels = START_RESOLUTION, width(START_RESOLUTION)
    network = RandomNetwork(normal(random, channels, size, size), [], [], [], [], [])
    while size <= resolution:
        for upsamples in (True, False) if size > START_RESOLUTION else (False,):
            network.filters.append(normal(random, width(size), channels, 3, 3))
            network.affines.append(normal(random, channels, LATENT) / LATENT**0.5)
            network.upsamples.append(upsamples)
            channels = width(size)
        network.rgb_weights.append(normal(random, 3, channels))
        network.rgb_affines.append(normal(random, channels, LATENT) / LATENT**0.5)
        size *= 2
    return network


def synthesise(network: RandomNetwork, latents: torch.Tensor) -> torch.Tensor:
    """Run a network up to the RGB image, before the colour step: float32 [B, 3, R, R].

    The style multiplies the input and the demodulation the output of one convolution that all images share, which
    equals a filter of its own for every image.

    Args:
        latents: float32 [L + 1, B, 512] for L convolutions; an RGB layer shares the latent of the next convolution.
    """
    batch = latents.shape[1]
    maps = network.constant.expand(batch, -1, -1, -1)
    image = maps.new_zeros(batch, 3, START_RESOLUTION // 2, START_RESOLUTION // 2)
    rgb_layers = zip(network.rgb_weights, network.rgb_affines, strict=True)
    for index, (filters, affine) in enumerate(zip(network.filters, network.affines, strict=True)):
        style = style_of(latents[index], affine)
        demodulation = torch.rsqrt(style.square() @ filters.square().sum(dim=(2, 3)).T)
        maps = maps * style[:, :, None, None]
        if network.upsamples[index]:
            maps = functional.conv_transpose2d(maps, filters.transpose(0, 1), stride=2)
            maps = functional.pad(maps, (1, 1, 1, 1)).flatten(0, 1)
            maps = fir_filter(maps).unflatten(0, (batch, -1))
        else:
            maps = functional.conv2d(maps, filters, padding=1)
        maps = functional.relu_(maps * (GAIN * demodulation)[:, :, None, None])
        if not network.upsamples[index]:
            weights, rgb_affine = next(rgb_layers)
            style = style_of(latents[index + 1], rgb_affine) / weights.shape[1] ** 0.5
            rgb = (weights * style[:, None, :]) @ maps.flatten(2)
            image = upsample_rgb(image) + rgb.unflatten(2, maps.shape[2:])
    return image


def render(random: np.random.Generator, count: int, resolution: int) -> np.ndarray:
    """The ``Process``: images of one network, of a power of two from 4 to 1024 pixels."""
    network = draw_network(random, resolution)

    def chunk() -> np.ndarray:
        latents = functional.leaky_relu(normal(random, len(network.filters) + 1, CHUNK, LATENT), LEAKY_SLOPE)
        mean, std = draw_colour(random, CHUNK)
        return to_bytes(colour(synthesise(network, latents), mean, std))

    return in_chunks(count, chunk)
