"""Optimisers against torch's own and slow loops; their states go on to the bit; masked weights stay where they are."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dprandp.errors import UsageError
from dprandp.stages.private_optimizers import OptimizerSettings, make_optimizer
from dprandp.tensorfile import tensors_from_bytes, tensors_to_bytes

SHAPES = {"extractor.filters": (6, 3, 2, 2), "extractor.bias": (6,), "head": (6, 3)}


def draw(seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}


def run(settings: OptimizerSettings, steps: int, lr: float = 0.1, **options) -> dict[str, Tensor]:
    parameters = draw(0)
    optimizer = make_optimizer(settings, parameters)
    for step in range(steps):
        optimizer.step(parameters, draw(step + 1), lr, **options)
    return parameters


@pytest.mark.parametrize(
    ("settings", "reference"),
    [
        (OptimizerSettings("sgd"), lambda p: torch.optim.SGD(p, lr=0.1)),
        (OptimizerSettings("sgd", momentum=0.8), lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.8)),
        (OptimizerSettings("adam"), lambda p: torch.optim.Adam(p, lr=0.1)),
        (
            OptimizerSettings("adam", momentum=0.7, second_momentum=0.9, weight_decay=0.1),
            lambda p: torch.optim.AdamW(p, lr=0.1, betas=(0.7, 0.9), weight_decay=0.1),
        ),
    ],
)
def test_sgd_and_adam_are_torchs(settings, reference):
    expected = {name: value.clone().requires_grad_() for name, value in draw(0).items()}
    other = reference(list(expected.values()))
    for step in range(5):
        for name, gradient in draw(step + 1).items():
            expected[name].grad = gradient
        other.step()
    found = run(settings, 5)
    for name, value in expected.items():
        assert torch.allclose(found[name], value.detach(), rtol=1e-5, atol=1e-6), name
        assert not torch.allclose(found[name], draw(0)[name], atol=1e-2)


@pytest.mark.parametrize("kind", ["sgd", "adam"])
def test_a_saved_state_goes_on_to_the_bit(kind):
    settings = OptimizerSettings(kind, momentum=0.5)
    through = run(settings, 6)
    parameters = draw(0)
    optimizer = make_optimizer(settings, parameters)
    for step in range(6):
        if step == 3:
            saved = tensors_from_bytes(tensors_to_bytes(optimizer.state | {"parameters.x": torch.ones(2)}), "x")
            optimizer = make_optimizer(settings, parameters)
            optimizer.load_state(saved)
            assert "parameters.x" not in optimizer.state
        optimizer.step(parameters, draw(step + 1), 0.1)
    for name, value in through.items():
        assert torch.equal(parameters[name], value)
    # a state that is not loaded is noticed
    optimizer = make_optimizer(settings, parameters)
    optimizer.step(parameters, draw(7), 0.1)
    assert not torch.equal(parameters["head"], run(settings, 7)["head"])


@pytest.mark.parametrize("kind", ["sgd", "adam"])
def test_what_is_masked_stays(kind):
    mask = {"extractor.filters": torch.arange(72).view(6, 3, 2, 2) % 3 == 0}
    found = run(OptimizerSettings(kind, momentum=0.9), 4, masks=mask)
    start = draw(0)
    assert torch.equal(found["extractor.filters"][~mask["extractor.filters"]],
                       start["extractor.filters"][~mask["extractor.filters"]])  # fmt: skip
    assert not torch.equal(found["extractor.filters"], start["extractor.filters"])
    assert not torch.equal(found["head"], start["head"])


def test_adam_forgets_its_direction_and_nothing_else():
    parameters = draw(0)
    optimizer = make_optimizer(OptimizerSettings("adam"), parameters)
    optimizer.step(parameters, draw(1), 0.1)
    second = optimizer.state["second.head"].clone()
    optimizer.reset_first_moment()
    assert not any(value.any() for name, value in optimizer.state.items() if name.startswith("first."))
    assert torch.equal(optimizer.state["second.head"], second)
    assert second.all()
    assert int(optimizer.state["adam-steps"]) == 1


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
