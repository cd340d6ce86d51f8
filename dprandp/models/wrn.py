"""The WideResNet of DP-RandP (Tang et al. 2023) with the refinements of De et al. 2022.

Sources: Zagoruyko & Komodakis 2016 (the shape), De et al. 2022 arXiv 2204.13650 (ReLU before GroupNorm, weight
standardisation, convolutions with bias), Tang et al. 2023 arXiv 2306.06076. No layer mixes examples, so per-example
gradients exist.

``model.to(memory_format=torch.channels_last)`` is faster everywhere, bfloat16 autocast only where the hardware has it
(``precision.py``); weights are standardised in the parameters' own precision first.
"""

from __future__ import annotations

import math
import re
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dprandp.errors import UsageError
from dprandp.models.whitening import Part

# Public constants, the same for every data set: a mean or a deviation taken from private pixels would cost budget.
IMAGE_MEAN = 0.5
IMAGE_STD = 0.25

GROUPS = 16  # of every GroupNorm, as published
STANDARDISATION_FLOOR = 1e-4  # De et al. 2022: keeps a filter whose weights are all equal from dividing by zero
_TRUNCATION_STD = 0.87962566  # standard deviation of N(0, 1) cut off at ±2
_SIDES = {str(side * side): side for side in range(1, 9)}


class LayerOrder(NamedTuple):
    """What comes before a convolution; each field is ``"relu-norm"`` or ``"norm-relu"``."""

    branch: str  # before both 3×3 convolutions of a block
    skip: str  # before the 1×1 convolution of the shortcut, where the width changes
    final: str  # after the last block


# The orders of Sander et al. 2023 (TAN, arXiv 2210.03403), with their numbers, under descriptive names.
LAYER_ORDERS: dict[str, LayerOrder] = {
    "relu-norm-conv": LayerOrder("relu-norm", "relu-norm", "relu-norm"),  # 0: De et al. 2022, DP-RandP
    "norm-relu-conv": LayerOrder("norm-relu", "norm-relu", "norm-relu"),  # 1: the usual pre-activation block
    "norm-relu-conv+relu-norm-skip": LayerOrder("norm-relu", "relu-norm", "relu-norm"),  # 2
    "relu-norm-conv+norm-relu-skip": LayerOrder("relu-norm", "norm-relu", "relu-norm"),  # 3
}


def parse_wrn(name: str) -> tuple[int, int]:
    """Read ``"wrn-DEPTH-WIDTH"``, e.g. ``"wrn-16-4"`` -> ``(16, 4)``.

    Raises:
        UsageError: another spelling, a depth that is not 6n + 4 with n >= 1, or a width below 1.
    """
    match = re.fullmatch(r"wrn-(\d{1,3})-(\d{1,2})", name)
    if match is None:
        raise UsageError(f"architecture {name!r} is not of the form wrn-DEPTH-WIDTH", fix="write for example wrn-16-4")
    depth, width = int(match[1]), int(match[2])
    if depth < 10 or (depth - 4) % 6:
        raise UsageError(f"WideResNet depth {depth} is not 6n + 4", fix="use a depth of 10, 16, 22, 28, 34 or 40")
    if width < 1:
        raise UsageError(f"WideResNet width {width} is below 1", fix="use a width factor of 1 or more, e.g. 4")
    return depth, width


def normalise(images: Tensor) -> Tensor:
    """Pixels to network input, ``(pixel - IMAGE_MEAN) / IMAGE_STD``.

    Args:
        images: [..., H, W], uint8 in 0..255, or floating point in [0, 1] (augmented views).

    Returns:
        float32 (or the given floating dtype) of the same shape and memory format, in [-2, 2].
    """
    if images.dtype == torch.uint8:
        return images.float().mul_(1 / (255 * IMAGE_STD)).sub_(IMAGE_MEAN / IMAGE_STD)
    if images.is_floating_point():
        return images.mul(1 / IMAGE_STD).sub_(IMAGE_MEAN / IMAGE_STD)
    raise UsageError(f"images of type {images.dtype} cannot be normalised", fix="pass uint8, or floats in [0, 1]")


