"""The default extractor on a CPU: features and per-example gradients against the same network as ordinary layers."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from benchmark.cases import OURS, Case, Comparison, Side
from benchmark.pairs import agree
from dprandp.config.schema import PretrainConfig
from dprandp.dpsgd.clipped_sums import loss_function
from dprandp.models import whitening
from dprandp.models.classifier import Classifier
from dprandp.models.extractor import build_extractor
from dprandp.models.patchnet import ROOT_FLOOR, THRESHOLD, TILE, PatchNet
from dprandp.models.patchnet import per_example_gradients as closed_form_gradients
from dprandp.models.precision import decide
from dprandp.privacy.clipping import per_example_gradients
from dprandp.threads import in_parts

LAYERS, AUTOGRAD = "ordinary layers", "autograd, example by example"
SINGLE, TENSORS = "float32", "tensor operations, tile by tile"

FEATURES = {"full": (1600, 64), "quick": (800, 32), "tiny": (16, 4)}  # filters, images
TWO_LAYERS = {"full": (2400, 3200, 64), "quick": (600, 800, 32), "tiny": (16, 16, 4)}  # filters of each, images
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


def two_layers_case(scale: str) -> Case:
    """Both layers in the precision of this processor, against float32 and against the loop that came before.

    That one wrote each tile's responses, both of its signs and their averages to memory as tensors, in float32, and
    took the root of the averages. A count of 1 is one pass over one image; the probe averages two, of an image and its
    mirror image.
    """
    filters, second, count = TWO_LAYERS[scale]
    generator = torch.Generator().manual_seed(0)
    fast, single = (
        build_extractor(PretrainConfig(filters=filters, second_filters=second, precision=kind), generator).eval()
        for kind in (decide("auto", "cpu"), "float32")
    )
    single.load_state_dict(fast.state_dict())
    images = pixels(count, 3, 32, 32)

    @torch.no_grad()
    def tensors() -> Tensor:
        out = torch.empty(count, single.feature_dim)
        columns = [layer.weight.detach().t().contiguous() for layer in single.chain]
        widths = [layer.feature_dim for layer in single.chain]

        def work(part: int, parts: int) -> None:
            for image, row in zip(single.normalise(images[part::parts]), out[part::parts], strict=True):
                patches = single.first.pixel_rows(image).t()[None]
                for layer, matrix, own in zip(single.chain, columns, row.split(widths), strict=True):
                    patches = patches if layer is single.first else layer.lift(patches)
                    whitened, means = layer.whitened(patches)[0].t(), own.view(2, len(layer.pooling), -1)
                    for start in range(0, matrix.shape[1], TILE):
                        tile = slice(start, start + TILE)
                        responses = torch.addmm(layer.bias[tile], whitened, matrix[:, tile])
                        for sign, pooled in zip((1, -1), means, strict=True):
                            pooled[:, tile] = layer.pooling @ (sign * responses - THRESHOLD).clamp_(min=0)
                row.add_(ROOT_FLOOR).sqrt_()

        in_parts(work)
        return out

    def check() -> Mapping[str, float]:
        exact, rough = single.extract(images), fast.extract(images)
        tensors()  # other features by definition: only its time is compared
        return {SINGLE: agree(SINGLE, rough, exact, 0.02)}

    return Case(
        ours=Side(OURS, lambda: lambda: fast.extract(images), count),
        others=(Side(SINGLE, lambda: lambda: single.extract(images), count), Side(TENSORS, lambda: tensors, count)),
        comparisons=(Comparison(SINGLE), Comparison(TENSORS)),
        check=check,
        sizes=f"{filters:,} and {second:,} filters, {fast.precision}, {count} images",
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
