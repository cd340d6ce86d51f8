"""Promises 4, 6 and 20 where a record is a unit of several images: clipped once, whatever the number of its images.

The oracle is a loop over units with plain autograd of the mean loss over the unit's images.
"""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional

from dprandp.errors import UsageError
from dprandp.privacy import clipping
from dprandp.privacy.clipping import clipped_softmax_sum, clipped_softmax_sum_of_units, sum_of_clipped, unit_means

CLASSES, DIMS = 4, 6
KINDS = {"zero": 0.0, "tiny": 1e-30, "unit": 1.0, "large": 1e4, "huge": 1e18, "nan": math.nan, "inf": math.inf}
sizes_of = st.lists(st.integers(1, 7), min_size=1, max_size=5)


def case(sizes: list[int], views: int | None = None, seed: int = 0, dtype: torch.dtype = torch.float32):
    """features, labels, offsets, weight."""
    generator = torch.Generator().manual_seed(seed)
    shape = (sum(sizes), DIMS) if views is None else (sum(sizes), views, DIMS)
    features = torch.randn(shape, generator=generator).to(dtype)
    labels = torch.randint(0, CLASSES, (sum(sizes),), generator=generator)
    offsets = torch.tensor([0, *sizes]).cumsum(0)
    return features, labels, offsets, torch.randn(DIMS, CLASSES, generator=generator)