class Pooling:
    """Features from a map: averages over the grids of ``"1+4"``, say, the whole map and its four quarters.

    Grids are different square numbers of cells between 1 and 64. With ``cells`` of all grids together, a map of C
    channels has C · cells features.

    Raises:
        UsageError: a part is not such a number, or occurs twice.
    """

    def __init__(self, grids: str) -> None:
        parts = grids.split("+")
        if len(set(parts)) != len(parts) or not _SIDES.keys() >= set(parts):
            raise UsageError(
                f"pooling {grids!r} is not a sum of different square numbers of cells",
                fix="write for example 1 (global average), 4 (a 2×2 grid) or 1+4 (both)",
            )
        self._sides = [_SIDES[part] for part in parts]
        self.cells = sum(side * side for side in self._sides)

    def __call__(self, feature_map: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, C · cells]: grid after grid, within a grid by channel, row, column."""
        return torch.cat([F.adaptive_avg_pool2d(feature_map, side).flatten(1) for side in self._sides], dim=1)


def pad_same(x: Tensor, size: int, stride: int, value: float = 0.0) -> Tensor:
    """Pad as the framework of De et al. 2022 does: ⌈side/stride⌉ places; an odd one is below and right.

    For an even side, size 3 and stride 2 that is one row below and right, where symmetric padding has one on each
    side: the filters see places shifted by a pixel, so weights trained with one padding are not those of the other.

    Args:
        x: [..., H, W]. size, stride: of the filter. value: what to pad with.
    """
    widths: list[int] = []
    for side in (x.shape[-1], x.shape[-2]):
        total = max((-(-side // stride) - 1) * stride + size - side, 0)
        widths += [total // 2, total - total // 2]
    return F.pad(x, widths, value=value) if any(widths) else x


class StandardisedConv2d(nn.Conv2d):
    """A convolution whose filters are standardised on every forward pass (De et al. 2022; Qiao et al. 2019).

    Per filter: (W - mean) · gain / √max(var · fan_in, 1e-4), with the population variance over the filter's fan_in
    weights and a trained gain per filter that starts at 1. The bias is kept as it is.
    """

    def __init__(self, in_channels: int, out_channels: int, size: int, stride: int = 1, padding: int = 0) -> None:
        super().__init__(in_channels, out_channels, size, stride=stride, padding=padding)
        self.gain = nn.Parameter(torch.ones(out_channels))

    def standardised_weight(self) -> Tensor:
        """The filters in use, of the shape of ``weight``."""
        variance, mean = torch.var_mean(self.weight, dim=(1, 2, 3), keepdim=True, correction=0)
        energy = variance * self.weight[0].numel()
        scale = self.gain.view(-1, 1, 1, 1) * torch.rsqrt(energy.clamp(min=STANDARDISATION_FLOOR))
        return (self.weight - mean) * scale

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.standardised_weight(), self.bias, self.stride, self.padding)


def _activate(x: Tensor, norm: nn.GroupNorm, order: str) -> Tensor:
    return norm(F.relu(x)) if order == "relu-norm" else F.relu(norm(x))


class _Block(nn.Module):
    """Two activated 3×3 convolutions beside a shortcut, which is a 1×1 convolution where the width changes."""

    def __init__(self, wide_in: int, wide_out: int, stride: int, order: LayerOrder, conv: type, padding: str) -> None:
        super().__init__()
        self.order = order
        self.norm1 = nn.GroupNorm(GROUPS, wide_in)
        self.pads = padding == "same" and stride > 1  # with stride 1 the two paddings are one
        self.conv1 = conv(wide_in, wide_out, 3, stride=stride, padding=0 if self.pads else 1)
        self.norm2 = nn.GroupNorm(GROUPS, wide_out)
        self.conv2 = conv(wide_out, wide_out, 3, padding=1)
        self.reshapes = wide_in != wide_out  # every stage that strides widens as well
        if self.reshapes:
            self.skip_norm = nn.GroupNorm(GROUPS, wide_in)
            self.skip_conv = conv(wide_in, wide_out, 1, stride=stride)

    def forward(self, x: Tensor) -> Tensor:
        return self.after(x, self.seen(x))

    def seen(self, x: Tensor) -> Tensor:
        """The input of the first convolution (before padding)."""
        return _activate(x, self.norm1, self.order.branch)

    def after(self, x: Tensor, seen: Tensor) -> Tensor:
        """The block's output, given its input and what ``seen`` made of that."""
        skip = self.skip_conv(_activate(x, self.skip_norm, self.order.skip)) if self.reshapes else x
        out = self.conv1(pad_same(seen, 3, self.conv1.stride[0]) if self.pads else seen)
        return skip + self.conv2(_activate(out, self.norm2, self.order.branch))


