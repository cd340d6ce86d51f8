"""Pixels to the extractor's input, against Pillow or a loop over single images."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from dprandp.vision import images as vision_images
from dprandp.vision.images import (
    ImageSet,
    as_declared,
    colour_mode,
    contact_sheet,
    random_crops,
    resize,
    to_grey,
    to_input,
)


def pixels(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def pillow_resize(plane, height, width):
    """One [H, W] plane by Pillow's bilinear filter, in floating point: no rounding between its two passes."""
    image = Image.fromarray(plane.astype(np.float32))
    return np.asarray(image.resize((width, height), Image.Resampling.BILINEAR))


def assert_rounds_to(result, exact):
    """uint8 ``result`` is ``exact`` rounded; a value near .5 may go either way."""
    assert result.dtype == np.uint8
    assert np.abs(result.astype(np.float64) - exact).max() <= 0.5 + 1e-3


def each_alone(function, images):
    """Changing one image changes its own result and no other's."""
    changed = images.copy() if isinstance(images, np.ndarray) else images.clone()
    changed[2] = 255 - changed[2]
    differs = (function(images) != function(changed)).flatten(1).any(dim=1)
    assert differs.tolist() == [index == 2 for index in range(len(images))]


# ------------------------------------------------------------------------------------------------------------- resizing


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(
    ("height", "width", "size"),
    [(8, 8, 32), (32, 32, 32), (64, 64, 32), (33, 50, 32), (100, 20, 32), (64, 64, 64), (33, 50, 64), (200, 90, 64)],
)
def test_to_input_equals_pillow_image_by_image(channels, height, width, size):
    images = pixels(3, height, width, channels)
    out = to_input(images, size)
    assert out.shape == (3, 3, size, size)
    each_alone(lambda each: to_input(each, size), images)
    for index in range(3):
        for channel in range(3):
            plane = images[index, :, :, channel if channels == 3 else 0]
            assert_rounds_to(out[index, channel].numpy(), pillow_resize(plane, size, size))


def test_shrinking_is_antialiased():
    """Every pixel counts. Positive control: plain interpolation steps over all of the stripes."""
    stripes = np.zeros((1, 128, 128, 3), np.uint8)
    stripes[:, :, ::4] = 255
    assert abs(to_input(stripes, 32).float()[..., 1:-1].mean() - 255 / 4) < 1
    plain = torch.nn.functional.interpolate(torch.from_numpy(stripes).permute(0, 3, 1, 2).float(), 32, mode="bilinear")
    assert plain.mean() == 0


def test_to_input_goes_in_blocks_without_a_seam_also_of_no_images_and_of_strided_ones():
    images = pixels(1030, 8, 8, 1)
    torch.testing.assert_close(to_input(images, 32)[1020:], to_input(images[1020:], 32), rtol=0, atol=0)
    assert to_input(pixels(0, 8, 8, 1), 32).shape == (0, 3, 32, 32)
    images = pixels(2, 16, 16, 3)
    assert torch.equal(to_input(images[:, ::2, ::-1], 32), to_input(np.ascontiguousarray(images[:, ::2, ::-1]), 32))


def test_resize_reaches_both_ends_of_the_range_and_leaves_a_fitting_size_alone():
    images = torch.from_numpy(pixels(4, 3, 20, 30))
    assert torch.equal(resize(images, 20, 30), images)
    for height, width in [(7, 41), (40, 10)]:
        for index, channel in ((0, 0), (3, 2)):
            exact = pillow_resize(images[index, channel].numpy(), height, width)
            assert_rounds_to(resize(images, height, width)[index, channel].numpy(), exact)
    for value in (0, 255):
        flat = torch.full((1, 1, 30, 30), value, dtype=torch.uint8)
        assert resize(flat, 11, 47).eq(value).all()


# --------------------------------------------------------------------------------------------------------------- colour


def test_grey_is_pillows_luma():
    images = torch.from_numpy(pixels(4, 3, 16, 16))
    grey = to_grey(images)
    assert grey.shape == images.shape
    assert grey.is_contiguous()
    for index in range(4):
        expected = np.asarray(Image.fromarray(images[index].permute(1, 2, 0).numpy()).convert("L")).astype(int)
        for channel in range(3):
            assert np.abs(grey[index, channel].numpy().astype(int) - expected).max() <= 1  # Pillow's is fixed-point
    exact = (images[0].permute(1, 2, 0).double().numpy() * [0.299, 0.587, 0.114]).sum(axis=2)
    assert_rounds_to(grey[0, 0].numpy(), exact)


def test_grey_keeps_every_grey_and_the_input():
    greys = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).expand(1, 3, 16, 16).contiguous()
    assert torch.equal(to_grey(greys), greys)
    images = torch.from_numpy(pixels(5, 3, 8, 8))
    before = images.clone()
    each_alone(to_grey, images)
    is_grey = {mode: (colour_mode(images, mode).float().std(dim=1) == 0).all(dim=(1, 2)).tolist()
               for mode in ("rgb", "grey", "both")}  # fmt: skip
    assert is_grey == {"rgb": [False] * 5, "grey": [True] * 5, "both": [True, False, True, False, True]}
    assert torch.equal(colour_mode(images, "both")[1::2], images[1::2])
    assert torch.equal(images, before)


