"""Per-example gradients of a classifier on a WideResNet, layer by layer: about as fast as an ordinary backward pass.

All views of several records go through the network as one ordinary batch, forwards and backwards. Only the gradients
of the parameters are kept apart: each convolution and each norm computes them record by record from its input and the
gradient of its output (the book-keeping of Bu, Wang, Zha & Karypis 2023, "Differentially Private Optimization on Large
Model at Small Cost", arXiv 2210.00038, with the gradients themselves instead of their norms). What is linear and the
same for all records is done once a step: filters are standardised once, and the gradient of the standardised filter is
carried back through that map (a projection and a factor per filter).

``clipping`` does the clipping. Guarantee: row i of every result is a function of record i alone, since no layer of the
network mixes the members of a batch and every sum below runs over one record's views.
"""

from __future__ import annotations

import copy
import threading
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from dprandp.threads import in_parts
from dprandp.vision.classifier import Classifier
from dprandp.vision.precision import autocast
from dprandp.vision.wrn import STANDARDISATION_FLOOR, StandardisedConv2d, WideResNet

CACHED_VIEWS = 16
"""Views that one thread of a CPU works on at a time: their activations stay in its cache."""

PLAIN, LAST = (0, 1, 2, 3), (0, 2, 3, 1)
"""Order in memory of a filter's dimensions: as declared, or with the channels last."""


def has_layer_gradients(extractor: nn.Module) -> bool:
    """Whether ``WrnGradients`` knows every layer of an extractor that has parameters."""
    kinds = {nn.Conv2d, StandardisedConv2d, nn.GroupNorm}
    owners = [layer for layer in extractor.modules() if next(layer.parameters(recurse=False), None) is not None]
    return type(extractor) is WideResNet and all(type(layer) in kinds for layer in owners)


class _Place(NamedTuple):
    """Where the gradients of some records go.

    Attributes:
        records: how many.
        rows: which rows of ``into``.
        into: parameter name -> [B, ...].
    """

    records: int
    rows: slice
    into: dict[str, Tensor]


class _Tape(threading.local):
    """What the layers see in the thread that runs them forwards (backwards, an accelerator may use another)."""

    place: _Place


