"""Batched augmentation on the images' device: contrastive views of public images, crop-and-flip views of private ones.

Every random choice is drawn first and applied afterwards by a deterministic function of images and choices. All
randomness here is public and reproducible; the noise that privacy rests on comes from elsewhere.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

BRIGHTNESS, CONTRAST, SATURATION, HUE = range(4)
_LUMA = (0.2989, 0.587, 0.114)  # ITU-R BT.601 grey, the weights torchvision uses


def grey(view: Tensor) -> Tensor:
    """[B, 3, H, W] -> [B, 1, H, W], the luma."""
    red, green, blue = view.unbind(1)
    return (_LUMA[0] * red + _LUMA[1] * green + _LUMA[2] * blue).unsqueeze(1)


def adjust(view: Tensor, change: int, factor: Tensor) -> Tensor:
    """One colour change of a batch, float [B, 3, H, W] in [0, 1], with one factor [B, 1, 1, 1] per image.

    As in torchvision: BRIGHTNESS scales, CONTRAST moves away from the image's mean grey, SATURATION from each pixel's
    grey, HUE turns the colour circle. A factor of 1 changes nothing, for HUE 0 (turns).
    """
    if change == HUE:
        return _turn_hue(view, factor)
    if change == BRIGHTNESS:
        blended = view * factor
    elif change == CONTRAST:
        blended = torch.lerp(grey(view).mean(dim=(2, 3), keepdim=True), view, factor)
    else:
        blended = torch.lerp(grey(view).expand_as(view), view, factor)
    return blended.clamp_(0, 1)


def _turn_hue(view: Tensor, turns: Tensor) -> Tensor:
    """Turn the hue of HSV by a share of the circle, keeping value and saturation.

    With V the largest and V - C the smallest channel and h the hue in sixths of the circle, a channel of HSV equals
    V - C · clamp(min(k, 4 - k), 0, 1) with k = (n + h) mod 6 and n = 5, 3, 1 for red, green, blue; so V and C need not
    be turned back into channels through saturation.
    """
    red, green, blue = view.unbind(1)
    value = view.amax(dim=1)
    chroma = value - view.amin(dim=1)
    safe = torch.where(chroma > 0, chroma, 1)  # a grey pixel has no hue: chroma 0 makes any hue harmless
    hue = torch.where(
        value == red,
        (green - blue) / safe,
        torch.where(value == green, 2 + (blue - red) / safe, 4 + (red - green) / safe),
    )
    hue = (hue + 6 * turns[:, 0])[:, None]
    k = torch.remainder(hue + hue.new_tensor([5.0, 3.0, 1.0]).view(1, 3, 1, 1), 6)
    return value[:, None] - chroma[:, None] * torch.minimum(k, 4 - k).clamp_(0, 1)


# Of the published views (Tang et al. 2023).
SCALE = (0.08, 1.0)  # smallest and largest fraction of the area
RATIO = (3 / 4, 4 / 3)  # smallest and largest width / height
JITTER = (0.4, 0.4, 0.4, 0.4)  # strengths of brightness, contrast, saturation and hue
GREY_PROBABILITY = 0.2
CROP_TRIES = 10  # as in Szegedy et al. 2015's inception crop, the source of "random resized crop"

PAD = 4  # pixels on each side of a private image, before it is cropped

_CPU_BLOCK = 32  # images augmented at once on a CPU


@dataclass(frozen=True)
class ViewChoices:
    """The random choices of one view of a batch of B images, on the images' device, except for ``order``."""

    boxes: Tensor  # int64 [B, 4]: top, left, height, width of the crop, pixels
    flip: Tensor  # bool [B]: mirror left and right
    factors: Tensor  # float32 [B, 4], by colour.BRIGHTNESS … colour.HUE: 1 = unchanged, for hue 0 (turns)
    order: tuple[int, ...]  # of the four colour changes, one for the whole view batch
    grey: Tensor  # bool [B]: drop the colour, after the colour changes

    def rows(self, rows: slice) -> ViewChoices:
        """Those of some of the images."""
        return ViewChoices(self.boxes[rows], self.flip[rows], self.factors[rows], self.order, self.grey[rows])