class WideResNet(nn.Module):
    """Stem conv3×3(16), three stages of (depth - 4)/6 blocks, 16k/32k/64k channels, strides 1/2/2, final activation.

    WRN-16-4 has 2.75 million parameters (2,748,992; weight standardisation adds 2,256 gains).

    Args:
        depth, width: of the name wrn-DEPTH-WIDTH, as ``parse_wrn`` reads them; width = the factor k.
        weight_standardisation: of every convolution. Published DP-RandP: False; De et al. 2022: True.
        layer_order: a key of ``LAYER_ORDERS``. Published: ``"relu-norm-conv"``.
        pooling: grids of :meth:`features`, see ``Pooling``. Published: ``"1"``.
        padding: of 3×3 convolutions with stride 2: ``"symmetric"`` (DP-RandP), or ``"same"`` (De et al. 2022).
        earlier: grids for the maps after the first and the second stage, whose averages are features too, each stage's
            whitened by itself; none (published) or two.
        generator: of the initial weights (public randomness); None means torch's global one.
    """

    normalise = staticmethod(normalise)

    def __init__(
        self,
        depth: int,
        width: int,
        *,
        weight_standardisation: bool = True,
        layer_order: str = "relu-norm-conv",
        pooling: str = "1+4",
        padding: str = "symmetric",
        earlier: tuple[str, ...] = (),
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        self._pooling = Pooling(pooling)
        self._earlier = [Pooling(grids) for grids in earlier]
        order = LAYER_ORDERS[layer_order]
        conv = StandardisedConv2d if weight_standardisation else nn.Conv2d

        self.final_order = order.final
        self.stem = conv(3, 16, 3, padding=1)
        blocks: list[nn.Module] = []
        wide_in = 16
        self._stage_blocks = (depth - 4) // 6
        for wide_out, stride in ((16 * width, 1), (32 * width, 2), (64 * width, 2)):
            for position in range(self._stage_blocks):
                blocks.append(_Block(wide_in, wide_out, stride if position == 0 else 1, order, conv, padding))
                wide_in = wide_out
        self.blocks = nn.Sequential(*blocks)
        self.final_norm = nn.GroupNorm(GROUPS, wide_in)
        stages = zip((16 * width, 32 * width), self._earlier, strict=False)
        widths = [count * grids.cells for count, grids in [*stages, (wide_in, self._pooling)]]
        self.feature_dim = sum(widths)
        self.parts = tuple(Part(size, 1 / len(widths)) for size in widths)
        initialise(self, generator)

    def units(self) -> list[tuple[str, nn.Module]]:
        """Names and modules in the order of the forward pass: the stem, then each block."""
        return [("stem", self.stem), *((f"blocks.{place}", block) for place, block in enumerate(self.blocks))]

    def trunk(self, x: Tensor) -> Tensor:
        """The residual stream after the last block, without the final activation: the input of the published head.

        Args:
            x: float [B, 3, H, W], normalised.

        Returns:
            [B, 64k, H/4, W/4], rounded up: 8×8 for 32×32 images.
        """
        return self.blocks(self.stem(x))

    def features(self, x: Tensor) -> Tensor:
        """Average-pooled feature maps, float [B, feature_dim], in the order of ``Pooling``.

        Features of ``earlier`` stages come first: of a stage's map as the next block's first convolution sees it.
        """
        if not self._earlier:
            return self.head_of(self.trunk(x))
        x, parts = self.stem(x), []
        for index, block in enumerate(self.blocks):
            stage, position = divmod(index, self._stage_blocks)
            seen = block.seen(x)
            if stage and position == 0:
                parts.append(self._earlier[stage - 1](seen))
            x = block.after(x, seen)
        return torch.cat([*parts, self.head_of(x)], dim=1)

    def head_of(self, trunk: Tensor) -> Tensor:
        """The last stage's features of images whose :meth:`trunk` is given."""
        return self._pooling(_activate(trunk, self.final_norm, self.final_order))

    @property
    def reads_earlier_stages(self) -> bool:
        """Whether earlier stages' maps are features too, so that a block's output goes to more than the next block."""
        return bool(self._earlier)

    forward = features


def initialise(module: nn.Module, generator: torch.Generator | None = None) -> None:
    """Draw new weights, in the order of ``module.modules()``: truncated normal of std 1/√fan_in, biases 0.

    The normal is cut off at two of its standard deviations, and widened so that the std after the cut is 1/√fan_in.
    Norms and gains get weight 1 and bias 0.
    """
    for layer in module.modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            std = 1 / (math.sqrt(layer.weight[0].numel()) * _TRUNCATION_STD)
            nn.init.trunc_normal_(layer.weight, std=std, a=-2 * std, b=2 * std, generator=generator)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
        elif isinstance(layer, nn.GroupNorm | nn.LayerNorm):
            nn.init.ones_(layer.weight)
            nn.init.zeros_(layer.bias)
        if isinstance(layer, StandardisedConv2d):
            nn.init.ones_(layer.gain)
