"""Promises 4, 6, 8: sensitivity at most C, memory flags change nothing, examples are isolated.

The oracle of every sum is a loop over single examples with plain autograd and textbook clipping.
"""

from __future__ import annotations

import math
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional

from dprandp.errors import UsageError
from dprandp.privacy import clipping
from dprandp.privacy.clipping import (
    ROUNDING_SLACK,
    clip_factors,
    clipped_softmax_sum,
    clipped_sum,
    per_example_gradients,
    refuse_cross_example_layers,
    squared_norms,
    sum_of_clipped,
)

# How large one example's values are; what a hostile or broken record could hold.
KINDS = {
    "zero": 0.0, "tiny": 1e-30, "small": 1e-3, "unit": 1.0, "large": 1e4, "huge": 1e18, "nan": math.nan,
    "inf": math.inf,
}  # fmt: skip
kinds = st.lists(st.sampled_from(sorted(KINDS)), min_size=1, max_size=7)
floats = st.sampled_from([torch.float32, torch.bfloat16, torch.float64])
seeds = st.integers(0, 2**31)


def scaled(values: torch.Tensor, names: list[str]) -> torch.Tensor:
    """values [B, ...] with example i made ``names[i]``; 'inf' puts a single infinity among finite values."""
    values = values.clone()
    for row, name in zip(values, names, strict=True):
        if name == "inf":
            row.view(-1)[0] = math.inf
        else:
            row.mul_(KINDS[name])
    return values


