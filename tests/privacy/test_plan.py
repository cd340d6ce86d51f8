"""Promises 2, 3, 7, 10, 12, 13 inside ``privacy``: what runs is what was accounted, and it is charged first."""

from __future__ import annotations

import json
import math

import noise_checks
import numpy as np
import pytest
import torch
from scipy import stats

from dprandp.errors import BudgetError, CheckpointError, UsageError
from dprandp.privacy import mechanism as plan_module
from dprandp.privacy.accounting import EpsilonBound, GaussianEvent, compose
from dprandp.privacy.ledger import Ledger
from dprandp.privacy.mechanism import PrivateMechanism, PrivatePlan, PrivateStep, make_plan, validate_budget
from dprandp.privacy.randomness import InsecureSeed, SystemRandom

N, Q, T, CLIP = 400, 0.25, 30, 0.5


def plan_of(**changes) -> PrivatePlan:
    values = {
        "stage": "probe", "examples": N, "sample_rate": Q, "steps": T, "noise_multiplier": 12.0, "clip_norm": CLIP,
        "views": 1, "epsilon_target": 2.0, "delta": 1e-4,
    }  # fmt: skip
    return PrivatePlan(**{**values, **changes})


@pytest.fixture
def ledger(tmp_path):
    return Ledger.create(tmp_path / "ledger.jsonl", examples=N)


ZEROS = {"weight": torch.zeros(60, 10), "bias": torch.zeros(10)}


def run(mechanism: PrivateMechanism, steps: int | None = None) -> list[dict[str, torch.Tensor]]:
    """Release zeros for all remaining steps, or for some."""
    released = []
    for step in mechanism.steps():
        released.append(step.release(ZEROS))
        if len(released) == steps:
            break
    return released


class Recorder(SystemRandom):
    """Real randomness, with a record of what was asked of it."""

    def __init__(self):
        self.coins, self.included, self.noisy_steps = 0, 0, 0

    def uniform(self, count):
        values = super().uniform(count)
        if count == N:  # a batch; Box-Muller asks for other sizes
            self.coins, self.included = self.coins + count, self.included + int((values < Q).sum())
        return values

    def gaussian(self, shape):
        self.noisy_steps += tuple(shape) == (60, 10)
        return super().gaussian(shape)


def test_what_runs_is_what_was_accounted(ledger):
    """The event rebuilt from observation alone equals the plan, and re-accounting the ledger equals the report."""
    plan, recorder = plan_of(), Recorder()
    mechanism = PrivateMechanism(plan, ledger, recorder)
    sizes, values = [], []
    for step in mechanism.steps():
        sizes.append(len(step.indices))
        released = step.release(ZEROS)
        values.append(torch.cat([value.flatten() for value in released.values()]) * Q * N)
    # steps and rate
    assert recorder.noisy_steps == len(sizes) == T
    assert recorder.coins == N * T
    assert recorder.included == sum(sizes)
    assert stats.binomtest(sum(sizes), N * T, Q).pvalue > 1e-6
    # noise in every coordinate of every tensor, of std σC after undoing the public divisor
    seen = torch.cat(values).double().numpy()
    assert stats.kstest(seen, stats.norm(scale=plan.noise_multiplier * CLIP).cdf).pvalue > 1e-6
    assert stats.kstest(seen * 1.5, stats.norm(scale=plan.noise_multiplier * CLIP).cdf).pvalue < 1e-6
    assert len(np.unique(seen)) > 0.99 * len(seen)
    # the books
    assert ledger.events() == [plan.event]
    assert Ledger.open(ledger.path).spent(plan.delta) == compose([plan.event], plan.delta)
    assert all(charge.clip_norm == CLIP for charge in ledger.charges)


