"""Sums of clipped gradients whose L2 sensitivity to one record is ``clip_norm``.

One record's gradient is the mean over its K views and is clipped once, over all parameters jointly. A record whose
gradient is not finite counts as zero. Nothing is divided by the number of records: the plan has the public divisor.

Guarantee (every function that takes ``clip_norm``, C from 1e-8 to 1e8, else UsageError):
    Zeroing out one record changes the sum by at most C in L2, over all parameters jointly. Clipping happens at
    C (1 − ROUNDING_SLACK) to make room for floating-point rounding in one record's part, so that this holds to 1e-6 C
    for batches up to about a hundred records. In larger ones float32 summation can add at most about 1e-7 of the norm
    of a block's sum, far below the noise; blocks and microbatches are added in float64.

Automatic clipping (``automatic=True``; Bu, Wang, Zha & Karypis 2023, "Automatic Clipping", arXiv 2206.07136) scales
every gradient to C ‖g‖/(‖g‖ + .01) instead, also those that are shorter than C: the Guarantee is the same, and C, which
is then only the unit of sum and noise, need not be tuned.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import torch
from torch import nn
from torch.func import grad, vmap

from dprandp import losses
from dprandp.errors import UsageError
from dprandp.threads import in_parts

LossFunction = Callable[[Mapping[str, torch.Tensor], torch.Tensor, torch.Tensor], torch.Tensor]

ROUNDING_SLACK = 1e-5
# A gradient longer than this many times the clip norm is treated like an infinite one: its clip factor would be close
# to the smallest normal float32, where a product keeps too few bits to be certain of the norm.
LONGEST = 1e30
NORM_PIECE = 128
"""Numbers of a gradient whose squares are added in float32."""

BLOCK, DEVICE_BLOCK = 512, 8
"""Rows that are worked on at a time, and times as many on an accelerator: speed only, never the result."""

BLOCK_BYTES = 2**22
"""Bytes of rows, or of the units' gradients, in memory at a time."""

AUTOMATIC_STABILISER = 0.01
"""γ of automatic clipping, as published: limits the factor of vanishing gradients."""


