"""Batched colour changes: brightness, contrast, saturation, hue and grey, one factor per image."""

from __future__ import annotations

import torch
from torch import Tensor

BRIGHTNESS, CONTRAST, SATURATION, HUE = range(4)
_LUMA = (0.2989, 0.587, 0.114)  # ITU-R BT.601 grey, the weights torchvision uses


def grey(view: Tensor) -> Tensor:
    """[B, 3, H, W] -> [B, 1, H, W], the luma."""
    red, green, blue = view.unbind(1)
    return (_LUMA[0] * red + _LUMA[1] * green + _LUMA[2] * blue).unsqueeze(1)


def adjust(view: Tensor, change: int, factor: Tensor) -> Tensor:
    """One colour change of a batch, with one factor per image; meant as torchvision means it.

    Args:
        view: float [B, 3, H, W] in [0, 1].
        change: BRIGHTNESS scales, CONTRAST moves away from the image's mean grey, SATURATION from each pixel's grey,
            HUE turns the colour circle.
        factor: [B, 1, 1, 1]; 1 changes nothing, for HUE 0 does (unit: turns).

    Returns:
        float [B, 3, H, W] in [0, 1].
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
