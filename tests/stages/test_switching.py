"""When private steps begin, and how gradients are mixed."""

from __future__ import annotations

import json
import math

import pytest
import torch

from dprandp.config.schema import ContinueConfig, build
from dprandp.continual.loop import mixed
from dprandp.continual.switching import (
    FEW,
    Look,
    first_look,
    latest_switch,
    most_private_steps,
    plateau,
    public_weight,
    switch_now,
)
from dprandp.errors import UsageError

NAN = math.nan


@pytest.mark.parametrize(
    ("losses", "expected"),
    [
        ([2.0, 1.5, 1.2], False),  # too few looks
        ([2.0, 1.5, 1.2, 1.0], False),
        ([2.0, 1.0, 1.0, 1.0, 1.0], True),
        ([2.0, 1.0, 0.995, 1.1, 0.992], True),  # progress of less than a hundredth is none
        ([2.0, 1.0, 1.1, 1.1, 0.98], False),
        ([2.0, NAN, NAN, NAN], True),
        ([1.0, 1.0, 1.0, 1.0], True),
    ],
)
def test_plateau(losses: list[float], expected: bool) -> None:
    assert plateau(losses) is expected


def looks(*slowdowns: float | None) -> list[Look]:
    return [Look(10 * number, 2.0 - 0.2 * number, slowdown) for number, slowdown in enumerate(slowdowns)]


def test_the_decelerator_must_be_small_in_most_of_the_last_looks() -> None:
    config = ContinueConfig(switch="decelerator", steps=100)
    small, large = FEW / 2, 2 * FEW
    assert switch_now(config, looks(small, small), 10) is None
    assert "decelerator" in switch_now(config, looks(small, large, small), 20)
    assert switch_now(config, looks(large, small, large), 20) is None
    assert switch_now(config, looks(small, NAN, NAN), 20) is None
    assert switch_now(config, looks(large, small, small), 21) is None  # between two looks nothing is decided
    assert "latest" in switch_now(config, looks(large), 80)


def test_fixed_steps_and_mixes() -> None:
    fixed = ContinueConfig(switch="7", steps=20)
    assert [switch_now(fixed, [], step) is not None for step in (6, 7)] == [False, True]
    assert (latest_switch(fixed), most_private_steps(fixed)) == (7, 13)
    assert switch_now(ContinueConfig(mix="public"), looks(0.0, 0.0, 0.0), 20) is None
    for mix in ("cosine", "ratio", "private"):
        assert switch_now(ContinueConfig(mix=mix), [], 0) is not None
        assert most_private_steps(ContinueConfig(mix=mix, steps=30)) == 30


@pytest.mark.parametrize("switch", ["plateau", "decelerator"])
def test_no_rule_asks_before_its_first_look(switch: str) -> None:
    """So that the plan for the most private steps covers whatever the rule does."""
    config = ContinueConfig(switch=switch, steps=100)
    seen = [Look(step, 1.0, 0.0) for step in range(0, 100, config.check_every)]
    asked = [
        step for step in range(100)
        if switch_now(config, [look for look in seen if look.step <= step], step) is not None
    ]  # fmt: skip
    assert min(asked) == first_look(config) == config.steps - most_private_steps(config)


def test_weights_of_the_public_gradient() -> None:
    def weights(mix: str, switch: int = 0) -> list[float]:
        config = ContinueConfig(mix=mix, steps=4)
        return [public_weight(config, step, switch, public=1, private=3) for step in range(4)]

    assert weights("step", 2) == [1, 1, 0, 0]
    assert weights("ratio") == [0.25] * 4
    assert weights("private") == [0] * 4
    rising = [1 - math.cos(angle) for angle in (0, math.pi / 8, math.pi / 4, 3 * math.pi / 8)]
    assert weights("cosine") == pytest.approx(rising)


def test_gradients_are_mixed_name_by_name() -> None:
    noisy = {"a": torch.tensor([1.0]), "head": torch.tensor([2.0])}
    public = {"a": torch.tensor([5.0]), "own": torch.tensor([4.0])}
    made = mixed(noisy, public, 0.25)
    assert {name: float(value) for name, value in made.items()} == {"a": 2.0, "head": 1.5, "own": 1.0}


def test_a_look_survives_json() -> None:
    for look in (Look(3, 0.5, None), Look(3, 0.5, NAN), Look(3, NAN, 0.25)):
        values = [None if isinstance(v, float) and math.isnan(v) else v for v in look.to_list()]
        again = Look.from_list(json.loads(json.dumps(values)))
        assert repr(again) == repr(look)


@pytest.mark.parametrize(
    "changes",
    [{"switch": "soon"}, {"switch": "-3"}, {"switch": "200"}, {"public": "fraction:1"}, {"public": "fraction:x"},
     {"public": "fraction:nan"}, {"public": " "}],
    ids=str,
)  # fmt: skip
def test_settings_out_of_range_are_refused(changes: dict) -> None:
    with pytest.raises(UsageError):
        build("continue", changes)
