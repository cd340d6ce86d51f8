"""Per-example gradients of a WideResNet, layer by layer, against a loop over single views in float64."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from dprandp.models import wrn
from dprandp.models.classifier import Classifier
from dprandp.models.whitening import Whitener
from dprandp.models.wrn import LAYER_ORDERS, WideResNet, WrnGradients, has_layer_gradients

CLASSES = 4
PATHS = ["together", "by patches", "by the library"]


def model_of(
    standardised: bool = True, order: str = "relu-norm-conv", pooling: str = "1+4", earlier: tuple[str, ...] = (),
    padding: str = "symmetric",
) -> Classifier:
    """Random weights, gains, shifts, whitener and head; one filter without any deviation, one with very little."""
    generator = torch.Generator().manual_seed(1)
    extractor = WideResNet(
        10, 1, weight_standardisation=standardised, layer_order=order, pooling=pooling, earlier=earlier,
        padding=padding, generator=generator,
    )  # fmt: skip
    for name, value in extractor.named_parameters():
        if value.ndim == 1:
            value.data.add_(torch.randn(value.shape, generator=generator), alpha=0.3)
        elif name.endswith("conv1.weight"):
            value.data[0], value.data[1] = 0.2, value.data[1] * 1e-4
    whitener = Whitener(extractor.feature_dim, 12, extractor.parts)
    whitener.projection.normal_(generator=generator)
    model = Classifier(extractor, whitener, CLASSES)
    model.head.data.normal_(generator=generator)
    return model


def records(count: int, views: int, size: int = 12) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)
    made = torch.randint(0, 256, (count, views, 3, size, size), dtype=torch.uint8, generator=generator)
    return made, torch.randint(CLASSES, (count,), generator=generator)


def by_loop(model: Classifier, views: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """Autograd, one view at a time, in float64."""
    model = copy.deepcopy(model).double()
    found: dict[str, list[Tensor]] = {name: [] for name, _ in model.named_parameters()}
    for own, label in zip(views, labels, strict=True):
        model.zero_grad()
        for view in own:
            scores = model(model.extractor.normalise(view[None]).double())
            (functional.cross_entropy(scores, label[None]) / len(own)).backward()
        for name, value in model.named_parameters():
            found[name].append(value.grad.clone())
    return {name: torch.stack(rows) for name, rows in found.items()}


def apart(left: dict[str, Tensor], right: dict[str, Tensor]) -> Tensor:
    """Distance of each record's gradients, relative to the joint norm of the right."""
    assert left.keys() == right.keys()

    def lengths(rows: list[Tensor]) -> Tensor:
        return torch.stack([row.double().flatten(1).square().sum(1) for row in rows]).sum(0).sqrt()

    return lengths([left[name] - right[name] for name in right]) / lengths(list(right.values()))


def gradients_by(path: str, model: Classifier, monkeypatch: pytest.MonkeyPatch, **settings) -> WrnGradients:
    monkeypatch.setattr(wrn, "PATCH_BYTES", 20_000 if path == "by patches" else 0)
    return WrnGradients(model, together=path == "together", **settings)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(("count", "views", "standardised"), [(5, 1, True), (1, 3, True), (2, 3, False)])
