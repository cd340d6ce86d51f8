"""Contrastive pretraining: the published schedule, learning on a handful of images, exact resuming."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from dprandp.config.schema import PretrainConfig
from dprandp.models.extractor import build_extractor
from dprandp.pretrain import contrastive
from dprandp.pretrain.contrastive import ContrastiveTrainer, learning_rate, train
from dprandp.synth import render_block

pytestmark = pytest.mark.usefixtures("one_thread")
TINY = PretrainConfig(
    arch="wrn-10-1", steps=12, batch_size=8, lr=0.05, projection_hidden=32, projection_dim=16, momentum=0.9
)


@pytest.fixture(scope="module")
def pictures():
    """uint8 [12, 3, 32, 32]: smooth blobs, each image of its own colours."""
    random = np.random.default_rng(0)
    coarse = torch.from_numpy(random.uniform(0, 255, (12, 3, 4, 4))).float()
    return torch.nn.functional.interpolate(coarse, 32, mode="bilinear").round().to(torch.uint8)


def trainer(pictures, config=TINY):
    return ContrastiveTrainer(build_extractor(config, torch.Generator().manual_seed(config.seed)), config, pictures)


def run(made, first, last):
    return [float(made.step(step)) for step in range(first, last)]


def raw(state):
    return {name: (tensor.dtype, tuple(tensor.shape), tensor.numpy().tobytes()) for name, tensor in state.items()}


# ------------------------------------------------------------------------------------------------------------ schedule


def test_the_cosine_schedule_warms_up_and_ends_at_zero():
    config = PretrainConfig(steps=200, lr=2.0, schedule="cosine")
    rates = [learning_rate(config, step) for step in range(200)]
    for step in range(200):
        warm_up = (step + 1) / 10 if step < 10 else 1  # 5 % of 200
        assert rates[step] == pytest.approx(2.0 * warm_up * (1 + math.cos(math.pi * step / 200)) / 2)
    assert rates[0] == pytest.approx(0.2)
    assert max(range(200), key=rates.__getitem__) == 9
    assert rates[100] == pytest.approx(1.0)
    assert rates[9:] == sorted(rates[9:], reverse=True)
    assert 0 < rates[-1] < 1e-3


def test_the_step_schedule_has_the_published_boundaries():
    """155, 170 and 185 of 200 epochs; 410 steps an epoch at size paper."""
    config = PretrainConfig(steps=82_000, lr=0.12, schedule="step")
    expected = {0: 0.12, 154: 0.12, 155: 0.012, 169: 0.012, 170: 0.0012, 184: 0.0012, 185: 0.00012, 199: 0.00012}
    for epoch, rate in expected.items():
        assert learning_rate(config, epoch * 410) == pytest.approx(rate)
    for epoch in (155, 170, 185):
        before, after = (learning_rate(config, epoch * 410 - 1), learning_rate(config, epoch * 410))
        assert after == pytest.approx(0.1 * before)


@pytest.mark.parametrize("schedule", ["cosine", "step"])
def test_schedules_of_a_few_steps_are_positive(schedule):
    for steps in (1, 2, 3):
        config = PretrainConfig(steps=steps, schedule=schedule)
        assert all(0 < learning_rate(config, step) <= 0.03 for step in range(steps))


@pytest.mark.parametrize(
    ("settings", "rate"),
    [({}, 0.03), ({"size": "paper"}, 0.12), ({"optimizer": "adamw"}, 1e-3), ({"optimizer": "adamw", "lr": 0.5}, 0.5)],
)
def test_the_rate_that_was_not_given_is_the_optimizers(settings, rate):
    assert max(learning_rate(PretrainConfig(**settings), step) for step in range(100)) == pytest.approx(rate, rel=0.02)


def test_every_parameter_that_is_used_is_trained_at_the_schedules_rate(pictures):
    made = trainer(pictures)
    before = {name: tensor.clone() for name, tensor in made.state().items()}
    for step in (0, 5):
        made.step(step)
        assert {group["lr"] for group in made.optimizer.param_groups} == {learning_rate(TINY, step)}
    unmoved = [name for name, tensor in made.state().items() if name in before and torch.equal(tensor, before[name])]
    # the trunk alone is trained, as published: the final activation's norm has no gradient and only decays
    assert [name for name in unmoved if "network.final_norm." not in name] == []
    state = made.state()
    assert all(tensor.is_contiguous() and not tensor.requires_grad for tensor in state.values())
    momenta = {name for name in state if name.startswith("optimizer.momentum_buffer.")}
    assert len(momenta) == len(made.optimizer.param_groups[0]["params"]) > 10
    assert {name.removeprefix("optimizer.momentum_buffer.") for name in momenta} <= state.keys()


# ------------------------------------------------------------------------------------------------------------ learning


@pytest.mark.slow
def test_the_loss_goes_down():
    """Against untrained weights on the very same views; beforehand both agree."""
    leaves = torch.from_numpy(render_block("dead-leaves", 0, 0, 60, 32)).permute(0, 3, 1, 2).contiguous()
    config = replace(TINY, steps=30, schedule="step", batch_size=24, lr=0.01, projection_hidden=64, projection_dim=32)
    trained = run(trainer(leaves, config), 0, 23)  # before the first drop of the rate
    still = trainer(leaves, replace(config, lr=1e-12))
    assert run(still, 0, 1)[0] == pytest.approx(trained[0], abs=1e-4)
    assert np.mean(trained[-4:]) < np.mean(run(still, 19, 23)) - 0.25


def test_train_reports_the_mean_since_the_last_time(pictures, monkeypatch):
    monkeypatch.setattr(contrastive, "LOG_EVERY", 3)
    config = replace(TINY, steps=7)
    expected = run(trainer(pictures, config), 0, 7)
    reports = []
    last = train(trainer(pictures, config), 0, on_step=lambda done, mean: reports.append((done, mean)))
    assert [done for done, _ in reports] == list(range(1, 8))
    assert [mean is None for _, mean in reports] == [True, True, False, True, True, False, False]
    assert reports[2][1] == pytest.approx(np.mean(expected[:3]))
    assert last == reports[6][1] == pytest.approx(expected[6])


# ------------------------------------------------------------------------------------------------------------ resuming


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stop", "changes"), [(0, {}), (5, {}), (5, {"momentum": 0.0}), (5, {"optimizer": "adamw", "lr": 1e-3})]
)
def test_stopped_and_resumed_is_uninterrupted_byte_for_byte(pictures, stop, changes):
    config = replace(TINY, steps=9, **changes)
    whole = trainer(pictures, config)
    losses = run(whole, 0, 9)
    first = trainer(pictures, config)
    run(first, 0, stop)
    saved = {name: tensor.clone() for name, tensor in first.state().items()}
    second = trainer(pictures, replace(config, seed=99))  # other weights, to be replaced by the saved ones
    second.config = config
    second.load_state(saved)
    assert run(second, stop, 9) == losses[stop:]
    assert raw(second.state()) == raw(whole.state())


@pytest.mark.slow
def test_what_the_state_leaves_out_would_be_noticed(pictures):
    """Positive control of the test above: without the momentum the resumed training ends elsewhere."""
    whole, first, second = (trainer(pictures) for _ in range(3))
    run(whole, 0, 8)
    run(first, 0, 4)
    state = first.state()
    momenta = {name: torch.zeros_like(value) for name, value in state.items() if "momentum_buffer" in name}
    second.load_state(state | momenta)
    run(second, 4, 8)
    assert raw(second.state()) != raw(whole.state())


def test_a_step_is_a_function_of_seed_and_number(pictures, monkeypatch):
    torch.manual_seed(1)
    first = run(trainer(pictures), 0, 3)
    torch.manual_seed(2)  # the global generator has no say
    assert run(trainer(pictures), 0, 3) == first
    assert run(trainer(pictures, replace(TINY, seed=1)), 0, 3) != first
    seeds = {contrastive._step_seed(seed, step) for seed in range(20) for step in range(1000)}
    assert len(seeds) == 20_000
    assert all(0 <= contrastive._step_seed(seed, 10**6) < 2**63 for seed in (0, 2**63 - 1))
