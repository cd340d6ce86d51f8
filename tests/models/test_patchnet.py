"""PatchNet, its dictionary, and the whitening, each against a slow and obvious computation."""

import math

import numpy as np
import pytest
import torch
from region_weights import weights_by_hand
from torch.func import functional_call, grad, vmap
from torch.nn import functional

from dprandp.config.schema import PretrainConfig
from dprandp.models import dictionary, whitening
from dprandp.models.classifier import Classifier
from dprandp.models.extractor import build_extractor
from dprandp.models.patchnet import CONTRAST_FLOOR, ROOT_FLOOR, PatchNet, normalise_patches
from dprandp.models.per_example.patchnet import per_example_gradients


def random_net(filters=10, **options):
    generator = torch.Generator().manual_seed(0)
    net = PatchNet(filters, **options)
    net.weight.data.normal_(generator=generator)
    net.bias.data.normal_(generator=generator)
    net.basis.normal_(std=0.2, generator=generator)
    net.centre.normal_(generator=generator)
    return net


def random_images(count, size=32, seed=1):
    return torch.from_numpy(np.random.default_rng(seed).integers(0, 256, (count, 3, size, size), dtype=np.uint8))


def features_by_loops(net, image):
    """One uint8 image [3, H, W] -> features, patch by patch and filter by filter, in float64."""
    x = image.double().numpy() / 255
    p, s = net.patch_size, net.stride
    positions = (x.shape[1] - p) // s + 1
    weight, bias, basis, centre = (
        t.detach().double().numpy() for t in (net.weight, net.bias, net.basis, net.centre)
    )
    weights = weights_by_hand(positions)
    means = np.zeros((2, len(weights), len(weight)))
    for row in range(positions):
        for column in range(positions):
            patch = x[:, row * s : row * s + p, column * s : column * s + p].reshape(-1)
            patch = basis @ ((patch - patch.mean()) / (patch.std() + CONTRAST_FLOOR)) - centre
            for index, (w, b) in enumerate(zip(weight, bias, strict=True)):
                response = w @ patch + b
                for region in range(len(weights)):
                    means[0, region, index] += weights[region, row, column] * max(response - net.threshold, 0)
                    means[1, region, index] += weights[region, row, column] * max(-response - net.threshold, 0)
    return np.sqrt(means + ROOT_FLOOR).reshape(-1)


@pytest.mark.parametrize("options", [{}, {"stride": 2, "patch_dims": 20}, {"patch_size": 8, "threshold": 0.5}])
def test_features_equal_the_loops(options):
    net, images = random_net(**options), random_images(2)
    expected = np.stack([features_by_loops(net, image) for image in images])
    assert expected.std() > 0.1  # the filters do answer: equality to zero would prove nothing
    np.testing.assert_allclose(net.features(net.normalise(images)).detach().numpy(), expected, rtol=2e-4, atol=2e-5)


@pytest.mark.parametrize("filters", [7, 400, 401])
@pytest.mark.parametrize("threads", [1, 2])
def test_extract_equals_features_for_any_tile_and_thread_count(filters, threads):
    net, images = random_net(filters), random_images(5)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        fast = net.extract(images)
        assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    torch.testing.assert_close(fast, net.features(net.normalise(images)).detach(), rtol=1e-4, atol=1e-5)


def test_extract_treats_each_image_alone():
    net, images = random_net(50), random_images(6)
    changed = images.clone()
    changed[3] = 255 - changed[3]
    difference = (net.extract(images) - net.extract(changed)).abs().amax(dim=1)
    assert difference[3] > 0
    assert difference[[0, 1, 2, 4, 5]].eq(0).all()


def test_per_example_gradients_by_vmap_equal_a_loop():
    net, images = random_net(6), PatchNet.normalise(random_images(3))
    parameters = {name: value.detach() for name, value in net.named_parameters()}

    def loss(parameters, image):
        return functional_call(net, parameters, (image[None],)).square().sum()

    net.forward = net.features
    fast = vmap(grad(loss), in_dims=(None, 0))(parameters, images)
    for index in range(len(images)):
        slow = grad(loss)(parameters, images[index])
        for name in slow:
            assert slow[name].abs().max() > 0
            torch.testing.assert_close(fast[name][index], slow[name], rtol=1e-4, atol=1e-5)


