"""Mixtures of an example's own views: DP-MixSelf (Bao et al. 2023, "DP-Mix", NeurIPS).

Mixup of two examples would let one record into another's gradient. Two views of the *same* example have the same label,
so a mixture of them has it too, and belongs to that example alone: it is one more view, averaged before the clip. (With
a single view there is nothing to mix: an image mixed with itself is the image.)
"""

from __future__ import annotations

import torch
from scipy.special import betaincinv
from torch import Tensor

from dprandp.errors import UsageError

ALPHA = 0.2
"""λ ~ Beta(α, α), as usual for mixup (Zhang et al. 2018): mostly near one of the two views."""


def with_mixtures(views: Tensor, draws: Tensor) -> Tensor:
    """The views of each example, and after them mixtures λ a + (1 − λ) b of two different ones of them.

    Args:
        views: uint8 [B, K, C, H, W], K ≥ 2.
        draws: uniform numbers [B, M, 3] in [0, 1) on the CPU, for the two views and λ; see ``views.keyed_uniforms``.

    Returns:
        uint8 [B, K + M, C, H, W] on the device of ``views``; mixtures are rounded to whole levels.

    Raises:
        UsageError: K below 2.

    Guarantee:
        Row i is a function of row i of the arguments alone.
    """
    count = views.shape[1]
    if count < 2:
        raise UsageError(f"{count} view of each example cannot be mixed", fix="give --views 2 or more")
    one = (draws[..., 0] * count).long().clamp_(max=count - 1)
    other = (one + 1 + (draws[..., 1] * (count - 1)).long().clamp_(max=count - 2)) % count
    part = torch.from_numpy(betaincinv(ALPHA, ALPHA, draws[..., 2].double().numpy())).to(torch.float32)
    rows = torch.arange(len(views), device=views.device)[:, None]
    left, right = views[rows, one.to(views.device)], views[rows, other.to(views.device)]
    part = part.to(views.device).view(*part.shape, 1, 1, 1)
    mixed = torch.lerp(right.to(torch.float32), left.to(torch.float32), part).round_().to(torch.uint8)
    return torch.cat([views, mixed], dim=1)
