"""The WideResNet of DP-RandP (Tang et al. 2023) with the refinements of De et al. 2022.

Sources: Zagoruyko & Komodakis 2016 (the shape), De et al. 2022 arXiv 2204.13650 (ReLU before GroupNorm, weight
standardisation, convolutions with bias), Tang et al. 2023 arXiv 2306.06076. No layer mixes examples, so per-example
gradients exist.

``model.to(memory_format=torch.channels_last)`` is faster everywhere, bfloat16 autocast only where the hardware has it
(``precision.py``); weights are standardised in the parameters' own precision first.
"""

from __future__ import annotations

import copy
import math
import re
import threading
from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dprandp import losses
from dprandp.errors import UsageError
from dprandp.models.precision import autocast, full_precision
from dprandp.models.whitening import Part
from dprandp.threads import in_parts

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
        projection: width of a linear layer on the whole last map, whose outputs are then the features: the first layer
            of the projection head, on which Tang et al. 2023 fit their separate probe. None: averages are.
        input_size: side of the images in pixels, for that layer alone.
        generator: of the initial weights (public randomness); None means torch's global one.
    """

    normalise = staticmethod(normalise)
    input_size = 32

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
        projection: int | None = None,
        input_size: int = 32,
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
        self.projection = None
        if projection is not None:
            side = math.ceil(input_size / 4)
            self.projection, widths = nn.Linear(wide_in * side * side, projection, bias=False), [projection]
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
        """Average-pooled feature maps, float [B, feature_dim], in the order of ``Pooling``; or the ``projection``.

        Features of ``earlier`` stages come first: of a stage's map as the next block's first convolution sees it.
        """
        if self.projection is not None:
            return self.projection(flat(self.trunk(x)))
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


def flat(feature_map: Tensor) -> Tensor:
    """[B, C, H, W] in any memory format as [B, C · H · W]: channel, row, column."""
    return feature_map.contiguous().flatten(1)


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


# --------------------------------------------------------------------------------------------- per-record gradients
#
# All views of several records go through the network as one ordinary batch, forwards and backwards. Only the
# gradients of the parameters are kept separate: each convolution and each norm computes them record by record from
# its input and the gradient of its output (the book-keeping of Bu, Wang, Zha & Karypis 2023, "Differentially Private
# Optimization on Large Foundation Models at Small Cost", arXiv 2210.00038, but with gradients instead of their
# norms). Filters are standardised once a step, and the gradient of a standardised filter is carried back through that
# map, a projection and a factor.

PATCH_BYTES = 2**21
"""Bytes of patches that one thread of a CPU copies at a time."""

CACHED_VIEWS = 16
"""Views that one thread of a CPU works on at a time: their activations stay in its cache."""

FEW_VIEWS = 4
"""Most views of a record with which a CPU computes all records of a pass together: single calls would take longer."""


class Place(NamedTuple):
    """The records of a pass: their number, their first row of the gradients, and whether all are in one call."""

    records: int
    first: int
    together: bool


class Tape(threading.local):
    """The place of the forward pass that a thread runs (an accelerator may run the backward one in another)."""

    place: Place


class RecordLayer(nn.Module):
    """A layer that computes the same as the one it replaces, and its gradients record by record.

    Args:
        like: the layer that it replaces. source: the layer whose parameters it has. name: of that in the classifier.

    Attributes:
        rows: gradients by parameter name, [records, ...], filled by the backward pass.
    """

    def __init__(self, like: nn.Module, source: nn.Module, name: str, tape: Tape) -> None:
        super().__init__()
        self.source, self.name, self.tape = (source,), name, tape  # a tuple: no submodule
        self.anchor = torch.zeros((), requires_grad=True)  # so that the first layer has a backward pass as well
        self.rows: dict[str, Tensor] = {}

    def make_room(self, records: int) -> None:
        """Allocate rows for at least this many records."""
        if not self.rows or len(next(iter(self.rows.values()))) < records:
            self.rows = {}
            self.rows = self.empty_rows(records)

    def _vectors(self, records: int, *kinds: str) -> dict[str, Tensor]:
        return {f"{self.name}.{kind}": self.bias.new_empty((records, len(self.bias))) for kind in kinds}

    def keep(self, place: Place, **values: Tensor) -> None:
        """Store vectors, each [records, numbers]."""
        for kind, value in values.items():
            self.rows[f"{self.name}.{kind}"][place.first : place.first + place.records] = value


class RecordConv(RecordLayer):
    """A convolution with the filters of ``source``, standardised if that standardises them."""

    def __init__(self, like: nn.Conv2d, *others) -> None:
        super().__init__(like, *others)
        self.size, self.stride, self.padding = like.kernel_size, like.stride, like.padding

    def refresh(self) -> None:
        """Read the current parameters."""
        (source,) = self.source
        weight, self.bias = source.weight.detach(), source.bias.detach()
        self.factor = None
        if isinstance(source, StandardisedConv2d):
            variance, mean = torch.var_mean(weight, dim=(1, 2, 3), keepdim=True, correction=0)
            energy = variance * weight[0].numel()
            root = torch.rsqrt(energy.clamp(min=STANDARDISATION_FLOOR))
            unit = (weight - mean) * root
            weight = unit * source.gain.detach().view(-1, 1, 1, 1)
            self.unit = unit.permute(0, 2, 3, 1).flatten(1)
            self.factor = source.gain.detach()[:, None] * root.flatten(1)
            # where the floor holds, the root is a constant: the filter's own direction is not projected out
            self.turn = self.factor * (energy.flatten(1) >= STANDARDISATION_FLOOR)
        self.weight = weight.contiguous(memory_format=torch.channels_last)

    def empty_rows(self, records: int) -> dict[str, Tensor]:
        out, channels, *size = self.weight.shape
        weight = self.weight.new_empty((records, out, *size, channels))
        self.flat_rows = weight.flatten(2)
        kinds = ("bias",) if self.factor is None else ("bias", "gain")
        return {f"{self.name}.weight": weight.permute(0, 1, 4, 2, 3)} | self._vectors(records, *kinds)

    def forward(self, x: Tensor) -> Tensor:
        return _ConvFunction.apply(x, self.anchor, self)

    def keep_weight(self, place: Place, weight: Tensor) -> None:
        """Store gradients of the (standardised) filters, [records, O, height · width · channels]."""
        rows = self.flat_rows[place.first : place.first + place.records]
        if self.factor is None:
            rows.copy_(weight)
            return
        weight = weight.to(rows.dtype)
        along, mean = torch.mul(weight, self.unit, out=rows).sum(dim=2), weight.mean(dim=2)
        torch.mul(weight, self.factor, out=rows)
        rows.sub_((mean * self.factor[:, 0])[..., None])
        rows.addcmul_(self.unit, (along * self.turn[:, 0])[..., None], value=-1)
        self.keep(place, gain=along)

    def patches(self, x: Tensor) -> Tensor:
        """The input patch of each output: [B, channels, H, W] -> [B, positions, height · width · channels]."""
        (high, wide), (down, right), (above, left) = self.size, self.stride, self.padding
        x = F.pad(x, (left, left, above, above)) if above or left else x
        x = x.contiguous(memory_format=torch.channels_last)
        windows = x.unfold(2, high, down).unfold(3, wide, right)  # [B, channels, rows, columns, high, wide]
        return windows.permute(0, 2, 3, 4, 5, 1).reshape(len(x), -1, high * wide * x.shape[1])


class _ConvFunction(torch.autograd.Function):
    """A convolution whose backward pass returns the gradient of its input and stores those of its parameters."""

    @staticmethod
    def forward(ctx, x: Tensor, anchor: Tensor, layer: RecordConv) -> Tensor:
        weight, bias = layer.weight, layer.bias
        ctx.given = x.dtype
        if torch.is_autocast_enabled(x.device.type):
            precision = torch.get_autocast_dtype(x.device.type)
            x, weight, bias = x.to(precision), weight.to(precision), bias.to(precision)
        ctx.save_for_backward(x)
        ctx.layer, ctx.weight, ctx.place = layer, weight, layer.tape.place
        return F.conv2d(x, weight, bias, layer.stride, layer.padding)

    @staticmethod
    def backward(ctx, towards: Tensor) -> tuple[Tensor | None, None, None]:
        (x,), layer, place = ctx.saved_tensors, ctx.layer, ctx.place
        towards = towards.to(x.dtype).contiguous(memory_format=torch.channels_last)
        shift = towards.sum(dim=(2, 3), dtype=torch.float32)
        layer.keep(place, bias=shift.unflatten(0, (place.records, -1)).sum(dim=1))

        def library(x: Tensor, towards: Tensor, *mask: bool) -> tuple[Tensor, Tensor, Tensor]:
            return torch.ops.aten.convolution_backward(
                towards, x, ctx.weight, None, layer.stride, layer.padding, [1, 1], False, [0, 0], 1, [*mask, False]
            )

        wanted = ctx.needs_input_grad[0]
        slopes = towards.permute(0, 2, 3, 1).flatten(1, 2)  # [B, positions, O]
        if place.together:
            patches = layer.patches(x).unflatten(0, (place.records, -1)).flatten(1, 2)
            layer.keep_weight(place, slopes.unflatten(0, (place.records, -1)).flatten(1, 2).mT @ patches)
            return library(x, towards, True, False)[0].to(ctx.given) if wanted else None, None, None
        # The library is slow where a record has few positions, or where filters stride.
        bytes_ = x.element_size() * slopes.shape[1] * ctx.weight[0].numel()
        views = len(x) // place.records
        by_patches = max(layer.stride) > 1 or views * bytes_ <= PATCH_BYTES
        apart = by_patches or place.records > 1  # else one call gives both gradients
        before = library(x, towards, True, False)[0] if wanted and apart else None
        for number in range(place.records):
            own = place._replace(records=1, first=place.first + number)
            some = slice(number * views, (number + 1) * views)
            if by_patches:
                weight = _product(layer, x[some], slopes[some], max(1, PATCH_BYTES // bytes_))
            else:
                found, weight, _ = library(x[some], towards[some], wanted and not apart, True)
                before = before if apart else found
                weight = weight.permute(0, 2, 3, 1).flatten(1)
            layer.keep_weight(own, weight[None])
        return before.to(ctx.given) if wanted else None, None, None


def _product(layer: RecordConv, x: Tensor, slopes: Tensor, views: int) -> Tensor:
    """Gradient of one record's filters, [O, height · width · channels], patches of a few views at a time."""
    weight = None
    for some, towards in zip(x.split(views), slopes.split(views), strict=True):
        patches, towards = layer.patches(some).flatten(0, 1), towards.flatten(0, 1).t()
        weight = towards @ patches if weight is None else weight.addmm_(towards, patches)
    return weight


