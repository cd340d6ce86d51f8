"""Optimizers of public training: their state as named tensors is all of it."""

from __future__ import annotations

import pytest
import torch

from dprandp.config.schema import PretrainConfig
from dprandp.models.optimizers import build_optimizer, restore, state_of


def built(config, parameters):
    return build_optimizer(config, [(f"part.{number}", each) for number, each in enumerate(parameters)])


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_the_state_is_all_that_the_next_update_depends_on(name):
    def parameters():
        generator = torch.Generator().manual_seed(2)
        return [torch.nn.Parameter(torch.randn(4, 3, 2, 2, generator=generator)), torch.nn.Parameter(torch.ones(5))]

    def step(optimizer, ours, number):
        for parameter in ours:
            parameter.grad = torch.full_like(parameter, 0.1 * number) + parameter.detach()
        optimizer.step()

    config = PretrainConfig(optimizer=name, weight_decay=0.01)
    ours, others = parameters(), parameters()
    first, second = built(config, ours), built(config, others)
    assert state_of(second).keys() == state_of(first).keys()
    assert not any(value.any() for value in state_of(second).values())
    for number in range(3):
        step(first, ours, number)
    saved = {key: value.clone() for key, value in state_of(first).items()}
    assert len(saved) == {"sgd": 2, "adamw": 6}[name]
    for theirs, own in zip(others, ours, strict=True):
        theirs.data.copy_(own.data)
    without = [parameter.detach().clone() for parameter in others]
    restore(state_of(second), saved)
    for number in (3, 4):
        step(first, ours, number)
        step(second, others, number)
    assert all(torch.equal(a, b) for a, b in zip(ours, others, strict=True))
    blank = [torch.nn.Parameter(value) for value in without]  # the control: nothing loaded
    third = built(config, blank)
    for number in (3, 4):
        step(third, blank, number)
    assert not torch.equal(blank[0], ours[0])
