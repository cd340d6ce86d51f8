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

import torch
from torch import Tensor, nn

from dprandp.config.schema import PretrainConfig
from dprandp.generate import open_images, read_manifest
from dprandp.models.extractor import build_extractor
from dprandp.pretrain.contrastive import ContrastiveTrainer, align_uniformity, train
from dprandp.pretrain.evaluation import evaluate
from dprandp.runs import checkpoint
from dprandp.runs.checkpoint import check_tensors
from dprandp.runs.console import MetricsLog
from dprandp.runs.context import Context
from dprandp.runs.parallel import Ranks
from dprandp.runs.signals import Stop
from dprandp.vision.images import ImageSet
from dprandp.vision.views import ViewChoices

STAGE = "pretrain"

HELD_OUT = 400
"""Most images that are held out for the evaluation; a quarter of all, where there are few."""

WATCHED = 128
"""Of them, those that are looked at during the training."""

WATCHING_PART = 0.04
"""Part of the work that looking may take: a view that is looked at costs a third of one that is trained on."""

MOST_LOOKS = 50


class SharedTrainer(ContrastiveTrainer):
    """A contrastive training whose batches are shared out among the ranks.

    The loss compares all embeddings of a batch with one another. Each rank embeds its share of the images; the
    embeddings are gathered everywhere; each rank takes the whole batch's loss and follows its gradient through its own
    embeddings alone. The sum of the ranks' gradients is that of one process with the same batch, as every embedding
    belongs to one rank. The ranks begin with the same state and add the same bits, so they stay equal; rank 0 saves its
    own.

    Args:
        network, config, images: as for ``ContrastiveTrainer``, equal on all ranks.
        ranks: that share the batches; one alone has them whole.
    """

    def __init__(self, network: nn.Module, config: PretrainConfig, images: ImageSet | Tensor, ranks: Ranks) -> None:
        super().__init__(network, config, images)
        self.ranks = ranks

    def backward(self, chosen: Tensor, first: ViewChoices, second: ViewChoices) -> Tensor:
        """As ``ContrastiveTrainer.backward``; all ranks end up with the gradient of the whole batch."""
        ranks = self.ranks
        if ranks.size == 1:
            return super().backward(chosen, first, second)
        shares = ranks.shares(len(chosen))
        mine = shares[ranks.rank]
        own = torch.cat(self.embed(chosen[mine], _rows(first, mine), _rows(second, mine)), dim=1).float()
        parts = ranks.gather(own.detach(), [share.stop - share.start for share in shares], everywhere=True)
        parts[ranks.rank] = own  # the same values, with their gradient
        loss = align_uniformity(*torch.cat(parts).chunk(2, dim=1))
        loss.backward()
        parameters = [*self.network.parameters(), *self.head.parameters()]
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]  # not those unused
        total = torch.cat([gradient.flatten() for gradient in gradients])
        ranks.all_reduce(total)
        for gradient, part in zip(gradients, total.split([gradient.numel() for gradient in gradients]), strict=True):
            gradient.copy_(part.view_as(gradient))
        return loss.detach()

    def agree(self) -> None:
        """Give every rank the state of rank 0."""
        state = self.state()
        self.ranks.broadcast(state.values())
        if not self.ranks.is_first:
            self.load_state(state)


def _rows(choices: ViewChoices, rows: slice) -> ViewChoices:
    picked = {name: getattr(choices, name)[rows] for name in ("boxes", "flip", "factors", "grey")}
    return replace(choices, **picked)


@dataclass(frozen=True)
class Learned:
    """A network, the views that it saw a second (None: no step was left), and the mean loss of the last steps (None
    where nothing was trained by gradients)."""

    network: nn.Module
    views_per_second: float | None
    loss: float | None


def learn(config: PretrainConfig, context: Context, stop: Stop) -> Learned:
    """Train from the last checkpoint to the end of the configuration; rank 0 writes checkpoints and metrics.jsonl.

    Raises:
        UsageError: settings that cannot be met. CheckpointError: one of another configuration.
    """
    folder, ranks = context.rundir.stage_dir(STAGE), context.ranks
    trainer = begun_trainer(config, context)
    loss = math.nan

    def resumed() -> int:
        nonlocal loss
        saved = checkpoint.resume(folder, warn=context.console.warn)
        if saved is None:
            return 0
        check_tensors(saved.tensors, trainer.state(), saved.path)
        trainer.load_state(saved.tensors)
        step, told = saved.entry("step", int), saved.meta.get("loss")
        loss = math.nan if told is None else told  # before the first mean there is none
        trainer.window = [torch.tensor(value, device=context.device) for value in saved.entry("window", list)]
        context.console.say(f"pretrain: going on at step {step} of {config.steps}")
        return step

    first_step = ranks.first(resumed)
    trainer.agree()
    if not ranks.is_first:
        return Learned(trainer.network, None, train(trainer, first_step, on_step=lambda done, mean: None))
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


def begun_trainer(config: PretrainConfig, context: Context) -> SharedTrainer:
    """The trainer as the configuration begins it."""
    network = build_extractor(config, torch.Generator().manual_seed(config.seed))
    shards = open_images(context.rundir.stage_dir("generate"), without_end=_held_out(context))
    images = ImageSet(shards, config.colour).to(context.device)
    return SharedTrainer(network, config, images, context.ranks)