class RecordNorm(RecordLayer):
    """A GroupNorm with the scale and shift of ``source``."""

    def __init__(self, like: nn.GroupNorm, *others) -> None:
        super().__init__(like, *others)
        self.groups, self.eps = like.num_groups, like.eps

    def refresh(self) -> None:
        """As for ``RecordConv``."""
        self.weight, self.bias = (value.detach() for value in (self.source[0].weight, self.source[0].bias))

    def empty_rows(self, records: int) -> dict[str, Tensor]:
        return self._vectors(records, "weight", "bias")

    def forward(self, x: Tensor) -> Tensor:
        return _NormFunction.apply(x, self.anchor, self)

    def sizes(self, x: Tensor) -> tuple[int, int, int, int]:
        """The sizes for the library: members, channels, positions, groups."""
        return *x.shape[:2], math.prod(x.shape[2:]), self.groups


class _NormFunction(torch.autograd.Function):
    """GroupNorm with the gradients of its scale and shift by record; in float32 under autocast."""

    @staticmethod
    def forward(ctx, x: Tensor, anchor: Tensor, layer: RecordNorm) -> Tensor:
        ctx.given = x.dtype
        x = x.float() if torch.is_autocast_enabled(x.device.type) else x
        out, mean, rate = torch.native_group_norm(x, layer.weight, layer.bias, *layer.sizes(x), layer.eps)
        ctx.save_for_backward(x, mean, rate)
        ctx.layer, ctx.place = layer, layer.tape.place
        return out

    @staticmethod
    def backward(ctx, towards: Tensor) -> tuple[Tensor, None, None]:
        layer, place, saved = ctx.layer, ctx.place, ctx.saved_tensors

        def library(towards: Tensor, x: Tensor, mean: Tensor, rate: Tensor, parameters: bool) -> tuple:
            return torch.ops.aten.native_group_norm_backward(
                towards, x, mean, rate, layer.weight, *layer.sizes(x), [True, parameters, parameters]
            )

        towards = towards.contiguous(memory_format=torch.channels_last)
        if place.together:
            x, mean, rate = saved
            group = torch.arange(x.shape[1], device=x.device) // (x.shape[1] // layer.groups)
            shift = towards.sum(dim=(2, 3))
            scale = ((towards * x).sum(dim=(2, 3)) - shift * mean[:, group]) * rate[:, group]
            scale, shift = (value.unflatten(0, (place.records, -1)).sum(dim=1) for value in (scale, shift))
            layer.keep(place, weight=scale, bias=shift)
            return library(towards, *saved, False)[0].to(ctx.given), None, None
        before = []
        for number, parts in enumerate(zip(*(value.chunk(place.records) for value in (towards, *saved)), strict=True)):
            x, scale, shift = library(*parts, True)
            layer.keep(place._replace(records=1, first=place.first + number), weight=scale, bias=shift)
            before.append(x)
        return (before[0] if place.records == 1 else torch.cat(before)).to(ctx.given), None, None


