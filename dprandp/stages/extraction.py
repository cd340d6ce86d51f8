"""Features of many images, by one process or by several: each rank extracts its rows, rank 0 puts them in order.

Rows are shared out in whole batches of the size that one process takes, so that every image is extracted beside the
same others: equal threads and processors give equal features, to the bit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor, nn

from dprandp.config import as_dict, build
from dprandp.ranks import Ranks
from dprandp.vision.classifier import Classifier
from dprandp.vision.extractors import build_extractor, extract
from dprandp.vision.precision import precision_of
from dprandp.vision.whitening import PooledOnly, Whitener

MODEL, FEATURES = "model", "features"
"""Tasks of the other ranks."""

BATCH = 256
ROUND = 16 * BATCH
"""Rows that a rank is asked for at a time: 13 MB of pixels."""
BLOCK_BYTES = 2**26
"""Of features in memory before they go to the disk."""


def tell_model(ranks: Ranks, extractor: nn.Module, whitener: nn.Module, classes: int) -> None:
    """Give the other ranks a copy of extractor and whitener, with a head of zeros."""
    axes = whitener.axes if isinstance(whitener, Whitener) else None
    facts = {
        "extractor": as_dict(extractor.built_from),
        "whitener": axes,
        "classes": classes,
        "precision": precision_of(extractor),
        "device": next(extractor.parameters()).device.type,
    }
    tensors = {f"extractor.{name}": value for name, value in extractor.state_dict().items()}
    tensors |= {f"whitener.{name}": value for name, value in whitener.state_dict().items()}
    ranks.tell(MODEL, facts, tensors)


def told_model(facts: dict, tensors: dict[str, Tensor], device: torch.device) -> Classifier:
    """The model that ``tell_model`` described, on this rank's device."""
    extractor = build_extractor(build("pretrain", facts["extractor"]))
    extractor.precision = facts["precision"]
    width, axes = extractor.feature_dim, facts["whitener"]
    whitener = PooledOnly(width) if axes is None else Whitener(width, axes, extractor.parts)
    model = Classifier(extractor, whitener, facts["classes"])
    model.load_state_dict(tensors | {"head": model.head.detach()})
    return model.to(device).eval()


def extract_by_ranks(
    ranks: Ranks,
    extractor: nn.Module,
    images: Tensor,
    whitener: nn.Module | None,
    mirror: bool,
    on_batch: Callable[[int], None],
) -> Tensor:
    """``extract``, its rows shared out.

    Args:
        ranks: this process leads them.
        extractor: on the device that computes; the other ranks use devices of the same kind.
        images: uint8 [N, 3, 32, 32].
        whitener: applied to the features; None for none.
        mirror, on_batch: see ``extract``.

    Returns:
        float32 [N, ...] on the CPU, row i the features of image i.
    """
    if ranks.size == 1 or len(images) == 0:
        return share_of_features(extractor, images, whitener, mirror, on_batch)
    out: Tensor | None = None
    done = 0
    for part in features_of_blocks(
        ranks, extractor, images.split(ROUND * ranks.size), whitener, mirror, on_batch
    ):
        out = torch.empty(len(images), *part.shape[1:]) if out is None else out
        out[done : done + len(part)] = part
        done += len(part)
    return out


def features_of_blocks(
    ranks: Ranks,
    extractor: nn.Module,
    blocks: Iterable[Tensor],
    whitener: nn.Module | None,
    mirror: bool,
    on_batch: Callable[[int], None],
) -> Iterator[Tensor]:
    """``extract_by_ranks`` of each block of images in turn; the other ranks are given the model once.

    Args:
        blocks: uint8 [b, 3, 32, 32] each, b ≥ 1, at most ``ROUND`` for each rank.

    Yields:
        float32 [b, ...] on the CPU for each block.
    """
    if ranks.size > 1:
        tell_model(ranks, extractor, PooledOnly(extractor.feature_dim) if whitener is None else whitener, 1)
    for images in blocks:
        shares = ranks.shares(len(images), BATCH)
        facts = {"mirror": mirror, "whiten": whitener is not None}
        ranks.ask(FEATURES, [(facts, {"images": images[share]}) for share in shares[1:]])
        own = share_of_features(extractor, images[shares[0]], whitener, mirror, on_batch)
        others = [made["features"] for made in ranks.answers()]
        if others:
            on_batch(len(images) - len(own))
        yield torch.cat([own, *others]) if others else own


def share_of_features(
    extractor: nn.Module,
    images: Tensor,
    whitener: nn.Module | None,
    mirror: bool,
    on_batch: Callable[[int], None] = lambda count: None,
) -> Tensor:
    """One rank's rows; arguments as for ``extract_by_ranks``."""
    if whitener is None:
        return extract(extractor, images, mirror=mirror, batch_size=BATCH, on_batch=on_batch)
    return extract(extractor, images, mirror=mirror, batch_size=BATCH, after=whitener, on_batch=on_batch)
