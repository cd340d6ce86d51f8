"""How a WRN learns in ``pretrain``: steps on two views of synthetic images.

Some images, at the ends of their shards, are held out: what ``pretrain/evaluation.py`` says about the features is
said of images that were not trained on. It is said during the training too, at steps that the configuration alone
decides, rarely enough to cost no more than a few per cent of the time.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dprandp.config.schema import PretrainConfig, as_dict, build
from dprandp.generate import open_images, read_manifest
from dprandp.models.extractor import build_extractor
from dprandp.pretrain.contrastive import ContrastiveTrainer, align_uniformity, train
from dprandp.pretrain.evaluation import evaluate
from dprandp.runs import checkpoint
from dprandp.runs.checkpoint import check_tensors
from dprandp.runs.console import MetricsLog
from dprandp.runs.context import Context
from dprandp.runs.parallel import Follower, Leader, shares
from dprandp.runs.signals import Stop
from dprandp.vision.images import ImageSet
from dprandp.vision.views import ViewChoices

# ------------------------------------------------------------------------------------------------------- data parallel
#
# Contrastive pretraining by several ranks: each has a part of the images, and all take every step together.
#
# The loss compares all embeddings of a batch with one another. Each rank embeds the chosen images that it has; the
# embeddings are gathered; each rank takes the whole batch's loss and follows its gradient through its own embeddings
# alone; the ranks' gradients add up to that of one process with the same batch, as every embedding belongs to one rank.
# The ranks begin with the same weights and add the same sum, so they stay equal. Rank 0's state is what is saved.

IMAGES, BEGIN, STEP = "contrastive.images", "contrastive.begin", "contrastive.step"
"""Tasks of the other ranks."""

MESSAGE_BYTES = 2**26
"""Of images that are sent at a time."""


class SharedTrainer(ContrastiveTrainer):
    """One rank's part of a contrastive training.

    Args:
        network, config: as for ``ContrastiveTrainer``, equal on all ranks.
        images: n of them, this rank's part of all, in the order of the ranks; n may be 0.
        ranks: all of them.
        count: of all images.
    """

    def __init__(
        self,
        network: nn.Module,
        config: PretrainConfig,
        images: ImageSet | Tensor,
        ranks: Leader | Follower,
        count: int,
    ) -> None:
        super().__init__(network, config, images)
        self.ranks, self.count = ranks, count
        self.starts = [share.start for share in shares(count, ranks.size)]

    def backward(self, chosen: Tensor, first: ViewChoices, second: ViewChoices) -> Tensor:
        """As ``ContrastiveTrainer.backward``; all ranks end up with the gradient of the whole batch."""
        starts = torch.tensor(self.starts[1:], device=chosen.device)
        owner = torch.bucketize(chosen, starts, right=True)
        rank = self.ranks.rank
        mine = torch.nonzero(owner == rank)[:, 0]
        x, y = self.embed(chosen[mine] - self.starts[rank], _rows(first, mine), _rows(second, mine))
        counts = torch.bincount(owner, minlength=self.ranks.size).tolist()
        parts = self.ranks.gathered(torch.cat([x.detach().float(), y.detach().float()], dim=1), counts)
        parts[rank] = torch.cat([x.float(), y.float()], dim=1)  # the same values, with their gradient
        loss = align_uniformity(*torch.cat(parts).chunk(2, dim=1))
        loss.backward()
        parameters = [*self.network.parameters(), *self.head.parameters()]
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]  # not those unused
        total = self.ranks.summed(torch.cat([gradient.flatten() for gradient in gradients]))
        for gradient, part in zip(gradients, total.split([gradient.numel() for gradient in gradients]), strict=True):
            gradient.copy_(part.view_as(gradient))
        return loss.detach()

    def step(self, step: int) -> Tensor:
        """As ``ContrastiveTrainer.step``; rank 0's makes the others take it as well."""
        if self.ranks.rank:
            return super().step(step)
        self.ranks.ask(STEP, [({"step": step}, {})] * (self.ranks.size - 1), together=True)
        loss = super().step(step)
        self.ranks.answers()
        return loss