def test_flat_patches_have_finite_gradients():
    net = random_net(4)
    net.features(torch.full((1, 3, 32, 32), 0.5)).sum().backward()
    assert net.weight.grad.isfinite().all()


# -------------------------------------------------------------------------------------------------------- dictionary


def test_sampled_patches_are_patches_of_the_images():
    images = random_images(3, size=9)
    patches = dictionary.sample_patches(images, 40, 4, torch.Generator().manual_seed(0))
    every = normalise_patches(functional.unfold(images.float() / 255, 4)).transpose(1, 2).reshape(-1, 48)
    assert patches.shape == (40, 48)
    distances = (patches[:, None] - every[None]).abs().amax(dim=2)
    assert distances.min(dim=1).values.max() < 1e-5 < distances.median()


@pytest.mark.parametrize("dims", [12, 5])
def test_whitened_patches_are_white_up_to_the_floor(dims):
    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(12, 12, generator=generator)
    vectors = torch.randn(20_000, 12, generator=generator) @ mixing + 3
    basis, centre = dictionary.whitening(vectors, dims)
    white = (vectors @ basis.T - centre).double()
    torch.testing.assert_close(white.mean(dim=0), torch.zeros(dims, dtype=torch.float64), rtol=0, atol=1e-3)
    eigenvalues = torch.linalg.eigvalsh(vectors.T.cov(correction=0).double()).flip(0)[:dims]
    expected = torch.diag(eigenvalues / (eigenvalues + dictionary.PATCH_FLOOR))
    torch.testing.assert_close(white.T.cov(correction=0), expected, rtol=1e-3, atol=1e-3)


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


# --------------------------------------------------------------------------------------------------------- whitening


def correlated_features(count, width, seed=0):
    generator = torch.Generator().manual_seed(seed)
    scales = torch.logspace(1, -1, width)
    mixing = torch.randn(width, width, generator=generator)
    return (torch.randn(count, width, generator=generator) * scales) @ mixing + 5


@pytest.mark.parametrize(("count", "width"), [(400, 30), (40, 90)])
def test_whitener_equals_an_svd(count, width):
    features, dims = correlated_features(count, width), 20
    whitener = whitening.fit(features.clone(), dims, floor=0.1)
    x = features.double()
    mean, deviation = x.mean(0), x.std(0, correction=0)
    standard = (x - mean) / (deviation + whitening.DEVIATION_FLOOR * deviation.mean())
    _, s, v = torch.linalg.svd(standard, full_matrices=False)
    expected = standard @ (v[:dims].T / (s[:dims] / math.sqrt(count) + 0.1))
    expected = functional.normalize(expected, dim=1)
    got = whitener(features).double()
    torch.testing.assert_close(got.norm(dim=1), torch.ones(count, dtype=torch.float64), rtol=1e-4, atol=1e-4)
    # components are unique up to sign: inner products between images are what must agree
    torch.testing.assert_close(got @ got.T, expected @ expected.T, rtol=2e-3, atol=2e-3)


def test_whitener_is_a_function_of_one_image():
    whitener = whitening.fit(correlated_features(200, 10), 5)
    other = correlated_features(7, 10, seed=1)
    torch.testing.assert_close(whitener(other)[3], whitener(other[3:4])[0])


def test_whitener_keeps_no_more_dimensions_than_there_are():
    assert whitening.fit(correlated_features(9, 30), 100).dims == 8


PARTS = (whitening.Part(10, 0.6), whitening.Part(20, 0.4))


