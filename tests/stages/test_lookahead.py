"""DP-SAT and DiSK: where gradients are taken, that a record's two gradients are clipped as one, and σ stays."""

from __future__ import annotations

import math

import pytest
import torch
from tiny_run import CLASSES, blobs
from torch import Tensor

from dprandp.config import PretrainConfig, build
from dprandp.privacy.clipping import per_example_gradients
from dprandp.stages.clipped_sums import Batch, ClippedSums, SumSettings, loss_function
from dprandp.stages.lookahead import Ahead, Kalman, Plain, Sharpness, make_lookahead
from dprandp.vision.classifier import Classifier
from dprandp.vision.extractors import build_extractor
from dprandp.vision.images import to_input
from dprandp.vision.whitening import Whitener

CLIP = 0.3


def points(seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {"a": torch.randn(3, 2, generator=generator), "b": torch.randn(4, generator=generator)}


def test_sharpness_looks_along_the_previous_noisy_gradient():
    sharpness, start = Sharpness(0.5, points(0)), points(0)
    assert sharpness.points(start) == (start, None)  # there is no previous gradient yet
    noisy = points(1)
    assert sharpness.filtered(noisy) is noisy
    moved, second = sharpness.points(start)
    assert second is None
    norm = math.sqrt(sum(float(value.square().sum()) for value in noisy.values()))
    for name, value in start.items():
        assert torch.allclose(moved[name] - value, 0.5 * noisy[name] / norm, atol=1e-6)
    assert torch.equal(start["a"], points(0)["a"])


@pytest.mark.parametrize("reach", [0.5, 3 / 7])  # with γ = (1 − κ)/κ one gradient is enough
def test_the_filter_is_kalmans_where_gradients_are_linear(reach: float):
    """∇f(x) = H x: then the combined gradient makes g ← (1 − κ)(g + H d) + κ H x, prediction and correction."""
    kappa, generator = 0.7, torch.Generator().manual_seed(0)
    curvature = torch.randn(4, 4, generator=generator, dtype=torch.float64)
    value = torch.randn(4, generator=generator, dtype=torch.float64)
    kalman = Kalman(kappa, reach, {"x": value})
    assert kalman.passes == (1 if reach == 3 / 7 else 2)
    estimate, move = None, None
    for _ in range(5):
        here, ahead = kalman.points({"x": value})
        gradient = curvature @ here["x"]
        if ahead is not None:
            gradient = (1 - ahead.weight) * gradient + ahead.weight * curvature @ ahead.parameters["x"]
        found = kalman.filtered({"x": gradient})["x"]
        true = curvature @ value
        estimate = true if estimate is None else (1 - kappa) * (estimate + curvature @ move) + kappa * true
        assert torch.allclose(found, estimate)
        before = value.clone()
        value = value - 0.1 * found
        move = value - before
        kalman.moved({"x": before}, {"x": value})


@pytest.mark.parametrize("make", [lambda p: Sharpness(0.3, p), lambda p: Kalman(0.7, 0.5, p)])
def test_a_saved_state_goes_on(make):
    def run(steps: range, lookahead: Plain) -> Tensor:
        for step in steps:
            lookahead.filtered(points(step))
            if lookahead.follows_moves:
                lookahead.moved(points(step), points(step + 1))
        here, ahead = lookahead.points(points(99))
        return (here if ahead is None else ahead.parameters)["a"]

    first = make(points(0))
    run(range(3), first)
    second = make(points(0))
    second.load_state({name: value.clone() for name, value in first.state.items()} | {"ema.a": torch.ones(2)})
    assert torch.equal(run(range(3, 5), second), run(range(5), make(points(0))))
    assert not torch.equal(run(range(3, 5), make(points(0))), points(99)["a"])


def test_a_configuration_makes_one_or_none():
    made = [make_lookahead(build("finetune", given), {}) for given in ({}, {"sharpness": 0.1}, {"kalman": 0.6})]
    assert [type(each) for each in made] == [Plain, Sharpness, Kalman]
    assert "DP-SAT" in made[1].in_words()
    assert "DiSK" in made[2].in_words()
    assert "-0.333 and 1.33" in made[2].in_words()


# ------------------------------------------------------------------------------------------- one gradient per record


@pytest.fixture(scope="module")
def model() -> Classifier:
    generator = torch.Generator().manual_seed(1)
    extractor = build_extractor(PretrainConfig(arch="patchnet", filters=16), generator)
    whitener = Whitener(extractor.feature_dim, 20, extractor.parts)
    whitener.projection.normal_(generator=generator)
    model = Classifier(extractor, whitener, CLASSES)
    model.head.data.normal_(generator=generator)
    return model


def batch(count: int) -> Batch:
    made = blobs(3)
    labels = torch.from_numpy(made["y_train"][:count])
    return Batch(to_input(made["x_train"][:count]), labels, torch.arange(count))


def sums_of(model: Classifier, **settings) -> ClippedSums:
    given = {"scale": 1.0, "views": 1, "seed": 0, "flip": False, "clip_norm": CLIP} | settings
    return ClippedSums(model, SumSettings(**given))


def two_points(model: Classifier) -> tuple[dict[str, Tensor], Ahead]:
    here = {name: value.detach().clone() for name, value in model.named_parameters()}
    generator = torch.Generator().manual_seed(5)
    there = {name: value + 0.05 * torch.randn(value.shape, generator=generator) for name, value in here.items()}
    return here, Ahead(1.6, there)


@pytest.mark.parametrize("microbatch", [None, 1, 2])
def test_a_records_two_gradients_are_combined_then_clipped(model: Classifier, microbatch: int | None):
    here, ahead = two_points(model)
    found = sums_of(model, microbatch=microbatch).of(here, 0, batch(5), ahead=ahead)
    model.load_state_dict(here, strict=False)
    loss, given = loss_function(model, 1.0, torch.device("cpu")), batch(5)
    total, apart = dict.fromkeys(here, 0.0), dict.fromkeys(here, 0.0)
    for one, other in zip(
        per_example_gradients(loss, here, given.images[:, None], given.labels, 1),
        per_example_gradients(loss, ahead.parameters, given.images[:, None], given.labels, 1),
        strict=True,
    ):
        combined = {name: -0.6 * one[name][0] + 1.6 * other[name][0] for name in here}
        for name, value in clip(combined).items():
            total[name] = total[name] + value
        for weight, each in ((-0.6, one), (1.6, other)):
            for name, value in clip({name: rows[0] for name, rows in each.items()}).items():
                apart[name] = apart[name] + weight * value
    for name, value in total.items():
        assert torch.allclose(found[name].float(), value, atol=2e-4), name
    # clipped one by one they would be something else, and longer than C
    assert max(float((found[name].float() - apart[name]).abs().max()) for name in here) > 1e-2


def clip(gradients: dict[str, Tensor]) -> dict[str, Tensor]:
    norm = math.sqrt(sum(float(value.square().sum()) for value in gradients.values()))
    return {name: value * min(1.0, CLIP / norm) for name, value in gradients.items()}


@pytest.mark.parametrize("weight", [-7.0, 0.4, 1.6, 50.0])
def test_4_the_sensitivity_is_the_clip_norm_whatever_the_weights(model: Classifier, weight: float):
    here, ahead = two_points(model)
    sums = sums_of(model)
    ahead = Ahead(weight, ahead.parameters)
    with_all, without = (sums.of(here, 0, batch(count), ahead=ahead) for count in (4, 3))
    apart = math.sqrt(sum(float((with_all[name] - without[name]).square().sum()) for name in here))
    assert 0.5 * CLIP < apart <= CLIP * (1 + 1e-6)
