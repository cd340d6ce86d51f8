"""How a WRN learns in ``pretrain``: steps on two views of synthetic images.

Some images, at the ends of their shards, are held out: what ``vision/public_evaluation.py`` says about the features is
said of images that were not trained on. It is said during the training too, at steps that the configuration alone
decides, rarely enough to cost no more than a few per cent of the time.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from dprandp import checkpoint
from dprandp.config import PretrainConfig
from dprandp.console import MetricsLog
from dprandp.ranks import Leader
from dprandp.signals import Stop
from dprandp.stages import data_parallel
from dprandp.stages.context import Context
from dprandp.stages.generate import open_images, read_manifest
from dprandp.tensorfile import check_tensors
from dprandp.vision.contrastive import ContrastiveTrainer, train
from dprandp.vision.extractors import build_extractor
from dprandp.vision.image_set import ImageSet
from dprandp.vision.public_evaluation import evaluate

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
    if isinstance(trainer, data_parallel.SharedTrainer):
        data_parallel.begin(trainer)
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
        return data_parallel.lead(context.ranks, network, config, images, context.device)
    return ContrastiveTrainer(network, config, images.to(context.device))
