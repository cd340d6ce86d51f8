"""Per-example gradients of a classifier on a WideResNet, layer by layer: about as fast as an ordinary backward pass.

All views of several records go through the network as one ordinary batch, forwards and backwards. Only the gradients of
the parameters are kept separate: each convolution and each norm computes them record by record from its input and the
gradient of its output (the book-keeping of Bu, Wang, Zha & Karypis 2023, "Differentially Private Optimization on Large
Foundation Models at Small Cost", arXiv 2210.00038, but with gradients instead of their norms). Filters are standardised
once a step, and the gradient of a standardised filter is carried back through that map, a projection and a factor.
``privacy.clipping`` does the clipping.

Guarantee:
    Row i of every result is a function of record i and the parameters alone: no layer of the network mixes the members
    of a batch, and every sum below runs over one record's views.
"""

from __future__ import annotations

import copy
import math
import threading
from collections.abc import Collection, Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from dprandp.models.classifier import Classifier
from dprandp.models.precision import autocast, full_precision
from dprandp.models.wrn import STANDARDISATION_FLOOR, StandardisedConv2d, WideResNet
from dprandp.threads import in_parts

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
        x = functional.pad(x, (left, left, above, above)) if above or left else x
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
        return functional.conv2d(x, weight, bias, layer.stride, layer.padding)

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
    """Gradients of the mean cross-entropy over each record's views.

    Args:
        model: a classifier whose extractor ``has_layer_gradients``; its parameters are read by ``refresh``.
        first: units of the extractor that are frozen and left out: ``of`` gets their outputs.
        trained: names of the parameters that ``of`` finds gradients for, all or none of a layer's; None: all. The
            others keep their present values, also after ``refresh``.
        together: compute the records of a pass without a loop over them. None: on an accelerator, and on a CPU where
            records have no more than ``FEW_VIEWS``.
    """

    def __init__(
        self,
        model: Classifier,
        *,
        first: int = 0,
        trained: Collection[str] | None = None,
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
                if self._trained is None or f"{path}.weight" in self._trained:
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
    def of(self, views: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """The gradients of some records.

        Args:
            views: uint8 [B, K, 3, H, W], or float32 outputs of the units before ``first``. labels: int64 [B].

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
                head[some] = self._some(views[some], labels[some], first)

        with full_precision(views.device):
            in_parts(work, max(1, min(threads, len(starts))))
        rows = {name: kept[: len(views)] for layer in self._layers for name, kept in layer.rows.items()}
        return {"head": head} | rows

    @torch.no_grad()
    def _some(self, views: Tensor, labels: Tensor, first: int) -> Tensor:
        """Gradients of the head for a few records; those of the layers go to their rows from ``first`` on."""
        model, (records, count) = self._model, views.shape[:2]
        together = (not self._threaded or count <= FEW_VIEWS) if self._together is None else self._together
        self._tape.place = Place(records, first, together)
        with torch.set_grad_enabled(bool(self._layers)):
            with autocast(model.extractor, views.device):
                features = self._features(views.flatten(0, 1))
            unit = model.whitener(features)  # float32 again: the last layers are a norm and a mean
        x = unit.detach()
        residual = functional.softmax(x @ model.head, dim=1)
        chosen = labels.repeat_interleave(count)[:, None]
        residual = residual.scatter_add(1, chosen, residual.new_full((1, 1), -1.0).expand_as(chosen)) / count
        if self._layers:
            unit.backward(residual @ model.head.t())
        return torch.einsum("bkd,bkc->bdc", *(value.view(records, count, -1) for value in (x, residual)))

    def _features(self, views: Tensor) -> Tensor:
        network = self._network
        x = (views if self._first else network.normalise(views)).contiguous(memory_format=torch.channels_last)
        if not self._first:
            return network.features(x)
        for _, unit in network.units()[self._first :]:
            x = unit(x)
        return network.head_of(x)
