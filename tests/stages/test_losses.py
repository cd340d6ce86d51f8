"""The contrastive loss against a double loop, its extremes, and its precision."""

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


def pair(batch: int, dim: int, closeness: float = 1.0, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, dim, generator=generator)
    return x, x + closeness * torch.randn(batch, dim, generator=generator)


@pytest.mark.parametrize("batch", [2, 3, 17])
@pytest.mark.parametrize("closeness", [1.0, 0.01])
def test_equals_the_double_loop(batch, closeness):
    x, y = pair(batch, 8, closeness)
    assert align_uniformity(x, y).item() == pytest.approx(slow_loss(x, y), abs=2e-6)


def test_the_loop_tells_wrong_losses_apart():
    x, y = pair(6, 8)
    right = slow_loss(x, y)
    assert abs(right - (alignment(x, y) + uniformity(x)).item()) > 1e-3
    assert abs(right - (alignment(x, y) + uniformity(x) + uniformity(y)).item()) > 1e-3


def test_extremes():
    same = torch.ones(4, 8)
    assert uniformity(same).item() == pytest.approx(0, abs=1e-6)
    assert alignment(same, same).item() == 0
    assert alignment(same, -same).item() == pytest.approx(4)
    opposite = torch.tensor([[1.0, 0.0], [-1.0, 0.0]])
    assert uniformity(opposite).item() == pytest.approx(-8, abs=1e-6)
    spread = torch.randn(512, 128, generator=torch.Generator().manual_seed(0))
    assert uniformity(spread).item() == pytest.approx(-4, abs=0.1)


def test_length_of_the_vectors_does_not_matter():
    x, y = pair(8, 16)
    scales = torch.logspace(-3, 3, 8)[:, None]
    assert align_uniformity(scales * x, y).item() == pytest.approx(align_uniformity(x, y).item(), abs=1e-6)


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
    plain = align_uniformity(x, y)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = align_uniformity(x, y)
    assert mixed.dtype == torch.float32
    assert mixed.item() == plain.item()
    rounded = align_uniformity(x.bfloat16(), y.bfloat16())
    assert rounded.dtype == torch.float32
    assert rounded.item() == pytest.approx(slow_loss(x.bfloat16(), y.bfloat16()), abs=1e-5)


def test_a_batch_of_one_is_refused():
    with pytest.raises(UsageError, match="at least two vectors"):
        align_uniformity(torch.ones(1, 4), torch.ones(1, 4))
