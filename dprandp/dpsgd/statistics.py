"""Statistics of synthetic features for the whitener: public, dependent only on the data's declared facts."""

from __future__ import annotations

import hashlib
import json

import torch
from torch import Tensor, nn

from dprandp.config.schema import ProbeConfig
from dprandp.data import DataSpec
from dprandp.dpsgd.features import extract_by_ranks
from dprandp.models import whitening
from dprandp.models.extractor import add_weights
from dprandp.models.precision import dtype_of
from dprandp.pretrain import synthetic_crops
from dprandp.runs import checkpoint
from dprandp.runs.checkpoint import check_tensors
from dprandp.runs.context import Context
from dprandp.vision.images import as_declared
from dprandp.vision.views import ContrastiveViews

WHITENER = "whitener"
PUBLIC_FOLDER = "whitening"
"""The folder of the run's statistics, which belongs to no stage."""

SYNTHETIC_SEED = 1
"""Added to the seed for the crops that the whitener is fitted to, so that they differ from the pretraining's."""

BLOCK = 250
"""Images whose views are made together."""


def public_whitener(
    config: ProbeConfig, context: Context, extractor: nn.Module, mirror: bool, spec: DataSpec
) -> whitening.Whitener:
    """The whitener of a run's extractor, from synthetic images of the declared shape; public.

    It is stored in a public folder of the run for all stages, under a hash of what it depends on. All ranks extract the
    features; rank 0 computes and stores the statistics, and the others read them.

    Raises:
        InputError: the ranks have other settings, or another extractor, than one another.
    """
    ranks = context.ranks
    weights = hashlib.sha256()
    add_weights(weights, extractor)  # `continue` may have changed them since
    wanted = {
        "dims": config.dims,
        "images": config.statistics_images,
        "views": config.statistics_views,
        "floor": config.whitening_floor,
        "seed": config.seed,
        "mirror": mirror,
        "shape": list(spec.image_shape),
        "extractor": weights.hexdigest(),
    }
    key = hashlib.sha256(json.dumps(wanted, sort_keys=True).encode()).hexdigest()[:12]
    ranks.refuse_different("extractor", lambda: key)
    folder = context.rundir.path / PUBLIC_FOLDER / key
    if ranks.is_first:
        folder.mkdir(parents=True, exist_ok=True)
    if ranks.first(lambda: checkpoint.latest(folder) == WHITENER):
        return whitener_of(checkpoint.load(folder, WHITENER), extractor)
    crops = synthetic_views(context, config, extractor.input_size)
    views = as_declared(crops, channels=spec.channels, height=spec.height, width=spec.width)
    with context.console.progress(len(views), "synthetic features") as progress:
        features = extract_by_ranks(ranks, extractor, views, None, mirror, progress.advance)

    def fitted() -> whitening.Whitener:
        settings = (config.dims, config.whitening_floor, extractor.parts)
        kind = dtype_of(extractor)
        with context.console.progress(len(extractor.parts), "parts of the features whitened") as progress:
            whitener = whitening.fit(
                features, *settings, views=config.statistics_views, kind=kind, fitted=progress.advance
            )
        checkpoint.save(folder, WHITENER, whitener.state_dict(), wanted, keep=1)
        return whitener

    whitener = ranks.first(fitted, told=lambda made: None)
    return whitener or whitener_of(checkpoint.load(folder, WHITENER), extractor)


def whitener_of(loaded: checkpoint.Checkpoint, extractor: nn.Module) -> whitening.Whitener:
    """A saved whitener, for its extractor."""
    projection = loaded.tensors.get("projection")
    components = projection.shape[1] if projection is not None and projection.ndim == 2 else 1
    whitener = whitening.Whitener(extractor.feature_dim, components, extractor.parts, dtype_of(extractor))
    check_tensors(loaded.tensors, whitener.state_dict(), loaded.path)
    whitener.load_state_dict(loaded.tensors)
    return whitener


def synthetic_views(context: Context, config: ProbeConfig, size: int) -> Tensor:
    """uint8 [n · V, 3, size, size]: V views of each image, next to each other; for V = 1 the crop itself.

    Views are crops and other colours, as in the published contrast, without mirroring: where mirroring keeps the class,
    features are averaged over an image and its mirror image anyway.
    """
    crops = synthetic_crops(context, config.statistics_images, size, config.seed + SYNTHETIC_SEED)
    if config.statistics_views == 1:
        return crops
    generator = torch.Generator().manual_seed(config.seed + SYNTHETIC_SEED)
    made = ContrastiveViews(size, flip=0.0)
    blocks = []
    for block in crops.split(BLOCK):
        views = [made.apply(block, made.draw(block, generator)) for _ in range(config.statistics_views)]
        blocks.append((torch.stack(views, dim=1).flatten(0, 1) * 255).round().to(torch.uint8))
    return torch.cat(blocks)