@pytest.mark.parametrize("noise", ["gaussian", "discrete"])
@pytest.mark.parametrize("records", [0, 7])
def test_a_step_gives_every_tensor_its_noise(noise, records):
    """Tensor by tensor and coordinate by coordinate, whatever their sizes and the size of the batch."""
    plan = plan_of(noise=noise)

    def released(sums):
        return PrivateStep(0, np.arange(records), plan, SystemRandom()).release(sums)

    assert noise_checks.complaints(noise_checks.draws_of(released), 12.0 * CLIP / (Q * N)) == []


def test_the_charge_is_on_disk_before_the_batch_is_drawn(ledger):
    class Watch(SystemRandom):
        def uniform(self, count):
            if count == N:
                charged.append(Ledger.open(ledger.path).charged_steps("probe", 1))
            return super().uniform(count)

    charged: list[int] = []
    run(PrivateMechanism(plan_of(steps=4), ledger, Watch()))
    assert charged == [1, 2, 3, 4]


def test_the_divisor_is_public(ledger):
    """q N whatever the size of the batch that was drawn."""
    plan = plan_of(noise_multiplier=0.0, epsilon_target=math.inf)
    sizes = set()
    for step in PrivateMechanism(plan, ledger, SystemRandom()).steps():
        sizes.add(len(step.indices))
        assert torch.equal(step.release({"w": torch.ones(3)})["w"], torch.full((3,), 1 / (Q * N)))
    assert len(sizes) > 1


def test_an_empty_batch_is_a_noisy_charged_step(tmp_path):
    ledger = Ledger.create(tmp_path / "few.jsonl", examples=2)
    plan = plan_of(examples=2, sample_rate=0.01, steps=5, delta=0.1, epsilon_target=50.0)
    empty = 0
    for step in PrivateMechanism(plan, ledger, SystemRandom()).steps():
        empty += len(step.indices) == 0
        assert bool((step.release(ZEROS)["weight"] != 0).all())
    assert empty >= 3  # each of the 5 is empty with probability 0.98
    assert ledger.charged_steps("probe", 1) == 5


def test_a_step_is_released_exactly_once(ledger):
    steps = PrivateMechanism(plan_of(), ledger, SystemRandom()).steps()
    step = next(steps)
    with pytest.raises(RuntimeError, match="not released"):
        next(steps)
    step.release(ZEROS)
    with pytest.raises(RuntimeError, match="twice"):
        step.release(ZEROS)


@pytest.mark.parametrize("sums", [{}, {"w": torch.tensor([math.nan])}, {"w": torch.tensor([math.inf])}])
def test_unclipped_sums_are_not_released(ledger, sums):
    step = next(PrivateMechanism(plan_of(), ledger, SystemRandom()).steps())
    with pytest.raises(RuntimeError, match="not clipped"):
        step.release(sums)


# ---------------------------------------------------------------- crashes and resumes


@pytest.mark.parametrize("block", [1, 7])
def test_lost_steps_stay_paid_and_the_plan_is_never_exceeded(ledger, block):
    plan = plan_of()
    run(PrivateMechanism(plan, ledger, SystemRandom(), charge_block=block), steps=10)
    charged = ledger.charged_steps("probe", 1)
    assert 10 <= charged < 10 + block
    # the checkpoint held 6 updates when the process was killed
    resumed = PrivateMechanism(plan, Ledger.open(ledger.path), SystemRandom(), start_step=6, charge_block=block)
    assert resumed.remaining_steps == T - charged
    numbers = []
    for step in resumed.steps():
        numbers.append(step.number)
        step.release(ZEROS)
    assert numbers == list(range(6, 6 + T - charged))
    assert Ledger.open(ledger.path).charged_steps("probe", 1) == T
    assert Ledger.open(ledger.path).spent(plan.delta).upper <= plan.epsilon_target
    assert run(PrivateMechanism(plan, Ledger.open(ledger.path), SystemRandom(), start_step=6)) == []


