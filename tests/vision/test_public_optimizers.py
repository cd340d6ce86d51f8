"""Optimisers: Muon against a slow reference, and the arithmetic of its matrix step."""

from __future__ import annotations

import math

import pytest
import torch

from dprandp.config import PretrainConfig
from dprandp.errors import UsageError
from dprandp.vision.public_optimizers import Muon, build_optimizer, load_state, orthogonalised, state_of


def matrices():
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(*shape, generator=generator) for shape in ((6, 6), (5, 40), (40, 5), (1, 9))]


def test_orthogonalised_keeps_singular_vectors_and_evens_out_singular_values():
    for matrix in matrices():
        u, s, v = torch.linalg.svd(matrix, full_matrices=False)
        values = s / s.norm()
        for _ in range(5):  # the iteration acts on each singular value by itself
            values = 3.4445 * values - 4.7750 * values**3 + 2.0315 * values**5
        made = orthogonalised(matrix)
        torch.testing.assert_close(made, u @ torch.diag(values) @ v, atol=1e-4, rtol=1e-4)
    even = torch.linalg.svdvals(orthogonalised(matrices()[1]))
    assert 0.6 < even.min() <= even.max() < 1.3
    assert orthogonalised(torch.zeros(3, 4)).eq(0).all()


def test_muon_takes_adamws_steps_for_vectors_and_orthogonal_ones_for_convolutions():
    generator = torch.Generator().manual_seed(1)
    filters, bias = (torch.nn.Parameter(torch.randn(*shape, generator=generator)) for shape in ((4, 3, 3, 3), (7,)))
    twin = torch.nn.Parameter(bias.detach().clone())
    reference = filters.detach().clone()
    made = Muon([filters, bias], lr=0.01, momentum=0.9, weight_decay=0.1)
    adamw = torch.optim.AdamW([twin], lr=0.01, weight_decay=0.1)
    momentum = torch.zeros_like(reference)
    for _ in range(3):
        for parameter in (filters, bias):
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        twin.grad = bias.grad.clone()
        made.step()
        adamw.step()
        momentum = 0.9 * momentum + filters.grad
        update = orthogonalised((filters.grad + 0.9 * momentum).view(4, 27)).view(4, 3, 3, 3)
        reference = reference * (1 - 0.01 * 0.1) - 0.01 * 0.2 * math.sqrt(27) * update
        torch.testing.assert_close(filters.detach(), reference)
    torch.testing.assert_close(bias.detach(), twin.detach())


@pytest.mark.parametrize("name", ["sgd", "adamw", "muon"])
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
    first, second = build_optimizer(config, ours), build_optimizer(config, others)
    for number in range(3):
        step(first, ours, number)
    saved = {key: value.clone() for key, value in state_of(first).items()}
    assert len(saved) == {"sgd": 2, "adamw": 6, "muon": 4}[name]
    for theirs, own in zip(others, ours, strict=True):
        theirs.data.copy_(own.data)
    without = [parameter.detach().clone() for parameter in others]
    load_state(second, saved)
    for number in (3, 4):
        step(first, ours, number)
        step(second, others, number)
    assert all(torch.equal(a, b) for a, b in zip(ours, others, strict=True))
    blank = [torch.nn.Parameter(value) for value in without]  # the control: nothing loaded
    third = build_optimizer(config, blank)
    for number in (3, 4):
        step(third, blank, number)
    assert not torch.equal(blank[0], ours[0])


def test_an_unknown_optimizer_is_refused():
    with pytest.raises(UsageError, match="no optimiser called 'lion'"):
        build_optimizer(PretrainConfig(optimizer="lion"), [torch.nn.Parameter(torch.ones(1))])
