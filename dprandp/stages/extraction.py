"""Features of many images, by one process or by several: each rank extracts its rows, rank 0 puts them in order.

Rows are shared out in whole batches of the size that one process takes, so that every image is extracted beside the
same others: equal threads and processors give equal features, to the bit.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from dprandp.config import as_dict, build
from dprandp.ranks import Ranks
from dprandp.vision.classifier import Classifier
from dprandp.vision.extractors import build_extractor, extract
from dprandp.vision.whitening import PooledOnly, Whitener

MODEL, FEATURES = "model", "features"
"""Tasks of the other ranks."""

BATCH = 256
ROUND = 16 * BATCH
"""Rows that a rank is asked for at a time: 13 MB of pixels."""


def tell_model(ranks: Ranks, extractor: nn.Module, whitener: nn.Module, classes: int) -> None:
    """Give the other ranks a copy of extractor and whitener, with a head of zeros."""
    dims = list(whitener.projection.shape) if isinstance(whitener, Whitener) else None
    facts = {
        "extractor": as_dict(extractor.built_from),
        "whitener": dims,
        "classes": classes,
        "device": next(extractor.parameters()).device.type,
    }
    tensors = {f"extractor.{name}": value for name, value in extractor.state_dict().items()}
    tensors |= {f"whitener.{name}": value for name, value in whitener.state_dict().items()}
    ranks.tell(MODEL, facts, tensors)


def told_model(facts: dict, tensors: dict[str, Tensor], device: torch.device) -> Classifier:
    """The model that ``tell_model`` described, on this rank's device."""
    extractor = build_extractor(build("pretrain", facts["extractor"]))
    whitener = PooledOnly(extractor.feature_dim) if facts["whitener"] is None else Whitener(*facts["whitener"])
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
    tell_model(ranks, extractor, PooledOnly(extractor.feature_dim) if whitener is None else whitener, 1)
    out: Tensor | None = None
    for start in range(0, len(images), ROUND * ranks.size):
        rows = images[start : start + ROUND * ranks.size]
        shares = ranks.shares(len(rows), BATCH)
        facts = {"mirror": mirror, "whiten": whitener is not None}
        ranks.ask(FEATURES, [(facts, {"images": rows[share]}) for share in shares[1:]])
        own = share_of_features(extractor, rows[shares[0]], whitener, mirror, on_batch)
        out = torch.empty(len(images), *own.shape[1:]) if out is None else out
        for share, part in zip(shares, [own, *(made["features"] for made in ranks.answers())], strict=True):
            out[start + share.start : start + share.stop] = part
        on_batch(len(rows) - len(own))
    return out


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
