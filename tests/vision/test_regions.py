"""Regions: against weights written down one by one, and what they are for: small moves change features little."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from region_weights import weights_by_hand

from dprandp.pretrain_config import CHOICES
from dprandp.vision.regions import REGIONS


def test_a_configuration_may_name_all_of_them_and_no_other():
    assert set(CHOICES["regions"]) == set(REGIONS)


@pytest.mark.parametrize("regions", REGIONS)
@pytest.mark.parametrize("positions", [2, 3, 11, 27])
def test_weights_are_those_written_down(regions, positions):
    weights = REGIONS[regions](positions)
    assert weights.dtype == torch.float32
    assert weights.shape == (5, positions**2)
    np.testing.assert_allclose(weights.view(5, positions, -1), weights_by_hand(regions, positions), atol=1e-6)


@pytest.mark.parametrize("regions", REGIONS)
def test_a_mirror_image_swaps_the_sides(regions):
    mirrored = REGIONS[regions](10).view(5, 10, 10).flip(-1)
    torch.testing.assert_close(mirrored, REGIONS[regions](10).view(5, 10, 10)[[1, 0, 3, 2, 4]])


def test_overlapping_regions_change_less_where_something_moves_by_one_position():
    def change(regions):
        weights = REGIONS[regions](27).view(5, 27, 27)
        return float((weights[..., 1:] - weights[..., :-1]).abs().max() / weights.max())

    assert change("quadrants") == pytest.approx(1)
    assert change("overlapping") < 0.15
