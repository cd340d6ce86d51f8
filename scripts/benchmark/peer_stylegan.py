"""The other side: ``stylegan-oriented`` the straightforward way, as the dense StyleGAN2 that it is by definition.

Every convolution forms its full modulated and demodulated weights [B, out, in, 3, 3] and applies them with a grouped
convolution, a group per image, as StyleGAN2's own implementations do. It reads the same draws as the product's renderer
(``synth/stylegan.py``) and must make the same images. The size of the scalars s_o, which demodulation takes out
again, is set to 1, so that this side is spared drawing them.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from dprandp.synth.stylegan import (
    GAIN,
    ConvDraws,
    ImageDraws,
    LayerShape,
    Network,
    area_resize,
    colour,
    draw_images,
    to_bytes,
)

DEMODULATION_FLOOR = 1e-8


def render(random: np.random.Generator, network: Network, count: int) -> np.ndarray:
    """As ``synth.stylegan.render``, but for a network that is drawn already (``count`` images drawn together)."""
    draws = draw_images(random, network, count)
    return to_bytes(colour(synthesise(network, draws), draws.colour_mean, draws.colour_std))


def synthesise(network: Network, draws: ImageDraws) -> Tensor:
    """As ``synth.stylegan.synthesise``: float32 [B, 3, R, R] before the colour step."""
    batch = len(draws.colour_mean)
    x = network.constant.expand(batch, -1, -1, -1)
    image: Tensor | None = None
    rgb_weights = iter(draws.rgb)
    for shape, conv in zip(network.shapes, draws.convs, strict=True):
        y = _convolve(x, _weights(conv, network), shape)
        noise = area_resize(draws.noise, shape.resolution) if conv.noise is None else conv.noise
        y = y + (noise * conv.noise_scale[:, None, None])[:, None] + conv.bias[:, :, None, None]
        x = GAIN * functional.relu(y)
        if shape.feeds_rgb:
            rgb = torch.einsum("bchw,bcr->brhw", x, next(rgb_weights))
            image = rgb if image is None else _upsample(image) + rgb
    return image


def _weights(conv: ConvDraws, network: Network) -> Tensor:
    """Demodulated weights float32 [B, out, in, 3, 3]."""
    bank = torch.from_numpy(network.variant.bank).to(conv.style.dtype)
    sign = 1 - 2 * conv.negative.to(conv.style.dtype)
    weights = sign[:, :, None, None, None] * bank[conv.wavelet][:, None]
    weights = weights * conv.style[:, None, :, None, None]
    return weights * torch.rsqrt(weights.square().sum(dim=(2, 3, 4), keepdim=True) + DEMODULATION_FLOOR)


def _convolve(x: Tensor, weights: Tensor, shape: LayerShape) -> Tensor:
    batch, out_channels, in_channels = weights.shape[:3]
    size = x.shape[-1]
    x = x.reshape(1, batch * in_channels, size, size)
    if shape.upsamples:
        kernel = weights.transpose(1, 2).reshape(batch * in_channels, out_channels, 3, 3)
        y = functional.conv_transpose2d(x, kernel, stride=2, groups=batch)
        y = _filtered(y.view(batch, out_channels, *y.shape[2:]), 1, 1)
    else:
        y = functional.conv2d(x, weights.reshape(batch * out_channels, in_channels, 3, 3), padding=1, groups=batch)
    return y.view(batch, out_channels, shape.resolution, shape.resolution)


def _upsample(image: Tensor) -> Tensor:
    batch, channels, size, _ = image.shape
    grown = image.new_zeros(batch, channels, 2 * size, 2 * size)
    grown[:, :, ::2, ::2] = image
    return _filtered(grown, 2, 1)


def _filtered(x: Tensor, before: int, after: int) -> Tensor:
    """StyleGAN2's FIR filter, [1, 3, 3, 1]/4 along both axes."""
    taps = x.new_tensor([1.0, 3.0, 3.0, 1.0]) / 4
    kernel = (taps[:, None] * taps[None, :]).expand(x.shape[1], 1, 4, 4)
    return functional.conv2d(functional.pad(x, (before, after, before, after)), kernel, groups=x.shape[1])
