"""Features of the private images: computed once, kept in ``private/``, never released.

Each row is a function of one private image and of public things (extractor, whitener, seed of the views), so the rows
are as private as the images, and one record still touches exactly one row. They are written block by block and read
through a memory map (``feature_file.py``): they need not fit in memory.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor, nn

from dprandp.environment import available_memory, free_on_device
from dprandp.errors import StorageError, UsageError
from dprandp.privacy.clipping import check_labels
from dprandp.stages.extraction import BATCH, BLOCK_BYTES, ROUND, extract_by_ranks, features_of_blocks
from dprandp.stages.feature_file import FeatureFile
from dprandp.stages.private import PrivateStage
from dprandp.vision.extractors import add_weights
from dprandp.vision.images import to_input
from dprandp.vision.views import keyed_uniforms, private_views
from dprandp.vision.whitening import Whitener

PLACED_PART = 0.5
"""Of the free memory of an accelerator that features may take there."""

LABELS = {"features": "private features", "test-features": "test images"}


def private_features(
    stage: PrivateStage, extractor: nn.Module, whitener: Whitener, *, mirror: bool, views: int, seed: int
) -> tuple[Tensor, Tensor]:
    """Whitened unit-norm features and labels of the private training split.

    Args:
        stage: an accepted private stage; this is where its pixels are first used.
        extractor, whitener: public, on the device that computes.
        mirror: average each image with its mirror image.
        views: K; with K > 1 the views are random crops (and mirrored where the data allow it).
        seed: public randomness of the views.

    Returns:
        float32 [N, dims], or [N, K, dims] for K > 1, memory-mapped and read-only, and int64 [N].
    """
    split = stage.dataset.train()
    labels = torch.from_numpy(split.labels)
    facts = f"{stage.dataset.fingerprint()} {mirror} {views} {seed if views > 1 else 0}"

    def view(images: Tensor, first: int, number: int) -> Tensor:
        if views == 1:
            return images
        draws = keyed_uniforms(np.arange(first, first + len(images)), number, seed, 1)
        return private_views(images, 1, draws, flip=stage.spec.flip_ok, augment_single=True)[:, 0]

    key = _key(facts, extractor, whitener)
    return _kept(stage, "features", key, split.images, extractor, whitener, mirror, view, views), labels


def features_of_test(
    stage: PrivateStage, extractor: nn.Module, whitener: nn.Module, images: np.ndarray, *, mirror: bool, keep: bool
) -> Tensor:
    """Whitened features of the test split.

    Args:
        images: uint8 [N, H, W, 1 or 3], the test split's.
        keep: keep them like the training split's: a probe that is run again has them.
        extractor, whitener, mirror: as for ``private_features``.

    Returns:
        float32 [N, dims].
    """

    if not keep:
        with stage.context.console.progress(len(images), "test images") as progress:
            ranks = stage.context.ranks
            return extract_by_ranks(ranks, extractor, to_input(images), whitener, mirror, progress.advance)
    facts = f"test {hashlib.sha256(np.ascontiguousarray(images)).hexdigest()} {images.shape} {mirror}"
    return _kept(stage, "test-features", _key(facts, extractor, whitener), images, extractor, whitener, mirror)


def _kept(
    stage: PrivateStage,
    name: str,
    key: str,
    images: np.ndarray,
    extractor: nn.Module,
    whitener: nn.Module,
    mirror: bool,
    view: Callable[[Tensor, int, int], Tensor] = lambda images, first, number: images,
    views: int = 1,
) -> Tensor:
    """``private/NAME.npy`` if it was computed from what ``key`` is a hash of, else computed; memory-mapped.

    Args:
        images: uint8 [N, H, W, 1 or 3].
        view: (uint8 [b, 3, 32, 32], position of the first of these images, number of the view) -> their views.
        views: K; more than one have an axis of their own.

    Returns:
        float32 [N, dims] or [N, K, dims], read-only.
    """
    context = stage.context
    file = FeatureFile(context.rundir.private_dir, name, len(images))
    found = file.read(key, context.console.warn)
    if found is not None:
        return found
    rows = rows_at_once(views, whitener.dims) * context.ranks.size
    label = LABELS[name]

    def blocks(begun: int) -> Iterator[Tensor]:
        starts = range(begun, len(images), rows)

        def seen() -> Iterator[Tensor]:
            for start in starts:
                block = to_input(images[start : start + rows])
                yield from (view(block, start, number) for number in range(views))

        with context.console.progress(len(images) * views, label, done=begun * views) as progress:
            made = features_of_blocks(context.ranks, extractor, seen(), whitener, mirror, progress.advance)
            for _ in starts:
                yield next(made) if views == 1 else torch.stack([next(made) for _ in range(views)], dim=1)

    file.write(key, blocks)
    written = file.read(key, context.console.warn)
    if written is None:
        raise StorageError(f"{file.path} cannot be read back", fix="check the disk, then run the same command again")
    return written


def placed(features: Tensor, labels: Tensor, classes: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Features and labels where heads are fitted to them: the one place where that is decided.

    Args:
        features: float [N, d] or [N, K, d] on the CPU, memory-mapped or not.
        labels: int64 [N] on the CPU.
        classes: number of classes.
        device: that computes.

    Returns:
        Both on the device, where the features fit into ``PLACED_PART`` of its free memory. Features that do not stay
        where they are, and ``clipped_softmax_sum`` sends them to the device one block at a time, step by step.

    Raises:
        UsageError: on an accelerator, where nothing looks at them again: a label that is none.
    """
    if device.type == "cpu":
        return features, labels
    check_labels(labels, classes)
    free = free_on_device(device)
    fits = free is None or features.numel() * features.element_size() <= PLACED_PART * free
    return features.to(device) if fits else features, labels.to(device)


def rows_at_once(views: int, dims: int) -> int:
    """Images of one rank whose features are computed before they go to the disk; whole batches, whoever resumes."""
    most = BLOCK_BYTES // (4 * views * dims)
    return max(BATCH, min(ROUND, most // BATCH * BATCH))


def require_room(needed: int, what: str) -> None:
    """Refuse work that takes ``needed`` bytes of memory beside the features where there are fewer.

    Raises:
        UsageError: exit code 2; nothing was paid for it.
    """
    available = available_memory()
    if available is not None and needed > available:
        raise UsageError(
            f"{what} would take {needed / 1e9:.3g} GB of memory, and {available / 1e9:.3g} GB are available",
            fix="use a machine with more memory, or fewer dims; the probe itself reads features from the disk",
        )


def _key(facts: str, extractor: nn.Module, whitener: nn.Module) -> str:
    """A hash of everything the features are made from."""
    digest = hashlib.sha256(f"{facts} {getattr(whitener, 'parts', ())}".encode())
    for module in (extractor, whitener):
        add_weights(digest, module)
    return digest.hexdigest()
