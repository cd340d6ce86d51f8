"""The second layer and how it is learned, each against a slow and obvious computation."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from region_weights import weights_by_hand

from dprandp.models import dictionary
from dprandp.models.patchnet import CONTRAST_FLOOR, LENGTH_FLOOR, ROOT_FLOOR, DeepPatchNet, PatchNet, ResponseLayer

SMALL = {"map_filters": 5, "map_dims": 4, "patch_dims": 7}
MADE = [
    {},
    {"stride": 2, "patch_size": 5, "response_patch": 2, "threshold": 0.1},
]


def randomise(module, seed=0):
    generator = torch.Generator().manual_seed(seed)
    for tensor in module.state_dict().values():
        tensor.normal_(std=0.4, generator=generator)
    return module


def random_stack(filters=6, patch_size=6, stride=1, **options):
    first = PatchNet(8, patch_size=patch_size, stride=stride, patch_dims=12)
    return randomise(DeepPatchNet(first, ResponseLayer(filters, first, **(SMALL | options))))


def random_images(count, size=32, seed=1):
    """Blurred noise: neighbours are alike, as in pictures, and patches differ in contrast."""
    noise = np.random.default_rng(seed).uniform(0, 256, (count, 3, size + 2, size + 2))
    blurred = (noise[..., :-2, :-2] + noise[..., 1:-1, 1:-1] + noise[..., 2:, 2:]) / 3
    return torch.from_numpy(blurred.astype(np.uint8))


def pixel_patches_by_loops(layer, x):
    """One image [3, H, W] in [0, 1] -> its patches [positions, positions, d], one by one, in float64."""
    p, s = layer.patch_size, layer.stride
    positions = (x.shape[1] - p) // s + 1
    patches = np.zeros((positions, positions, 3 * p * p))
    for row in range(positions):
        for column in range(positions):
            patch = x[:, row * s : row * s + p, column * s : column * s + p].reshape(-1)
            patches[row, column] = (patch - patch.mean()) / (patch.std() + CONTRAST_FLOOR)
    return patches


def maps_by_loops(layer, below):
    """Patches below [P, P, d] -> [2 M, S, S], position by position."""
    weight, bias = layer.map_weight.double().numpy(), layer.map_bias.double().numpy()
    responses = np.moveaxis(below @ weight.T + bias, 2, 0)
    side = (len(below) - 3) // 2 + 1
    maps = np.zeros((2 * len(weight), side, side))
    for row in range(side):
        for column in range(side):
            window = responses[:, 2 * row : 2 * row + 3, 2 * column : 2 * column + 3].reshape(len(weight), -1)
            above = np.maximum(window - layer.threshold, 0).mean(axis=1)
            negative = np.maximum(-window - layer.threshold, 0).mean(axis=1)
            maps[:, row, column] = np.sqrt(np.concatenate([above, negative]) + ROOT_FLOOR)
    return maps


def response_patches_by_loops(layer, below):
    """Patches below [P, P, d] -> patches of responses [positions, positions, d']."""
    maps, k = maps_by_loops(layer, below), layer.response_patch
    basis, centre = layer.channel_basis.double().numpy(), layer.channel_centre.double().numpy()
    channels = np.einsum("cm,mij->cij", basis, maps) - centre[:, None, None]
    positions = channels.shape[1] - k + 1
    patches = np.zeros((positions, positions, len(basis) * k * k))
    for row in range(positions):
        for column in range(positions):
            patch = channels[:, row : row + k, column : column + k].reshape(-1)
            patches[row, column] = patch / (np.linalg.norm(patch) / math.sqrt(len(patch)) + LENGTH_FLOOR)
    return patches


def excess_by_loops(layer, patches):
    weight, bias, basis, centre = (
        getattr(layer, name).detach().double().numpy() for name in ("weight", "bias", "basis", "centre")
    )
    weights = weights_by_hand(len(patches))
    thresholded = np.zeros((2, len(weights), len(weight)))
    for row in range(len(patches)):
        for column in range(len(patches)):
            response = weight @ (basis @ patches[row, column] - centre) + bias
            for region, own in enumerate(weights):
                thresholded[0, region] += own[row, column] * np.maximum(response - layer.threshold, 0)
                thresholded[1, region] += own[row, column] * np.maximum(-response - layer.threshold, 0)
    return thresholded.reshape(-1)


def all_features_by_loops(net, image):
    """One uint8 image [3, H, W] -> features of both layers."""
    below = pixel_patches_by_loops(net.first, image.double().numpy() / 255)
    above = response_patches_by_loops(net.second, below)
    found = [excess_by_loops(net.first, below), excess_by_loops(net.second, above)]
    return np.sqrt(np.concatenate(found) + ROOT_FLOOR)


@pytest.mark.parametrize("options", MADE)
def test_features_equal_the_loops(options):
    net, images = random_stack(**options), random_images(18)  # more than a group, more than a layer takes at once
    expected = np.stack([all_features_by_loops(net, image) for image in images[-2:]])
    for own in np.split(expected, np.cumsum([layer.feature_dim for layer in net.chain])[:-1], axis=1):
        assert own.std() > 0.05
    got = net.features(net.normalise(images[-2:])).detach().numpy()
    np.testing.assert_allclose(got, expected, rtol=5e-4, atol=5e-5)
    np.testing.assert_allclose(net.extract(images)[-2:].numpy(), expected, rtol=5e-4, atol=5e-5)


def test_layers_are_side_by_side():
    net, images = random_stack(), random_images(3)
    got = net.extract(images)
    widths = [part.width for part in net.parts]
    assert got.shape == (3, net.feature_dim)
    assert widths == [layer.feature_dim for layer in net.chain]
    assert sum(part.share for part in net.parts) == pytest.approx(1)
    assert torch.equal(got[:, : widths[0]], net.first.extract(images))


def test_a_patch_of_the_second_layer_sees_12_pixels_and_no_more():
    net, image = random_stack(), random_images(1)
    changed = image.clone()
    changed[..., 12:, :] = 255 - changed[..., 12:, :]
    patches, others = (net.levels(net.normalise(images))[1].unflatten(2, (11, 11)) for images in (image, changed))
    moved = (patches - others).abs().amax(dim=(0, 1, 3))
    assert moved[0] < 1e-6 < 1e-3 < moved[1:].min()


def test_each_image_stands_alone():
    net, images = random_stack(), random_images(4)
    changed = images.clone()
    changed[2] = 255 - changed[2].flip(-1)
    difference = (net.extract(images) - net.extract(changed)).abs().amax(dim=1)
    assert difference[2] > 0
    assert difference[[0, 1, 3]].eq(0).all()


# ----------------------------------------------------------------------------------------------------------- learning


def pixel_patches(net):
    return lambda images: net.levels(net.normalise(images))[0]


def test_whitened_channels_are_white_up_to_the_floor():
    net, images = random_stack(map_filters=6), random_images(70)  # more than one batch
    layer, below = net.second, pixel_patches(net)
    basis, centre = dictionary.channel_whitening(layer, below, images)
    patches = below(images).double().numpy().swapaxes(1, 2)
    side = layer.below_positions
    columns = np.concatenate(
        [maps_by_loops(layer, image.reshape(side, side, -1)).reshape(12, -1) for image in patches], axis=1
    )
    white = basis.double().numpy() @ columns - centre.double().numpy()[:, None]
    np.testing.assert_allclose(white.mean(axis=1), np.zeros(4), atol=1e-3)
    deviation = columns.std(axis=1) + 1e-3
    values = np.linalg.eigvalsh(np.cov(columns / deviation[:, None], bias=True))[::-1][:4]
    expected = np.diag(values / (values + dictionary.CHANNEL_FLOOR * values.mean()))
    np.testing.assert_allclose(np.cov(white, bias=True), expected, atol=2e-3)


def test_sampled_patches_are_patches_of_the_maps():
    net, images = random_stack(), random_images(3)
    generator = torch.Generator().manual_seed(0)
    patches = dictionary.sample_response_patches(net.second, pixel_patches(net), images, 10, generator)
    every = net.levels(net.normalise(images))[1].transpose(1, 2)
    assert patches.shape == (30, 36)
    for index in range(3):
        distances = (patches[10 * index : 10 * index + 10, None] - every[index][None]).abs().amax(dim=2)
        assert distances.min(dim=1).values.max() < 1e-5 < distances.median()
    everything = dictionary.sample_response_patches(net.second, pixel_patches(net), images, 121, generator)
    assert torch.equal(everything, every.flatten(0, 1))


def test_learning_fills_every_tensor_and_repeats_itself():
    images, filled = random_images(40), []
    for _ in range(2):
        first = PatchNet(9, patch_dims=20)
        net = DeepPatchNet(first, ResponseLayer(6, first, **SMALL))
        seen = []
        generator = torch.Generator().manual_seed(4)
        dictionary.learn(net.chain, images, 500, 2, generator, lambda step, _, seen=seen: seen.append(step))
        assert seen == list(range(6))
        filled.append(net.state_dict())
    for name, value in filled[0].items():
        assert torch.equal(value, filled[1][name])
        if "bias" not in name or name.endswith("map_bias"):
            assert value.abs().max() > 0, name
    layer = net.second
    torch.testing.assert_close(layer.weight.norm(dim=1), torch.ones(len(layer.weight)))
    responses = dictionary.sample_response_patches(
        layer, pixel_patches(net), images, 40, torch.Generator().manual_seed(9)
    )
    white = (responses @ layer.basis.T - layer.centre).double()
    assert white.mean(dim=0).abs().max() < 0.2
    assert 0.3 < white.std(dim=0).min() <= white.std(dim=0).max() < 1.2


def test_a_second_layer_does_not_change_the_first():
    images = random_images(20)
    alone, below = PatchNet(9, patch_dims=20), PatchNet(9, patch_dims=20)
    for chain in ((alone,), (below, ResponseLayer(6, below, **SMALL))):
        dictionary.learn(chain, images, 300, 2, torch.Generator().manual_seed(4))
    assert all(torch.equal(value, below.state_dict()[name]) for name, value in alone.state_dict().items())
