"""Patch layers, how they are learned, and their gradients in closed form, against slow and obvious computations."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch.nn import functional

from dprandp.config.schema import PretrainConfig
from dprandp.models import dictionary, whitening
from dprandp.models.classifier import Classifier
from dprandp.models.extractor import build_extractor
from dprandp.models.patchnet import (
    CONTRAST_FLOOR,
    LENGTH_FLOOR,
    RESPONSE_FLOOR,
    ROOT_FLOOR,
    THRESHOLD,
    DeepPatchNet,
    PatchNet,
    ResponseLayer,
    normalise_patches,
    per_example_gradients,
    region_weights,
)

SMALL = {"map_filters": 5, "map_dims": 4, "patch_dims": 7}


def randomise(module, std=0.4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    for tensor in module.state_dict().values():
        tensor.normal_(std=std, generator=generator)
    return module


def one_layer(filters=10, **options):
    net = randomise(PatchNet(filters, **options), std=1.0)
    net.basis.mul_(0.2)
    return net


def two_layers(filters=6, patch_size=6, stride=1):
    first = PatchNet(8, patch_size=patch_size, stride=stride, patch_dims=12)
    return randomise(DeepPatchNet(first, ResponseLayer(filters, first, **SMALL)))


def random_images(count, size=32, seed=1):
    """Blurred noise: neighbours are alike, as in pictures, and patches differ in contrast."""
    noise = np.random.default_rng(seed).uniform(0, 256, (count, 3, size + 2, size + 2))
    blurred = (noise[..., :-2, :-2] + noise[..., 1:-1, 1:-1] + noise[..., 2:, 2:]) / 3
    return torch.from_numpy(blurred.astype(np.uint8))


def set_threads(monkeypatch, threads):
    """As torch.set_num_threads(threads), but the sums of a part stay those of one thread."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)


# ------------------------------------------------------------------------------------------------- by loops, in float64


def weight_by_hand(region, row, column, positions):
    """Of one position in one region, before the weights of a region are made to sum to 1."""
    x, y = (column + 0.5) / positions, (row + 0.5) / positions
    if region == 4:
        return math.exp(-((x - 0.5) ** 2 + (y - 0.5) ** 2) / (2 * 0.25**2))

    def left(place):
        if place < 0.25:
            return 1.0
        return math.cos(math.pi * (place - 0.25)) ** 2 if place < 0.75 else 0.0

    across = 1 - left(x) if region % 2 else left(x)
    return across * (1 - left(y) if region >= 2 else left(y))


def weights_by_hand(positions):
    """float64 [5, positions, positions], each region of sum 1."""
    places = range(positions)
    weights = np.array([[[weight_by_hand(g, r, c, positions) for c in places] for r in places] for g in range(5)])
    return weights / weights.sum(axis=(1, 2), keepdims=True)


def numbers(layer, *names):
    return (getattr(layer, name).detach().double().numpy() for name in names)


def pixel_patches_by_loops(layer, x):
    """One image [3, H, W] in [0, 1] -> its patches [positions, positions, d]."""
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
    weight, bias = numbers(layer, "map_weight", "map_bias")
    responses = np.moveaxis(below @ weight.T + bias, 2, 0)
    side = (len(below) - 3) // 2 + 1
    maps = np.zeros((2 * len(weight), side, side))
    for row in range(side):
        for column in range(side):
            window = responses[:, 2 * row : 2 * row + 3, 2 * column : 2 * column + 3].reshape(len(weight), -1)
            above = np.maximum(window - THRESHOLD, 0).mean(axis=1)
            negative = np.maximum(-window - THRESHOLD, 0).mean(axis=1)
            maps[:, row, column] = np.sqrt(np.concatenate([above, negative]) + ROOT_FLOOR)
    return maps


def response_patches_by_loops(layer, below):
    """Patches below [P, P, d] -> patches of responses [positions, positions, d']."""
    maps = maps_by_loops(layer, below)
    basis, centre = numbers(layer, "channel_basis", "channel_centre")
    channels = np.einsum("cm,mij->cij", basis, maps) - centre[:, None, None]
    positions = channels.shape[1] - 2
    patches = np.zeros((positions, positions, len(basis) * 9))
    for row in range(positions):
        for column in range(positions):
            patch = channels[:, row : row + 3, column : column + 3].reshape(-1)
            patches[row, column] = patch / (np.linalg.norm(patch) / math.sqrt(len(patch)) + LENGTH_FLOOR)
    return patches