def test_a_resumed_run_draws_other_batches_and_other_noise(ledger):
    plan = plan_of()

    def first_step(start: int):
        mechanism = PrivateMechanism(plan, Ledger.open(ledger.path), SystemRandom(), start_step=start)
        step = next(mechanism.steps())
        return step.indices.tolist(), step.release(ZEROS)["weight"]

    batch, noise = first_step(0)
    batch_again, noise_again = first_step(0)
    assert batch != batch_again
    assert not bool((noise == noise_again).any())


def test_a_checkpoint_with_more_updates_than_were_paid_is_refused(ledger):
    run(PrivateMechanism(plan_of(), ledger, SystemRandom()), steps=3)
    with pytest.raises(CheckpointError, match="holds 4 updates, but only 3"):
        PrivateMechanism(plan_of(), ledger, SystemRandom(), start_step=4)


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [({"examples": N + 1}, "examples"), ({"clip_norm": 1.0}, "another plan"), ({"steps": T + 1}, "another plan"),
     ({"noise_multiplier": 13.0}, "another plan"), ({"sample_rate": 0.2}, "another plan")],
)  # fmt: skip
def test_another_plan_or_other_data_cannot_resume(ledger, changes, complaint):
    run(PrivateMechanism(plan_of(), ledger, SystemRandom()), steps=2)
    with pytest.raises(CheckpointError, match=complaint):
        PrivateMechanism(plan_of(**changes), ledger, SystemRandom(), start_step=2)


def test_attempts_follow_one_another(ledger):
    run(PrivateMechanism(plan_of(steps=2), ledger, SystemRandom(), attempt=1))
    run(PrivateMechanism(plan_of(steps=2), ledger, SystemRandom(), attempt=2))
    for attempt in (1, 4, 0):
        with pytest.raises(CheckpointError, match="Attempt"):
            PrivateMechanism(plan_of(steps=2), ledger, SystemRandom(), attempt=attempt)


# ---------------------------------------------------------------- one budget


PLAN = {"delta": 1e-4, "examples": N, "clip_norm": CLIP}


def test_probe_finetune_and_a_rerun_share_one_budget(ledger):
    probe = make_plan(
        stage="probe", epsilon=3.0, epsilon_target=0.9, spent=ledger.stages(), sample_rate=1.0, steps=20, **PLAN
    )
    run(PrivateMechanism(probe, ledger, SystemRandom()))
    assert 0.89 <= ledger.spent(1e-4).upper <= 0.9
    spent = ledger.stages()
    tune = make_plan(
        stage="finetune", epsilon=3.0, epsilon_target=3.0, spent=spent, sample_rate=Q, steps=T, **PLAN, views=4
    )
    run(PrivateMechanism(tune, ledger, SystemRandom()))
    assert ledger.events() == sorted([probe.event, tune.event], key=lambda event: event.sample_rate)
    assert 2.98 <= ledger.spent(1e-4).upper <= 3.0
    whole = {"epsilon": 3.0, "epsilon_target": 3.0, "spent": ledger.stages()}
    with pytest.raises(BudgetError, match="already spent"):
        make_plan(stage="finetune", **whole, sample_rate=Q, steps=1, **PLAN)


def test_a_plan_that_does_not_fit_is_refused_before_anything_is_drawn(ledger):
    class Untouched(SystemRandom):
        def words(self, count):
            raise AssertionError("randomness was drawn")

    fits = compose([plan_of().event], 1e-4).upper
    with pytest.raises(BudgetError, match="above its") as fresh:
        PrivateMechanism(plan_of(epsilon_target=fits * 0.999), ledger, Untouched())
    assert "larger --eps" in fresh.value.fix
    assert ledger.charges == []
    PrivateMechanism(plan_of(epsilon_target=fits), ledger, Untouched())
    ledger.charge(
        stage="finetune", attempt=1, steps=1, noise_multiplier=12.0, sample_rate=Q, clip_norm=1.0, random="os-entropy",
        planned=plan_of().steps,
    )
    with pytest.raises(BudgetError) as begun:
        PrivateMechanism(plan_of(epsilon_target=fits), ledger, Untouched())
    assert "larger --eps" not in begun.value.fix
    assert "--overwrite" in begun.value.fix


