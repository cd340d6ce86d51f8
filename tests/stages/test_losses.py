"""The contrastive loss against a double loop, its gradient, and its precision."""

from __future__ import annotations

import math

import pytest
import torch

from dprandp.errors import UsageError
from dprandp.pretrain.contrastive import align_uniformity, alignment, uniformity


def slow_loss(x: torch.Tensor, y: torch.Tensor) -> float:
    def unit(rows):
        return [[value / math.sqrt(sum(v * v for v in row)) for value in row] for row in rows.double().tolist()]

    def distance(a, b):
        return sum((p - q) ** 2 for p, q in zip(a, b, strict=True))

    def spread(rows):
        terms = [math.exp(-2 * distance(rows[i], rows[j])) for j in range(len(rows)) for i in range(j)]
        return math.log(sum(terms) / len(terms))

    x, y = unit(x), unit(y)
    align = sum(distance(a, b) for a, b in zip(x, y, strict=True)) / len(x)
    return align + (spread(x) + spread(y)) / 2


def pair(batch: int, dim: int, closeness: float = 1.0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(batch, dim, generator=generator)
    return x, x + closeness * torch.randn(batch, dim, generator=generator)


@pytest.mark.parametrize(("batch", "closeness"), [(2, 1.0), (17, 1.0), (17, 0.01)])
def test_equals_the_double_loop(batch, closeness):
    x, y = pair(batch, 8, closeness)
    right = slow_loss(x, y)
    assert align_uniformity(x, y).item() == pytest.approx(right, abs=2e-6)
    lengths = torch.logspace(-3, 3, batch)[:, None]  # do not matter
    assert align_uniformity(lengths * x, y).item() == pytest.approx(right, abs=2e-6)


def test_the_loop_tells_wrong_losses_apart():
    x, y = pair(6, 8)
    for wrong in (alignment(x, y) + uniformity(x), alignment(x, y) + uniformity(x) + uniformity(y)):
        assert abs(slow_loss(x, y) - wrong.item()) > 1e-3


def test_gradient_equals_float64_autograd_of_pairwise_distances():
    x, y = pair(9, 5)
    x.requires_grad_()
    align_uniformity(x, y).backward()
    exact = x.detach().double().requires_grad_()
    unit, other = (torch.nn.functional.normalize(v.double(), dim=1) for v in (exact, y))
    spread = [torch.pdist(v).square().mul(-2).exp().mean().log() for v in (unit, other)]
    ((unit - other).square().sum(1).mean() + sum(spread) / 2).backward()
    torch.testing.assert_close(x.grad.double(), exact.grad, atol=1e-6, rtol=1e-4)


def test_gradient_stays_finite_for_equal_and_for_zero_vectors():
    x = torch.zeros(4, 8)
    x[:2, 0] = 1
    x.requires_grad_()
    align_uniformity(x, torch.roll(x.detach(), 1, 0)).backward()
    assert x.grad.isfinite().all()


def test_float32_under_autocast():
    x, y = pair(64, 128, 0.05)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = align_uniformity(x, y)
    assert (mixed.dtype, mixed.item()) == (torch.float32, align_uniformity(x, y).item())
    rounded = align_uniformity(x.bfloat16(), y.bfloat16())
    assert rounded.dtype == torch.float32
    assert rounded.item() == pytest.approx(slow_loss(x.bfloat16(), y.bfloat16()), abs=1e-5)


def test_a_batch_of_one_is_refused():
    with pytest.raises(UsageError, match="at least two vectors"):
        align_uniformity(torch.ones(1, 4), torch.ones(1, 4))