def pooled_by_loops(layer, patches):
    weight, bias, basis, centre = numbers(layer, "weight", "bias", "basis", "centre")
    weights = weights_by_hand(len(patches))
    pooled = np.zeros((2, len(weights), len(weight)))
    for row in range(len(patches)):
        for column in range(len(patches)):
            response = weight @ (basis @ patches[row, column] - centre) + bias
            for index, sign in enumerate((1, -1)):
                root = np.sqrt(np.maximum(sign * response - THRESHOLD, 0) + RESPONSE_FLOOR) - np.sqrt(RESPONSE_FLOOR)
                for region, own in enumerate(weights):
                    pooled[index, region] += own[row, column] * root
    return pooled.reshape(-1)


def features_by_loops(net, image):
    """One uint8 image [3, H, W] -> the features of each layer, one after the other."""
    patches, found = pixel_patches_by_loops(net.chain[0], image.double().numpy() / 255), []
    for layer in net.chain:
        patches = response_patches_by_loops(layer, patches) if found else patches
        found.append(pooled_by_loops(layer, patches))
    return np.concatenate(found)


# ----------------------------------------------------------------------------------------------------------- features


@pytest.mark.parametrize("positions", [2, 11])
def test_regions_are_those_written_down_and_change_little_from_place_to_place(positions):
    weights = region_weights(positions)
    assert (weights.dtype, weights.shape) == (torch.float32, (5, positions**2))
    np.testing.assert_allclose(weights.view(5, positions, -1), weights_by_hand(positions), atol=1e-6)
    fine = region_weights(27).view(5, 27, 27)
    torch.testing.assert_close(fine.flip(-1), fine[[1, 0, 3, 2, 4]])  # a mirror image swaps the sides
    assert (fine[..., 1:] - fine[..., :-1]).abs().max() < 0.15 * fine.max()


@pytest.mark.parametrize(
    "net",
    [one_layer(), one_layer(stride=2, patch_dims=20), one_layer(patch_size=8), two_layers(),
     two_layers(stride=2, patch_size=5)],
    ids=["one layer", "stride", "large patches", "two layers", "two layers, stride"],
)  # fmt: skip
def test_features_equal_the_loops(net):
    images = random_images(18 if len(net.chain) > 1 else 2)  # more than a group, more than a layer takes at once
    expected = np.stack([features_by_loops(net, image) for image in images[-2:]])
    widths = [layer.feature_dim for layer in net.chain]
    for own in np.split(expected, np.cumsum(widths)[:-1], axis=1):
        assert own.std() > 0.05  # the filters do answer: equality to zero would prove nothing
    got = net.features(net.normalise(images[-2:])).detach().numpy()
    np.testing.assert_allclose(got, expected, rtol=5e-4, atol=5e-5)
    np.testing.assert_allclose(net.extract(images)[-2:].numpy(), expected, rtol=5e-4, atol=5e-5)
    assert [part.width for part in net.parts] == widths
    assert sum(part.share for part in net.parts) == pytest.approx(1)


@pytest.mark.parametrize("filters", [7, 400, 401])
@pytest.mark.parametrize("threads", [1, 2])
def test_extract_equals_features_for_any_tile_and_thread_count(monkeypatch, filters, threads):
    net, images = one_layer(filters), random_images(5)
    set_threads(monkeypatch, threads)
    torch.testing.assert_close(net.extract(images), net.features(net.normalise(images)).detach(), rtol=1e-4, atol=1e-5)


def test_a_patch_of_the_second_layer_sees_12_pixels_and_no_more():
    net, image = two_layers(), random_images(1)
    changed = image.clone()
    changed[..., 12:, :] = 255 - changed[..., 12:, :]
    patches, others = (net.levels(net.normalise(images))[1].unflatten(2, (11, 11)) for images in (image, changed))
    moved = (patches - others).abs().amax(dim=(0, 1, 3))
    assert moved[0] < 1e-6 < 1e-3 < moved[1:].min()


