"""Sums of clipped gradients of every parameter over a Poisson batch, by one process or by several.

K views of each image -> the mean of their gradients (and over all images of a unit, where units have several) -> clip
-> sum. The extractor's parameters are trained as θ = s φ with a public factor s (``extractor_scale``): the gradient of
φ is s times that of θ, so s decides how much of the joint clip norm and of the noise the extractor takes.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.func import functional_call

from dprandp import losses
from dprandp.config.schema import is_backbone
from dprandp.dpsgd import masks as masking
from dprandp.dpsgd.masks import EXTRACTOR, FrozenPrefix
from dprandp.dpsgd.units import UnitRows
from dprandp.errors import UsageError
from dprandp.models.classifier import Classifier
from dprandp.models.patchnet import patch_layers
from dprandp.models.patchnet import per_example_gradients as patchnet_gradients
from dprandp.models.wrn import WrnGradients, has_layer_gradients
from dprandp.privacy.clipping import per_example_gradients, sum_of_clipped, unit_means
from dprandp.privacy.mechanism import PrivateStep
from dprandp.runs.parallel import Ranks
from dprandp.vision.views import keyed_uniforms, private_views

CLOSED_FORM_MICROBATCH = 16
"""Examples whose gradients are in memory together: 16 x 1600 filters x (64 + 192) weights x 4 bytes = 26 MB."""

GRADIENT_BYTES = 2**27
"""Bytes of a WideResNet's gradients in the memory of a CPU at a time: 12 records of wrn-16-4."""

DEVICE_VIEWS, DEVICE_RECORDS = 256, 32
"""Most views, and records, that an accelerator computes together by automatic differentiation: a patchnet of 6,400
filters has some 25 GB of responses to 256 views."""

GradientSource = Callable[[Mapping[str, Tensor], Tensor, Tensor], Iterator[dict[str, Tensor]]]
"""(parameters, views, labels) -> microbatches of per-example gradients; each may overwrite the one before."""


@dataclass(frozen=True)
class SumSettings:
    """The public settings of a sum."""

    scale: float  # the extractor's factor s; 0 freezes it
    views: int  # K
    seed: int  # public randomness of the views
    flip: bool  # mirror half of the views
    clip_norm: float  # C
    automatic: bool = False  # automatic clipping, see ``privacy.clipping``
    class_shares: tuple[float, ...] | None = None  # declared ones, by which the loss is weighted
    multi_label: bool = False  # what the shares are of, see ``losses.class_weights``
    precise: bool = False  # clip and add in float64, so that rounding adds nothing to the sensitivity (discrete noise)
    microbatch: int | None = None  # examples whose gradients are held together; None: by the model. Memory only
    frozen_first: int = 0  # units of the extractor before the first that is trained (``masks.Trained``)
    adapters: bool = False  # factors of adapters are trained (``masks.merged``)


@dataclass(frozen=True)
class Batch:
    """Records of one step: images, or units of several. Private."""

    images: Tensor  # uint8 [M, 3, 32, 32], those of one unit next to each other
    labels: Tensor  # int64 [M], or [M, classes] of 0 and 1
    members: Tensor  # int64 [M], the images' positions in the data set, by which their views are drawn
    sizes: Tensor | None = None  # int64 [U], images of each unit; None where every image is a record

    @property
    def records(self) -> int:
        """The number of records."""
        return len(self.members if self.sizes is None else self.sizes)


