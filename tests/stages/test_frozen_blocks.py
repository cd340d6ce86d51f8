"""Whole frozen blocks: gradients of the rest are what they were, nothing goes back through them, outputs are kept."""

from __future__ import annotations

import pytest
import torch
from tiny_run import CLASSES, blobs
from torch import Tensor

from dprandp.config import schema
from dprandp.config.schema import PretrainConfig
from dprandp.dpsgd import clipped_sums, masks
from dprandp.dpsgd.clipped_sums import Batch, ClippedSums, SumSettings
from dprandp.dpsgd.masks import FrozenPrefix, choose_blocks, rule_of
from dprandp.errors import UsageError
from dprandp.models.classifier import Classifier
from dprandp.models.extractor import build_extractor
from dprandp.models.whitening import PooledOnly
from dprandp.vision.images import to_input

SETTINGS = {"scale": 0.5, "views": 1, "seed": 0, "flip": False, "clip_norm": 0.2}


def model_of(arch: str = "wrn-10-1") -> Classifier:
    generator = torch.Generator().manual_seed(1)
    extractor = build_extractor(PretrainConfig(arch=arch, filters=8), generator)
    model = Classifier(extractor, PooledOnly(extractor.feature_dim), CLASSES)
    model.head.data.normal_(generator=generator)
    return model


def chosen(model: Classifier, **settings) -> masks.FrozenBlocks:
    given = {"source": "scratch", "scope": "block", "freeze": "last", "keep": 0.5}
    return choose_blocks(rule_of(schema.build("finetune", given | settings)), model)


def batch(count: int) -> Batch:
    made = blobs(3)
    labels = torch.from_numpy(made["y_train"][:count])
    return Batch(to_input(made["x_train"][:count]), labels, torch.arange(count))


def trained(model: Classifier, blocks: masks.FrozenBlocks) -> dict[str, Tensor]:
    return {
        name: value.detach().clone() / (0.5 if name.startswith("extractor.") else 1)
        for name, value in model.named_parameters()
        if blocks.trains(name)
    }


def test_blocks_are_chosen_by_public_things_alone():
    model = model_of()
    last = chosen(model)
    assert (last.frozen, last.first, last.of) == (("extractor.stem.", "extractor.blocks.0."), 2, 4)
    assert "2 of 4 blocks" in last.in_words()
    assert last.trains("head")
    assert last.trains("extractor.final_norm.bias")
    with torch.no_grad():
        model.extractor.blocks[1].conv1.weight.mul_(50)
    heavy = chosen(model, freeze="magnitude", keep=0.3)
    assert heavy.first == 2
    assert "extractor.blocks.2." in heavy.frozen
    random = [chosen(model, freeze="random", seed=seed).frozen for seed in range(6)]
    assert len(set(random)) > 1
    assert chosen(model_of(), freeze="random", seed=3).frozen == random[3]


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"freeze": "last", "scope": "global"}, "chooses whole blocks"),
        ({"freeze": None, "select": "random"}, "single weights"),
        ({"prune": "zero"}, "computes nothing"),
    ],
)
def test_what_blocks_cannot_do_is_refused(settings, said):
    with pytest.raises(UsageError, match=said):
        chosen(model_of(), **settings)


def test_a_network_without_blocks_is_refused():
    with pytest.raises(UsageError, match="has no blocks"):
        chosen(model_of("patchnet"))


@pytest.mark.parametrize("views", [1, 2])
def test_gradients_above_frozen_blocks_are_those_of_autograd(views, monkeypatch):
    model = model_of()
    blocks = chosen(model)
    parameters, given = trained(model, blocks), batch(3)
    short = ClippedSums(model, SumSettings(**SETTINGS | {"views": views}, frozen_first=blocks.first))
    monkeypatch.setattr(clipped_sums, "has_layer_gradients", lambda extractor: False)
    whole = ClippedSums(model, SumSettings(**SETTINGS | {"views": views}))
    for step in range(2):  # the second time from what was kept
        found, expected = short.of(parameters, step, given), whole.of(parameters, step, given)
        for name, value in expected.items():
            assert float((found[name] - value).abs().max()) < 1e-5 * 0.2 + 1e-4 * float(value.abs().max()), name
    assert not any("stem" in name or "blocks.0" in name for name in found)


def test_outputs_are_kept_where_views_do_not_change(monkeypatch):
    model, given = model_of(), batch(4)
    made = []
    forward = FrozenPrefix._forward
    monkeypatch.setattr(FrozenPrefix, "_forward", lambda self, x: made.append(len(x)) or forward(self, x))
    prefix = FrozenPrefix(model, 2, keep=True)
    first = prefix.outputs(given.images[:3, None], given.members[:3])
    second = prefix.outputs(given.images[1:, None], given.members[1:])
    assert made == [3, 1]
    assert torch.equal(first[1:], second[:2])
    plain = FrozenPrefix(model, 2, keep=False)
    assert torch.allclose(plain.outputs(given.images[1:, None], given.members[1:]), second, atol=1e-5)
    plain.outputs(given.images[1:, None], given.members[1:])
    assert made == [3, 1, 3, 3]
    monkeypatch.setattr(masks, "CACHE_BYTES", 2 * first[0].numel() * 4)
    small = FrozenPrefix(model, 2, keep=True)
    for _ in range(2):
        assert torch.allclose(small.outputs(given.images[:3, None], given.members[:3]), first, atol=1e-5)
    assert made[4:] == [3, 1]  # two of three found room
    assert prefix.outputs(given.images[:0, None], given.members[:0]).shape == (0, *first.shape[1:])


def test_nothing_goes_back_through_frozen_blocks():
    """No operation of a frozen block is recorded for a backward pass: its outputs ask for no gradient."""
    model = model_of()
    blocks = chosen(model)
    sums = ClippedSums(model, SumSettings(**SETTINGS, frozen_first=blocks.first))
    asked = {}
    for name, unit in model.extractor.units():
        unit.register_forward_hook(lambda *seen, name=name: asked.update({name: seen[2].requires_grad}))
    sums.of(trained(model, blocks), 0, batch(1))
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert blocks.first > 0
    for name, _ in model.extractor.units()[: blocks.first]:
        assert asked[name] is False