def test_flat_patches_have_finite_gradients():
    net = one_layer(4)
    net.features(torch.full((1, 3, 32, 32), 0.5)).sum().backward()
    assert net.weight.grad.isfinite().all()


# -------------------------------------------------------------------------------------------------------- dictionary


def pixel_patches(net):
    return lambda images: net.levels(net.normalise(images))[0]


def are_among(patches, every):
    distances = (patches[:, None] - every[None]).abs().amax(dim=2)
    return distances.min(dim=1).values.max() < 1e-5 < distances.median()


def test_sampled_patches_are_patches_of_the_images_and_of_the_maps():
    images = random_images(3, size=9)
    patches = dictionary.sample_patches(images, 40, 4, torch.Generator().manual_seed(0))
    every = normalise_patches(functional.unfold(images.float() / 255, 4)).transpose(1, 2).reshape(-1, 48)
    assert patches.shape == (40, 48)
    assert are_among(patches, every)
    net, images, generator = two_layers(), random_images(3), torch.Generator().manual_seed(0)
    patches = dictionary.sample_response_patches(net.second, pixel_patches(net), images, 10, generator)
    every = net.levels(net.normalise(images))[1].transpose(1, 2)
    assert patches.shape == (30, 36)
    assert all(are_among(patches[10 * index : 10 * index + 10], every[index]) for index in range(3))
    everything = dictionary.sample_response_patches(net.second, pixel_patches(net), images, 121, generator)
    assert torch.equal(everything, every.flatten(0, 1))


@pytest.mark.parametrize("dims", [12, 5])
def test_whitened_patches_are_white_up_to_the_floor(dims):
    generator = torch.Generator().manual_seed(0)
    vectors = torch.randn(20_000, 12, generator=generator) @ torch.randn(12, 12, generator=generator) + 3
    basis, centre = dictionary.whitening(vectors, dims)
    white = (vectors @ basis.T - centre).double()
    torch.testing.assert_close(white.mean(dim=0), torch.zeros(dims, dtype=torch.float64), rtol=0, atol=1e-3)
    eigenvalues = torch.linalg.eigvalsh(vectors.T.cov(correction=0).double()).flip(0)[:dims]
    expected = torch.diag(eigenvalues / (eigenvalues + dictionary.PATCH_FLOOR))
    torch.testing.assert_close(white.T.cov(correction=0), expected, rtol=1e-3, atol=1e-3)


def test_whitened_channels_are_white_up_to_the_floor():
    first = PatchNet(8, patch_dims=12)
    net = randomise(DeepPatchNet(first, ResponseLayer(6, first, **SMALL | {"map_filters": 6})))
    layer, below, images = net.second, pixel_patches(net), random_images(70)  # more than one batch
    basis, centre = dictionary.channel_whitening(layer, below, images)
    side = layer.below_positions
    patches = below(images).double().numpy().swapaxes(1, 2).reshape(70, side, side, -1)
    columns = np.concatenate([maps_by_loops(layer, each).reshape(12, -1) for each in patches], axis=1)
    white = basis.double().numpy() @ columns - centre.double().numpy()[:, None]
    np.testing.assert_allclose(white.mean(axis=1), np.zeros(4), atol=1e-3)
    deviation = columns.std(axis=1) + 1e-3
    values = np.linalg.eigvalsh(np.cov(columns / deviation[:, None], bias=True))[::-1][:4]
    expected = np.diag(values / (values + dictionary.CHANNEL_FLOOR * values.mean()))
    np.testing.assert_allclose(np.cov(white, bias=True), expected, atol=2e-3)


def test_kmeans_finds_planted_directions_and_their_negatives():
    generator = torch.Generator().manual_seed(0)
    planted = functional.normalize(torch.randn(5, 16, generator=generator))
    which = torch.randint(5, (4000,), generator=generator)
    sign = torch.randint(2, (4000, 1), generator=generator) * 2 - 1
    vectors = sign * planted[which] * 3 + 0.1 * torch.randn(4000, 16, generator=generator)
    similarities = []
    # more atoms than directions: k-means may not give two atoms to one direction and none to another
    atoms = dictionary.spherical_kmeans(vectors, 15, 20, generator, lambda _, s: similarities.append(s))
    torch.testing.assert_close(atoms.norm(dim=1), torch.ones(15))
    assert (planted @ atoms.T).abs().max(dim=1).values.min() > 0.99
    assert similarities[-1] > similarities[0]


