"""How a WRN or ViT learns in ``pretrain``: steps on two views of synthetic images.

Some images, at the ends of their shards, are held out: ``pretrain/evaluation.py`` evaluates the features on images that
were not trained on, at the end and during the training, rarely enough to cost no more than a few per cent of the time.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass

import torch
from torch import nn

from dprandp.config.schema import PretrainConfig
from dprandp.generate import open_images, read_manifest
from dprandp.models.extractor import build_extractor
from dprandp.pretrain.contrastive import ContrastiveTrainer, train
from dprandp.pretrain.evaluation import evaluate
from dprandp.runs import checkpoint
from dprandp.runs.checkpoint import check_tensors
from dprandp.runs.console import MetricsLog
from dprandp.runs.context import Context
from dprandp.runs.signals import Stop
from dprandp.vision.images import ImageSet

STAGE = "pretrain"

HELD_OUT = 400
"""Most images that are held out for the evaluation; a quarter of all, where there are few."""

WATCHED = 128
"""Of them, those that are evaluated during the training."""

WATCHING_FRACTION = 0.04
"""Of the work, for these evaluations: a view costs a third of one that is trained on."""

MOST_LOOKS = 50


@dataclass(frozen=True)
class Learned:
    """A network that has been learned."""

    network: nn.Module
    views_per_second: float | None  # None: no step was left
    loss: float | None  # mean of the last steps; None where nothing was trained by gradients


def learn(config: PretrainConfig, context: Context, stop: Stop) -> Learned:
    """Train from the last checkpoint to the end of the configuration; rank 0 writes checkpoints and metrics.jsonl.

    Raises:
        UsageError: settings that cannot be met. CheckpointError: one of another configuration.
    """
    folder, ranks = context.rundir.stage_dir(STAGE), context.ranks
    trainer = begun_trainer(config, context)
    first_step, loss = ranks.first(lambda: _resume(trainer, context))
    trainer.agree()
    if not ranks.is_first:
        return Learned(trainer.network, None, train(trainer, first_step, on_step=lambda done, mean: None))
    log = MetricsLog(folder / "metrics.jsonl", first_step + 1 if first_step else 0)
    watched = held_out_images(context).head(WATCHED)
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
                log.write(step=done, **vars(seen))
                looked = f", k-NN {100 * seen.knn_accuracy:.0f} % (synthetic), rank {seen.effective_rank:.0f}"
            progress.advance(1, "" if loss is None else f"loss {loss:.3g}{looked}")
            stop.end_step(done % config.checkpoint_every == 0 and done < config.steps, lambda: save(done))

        loss = train(trainer, first_step, on_step=on_step) if first_step < config.steps else loss
    done = config.steps - first_step
    rate = 2 * config.batch_size * done / (time.perf_counter() - started) if done else None
    return Learned(trainer.network, round(rate, 1) if rate else None, round(loss, 5))


def _resume(trainer: ContrastiveTrainer, context: Context) -> tuple[int, float | None]:
    """Load the last checkpoint, if there is one: the step to go on from, and the last mean loss if there was any."""
    saved = checkpoint.resume(context.rundir.stage_dir(STAGE), warn=context.console.warn)
    if saved is None:
        return 0, None
    check_tensors(saved.tensors, trainer.state(), saved.path)
    trainer.load_state(saved.tensors)
    trainer.window = [torch.tensor(value, device=context.device) for value in saved.entry("window", list)]
    step = saved.entry("step", int)
    context.console.say(f"pretrain: going on at step {step} of {trainer.config.steps}")
    return step, saved.meta.get("loss")


def steps_between_looks(config: PretrainConfig) -> int:
    """Steps between two evaluations: ``WATCHING_FRACTION`` of the work, and no more than ``MOST_LOOKS`` of them."""
    looked = 2 * WATCHED / 3
    return max(math.ceil(looked / (WATCHING_FRACTION * 2 * config.batch_size)), math.ceil(config.steps / MOST_LOOKS))


def held_out_images(context: Context) -> ImageSet:
    """The images that no WRN is trained on. A dictionary of patches takes a few patches of these too."""
    return ImageSet(open_images(context.rundir.stage_dir("generate"), _held_out(context), from_end=True))


def _held_out(context: Context) -> int:
    total = read_manifest(context.rundir.stage_dir("generate")).count
    held = min(HELD_OUT, total // 4)
    return held if held >= 2 else 0


def begun_trainer(config: PretrainConfig, context: Context) -> ContrastiveTrainer:
    """The trainer as the configuration begins it."""
    network = build_extractor(config, torch.Generator().manual_seed(config.seed))
    shards = open_images(context.rundir.stage_dir("generate"), without_end=_held_out(context))
    images = ImageSet(shards, config.colour).to(context.device)
    return ContrastiveTrainer(network, config, images, context.ranks)