class ClippedSums:
    """Sums of clipped gradients of one model, whose parameters may be overwritten and no longer require gradients."""

    def __init__(self, model: Classifier, settings: SumSettings) -> None:
        self.settings, self.device, first = settings, model.head.device, settings.frozen_first
        model.requires_grad_(False)
        self._prefix = FrozenPrefix(model, first, keep=settings.views == 1) if first else None
        self._gradients = gradient_source(model, settings)

    def of(
        self, parameters: Mapping[str, Tensor], step: int, batch: Batch, masks: masking.Masks | None = None
    ) -> dict[str, Tensor]:
        """The sum over one batch, or over one rank's part of it.

        Args:
            parameters: the trained ones by name, scaled.
            step: number of the step, by which views are drawn.
            batch: its records; may be empty.
            masks: gradients are cut down to the chosen weights before they are clipped.

        Returns:
            name -> float64, shaped like the parameter; zeros for an empty batch, and where nothing was chosen.

        Guarantee:
            As ``privacy.clipping``: one record (an image with its K views, or a unit with its images) adds at most
            ``clip_norm`` in L2, over all parameters jointly. A record's views depend on (seed, step, position) alone.
        """
        settings = self.settings
        draws = keyed_uniforms(batch.members, step, settings.seed, settings.views)
        views = private_views(batch.images.to(self.device), settings.views, draws, flip=settings.flip)
        if self._prefix is not None:
            views = self._prefix.outputs(views, batch.members)
        gradients = self._gradients(parameters, views, batch.labels.to(self.device))
        if masks:
            gradients = _masked(gradients, masks)
        if batch.sizes is not None:
            gradients = unit_means(gradients, batch.sizes.tolist())
        if settings.precise:
            gradients = ({name: value.double() for name, value in each.items()} for each in gradients)
        return sum_of_clipped(gradients, parameters, settings.clip_norm, automatic=settings.automatic)

    def over_ranks(
        self,
        ranks: Ranks,
        parameters: Mapping[str, Tensor],
        step: int,
        share: Batch,
        masks: masking.Masks | None = None,
    ) -> dict[str, Tensor]:
        """``of`` a batch whose records are distributed over the ranks, at rank 0's parameters and masks.

        All ranks call this together, with the same model and settings; parameters and masks, of the same names
        everywhere, are overwritten by those of rank 0. The result is undefined on the other ranks.

        Args:
            share: this rank's, maybe empty. Every record of the batch is in exactly one rank's share.

        Guarantee:
            Sensitivity ``clip_norm``: each record's gradient is computed and clipped once, whole, by the one rank that
            has it, and the shares' sums are added in float64. No rank adds noise or divides; what is returned on rank 0
            goes into one ``PrivateStep``. A share longer than its records allow (C each) is refused before it is added:
            a rank that did not clip, or that added noise of its own, ends the job.

        Raises:
            RankLostError, RankError: a rank ended or hangs; nothing of the step is released.
            RuntimeError: this rank's part is not a sum of clipped gradients.
        """
        ranks.broadcast([*parameters.values(), *(masks or {}).values()])
        total = self.of(parameters, step, share, masks)
        if ranks.size > 1:
            self._refuse_other_than_sums(total, parameters, share.records)
        ranks.reduce(total)
        return total

    def _refuse_other_than_sums(self, share: Mapping[str, Tensor], like: Mapping[str, Tensor], records: int) -> None:
        fits = share.keys() == like.keys() and all(
            share[name].shape == value.shape and share[name].dtype == torch.float64 for name, value in like.items()
        )
        most = self.settings.clip_norm * records * (1 + 1e-6)
        if not fits or not float(torch.stack([value.norm() for value in share.values()]).norm()) <= most:
            raise RuntimeError("a rank's sum is longer than its clipped gradients can be, or not finite")