@pytest.mark.parametrize("upper", [math.nextafter(2.0, 3.0), 2.0000001, math.nan, math.inf])
def test_whatever_is_not_known_to_be_within_the_budget_is_refused(monkeypatch, ledger, upper):
    bound = EpsilonBound(1.9, 1.9, upper, 1e-4, "a test")
    monkeypatch.setattr(plan_module, "compose_stages", lambda *asked: bound)
    with pytest.raises(BudgetError, match="above its 2"):
        PrivateMechanism(plan_of(epsilon_target=2.0), ledger, SystemRandom())
    bound = EpsilonBound(1.9, 1.9, 2.0, 1e-4, "a test")
    PrivateMechanism(plan_of(epsilon_target=2.0), ledger, SystemRandom())


def test_after_a_step_without_noise_no_private_plan_fits(ledger):
    open_plan = plan_of(noise_multiplier=0.0, epsilon_target=math.inf, steps=1)
    mechanism = PrivateMechanism(open_plan, ledger, SystemRandom())
    assert not mechanism.private
    run(mechanism)
    assert ledger.spent(1e-4).upper == math.inf
    assert not ledger.private
    with pytest.raises(BudgetError):
        PrivateMechanism(plan_of(stage="finetune"), ledger, SystemRandom())


def test_the_insecure_seed_is_stamped(ledger):
    mechanism = PrivateMechanism(plan_of(steps=1), ledger, InsecureSeed(1))
    assert not mechanism.private
    run(mechanism)
    assert not ledger.private
    assert ledger.charges[0].random == "insecure-seed"
    assert PrivateMechanism(plan_of(stage="finetune"), ledger, SystemRandom()).private


# ---------------------------------------------------------------- plans


def test_plans_are_plain_data():
    for plan in (plan_of(), plan_of(noise_multiplier=0.0, epsilon_target=math.inf)):
        assert PrivatePlan.from_dict(json.loads(json.dumps(plan.to_dict(), allow_nan=False))) == plan
    assert plan_of().expected_batch == Q * N
    assert plan_of().event == GaussianEvent(12.0, Q, T)
    endless = {"epsilon": math.inf, "epsilon_target": math.inf, "spent": [], "sample_rate": 1.0, "steps": 5}
    assert make_plan(stage="probe", **endless, **PLAN).noise_multiplier == 0
    for broken in ({}, {**plan_of().to_dict(), "surprise": 1}, {**plan_of().to_dict(), "epsilon_target": "much"}):
        with pytest.raises(CheckpointError):
            PrivatePlan.from_dict(broken)


def test_senseless_plans_and_budgets_are_refused(ledger):
    for changes in (
        {"steps": 0}, {"views": 0}, {"sample_rate": 0.0}, {"sample_rate": 1.5}, {"noise_multiplier": -1.0},
        {"clip_norm": 0.0}, {"clip_norm": math.nan}, {"clip_norm": math.inf}, {"noise_multiplier": 0.0},
        {"delta": 1 / N}, {"epsilon_target": 0.0}, {"noise": "loud"},
    ):  # fmt: skip
        with pytest.raises(UsageError):
            plan_of(**changes)
    for budget in (
        (0.0, 1e-5, 10), (-1.0, 1e-5, 10), (math.nan, 1e-5, 10), (1.0, 0.0, 10), (1.0, 0.1, 10), (1.0, math.nan, 10),
        (1.0, 1e-5, 0),
    ):  # fmt: skip
        with pytest.raises(UsageError):
            validate_budget(*budget)
    for spend in (0.0, 3.1, math.nan):
        with pytest.raises(UsageError, match="may spend"):
            make_plan(stage="probe", epsilon=3.0, epsilon_target=spend, spent=[], sample_rate=Q, steps=5, **PLAN)
    with pytest.raises(UsageError, match="charge block"):
        PrivateMechanism(plan_of(), ledger, SystemRandom(), charge_block=0)
