"""The compiled loops of patch layers, against the same arithmetic in plain torch, on responses of both precisions."""

import numba.core.caching
import pytest
import torch
from torch.nn import functional

from dprandp.models import patchnet
from dprandp.models.patchnet import CONTRAST_FLOOR, as_array, normalise_patches, region_profiles, region_weights

THRESHOLD, FLOOR = 0.25, 0.01
KINDS = [torch.float32, torch.bfloat16]


@pytest.mark.parametrize(("size", "stride"), [(6, 1), (5, 2), (1, 1)])
def test_patches(size: int, stride: int) -> None:
    image = torch.rand(3, 17, 17)
    image[:, :8, :8] = 0.5  # flat patches stay flat
    wanted = normalise_patches(functional.unfold(image[None], size, stride=stride))[0].t()
    found = torch.full(wanted.shape, torch.nan)
    patchnet.normalised_rows(image.numpy(), size, stride, CONTRAST_FLOOR, found.numpy())
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("side", "filters"), [(2, 1), (3, 5), (11, 37), (27, 400)])
def test_regions(side: int, filters: int, kind: torch.dtype) -> None:
    responses = torch.randn(side**2, filters).to(kind)
    responses[0, 0], responses[1, 0] = 0.0, -0.0
    weights = region_weights(side)
    signs = [functional.relu(sign * responses.float() - THRESHOLD).add(FLOOR).sqrt().sub(0.1) for sign in (1, -1)]
    wanted = torch.stack([weights @ sign for sign in signs])
    found = torch.full(wanted.shape, torch.nan)
    sums = torch.full((6, filters), torch.nan)
    profiles = region_profiles(side).numpy()
    patchnet.pooled_roots(as_array(responses), profiles, THRESHOLD, FLOOR, sums.numpy(), found.numpy())
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("side", "filters"), [(3, 1), (7, 16), (10, 5), (27, 33)])
def test_windows(side: int, filters: int, kind: torch.dtype) -> None:
    responses = torch.randn(side**2, filters).to(kind)
    exact = responses.float()
    both = torch.cat([exact - THRESHOLD, -exact - THRESHOLD], dim=1).t().unflatten(1, (side, side))
    wanted = functional.avg_pool2d(functional.relu(both), 3, 2).add(FLOOR).sqrt().flatten(1).t()
    found = torch.full(wanted.shape, torch.nan)
    patchnet.window_roots(as_array(responses), side, THRESHOLD, FLOOR, found.numpy())
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)


def test_without_a_folder_for_the_cache_each_process_compiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(numba.core.caching.CacheImpl, "_locator_classes", [])
    assert patchnet.compiled(lambda x: x + 1)(1) == 2
    with pytest.raises(RuntimeError):
        numba.njit(cache=True)(lambda x: x + 1)
