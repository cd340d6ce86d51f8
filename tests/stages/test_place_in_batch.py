"""A record's gradient does not depend on its place in a sampled batch, which the other records decide."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from small_models import SETTING, images_and_labels, model_of
from tiny_run import CLASSES
from torch import Tensor

from dprandp import losses
from dprandp.dpsgd.clipped_sums import gradient_source
from dprandp.vision.views import keyed_uniforms, private_views

COUNT, WIDTH = 9, 300


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def labels_of(several: bool, count: int = COUNT) -> Tensor:
    labels = torch.arange(count) % CLASSES
    return torch.stack([(labels + shift) % 2 for shift in range(CLASSES)], dim=1) if several else labels


@pytest.mark.parametrize("several", [False, True])
@pytest.mark.parametrize("weighted", [False, True])
def test_gradients_through_the_head_equal_those_of_the_loss_written_out(several: bool, weighted: bool) -> None:
    views, labels, head = 2, labels_of(several), random(WIDTH, CLASSES)
    unit = random(COUNT * views, WIDTH, seed=1)
    weights = losses.class_weights((0.1, 0.3, 0.6), several) if weighted else None
    found, towards = losses.through_head(unit, head, labels, views, weights)
    for record in range(COUNT):
        own = slice(record * views, (record + 1) * views)
        x = unit[own].double().requires_grad_()
        scores = (x @ head.double()).requires_grad_()
        scores.retain_grad()
        losses.loss(scores, torch.stack([labels[record]] * views), weights).mean().backward()
        torch.testing.assert_close(found[own].double(), scores.grad, atol=1e-7, rtol=1e-6)
        torch.testing.assert_close(towards[own].double(), x.grad, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("width", [64, 300, 4_096])
def test_gradients_through_the_head_are_the_same_at_every_place_to_the_bit(width: int) -> None:
    """Not so for float32 products: a difference of 1e-7 may be a whole digit after rounding to bfloat16."""
    head, row = random(width, 10), random(1, width, seed=1)
    made = []
    for place in range(COUNT):
        unit = random(COUNT, width, seed=2)
        unit[place] = row
        labels = torch.zeros(COUNT, dtype=torch.int64)
        made.append([value[place] for value in losses.through_head(unit, head, labels, 1)])
    for apart, towards in made[1:]:
        assert torch.equal(apart, made[0][0])
        assert torch.equal(towards, made[0][1])


SLOW = [("deep", "bfloat16"), ("wrn-10-1", "bfloat16")]
CASES = [
    pytest.param(arch, precision, tolerance, marks=pytest.mark.slow if (arch, precision) in SLOW else ())
    for arch in ("patchnet", "deep", "wrn-10-1", "vit-1-16-16")
    for precision, tolerance in (("float32", 1e-6), ("bfloat16", 5e-3))
]


@pytest.mark.parametrize(("arch", "precision", "tolerance"), CASES)
@pytest.mark.parametrize("views", [1, 2])
def test_the_gradient_of_a_record_depends_neither_on_its_place_nor_on_the_others(
    arch: str, precision: str, tolerance: float, views: int
) -> None:
    model = model_of(arch)
    model.extractor.precision = precision
    model.requires_grad_(False)
    settings = replace(SETTING, views=views, microbatch=COUNT)
    source = gradient_source(model, settings)
    images, labels = images_and_labels(2 * COUNT)
    drawn = private_views(images, views, keyed_uniforms(torch.arange(2 * COUNT), 0, 0, views), flip=True)
    parameters = {name: value.detach().clone() for name, value in model.named_parameters()}

    def of(record: int, place: int, batch: list[int]) -> Tensor:
        batch[place] = record
        (gradients,) = source(parameters, drawn[batch], labels[batch])
        return torch.cat([value[place].flatten() for value in gradients.values()]).double()

    alone = of(0, 0, [0])
    assert alone.norm() > 0
    for place in range(COUNT):
        found = of(0, place, list(range(COUNT, 2 * COUNT)))
        assert (found - alone).norm() <= tolerance * alone.norm(), place