def test_every_path_equals_a_loop_over_single_views(
    path: str, count: int, views: int, standardised: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, (images, labels) = model_of(standardised), records(count, views)
    expected = by_loop(model, images, labels)
    found = gradients_by(path, model, monkeypatch).of(images, labels)
    assert {name: value.shape for name, value in found.items()} == {n: v.shape for n, v in expected.items()}
    assert all(value.dtype == torch.float32 for value in found.values())
    assert apart(found, expected).max() < 1e-4
    for name, value in expected.items():  # also where a part of the parameters is a small part of the norm
        assert (found[name] - value).norm() < 2e-3 * value.norm() + 1e-6
    swapped = {name: value.flip(0) for name, value in expected.items()}
    assert count == 1 or apart(found, swapped).max() > 0.1  # what it is compared with could tell records apart


@pytest.mark.parametrize(("order", "padding"), list(zip(LAYER_ORDERS, ["same", *["symmetric"] * 3], strict=True)))
def test_every_order_of_layers_and_padding(order: str, padding: str) -> None:
    model, (images, labels) = model_of(order=order, padding=padding, pooling="4"), records(2, 2, size=13)
    assert apart(WrnGradients(model).of(images, labels), by_loop(model, images, labels)).max() < 1e-4


@pytest.mark.parametrize("threads", [1, 2])
def test_threads_and_earlier_calls_change_nothing(threads: int) -> None:
    model, (images, labels) = model_of(), records(7, 4)
    expected = by_loop(model, images, labels)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        made = WrnGradients(model)
        for rows in (slice(0, 2), slice(0, 7), slice(3, 6), slice(2, 2)):
            found = made.of(images[rows], labels[rows])
            assert len(found["head"]) == len(images[rows])
            assert apart(found, {name: value[rows] for name, value in expected.items()}).lt(1e-4).all()
    finally:
        torch.set_num_threads(before)


def test_parameters_are_taken_anew_by_refresh_and_the_head_alone_may_be_asked_for() -> None:
    model, (images, labels) = model_of(), records(3, 2)
    made = WrnGradients(model)
    for value in model.parameters():
        value.data.mul_(1.5)
    made.refresh()
    expected = by_loop(model, images, labels)
    assert apart(made.of(images, labels), expected).max() < 1e-4
    found = WrnGradients(model, trained={"head"}).of(images, labels)
    assert found.keys() == {"head"}
    assert apart(found, {"head": expected["head"]}).max() < 1e-4


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("first", [0, 2])
def test_frozen_blocks_get_none_and_change_no_other(first: int, path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A block in the middle is frozen, or everything before the second block is and its outputs are given."""
    model, (images, labels) = model_of(), records(3, 2)
    units = model.extractor.units()
    frozen = tuple(f"extractor.{name}." for name, _ in (units[:first] or units[2:3]))
    names = {name for name, _ in model.named_parameters() if not name.startswith(frozen)}
    expected = {name: value for name, value in by_loop(model, images, labels).items() if name in names}
    given = images
    if first:
        with torch.no_grad():
            x = model.extractor.normalise(images.flatten(0, 1))
            for _, unit in units[:first]:
                x = unit(x)
        given = x.unflatten(0, images.shape[:2])
    found = gradients_by(path, model, monkeypatch, first=first, trained=names).of(given, labels)
    assert apart(found, expected).max() < 1e-4


@pytest.mark.parametrize("path", PATHS)
def test_an_infinite_record_spoils_no_other(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, (images, labels) = model_of(), records(5, 2)
    images = images.clamp(max=254)
    expected = gradients_by(path, model, monkeypatch).of(images, labels)
    expected = {name: value.clone() for name, value in expected.items()}
    images[3, 1, :, 2, 3] = 255
    plain = WideResNet.normalise
    to_infinity = staticmethod(lambda x: torch.where(x == 255, math.inf, plain(x)))
    monkeypatch.setattr(WideResNet, "normalise", to_infinity)
    found = gradients_by(path, model, monkeypatch).of(images, labels)
    assert not found["head"][3].isfinite().any()
    assert not found["extractor.blocks.1.conv1.weight"][3].isfinite().any()
    others = [0, 1, 2, 4]
    assert apart(*({name: value[others] for name, value in each.items()} for each in (found, expected))).max() < 1e-5


@pytest.mark.parametrize("path", PATHS)
def test_bfloat16_is_near_and_gives_float32(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, (images, labels) = model_of(), records(2, 2)
    model.extractor.precision = "bfloat16"
    found = gradients_by(path, model, monkeypatch).of(images, labels)
    assert all(value.dtype == torch.float32 for value in found.values())
    distance = apart(found, by_loop(model, images, labels)).max()
    assert 1e-4 < distance < 0.2


def test_other_networks_have_no_layer_gradients() -> None:
    model = model_of()
    assert has_layer_gradients(model.extractor)
    model.extractor.blocks.append(torch.nn.PReLU())
    assert not has_layer_gradients(model.extractor)
    assert not has_layer_gradients(torch.nn.Conv2d(3, 4, 3))


@pytest.mark.parametrize("path", PATHS)
def test_features_of_earlier_stages(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a block's norm gives goes two ways then, to the next convolution and to the features."""
    model, (images, labels) = model_of(earlier=("1+4", "1")), records(3, 2)
    assert has_layer_gradients(model.extractor)
    found = gradients_by(path, model, monkeypatch).of(images, labels)
    assert apart(found, by_loop(model, images, labels)).max() < 1e-4
