"""Per-example gradients of a classifier on a WideResNet, layer by layer: about as fast as an ordinary backward pass.

All views of several records go through the network as one ordinary batch, forwards and backwards. Only the gradients
of the parameters are kept apart: each convolution and each norm computes them record by record from its input and the
gradient of its output (the book-keeping of Bu, Wang, Zha & Karypis 2023, "Differentially Private Optimization on Large
Foundation Models at Small Cost", arXiv 2210.00038, but with gradients where that has their norms). What is linear and
the same for all records is done once a step: filters are standardised once, and the gradient of a standardised filter
is carried back through that map, a projection and a factor. ``clipping`` does the clipping.

Guarantee:
    Row i of every result is a function of record i and the parameters alone: no layer of the network mixes the members
    of a batch, and every sum below runs over one record's views.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional

from dprandp.threads import in_parts
from dprandp.vision.classifier import Classifier
from dprandp.vision.precision import autocast, full_precision
from dprandp.vision.record_layers import Place, RecordConv, RecordNorm, Tape
from dprandp.vision.wrn import StandardisedConv2d, WideResNet

CACHED_VIEWS = 16
"""Views that one thread of a CPU works on at a time: their activations stay in its cache."""

FEW_VIEWS = 4
"""Of a record. With no more, a CPU spends longer on calls for one record at a time than it saves by its cache."""


def has_layer_gradients(extractor: nn.Module) -> bool:
    """Whether ``WrnGradients`` knows every layer of an extractor that has parameters."""
    owners = [layer for layer in extractor.modules() if next(layer.parameters(recurse=False), None) is not None]
    known = (nn.Conv2d, StandardisedConv2d, nn.GroupNorm)
    return type(extractor) is WideResNet and all(type(layer) in known for layer in owners)


class WrnGradients:
    """Gradients of the mean cross-entropy over each record's views.

    Args:
        model: a classifier whose extractor ``has_layer_gradients``; its parameters are read by ``refresh``.
        first: units of the extractor that are frozen and left out: ``of`` is given what they put out.
        trained: names of the parameters, in the classifier, that ``of`` finds gradients for: all or none of a layer's.
            None: all. The others' values are those of now, whatever ``refresh`` finds.
        together: compute the records of a pass without a loop over them. None: on an accelerator, and on a CPU where
            records have no more than ``FEW_VIEWS``. A CPU makes a pass of a few records, one in each thread.
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
        """Put layers that keep records apart in the places of a network's own; the new ones."""
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
        """Take the model's parameters as they are now: once after every change of them."""
        for layer in self._layers:
            layer.refresh()

    @torch.no_grad()
    def of(self, views: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """The gradients of some records.

        Args:
            views: uint8 [B, K, channels, H, W], or float32 outputs of the units before ``first``.
            labels: int64 [B].

        Returns:
            float32 by the model's names, each [B, ...]; filters with their channels last in memory. Where a record's
            gradient is not finite, its rows are not, and no others. The next call overwrites them: memory asked for
            anew every time would cost as much as the arithmetic on a single view.
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
                with full_precision(views.device):
                    head[some] = self._some(views[some], labels[some], first)

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
