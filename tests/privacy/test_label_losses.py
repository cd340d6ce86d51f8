"""Losses of one class and of several labels an image, weighted and not: their gradients, and sums of sensitivity C.

The oracle is the loss written out in float64, plain autograd, and textbook clipping of one record after another.
"""

from __future__ import annotations

import math
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dprandp import losses
from dprandp.errors import UsageError
from dprandp.privacy import clipping
from dprandp.privacy.clipping import check_labels, clipped_softmax_sum, clipped_softmax_sum_of_units

SHARES = (0.1, 0.2, 0.7)


def labels_of(count: int, several: bool, generator: torch.Generator) -> torch.Tensor:
    shape, values = ((count, 3), 2) if several else ((count,), 3)
    return torch.randint(values, shape, generator=generator)


def weights_by_hand(several: bool) -> list[float] | list[tuple[float, float]]:
    """Written out: without and with each label, or of each class."""
    if several:
        return [(min(p, 1 - p) / (1 - p), min(p, 1 - p) / p) for p in SHARES]
    return [min(SHARES) / p for p in SHARES]


def written_out(scores: torch.Tensor, label: torch.Tensor, weighted: bool) -> torch.Tensor:
    """The loss of one row of scores, float64 [3]."""
    several = label.ndim == 1
    weights = weights_by_hand(several) if weighted else None
    if not several:
        loss = torch.log(torch.exp(scores).sum()) - scores[label]
        return loss if weights is None else weights[int(label)] * loss
    total = torch.zeros((), dtype=torch.float64)
    for j, score in enumerate(scores):
        yes = 1 / (1 + torch.exp(-score))
        each = -torch.log(yes if label[j] else 1 - yes)
        total = total + (each if weights is None else weights[j][int(label[j])] * each)
    return total


def slow_sum(
    features: torch.Tensor, labels: torch.Tensor, weight: torch.Tensor, clip_norm: float, weighted: bool,
    units: list[list[int]],
) -> torch.Tensor:  # fmt: skip
    total = torch.zeros(weight.shape, dtype=torch.float64)
    for unit in units:
        head = weight.double().requires_grad_()
        rows = [(view, labels[image]) for image in unit for view in features[image]]
        loss = torch.stack([written_out(view.double() @ head, label, weighted) for view, label in rows]).mean()
        (gradient,) = torch.autograd.grad(loss, head)
        total += gradient * min(1.0, clip_norm / float(gradient.norm()))
    return total


@pytest.mark.parametrize("several", [False, True])
@pytest.mark.parametrize("weighted", [False, True])
def test_the_gradient_is_that_of_the_loss_written_out(several: bool, weighted: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    scores = (3 * torch.randn(20, 3, generator=generator, dtype=torch.float64)).requires_grad_()
    labels, weights = labels_of(20, several, generator), losses.class_weights(SHARES if weighted else None, several)
    own = torch.stack([written_out(row, label, weighted) for row, label in zip(scores, labels, strict=True)])
    (gradient,) = torch.autograd.grad(own.sum(), scores)
    torch.testing.assert_close(losses.residual(scores.detach(), labels, weights), gradient, atol=1e-7, rtol=1e-6)
    torch.testing.assert_close(losses.loss(scores, labels, weights), own, atol=1e-6, rtol=1e-6)


def test_weights_are_of_the_declared_shares_alone_and_never_above_one() -> None:
    assert losses.class_weights(None, False) is None
    one, both = losses.class_weights(SHARES, False), losses.class_weights(SHARES, True)
    torch.testing.assert_close(one * torch.tensor(SHARES), torch.full((3,), 0.1))  # all classes count alike
    having = torch.tensor(SHARES)
    torch.testing.assert_close(both[1] * having, both[0] * (1 - having))  # yes and no, of each label
    assert both.shape == (2, 3)
    assert max(float(one.max()), float(both.max())) == 1.0


@pytest.mark.parametrize("several", [False, True])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("clip_norm", [0.05, 0.5, 100.0])
def test_sums_of_images_and_of_units_equal_the_slow_loop(several: bool, weighted: bool, clip_norm: float) -> None:
    generator = torch.Generator().manual_seed(2)
    features, weight = torch.randn(13, 2, 8, generator=generator), torch.randn(8, 3, generator=generator)
    labels, weights = labels_of(13, several, generator), losses.class_weights(SHARES if weighted else None, several)
    with mock.patch.object(clipping, "BLOCK", 4):
        rows = torch.tensor([12, 0, 7, 3])
        for chosen in (None, rows):
            units = [[index] for index in (range(13) if chosen is None else chosen.tolist())]
            found = clipped_softmax_sum(features, labels, weight, clip_norm, rows=chosen, class_weights=weights)
            wanted = slow_sum(features, labels, weight, clip_norm, weighted, units)
            torch.testing.assert_close(found.double(), wanted, atol=1e-5, rtol=1e-4)
        units = [[0], [1, 2, 3], [4, 5], [6, 7], [8, 9, 10, 11, 12]]
        offsets = torch.tensor([0, 1, 4, 6, 8, 13])
        found = clipped_softmax_sum_of_units(features, labels, offsets, weight, clip_norm, class_weights=weights)
        wanted = slow_sum(features, labels, weight, clip_norm, weighted, units)
        torch.testing.assert_close(found.double(), wanted, atol=1e-5, rtol=1e-4)


SIZES = {"zero": 0.0, "small": 1e-3, "unit": 1.0, "huge": 1e18, "nan": math.nan, "inf": math.inf}


@settings(max_examples=40, deadline=None)
@given(
    names=st.lists(st.sampled_from(sorted(SIZES)), min_size=1, max_size=6),
    views=st.integers(1, 3),
    several=st.booleans(),
    shares=st.sampled_from([None, SHARES, (0.001, 0.001, 0.998), (0.5, 0.25, 0.25)]),
    seed=st.integers(0, 2**31),
)
def test_one_record_moves_the_sum_by_at_most_the_clip_norm(names, views, several, shares, seed) -> None:
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(len(names), views, 6, generator=generator)
    for row, name in zip(features, names, strict=True):
        row.mul_(SIZES[name])
    labels, weight = labels_of(len(names), several, generator), 3 * torch.randn(6, 3, generator=generator)
    weights = losses.class_weights(shares, several)
    whole = clipped_softmax_sum(features, labels, weight, 0.5, class_weights=weights)
    assert bool(whole.isfinite().all())
    for index in range(len(names)):
        kept = torch.tensor([i for i in range(len(names)) if i != index], dtype=torch.int64)
        rest = clipped_softmax_sum(features, labels, weight, 0.5, rows=kept, class_weights=weights)
        assert float((whole - rest).double().norm()) <= 0.5 * (1 + 1e-6)


def test_labels_that_are_neither_are_refused_without_naming_one() -> None:
    with pytest.raises(UsageError, match="neither 0 nor 1") as caught:
        check_labels(torch.tensor([[0, 1], [77, 0]]), 2)
    assert "77" not in str(caught.value)
    with pytest.raises(UsageError, match="do not fit"):
        clipped_softmax_sum(torch.zeros(2, 4), torch.zeros(2, 2, dtype=torch.int64), torch.ones(4, 3), 1.0)
