"""Regions: against weights written down one by one, and what they are for: small moves change features little."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from region_weights import weights_by_hand

from dprandp.models.patchnet import region_weights


@pytest.mark.parametrize("positions", [2, 3, 11, 27])
def test_weights_are_those_written_down(positions):
    weights = region_weights(positions)
    assert weights.dtype == torch.float32
    assert weights.shape == (5, positions**2)
    np.testing.assert_allclose(weights.view(5, positions, -1), weights_by_hand(positions), atol=1e-6)


def test_a_mirror_image_swaps_the_sides():
    mirrored = region_weights(10).view(5, 10, 10).flip(-1)
    torch.testing.assert_close(mirrored, region_weights(10).view(5, 10, 10)[[1, 0, 3, 2, 4]])


def test_weights_change_little_from_one_position_to_the_next():
    weights = region_weights(27).view(5, 27, 27)
    assert (weights[..., 1:] - weights[..., :-1]).abs().max() < 0.15 * weights.max()