def slow(features, labels, offsets, weight, clip_norm: float) -> torch.Tensor:
    """One unit at a time: the gradient of the mean over its images of the mean over their views, clipped."""
    total = torch.zeros(DIMS, CLASSES, dtype=torch.float64)
    for start, end in zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True):
        w = weight.double().requires_grad_()
        losses = [
            functional.cross_entropy(x.double().reshape(-1, DIMS) @ w, y.expand(x.numel() // DIMS))
            for x, y in zip(features[start:end], labels[start:end], strict=True)
        ]
        torch.stack(losses).mean().backward()
        norm = float(w.grad.norm())
        total += w.grad * min(1.0, clip_norm / norm)
    return total


def without(unit: int, features, labels, offsets, weight):
    sizes = offsets.diff().tolist()
    keep = torch.cat([torch.arange(0, int(offsets[unit])), torch.arange(int(offsets[unit + 1]), int(offsets[-1]))])
    left = torch.tensor([0, *sizes[:unit], *sizes[unit + 1 :]]).cumsum(0)
    return features[keep], labels[keep], left, weight


# sizes on both sides of the number of classes: the norm comes from Gram matrices below it, from the gradient above
@pytest.mark.parametrize("views", [None, 3])
@pytest.mark.parametrize("clip_norm", [0.05, 0.7, 100.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_sums_over_units_equal_an_autograd_loop(views, clip_norm, dtype):
    arguments = case([1, 3, 9, 1, 2, 2, 5, 3], views, dtype=dtype)
    total = clipped_softmax_sum_of_units(*arguments, clip_norm)
    assert torch.allclose(total.double(), slow(*arguments, clip_norm), atol=5e-5 * min(clip_norm, 1.0))
    assert total.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    precise = clipped_softmax_sum_of_units(*arguments, clip_norm, precise=True)
    assert precise.dtype == torch.float64
    assert torch.allclose(precise, total.double(), atol=1e-5)


def test_one_image_a_unit_is_the_image_level_sum_and_several_are_not():
    features, labels, offsets, weight = case([1] * 9, 2)
    by_image = clipped_softmax_sum(features, labels, weight, 0.5)
    assert torch.equal(clipped_softmax_sum_of_units(features, labels, offsets, weight, 0.5), by_image)
    # control: the mean of a unit is clipped, not its images
    features, labels, offsets, weight = case([4, 4])
    by_image = clipped_softmax_sum(features, labels, weight, 0.5) / 4
    assert not torch.allclose(clipped_softmax_sum_of_units(features, labels, offsets, weight, 0.5), by_image, atol=1e-2)


def test_memory_changes_nothing(monkeypatch):
    arguments = case([5, 5, 5, 2, 2, 1, 9], 2)
    expected = clipped_softmax_sum_of_units(*arguments, 0.5)
    for block_bytes in (1, 400):
        monkeypatch.setattr(clipping, "BLOCK_BYTES", block_bytes)
        assert torch.allclose(clipped_softmax_sum_of_units(*arguments, 0.5), expected, atol=1e-5)


@settings(max_examples=50, deadline=None)
@given(
    sizes=sizes_of,
    kinds=st.lists(st.sampled_from(sorted(KINDS)), min_size=5, max_size=5),
    views=st.integers(1, 3),
    clip_norm=st.sampled_from([1e-3, 1.0, 50.0]),
    cancelling=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_one_unit_with_all_its_images_moves_the_sum_by_at_most_the_clip_norm(
    sizes, kinds, views, clip_norm, cancelling, seed
):
    features, labels, offsets, weight = case(sizes, views, seed)
    for unit, kind in enumerate(kinds[: len(sizes)]):
        start, end = int(offsets[unit]), int(offsets[unit + 1])
        if kind == "inf":
            features[end - 1, 0, 0] = math.inf  # a single broken image in the unit
        else:
            features[start:end] *= KINDS[kind]
        if cancelling and end - start > 1:
            features[end - 1] = -features[start : end - 1].sum(0)
    arguments = features, labels, offsets, weight * (0 if cancelling else 1)
    whole = clipped_softmax_sum_of_units(*arguments, clip_norm)
    assert bool(torch.isfinite(whole).all())
    for unit in range(len(sizes)):
        rest = clipped_softmax_sum_of_units(*without(unit, *arguments), clip_norm)
        assert float((whole.double() - rest.double()).norm()) <= clip_norm * (1 + 1e-6)


def test_a_broken_image_costs_its_own_unit_alone():
    arguments = case([3, 2, 6])
    arguments[0][4, 1] = math.nan
    whole = clipped_softmax_sum_of_units(*arguments, 1.0)
    assert torch.allclose(whole, clipped_softmax_sum_of_units(*without(1, *arguments), 1.0), atol=1e-6)


def test_what_does_not_fit_is_refused():
    features, labels, cuts, weight = case([3])
    for offsets in ([0, 2], [0, 4], [1, 3], [0, 0, 3], [0, 2, 1, 3], []):
        with pytest.raises(UsageError, match="do not cut 3 rows"):
            clipped_softmax_sum_of_units(features, labels, torch.tensor(offsets, dtype=torch.int64), weight, 1.0)
    labels[1] = 77
    with pytest.raises(UsageError) as caught:
        clipped_softmax_sum_of_units(features, labels, cuts, weight, 1.0)
    assert "77" not in str(caught.value)


# ---------------------------------------------------------------- gradients that come from elsewhere

SIZES = [3, 1, 4, 2]


def image_gradients() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    return {name: torch.randn(10, *shape, generator=generator) for name, shape in (("a", (2, 3)), ("b", (4,)))}


def in_microbatches(gradients: dict[str, torch.Tensor], size: int):
    for start in range(0, 10, size):
        yield {name: value[start : start + size] for name, value in gradients.items()}


@pytest.mark.parametrize("microbatch", [1, 3, 4, 7, 99])
def test_means_over_units_for_every_microbatch(microbatch):
    gradients = image_gradients()
    parts = list(unit_means(in_microbatches(gradients, microbatch), SIZES))
    for name, value in gradients.items():
        expected = torch.stack([part.mean(0) for part in value.split(SIZES)])
        assert torch.allclose(torch.cat([part[name] for part in parts]), expected, atol=1e-6)
    assert sum(len(part["b"]) for part in parts) == len(SIZES)
    zeros = {name: torch.zeros(value.shape[1:]) for name, value in gradients.items()}
    total = sum_of_clipped(parts, zeros, 0.5)
    two_units = {name: value[:4] for name, value in gradients.items()}
    rest = sum_of_clipped(unit_means(in_microbatches(two_units, 3), SIZES[:2]), zeros, 0.5)
    assert sum(float(value.norm()) ** 2 for value in total.values()) <= (4 * 0.5) ** 2
    assert math.sqrt(sum(float((total[n] - rest[n]).norm()) ** 2 for n in total)) <= 2 * 0.5 * (1 + 1e-6)


@pytest.mark.parametrize("sizes", [[3, 1, 4], [3, 1, 4, 3], []])
def test_gradients_of_other_images_than_the_units_have_are_refused(sizes):
    with pytest.raises(RuntimeError, match="images than the units"):
        list(unit_means(in_microbatches(image_gradients(), 4), sizes))


def test_rows_of_units_are_the_same_as_a_copy_of_them() -> None:
    generator = torch.Generator().manual_seed(6)
    features, labels = torch.randn(20, 5, generator=generator), torch.randint(0, 3, (20,), generator=generator)
    weight, order = torch.randn(5, 3, generator=generator), torch.randperm(20, generator=generator)
    for taken, offsets in ((20, [0, 1, 4, 5, 8, 20]), (6, [0, 3, 6]), (2, [0, 1, 2]), (0, [0])):
        rows, cuts = order[:taken], torch.tensor(offsets)
        gathered = clipped_softmax_sum_of_units(features, labels, cuts, weight, 0.5, rows=rows)
        copied = clipped_softmax_sum_of_units(features[rows], labels[rows], cuts, weight, 0.5)
        assert torch.allclose(gathered, copied, atol=1e-6)
    with pytest.raises(UsageError, match="different positions"):
        clipped_softmax_sum_of_units(features, labels, torch.tensor([0, 2]), weight, 0.5, rows=torch.tensor([3, 3]))
    with pytest.raises(UsageError, match="do not cut 3 rows"):
        clipped_softmax_sum_of_units(features, labels, torch.tensor([0, 2]), weight, 0.5, rows=order[:3])