def has_layer_gradients(extractor: nn.Module) -> bool:
    """Whether ``WrnGradients`` knows every layer of an extractor that has parameters."""
    owners = [layer for layer in extractor.modules() if next(layer.parameters(recurse=False), None) is not None]
    known = (nn.Conv2d, StandardisedConv2d, nn.GroupNorm)
    return type(extractor) is WideResNet and all(type(layer) in known for layer in owners)


class WrnGradients:
    """Gradients of the mean cross-entropy over each record's views, layer by layer.

    About as fast as an ordinary backward pass.

    Guarantee:
        Row i of every result is a function of record i and the parameters alone: no layer of the network mixes the
        members of a batch, and every sum runs over one record's views.

    Args:
        model: a ``Classifier`` whose extractor ``has_layer_gradients``; its parameters are read by ``refresh``.
        first: units of the extractor that are frozen and left out: ``of`` gets their outputs.
        trained: names of parameters; ``of`` finds gradients for all of a layer that has one of them. None: all. Other
            layers keep their present values, also after ``refresh``.
        together: compute the records of a pass without a loop over them. None: on an accelerator, and on a CPU where
            records have no more than ``FEW_VIEWS``.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        first: int = 0,
        trained: frozenset[str] | None = None,
        together: bool | None = None,
    ) -> None:
        self._model, self._first, self._together = model, first, together
        self._trained, self._threaded = trained, model.head.device.type == "cpu"
        self._tape = Tape()
        self._network = copy.deepcopy(model.extractor)
        self._layers = list(self._replaced(self._network, "extractor"))
        self.refresh()

    def _replaced(self, module: nn.Module, prefix: str) -> Iterator[RecordConv | RecordNorm]:
        """Replace a network's layers by ``RecordLayer``s; yields them."""
        for name, child in list(module.named_children()):
            path = f"{prefix}.{name}"
            if isinstance(child, nn.Conv2d | nn.GroupNorm):
                own = {f"{path}.{kind}" for kind, _ in child.named_parameters()}
                if self._trained is None or own & self._trained:
                    kind = RecordConv if isinstance(child, nn.Conv2d) else RecordNorm
                    layer = kind(child, self._model.get_submodule(path), path, self._tape)
                    setattr(module, name, layer)
                    yield layer
            else:
                yield from self._replaced(child, path)

    @torch.no_grad()
    def refresh(self) -> None:
        """Read the model's parameters: call it once after every change of them."""
        for layer in self._layers:
            layer.refresh()

    @torch.no_grad()
    def of(self, views: Tensor, labels: Tensor, class_weights: Tensor | None = None) -> dict[str, Tensor]:
        """The gradients of some records.

        Args:
            views: uint8 [B, K, 3, H, W], or float32 outputs of the units before ``first``.
            labels, class_weights: as of ``losses.residual``, for B records.

        Returns:
            float32 by the model's names, each [B, ...]; filters with their channels last in memory. Where a record's
            gradient is not finite, its rows are not, and no others. The next call overwrites them.
        """
        head = torch.empty(len(views), *self._model.head.shape, device=views.device)
        for layer in self._layers:
            layer.make_room(len(views))
        threads = torch.get_num_threads() if self._threaded else 1
        most = CACHED_VIEWS // views.shape[1] if self._threaded else len(views)
        step = max(1, min(most, -(-len(views) // threads)))
        starts = range(0, len(views), step)

        def work(part: int, parts: int) -> None:
            for first in starts[part::parts]:
                some = slice(first, first + step)
                head[some] = self._some(views[some], labels[some], class_weights, first)

        with full_precision(views.device):
            in_parts(work, max(1, min(threads, len(starts))))
        rows = {name: kept[: len(views)] for layer in self._layers for name, kept in layer.rows.items()}
        return {"head": head} | rows

    @torch.no_grad()
    def _some(self, views: Tensor, labels: Tensor, class_weights: Tensor | None, first: int) -> Tensor:
        """Gradients of the head for a few records; those of the layers go to their rows from ``first`` on."""
        model, (records, count) = self._model, views.shape[:2]
        together = (not self._threaded or count <= FEW_VIEWS) if self._together is None else self._together
        self._tape.place = Place(records, first, together)
        with torch.set_grad_enabled(bool(self._layers)):
            with autocast(model.extractor, views.device):
                features = self._features(views.flatten(0, 1))
            unit = model.whitener(features)  # float32 again: the last layers are a norm and a mean
        x = unit.detach()
        residual, towards = losses.through_head(x, model.head, labels, count, class_weights)
        if self._layers:
            unit.backward(towards)
        return torch.einsum("bkd,bkc->bdc", *(value.view(records, count, -1) for value in (x, residual)))

    def _features(self, views: Tensor) -> Tensor:
        network = self._network
        x = (views if self._first else network.normalise(views)).contiguous(memory_format=torch.channels_last)
        if not self._first:
            return network.features(x)
        for _, unit in network.units()[self._first :]:
            x = unit(x)
        return network.head_of(x)
