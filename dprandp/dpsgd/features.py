"""Features of the private images: computed once, kept in ``private/``, never released.

Each row is a function of one private image and of public inputs (extractor, whitener, seed of the views), so the rows
are as private as the images, and one record still affects exactly one row. They are written block by block and read
through a memory map, so they need not fit in memory.

Statistics of *synthetic* features, for the whitener, are public: they depend only on the data's declared facts.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator

import numpy as np
import torch
from torch import Tensor, nn

from dprandp.config.schema import ProbeConfig
from dprandp.data import DataSpec
from dprandp.dpsgd.stage import PrivateStage
from dprandp.errors import UsageError
from dprandp.models import whitening
from dprandp.models.extractor import add_weights, extract
from dprandp.models.precision import dtype_of
from dprandp.models.whitening import Whitener
from dprandp.pretrain import synthetic_crops
from dprandp.privacy.clipping import check_labels
from dprandp.runs import checkpoint
from dprandp.runs.arrays import ArrayFile
from dprandp.runs.checkpoint import check_tensors
from dprandp.runs.context import Context
from dprandp.runs.directory import available_memory, free_on_device
from dprandp.runs.parallel import Ranks
from dprandp.vision.images import as_declared, to_input
from dprandp.vision.views import ContrastiveViews, keyed_uniforms, private_views

# ---------------------------------------------------------------------------------------------------------- extraction
#
# Each rank extracts its rows, and they are gathered on rank 0. Rows are distributed in whole batches of the size that
# one process takes, so that every image is in the same batch: equal threads and processors give equal features, to the
# bit.

BATCH = 256
ROUND = 16 * BATCH
"""Rows of a rank that are extracted at a time: 13 MB of pixels."""
BLOCK_BYTES = 2**26
"""Bytes of features in memory before they are written to the disk."""


def extract_by_ranks(
    ranks: Ranks,
    extractor: nn.Module,
    images: Tensor,
    whitener: nn.Module | None,
    mirror: bool,
    on_batch: Callable[[int], None],
) -> Tensor:
    """``extract`` of uint8 [N, 3, S, S], then the whitener if any; all ranks call this, with equal arguments.

    Returns:
        float32 [N, ...] on the CPU; on other ranks than rank 0 no rows, [0, ...].
    """
    if ranks.size == 1 or len(images) == 0:
        return _rows_of(extractor, images, whitener, mirror, on_batch)
    blocks = images.split(ROUND * ranks.size)
    own = ((block[ranks.shares(len(block), BATCH)[ranks.rank]], len(block)) for block in blocks)
    return torch.cat(list(features_of_blocks(ranks, extractor, own, whitener, mirror, on_batch)))


def features_of_blocks(
    ranks: Ranks,
    extractor: nn.Module,
    blocks: Iterable[tuple[Tensor, int]],
    whitener: nn.Module | None,
    mirror: bool,
    on_batch: Callable[[int], None],
) -> Iterator[Tensor]:
    """``extract_by_ranks`` of each block of images in turn.

    Args:
        blocks: this rank's rows of each block, uint8 [b, 3, S, S] with b ≥ 0, which are
            ``ranks.shares(size, BATCH)[rank]`` of it; and the block's size, ≥ 1.
    """
    for images, size in blocks:
        own = _rows_of(extractor, images, whitener, mirror, on_batch)
        parts = ranks.gather(own, [share.stop - share.start for share in ranks.shares(size, BATCH)])
        if ranks.size > 1:
            on_batch(size - len(own))
        yield parts[0] if len(parts) == 1 else torch.cat([own[:0], *parts])


def _rows_of(
    extractor: nn.Module, images: Tensor, whitener: nn.Module | None, mirror: bool, on_batch: Callable[[int], None]
) -> Tensor:
    after = {} if whitener is None else {"after": whitener}
    return extract(extractor, images, mirror=mirror, batch_size=BATCH, on_batch=on_batch, **after)


# ------------------------------------------------------------------------------------------------ features of a stage

PLACED_PART = 0.5
"""Fraction of an accelerator's free memory for features."""

LABELS = {"features": "private features", "test-features": "test images"}

STORED = {"features": np.float16, "test-features": np.float32}
"""The head is fitted on features in half of the bytes, and judged on those that the released model computes."""


def private_features(
    stage: PrivateStage, extractor: nn.Module, whitener: Whitener, *, mirror: bool, views: int, seed: int
) -> tuple[Tensor, Tensor]:
    """Whitened unit-norm features and labels of the private training split; the first use of its pixels.

    Args:
        stage: accepted.
        extractor, whitener: public, on the device that computes.
        mirror: average each image with its mirror image.
        views: K; with K > 1 the views are random crops (and mirrored where the data allow it).
        seed: public randomness of the views.

    Returns:
        float16 [N, dims], or [N, K, dims] for K > 1, memory-mapped and read-only (writing ends the process), and int64
        [N]. On other ranks than rank 0, which take part in the extraction, the features have no rows. Of several labels
        an image, they are int64 [N, labels] of 0 and 1.

    Raises:
        InputError: the ranks have other data, or another extractor, than one another.
    """
    split = stage.dataset.train()
    facts = f"{stage.dataset.fingerprint()} {mirror} {views} {seed if views > 1 else 0}"
    key = _key(facts, extractor, whitener)
    rows = _kept(stage, "features", key, split.images, extractor, whitener, mirror, views, seed)
    return rows, torch.from_numpy(split.labels)