class WrnGradients:
    """Gradients of the mean cross-entropy over each record's views.

    Args:
        model: a classifier whose extractor ``has_layer_gradients``; its parameters are read by ``refresh``.
        together: compute all records of a call at once, without a loop over them, as an accelerator wants it; the
            default on a CPU is a loop in as many threads as torch is set to.
    """

    def __init__(self, model: Classifier, *, together: bool | None = None) -> None:
        self._model, device = model, model.head.device
        self._together = device.type != "cpu" if together is None else together
        self._order = PLAIN if self._together else LAST
        self._tape = _Tape()
        self._network = copy.deepcopy(model.extractor)
        self._layers: list[_Conv | _Norm] = []
        self._replace(self._network, model.extractor, "extractor")
        self.refresh()

    def _replace(self, twin: nn.Module, module: nn.Module, prefix: str) -> None:
        """Put layers that keep records apart in the places of the twin's own."""
        for name, child in module.named_children():
            path = f"{prefix}.{name}"
            if isinstance(child, nn.Conv2d):
                layer = _Conv(child, path, self._tape, self._together, self._order)
            elif isinstance(child, nn.GroupNorm):
                layer = _Norm(child, path, self._tape, self._together)
            else:
                self._replace(getattr(twin, name), child, path)
                continue
            setattr(twin, name, layer)
            self._layers.append(layer)

    @torch.no_grad()
    def refresh(self) -> None:
        """Take the model's parameters as they are now: once after every change of them."""
        for layer in self._layers:
            layer.refresh()

    @torch.no_grad()
    def of(self, views: Tensor, labels: Tensor, *, head_only: bool = False) -> dict[str, Tensor]:
        """The gradients of some records.

        Args:
            views: uint8 [B, K, channels, H, W]. B at a time are in memory.
            labels: int64 [B].
            head_only: skip the extractor.

        Returns:
            float32 by the model's names, each [B, ...]; filters with their channels last in memory on a CPU. NaN or
            infinite in a row, and nowhere else, where a record's gradient is.
        """
        into = {"head": torch.empty(len(views), *self._model.head.shape, device=views.device)}
        if not head_only:
            for layer in self._layers:
                into |= layer.empty_rows(len(views))
        if self._together:
            self._part(views, labels, slice(0, len(views)), into)
        else:
            threads = torch.get_num_threads()
            step = max(1, min(CACHED_VIEWS // views.shape[1], -(-len(views) // threads)))
            starts = range(0, len(views), step)

            def work(part: int, parts: int) -> None:
                for start in starts[part::parts]:
                    self._part(views, labels, slice(start, start + step), into)

            in_parts(work, max(1, min(threads, len(starts))))
        return into

    @torch.no_grad()
    def _part(self, views: Tensor, labels: Tensor, rows: slice, into: dict[str, Tensor]) -> None:
        mine, answers = views[rows], labels[rows]
        records, count = mine.shape[:2]
        self._tape.place = _Place(records, rows, into)
        format_ = torch.contiguous_format if self._together else torch.channels_last
        images = self._network.normalise(mine.flatten(0, 1)).contiguous(memory_format=format_)
        model, learns = self._model, len(into) > 1
        with torch.set_grad_enabled(learns):
            with autocast(images.device):
                features = self._network.features(images)
            unit = model.whitener(features.float())
        fixed = unit.detach()
        residual = functional.softmax(fixed @ model.head, dim=1)
        chosen = answers.repeat_interleave(count)[:, None]
        residual = residual.scatter_add(1, chosen, residual.new_full((1, 1), -1.0).expand_as(chosen)) / count
        by_record = (value.view(records, count, -1) for value in (fixed, residual))
        into["head"][rows] = torch.einsum("bkd,bkc->bdc", *by_record)
        if learns:
            unit.backward(residual @ model.head.t())
        del self._tape.place  # and with it the activations


class _Conv(nn.Module):
    """A convolution of the twin network; its filters are those of ``source``, standardised where that does so."""

    def __init__(self, source: nn.Conv2d, name: str, tape: _Tape, together: bool, order: tuple[int, ...]) -> None:
        super().__init__()
        self._source = (source,)  # in a tuple: not a part of this module
        self.name, self.tape, self.together, self.order = name, tape, together, order
        self.inverse = [order.index(axis) for axis in range(4)]
        self.stride, self.padding = source.stride, source.padding
        self.anchor = torch.zeros((), requires_grad=True)  # so that the first layer has a backward pass as well

    def refresh(self) -> None:
        """Take the parameters as they are now."""
        source = self._source[0]
        weight, self.bias = source.weight.detach(), source.bias.detach()
        self.factor = None
        if isinstance(source, StandardisedConv2d):
            variance, mean = torch.var_mean(weight, dim=(1, 2, 3), keepdim=True, correction=0)
            energy = variance * weight[0].numel()
            root = torch.rsqrt(energy.clamp(min=STANDARDISATION_FLOOR))
            unit = (weight - mean) * root
            gain = source.gain.detach()
            weight = unit * gain.view(-1, 1, 1, 1)
            self.unit = unit.permute(self.order).flatten(1).contiguous()
            self.factor = gain[:, None] * root.flatten(1)
            # where the floor holds, the root is a constant: the filter's own direction is not projected out
            self.turn = -self.factor * (energy.flatten(1) >= STANDARDISATION_FLOOR)
        self.weight = weight.permute(self.order).contiguous().permute(self.inverse)

    def empty_rows(self, records: int) -> dict[str, Tensor]:
        """Room for the gradients of so many records, by name."""
        shape = [self.weight.shape[axis] for axis in self.order]
        rows = self.weight.new_empty((records, *shape)).permute(0, *(axis + 1 for axis in self.inverse))
        made = {f"{self.name}.weight": rows, f"{self.name}.bias": self.bias.new_empty((records, len(self.bias)))}
        if self.factor is not None:
            made[f"{self.name}.gain"] = self.bias.new_empty((records, len(self.bias)))
        return made

    def forward(self, x: Tensor) -> Tensor:
        return _ConvFunction.apply(x, self.anchor, self)

    def keep(self, into: dict[str, Tensor], record: int | slice, weight: Tensor, bias: Tensor) -> None:
        """Store gradients of the filters in use, [..., O, fan_in] in the order of memory, and of the biases."""
        into[f"{self.name}.bias"][record] = bias
        rows = into[f"{self.name}.weight"]
        rows = rows.permute(0, *(axis + 1 for axis in self.order)).flatten(2)[record]
        if self.factor is None:
            rows.copy_(weight)
            return
        weight = weight.to(rows.dtype)
        along = torch.linalg.vecdot(weight, self.unit)
        into[f"{self.name}.gain"][record] = along
        torch.mul(weight - weight.mean(dim=-1, keepdim=True), self.factor, out=rows)
        rows.addcmul_(self.unit, self.turn * along[..., None])


class _ConvFunction(torch.autograd.Function):
    """A convolution whose backward pass gives the gradient of its input and puts those of its parameters on the tape.

    ``together``: patches of all records as matrices, and one batched product. Otherwise record by record, by the
    library's own gradient of a filter.
    """

    @staticmethod
    def forward(ctx, x: Tensor, anchor: Tensor, layer: _Conv) -> Tensor:
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
        (x,), layer, (records, rows, into) = ctx.saved_tensors, ctx.layer, ctx.place
        towards, wanted = towards.to(x.dtype), ctx.needs_input_grad[0]

        def gradients(given: Tensor, outcome: Tensor, mask: list[bool]) -> tuple[Tensor, Tensor, Tensor]:
            return torch.ops.aten.convolution_backward(
                outcome, given, ctx.weight, [len(layer.bias)], layer.stride, layer.padding, [1, 1], False, [0, 0], 1,
                mask,
            )  # fmt: skip

        if layer.together:
            before = gradients(x, towards, [True, False, False])[0] if wanted else None
            layer.keep(into, rows, *_patch_products(x, towards, ctx.weight, layer, records))
            return None if before is None else before.to(ctx.given), None, None
        towards = towards.contiguous(memory_format=torch.channels_last)
        alone = records == 1
        before = gradients(x, towards, [wanted, alone, alone]) if wanted or alone else (None,)
        for record, (given, outcome) in enumerate(zip(x.chunk(records), towards.chunk(records), strict=True)):
            _, weight, bias = before if alone else gradients(given, outcome, [False, True, True])
            layer.keep(into, rows.start + record, weight.permute(layer.order).flatten(1), bias)
        return before[0].to(ctx.given) if wanted else None, None, None


def _patch_products(x: Tensor, towards: Tensor, weight: Tensor, layer: _Conv, records: int) -> tuple[Tensor, Tensor]:
    """Gradients of each record's filters [records, O, fan_in] and biases [records, O], without a loop over records."""
    patches = functional.unfold(x, weight.shape[2:], padding=layer.padding, stride=layer.stride)
    patches = patches.unflatten(0, (records, -1))  # [records, K, fan_in, positions]
    slopes = towards.flatten(2).unflatten(0, (records, -1))  # [records, K, O, positions]
    return torch.einsum("bkop,bkip->boi", slopes, patches), slopes.sum(dim=(1, 3))


class _Norm(nn.Module):
    """A GroupNorm of the twin network, with the scale and shift of ``source``."""

    def __init__(self, source: nn.GroupNorm, name: str, tape: _Tape, together: bool) -> None:
        super().__init__()
        self._source = (source,)
        self.name, self.tape, self.together = name, tape, together
        self.groups, self.eps = source.num_groups, source.eps
        self.anchor = torch.zeros((), requires_grad=True)

    def refresh(self) -> None:
        """As for ``_Conv``."""
        self.weight, self.bias = (value.detach() for value in (self._source[0].weight, self._source[0].bias))

    def empty_rows(self, records: int) -> dict[str, Tensor]:
        """As for ``_Conv``."""
        return {f"{self.name}.{kind}": self.weight.new_empty((records, len(self.weight))) for kind in ("weight", "bias")}

    def forward(self, x: Tensor) -> Tensor:
        return _NormFunction.apply(x, self.anchor, self)


class _NormFunction(torch.autograd.Function):
    """GroupNorm with the gradients of its scale and shift by record; in float32 under autocast."""

    @staticmethod
    def forward(ctx, x: Tensor, anchor: Tensor, layer: _Norm) -> Tensor:
        ctx.given = x.dtype
        if torch.is_autocast_enabled(x.device.type):
            x = x.float()
        sizes = (*x.shape[:2], x.shape[2:].numel(), layer.groups)
        out, mean, rate = torch.native_group_norm(x, layer.weight, layer.bias, *sizes, layer.eps)
        ctx.save_for_backward(x, mean, rate)
        ctx.layer, ctx.place = layer, layer.tape.place
        return out

    @staticmethod
    def backward(ctx, towards: Tensor) -> tuple[Tensor, None, None]:
        layer, saved, (records, rows, into) = ctx.layer, ctx.saved_tensors, ctx.place
        kept = [into[f"{layer.name}.{kind}"] for kind in ("weight", "bias")]

        def gradients(towards: Tensor, x: Tensor, mean: Tensor, rate: Tensor, mask: list[bool]) -> tuple:
            sizes = (*x.shape[:2], x.shape[2:].numel(), layer.groups)
            return torch.ops.aten.native_group_norm_backward(towards, x, mean, rate, layer.weight, *sizes, mask)

        if layer.together:
            x, mean, rate = saved
            each = torch.stack([(towards * x).sum(dim=(2, 3)), towards.sum(dim=(2, 3))])
            of_group = torch.arange(x.shape[1], device=x.device) // (x.shape[1] // layer.groups)
            scales = (each[0] - each[1] * mean[:, of_group]) * rate[:, of_group]
            for gradient, value in zip(kept, (scales, each[1]), strict=True):
                gradient[rows] = value.unflatten(0, (records, -1)).sum(dim=1)
            return gradients(towards, *saved, [True, False, False])[0].to(ctx.given), None, None
        towards = towards.contiguous(memory_format=torch.channels_last)
        before = []
        for record, parts in enumerate(zip(*(value.chunk(records) for value in (towards, *saved)), strict=True)):
            x, *own = gradients(*parts, [True, True, True])
            before.append(x)
            for gradient, value in zip(kept, own, strict=True):
                gradient[rows.start + record] = value
        whole = before[0] if records == 1 else torch.cat(before)
        return whole.to(ctx.given), None, None