def distance(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    return math.sqrt(sum(float((a[name].double() - b[name].double()).square().sum()) for name in a))


def without(index: int, *tensors: torch.Tensor) -> list[torch.Tensor]:
    return [torch.cat([t[:index], t[index + 1 :]]) for t in tensors]


def clipped_loop(gradients: list[dict[str, torch.Tensor]], clip_norm: float) -> dict[str, torch.Tensor]:
    """Textbook clipping, one example at a time, in float64."""
    total = {name: torch.zeros_like(value, dtype=torch.float64) for name, value in gradients[0].items()}
    for gradient in gradients:
        norm = math.sqrt(sum(float(g.double().square().sum()) for g in gradient.values()))
        if not math.isfinite(norm):
            continue
        for name, g in gradient.items():
            total[name] += g.double() * (1.0 if norm <= clip_norm else clip_norm / norm)
    return total


# ---------------------------------------------------------------- factors and plain sums


def test_factors_bring_norms_down_never_up():
    norms = torch.tensor([0.0, 0.5, 2.0, 8.0, 1e35, math.inf, math.nan])
    factors = clip_factors(norms, 2.0)
    assert torch.equal(factors[[0, 1]], torch.ones(2))
    assert factors[3].item() == pytest.approx(0.25, rel=2e-5)
    assert (factors * norms)[:4].max() <= 2.0
    assert torch.equal(factors[4:], torch.zeros(3))


def test_automatic_factors_bring_every_norm_just_below_the_clip_norm():
    norms = torch.tensor([0.0, 1e-3, 0.5, 2.0, 8.0, 1e35, math.inf, math.nan], dtype=torch.float64)
    factors = clip_factors(norms, 2.0, automatic=True)
    for norm, factor in zip(norms[:5].tolist(), factors[:5].tolist(), strict=True):
        assert factor == pytest.approx(2 / (norm + 0.01), rel=2e-5)
    assert (factors * norms)[:5].max() < 2.0
    assert factors[2] * norms[2] == pytest.approx(2 * 0.5 / 0.51, rel=2e-5)  # longer than before, unlike a clip
    assert torch.equal(factors[5:], torch.zeros(3, dtype=torch.float64))
    with pytest.raises(UsageError, match="clip norm"):
        clip_factors(norms, 0.0, automatic=True)


def test_senseless_values_are_refused():
    for clip_norm in (0.0, -1.0, math.nan, math.inf, 1e-9):
        with pytest.raises(UsageError, match="clip norm"):
            clip_factors(torch.ones(1), clip_norm)
        with pytest.raises(UsageError, match="clip norm"):
            clipped_softmax_sum(torch.ones(1, 2), torch.zeros(1, dtype=torch.int64), torch.ones(2, 2), clip_norm)
    _, loss, parameters, images, labels = network_case()
    with pytest.raises(UsageError, match="microbatch"):
        gradient_sum(loss, parameters, images, labels, 1.0, 0)


@settings(max_examples=150, deadline=None)
@given(names=kinds, dtype=floats, seed=seeds, clip_norm=st.sampled_from([1e-3, 1.0, 50.0]), automatic=st.booleans())
def test_clipped_sums_move_by_at_most_the_clip_norm(names, dtype, seed, clip_norm, automatic):
    generator = torch.Generator().manual_seed(seed)
    batch = {
        "weight": scaled(torch.randn(len(names), 4, 3, generator=generator), names).to(dtype),
        "bias": scaled(torch.randn(len(names), 5, generator=generator), names).to(dtype),
        "scale": torch.randn(len(names), generator=generator).to(dtype),
    }
    whole = clipped_sum(batch, clip_norm, automatic=automatic)
    for index in range(len(names)):
        left = {name: without(index, value)[0] for name, value in batch.items()}
        assert distance(whole, clipped_sum(left, clip_norm, automatic=automatic)) <= clip_norm * (1 + 1e-6)
    assert all(bool(torch.isfinite(value).all()) for value in whole.values())
    # the norm is joint: two tensors of norm C each are not both kept whole
    total = clipped_sum({"a": torch.tensor([[1.0, 0.0]]), "b": torch.tensor([[0.0, 1.0]])}, 1.0)
    assert distance(total, {name: torch.zeros(2) for name in total}) == pytest.approx(1.0, abs=2e-5)


def test_without_clipping_the_same_check_fails():
    """Positive control of the property above."""
    batch = {"weight": scaled(torch.randn(3, 4), ["unit", "large", "unit"])}
    whole, rest = batch["weight"].sum(0), without(1, batch["weight"])[0].sum(0)
    assert distance({"w": whole}, {"w": rest}) > 1 + 1e-6


@pytest.mark.parametrize("order", [(0, 1, 2, 3), (0, 2, 3, 1), (1, 2, 3, 0)])
def test_the_layout_in_memory_changes_nothing(order):
    generator = torch.Generator().manual_seed(7)
    gradients = torch.randn(4, 5, 6, 7, generator=generator)
    inverse = [order.index(axis) for axis in range(4)]
    laid_out = gradients.permute(order).contiguous().permute(inverse)
    assert laid_out.is_contiguous() == (order == (0, 1, 2, 3))
    batch = {"a": laid_out, "b": torch.randn(4, generator=generator)}
    expected = clipped_loop([{name: value[i] for name, value in batch.items()} for i in range(4)], 3.0)
    assert distance(clipped_sum(batch, 3.0), expected) < 1e-3
    total = sum_of_clipped([batch, batch], {name: value[0] for name, value in batch.items()}, 3.0)
    assert distance(total, {name: 2 * value for name, value in expected.items()}) < 1e-3
    assert all(value.is_contiguous() for value in total.values())


@pytest.mark.parametrize("numbers", [1, 128, 255, 256, 257, 100_000])
@pytest.mark.parametrize("kind", ["normal", "equal", "falling"])
def test_norms_of_long_rows_are_precise(numbers, kind):
    """Far within the slack that clipping keeps for rounding."""
    rows = torch.randn(3, numbers, generator=torch.Generator().manual_seed(8))
    if kind == "equal":  # roundings of equal numbers all go the same way
        rows = torch.tensor([1 / 3, 0.7, 1.1])[:, None].expand(3, numbers).contiguous()
    elif kind == "falling":
        rows = rows / torch.arange(1, numbers + 1)
    precise = rows.double().square().sum(1)
    assert torch.allclose(squared_norms(rows), precise, rtol=2 * ROUNDING_SLACK / 4, atol=0)
    one_by_one = torch.tensor([np.cumsum(row, dtype=np.float32)[-1] for row in rows.square().numpy()]).double()
    if (numbers, kind) == (100_000, "equal"):  # the control: float32 all the way would not be precise
        assert not torch.allclose(one_by_one, precise, rtol=2 * ROUNDING_SLACK / 4, atol=0)


# ---------------------------------------------------------------- any loss, by per-example gradients


def small_network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.GroupNorm(2, 4), nn.Tanh(), nn.Flatten(), nn.Linear(36, 3))


def network_loss(network: nn.Module):
    def loss(parameters, images, label):
        logits = torch.func.functional_call(network, dict(parameters), (images,))
        return functional.cross_entropy(logits, label.expand(len(images)))

    return loss


def autograd_loop(network: nn.Module, images: torch.Tensor, labels: torch.Tensor) -> list[dict[str, torch.Tensor]]:
    gradients = []
    for views, label in zip(images, labels, strict=True):
        network.zero_grad()
        torch.stack([functional.cross_entropy(network(view[None]), label[None]) for view in views]).mean().backward()
        gradients.append({name: p.grad.clone() for name, p in network.named_parameters()})
    return gradients