def features_of_test(
    stage: PrivateStage, extractor: nn.Module, whitener: nn.Module, images: np.ndarray, *, mirror: bool, keep: bool
) -> Tensor:
    """Whitened features of the test split, as ``private_features``, but float32 [N, dims].

    Args:
        images: uint8 [N, H, W, 1 or 3].
        keep: keep them like the training split's: a probe that is run again has them.
    """

    def key() -> str:
        facts = f"test {hashlib.sha256(np.ascontiguousarray(images)).hexdigest()} {images.shape} {mirror}"
        return _key(facts, extractor, whitener)

    if keep:
        return _kept(stage, "test-features", key(), images, extractor, whitener, mirror)
    ranks = stage.context.ranks
    ranks.refuse_different("test images", key)
    with stage.context.console.progress(len(images), "test images") as progress:
        pixels = to_input(images, extractor.input_size)
        return extract_by_ranks(ranks, extractor, pixels, whitener, mirror, progress.advance)


def _kept(
    stage: PrivateStage,
    name: str,
    key: str,
    images: np.ndarray,
    extractor: nn.Module,
    whitener: nn.Module,
    mirror: bool,
    views: int = 1,
    seed: int = 0,
) -> Tensor:
    """``private/NAME.npy`` if its key is ``key``, else computed; as ``private_features`` returns it."""
    context, ranks, label = stage.context, stage.context.ranks, LABELS[name]
    file = ArrayFile(context.rundir.private_dir, name, len(images), STORED[name])
    ranks.refuse_different(label, lambda: key)
    found = file.read(key, context.console.warn) if ranks.is_first else None
    if ranks.first(lambda: found is not None):
        return torch.empty(0, whitener.dims) if found is None else torch.from_dlpack(found)
    rows = rows_at_once(views, whitener.dims) * ranks.size

    def view(block: Tensor, first: int, number: int) -> Tensor:
        if views == 1:
            return block
        draws = keyed_uniforms(np.arange(first, first + len(block)), number, seed, 1)
        return private_views(block, 1, draws, flip=stage.spec.flip_ok, augment_single=True)[:, 0]

    def blocks(begun: int) -> Iterator[np.ndarray]:
        starts = range(begun, len(images), rows)

        def seen() -> Iterator[tuple[Tensor, int]]:
            for start in starts:
                size = min(rows, len(images) - start)
                own = ranks.shares(size, BATCH)[ranks.rank]
                block = to_input(images[start + own.start : start + own.stop], extractor.input_size)
                yield from ((view(block, start + own.start, number), size) for number in range(views))

        with context.console.progress(len(images) * views, label, done=begun * views) as progress:
            made = features_of_blocks(ranks, extractor, seen(), whitener, mirror, progress.advance)
            for _ in starts:
                block = next(made) if views == 1 else torch.stack([next(made) for _ in range(views)], dim=1)
                yield block.cpu().numpy()

    begun = ranks.first(lambda: file.begun(key))
    if not ranks.is_first:
        for _ in blocks(begun):
            pass  # its rows are gathered on rank 0
        return torch.empty(0, whitener.dims)
    return torch.from_dlpack(file.written(key, blocks, context.console.warn))


def placed(features: Tensor, labels: Tensor, classes: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Features (float [N, d] or [N, K, d]) and labels (int64 [N] or [N, classes]), from the CPU to the head's device.

    Features that do not fit into ``PLACED_PART`` of its free memory stay where they are, and ``clipped_softmax_sum``
    sends them to the device block by block. Labels are checked here, since an accelerator does not check them.

    Raises:
        UsageError: an invalid label.
    """
    if device.type == "cpu":
        return features, labels
    check_labels(labels, classes)
    free = free_on_device(device)
    fits = free is None or features.numel() * features.element_size() <= PLACED_PART * free
    return features.to(device) if fits else features, labels.to(device)


def rows_at_once(views: int, dims: int) -> int:
    """Images of one rank whose features are computed before they are written; whole batches, also after a resume."""
    most = BLOCK_BYTES // (4 * views * dims)
    return max(BATCH, min(ROUND, most // BATCH * BATCH))


def require_room(needed: int, what: str) -> None:
    """Raise UsageError for work that takes ``needed`` bytes of memory beside the features if fewer are available."""
    available = available_memory()
    if available is not None and needed > available:
        raise UsageError(
            f"{what} would take {needed / 1e9:.3g} GB of memory, but {available / 1e9:.3g} GB are available",
            fix="use a machine with more memory, or fewer dims; the probe itself reads features from the disk",
        )


def _key(facts: str, extractor: nn.Module, whitener: nn.Module) -> str:
    """A hash of all inputs of the features."""
    digest = hashlib.sha256(f"{facts} {getattr(whitener, 'parts', ())}".encode())
    for module in (extractor, whitener):
        add_weights(digest, module)
    return digest.hexdigest()


# ------------------------------------------------------------------------------------- statistics of synthetic features

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
