"""Per-example gradients of a classifier on patch layers, in closed form: several times faster than automatic ones.

The chain is short. In each layer: responses R = W P + b, features f = √(pooled excess of R over ±threshold),
u = (f − mean) A, z = √share · u / ‖u‖; then scores = z H. Backwards, the gradient of R is a mask times a function that
is constant on a pooling region, so one example costs two matrix products of the forward's size and stays in the cache.
Where there are two layers, each is a chain of its own: the first layer inside ``ResponseLayer`` is not trained.
``clipping`` does the clipping.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from dprandp.threads import in_parts
from dprandp.vision.classifier import Classifier
from dprandp.vision.patchnet import TILE, PatchLayer
from dprandp.vision.response_layer import TwoLayerPatchNet


def patch_layers(extractor: nn.Module) -> dict[str, PatchLayer]:
    """The layers of an extractor by the prefix of their parameters' names in a ``Classifier``; none for other kinds."""
    if isinstance(extractor, TwoLayerPatchNet):
        return {"extractor.first": extractor.first, "extractor.second": extractor.second}
    return {"extractor": extractor} if isinstance(extractor, PatchLayer) else {}


@torch.no_grad()
def per_example_gradients(model: Classifier, views: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """Gradients of the mean cross-entropy over each example's views, on the CPU.

    Args:
        model: a classifier whose extractor has ``patch_layers``.
        views: uint8 [B, K, 3, H, W].
        labels: int64 [B].

    Returns:
        float32 by the model's names: of each layer 'weight' [B, F, r] and 'bias' [B, F]; 'head' [B, dims, classes].
        Row i is a function of example i alone.
    """
    examples, count = views.shape[:2]
    flat = views.flatten(0, 1)
    features, whitener = model.extractor.extract(flat), model.whitener
    units, lengths = [], []
    for own, _ in whitener.rows():
        whitened = (features[:, own] - whitener.mean[own]) @ whitener.projection[own]
        lengths.append(whitened.norm(dim=1, keepdim=True).clamp_min(1e-12))
        units.append(whitened / lengths[-1])
    unit = torch.cat([part * length for part, (_, length) in zip(units, whitener.rows(), strict=True)], dim=1)
    residual = functional.softmax(unit @ model.head, dim=1) - functional.one_hot(
        labels.repeat_interleave(count), model.head.shape[1]
    )
    residual /= count  # the mean over the views
    gradients = {"head": torch.einsum("bkd,bkc->bdc", *(x.view(examples, count, -1) for x in (unit, residual)))}
    towards = (residual @ model.head.t()).chunk(len(units), dim=1)
    layers = patch_layers(model.extractor)
    for index, ((own, length), (name, layer)) in enumerate(zip(whitener.rows(), layers.items(), strict=True)):
        part = length * towards[index]
        part = (part - units[index] * (units[index] * part).sum(dim=1, keepdim=True)) / lengths[index]
        slope = 1 / (2 * features[:, own])  # of the root: f = √m, df/dm = 1/(2f)
        filters, width = layer.weight.shape
        pooled = ((part @ whitener.projection[own].t()) * slope).view(len(flat), 2, len(layer.pooling), filters)
        weight, bias = torch.zeros(examples, filters, width), torch.zeros(examples, filters)
        _in_threads(layer, views, pooled, weight, bias)
        gradients |= {f"{name}.weight": weight, f"{name}.bias": bias}
    return gradients


def _in_threads(layer: PatchLayer, views: Tensor, pooled: Tensor, weight: Tensor, bias: Tensor) -> None:
    examples = len(views)
    in_parts(lambda part, parts: _filters_of(layer, range(part, examples, parts), views, pooled, weight, bias))


def _filters_of(
    layer: PatchLayer, members: range, views: Tensor, pooled: Tensor, weight: Tensor, bias: Tensor
) -> None:
    """Fill the rows ``members`` of the filters' gradients, a tile of filters at a time."""
    with torch.no_grad():
        count = views.shape[1]
        for example in members:
            patches = layer.patches(layer.normalise(views[example]))
            for view in range(count):
                columns = patches[view]
                for start in range(0, len(layer.weight), TILE):
                    tile = slice(start, start + TILE)
                    responses = torch.addmm(layer.bias[tile, None], layer.weight[tile], columns)
                    above, below = (
                        (pooled[example * count + view, sign, :, tile].t() @ layer.pooling) for sign in (0, 1)
                    )
                    slope = above.mul_(responses > layer.threshold).sub_(below.mul_(responses < -layer.threshold))
                    weight[example, tile].addmm_(slope, columns.t())
                    bias[example, tile].add_(slope.sum(dim=1))