def network_case(examples: int = 6, views: int = 3):
    network = small_network()
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(examples, views, 1, 5, 5, generator=generator)
    labels = torch.randint(0, 3, (examples,), generator=generator)
    parameters = {name: p.detach() for name, p in network.named_parameters()}
    return network, network_loss(network), parameters, images, labels


def gradient_sum(loss, parameters, images, labels, clip_norm, microbatch):
    gradients = per_example_gradients(loss, parameters, images, labels, microbatch)
    return sum_of_clipped(gradients, parameters, clip_norm)


@pytest.mark.parametrize("microbatch", [1, 4, 100])
def test_gradient_sums_equal_an_autograd_loop_for_every_microbatch(microbatch):
    network, loss, parameters, images, labels = network_case()
    expected = clipped_loop(autograd_loop(network, images, labels), 0.4)
    total = gradient_sum(loss, parameters, images, labels, 0.4, microbatch)
    assert distance(total, expected) < 5e-5
    assert set(total) == set(parameters)


def test_the_mean_over_views_is_clipped_and_not_each_view():
    """Two opposite views cancel in the mean; clipped one by one they would still cancel, but three to one would not."""
    parameters = {"w": torch.zeros(2)}
    views = torch.tensor([[[8.0, 0.0], [-1.0, 0.0], [-1.0, 0.0], [-1.0, 0.0]]])

    def loss(p, images, label):
        return (images @ p["w"]).mean()

    total = gradient_sum(loss, parameters, views, torch.zeros(1, dtype=torch.int64), 2.0, 1)
    assert total["w"][0].item() == pytest.approx(1.25)  # one by one: (2 − 1 − 1 − 1)/4 = −0.25


@settings(max_examples=15, deadline=None)
@given(names=st.lists(st.sampled_from(sorted(KINDS)), min_size=1, max_size=4), microbatch=st.integers(1, 4), seed=seeds)
def test_gradient_sums_of_hostile_images_move_by_at_most_the_clip_norm(names, microbatch, seed):
    _, loss, parameters, _, _ = network_case()
    generator = torch.Generator().manual_seed(seed)
    images = scaled(torch.randn(len(names), 2, 1, 5, 5, generator=generator), names)
    labels = torch.randint(0, 3, (len(names),), generator=generator)
    whole = gradient_sum(loss, parameters, images, labels, 0.1, microbatch)
    for index in range(len(names)):
        rest = gradient_sum(loss, parameters, *without(index, images, labels), 0.1, microbatch)
        assert distance(whole, rest) <= 0.1 * (1 + 1e-6)


def test_examples_are_isolated():
    _, loss, parameters, images, labels = network_case()
    before = next(per_example_gradients(loss, parameters, images, labels, 6))
    changed = images.clone()
    changed[1:] = 100 * torch.randn_like(changed[1:])
    changed[2] = math.nan
    after = next(per_example_gradients(loss, parameters, changed, labels, 6))
    for name in parameters:
        assert torch.allclose(before[name][0], after[name][0], atol=1e-6)
        assert not torch.allclose(before[name][1], after[name][1], atol=1e-3)


def test_an_empty_batch_gives_zeros_of_every_parameter():
    _, loss, parameters, images, labels = network_case()
    total = gradient_sum(loss, parameters, images[:0], labels[:0], 1.0, 4)
    assert {name: tuple(v.shape) for name, v in total.items()} == {
        name: tuple(v.shape) for name, v in parameters.items()
    }
    assert all(not bool(value.any()) for value in total.values())


# ---------------------------------------------------------------- the closed form of the linear head


def head_loop(features: torch.Tensor, labels: torch.Tensor, weight: torch.Tensor) -> list[dict[str, torch.Tensor]]:
    """Autograd, one example at a time, mean over its views, in float64."""
    gradients = []
    for x, label in zip(features.double().reshape(len(features), -1, features.shape[-1]), labels, strict=True):
        w = weight.double().clone().requires_grad_()
        functional.cross_entropy(x @ w, label.expand(len(x))).backward()
        gradients.append({"w": w.grad})
    return gradients


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("views", [None, 3])
@pytest.mark.parametrize("clip_norm", [0.05, 0.7, 100.0])
def test_closed_form_equals_an_autograd_loop(dtype, views, clip_norm):
    generator = torch.Generator().manual_seed(5)
    shape = (11, 8) if views is None else (11, views, 8)
    features = torch.randn(shape, generator=generator).to(dtype)
    labels = torch.randint(0, 4, (11,), generator=generator)
    weight = torch.randn(8, 4, generator=generator)
    expected = clipped_loop(head_loop(features, labels, weight), clip_norm)
    with mock.patch.object(clipping, "BLOCK", 4):
        total = clipped_softmax_sum(features, labels, weight, clip_norm)
    assert distance({"w": total}, expected) < 3e-5 * 11 * min(clip_norm, 1.0)
    assert total.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert total.is_contiguous()