def sent(rows: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Rows on the device that computes; to CUDA through memory that the processor need not wait for."""
    if rows.device == device:
        return rows
    return (rows.pin_memory() if device.type == "cuda" else rows).to(device, non_blocking=True)


def surely_all(counted: torch.Tensor) -> bool:
    """Whether all are known to be true: False on an accelerator, which the processor would have to wait for."""
    return counted.device.type == "cpu" and bool(counted.all())


def require_full_precision(device: torch.device) -> None:
    """Refuse settings under which products of float32 matrices are made of fewer bits: UsageError.

    With ten bits (TF32, bfloat16) a record's part of a sum may be rounded up by 5e-4 of itself, beyond the clip norm.
    """
    try:
        whole = torch.get_float32_matmul_precision() == "highest"
    except RuntimeError:  # torch's older and newer settings contradict each other
        whole = False
    if not whole or torch.is_autocast_enabled(device.type):
        raise UsageError(
            "Clipped gradients would be added with less than float32's precision, so one record could weigh more than "
            "the clip norm.",
            fix='Call torch.set_float32_matmul_precision("highest"), outside of any autocast.',
        )


def as_rows(gradients: torch.Tensor) -> torch.Tensor:
    """[B, ...] as [B, numbers] in the order of memory: no copy where each row is dense, in any layout."""
    return gradients.permute(0, *_order(gradients)).reshape(len(gradients), math.prod(gradients.shape[1:]))


def like_one(total: torch.Tensor, gradients: torch.Tensor) -> torch.Tensor:
    """One row of ``as_rows(gradients)``, [numbers], in the shape of one gradient."""
    order = _order(gradients)
    inverse = [order.index(axis) for axis in range(1, gradients.ndim)]
    return total.view([gradients.shape[axis] for axis in order]).permute(inverse)


def squared_norms(rows: torch.Tensor) -> torch.Tensor:
    """Squared norms of [B, numbers], float64 [B]; infinite where a float32 number is above about 1e19.

    float32 norms of short pieces, added up in float64: a tenth of the time of float64 throughout. In the worst order of
    additions a piece's norm is off by 128 roundings of 3e-8, less than half of ``ROUNDING_SLACK``. Numbers below 1e-19,
    whose squares vanish, are too short to matter.
    """
    if rows.dtype != torch.float32 or rows.shape[1] < 2 * NORM_PIECE:
        return torch.linalg.vector_norm(rows, dim=1, dtype=torch.float64).square()
    whole = rows.shape[1] // NORM_PIECE * NORM_PIECE
    pieces = torch.linalg.vector_norm(rows[:, :whole].unflatten(1, (-1, NORM_PIECE)), dim=2).to(torch.float64)
    rest = torch.linalg.vector_norm(rows[:, whole:], dim=1, dtype=torch.float64)
    return pieces.square().sum(1) + rest.square()


def _order(gradients: torch.Tensor) -> list[int]:
    """The dimensions after the first in the order of memory, slowest first."""
    return sorted(range(1, gradients.ndim), key=gradients.stride, reverse=True)


def clip_factors(norms: torch.Tensor, clip_norm: float, *, automatic: bool = False) -> torch.Tensor:
    """The factor, [B], that brings each norm (at least 0, or inf, or NaN) down to C, never up unless ``automatic``.

    It is min(1, C (1 − slack)/norm), or C (1 − slack)/(norm + .01); 0 for a norm that is not finite or above 1e30 C,
    where the gradient itself must be replaced by zeros as well, since 0 · NaN is NaN.
    """
    require_clip_norm(clip_norm)
    usable = torch.isfinite(norms) & (norms <= LONGEST * clip_norm)
    limit = clip_norm * (1 - ROUNDING_SLACK)
    if automatic:
        factors = limit / (norms + AUTOMATIC_STABILISER)
    else:
        factors = torch.where(norms > limit, limit / norms, torch.ones_like(norms))
    return torch.where(usable, factors, torch.zeros_like(norms))


def clipped_sum(
    per_example: Mapping[str, torch.Tensor], clip_norm: float, *, automatic: bool = False
) -> dict[str, torch.Tensor]:
    """Σ_i g_i · min(1, C/‖g_i‖), ‖·‖ over all parameters jointly; Σ_i g_i · C/(‖g_i‖ + .01) if ``automatic``.

    ``per_example``: parameter name -> [B, ...], any floating dtype; B may be 0. Returns name -> float64 [...].
    """
    flat = {name: as_rows(gradients) for name, gradients in per_example.items()}
    squared = torch.stack([squared_norms(rows) for rows in flat.values()]).sum(0)
    require_full_precision(squared.device)
    factors = clip_factors(squared.sqrt(), clip_norm, automatic=automatic)
    counted = factors > 0
    whole = surely_all(counted)
    sums = {}
    for name, rows in flat.items():
        precise = rows if rows.dtype == torch.float64 else rows.to(torch.float32)
        if not whole:
            precise = torch.where(counted[:, None], precise, torch.zeros_like(precise))
        total = factors.to(precise.dtype) @ precise
        sums[name] = like_one(total.to(torch.float64), per_example[name])
    return sums


def per_example_gradients(
    loss_function: LossFunction,
    parameters: Mapping[str, torch.Tensor],
    images: torch.Tensor,
    labels: torch.Tensor,
    microbatch: int,
) -> Iterator[dict[str, torch.Tensor]]:
    """Gradients of each record's loss, in their order, name -> [b, ...] for b ≤ ``microbatch`` records at a time.

    Args:
        loss_function: (parameters, images [K, ...] of ONE record, its label) -> scalar, the mean loss over its K views.
        parameters: name -> tensor, the trained ones only.
        images: [B, K, ...], the K views of each record. labels: int64 [B].

    Guarantee:
        The loss function sees one record at a time (by construction with ``vmap``): no gradient depends on another.
    """
    if microbatch < 1:
        raise UsageError(f"The microbatch is {microbatch}.", fix="Give a whole number of at least 1.")
    one = grad(loss_function)
    many = vmap(one, in_dims=(None, 0, 0), randomness="different")
    for start in range(0, len(images), microbatch):
        part, part_labels = images[start : start + microbatch], labels[start : start + microbatch]
        if len(part) == 1:  # without vmap's overhead: one record's K views are a batch already
            yield {name: g[None] for name, g in one(parameters, part[0], part_labels[0]).items()}
        else:
            yield many(parameters, part, part_labels)


def sum_of_clipped(
    microbatches: Iterable[Mapping[str, torch.Tensor]],
    parameters: Mapping[str, torch.Tensor],
    clip_norm: float,
    *,
    automatic: bool = False,
) -> dict[str, torch.Tensor]:
    """The clipped sums of all microbatches of a batch, added up: name -> float64, shaped like the parameter.

    ``microbatches``: each name -> [b, ...], row i the gradient of one record alone, the same names in each; maybe none.
    """
    require_clip_norm(clip_norm)
    total: dict[str, torch.Tensor] = {}
    for gradients in microbatches:
        for name, value in clipped_sum(gradients, clip_norm, automatic=automatic).items():
            total[name] = total[name].add_(value) if name in total else value
    return {
        name: total[name].contiguous() if name in total else torch.zeros_like(value, dtype=torch.float64)
        for name, value in parameters.items()
    }


@torch.no_grad()
def clipped_softmax_sum(
    features: torch.Tensor,
    labels: torch.Tensor,
    weight: torch.Tensor,
    clip_norm: float,
    precise: bool = False,
    rows: torch.Tensor | None = None,
    class_weights: torch.Tensor | None = None,
) -> torch.Tensor:
    """The sum of clipped gradients of the loss of a linear head without bias, in closed form.

    A view's gradient is the outer product x rᵀ of its features and the residual r of its scores xW
    (``losses.residual``: softmax(xW) − onehot(y) where an image has one class), so

        mean over views:  G = (1/K) Σ_k x_k r_kᵀ,    ‖G‖² = (1/K²) Σ_kl ⟨x_k, x_l⟩ ⟨r_k, r_l⟩   (K × K Gram matrices)

    and no gradient is ever stored for one record. Features are read once, in order, one block at a time: they may lie
    in a memory-mapped file larger than memory, or on the CPU where an accelerator computes.

    Args:
        features: [B, D] or [B, K, D], any floating dtype, of any norm; B may be 0. On the weight's device or the CPU.
        labels: int64 [B], values in 0 … classes−1, or [B, classes] of 0 and 1, on either of the two devices. On the
            CPU they are checked; an accelerator refuses a class that there is not by an error that ends its use.
        weight: [D, classes], on the device that computes.
        precise: compute in float64 throughout, so that rounding cannot add to the sensitivity (for discrete noise).
        rows: int64 [b] on the CPU, positions of the records of the batch, each at most once. None for all B records.
        class_weights: of the loss (``losses.class_weights``). A gradient is clipped after it was weighted.

    Returns:
        float32 [D, classes] (float64 for float64 features, or where ``precise``) on the weight's device. UsageError
        where shapes, labels or values do not fit; its message holds no label.
    """
    check_softmax_inputs(features, labels, weight, clip_norm, rows)
    precision = torch.float64 if precise or features.dtype == torch.float64 else torch.float32
    weight = weight.to(precision)
    views = features.shape[1] if features.ndim == 3 else 1
    count = len(features) if rows is None else len(rows)
    on_cpu = weight.device.type == "cpu"
    block = max(1, min((BLOCK if on_cpu else DEVICE_BLOCK * BLOCK) // views, count))
    if rows is not None:
        labels, rows = labels[rows.to(labels.device)], rows.to(features.device)
    labels = labels.to(weight.device)
    class_weights = None if class_weights is None else class_weights.to(weight)

    def part(number: int, parts: int) -> torch.Tensor:
        mine = slice(number * count // parts, (number + 1) * count // parts)
        if rows is None:
            return _softmax_part(features[mine], labels[mine], weight, clip_norm, block, class_weights)
        return _softmax_part(features, labels[mine], weight, clip_norm, block, class_weights, rows[mine])

    many = on_cpu and count >= 4 * block
    total = sum(in_parts(part, None if many else 1))
    return total.T.to(precision).contiguous()


def check_softmax_inputs(
    features: torch.Tensor, labels: torch.Tensor, weight: torch.Tensor, clip_norm: float, rows: torch.Tensor | None
) -> None:
    """Refuse invalid arguments of ``clipped_softmax_sum``. No message contains a label."""
    require_clip_norm(clip_norm)
    count = features.shape[:1]
    fit = features.ndim in (2, 3) and features.shape[-1] == weight.shape[0]
    if not fit or labels.shape not in (count, (*count, weight.shape[1])):
        raise UsageError(
            f"Features {tuple(features.shape)}, labels {tuple(labels.shape)}, weight {tuple(weight.shape)} do not fit.",
            fix="Give features [B, D] or [B, K, D], labels [B] or [B, classes] and weight [D, classes].",
        )
    if labels.device.type == "cpu":  # an accelerator would be waited for, and refuses them by itself
        check_labels(labels, weight.shape[1])
    if rows is not None:  # a record that came twice would weigh twice
        inside = bool(((rows >= 0) & (rows < len(features))).all())
        if not inside or (len(rows) and int(torch.bincount(rows).max()) > 1):
            raise UsageError(
                f"The rows are not different positions in 0 … {len(features) - 1}.",
                fix="Give each record's position at most once.",
            )
    require_full_precision(weight.device)


def check_labels(labels: torch.Tensor, classes: int) -> None:
    """Refuse labels, int64 [B], outside 0 … classes−1, or [B, classes] that are not 0 or 1; the message holds none.

    Waits for the labels' device.
    """
    if labels.ndim == 2 and not bool(((labels == 0) | (labels == 1)).all()):
        raise UsageError("A label is neither 0 nor 1.", fix="Give 1 for each label that an image has, else 0.")
    if labels.ndim == 1 and not bool(((labels >= 0) & (labels < classes)).all()):
        raise UsageError(f"A label is outside 0 … {classes - 1}.", fix="Declare as many classes as the data set has.")


@torch.no_grad()
def _softmax_part(
    features: torch.Tensor,
    labels: torch.Tensor,
    weight: torch.Tensor,
    clip_norm: float,
    block: int,
    class_weights: torch.Tensor | None,
    rows: torch.Tensor | None = None,
) -> torch.Tensor:
    """The sum over some records, float64 [classes, D]; ``labels`` are those of ``rows`` where these are given."""
    precision, classes = weight.dtype, weight.shape[1]
    views = features.shape[1] if features.ndim == 3 else 1
    total = torch.zeros(weight.shape[::-1], dtype=torch.float64, device=weight.device)
    # One buffer for all conversions: allocating memory for every block costs more than the arithmetic.
    buffer = None if features.dtype == precision else weight.new_empty((block, *features.shape[1:]))
    columns = weight.T.contiguous()  # few rows times many: the faster of the two orders, by half
    for start in range(0, len(labels), block):
        x = features[start : start + block] if rows is None else features[rows[start : start + block]]
        x = sent(x, weight.device)
        if buffer is not None:
            x = buffer[: len(x)].copy_(x)
        flat = x.reshape(-1, x.shape[-1])
        scores = (columns @ flat.T).T.reshape(len(x), views, classes)
        residual = losses.residual(scores, _of_views(labels[start : start + block], views), class_weights)
        factors = clip_factors(outer_norms(x.reshape(len(x), views, -1), residual), clip_norm)
        counted = factors > 0
        residual.mul_((factors / views).view(-1, 1, 1))
        if not surely_all(counted):
            residual = torch.where(counted.view(-1, 1, 1), residual, torch.zeros_like(residual))
            flat = torch.where(counted.repeat_interleave(views)[:, None], flat, torch.zeros_like(flat))
        total += residual.view(-1, classes).T @ flat  # [classes, D]: the faster orientation of the two
    return total


def _of_views(labels: torch.Tensor, views: int) -> torch.Tensor:
    """Labels [b, ...] for each of a record's views: [b, views, ...]."""
    return labels[:, None].expand(-1, views, *labels.shape[1:])


def outer_norms(x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
    """‖(1/K) Σ_k x_k r_kᵀ‖ of each record, from x [b, K, D] and r [b, K, classes], safe against rounding."""
    lengths = torch.linalg.vector_norm(x, dim=2) * torch.linalg.vector_norm(residual, dim=2)
    if x.shape[1] == 1:
        return lengths[:, 0]
    gram = (x @ x.mT) * (residual @ residual.mT)
    # Where long views cancel, the Gram sum is a small difference of large numbers and rounding could hide a long
    # gradient. 64 units in the last place of the largest possible sum are added: 2e-6 of the norm where nothing
    # cancels.
    doubt = 64 * torch.finfo(x.dtype).eps / 2 * lengths.sum(1).square()
    return (gram.sum((1, 2)).clamp_min(0) + doubt).sqrt() / x.shape[1]


def refuse_cross_example_layers(module: nn.Module) -> None:
    """Refuse by name a network in which one record's output depends on other records (UsageError).

    Any BatchNorm (also synchronised, lazy, or by its class name), and InstanceNorm that keeps running statistics; not
    torchvision's FrozenBatchNorm2d, whose statistics are constants.
    Gradients are taken one record at a time in any case; what this prevents are batch statistics that would silently
    become view statistics, and running statistics of private pixels.
    """
    from torch.nn.modules.batchnorm import _BatchNorm
    from torch.nn.modules.instancenorm import _InstanceNorm
    from torchvision.ops.misc import FrozenBatchNorm2d

    for name, layer in module.named_modules():
        kind = type(layer).__name__
        is_batch = isinstance(layer, _BatchNorm) and not isinstance(layer, _InstanceNorm)
        is_batch = is_batch or ("batchnorm" in kind.lower() and type(layer) is not FrozenBatchNorm2d)
        if is_batch or (isinstance(layer, _InstanceNorm) and layer.track_running_stats):
            raise UsageError(
                f"Layer {name or '(the module itself)'!r} is a {kind}: it mixes examples or keeps statistics of them.",
                fix="Use GroupNorm, LayerNorm, or InstanceNorm without running statistics.",
            )


def require_clip_norm(clip_norm: float) -> None:
    """Refuse a C outside the range in which float32 norms and factors are sound."""
    if not 1e-8 <= clip_norm <= 1e8:
        raise UsageError(f"The clip norm is {clip_norm}.", fix="Give a number from 1e-8 to 1e8.")


# ------------------------------------------------------------------------------------------------------- unit clipping
#
# One record may be a unit of several images, such as a patient. Its gradient is the mean over its images of their
# gradients (each the mean over the image's views), clipped once: it has the weight of one record for any number of
# images, and the Guarantee is about zeroing out the *unit*, with all its images. A unit with an image whose gradient is
# not finite counts as zero.


@torch.no_grad()
def clipped_softmax_sum_of_units(
    features: torch.Tensor,
    labels: torch.Tensor,
    offsets: torch.Tensor,
    weight: torch.Tensor,
    clip_norm: float,
    precise: bool = False,
    rows: torch.Tensor | None = None,
    class_weights: torch.Tensor | None = None,
) -> torch.Tensor:
    """``clipped_softmax_sum`` over units: unit u with m images of K views adds G_u · min(1, C/‖G_u‖), where

        G_u = 1/(m K) Σ_ik x_ik r_ikᵀ.

    Where mK is at least the number of classes, G_u is formed and its norm is that of what is added; where it is
    smaller, ‖G_u‖ comes from the Gram matrices of the rows.

    Args:
        features, labels, weight, precise, class_weights: as there; one row, or K, for each of M images.
        offsets: int64 [U+1] on the CPU, rising strictly from 0 to M: unit u has the rows offsets[u] … offsets[u+1]−1.
        rows: int64 [m] on the CPU, positions of images, each at most once; the offsets then cut *these* into units.
            None where the images lie unit by unit already.

    Messages of errors hold no label and no size of a unit.
    """
    check_softmax_inputs(features, labels, weight, clip_norm, rows)
    sizes = offsets.diff()
    count = len(features) if rows is None else len(rows)
    if len(offsets) < 1 or int(offsets[0]) != 0 or int(offsets[-1]) != count or bool((sizes < 1).any()):
        raise UsageError(
            f"The {len(offsets)} offsets do not cut {count} rows into units.",
            fix="Give offsets that rise strictly from 0 to the number of rows.",
        )
    precision = torch.float64 if precise or features.dtype == torch.float64 else torch.float32
    weight = weight.to(precision)
    class_weights = None if class_weights is None else class_weights.to(weight)
    views = features.shape[1] if features.ndim == 3 else 1
    total = torch.zeros(weight.shape, dtype=torch.float64, device=weight.device)
    for size in sizes.unique().tolist():
        starts = offsets[:-1][sizes == size]
        if size == 1:
            single = starts if rows is None else rows[starts]
            total += clipped_softmax_sum(
                features, labels, weight, clip_norm, precise=precise, rows=single, class_weights=class_weights
            )
            continue
        width = max(size * views * weight.shape[0], weight.numel()) * weight.element_size()
        for first in starts.split(max(1, BLOCK_BYTES // width)):
            places = first[:, None] + torch.arange(size)
            places = places if rows is None else rows[places]
            x = sent(features[places.to(features.device)], weight.device).to(precision)
            own = labels[places.to(labels.device)].to(weight.device)
            total += _equal_units(x, own, weight, clip_norm, class_weights)
    return total.to(precision)


def _equal_units(
    features: torch.Tensor,
    labels: torch.Tensor,
    weight: torch.Tensor,
    clip_norm: float,
    class_weights: torch.Tensor | None,
) -> torch.Tensor:
    """The clipped sum over units of equal size, float64: features [U, m, D] or [U, m, K, D], labels [U, m, ...]."""
    views = features.shape[2] if features.ndim == 4 else 1
    x = features.reshape(len(features), -1, features.shape[-1])
    residual = losses.residual(x @ weight, labels.repeat_interleave(views, dim=1), class_weights)
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
    """Gradients averaged over each unit, name -> [units, ...]: what ``sum_of_clipped`` takes in place of images' own.

    Args:
        microbatches: each name -> [b, ...], row i the gradient of one image alone; all images of a unit one after
            another, over the ends of microbatches too.
        sizes: images of each unit, at least 1, in order; RuntimeError where they add up to another number.
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
