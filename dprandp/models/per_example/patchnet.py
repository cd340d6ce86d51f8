"""Per-example gradients of a classifier on patch layers, in closed form: several times faster than automatic ones.

In each layer: responses R = W P + b, features f = √(thresholded response of ±R, pooled), u = (f − mean) A,
z = √share · u / ‖u‖; then scores = z H. Backwards, the gradient of R is a mask times a weighted sum of five regions'
numbers, so one example costs two matrix products of the forward's size and stays in the cache. Each layer is a
separate chain: nothing below its dictionary is trained. ``privacy.clipping`` does the clipping.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from dprandp.models.classifier import Classifier
from dprandp.models.patchnet import THRESHOLD, TILE, PatchExtractor, PatchLayer, PatchNet
from dprandp.models.precision import full_precision
from dprandp.threads import in_parts


def patch_layers(extractor: nn.Module) -> dict[str, PatchLayer]:
    """The layers of an extractor by the prefix of their parameters' names in a ``Classifier``; none for other kinds."""
    if isinstance(extractor, PatchNet):
        return {"extractor": extractor}
    if isinstance(extractor, PatchExtractor):
        return {f"extractor.{name}": layer for name, layer in extractor.named_children()}
    return {}


@torch.no_grad()
def per_example_gradients(model: Classifier, views: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """Gradients of the mean cross-entropy over each example's views, on the CPU.

    Args:
        model: a classifier whose extractor has ``patch_layers``. views: uint8 [B, K, 3, 32, 32]. labels: int64 [B].

    Returns:
        float32 by the model's names: of each layer 'weight' [B, F, r] and 'bias' [B, F]; 'head' [B, dims, classes].

    Guarantee:
        Row i is a function of example i alone.
    """
    with full_precision(views.device):
        return _gradients(model, views, labels)


def _gradients(model: Classifier, views: Tensor, labels: Tensor) -> dict[str, Tensor]:
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
    gradients = {"head": torch.einsum("bkd,bkc->bdc", *(x.unflatten(0, (examples, count)) for x in (unit, residual)))}
    towards = (residual @ model.head.t()).chunk(len(units), dim=1)
    layers = patch_layers(model.extractor)
    towards_pooled = []
    for index, ((own, length), (name, layer)) in enumerate(zip(whitener.rows(), layers.items(), strict=True)):
        part = length * towards[index]
        part = (part - units[index] * (units[index] * part).sum(dim=1, keepdim=True)) / lengths[index]
        slope = 1 / (2 * features[:, own])  # of the root: f = √m, df/dm = 1/(2f)
        filters, width = layer.weight.shape
        pooled = ((part @ whitener.projection[own].t()) * slope).view(len(flat), 2, len(layer.pooling), filters)
        towards_pooled.append(pooled)
        gradients[f"{name}.weight"] = torch.zeros(examples, filters, width)
        gradients[f"{name}.bias"] = torch.zeros(examples, filters)
    filled = [(layer, gradients[f"{name}.weight"], gradients[f"{name}.bias"]) for name, layer in layers.items()]

    def work(part: int, parts: int) -> None:
        for example in range(part, examples, parts):
            levels = model.extractor.levels(model.extractor.normalise(views[example]))
            for (layer, weight, bias), patches, towards in zip(filled, levels, towards_pooled, strict=True):
                own = towards[example * count : (example + 1) * count]
                _of_filters(layer, layer.whitened(patches), own, weight[example], bias[example])

    in_parts(work)
    return gradients


def _of_filters(layer: PatchLayer, patches: Tensor, pooled: Tensor, weight: Tensor, bias: Tensor) -> None:
    """Add up one example's gradients over its views, a tile of filters at a time.

    Args:
        patches: [K, r, L], whitened. pooled: [K, 2, R, F], gradients of the pooled thresholded responses.
        weight: [F, r], bias: [F], to be added to.
    """
    for columns, (positive, negative) in zip(patches, pooled, strict=True):
        for start in range(0, len(layer.weight), TILE):
            tile = slice(start, start + TILE)
            responses = torch.addmm(layer.bias[tile, None], layer.weight[tile], columns)
            above, below = (sign[:, tile].t() @ layer.pooling for sign in (positive, negative))
            slope = above.mul_(responses > THRESHOLD).sub_(below.mul_(responses < -THRESHOLD))
            weight[tile].addmm_(slope, columns.t())
            bias[tile].add_(slope.sum(dim=1))
