"""Clipped sums where one record is a unit of several images: one patient, say.

A unit's gradient is the mean over its images of their gradients (each the mean over the image's views), clipped once.
However many images a unit has, it weighs as one record, and zeroing it out with all its images is one change.

Guarantee (every function here):
    Zeroing out one *unit*, with all its images, changes the clipped sum by at most ``clip_norm`` in L2, with
    the rounding allowance of ``clipping``. A unit with an image whose gradient is not finite counts as zero.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch

from dprandp.errors import UsageError
from dprandp.privacy.clipping import (
    check_rows,
    check_softmax_inputs,
    clip_factors,
    clipped_softmax_sum,
    outer_norms,
)
from dprandp.privacy.devices import require_full_precision, sent, surely_all

BLOCK_BYTES = 2**22
"""Of the rows, or of the units' gradients, that are in memory together."""


@torch.no_grad()
def clipped_softmax_sum_of_units(
    features: torch.Tensor,
    labels: torch.Tensor,
    offsets: torch.Tensor,
    weight: torch.Tensor,
    clip_norm: float,
    block_bytes: int = BLOCK_BYTES,
    precise: bool = False,
    rows: torch.Tensor | None = None,
) -> torch.Tensor:
    """The sum over units of clipped gradients of the softmax cross-entropy of a linear head without bias.

    With the residual r = softmax(xW) − onehot(y) of each view's features x, unit u with m images of K views has

        G_u = 1/(m K) Σ_ik x_ik r_ikᵀ        and adds        G_u · min(1, C/‖G_u‖)

    Units of equal size are worked on together, a block at a time. Where mK is at least the number of classes, G_u is
    formed and its norm is that of what is added; where it is smaller, ‖G_u‖ comes from the Gram matrices of the rows,
    as in ``clipped_softmax_sum``, through which units of a single image go.

    Rows are gathered block by block, so that the features may lie in a memory-mapped file larger than memory, or on the
    CPU where an accelerator computes.

    Args:
        features: [M, D] or [M, K, D], the images' rows, those of one unit next to each other; any floating dtype.
            Only read. On the weight's device, or on the CPU.
        labels: int64 [M], values in 0 … classes−1; see ``clipped_softmax_sum``.
        offsets: int64 [U+1] on the CPU, rising strictly from 0 to M: unit u has the rows offsets[u] … offsets[u+1]−1.
        weight: [D, classes], on the device that computes.
        clip_norm: C from 1e-8 to 1e8.
        block_bytes: memory only, never the result.
        precise: compute in float64 throughout.
        rows: int64 [m] on the CPU, positions of images, each at most once; the offsets then cut *these* into units, and
            run to m. None where the images lie unit by unit already.

    Returns:
        float32 [D, classes]; float64 for float64 features, or where ``precise``; on the weight's device.

    Raises:
        UsageError: shapes, labels, offsets or values do not fit. The message holds no label and no size of a unit.
    """
    check_softmax_inputs(features, labels, weight, clip_norm, 1)
    if rows is not None:
        check_rows(rows, len(features))
    sizes = offsets.diff()
    count = len(features) if rows is None else len(rows)
    if len(offsets) < 1 or int(offsets[0]) != 0 or int(offsets[-1]) != count or bool((sizes < 1).any()):
        raise UsageError(
            f"The {len(offsets)} offsets do not cut {count} rows into units.",
            fix="Give offsets that rise strictly from 0 to the number of rows.",
        )
    require_full_precision(weight.device)
    precision = torch.float64 if precise or features.dtype == torch.float64 else torch.float32
    weight = weight.to(precision)
    views = features.shape[1] if features.ndim == 3 else 1
    total = torch.zeros(weight.shape, dtype=torch.float64, device=weight.device)
    for size in sizes.unique().tolist():
        starts = offsets[:-1][sizes == size]
        if size == 1:
            single = starts if rows is None else rows[starts]
            total += clipped_softmax_sum(features, labels, weight, clip_norm, precise=precise, rows=single)
            continue
        width = max(size * views * weight.shape[0], weight.numel()) * weight.element_size()
        for first in starts.split(max(1, block_bytes // width)):
            places = first[:, None] + torch.arange(size)
            places = places if rows is None else rows[places]
            x = sent(features[places.to(features.device)], weight.device).to(precision)
            own = labels[places.to(labels.device)].to(weight.device)
            total += _equal_units(x, own, weight, clip_norm)
    return total.to(precision)


def _equal_units(features: torch.Tensor, labels: torch.Tensor, weight: torch.Tensor, clip_norm: float) -> torch.Tensor:
    """The clipped sum over units of equal size, float64: features [U, m, D] or [U, m, K, D], labels [U, m]."""
    views = features.shape[2] if features.ndim == 4 else 1
    x = features.reshape(len(features), -1, features.shape[-1])
    residual = torch.softmax(x @ weight, dim=2)
    chosen = labels.repeat_interleave(views, dim=1)[..., None]
    residual.scatter_add_(2, chosen, residual.new_full((1, 1, 1), -1.0).expand_as(chosen))
    if x.shape[1] < weight.shape[1]:  # the norm from Gram matrices is cheaper than the gradient itself
        factors = clip_factors(outer_norms(x, residual), clip_norm)
        counted = (factors > 0)[:, None, None]
        residual = torch.where(counted, residual * (factors / x.shape[1])[:, None, None], torch.zeros_like(residual))
        x = x if surely_all(counted) else torch.where(counted, x, torch.zeros_like(x))
        return (residual.flatten(0, 1).T @ x.flatten(0, 1)).T.to(torch.float64)
    gradients = (residual.mT @ x).div_(x.shape[1])
    factors = clip_factors(torch.linalg.vector_norm(gradients, dim=(1, 2), dtype=torch.float64), clip_norm)
    if not surely_all(factors > 0):
        gradients = torch.where((factors > 0)[:, None, None], gradients, torch.zeros_like(gradients))
    return (factors.to(x.dtype) @ gradients.flatten(1)).view(weight.shape[::-1]).T.to(torch.float64)


def unit_means(
    microbatches: Iterable[Mapping[str, torch.Tensor]], sizes: Sequence[int]
) -> Iterator[dict[str, torch.Tensor]]:
    """Gradients of images, averaged over each unit: what ``sum_of_clipped`` takes in place of the images' own.

    Args:
        microbatches: each name -> [b, ...], row i the gradient of one image alone; all images of a unit one after
            another, over the ends of microbatches too.
        sizes: images of each unit, at least 1, in order.

    Yields:
        name -> [units, ...] for the units that a microbatch completes. Memory is that of the microbatch and of one
        unit.

    Raises:
        RuntimeError: there are more or fewer images than the sizes add up to (a bug of the caller).
    """
    waiting = iter(sizes)
    size = missing = next(waiting, 0)
    partial: dict[str, torch.Tensor] | None = None
    for gradients in microbatches:
        count, done, means = len(next(iter(gradients.values()))), 0, []
        while done < count:
            if missing == 0:
                raise RuntimeError("there are gradients of more images than the units have")
            part = {name: value[done : done + missing].sum(dim=0) for name, value in gradients.items()}
            partial = part if partial is None else {name: partial[name] + value for name, value in part.items()}
            taken = min(missing, count - done)
            done, missing = done + taken, missing - taken
            if missing == 0:
                means.append({name: value / size for name, value in partial.items()})
                size = missing = next(waiting, 0)
                partial = None
        if means:
            yield {name: torch.stack([mean[name] for mean in means]) for name in means[0]}
    if missing:
        raise RuntimeError("there are gradients of fewer images than the units have")
