"""The extractors behind one interface, extraction in batches, and the classifier's isolation of examples."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.nn import functional

from dprandp.config.schema import PretrainConfig
from dprandp.errors import CheckpointError, UsageError
from dprandp.models.classifier import Classifier
from dprandp.models.extractor import build_extractor, extract, first_filters, load_weights
from dprandp.models.whitening import PooledOnly, Whitener
from dprandp.models.wrn import LAYER_ORDERS
from dprandp.privacy.clipping import per_example_gradients

pytestmark = pytest.mark.usefixtures("one_thread")
ARCHITECTURES = ["patchnet", "two-layer", "wrn-10-1", "vit-1-16-16"]
TWO_LAYERS = {"arch": "patchnet", "layers": 2, "second_filters": 12}


def network(arch, seed=0, **options):
    named = TWO_LAYERS if arch == "two-layer" else {"arch": arch}
    config = PretrainConfig(**({"filters": 20, "layers": 1} | named | options))
    return build_extractor(config, torch.Generator().manual_seed(seed)).eval()


def images(count, seed=0):
    return torch.from_numpy(np.random.default_rng(seed).integers(0, 256, (count, 3, 32, 32), dtype=np.uint8))


@torch.no_grad()
def features_one_by_one(net, batch, mirror):
    rows = []
    for image in batch:
        row = net.features(net.normalise(image[None]))[0]
        if mirror:
            row = (row + net.features(net.normalise(torch.flip(image, [2])[None]))[0]) / 2
        rows.append(row)
    return torch.stack(rows)


# ------------------------------------------------------------------------------------------------------------ building


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_an_extractor_is_the_generators_and_keeps_the_interface(arch):
    first, again, other = network(arch, 1), network(arch, 1), network(arch, 2)
    for name, tensor in first.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name])
    assert any(not torch.equal(tensor, other.state_dict()[name]) for name, tensor in first.state_dict().items())
    features = first.features(first.normalise(images(2)))
    assert features.shape == (2, first.feature_dim)
    assert features.requires_grad
    assert features.std() > 0


@pytest.mark.parametrize(
    ("arch", "named"),
    [("resnet-18", "'resnet-18'"), ("", "''"), ("patch-net", "'patch-net'"), ("wrn", "'wrn'"), ("wrn-11-2", "depth 11"),
     ("wrn-16-0", "width 0"), ("wrn-16-4-2", "'wrn-16-4-2'")],
)  # fmt: skip
def test_an_unknown_architecture_is_refused_by_name(arch, named):
    with pytest.raises(UsageError) as caught:
        build_extractor(PretrainConfig(arch=arch))
    assert named in caught.value.problem
    assert caught.value.fix


@pytest.mark.parametrize(("patch_size", "stride"), [(32, 1), (31, 2), (6, 27)])
def test_patches_that_do_not_fill_the_grid_are_refused(patch_size, stride):
    """A region without patches would be an average of nothing: NaN. The largest that fit give finite features."""
    with pytest.raises(UsageError, match=f"patch_size = {patch_size} with stride = {stride}"):
        network("patchnet", patch_size=patch_size, stride=stride)
    for fitting in ({"patch_size": 31}, {"patch_size": 6, "stride": 26}, {"patch_size": 30, "stride": 2}):
        assert extract(network("patchnet", **fitting), images(2), mirror=False).isfinite().all()


def test_two_layers_need_a_larger_image():
    with pytest.raises(UsageError, match=r"patch_size = 25 .* after two layers") as caught:
        network("two-layer", patch_size=25)
    assert "one layer" in caught.value.fix
    assert extract(network("two-layer", patch_size=24), images(2), mirror=False).isfinite().all()


# ---------------------------------------------------------------------------------------------------------- extraction


@pytest.mark.parametrize("mirror", [False, True])
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_extract_equals_features_one_by_one_for_any_batch_size(arch, mirror):
    net, batch = network(arch), images(7)
    expected = features_one_by_one(net, batch, mirror)
    for batch_size in (1, 3, 256):
        got = extract(net, batch, mirror=mirror, batch_size=batch_size)
        assert got.dtype == torch.float32
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    assert (got - features_one_by_one(net, batch, not mirror)).abs().max() > 1e-2  # the mirror image does count
    turned = extract(net, batch.flip(-1), mirror=mirror)
    assert torch.allclose(got, turned, rtol=1e-3, atol=1e-4) == mirror


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_extract_treats_each_image_alone(arch):
    net, batch = network(arch), images(6)
    changed = batch.clone()
    changed[3] = 255 - changed[3]
    moved = (extract(net, batch, mirror=True) - extract(net, changed, mirror=True)).abs().amax(dim=1)
    assert moved[3] > 1e-3
    assert moved[[0, 1, 2, 4, 5]].max() == 0


def test_after_and_progress_are_called_batch_by_batch():
    net, batch, counts = network("patchnet"), images(7), []

    def after(features):
        return features[:, :2].sum(dim=1, keepdim=True)

    got = extract(net, batch, mirror=False, batch_size=3, after=after, on_batch=counts.append)
    assert counts == [3, 3, 1]
    torch.testing.assert_close(got, after(extract(net, batch, mirror=False)))
    assert not got.requires_grad
    assert extract(net, images(0), mirror=True).shape == (0, net.feature_dim)
    assert extract(net, images(0), mirror=True, after=after).shape == (0, 1)
    with pytest.raises(ValueError, match=r"\(3, 28, 28\), expected \(3, 32, 32\)"):
        extract(net, images(2)[:, :, :28, :28], mirror=False)


# ------------------------------------------------------------------------------------------------------------- weights


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_weights_survive_a_round_trip(arch):
    source, target = network(arch, 1), network(arch, 2)
    load_weights(target, source.state_dict())
    assert torch.equal(extract(source, images(2), mirror=False), extract(target, images(2), mirror=False))


def test_weights_that_do_not_fit_are_refused_naming_every_tensor():
    net = network("patchnet")
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    own = net.state_dict()
    cases = [
        ({name: own[name] for name in own.keys() - {"bias"}}, ["bias: missing"]),
        ({**own, "gain": torch.ones(1)}, ["gain: unknown"]),
        ({**own, "weight": torch.zeros(21, 64), "bias": torch.zeros(21)},
         ["bias: (21,) instead of (20,)", "weight: (21, 64) instead of (20, 64)"]),
        ({**own, "weight": net.weight.data.half()}, ["weight: torch.float16 instead of torch.float32"]),
        ({}, ["basis: missing", "bias: missing", "centre: missing", "weight: missing"]),
    ]  # fmt: skip
    for tensors, named in cases:
        with pytest.raises(CheckpointError) as caught:
            load_weights(net, tensors)
        assert caught.value.problem.endswith("; ".join(named))
        for name, tensor in net.state_dict().items():
            assert torch.equal(tensor, before[name])  # nothing was half-loaded


def test_a_wrn_does_not_take_another_ones_weights():
    with pytest.raises(CheckpointError, match=r"stem\.gain: unknown"):
        load_weights(network("wrn-10-1", weight_standardisation=False), network("wrn-10-1").state_dict())


# ---------------------------------------------------------------------------------------------------------- classifier


def classifier(arch, whiten=True, classes=4, **options):
    net = network(arch, **options)
    whitener = Whitener(net.feature_dim, 12, net.parts) if whiten else PooledOnly(net.feature_dim)
    if whiten:
        whitener.projection.normal_(generator=torch.Generator().manual_seed(7))
    model = Classifier(net, whitener, classes)
    model.head.data.normal_(generator=torch.Generator().manual_seed(8))
    return model


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_scores_are_whitened_features_times_the_head(arch):
    model, batch = classifier(arch), images(4)
    centred, start, parts = features_one_by_one(model.extractor, batch, True) - model.whitener.mean, 0, []
    for width, share in model.extractor.parts:
        own = slice(start, start + width)
        whitened = centred[:, own] @ model.whitener.projection[own]
        parts.append(share**0.5 * whitened / whitened.norm(dim=1, keepdim=True))
        start += width
    assert start == model.extractor.feature_dim
    assert Classifier(model.extractor, model.whitener, 5).head.eq(0).all()  # at the start
    expected = torch.cat(parts, dim=1) @ model.head.detach()
    torch.testing.assert_close(model.predict(batch, mirror=True), expected, rtol=1e-4, atol=1e-5)
    plain = model(model.extractor.normalise(batch)).detach()
    torch.testing.assert_close(model.predict(batch, mirror=False), plain, rtol=1e-4, atol=1e-5)


def examples_that_move_score(model, batch, index):
    """Indices of the images on which the scores of image ``index`` depend, by their gradient."""
    pixels = model.extractor.normalise(batch).requires_grad_()
    model(pixels)[index].square().sum().backward()
    return pixels.grad.flatten(1).abs().amax(dim=1).nonzero().flatten().tolist()


@pytest.mark.parametrize("whiten", [True, False])
@pytest.mark.parametrize(
    ("arch", "options"),
    [("patchnet", {}), ("two-layer", {}), ("vit-1-16-16", {}), ("wrn-10-1", {"weight_standardisation": False})]
    + [("wrn-10-1", {"layer_order": order}) for order in LAYER_ORDERS],
)
def test_an_examples_scores_depend_on_its_own_pixels_alone(arch, options, whiten):
    assert examples_that_move_score(classifier(arch, whiten, **options).train(), images(4), 2) == [2]


def test_a_layer_that_mixes_examples_would_be_noticed():
    model = classifier("wrn-10-1")
    model.extractor.final_norm = nn.BatchNorm2d(64)
    assert examples_that_move_score(model.train(), images(4), 2) == [0, 1, 2, 3]


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_per_example_gradients_of_the_whole_model_are_isolated(arch):
    """Example i's gradient keeps its bytes when example j changes, and equals plain backpropagation of i alone."""
    model = classifier(arch)
    parameters = {name: tensor.detach() for name, tensor in model.named_parameters()}
    buffers = dict(model.named_buffers())

    def loss(parameters, views, label):
        scores = functional_call(model, {**parameters, **buffers}, (model.extractor.normalise(views),))
        return functional.cross_entropy(scores, label.expand(len(views)))

    batch, labels = images(8).view(4, 2, 3, 32, 32), torch.tensor([0, 1, 2, 3])  # four examples of two views
    changed = batch.clone()
    changed[1] = 255 - changed[1]
    first, second = (next(per_example_gradients(loss, parameters, x, labels, 4)) for x in (batch, changed))
    moved = torch.stack([(first[name] - second[name]).flatten(1).abs().amax(dim=1) for name in parameters]).amax(dim=0)
    assert moved[1] > 1e-4
    assert moved[[0, 2, 3]].max() == 0
    for index in range(4):
        model.zero_grad()
        scores = model(model.extractor.normalise(batch[index]))
        functional.cross_entropy(scores, labels[index].expand(2)).backward()
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(first[name][index], parameter.grad, rtol=2e-3, atol=2e-5)


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["patchnet", "wrn-10-1", "vit-1-16-16", "nf-resnet-50", "torchvision:resnet18"])
def test_the_first_filters_of_every_network_are_patches_or_none(arch: str) -> None:
    """Of a convolution they are its weights; a network whose first layer sees other numbers than pixels has none."""
    config = PretrainConfig(**{"filters": 8, "layers": 1, "arch": arch, "random_init": True})
    network = build_extractor(config, torch.Generator().manual_seed(0))
    filters = first_filters(network)
    assert (filters.ndim, filters.shape[1], filters.requires_grad) == (4, 3, False)
    first = next((each for each in network.modules() if isinstance(each, torch.nn.Conv2d)), None)
    if first is not None:
        assert torch.equal(filters, first.weight)
    assert first_filters(torch.nn.Sequential(torch.nn.Linear(7, 3))) is None
    assert first_filters(torch.nn.Sequential(torch.nn.Conv2d(1, 3, 5))) is None
    assert first_filters(torch.nn.Sequential(torch.nn.Conv2d(3, 3, (1, 4)))) is None