def test_parts_are_whitened_apart_and_put_side_by_side():
    features, other = correlated_features(200, 30), correlated_features(7, 30, seed=1)
    whitener = whitening.fit(features.clone(), 8, parts=PARTS)
    apart = [whitening.fit(features[:, own].clone(), 8) for own in (slice(10), slice(10, 30))]
    expected = torch.cat(
        [math.sqrt(0.6) * apart[0](other[:, :10]), math.sqrt(0.4) * apart[1](other[:, 10:])], dim=1
    )
    assert (whitener.components, whitener.dims) == (8, 16)
    torch.testing.assert_close(whitener(other), expected)
    torch.testing.assert_close(whitener(other).norm(dim=1), torch.ones(7))
    together = whitening.fit(features.clone(), 16)(other)
    assert (whitener(other) @ whitener(other).T - together @ together.T).abs().max() > 0.05


def test_no_part_keeps_more_axes_than_the_smallest_has():
    assert whitening.fit(correlated_features(200, 30), 25, parts=PARTS).components == 10


@pytest.mark.parametrize("parts", [None, PARTS])
def test_cut_features_are_those_of_a_whitener_of_fewer_axes(parts):
    features, other = correlated_features(200, 30), correlated_features(7, 30, seed=1)
    many, few = (whitening.fit(features.clone(), components, parts=parts) for components in (9, 4))
    torch.testing.assert_close(many.cut(many(other), 4), few(other))
    assert many.cut(many(other), 9).equal(many(other))


def test_a_feature_that_never_moves_stays_finite():
    features = correlated_features(100, 6)
    features[:, 2] = 1.0
    assert whitening.fit(features.clone(), 4)(features).isfinite().all()


# -------------------------------------------------------------------------------------------- closed-form gradients


def two_layers(filters):
    config = PretrainConfig(filters=filters, layers=2, second_filters=filters + 1)
    return build_extractor(config, torch.Generator().manual_seed(3))


def small_classifier(filters, made=random_net):
    net = made(filters)
    generator = torch.Generator().manual_seed(5)
    whitener = whitening.fit(torch.rand(60, net.feature_dim, generator=generator), 12, parts=net.parts)
    model = Classifier(net, whitener, 3)
    model.head.data.normal_(generator=generator)
    return model


@pytest.mark.parametrize("views", [1, 3])
@pytest.mark.parametrize("made", [random_net, two_layers])
@pytest.mark.parametrize("filters", [5, 401])
def test_closed_form_gradients_equal_automatic_ones(views, filters, made):
    model = small_classifier(filters, made)
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


@pytest.mark.parametrize("made", [random_net, two_layers])
def test_closed_form_gradients_treat_each_example_alone(made):
    model = small_classifier(20, made)
    images, labels = random_images(4).view(4, 1, 3, 32, 32), torch.tensor([0, 2, 1, 2])
    before = per_example_gradients(model, images, labels)
    images[1] = 255 - images[1]
    after = per_example_gradients(model, images, torch.tensor([0, 1, 1, 2]))
    for name in before:
        assert (before[name][1] - after[name][1]).abs().max() > 0
        for other in (0, 2, 3):
            torch.testing.assert_close(before[name][other], after[name][other], rtol=0, atol=1e-7)


@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("count", [0, 1, 2, 3, 4])
def test_fewer_images_than_threads_give_the_same_rows(monkeypatch, layers, count):
    """A Poisson batch leaves one image over, and `predict` has one: no thread may ask for what is not there."""
    net = PatchNet(10) if layers == 1 else build_extractor(PretrainConfig(filters=10, layers=2, second_filters=7))
    for parameter in net.parameters():
        parameter.data.normal_(generator=torch.Generator().manual_seed(0))
    images = random_images(count)
    alone = torch.cat([torch.zeros(0, net.feature_dim), *(net.extract(one[None]) for one in images)])
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    monkeypatch.setattr(torch, "set_num_threads", lambda threads: None)
    torch.testing.assert_close(net.extract(images), alone)
    classifier = Classifier(net, whitening.Whitener(net.feature_dim, 4, net.parts), 3)
    labels = torch.zeros(count, dtype=torch.int64)
    gradients = per_example_gradients(classifier, images[:, None], labels)
    assert {len(rows) for rows in gradients.values()} == {count}
