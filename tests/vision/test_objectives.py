"""The objectives by name: what they take, what they learn beforehand, and that each of them teaches something."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from dprandp.config import PretrainConfig
from dprandp.errors import UsageError
from dprandp.pretrain_config import OBJECTIVES
from dprandp.synth import render_block
from dprandp.vision import objectives
from dprandp.vision.contrastive import ContrastiveTrainer
from dprandp.vision.extractors import build_extractor
from dprandp.vision.objectives import build_objective, patches_axes

TINY = PretrainConfig(arch="wrn-10-1", steps=12, batch_size=8, projection_hidden=32, projection_dim=16)


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def leaves():
    """uint8 [24, 3, 32, 32]."""
    return torch.from_numpy(render_block("dead-leaves", 0, 0, 24, 32)).permute(0, 3, 1, 2).contiguous()


@pytest.fixture(scope="module")
def taught(leaves):
    """An objective ``patches`` that has learned from few patches."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(objectives, "TEACHER_FILTERS", 24)
        patch.setattr(objectives, "TEACHER_PATCHES", 2000)
        made = build_objective(replace(TINY, objective="patches"), len(leaves))
        made.learn(leaves, torch.Generator().manual_seed(0))
    return made


def trainer(leaves, taught, config):
    network = build_extractor(config, torch.Generator().manual_seed(config.seed))
    return ContrastiveTrainer(network, config, leaves, taught if config.objective == "patches" else None)


def raw(state):
    return {name: (tuple(tensor.shape), tensor.numpy().tobytes()) for name, tensor in state.items()}


@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_loss_without_flaw_has_no_gradient_and_random_views_have(leaves, taught, name):
    made = trainer(leaves, taught, replace(TINY, objective=name))
    outputs = made.objective.outputs
    assert outputs == (12 if name == "patches" else 16)
    images = torch.arange(24)
    targets = torch.nn.functional.normalize(torch.randn(24, 2 * outputs), dim=1) if name == "patches" else None
    x, y = torch.randn(24, outputs, requires_grad=True), torch.randn(24, outputs)
    loss = made.objective(x, y, images, targets)
    loss.backward()
    assert loss.shape == ()
    assert x.grad.norm() > 0
    if name == "patches":
        assert made.objective(*targets.chunk(2, dim=1), images, targets).item() == pytest.approx(0, abs=1e-6)
    if name == "instances":
        classes = made.objective.classes.detach()
        assert made.objective(classes, classes, images, None) < loss - 1


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in OBJECTIVES if name != "align-uniformity"])
def test_the_loss_goes_down(leaves, taught, name):
    """On one batch of views, seen again and again."""
    config = replace(TINY, objective=name, optimizer="adamw", lr=3e-3, steps=1000)
    made = trainer(leaves, taught, config)
    drawn = made.draw(0)
    made.draw = lambda step: drawn
    losses = [float(made.step(100)) for _ in range(40)]
    assert sum(losses[-5:]) / 5 < 0.95 * losses[0], losses


@pytest.mark.parametrize(("name", "optimizer"), [("vicreg", "adamw"), ("instances", "adamw"), ("patches", "sgd")])
def test_stopped_and_resumed_is_uninterrupted_byte_for_byte(leaves, taught, name, optimizer):
    config = replace(TINY, objective=name, optimizer=optimizer, steps=4, batch_size=3)
    whole = trainer(leaves, taught, config)
    losses = [float(whole.step(step)) for step in range(4)]
    first = trainer(leaves, taught, config)
    for step in range(2):
        first.step(step)
    saved = {key: tensor.clone() for key, tensor in first.state().items()}
    blank = build_objective(config, 24) if name != "patches" else taught
    network = build_extractor(config, torch.Generator().manual_seed(9))
    second = ContrastiveTrainer(network, config, leaves, blank)
    second.load_state(saved)
    assert [float(second.step(step)) for step in (2, 3)] == losses[2:]
    assert raw(second.state()) == raw(whole.state())


def test_what_patches_learned_travels_with_the_state(taught, monkeypatch):
    monkeypatch.setattr(objectives, "TEACHER_FILTERS", 24)
    blank = build_objective(replace(TINY, objective="patches"), 24, outputs=12)
    crops = torch.rand(5, 3, 32, 32)
    assert not torch.allclose(blank.targets(crops), taught.targets(crops))
    blank.load_state_dict(taught.state_dict())
    assert torch.equal(blank.targets(crops), taught.targets(crops))


def test_targets_are_of_the_crop_before_its_colours_changed(leaves, taught):
    """The same boxes and mirrors, whatever else was drawn; and each crop by itself."""
    made = trainer(leaves, taught, replace(TINY, objective="patches"))
    chosen, first, second = made.draw(0)
    targets = made.targets(chosen, first, second)
    assert targets.shape == (8, 24)
    torch.testing.assert_close(targets.view(16, 12).norm(dim=1), torch.ones(16))
    other = replace(first, factors=first.factors * 0.5, grey=~first.grey, order=(3, 2, 1, 0))
    assert torch.equal(made.targets(chosen, other, second), targets)
    assert not torch.equal(made.targets(chosen, replace(first, flip=~first.flip), second), targets)
    one = made.targets(chosen[:1], of_first_image(first), of_first_image(second))
    torch.testing.assert_close(one, targets[:1])
    crop = made.views.crop(leaves[chosen[:1]], of_first_image(first), 32)
    top, left, height, width = first.boxes[0].tolist()
    inside = leaves[chosen[0], :, top : top + height, left : left + width].float() / 255
    assert crop.shape == (1, 3, 32, 32)
    assert crop.mean(dim=(0, 2, 3)).tolist() == pytest.approx(inside.mean(dim=(1, 2)).tolist(), abs=0.05)


def of_first_image(choices):
    return replace(choices, **{name: getattr(choices, name)[:1] for name in ("boxes", "flip", "factors", "grey")})


def test_small_views_come_first_where_the_training_grows(leaves, taught):
    made = trainer(leaves, taught, replace(TINY, grow=True, steps=4))
    sizes = []
    embed = made.network.normalise
    made.network.normalise = lambda views: sizes.append(views.shape[-1]) or embed(views)
    for step in range(4):
        made.step(step)
    assert sizes == [16, 16, 32, 32]


def test_fresh_images_are_asked_for_at_every_step(leaves, taught):
    asked = []
    network = build_extractor(TINY, torch.Generator().manual_seed(0))
    made = ContrastiveTrainer(network, TINY, leaves, fresh=lambda step: asked.append(step) or leaves)
    plain = trainer(leaves, taught, TINY)
    assert [float(made.step(step)) for step in range(2)] == [float(plain.step(step)) for step in range(2)]
    assert asked == [0, 1]
    made.fresh = lambda step: 255 - leaves
    assert float(made.step(2)) != float(plain.step(2))


def test_what_cannot_be_built_is_refused():
    with pytest.raises(UsageError, match="no objective called 'simclr'"):
        build_objective(replace(TINY, objective="simclr"), 10)
    with pytest.raises(UsageError, match="from 3 images"):
        build_objective(replace(TINY, objective="patches"), 3)
    assert [patches_axes(crops) for crops in (4, 100, 2000, 10**6)] == [2, 50, 512, 512]
