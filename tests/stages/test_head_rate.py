"""The head's default learning rate: what was measured, and how it follows the clip norm and the steps."""

from __future__ import annotations

import math

import pytest
import torch

from dprandp.privacy.clipping import clipped_softmax_sum
from dprandp.probe.head import HeadSettings, begin_head, default_lr, update_head


@pytest.mark.parametrize(("epsilon", "expected"), [(1.0, 10.0), (8.0, 62.0), (math.inf, 100.0)])
def test_the_rate_is_what_was_measured_for_50000_examples(epsilon: float, expected: float) -> None:
    assert default_lr(epsilon, 1e-5, 50_000, 120, 1.0) == pytest.approx(expected, rel=0.02)


def test_first_update_is_as_long_whatever_the_clip_norm() -> None:
    """At a zero head all gradients are (1 - 1/10) and more long: what a lower bound cuts, the rate gives back."""
    generator = torch.Generator().manual_seed(0)
    features = torch.nn.functional.normalize(torch.randn(50, 6, generator=generator), dim=1)
    labels = torch.arange(50) % 10
    moved = {}
    for clip_norm in (0.9, 0.5, 0.1):
        state = begin_head(torch.zeros(6, 10))
        clipped = clipped_softmax_sum(features, labels, state["head"], clip_norm)
        rule = HeadSettings(default_lr(1.0, 1e-5, 50, 120, clip_norm), 0.9, "last")
        update_head(state, clipped / 50, rule, 0, 120)
        moved[clip_norm] = state["head"]
    assert float(moved[0.9].norm()) > 0
    for clip_norm in (0.5, 0.1):
        torch.testing.assert_close(moved[clip_norm], moved[0.9], rtol=1e-4, atol=1e-7)


def test_more_steps_are_as_much_shorter_and_fewer_no_longer() -> None:
    rate = default_lr(1.0, 1e-5, 50_000, 120, 0.5)
    assert default_lr(1.0, 1e-5, 50_000, 240, 0.5) == pytest.approx(rate / 2)
    assert default_lr(1.0, 1e-5, 50_000, 60, 0.5) == rate