def refuse_without_gradients(model: Classifier, settings: SumSettings, parameters: Mapping[str, Tensor]) -> None:
    """Try a sum of a network from elsewhere on two images of public noise, before the first charge for one.

    Raises:
        UsageError: the network has operations that ``torch.func`` does not differentiate.
    """
    arch = model.extractor.built_from.arch
    if not is_backbone(arch):
        return
    side, classes = model.extractor.input_size, model.head.shape[1]
    noise = torch.randint(256, (2, 3, side, side), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    labels = torch.zeros((2, classes) if settings.multi_label else 2, dtype=torch.int64)
    batch = Batch(noise.to(model.head.device), labels.to(model.head.device), torch.arange(2))
    try:
        ClippedSums(model, settings).of(parameters, 0, batch)
    except Exception as error:  # of any network
        why = " ".join(str(error).split())
        raise UsageError(
            f"the gradient of one image cannot be computed for {arch}: {type(error).__name__}: {why[:300]}",
            fix="build the network of operations that torch.func.grad differentiates, such as the layers of torch.nn, "
            "or fit a head on it alone (dprandp probe)",
        ) from error


def _masked(gradients: Iterator[dict[str, Tensor]], masks: masking.Masks) -> Iterator[dict[str, Tensor]]:
    for each in gradients:
        masking.apply(masks, each)
        yield each


@dataclass(frozen=True)
class Draw:
    """A ``PrivateStep`` on ranks other than rank 0: number, and indices (int64 [b], private)."""

    number: int
    indices: np.ndarray


def steps_on_all(ranks: Ranks, steps: Iterable[PrivateStep]) -> Iterator[PrivateStep | Draw]:
    """The steps of rank 0's mechanism, on every rank: rank 0 charges and draws, and broadcasts the batch."""
    if ranks.size == 1:
        yield from steps
    elif ranks.is_first:
        for step in steps:
            ranks.broadcast_rows(torch.tensor([step.number, *step.indices.tolist()]))
            yield step
        ranks.broadcast_rows(torch.zeros(0, dtype=torch.int64))
    else:
        while len(row := ranks.broadcast_rows(None)):
            yield Draw(int(row[0]), row[1:].numpy())


def share_of(ranks: Ranks, records: np.ndarray, images: Tensor, labels: Tensor, rows: UnitRows | None) -> Batch:
    """This rank's part of the records of a step (int64 [b], maybe none): whole records, divided as evenly as possible.

    Args:
        images, labels: of the whole data set.
        rows: the images of each record; None where a record is one image.
    """
    own = records[ranks.shares(len(records))[ranks.rank]]
    members, sizes = (own, None) if rows is None else rows.images(own)
    places = torch.from_numpy(members)
    chosen = places.to(images.device)
    return Batch(images[chosen], labels[chosen], places, None if sizes is None else torch.from_numpy(sizes))


def gradient_source(model: Classifier, settings: SumSettings) -> GradientSource:
    """Per-example gradients with respect to the scaled parameters.

    In closed form for patchnet on a CPU, layer by layer for WideResNets, by ``torch.func`` for adapters and all else.
    The views are uint8 [B, K, 3, 32, 32], or what the first frozen units put out, float32 [B, K, ...].
    """
    scale, device = settings.scale, model.head.device
    weights = losses.class_weights(settings.class_shares, settings.multi_label)
    weights = None if weights is None else weights.to(device)
    closed_form = device.type == "cpu" and bool(patch_layers(model.extractor))
    if settings.adapters or (not closed_form and not has_layer_gradients(model.extractor)):
        loss = loss_function(model, scale, weights)

        def automatic(parameters: Mapping[str, Tensor], views: Tensor, labels: Tensor) -> Iterator[dict[str, Tensor]]:
            most = 1 if device.type == "cpu" else max(1, min(DEVICE_RECORDS, DEVICE_VIEWS // views.shape[1]))
            return per_example_gradients(loss, parameters, views, labels, settings.microbatch or most)

        return automatic

    numbers = sum(value.numel() for value in model.parameters())
    together = min(32, 1 + GRADIENT_BYTES // (4 * numbers)) if device.type == "cpu" else 32
    together = settings.microbatch or (CLOSED_FORM_MICROBATCH if closed_form else together)
    layers_of = functools.cache(lambda names: WrnGradients(model, first=settings.frozen_first, trained=names))

    def source(parameters: Mapping[str, Tensor], views: Tensor, labels: Tensor) -> Iterator[dict[str, Tensor]]:
        model.load_state_dict({n: unscaled(n, value, scale) for n, value in parameters.items()}, strict=False)
        gradients_of = functools.partial(patchnet_gradients, model)
        if not closed_form:
            layers = layers_of(frozenset(parameters))
            layers.refresh()
            gradients_of = layers.of
        for start in range(0, len(views), together):
            part = slice(start, start + together)
            gradients = gradients_of(views[part], labels[part], weights)
            if scale != 1:
                for name in parameters:
                    if name.startswith(EXTRACTOR):
                        gradients[name].mul_(scale)
            yield {name: gradients[name] for name in parameters}

    return source


def loss_function(model: Classifier, scale: float, class_weights: Tensor | None = None) -> Callable[..., Tensor]:
    """(scaled parameters, uint8 [K, 3, 32, 32], label) -> mean loss (``losses``) over the K views of one example."""
    base = dict(model.named_parameters())

    def loss(scaled: Mapping[str, Tensor], views: Tensor, label: Tensor) -> Tensor:
        parameters = masking.merged(base, {name: unscaled(name, value, scale) for name, value in scaled.items()})
        scores = functional_call(model, parameters, (model.extractor.normalise(views),), {"precise": True})
        return losses.loss(scores, label.expand(len(views), *label.shape), class_weights).mean()

    return loss


def unscaled(name: str, value: Tensor, scale: float) -> Tensor:
    """θ = s φ for the extractor's parameters, unchanged for the head."""
    return value * scale if name.startswith(EXTRACTOR) else value
