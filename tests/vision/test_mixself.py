"""Mixtures of an example's own views, against a loop; one example's do not move with another's."""

from __future__ import annotations

import pytest
import torch
from scipy import stats

from dprandp.errors import UsageError
from dprandp.vision.mixself import ALPHA, with_mixtures
from dprandp.vision.views import keyed_uniforms


def made(examples: int, views: int, mixtures: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (examples, views, 3, 4, 4), generator=generator).to(torch.uint8)
    return images, keyed_uniforms(torch.arange(examples), 1, 0, mixtures)


@pytest.mark.parametrize("views", [2, 3, 5])
def test_each_mixture_is_of_two_different_views_of_the_same_example(views):
    images, draws = made(4, views, 6)
    out = with_mixtures(images, draws)
    assert out.shape == (4, views + 6, 3, 4, 4)
    assert torch.equal(out[:, :views], images)
    seen = set()
    for example in range(4):
        for mixture in range(6):
            first, second, uniform = draws[example, mixture].tolist()
            one = int(first * views)
            other = (one + 1 + int(second * (views - 1))) % views
            assert one != other
            part = float(stats.beta.ppf(uniform, ALPHA, ALPHA))
            expected = part * images[example, one].double() + (1 - part) * images[example, other].double()
            assert float((out[example, views + mixture].double() - expected).abs().max()) <= 0.51
            seen.add((one, other))
    assert len(seen) > 1


def test_the_share_is_beta_distributed():
    images = torch.zeros(500, 2, 1, 1, 1, dtype=torch.uint8)
    images[:, 0] = 255
    out = with_mixtures(images, keyed_uniforms(torch.arange(500), 3, 0, 4))[:, 2:].double().flatten() / 255
    for level in (0.1, 0.3, 0.5, 0.7, 0.9):
        part = float((out <= level).double().mean())
        assert part == pytest.approx(stats.beta(ALPHA, ALPHA).cdf(level), abs=0.05)  # 4.5 standard deviations
    assert float((out <= 0.1).double().mean()) != pytest.approx(0.1, abs=0.2)  # as a uniform share would have


def test_8_no_mixture_moves_when_another_example_does():
    images, draws = made(3, 3, 4)
    before = with_mixtures(images, draws)
    changed = images.clone()
    changed[1] = 255 - changed[1]
    after = with_mixtures(changed, draws)
    assert torch.equal(before[[0, 2]], after[[0, 2]])
    assert not torch.equal(before[1], after[1])
    assert torch.equal(with_mixtures(images[2:], draws[2:])[0], before[2])


def test_a_single_view_cannot_be_mixed():
    with pytest.raises(UsageError, match="1 view"):
        with_mixtures(*made(2, 1, 2))