class ContrastiveViews:
    """Random views of each image, as in DP-RandP's Phase I: crop, flip, colour jitter, grey (Tang et al. 2023).

    * Crop: area a fraction of the image uniform in ``SCALE``, log aspect ratio uniform in log ``RATIO``, whole
      pixels, ten tries, else the largest central crop of an allowed ratio. Resized to ``size`` with the bilinear
      filter, widened when it shrinks (antialiasing) as Pillow does.
    * Colour jitter on every image: factors uniform in 1 ± ``JITTER``, hue uniform in ± ``JITTER`` turns. Every image
      has its own factors; the *order* of the four changes is drawn once per view batch.
    * Each step clamps to [0, 1]; no rounding to 8 bits in between.

    Args:
        size: side of the views, pixels. flip: probability.
    """

    def __init__(self, size: int = 32, *, flip: float = 0.5) -> None:
        self.size, self.flip = size, flip

    def draw(self, images: Tensor, generator: torch.Generator) -> ViewChoices:
        """Draw the choices of one view of a batch, from the shape and the device of the images only.

        A generator of the CPU gives the same choices on every device.
        """
        batch, _, height, width = images.shape
        random = torch.rand(batch, 4 * CROP_TRIES + 6, generator=generator, device=generator.device)
        order = torch.randperm(4, generator=generator, device=generator.device).tolist()
        random = random.to(images.device)
        centre = random.new_tensor([1.0, 1.0, 1.0, 0.0])
        return ViewChoices(
            boxes=_boxes(random[:, : 4 * CROP_TRIES].view(batch, CROP_TRIES, 4), height, width),
            flip=random[:, -1] < self.flip,
            factors=centre + random.new_tensor(JITTER) * (2 * random[:, -6:-2] - 1),
            order=tuple(order),
            grey=random[:, -2] < GREY_PROBABILITY,
        )

    def apply(self, images: Tensor, choices: ViewChoices) -> Tensor:
        """Apply given choices: uint8 [B, 3, H, W] -> float32 [B, 3, size, size] in [0, 1]."""
        if images.device.type != "cpu":
            return self._apply(images, choices)
        parts = []
        for start in range(0, len(images), _CPU_BLOCK):  # the float pixels of a block stay in a core's cache
            rows = slice(start, start + _CPU_BLOCK)
            parts.append(self._apply(images[rows], choices.rows(rows)))
        return torch.cat(parts) if parts else torch.empty(0, 3, self.size, self.size)

    def _apply(self, images: Tensor, choices: ViewChoices) -> Tensor:
        view = _crop_resize(images, choices.boxes, choices.flip, self.size)
        for change in choices.order:
            view = adjust(view, change, choices.factors[:, change].view(-1, 1, 1, 1))
        return torch.where(choices.grey.view(-1, 1, 1, 1), grey(view), view)

def keyed_uniforms(examples: np.ndarray | Tensor, step: int, seed: int, views: int) -> Tensor:
    """Choices for :func:`private_views` that depend only on (seed, step, example, view).

    Args:
        examples: integers [B], the examples' positions in the data set.
        step: number of the step, at least 0. seed: public, any integer. views: per example, K.

    Returns:
        float64 [B, K, 3], uniform in [0, 1) with 53 bits, on the CPU.

    *Guarantee.* Row i is a function of ``examples[i]`` and of public values. So zeroing out one example, whose position
    is then left empty, changes no other example's views, even for an adversary who knows the seed. With a generator
    that deals choices along the batch, the choices of example i would go to example i + 1, and so on.

    Source: the output function of SplitMix64 (Steele, Lea & Flood 2014), applied once per word of the key.
    """
    ids = examples.detach().cpu().numpy() if isinstance(examples, Tensor) else np.asarray(examples)
    state = _mix(np.full(1, seed % 2**64, dtype=np.uint64))
    state = _mix(state ^ np.full(1, step, dtype=np.uint64))
    state = _mix(state ^ ids.astype(np.uint64)[:, None])
    state = _mix(state ^ np.arange(3 * views, dtype=np.uint64)[None, :])
    return torch.from_numpy((state >> np.uint64(11)).astype(np.float64) * 2.0**-53).view(len(ids), views, 3)


def private_views(
    images: Tensor, views: int, randomness: torch.Generator | Tensor, *, flip: bool, augment_single: bool = False
) -> Tensor:
    """K views of each image: pad by reflection, crop back to the old size anywhere, mirror half of them.

    Args:
        images: [B, C, H, W] of any dtype (uint8 moves least memory), H and W above ``PAD``.
        views: K >= 1.
        randomness: uniform numbers [B, K, 3] in [0, 1) for the row, the column and the mirror, as made by
            :func:`keyed_uniforms` (use this for private images), or a generator to draw them from.
        flip: mirror left and right with probability 1/2; digits and letters must not be mirrored.
        augment_single: with K = 1 the one view is the image itself (no augmentation) unless this is set.

    Returns:
        [B, K, C, H, W] of the same dtype, on the same device; view j of example i belongs to images[i] alone.
    """
    batch, _, height, width = images.shape
    if views == 1 and not augment_single:
        return images.unsqueeze(1)
    if isinstance(randomness, torch.Generator):
        randomness = torch.rand(batch, views, 3, generator=randomness, device=randomness.device)
    shift = _uniform_integer(randomness[..., :2], 2 * PAD + 1).to(images.device)  # [B, K, 2]: top, left
    mirror = (randomness[..., 2] < (0.5 if flip else 0.0)).to(images.device)  # [B, K]
    # A window of the mirrored padded image is the mirrored window at the opposite place, so cropping and mirroring are
    # one look-up among strided windows, which copies each view once and needs no index per pixel.
    rows = _reflect(torch.arange(-PAD, height + PAD, device=images.device), height)
    columns = _reflect(torch.arange(-PAD, width + PAD, device=images.device), width)
    padded = images[:, :, rows][..., columns]
    windows = torch.stack([padded, padded.flip(-1)], dim=1).unfold(3, height, 1).unfold(4, width, 1)
    left = torch.where(mirror, 2 * PAD - shift[..., 1], shift[..., 1])
    example = torch.arange(batch, device=images.device)[:, None]
    return windows[example, mirror.long(), :, shift[..., 0], left]  # from [B, 2, C, 2 PAD + 1, 2 PAD + 1, H, W]


