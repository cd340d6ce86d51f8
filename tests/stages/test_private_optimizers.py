"""Steps against the published formulas; their states go on to the bit; masked weights stay where they are."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dprandp.dpsgd.optimizers import Optimizer, OptimizerSettings
from dprandp.errors import UsageError
from dprandp.models.optimizers import restore
from dprandp.runs.checkpoint import tensors_from_bytes, tensors_to_bytes

SHAPES = {"extractor.filters": (6, 3, 2, 2), "extractor.bias": (6,), "head": (6, 3)}
SETTINGS = {
    "sgd": OptimizerSettings("sgd"),
    "momentum": OptimizerSettings("sgd", momentum=0.8),
    "adam": OptimizerSettings("adam"),
    "adamw": OptimizerSettings("adam", momentum=0.7, second_momentum=0.9, stabiliser=1e-3, weight_decay=0.1),
}


def draw(seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}


def run(settings: OptimizerSettings, steps: int, lr: float = 0.1, **options) -> dict[str, Tensor]:
    parameters = draw(0)
    optimizer = Optimizer(settings, parameters)
    for step in range(steps):
        optimizer.step(draw(step + 1), lr, **options)
    return parameters


def by_formula(settings: OptimizerSettings, value: Tensor, gradients: list[Tensor | None], lr: float) -> Tensor:
    """De et al. 2022 for SGD; Kingma & Ba 2015 with Loshchilov & Hutter 2019's decay; in float64."""
    value, first, second = value.double(), torch.zeros_like(value).double(), torch.zeros_like(value).double()
    beta, second_beta = settings.beta, settings.second_momentum
    for count, gradient in enumerate(gradients, start=1):
        if gradient is None:
            continue
        gradient = gradient.double()
        if settings.kind == "sgd":
            first = beta * first + gradient
            value = value - lr * first
            continue
        first = beta * first + (1 - beta) * gradient
        second = second_beta * second + (1 - second_beta) * gradient.square()
        root = (second / (1 - second_beta**count)).sqrt() + settings.stabiliser
        value = value - lr * settings.weight_decay * value - lr * first / (1 - beta**count) / root
    return value


@pytest.mark.parametrize("name", SETTINGS)
def test_steps_are_the_published_ones(name):
    found, start = run(SETTINGS[name], 5), draw(0)
    for each, value in start.items():
        expected = by_formula(SETTINGS[name], value, [draw(step + 1)[each] for step in range(5)], 0.1)
        assert torch.allclose(found[each].double(), expected, rtol=1e-5, atol=1e-6), each
        assert not torch.allclose(found[each], value, atol=1e-2)


@pytest.mark.parametrize("name", SETTINGS)
def test_what_has_no_gradient_in_a_step_stays_and_the_count_goes_on(name):
    parameters = draw(0)
    optimizer = Optimizer(SETTINGS[name], parameters)
    for step, given in enumerate((True, False, False, True)):
        before, gradients = parameters["head"].clone(), draw(step + 1)
        if not given:
            del gradients["head"]
        optimizer.step(gradients, 0.1)
        assert torch.equal(before, parameters["head"]) != given
    expected = by_formula(SETTINGS[name], draw(0)["head"], [draw(1)["head"], None, None, draw(4)["head"]], 0.1)
    assert torch.allclose(parameters["head"].double(), expected, rtol=1e-5, atol=1e-6)


def test_a_gradient_is_not_changed_and_not_kept():
    parameters, gradients = draw(0), draw(1)
    optimizer = Optimizer(SETTINGS["momentum"], parameters)
    optimizer.step(gradients, 0.1)
    optimizer.step({}, 0.1)
    assert all(torch.equal(gradients[name], value) for name, value in draw(1).items())
    assert torch.allclose(parameters["head"], draw(0)["head"] - 0.1 * gradients["head"])
    with pytest.raises(KeyError):
        optimizer.step({"tail": gradients["head"]}, 0.1)


@pytest.mark.parametrize("name", SETTINGS)
def test_a_saved_state_goes_on_to_the_bit(name):
    through, parameters = run(SETTINGS[name], 6), draw(0)
    optimizer = Optimizer(SETTINGS[name], parameters)
    shapes = {each: value.shape for each, value in optimizer.state.items()}
    for step in range(6):
        if step == 3:
            saved = tensors_from_bytes(tensors_to_bytes(optimizer.state | {"parameters.x": torch.ones(2)}), "x")
            optimizer = Optimizer(SETTINGS[name], parameters)
            assert {each: value.shape for each, value in optimizer.state.items()} == shapes
            restore(optimizer.state, saved)
        optimizer.step(draw(step + 1), 0.1)
    for each, value in through.items():
        assert torch.equal(parameters[each], value)
    assert all(each.startswith("optimizer.") for each in shapes)
    if name != "sgd":  # a state that is not loaded is noticed
        Optimizer(SETTINGS[name], parameters).step(draw(7), 0.1)
        assert not torch.equal(parameters["head"], run(SETTINGS[name], 7)["head"])


@pytest.mark.parametrize(
    "settings",
    [
        OptimizerSettings("sgd", momentum=0.9, weight_decay=0.1),
        OptimizerSettings("adam", momentum=0.9, weight_decay=0.1),
    ],
)
def test_what_is_masked_stays_also_when_other_weights_are_chosen(settings):
    """In steps that move a weight, momentum is made, and decay pulls at it: neither moves it in the others."""
    parameters, whole = draw(0), draw(0)
    optimizer, free = Optimizer(settings, parameters), Optimizer(settings, whole)
    places = torch.arange(72).view(6, 3, 2, 2)
    for step in range(6):
        mask = {"extractor.filters": places % 3 == step % 3}
        before = {name: value.clone() for name, value in parameters.items()}
        optimizer.step(draw(step + 1), 0.1, mask)
        free.step(draw(step + 1), 0.1)
        moved = parameters["extractor.filters"] != before["extractor.filters"]
        assert torch.equal(moved, mask["extractor.filters"])
        assert not torch.equal(parameters["head"], before["head"])
    assert torch.equal(parameters["head"], whole["head"])


def test_adam_forgets_its_direction_and_nothing_else():
    optimizer = Optimizer(OptimizerSettings("adam"), draw(0))
    optimizer.step(draw(1), 0.1)
    before = {name: value.clone() for name, value in optimizer.state.items()}
    optimizer.reset_first_moment()
    for name, value in optimizer.state.items():
        assert before[name].any()
        assert torch.equal(value, torch.zeros_like(value) if ".exp_avg." in name else before[name])


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ({"kind": "sdg"}, "sgd"),
        ({"momentum": 1.0}, "momentum = 1.0"),
        ({"weight_decay": -1.0}, "weight_decay"),
        ({"second_momentum": float("nan")}, "second_momentum"),
        ({"stabiliser": 0.0}, "stabiliser"),
    ],
)
def test_wrong_settings_are_refused_in_words(wrong, named):
    with pytest.raises(UsageError) as refused:
        OptimizerSettings(**wrong)
    assert named in str(refused.value) + str(refused.value.fix)


def test_what_is_disclosed_names_all_of_it():
    words = OptimizerSettings("adam", weight_decay=0.1).in_words()
    assert words == "AdamW on the noisy gradients, momentum 0.9, weight decay 0.1"
    assert OptimizerSettings().in_words() == "SGD on the noisy gradients, momentum 0"
