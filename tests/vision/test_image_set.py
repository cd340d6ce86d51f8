"""Images chosen from their shards are those of the whole set converted at once, for every colour mode and device."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from dprandp.vision import images
from dprandp.vision.images import ImageSet, colour_mode, random_crops

MODES = ("rgb", "both", "grey")
SIZES = (5, 1, 8, 3)


@pytest.fixture(scope="module")
def parts() -> list[np.ndarray]:
    random = np.random.default_rng(0)
    return [random.integers(0, 256, (size, 48, 48, 3), dtype=np.uint8) for size in SIZES]


def whole(parts: list[np.ndarray], colour: str) -> torch.Tensor:
    """The oracle: everything in memory, channels first, recoloured at once."""
    return colour_mode(torch.from_numpy(np.concatenate(parts)).permute(0, 3, 1, 2).contiguous(), colour)


@pytest.mark.parametrize("colour", MODES)
def test_chosen_images_are_those_of_the_whole_set(parts: list[np.ndarray], colour: str) -> None:
    stored, expected = ImageSet(parts, colour), whole(parts, colour)
    assert (len(stored), stored.shape) == (17, tuple(expected.shape))
    for listed in (range(17), [16, 0, 0, 5, 4, 13], [3], []):
        chosen = torch.tensor(listed, dtype=torch.int64)
        assert torch.equal(stored[chosen], expected[chosen])
        assert stored[chosen].is_contiguous()


@pytest.mark.parametrize("count", [0, 4, 5, 6, 17, 30])
def test_the_first_images_are_those_of_the_whole_set(parts: list[np.ndarray], count: int) -> None:
    head, expected = ImageSet(parts, "both").head(count), whole(parts, "both")[:count]
    assert torch.equal(head[torch.arange(len(head))], expected)


@pytest.mark.parametrize("colour", MODES)
def test_images_moved_to_an_accelerator_are_the_same(parts: list[np.ndarray], colour: str) -> None:
    """The meta device stands for one, as far as shapes go; the pixels are checked where there is one."""
    moved = ImageSet(parts, colour).to(torch.device("meta"))
    assert (len(moved), moved.shape, moved.device.type) == (17, (17, 3, 48, 48), "meta")
    if torch.cuda.is_available():
        moved, chosen = ImageSet(parts, colour).to(torch.device("cuda")), torch.tensor([14, 0, 3])
        assert torch.equal(moved[chosen.cuda()].cpu(), whole(parts, colour)[chosen])


@pytest.mark.parametrize("colour", MODES)
@pytest.mark.parametrize("chosen", [None, torch.tensor([3, 16, 3, 8])], ids=["all", "some"])
def test_crops_are_those_of_the_whole_set(parts: list[np.ndarray], colour: str, chosen: torch.Tensor | None) -> None:
    stored, expected = ImageSet(parts, colour), whole(parts, colour)
    crops = random_crops(stored, torch.Generator().manual_seed(3), chosen)
    assert torch.equal(crops, random_crops(expected, torch.Generator().manual_seed(3), chosen))
    if chosen is not None:
        assert torch.equal(crops, random_crops(expected[chosen], torch.Generator().manual_seed(3)))


def test_large_images_are_cropped_a_few_at_a_time_with_the_same_result(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(images, "MIN_AREA", 1.0)
    monkeypatch.setattr(images, "WORKED_BYTES", 10 * 3 * 64**2)
    part = np.random.default_rng(1).integers(0, 256, (23, 64, 64, 3), dtype=np.uint8)
    together = random_crops(ImageSet([part]), torch.Generator().manual_seed(0))
    each = [random_crops(ImageSet([image[None]]), torch.Generator()) for image in part]
    assert torch.equal(together, torch.cat(each))
