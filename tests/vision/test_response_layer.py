"""The second layer and how it is learned, each against a slow and obvious computation."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from dprandp.vision import dictionary
from dprandp.vision.patchnet import CONTRAST_FLOOR, ROOT_FLOOR, PatchNet
from dprandp.vision.response_layer import LENGTH_FLOOR, ResponseLayer, TwoLayerPatchNet

SMALL = {"map_filters": 5, "map_dims": 4, "patch_dims": 7}


def random_layer(filters=6, **options):
    generator = torch.Generator().manual_seed(0)
    layer = ResponseLayer(filters, **(SMALL | options))
    for tensor in layer.state_dict().values():
        tensor.normal_(std=0.4, generator=generator)
    return layer


def random_images(count, size=32, seed=1):
    """Blurred noise: neighbours are alike, as in pictures, and patches differ in contrast."""
    noise = np.random.default_rng(seed).uniform(0, 256, (count, 3, size + 2, size + 2))
    blurred = (noise[..., :-2, :-2] + noise[..., 1:-1, 1:-1] + noise[..., 2:, 2:]) / 3
    return torch.from_numpy(blurred.astype(np.uint8))


def maps_by_loops(layer, image):
    """One uint8 image [3, H, W] -> [2 M, S, S], position by position, in float64."""
    x, p, s = image.double().numpy() / 255, layer.patch_size, layer.stride
    weight, bias = layer.map_weight.double().numpy(), layer.map_bias.double().numpy()
    positions = (x.shape[1] - p) // s + 1
    responses = np.zeros((len(weight), positions, positions))
    for row in range(positions):
        for column in range(positions):
            patch = x[:, row * s : row * s + p, column * s : column * s + p].reshape(-1)
            responses[:, row, column] = weight @ ((patch - patch.mean()) / (patch.std() + CONTRAST_FLOOR)) + bias
    side = (positions - 3) // 2 + 1
    maps = np.zeros((2 * len(weight), side, side))
    for row in range(side):
        for column in range(side):
            window = responses[:, 2 * row : 2 * row + 3, 2 * column : 2 * column + 3].reshape(len(weight), -1)
            above = np.maximum(window - layer.threshold, 0).mean(axis=1)
            below = np.maximum(-window - layer.threshold, 0).mean(axis=1)
            maps[:, row, column] = np.sqrt(np.concatenate([above, below]) + ROOT_FLOOR)
    return maps


def features_by_loops(layer, image):
    maps, k = maps_by_loops(layer, image), layer.response_patch
    weight, bias, basis, centre, channel_basis, channel_centre = (
        getattr(layer, name).detach().double().numpy()
        for name in ("weight", "bias", "basis", "centre", "channel_basis", "channel_centre")
    )
    channels = np.einsum("cm,mij->cij", channel_basis, maps) - channel_centre[:, None, None]
    positions = channels.shape[1] - k + 1
    half = math.ceil(positions / 2)
    regions = {}
    for row in range(positions):
        for column in range(positions):
            patch = channels[:, row : row + k, column : column + k].reshape(-1)
            patch = patch / (np.linalg.norm(patch) / math.sqrt(len(patch)) + LENGTH_FLOOR)
            response = weight @ (basis @ patch - centre) + bias
            for cell in ((row // half) * 2 + column // half, 4):
                regions.setdefault(cell, []).append(response)
    out = []
    for sign in (1, -1):
        for cell in range(5):
            excess = np.maximum(sign * np.array(regions[cell]) - layer.threshold, 0)
            out.append(np.sqrt(excess.mean(axis=0) + ROOT_FLOOR))
    return np.concatenate(out)


@pytest.mark.parametrize("options", [{}, {"stride": 2, "patch_size": 5, "response_patch": 2, "threshold": 0.1}])
def test_features_equal_the_loops(options):
    layer, images = random_layer(**options), random_images(2)
    expected = np.stack([features_by_loops(layer, image) for image in images])
    assert expected.std() > 0.1
    got = layer.features(layer.normalise(images)).detach().numpy()
    np.testing.assert_allclose(got, expected, rtol=5e-4, atol=5e-5)
    np.testing.assert_allclose(layer.extract(images).numpy(), expected, rtol=5e-4, atol=5e-5)


def test_two_layers_are_both_side_by_side():
    second, images = random_layer(), random_images(3)
    first = PatchNet(8)
    first.weight.data.normal_(generator=torch.Generator().manual_seed(2))
    both = TwoLayerPatchNet(first, second)
    got = both.extract(images)
    assert torch.equal(got, torch.cat([first.extract(images), second.extract(images)], dim=1))
    assert [part.width for part in both.parts] == [first.feature_dim, second.feature_dim]
    assert sum(part.share for part in both.parts) == pytest.approx(1)
    torch.testing.assert_close(both.features(both.normalise(images)).detach(), got, rtol=1e-4, atol=1e-5)


def test_each_image_stands_alone():
    layer, images = random_layer(), random_images(4)
    changed = images.clone()
    changed[2] = 255 - changed[2].flip(-1)
    difference = (layer.extract(images) - layer.extract(changed)).abs().amax(dim=1)
    assert difference[2] > 0
    assert difference[[0, 1, 3]].eq(0).all()


# ----------------------------------------------------------------------------------------------------------- learning


def test_whitened_channels_are_white_up_to_the_floor():
    layer, images = random_layer(map_filters=6), random_images(70)  # more than one batch
    basis, centre = dictionary.channel_whitening(layer, images)
    columns = np.concatenate([maps_by_loops(layer, image).reshape(12, -1) for image in images], axis=1)
    white = basis.double().numpy() @ columns - centre.double().numpy()[:, None]
    np.testing.assert_allclose(white.mean(axis=1), np.zeros(4), atol=1e-3)
    deviation = columns.std(axis=1) + 1e-3
    values = np.linalg.eigvalsh(np.cov(columns / deviation[:, None], bias=True))[::-1][:4]
    expected = np.diag(values / (values + dictionary.CHANNEL_FLOOR * values.mean()))
    np.testing.assert_allclose(np.cov(white, bias=True), expected, atol=2e-3)


def test_sampled_patches_are_patches_of_the_maps():
    layer, images = random_layer(), random_images(3)
    patches = dictionary.sample_response_patches(layer, images, 10, torch.Generator().manual_seed(0))
    every = layer.unwhitened(layer.normalise(images)).transpose(1, 2)
    assert patches.shape == (30, 36)
    for index in range(3):
        distances = (patches[10 * index : 10 * index + 10, None] - every[index][None]).abs().amax(dim=2)
        assert distances.min(dim=1).values.max() < 1e-5 < distances.median()


def test_learning_fills_every_tensor_and_repeats_itself():
    images, filled = random_images(40), []
    for _ in range(2):
        first, second = PatchNet(9, patch_dims=20), ResponseLayer(6, **SMALL)
        seen = []
        generator = torch.Generator().manual_seed(4)
        dictionary.learn((first, second), images, 500, 2, generator, lambda step, _, seen=seen: seen.append(step))
        assert seen == [0, 1, 2, 3, 4, 5]
        filled.append(first.state_dict() | {f"second.{name}": value for name, value in second.state_dict().items()})
    for name, value in filled[0].items():
        assert torch.equal(value, filled[1][name])
        if "bias" not in name or name == "second.map_bias":
            assert value.abs().max() > 0, name
    torch.testing.assert_close(filled[0]["second.weight"].norm(dim=1), torch.ones(6))
    responses = dictionary.sample_response_patches(second, images, 40, torch.Generator().manual_seed(9))
    white = (responses @ second.basis.T - second.centre).double()
    assert white.mean(dim=0).abs().max() < 0.2
    assert 0.3 < white.std(dim=0).min() <= white.std(dim=0).max() < 1.2


def test_a_second_layer_does_not_change_the_first():
    images = random_images(20)
    alone, beside = PatchNet(9, patch_dims=20), PatchNet(9, patch_dims=20)
    dictionary.learn((alone, None), images, 300, 2, torch.Generator().manual_seed(4))
    dictionary.learn((beside, ResponseLayer(6, **SMALL)), images, 300, 2, torch.Generator().manual_seed(4))
    assert all(torch.equal(value, beside.state_dict()[name]) for name, value in alone.state_dict().items())
