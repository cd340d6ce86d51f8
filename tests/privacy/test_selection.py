"""A selection among private trials: charged first, run as it was accounted, and silent about the number of trials."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from dprandp.errors import BudgetError, CheckpointError, UsageError
from dprandp.privacy.accounting import GaussianEvent, compose
from dprandp.privacy.ledger import Ledger
from dprandp.privacy.randomness import InsecureSeed, SystemRandom
from dprandp.privacy.selection import PrivateSelection, SelectionPlan, Trial, make_selection_plan

N = 400
PUBLIC = {
    "stage": "tune", "epsilon": 2.0, "delta": 1e-5, "epsilon_target": 1.0, "spent": [], "examples": N,
    "mean_trials": 5.0, "eta": 0.0, "held_out": 0.25, "clip_norm": 0.5, "steps": [4, 9, 2],
}  # fmt: skip


def plan_of(**changes) -> SelectionPlan:
    return make_selection_plan(**(PUBLIC | changes))


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    return Ledger.create(tmp_path / "ledger.jsonl", examples=N)


def honest(trial: Trial) -> None:
    """A trial on nothing: zeros, and every held-out answer wrong."""
    for _ in range(trial.steps):
        trial.release(torch.zeros(3, 2))
    trial.score(torch.zeros(len(trial.held_out), dtype=torch.bool))


def test_the_plan_uses_what_it_may_spend() -> None:
    plan = plan_of()
    assert 0.999 < compose([plan.event], 1e-5).upper <= 1.0
    assert plan.event.trials.mean == pytest.approx(5)
    assert SelectionPlan(**(plan.to_dict() | {"steps": (4, 9, 2)})) == plan


def test_a_plan_that_does_not_fit() -> None:
    for before in (GaussianEvent(1e6, 1.0, 1), plan_of().event):  # whose result may have led to this one
        with pytest.raises(BudgetError, match="comes first, and once"):
            plan_of(spent=[[before]])
    for changes in ({"epsilon_target": 3.0}, {"epsilon": math.inf, "epsilon_target": math.inf}, {"held_out": 0.0},
                    {"steps": [3]}, {"steps": [3, 0]}, {"mean_trials": 1.0}, {"clip_norm": 0.0}):  # fmt: skip
        with pytest.raises(UsageError):
            plan_of(**changes)


def test_paid_before_the_first_trial_and_once(ledger: Ledger) -> None:
    plan, seen = plan_of(), []

    def looking(trial: Trial) -> None:
        seen.append(Ledger.open(ledger.path, read_only=True).events())
        honest(trial)

    for attempt in (1, 2):
        try:
            selection = PrivateSelection(plan, ledger, SystemRandom(), attempt)
        except BudgetError:
            assert attempt == 2  # charged again, it does not fit any more
            break
        selection.run(looking)
    else:
        raise AssertionError("the second selection was not refused")
    for other, attempt in ((plan_of(examples=N + 1), 2), (plan_of(), 3)):  # other data, another attempt
        with pytest.raises(CheckpointError):
            PrivateSelection(other, ledger, SystemRandom(), attempt)
    assert seen
    assert all(events == [plan.event] for events in seen)
    again = Ledger.open(ledger.path)
    assert again.tunings == ledger.tunings
    assert again.spent(1e-5) == compose([plan.event], 1e-5)
    assert (again.last_attempt("tune"), again.private, again.random) == (1, True, "os-entropy")


def test_the_number_of_trials_follows_its_distribution_and_is_kept_nowhere(tmp_path: Path) -> None:
    plan, counts, files = plan_of(), [], set()
    for number in range(25):
        ledger = Ledger.create(tmp_path / f"{number}.jsonl", examples=N)
        made = []
        PrivateSelection(plan, ledger, SystemRandom(), 1).run(lambda trial, made=made: (made.append(1), honest(trial)))
        counts.append(len(made))
        line = json.loads(ledger.path.read_text().splitlines()[1])
        random = ("hash", "previous", "nonce")
        files.add(tuple(sorted((key, value) for key, value in line.items() if key not in random)))
    assert len(files) == 1  # whatever the number was
    one = next(plan.event.trials.probabilities())
    assert abs(counts.count(1) / 25 - one) < 5 * math.sqrt(one * (1 - one) / 25)
    assert max(counts) > 2


class Fixed(SystemRandom):
    """Real randomness, but for what is drawn one uniform at a time: the number of trials, and the setting of each."""

    def __init__(self, value: float) -> None:
        self.value = value

    def uniform(self, count: int) -> np.ndarray:
        return np.array([self.value]) if count == 1 else super().uniform(count)

    def gaussian(self, shape) -> torch.Tensor:
        return SystemRandom().gaussian(shape)


@pytest.mark.parametrize("wanted", [1, 2, 5, 9])
def test_the_number_of_trials_is_the_one_that_was_drawn(ledger: Ledger, wanted: int) -> None:
    """By the probabilities (1 − γ)^k / (k log(1/γ)), written down here again; neither one more nor one less."""
    plan = plan_of()
    gamma = plan.event.gamma
    upto = np.cumsum([(1 - gamma) ** k / k / -math.log(gamma) for k in range(1, wanted + 1)])
    low = upto[-2] if wanted > 1 else 0.0
    made: list[Trial] = []
    for place in (0.01, 0.5, 0.99):
        fresh = Ledger.create(ledger.path.with_name(f"{place}.jsonl"), examples=N)
        made.clear()
        random = Fixed(low + place * (upto[-1] - low))
        found = PrivateSelection(plan, fresh, random, 1).run(lambda trial: (made.append(trial), honest(trial)))
        assert len(made) == len(set(map(id, made))) == wanted
        assert found[::-1] == max(trial.outcome for trial in made)


def test_noise_of_steps_and_scores_and_the_parts(ledger: Ledger) -> None:
    plan = plan_of(held_out=0.25)
    releases, scores, parts, settings = {0: [], 1: [], 2: []}, [], [], []
    for _ in range(300):
        trial = Trial(plan, SystemRandom())
        settings.append(trial.setting)
        parts.append(np.isin(np.arange(N), trial.held_out))
        assert sorted([*trial.fitted, *trial.held_out]) == list(range(N))
        for _ in range(trial.steps):
            releases[trial.setting].append(trial.release(torch.zeros(10, 5)))
        trial.score(torch.ones(len(trial.held_out), dtype=torch.bool))
        scores.append(trial.outcome[0] - len(trial.held_out))
    for setting, steps in enumerate(plan.steps):
        noise = torch.stack(releases[setting]).flatten().double()
        expected = math.sqrt(steps) / plan.mu * plan.clip_norm / (0.75 * N)
        assert float(noise.std()) == pytest.approx(expected, rel=5 / math.sqrt(2 * len(noise)))
        # T sums of sensitivity C: μ of one trial's steps, from what was seen
        seen = math.sqrt(steps) * plan.clip_norm / (float(noise.std()) * 0.75 * N)
        assert seen == pytest.approx(plan.mu, rel=0.03)
    assert np.std(scores) == pytest.approx(1 / plan.mu, rel=5 / math.sqrt(600))
    held = np.array(parts)
    assert held.mean() == pytest.approx(0.25, abs=5 * math.sqrt(0.25 * 0.75 / held.size))
    assert held.sum(axis=1).std() == pytest.approx(math.sqrt(N * 0.25 * 0.75), rel=5 / math.sqrt(600))
    assert np.bincount(settings) == pytest.approx([100] * 3, abs=5 * math.sqrt(300 * 2 / 9))
    alike = sum(left == right for left, right in itertools.pairwise(settings))  # each by a draw of its own
    assert alike == pytest.approx(100, abs=5 * math.sqrt(300 * 2 / 9))


class Silent(SystemRandom):
    """Real coins, and no noise."""

    def gaussian(self, shape) -> torch.Tensor:
        return torch.zeros(tuple(shape), dtype=torch.float64)


def test_a_trial_divides_by_the_expected_number_of_its_records() -> None:
    """Not by the number that its coins gave: that is private."""
    plan, sizes = plan_of(held_out=0.25), set()
    for _ in range(5):
        trial = Trial(plan, Silent())
        sizes.add(len(trial.fitted))
        assert torch.allclose(trial.release(torch.full((3,), 30.0)), torch.full((3,), 30.0 / (0.75 * N)))
        for _ in range(trial.steps - 1):
            trial.release(torch.zeros(3))
        right = torch.arange(len(trial.held_out)) % 3 == 0
        trial.score(right)
        assert trial.outcome[0] == int(right.sum())
    assert len(sizes) > 1


def test_a_step_too_many_is_refused_before_it_is_made() -> None:
    trial = Trial(plan_of(), SystemRandom())
    for _ in range(trial.steps):
        trial.release(torch.zeros(3))
    for _ in range(2):
        with pytest.raises(RuntimeError, match="not planned"):
            trial.release(torch.zeros(3))
    trial.score(torch.zeros(len(trial.held_out), dtype=torch.bool))
    with pytest.raises(RuntimeError, match="not planned"):
        trial.release(torch.zeros(3))


def breaking(*actions: str):
    def trial_of(trial: Trial) -> None:
        zeros = torch.zeros(len(trial.held_out), dtype=torch.bool)
        for action in actions:
            if action == "steps":
                for _ in range(trial.steps):
                    trial.release(torch.zeros(3, 2))
            elif action == "step":
                trial.release(torch.zeros(3, 2))
            elif action == "nan":
                trial.release(torch.full((3, 2), math.nan))
            else:
                trial.score({"score": zeros, "weights": zeros.double(), "long": torch.cat([zeros, zeros[:1]])}[action])

    return trial_of


@pytest.mark.parametrize(
    "actions", [(), ("steps",), ("score",), ("step", "score"), ("steps", "step"), ("steps", "score", "score"),
                ("steps", "score", "step"), ("nan",), ("steps", "weights"), ("steps", "long")]
)  # fmt: skip
def test_a_trial_that_does_something_else_is_refused_and_stays_paid(ledger: Ledger, actions: tuple[str, ...]) -> None:
    with pytest.raises(RuntimeError):
        PrivateSelection(plan_of(), ledger, SystemRandom(), 1).run(breaking(*actions))
    assert len(Ledger.open(ledger.path).tunings) == 1


def test_a_tuning_line_is_sealed_and_stamped_like_the_others(ledger: Ledger) -> None:
    PrivateSelection(plan_of(), ledger, InsecureSeed(1), 1).run(honest)
    again = Ledger.open(ledger.path)
    assert (again.private, again.random) == (False, "insecure-seed")
    whole = ledger.path.read_bytes()
    ledger.path.write_bytes(whole.replace(b'"mu":0.', b'"mu":1.'))
    with pytest.raises(CheckpointError, match="Line 2"):
        Ledger.open(ledger.path)
    said = []
    ledger.path.write_bytes(whole[:-30])  # its call never returned, so nothing it charges for was used
    assert Ledger.open(ledger.path, warn=said.append).events() == []
    assert "dropped" in said[0]