@settings(max_examples=60, deadline=None)
@given(
    names=kinds,
    views=st.integers(1, 4),
    block=st.integers(1, 9),
    dtype=floats,
    clip_norm=st.sampled_from([1e-3, 1.0, 50.0]),
    cancelling=st.booleans(),
    seed=seeds,
)
def test_closed_form_moves_by_at_most_the_clip_norm(names, views, block, dtype, clip_norm, cancelling, seed):
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(len(names), views, 6, generator=generator)
    if cancelling and views > 1:  # the last view nearly undoes the others: where a Gram matrix loses its digits
        features[:, -1] = -features[:, :-1].sum(1) * (1 + 1e-6)
    features = scaled(features, names).to(dtype)
    labels = torch.randint(0, 3, (len(names),), generator=generator)
    weight = torch.randn(6, 3, generator=generator) * (0.0 if cancelling else 1.0)
    with mock.patch.object(clipping, "BLOCK", block):
        whole = {"w": clipped_softmax_sum(features, labels, weight, clip_norm)}
        assert bool(torch.isfinite(whole["w"]).all())
        for index in range(len(names)):
            rest = {"w": clipped_softmax_sum(*without(index, features, labels), weight, clip_norm)}
            assert distance(whole, rest) <= clip_norm * (1 + 1e-6)


def test_what_does_not_fit_is_refused_without_naming_a_label():
    with pytest.raises(UsageError, match="do not fit"):
        clipped_softmax_sum(torch.zeros(2, 4), torch.zeros(3, dtype=torch.int64), torch.ones(4, 3), 1.0)
    with pytest.raises(UsageError) as caught:
        clipped_softmax_sum(torch.zeros(2, 4), torch.tensor([0, 77]), torch.ones(4, 3), 1.0)
    assert "77" not in str(caught.value)
    for rows in ([0, 3, 0], [4], [-1]):  # a record that would count twice, or is none
        with pytest.raises(UsageError, match=r"not different positions in 0 … 3"):
            clipped_softmax_sum(
                torch.zeros(4, 2), torch.zeros(4, dtype=torch.int64), torch.ones(2, 2), 1.0, rows=torch.tensor(rows)
            )


# ---------------------------------------------------------------- layers


class HomeMadeBatchNorm(nn.Module):
    pass


@pytest.mark.parametrize(
    "layer",
    [nn.BatchNorm1d(2), nn.BatchNorm2d(2), nn.SyncBatchNorm(2), nn.LazyBatchNorm2d(), HomeMadeBatchNorm(),
     nn.InstanceNorm2d(2, track_running_stats=True)],
    ids=lambda layer: type(layer).__name__,
)  # fmt: skip
def test_layers_that_mix_examples_are_refused_by_name(layer):
    network = nn.Sequential(nn.Linear(2, 2), nn.ModuleDict({"norm": layer}))
    with pytest.raises(UsageError, match=rf"'1\.norm' is a {type(layer).__name__}"):
        refuse_cross_example_layers(network)


def test_layers_that_keep_examples_apart_are_accepted():
    refuse_cross_example_layers(nn.Sequential(nn.GroupNorm(1, 2), nn.LayerNorm(2), nn.InstanceNorm2d(2), nn.Dropout()))


@pytest.mark.parametrize("views", [None, 3])
@pytest.mark.parametrize("block", [1, 3, 512])
def test_rows_are_the_same_as_a_copy_of_them(views: int | None, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """And blocks of any size, an example that is not finite, and no examples, make no difference."""
    generator = torch.Generator().manual_seed(5)
    features = torch.randn(40, *(() if views is None else (views,)), 6, generator=generator)
    features[7] = float("nan")
    labels, weight = torch.randint(0, 3, (40,), generator=generator), torch.randn(6, 3, generator=generator)
    for rows in (torch.arange(0, 40, 3), torch.tensor([31, 7, 2]), torch.arange(40), torch.arange(0)):
        copied = clipped_softmax_sum(features[rows[rows != 7]], labels[rows[rows != 7]], weight, 0.5)
        with monkeypatch.context() as patch:
            patch.setattr(clipping, "BLOCK", block)
            assert torch.allclose(clipped_softmax_sum(features, labels, weight, 0.5, rows=rows), copied, atol=1e-6)
            assert torch.allclose(clipped_softmax_sum(features[rows], labels[rows], weight, 0.5), copied, atol=1e-6)