# ---------------------------------------------------------------------------------------------------------------- crops


@pytest.mark.parametrize(("side", "size"), [(64, 32), (128, 64)])
def test_random_crops_equal_a_loop_over_images(side, size):
    """The same draws, applied image by image with slicing and Pillow."""
    count = 40
    images = torch.from_numpy(pixels(count, 3, side, side))
    out = random_crops(images, size, torch.Generator().manual_seed(5))
    generator = torch.Generator().manual_seed(5)
    areas = 0.25 + 0.75 * torch.rand(count, generator=generator)
    corners = torch.rand(count, 2, generator=generator)
    seen = set()
    for index in range(count):
        crop = min(side, max(size, round(float((side * areas[index].sqrt()).double()))))
        top, left = (int(corners[index, axis] * (side - crop + 1)) for axis in (0, 1))
        seen.add(crop)
        for channel in range(3):
            plane = images[index, channel, top : top + crop, left : left + crop].numpy()
            assert_rounds_to(out[index, channel].numpy(), pillow_resize(plane, size, size))
    assert len(seen) > 10  # crops of many sizes were compared


def test_crops_are_not_smaller_than_the_output_unless_the_image_is(monkeypatch):
    images = torch.from_numpy(pixels(6, 3, 32, 32))
    assert torch.equal(random_crops(images, 32, torch.Generator().manual_seed(0)), images)  # 32 of 32: the whole image
    monkeypatch.setattr(vision_images, "MIN_AREA", 1.0)
    for side in (8, 64):
        images = torch.from_numpy(pixels(6, 3, side, side))
        assert torch.equal(random_crops(images, 32, torch.Generator().manual_seed(0)), resize(images, 32, 32))


def test_crops_see_each_image_alone_and_are_the_generators():
    images = torch.from_numpy(pixels(6, 3, 64, 64))
    each_alone(lambda batch: random_crops(batch, 32, torch.Generator().manual_seed(3)), images)
    first, again, other = (random_crops(images, 32, torch.Generator().manual_seed(seed)) for seed in (3, 3, 4))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


# ---------------------------------------------------------------------------------------------------------- as_declared


@pytest.mark.parametrize(
    ("channels", "height", "width"), [(1, 28, 28), (3, 8, 8), (1, 64, 64), (3, 20, 30), (3, 32, 32)]
)
def test_as_declared_equals_a_loop(channels, height, width):
    images = torch.from_numpy(pixels(4, 3, 32, 32))
    before = images.clone()
    out = as_declared(images, channels=channels, height=height, width=width)
    assert torch.equal(images, before)
    side = min(height, width)
    for index in range(4):
        image = images[index : index + 1]
        image = to_grey(image) if channels == 1 else image
        planes = [plane.numpy() for plane in image[0]]
        if side < 32:
            planes = [np.rint(pillow_resize(plane, side, side)) for plane in planes]
            planes = [pillow_resize(plane, 32, 32) for plane in planes]
        # a tie in the first rounding moves the second result by at most one level
        assert np.abs(out[index].numpy().astype(float) - np.stack(planes)).max() <= 1.5
    each_alone(lambda batch: as_declared(batch, channels=channels, height=height, width=width), images)


def test_as_declared_is_a_bottleneck():
    images = torch.from_numpy(pixels(4, 3, 32, 32))
    assert torch.equal(as_declared(images, channels=3, height=32, width=32), images)
    assert as_declared(images, channels=3, height=8, width=8).float().std() < 0.5 * images.float().std()


# --------------------------------------------------------------------------------------------------------------- sheets


@pytest.mark.parametrize(("count", "columns"), [(1, 1), (7, 3), (2, 5)])
def test_contact_sheet_equals_a_loop_over_pixels(count, columns):
    images = pixels(count, 4, 4, 3) // 2  # never white
    sheet = contact_sheet(images, columns)
    rows = (count + columns - 1) // columns
    assert sheet.shape == (rows * 5 - 1, columns * 5 - 1, 3)
    for y in range(sheet.shape[0]):
        for x in range(sheet.shape[1]):
            index = (y // 5) * columns + x // 5
            inside = y % 5 < 4 and x % 5 < 4 and index < count
            expected = images[index, y % 5, x % 5] if inside else [255, 255, 255]
            assert sheet[y, x].tolist() == list(expected)


# ------------------------------------------------------------------------------------------------------------ image set

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
    crops = random_crops(stored, 32, torch.Generator().manual_seed(3), chosen)
    assert torch.equal(crops, random_crops(expected, 32, torch.Generator().manual_seed(3), chosen))
    if chosen is not None:
        assert torch.equal(crops, random_crops(expected[chosen], 32, torch.Generator().manual_seed(3)))


def test_large_images_are_cropped_a_few_at_a_time_with_the_same_result(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vision_images, "MIN_AREA", 1.0)
    monkeypatch.setattr(vision_images, "WORKED_BYTES", 10 * 3 * 64**2)
    part = np.random.default_rng(1).integers(0, 256, (23, 64, 64, 3), dtype=np.uint8)
    together = random_crops(ImageSet([part]), 32, torch.Generator().manual_seed(0))
    each = [random_crops(ImageSet([image[None]]), 32, torch.Generator()) for image in part]
    assert torch.equal(together, torch.cat(each))
