"""Augmentation: batched forms against torchvision and plain loops with the same choices, distributions."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision.transforms.functional as tf
from scipy.stats import kstest
from torchvision.transforms import InterpolationMode, RandomResizedCrop

from dprandp.vision import views
from dprandp.vision.views import (
    BRIGHTNESS,
    CONTRAST,
    HUE,
    SATURATION,
    ContrastiveViews,
    ViewChoices,
    keyed_uniforms,
    private_views,
)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def some_images(batch: int, height: int = 32, width: int = 32, seed: int = 0) -> torch.Tensor:
    """Smooth colourful images with noise and some exactly grey, black and white pixels."""
    coarse = torch.rand(batch, 3, 5, 5, generator=seeded(seed))
    images = F.interpolate(coarse, (height, width), mode="bilinear") * 255
    images += 20 * torch.randn(images.shape, generator=seeded(seed + 1))
    images[:, :, :3, :3] = 128
    images[:, :, -2:, :4] = 0
    images[:, :, 4:6, -5:] = 255
    return images.clamp(0, 255).to(torch.uint8)


ADJUST = {
    BRIGHTNESS: tf.adjust_brightness,
    CONTRAST: tf.adjust_contrast,
    SATURATION: tf.adjust_saturation,
    HUE: tf.adjust_hue,
}


def slow_view(image: torch.Tensor, choices: ViewChoices, index: int, size: int) -> torch.Tensor:
    """The same choices through torchvision, one image at a time."""
    top, left, height, width = choices.boxes[index].tolist()
    view = tf.resized_crop(
        image.float() / 255, top, left, height, width, [size, size], InterpolationMode.BILINEAR, antialias=True
    )
    if choices.flip[index]:
        view = tf.hflip(view)
    for change in choices.order:
        view = ADJUST[change](view, float(choices.factors[index, change]))
    return tf.rgb_to_grayscale(view, 3) if choices.grey[index] else view


@pytest.mark.parametrize(("height", "width"), [(64, 64), (40, 90), (12, 17)])
def test_contrastive_views_equal_torchvision(height, width):
    images = some_images(24, height, width)
    augment = ContrastiveViews(32)
    for seed in range(3):  # three orders of the colour changes
        choices = augment.draw(images, seeded(seed))
        seen = augment.apply(images, choices)
        assert seen.shape == (24, 3, 32, 32)
        assert seen.dtype == torch.float32
        assert seen.min() >= 0
        assert seen.max() <= 1
        for index in range(24):
            expected = slow_view(images[index], choices, index, 32)
            assert (seen[index] - expected).abs().max() < 2e-4
    assert choices.flip.any()
    assert not choices.flip.all()


def test_the_comparison_notices_each_choice():
    images = some_images(8, 48, 48)
    augment = ContrastiveViews(32)
    choices = augment.draw(images, seeded(3))
    expected = torch.stack([slow_view(images[i], choices, i, 32) for i in range(8)])
    wrong = {
        "boxes": choices.boxes + torch.tensor([0, 0, -1, 0]),
        "flip": ~choices.flip,
        "grey": ~choices.grey,
        "order": choices.order[::-1],
        "factors": choices.factors + torch.tensor([0.0, 0.0, 0.0, 0.05]),
    }
    for name, value in wrong.items():
        changed = ViewChoices(**{**vars(choices), name: value})
        assert (augment.apply(images, changed) - expected).abs().max() > 1e-2, name


@pytest.mark.parametrize("change", list(ADJUST))
def test_single_colour_changes_equal_torchvision(change):
    view, factor = some_images(6).float() / 255, torch.linspace(-0.5, 0.5, 6) + (change != HUE)
    seen = views.adjust(view, change, factor.view(-1, 1, 1, 1))
    for index in range(6):
        assert (seen[index] - ADJUST[change](view[index], float(factor[index]))).abs().max() < 1e-4


def test_blocks_on_the_cpu_change_nothing(monkeypatch):
    images = some_images(45, 40, 40)
    augment = ContrastiveViews(16)
    choices = augment.draw(images, seeded(5))
    whole = augment.apply(images, choices)
    for block in (1, 7, 100):
        monkeypatch.setattr(views, "_CPU_BLOCK", block)
        torch.testing.assert_close(augment.apply(images, choices), whole, atol=1e-6, rtol=0)
    assert augment.apply(images[:0], augment.draw(images[:0], seeded(5))).shape == (0, 3, 16, 16)


def unchanged(images: torch.Tensor) -> ViewChoices:
    count, _, height, width = images.shape
    false = torch.zeros(count, dtype=torch.bool)
    return ViewChoices(
        torch.tensor([[0, 0, height, width]] * count), false, torch.tensor([[1.0, 1, 1, 0]] * count), (0, 1), false
    )


def test_no_augmentation_is_the_image_itself_and_shrinking_does_not_alias():
    images = some_images(4)
    view = ContrastiveViews(32).apply(images, unchanged(images))
    torch.testing.assert_close(view, images.float() / 255, atol=1e-5, rtol=0)
    stripes = torch.zeros(1, 3, 256, 256, dtype=torch.uint8)
    stripes[..., ::2] = 255
    assert (ContrastiveViews(32).apply(stripes, unchanged(stripes)) - 0.5).abs().max() < 0.02


def test_choices_have_the_stated_distribution():
    choices = ContrastiveViews(32).draw(torch.zeros(20_000, 3, 64, 64, dtype=torch.uint8), seeded(1))
    top, left, height, width = choices.boxes.double().unbind(1)
    share = height * width / 64**2
    assert 0.07 < share.min() < 0.09
    assert choices.flip.double().mean().item() == pytest.approx(0.5, abs=0.02)
    assert choices.grey.double().mean().item() == pytest.approx(0.2, abs=0.02)
    for column, centre in enumerate((1, 1, 1, 0)):
        factor = choices.factors[:, column].double() - centre
        assert abs(factor.mean()) < 0.01
        assert factor.std().item() == pytest.approx(0.4 / np.sqrt(3), rel=0.03)
        assert factor.abs().max() <= 0.4 + 1e-6
    # independence of position and size, of the two positions, and of colour from geometry
    table = torch.stack(
        [(top + 0.5) / (65 - height), (left + 0.5) / (65 - width), share, choices.factors[:, 0].double()]
    )
    assert torch.corrcoef(table).fill_diagonal_(0).abs().max() < 0.04


def test_crop_distribution_equals_torchvisions(monkeypatch):
    """Two-sample comparison with RandomResizedCrop.get_params, on an image that needs retries and the fallback."""
    monkeypatch.setattr(views, "SCALE", (0.3, 1.0))
    monkeypatch.setattr(views, "RATIO", (0.5, 2.0))
    image = torch.zeros(3, 20, 48)
    torch.manual_seed(0)
    theirs = torch.tensor([RandomResizedCrop.get_params(image, [0.3, 1.0], [0.5, 2.0]) for _ in range(4000)]).double()
    ours = ContrastiveViews(32).draw(torch.zeros(4000, 3, 20, 48, dtype=torch.uint8), seeded(2)).boxes.double()
    for column in range(4):
        grid = torch.arange(49)
        gap = (torch.stack([(c[:, column, None] <= grid).double().mean(0) for c in (ours, theirs)])).diff(dim=0).abs()
        assert gap.max() < 0.045  # Kolmogorov-Smirnov at 4000 against 4000: p < 1e-3 above .0436
    monkeypatch.undo()
    monkeypatch.setattr(views, "SCALE", (1.0, 1.0))  # nothing fits: the central crop
    choices = ContrastiveViews(8).draw(torch.zeros(5, 3, 4, 400, dtype=torch.uint8), seeded())
    assert choices.boxes.tolist() == [[0, 197, 4, 5]] * 5


def test_views_repeat_with_the_generator_and_differ_from_each_other():
    images, augment, generator = some_images(4), ContrastiveViews(32), seeded(0)
    first, second, other = (augment.apply(images, augment.draw(images, seeded(seed))) for seed in (1, 1, 2))
    assert torch.equal(first, second)
    assert not torch.equal(first, other)
    assert len({augment.draw(images, generator).order for _ in range(400)}) == 24


def slow_private_views(images: torch.Tensor, randomness: torch.Tensor, flip: bool, pad: int = 4) -> torch.Tensor:
    batch, channels, height, width = images.shape
    out = torch.empty(batch, randomness.shape[1], channels, height, width, dtype=images.dtype)
    padded = F.pad(images.double(), (pad,) * 4, mode="reflect")
    for i in range(batch):
        for j in range(randomness.shape[1]):
            top, left = (int(u * (2 * pad + 1)) for u in randomness[i, j, :2].tolist())
            view = padded[i, :, top : top + height, left : left + width]
            if flip and randomness[i, j, 2] < 0.5:
                view = view.flip(-1)
            out[i, j] = view.to(images.dtype)
    return out


@pytest.mark.parametrize("flip", [True, False])
@pytest.mark.parametrize("shape", [(6, 3, 32, 32), (5, 1, 9, 14), (0, 3, 8, 8)])
def test_private_views_equal_a_loop(flip, shape):
    images = torch.randint(0, 256, shape, dtype=torch.uint8, generator=seeded(1))
    randomness = torch.rand(shape[0], 7, 3, generator=seeded(2))
    expected = slow_private_views(images, randomness, flip)
    assert torch.equal(private_views(images, 7, randomness, flip=flip), expected)
    assert torch.equal(private_views(images, 7, seeded(2), flip=flip), expected)  # drawn from a generator
    floats = private_views(images.float() / 255, 7, randomness, flip=flip)
    assert torch.equal((floats * 255).round().to(torch.uint8), expected)


def test_single_view_is_the_image_unless_asked():
    images = some_images(8)
    assert torch.equal(private_views(images, 1, seeded(), flip=True), images[:, None])
    augmented = private_views(images, 1, seeded(), flip=True, augment_single=True)
    assert augmented.shape == (8, 1, 3, 32, 32)
    assert not torch.equal(augmented, images[:, None])


def test_leaving_one_example_out_moves_no_other_view():
    images = some_images(9)
    ids = torch.tensor([3, 10, 11, 400, 401, 999, 5000, 49_998, 49_999])
    kept = torch.tensor([0, 1, 2, 4, 5, 6, 7, 8])
    whole = private_views(images, 4, keyed_uniforms(ids, step=17, seed=1, views=4), flip=True)
    without = private_views(images[kept], 4, keyed_uniforms(ids[kept], step=17, seed=1, views=4), flip=True)
    assert torch.equal(whole[kept], without)
    # positive control: choices dealt along the batch do move the views of the examples behind the gap
    whole = private_views(images, 4, seeded(1), flip=True)
    without = private_views(images[kept], 4, seeded(1), flip=True)
    assert torch.equal(whole[:3], without[:3])
    assert not torch.equal(whole[kept], without)


def test_keyed_uniforms_depend_on_every_part_of_the_key():
    base = keyed_uniforms(np.arange(50), step=3, seed=5, views=2)
    assert torch.equal(base, keyed_uniforms(torch.arange(50), step=3, seed=5, views=2))
    for other in (
        keyed_uniforms(np.arange(50), step=4, seed=5, views=2),
        keyed_uniforms(np.arange(50), step=3, seed=6, views=2),
        keyed_uniforms(np.arange(50) + 50, step=3, seed=5, views=2),
        keyed_uniforms(np.arange(50), step=5, seed=3, views=2),
        keyed_uniforms(np.arange(50), step=3, seed=-5, views=2),
    ):
        assert not (base == other).any()
    assert base.flatten().unique().numel() == 300


def test_keyed_uniforms_are_uniform_and_uncorrelated():
    numbers = keyed_uniforms(np.arange(20_000), step=0, seed=0, views=2).view(20_000, 6)
    later = keyed_uniforms(np.arange(20_000), step=1, seed=0, views=2).view(20_000, 6)
    assert numbers.min() >= 0
    assert numbers.max() < 1
    for column in range(6):
        assert kstest(numbers[:, column].numpy(), "uniform").pvalue > 1e-4
    assert kstest((numbers[:, 0].numpy() * 0.98), "uniform").pvalue < 1e-4  # positive control
    table = torch.cat([numbers, later, numbers.roll(1, 0)], dim=1).T
    correlation = torch.corrcoef(table).fill_diagonal_(0)
    assert correlation.abs().max() < 0.035
