"""Features of the private images: computed once, kept in ``private/``, never released.

Each row is a function of one private image and of public things (extractor, whitener, seed of the views), so the rows
are as private as the images, and one record still touches exactly one row.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn

from dprandp.files import atomic_path, atomic_write
from dprandp.stages.extraction import extract_by_ranks
from dprandp.stages.private import PrivateStage
from dprandp.vision.images import to_input
from dprandp.vision.views import keyed_uniforms, private_views
from dprandp.vision.whitening import Whitener

CACHE_BYTES = 8 * 2**30
"""Larger features are not cached on disk."""


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
        float32 [N, dims], or [N, K, dims] for K > 1, and int64 [N].
    """
    split = stage.dataset.train()
    labels = torch.from_numpy(split.labels)
    facts = f"{stage.dataset.fingerprint()} {mirror} {views} {seed if views > 1 else 0}"

    def compute() -> Tensor:
        images, ranks = to_input(split.images), stage.context.ranks
        per_view = []
        with stage.context.console.progress(len(images) * views, "private features") as progress:
            for view in range(views):
                if views > 1:
                    draws = keyed_uniforms(np.arange(len(images)), view, seed, 1)
                    seen = private_views(images, 1, draws, flip=stage.spec.flip_ok, augment_single=True)[:, 0]
                else:
                    seen = images
                per_view.append(extract_by_ranks(ranks, extractor, seen, whitener, mirror, progress.advance))
        return per_view[0] if views == 1 else torch.stack(per_view, dim=1)

    return cached(stage, "features", _key(facts, extractor, whitener), compute), labels


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

    def compute() -> Tensor:
        with stage.context.console.progress(len(images), "test images") as progress:
            ranks = stage.context.ranks
            return extract_by_ranks(ranks, extractor, to_input(images), whitener, mirror, progress.advance)

    if not keep:
        return compute()
    facts = f"test {hashlib.sha256(np.ascontiguousarray(images).tobytes()).hexdigest()} {images.shape} {mirror}"
    return cached(stage, "test-features", _key(facts, extractor, whitener), compute)


def cached(stage: PrivateStage, name: str, key: str, compute: Callable[[], Tensor]) -> Tensor:
    """``private/NAME.npy`` if it was computed from what ``key`` is a hash of, else computed and kept."""
    folder = stage.context.rundir.private_dir
    cache, tag = folder / f"{name}.npy", folder / f"{name}.key"
    if cache.exists() and tag.exists() and tag.read_text(encoding="utf-8") == key:
        try:
            return torch.from_numpy(np.load(cache, allow_pickle=False))
        except (OSError, ValueError, EOFError):
            stage.context.console.warn(f"{cache} is damaged; the features are computed again")
    features = compute()
    if features.numel() * features.element_size() <= CACHE_BYTES:
        tag.unlink(missing_ok=True)  # the key is written last, so a torn cache is never believed
        with atomic_path(cache) as temporary:
            np.save(temporary, features.numpy(), allow_pickle=False)
        atomic_write(tag, key)
    return features


def _key(facts: str, extractor: nn.Module, whitener: nn.Module) -> str:
    """A hash of everything the features are made from."""
    digest = hashlib.sha256(facts.encode())
    for module in (extractor, whitener):
        for name, tensor in sorted(module.state_dict().items()):
            digest.update(name.encode())
            digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