def lead(
    ranks: Leader,
    network: nn.Module,
    config: PretrainConfig,
    images: ImageSet,
    device: torch.device,
) -> SharedTrainer:
    """The trainer of rank 0, with the images shared out; ``begin`` must follow.

    Args:
        network, config: as for ``ContrastiveTrainer``.
        images: all of them, on the CPU.
        device: of rank 0; the others use one of the same kind.
    """
    own, *others = ranks.shares(len(images))
    most = max(1, MESSAGE_BYTES // math.prod(images.shape[1:]))
    facts = {"device": device.type, "of": len(images), "colour": images.colour}
    for start in range(0, max(share.stop - share.start for share in others), most):
        begins = [min(share.start + start, share.stop) for share in others]
        rows = [slice(begin, min(begin + most, share.stop)) for begin, share in zip(begins, others, strict=True)]
        parts = [torch.from_numpy(images.pixels(each)) for each in rows]
        told = [facts | {"start": start, "first": share.start} for share in others]
        ranks.ask(IMAGES, [(said, {"images": part}) for said, part in zip(told, parts, strict=True)])
        ranks.answers()
    return SharedTrainer(network, config, images.part(own).to(device), ranks, len(images))


def begin(trainer: SharedTrainer) -> None:
    """Give the other ranks the state from which rank 0 is about to go on."""
    facts = {"config": as_dict(trainer.config)}
    trainer.ranks.ask(BEGIN, [(facts, trainer.state())] * (trainer.ranks.size - 1))
    trainer.ranks.answers()


class SharedTraining:
    """What another rank does for ``lead`` and ``begin``, by task."""

    def __init__(self, ranks: Follower) -> None:
        self._ranks = ranks
        self._images: list[np.ndarray] = []
        self._facts: dict[str, Any] = {}
        self._device: torch.device
        self._trainer: SharedTrainer

    def images(self, facts: dict[str, Any], tensors: dict[str, Tensor], device: torch.device) -> dict[str, Tensor]:
        """Take a part of this rank's images; the first part makes it forget those of an earlier training."""
        self._images = [*(self._images if facts["start"] else []), tensors["images"].numpy()]
        self._facts, self._device = facts, device
        return {}

    def begin(self, facts: dict[str, Any], tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Make the trainer."""
        config = build("pretrain", facts["config"])
        colour, first, count = (self._facts[key] for key in ("colour", "first", "of"))
        images = ImageSet(self._images, colour, first).to(self._device)
        self._trainer = SharedTrainer(build_extractor(config), config, images, self._ranks, count)
        self._trainer.load_state(tensors)
        return {}

    def step(self, facts: dict[str, Any], tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Take a step with the others."""
        self._trainer.step(facts["step"])
        return {}


def _rows(choices: ViewChoices, rows: Tensor) -> ViewChoices:
    picked = {name: getattr(choices, name)[rows] for name in ("boxes", "flip", "factors", "grey")}
    return replace(choices, **picked)


STAGE = "pretrain"

HELD_OUT = 400
"""Most images that are held out for the evaluation; a quarter of all, where there are few."""

WATCHED = 128
"""Of them, those that are looked at during the training."""

WATCHING_PART = 0.04
"""Part of the work that looking may take: a view that is looked at costs a third of one that is trained on."""

MOST_LOOKS = 50


@dataclass(frozen=True)
class Learned:
    """A network, the views that it saw a second (None: no step was left), and the mean loss of the last steps."""

    network: nn.Module
    views_per_second: float | None
    loss: float


def learn(config: PretrainConfig, context: Context, stop: Stop) -> Learned:
    """Train from the last checkpoint to the end of the configuration; writes checkpoints and metrics.jsonl.

    Raises:
        UsageError: settings that cannot be met. CheckpointError: one of another configuration.
    """
    folder = context.rundir.stage_dir(STAGE)
    saved = checkpoint.resume(folder, warn=context.console.warn)
    trainer = begun_trainer(config, context)
    first_step, loss = 0, math.nan
    if saved is not None:
        check_tensors(saved.tensors, trainer.state(), saved.path)
        trainer.load_state(saved.tensors)
        first_step, told = saved.entry("step", int), saved.meta.get("loss")
        loss = math.nan if told is None else told  # before the first mean there is none
        trainer.window = [torch.tensor(value, device=context.device) for value in saved.entry("window", list)]
        context.console.say(f"pretrain: going on at step {first_step} of {config.steps}")
    if isinstance(trainer, SharedTrainer):
        begin(trainer)
    log = MetricsLog(folder / "metrics.jsonl", first_step + 1 if first_step else 0)
    watched = held_out_images(context, WATCHED)
    every = steps_between_looks(config)
    looked = ""
    started = time.perf_counter()
    with context.console.progress(config.steps, "pretraining steps", done=first_step) as progress:

        def save(done: int) -> None:
            meta = {"step": done, "loss": loss, "window": [float(value) for value in trainer.window]}
            checkpoint.save(folder, f"step-{done:07d}", trainer.state(), meta)

        def on_step(done: int, mean_loss: float | None) -> None:
            nonlocal loss, looked
            if mean_loss is not None:
                loss = mean_loss
                log.write(step=done, loss=mean_loss)
            if done % every == 0 and len(watched) and done < config.steps:
                seen = evaluate(trainer.network, watched, torch.Generator().manual_seed(config.seed))
                log.write(step=done, **seen)
                looked = f", {seen_text(seen)}"
            progress.advance(1, "" if math.isnan(loss) else f"loss {loss:.3g}{looked}")
            stop.end_step(done % config.checkpoint_every == 0 and done < config.steps, lambda: save(done))

        loss = train(trainer, first_step, on_step=on_step) if first_step < config.steps else loss
    done = config.steps - first_step
    rate = 2 * config.batch_size * done / (time.perf_counter() - started) if done else None
    return Learned(trainer.network, round(rate, 1) if rate else None, round(loss, 5))


def steps_between_looks(config: PretrainConfig) -> int:
    """Steps between two evaluations: ``WATCHING_PART`` of the work, and no more than ``MOST_LOOKS`` of them."""
    looked = 2 * WATCHED / 3
    return max(math.ceil(looked / (WATCHING_PART * 2 * config.batch_size)), math.ceil(config.steps / MOST_LOOKS))


def seen_text(seen: dict[str, Any]) -> str:
    """An evaluation in a few words."""
    return f"k-NN {100 * seen['knn_accuracy']:.0f} % (synthetic), rank {seen['effective_rank']:.0f}"


def held_out_images(context: Context, limit: int = HELD_OUT) -> ImageSet:
    """The images, or the first ``limit`` of them, that no WRN is trained on.

    A dictionary of patches takes a few patches of every image, of these too.
    """
    folder = context.rundir.stage_dir("generate")
    return ImageSet(open_images(folder, _held_out(context), from_end=True)).part(slice(0, limit))


def facts_of(config: PretrainConfig) -> dict[str, Any]:
    """What a result says of a training by gradients: its optimizer."""
    return {} if config.arch == "patchnet" or config.random_init else {"optimizer": config.optimizer}


def _held_out(context: Context) -> int:
    total = read_manifest(context.rundir.stage_dir("generate"))["count"]
    held = min(HELD_OUT, total // 4)
    return held if held >= 2 else 0


def begun_trainer(config: PretrainConfig, context: Context) -> ContrastiveTrainer:
    """The trainer as the configuration begins it."""
    network = build_extractor(config, torch.Generator().manual_seed(config.seed))
    images = ImageSet(
        open_images(context.rundir.stage_dir("generate"), without_end=_held_out(context)), config.colour
    )
    if isinstance(context.ranks, Leader):
        return lead(context.ranks, network, config, images, context.device)
    return ContrastiveTrainer(network, config, images.to(context.device))