def _uniform_integer(random: Tensor, count: int | Tensor) -> Tensor:
    """Uniform [0, 1) -> int64 in 0..count-1. The clamp catches a product that rounds up to count."""
    return torch.minimum((random * count).long(), torch.as_tensor(count, device=random.device) - 1)


def _boxes(random: Tensor, height: int, width: int) -> Tensor:
    """Uniform [B, tries, 4] -> int64 [B, 4]: the first of the tries that fits, else the central crop."""
    area = height * width * (SCALE[0] + (SCALE[1] - SCALE[0]) * random[..., 0])
    low, high = math.log(RATIO[0]), math.log(RATIO[1])
    ratio = torch.exp(low + (high - low) * random[..., 1])
    wide = torch.round(torch.sqrt(area * ratio)).long()
    tall = torch.round(torch.sqrt(area / ratio)).long()
    fits = (wide > 0) & (wide <= width) & (tall > 0) & (tall <= height)
    top = _uniform_integer(random[..., 2], height - tall.clamp(max=height) + 1)
    left = _uniform_integer(random[..., 3], width - wide.clamp(max=width) + 1)
    tries = torch.stack([top, left, tall, wide], dim=-1)
    first = fits.int().argmax(dim=1)
    chosen = tries[torch.arange(len(tries), device=tries.device), first]
    return torch.where(fits.any(dim=1, keepdim=True), chosen, tries.new_tensor(_central_box(height, width)))


def _central_box(height: int, width: int) -> list[int]:
    """The largest central crop of an allowed width / height."""
    tall, wide = height, width
    if width < RATIO[0] * height:
        tall = max(1, round(width / RATIO[0]))
    elif width > RATIO[1] * height:
        wide = max(1, round(height * RATIO[1]))
    return [(height - tall) // 2, (width - wide) // 2, tall, wide]


def _crop_resize(images: Tensor, boxes: Tensor, flip: Tensor, size: int) -> Tensor:
    """Crop and resize by two batched products, rows · image · columnsᵀ; to mirror, the columns are reversed."""
    rows = _resize_weights(boxes[:, 0], boxes[:, 2], images.shape[2], size) / 255
    columns = _resize_weights(boxes[:, 1], boxes[:, 3], images.shape[3], size)
    columns = torch.where(flip.view(-1, 1, 1), columns.flip(1), columns)
    with torch.autocast(images.device.type, enabled=False):
        narrow = torch.bmm(images.flatten(1, 2).float(), columns.transpose(1, 2))  # [B, 3H, size]
        view = rows[:, None] @ narrow.unflatten(1, (3, -1))
    return view.clamp_(0, 1)  # the weights sum to 1 up to rounding


def _resize_weights(start: Tensor, length: Tensor, pixels: int, size: int) -> Tensor:
    """Weights [B, size, pixels] of the triangle filter that resizes pixels start..start+length-1 to ``size``.

    The filter's half width is one input pixel when it enlarges and one output pixel when it shrinks, cut off at the
    edges of the crop and normalised to sum 1.
    """
    step = (length.float() / size).view(-1, 1, 1)  # input pixels per output pixel
    centre = (torch.arange(size, device=start.device).view(1, -1, 1) + 0.5) * step
    position = torch.arange(pixels, device=start.device).view(1, 1, -1) - start.view(-1, 1, 1)
    inside = (position >= 0) & (position < length.view(-1, 1, 1))
    weights = (1 - (position + 0.5 - centre).abs() / step.clamp(min=1)).clamp(min=0) * inside
    return weights / weights.sum(dim=2, keepdim=True)


def _reflect(index: Tensor, size: int) -> Tensor:
    """Positions outside 0..size-1 folded back at the edge pixels, which are not repeated."""
    index = index.abs()
    return (size - 1) - ((size - 1) - index).abs()


def _mix(state: np.ndarray) -> np.ndarray:
    """SplitMix64: add the odd constant and scramble, uint64 -> uint64, wrapping."""
    state = state + np.uint64(0x9E3779B97F4A7C15)
    state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return state ^ (state >> np.uint64(31))
