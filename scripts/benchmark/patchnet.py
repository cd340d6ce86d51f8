"""The default extractor on a CPU: features and per-example gradients against the same network as ordinary layers."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from benchmark.cases import OURS, Case, Comparison, Side
from benchmark.pairs import agree
from dprandp.dpsgd.clipped_sums import loss_function
from dprandp.models import whitening
from dprandp.models.classifier import Classifier
from dprandp.models.patchnet import PatchNet
from dprandp.models.patchnet import per_example_gradients as closed_form_gradients
from dprandp.privacy.clipping import per_example_gradients

LAYERS, AUTOGRAD = "ordinary layers", "autograd, example by example"

FEATURES = {"full": (1600, 64), "quick": (800, 32), "tiny": (16, 4)}  # filters, images
GRADIENTS = {"full": (800, 512, 16), "quick": (400, 256, 8), "tiny": (16, 8, 3)}  # filters, dimensions, images
BATCH = 16


def random_net(filters: int) -> PatchNet:
    """Random unit-norm filters."""
    net = PatchNet(filters)
    net.weight.data.normal_(generator=torch.Generator().manual_seed(0))
    net.weight.data.div_(net.weight.data.norm(dim=1, keepdim=True))
    return net


def pixels(*shape: int) -> Tensor:
    """Uniform uint8 noise."""
    return torch.randint(256, shape, generator=torch.Generator().manual_seed(1)).to(torch.uint8)


def features_case(scale: str) -> Case:
    """``extract``, tiles that stay in the cache, against ``features`` in batches."""
    filters, count = FEATURES[scale]
    net, images = random_net(filters), pixels(count, 3, 32, 32)

    @torch.no_grad()
    def layers() -> Tensor:
        return torch.cat([net.features(net.normalise(batch)) for batch in images.split(BATCH)])

    def check() -> Mapping[str, float]:
        return {LAYERS: agree(LAYERS, net.extract(images), layers(), 1e-4)}

    return Case(
        ours=Side(OURS, lambda: lambda: net.extract(images), count),
        others=(Side(LAYERS, lambda: layers, count),),
        comparisons=(Comparison(LAYERS),),
        check=check,
        sizes=f"{filters:,} filters, {count} images",
        unit="image",
    )


def gradients_case(scale: str) -> Case:
    """Closed-form per-example gradients of extractor and head against automatic differentiation."""
    filters, dims, count = GRADIENTS[scale]
    net, generator = random_net(filters), torch.Generator().manual_seed(2)
    model = Classifier(net, whitening.fit(torch.rand(dims + 88, net.feature_dim, generator=generator), dims), 10)
    model.head.data.normal_(generator=generator)
    views, labels = pixels(count, 1, 3, 32, 32), torch.randint(10, (count,), generator=generator)
    parameters = {name: value.detach() for name, value in model.named_parameters()}
    loss = loss_function(model, 1.0)

    def ours() -> dict[str, Tensor]:
        return closed_form_gradients(model, views, labels)

    def autograd() -> list[dict[str, Tensor]]:
        return list(per_example_gradients(loss, parameters, views, labels, 1))

    def check() -> Mapping[str, float]:
        mine, theirs = ours(), autograd()
        rows = [torch.cat([row[name].flatten() for name in parameters]) for row in theirs]
        own = torch.cat([mine[name].flatten(1) for name in parameters], dim=1)
        return {AUTOGRAD: agree(AUTOGRAD, own, torch.stack(rows), 1e-2)}

    return Case(
        ours=Side(OURS, lambda: ours, count),
        others=(Side(AUTOGRAD, lambda: autograd, count),),
        comparisons=(Comparison(AUTOGRAD),),
        check=check,
        sizes=f"{filters:,} filters, {dims} dimensions, {count} images",
        unit="image",
    )