def test_learning_fills_every_tensor_repeats_itself_and_leaves_the_first_layer_alone():
    images, filled = random_images(40), []
    for _ in range(2):
        first = PatchNet(9, patch_dims=20)
        net = DeepPatchNet(first, ResponseLayer(6, first, **SMALL))
        seen, generator = [], torch.Generator().manual_seed(4)
        dictionary.learn(net.chain, images, 500, 2, generator, lambda step, _, seen=seen: seen.append(step))
        assert seen == list(range(6))
        filled.append(net.state_dict())
    for name, value in filled[0].items():
        assert torch.equal(value, filled[1][name])
        if "bias" not in name or name.endswith("map_bias"):
            assert value.abs().max() > 0, name
    alone, layer = PatchNet(9, patch_dims=20), net.second
    dictionary.learn((alone,), images, 500, 2, torch.Generator().manual_seed(4))
    assert all(torch.equal(value, net.first.state_dict()[name]) for name, value in alone.state_dict().items())
    torch.testing.assert_close(layer.weight.norm(dim=1), torch.ones(len(layer.weight)))
    responses = dictionary.sample_response_patches(
        layer, pixel_patches(net), images, 40, torch.Generator().manual_seed(9)
    )
    white = (responses @ layer.basis.T - layer.centre).double()
    assert white.mean(dim=0).abs().max() < 0.2
    assert 0.3 < white.std(dim=0).min() <= white.std(dim=0).max() < 1.2


# -------------------------------------------------------------------------------------------- closed-form gradients


def classifier(filters, layers):
    config = PretrainConfig(filters=filters, layers=layers, second_filters=filters + 1)
    net = one_layer(filters) if layers == 1 else build_extractor(config, torch.Generator().manual_seed(3))
    generator = torch.Generator().manual_seed(5)
    whitener = whitening.fit(torch.rand(60, net.feature_dim, generator=generator), 12, parts=net.parts)
    model = Classifier(net, whitener, 3)
    model.head.data.normal_(generator=generator)
    return model


@pytest.mark.parametrize(("layers", "filters", "views"), [(1, 5, 1), (1, 401, 3), (2, 5, 3), (2, 401, 1)])
def test_closed_form_gradients_equal_automatic_ones_and_treat_each_example_alone(layers, filters, views):
    model = classifier(filters, layers)
    images, labels = random_images(4 * views).view(4, views, 3, 32, 32), torch.tensor([0, 2, 1, 2])
    fast = per_example_gradients(model, images, labels)
    assert fast.keys() == dict(model.named_parameters()).keys()
    for index in range(4):
        model.zero_grad()
        scores = model(PatchNet.normalise(images[index]))
        functional.cross_entropy(scores, labels[index].expand(views)).backward()
        for name, parameter in model.named_parameters():
            largest = float(parameter.grad.abs().max())
            assert largest > 0
            # a response within rounding of the threshold counts here and not there
            torch.testing.assert_close(fast[name][index], parameter.grad, rtol=1e-3, atol=max(1e-6, 1e-3 * largest))
    images[1] = 255 - images[1]
    after = per_example_gradients(model, images, torch.tensor([0, 1, 1, 2]))
    for name in fast:
        assert (fast[name][1] - after[name][1]).abs().max() > 0
        torch.testing.assert_close(fast[name][[0, 2, 3]], after[name][[0, 2, 3]], rtol=0, atol=1e-7)


@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("count", [0, 1, 2, 4])
def test_fewer_images_than_threads_give_the_same_rows(monkeypatch, layers, count):
    """A Poisson batch leaves one image over, and `predict` has one: no thread may ask for what is not there."""
    model = classifier(7, layers)
    net, images = model.extractor, random_images(count)
    alone = torch.cat([torch.zeros(0, net.feature_dim), *(net.extract(one[None]) for one in images)])
    set_threads(monkeypatch, 3)
    torch.testing.assert_close(net.extract(images), alone)
    gradients = per_example_gradients(model, images[:, None], torch.zeros(count, dtype=torch.int64))
    assert {len(rows) for rows in gradients.values()} == {count}
