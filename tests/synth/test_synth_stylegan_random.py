"""stylegan-random: modulated inputs and demodulated outputs against filters formed for every image."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from test_synth_stylegan import filter_padded
from torch.nn import functional

from dprandp.synth import stylegan_random
from dprandp.synth.stylegan_random import RandomNetwork


def dense_synthesise(network: RandomNetwork, latents: torch.Tensor, index: int) -> torch.Tensor:
    """One image with its own modulated and demodulated filters, in double precision."""
    latents = latents[:, index].double()
    x = network.constant.double()[None]
    image, rgb_layer = None, 0
    for layer, filters in enumerate(network.filters):
        style = network.affines[layer].double() @ latents[layer] + 1.0
        weight = filters.double() * style[None, :, None, None]
        weight = weight / torch.sqrt(weight.square().sum(dim=(1, 2, 3), keepdim=True))
        if network.upsamples[layer]:
            x = filter_padded(functional.conv_transpose2d(x, weight.transpose(0, 1), stride=2), 1, 1)
        else:
            x = functional.conv2d(x, weight, padding=1)
        x = 2.0**0.5 * functional.relu(x)
        if not network.upsamples[layer]:
            style = network.rgb_affines[rgb_layer].double() @ latents[layer + 1] + 1.0
            weights = network.rgb_weights[rgb_layer].double() * style / len(style) ** 0.5
            rgb = functional.conv2d(x, weights[:, :, None, None])
            if image is not None:
                zeros = torch.zeros_like(rgb)
                zeros[:, :, ::2, ::2] = image
                rgb = rgb + filter_padded(zeros, 2, 1)
            image, rgb_layer = rgb, rgb_layer + 1
    return image[0]


def test_equals_filters_formed_for_every_image(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stylegan_random, "MAX_CHANNELS", 12)
    random = np.random.default_rng(0)
    network = stylegan_random.draw_network(random, 32)
    latents = torch.from_numpy(random.standard_normal((len(network.filters) + 1, 3, 512), dtype=np.float32))
    images = stylegan_random.synthesise(network, latents)
    assert images.shape == (3, 3, 32, 32)
    for index in range(3):
        wanted = dense_synthesise(network, latents, index)
        assert (images[index] - wanted).abs().max() < 1e-4 * wanted.std()
    assert (images[0] - wanted).abs().max() > 0.1 * wanted.std()  # control: another image


def test_networks_have_the_published_shape_but_for_their_width() -> None:
    network = stylegan_random.draw_network(np.random.default_rng(0), 64)
    assert network.upsamples == [False, *[True, False] * 4]
    assert {filters.shape for filters in network.filters} == {(64, 64, 3, 3)}
    values = torch.cat([filters.flatten() for filters in network.filters])
    assert abs(float(values.std()) - 1.0) < 0.01
    assert [weights.shape for weights in network.rgb_weights] == [(3, 64)] * 5


def test_images_are_smooth_blobs() -> None:
    grey = stylegan_random.render(np.random.default_rng(1), 20, 16).mean(axis=3)
    neighbours = [np.corrcoef(image[:, 1:].ravel(), image[:, :-1].ravel())[0, 1] for image in grey]
    assert np.median(neighbours) > 0.7
    assert np.abs(np.corrcoef(grey.reshape(len(grey), -1)) - np.eye(len(grey))).max() < 0.98
