"""Images chosen from their shards are those of the whole set converted at once, for every colour mode and device."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from dprandp.vision.images import WORKED_BYTES, ImageSet, colour_mode, random_crops

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
    images, expected = ImageSet(parts, colour), whole(parts, colour)
    assert (len(images), images.shape) == (17, tuple(expected.shape))
    for listed in (range(17), [16, 0, 0, 5, 4, 13], [3], []):
        chosen = torch.tensor(listed, dtype=torch.int64)
        assert torch.equal(images[chosen], expected[chosen])
        assert images[chosen].is_contiguous()


@pytest.mark.parametrize("colour", MODES)
@pytest.mark.parametrize("rows", [slice(0, 17), slice(4, 9), slice(5, 6), slice(15, 17), slice(7, 7)])
def test_a_part_knows_its_place_in_the_whole(parts: list[np.ndarray], colour: str, rows: slice) -> None:
    """As a rank has it, which takes the colour from every second image of all."""
    part, expected = ImageSet(parts, colour).part(rows), whole(parts, colour)[rows]
    assert torch.equal(part[torch.arange(len(part))], expected)
    assert np.array_equal(ImageSet(parts, colour).pixels(rows), np.concatenate(parts)[rows])


@pytest.mark.parametrize("colour", MODES)
def test_images_moved_to_an_accelerator_are_the_same(parts: list[np.ndarray], colour: str) -> None:
    """The meta device stands for one, as far as shapes go; the pixels are checked where there is one."""
    moved = ImageSet(parts, colour).part(slice(2, 17)).to(torch.device("meta"))
    assert (len(moved), moved.shape, moved.device.type) == (15, (15, 3, 48, 48), "meta")
    if torch.cuda.is_available():
        moved, chosen = ImageSet(parts, colour).part(slice(2, 17)).to(torch.device("cuda")), torch.tensor([14, 0, 3])
        assert torch.equal(moved[chosen.cuda()].cpu(), whole(parts, colour)[2:][chosen])


@pytest.mark.parametrize("colour", MODES)
@pytest.mark.parametrize("size", [32, 64])
def test_crops_are_those_of_the_whole_set(parts: list[np.ndarray], colour: str, size: int) -> None:
    images, expected = ImageSet(parts, colour), whole(parts, colour)
    crops = [random_crops(each, torch.Generator().manual_seed(3), size=size) for each in (images, expected)]
    assert torch.equal(*crops)
    positions = torch.tensor([3, 16, 3, 8])
    crops = [
        random_crops(each, torch.Generator().manual_seed(4), size=size)
        for each in (images.picked(positions), expected[positions])
    ]
    assert torch.equal(*crops)


def test_large_images_are_cropped_a_few_at_a_time_with_the_same_result() -> None:
    side = 256
    count = 2 * WORKED_BYTES // (3 * side**2) + 3
    part = np.random.default_rng(1).integers(0, 256, (count, side, side, 3), dtype=np.uint8)
    together = random_crops(ImageSet([part]), torch.Generator().manual_seed(0), min_area=1.0)
    each = [random_crops(ImageSet([image[None]]), torch.Generator(), min_area=1.0) for image in part]
    assert torch.equal(together, torch.cat(each))
