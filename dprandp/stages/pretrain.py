"""Phase I, second half: a feature extractor from synthetic images. No data is read; no privacy is spent.

    step-NNNNNN.safetensors   WRN training state, for resuming (removed when the training is done)
    extractor.safetensors     the finished extractor, with its configuration in extractor.json
    metrics.jsonl             loss or dictionary similarity, step by step

Two ways to learn, chosen by ``arch``:

* ``patchnet``: dictionaries of whitened patches, in one layer or two (``vision/dictionary.py``), a laptop's minutes;
* ``wrn-D-K``: contrastive learning (``vision/contrastive.py``), the published recipe at ``--size paper``.

With ``prior`` nothing is learned: a shipped extractor takes its place (``prior.py``).

Under several ranks a WRN is learned by all of them (``data_parallel.py``), a dictionary by rank 0 alone.
"""

from __future__ import annotations

import math
import time

import torch
from torch import Tensor, nn

from dprandp import checkpoint
from dprandp.config import PretrainConfig, as_dict
from dprandp.console import MetricsLog
from dprandp.errors import UsageError
from dprandp.ranks import Leader
from dprandp.signals import graceful_stop
from dprandp.stages import data_parallel
from dprandp.stages.context import Context, recorded
from dprandp.stages.generate import load_images
from dprandp.stages.prior import shipped
from dprandp.vision import dictionary
from dprandp.vision.contrastive import ContrastiveTrainer, train
from dprandp.vision.extractors import build_extractor, extract, load_weights
from dprandp.vision.images import random_crops, to_grey
from dprandp.vision.metrics import knn_accuracy

STAGE, CONTINUE = "pretrain", "continue"
EXTRACTOR_STAGES = ("generate", STAGE, CONTINUE)
"""What an extractor is made by; the last one need not be there."""
EXTRACTOR = "extractor"
KNN_IMAGES = 400
"""The last images of their shards; training takes others where it does not need all."""


def run(config: PretrainConfig, context: Context) -> dict:
    """Learn an extractor from the run's synthetic images.

    Returns:
        arch, steps, views_per_second, loss (None where nothing was trained by gradients), knn_accuracy, seconds; with a
        prior also prior, prior_sha256 and prior_images (that it was learned from).

    Raises:
        InputError: there are no images yet.
        UsageError: unknown architecture, or a configuration other than the one the directory holds.
    """
    build_extractor(config)  # refuses an unknown architecture before anything is written
    context.rundir.require("generate", STAGE)
    flags = {"resume": context.resume, "overwrite": context.overwrite}
    foreseen = recorded(STAGE, context.rundir.foresee(STAGE, as_dict(config), **flags).config)
    ready, known, from_outside = shipped(foreseen) if foreseen.prior else (None, {}, {})
    begun = context.rundir.begin(
        STAGE,
        as_dict(config),
        context.rundir.inputs_from("generate") | from_outside,
        **flags,
    )
    if begun.action == "skip":
        return context.rundir.result(STAGE)
    config = recorded(STAGE, begun.config)
    started = time.perf_counter()
    with graceful_stop() as stop:
        done = checkpoint.resume(begun.directory, warn=context.console.warn)
        if done is not None and done.name == EXTRACTOR:  # stopped between the last step and the end of the stage
            network, steps, views_per_second = load_extractor(context, STAGE)[0], done.entry("steps", int), None
            loss = done.meta.get("loss")
        elif ready is not None:
            network, steps, views_per_second, loss = ready, known["steps"], None, known["loss"]
        elif config.random_init:
            network, steps, views_per_second, loss = build_extractor(config, _generator(config)), 0, None, None
        elif config.arch == "patchnet":
            network = _learn_dictionaries(config, context, stop)
            steps, views_per_second, loss = config.dictionary_iterations, None, None
        else:
            network, views_per_second, loss = _learn_contrastively(config, context, stop)
            steps = config.steps
    meta = {"config": as_dict(config), "steps": steps, "loss": loss}
    checkpoint.save(begun.directory, EXTRACTOR, network.state_dict(), meta, keep=1)
    result = {
        "arch": config.arch,
        "random_init": config.random_init,
        "parameters": sum(parameter.numel() for parameter in network.parameters()),
        "feature_dim": network.feature_dim,
        "steps": steps,
        "views_per_second": views_per_second,
        "loss": loss,
        **({} if known else {"knn_accuracy": _knn(network, config, context)}),
        **known,  # a prior was evaluated when it was made
        "seconds": round(time.perf_counter() - started, 2),
    }
    context.rundir.finish(
        STAGE, context.rundir.hash_outputs(STAGE, [f"{EXTRACTOR}.safetensors", f"{EXTRACTOR}.json"]), result
    )
    return result


def require_extractor(context: Context, needed_by: str) -> None:
    """Refuse (InputError) unless the run has a finished extractor, and a finished ``continue`` where that was begun."""
    context.rundir.require(STAGE, needed_by)
    if any(row["stage"] == CONTINUE and row["state"] != "missing" for row in context.rundir.status()):
        context.rundir.require(CONTINUE, needed_by)


def load_extractor(context: Context, made_by: str | None = None) -> tuple[nn.Module, PretrainConfig]:
    """The run's finished extractor on the context's device, and the configuration that laid it out.

    Args:
        made_by: 'pretrain' or 'continue'; None for the one that later stages take, the continued one if there is one.

    Raises:
        CheckpointError: the checkpoint is damaged or does not fit.
    """
    made_by = made_by or (CONTINUE if context.rundir.result(CONTINUE) else STAGE)
    loaded = checkpoint.load_finished(context.rundir.stage_dir(made_by), EXTRACTOR, made_by)
    config = recorded(STAGE, loaded.entry("config", dict))
    network = build_extractor(config)
    load_weights(network, loaded.tensors)
    return network.to(context.device).eval(), config


def synthetic_crops(context: Context, count: int, seed: int) -> Tensor:
    """Random crops of the run's synthetic images at the extractor's input size.

    Returns:
        uint8 [count, 3, 32, 32] (fewer where there are fewer images), shuffled.
    """
    images = load_images(context.rundir.stage_dir("generate"), count)
    generator = torch.Generator().manual_seed(seed)
    crops = random_crops(torch.from_numpy(images).permute(0, 3, 1, 2), generator)
    return crops[torch.randperm(len(crops), generator=generator)]


def colour_mode(images: Tensor, mode: str) -> Tensor:
    """'rgb' leaves uint8 [N, 3, H, W] as it is, 'grey' removes the colour, 'mixed' does so for every second image."""
    if mode == "rgb":
        return images
    if mode == "grey":
        return to_grey(images)
    if mode == "mixed":
        images = images.clone()
        images[::2] = to_grey(images[::2])
        return images
    raise UsageError(f"colour = {mode!r} is unknown", fix="choose rgb, grey or mixed")


# ---------------------------------------------------------------------------------------------------------- patchnet


def _learn_dictionaries(config: PretrainConfig, context: Context, stop) -> nn.Module:
    log = MetricsLog(context.rundir.stage_dir(STAGE) / "metrics.jsonl", 0)
    generator = _generator(config)
    crops = colour_mode(synthetic_crops(context, config.dictionary_patches, config.seed), config.colour)
    network = build_extractor(config)
    layers = (network, None) if config.layers == 1 else (network.first, network.second)
    passes = config.dictionary_iterations * (1 if config.layers == 1 else 3)
    with context.console.progress(passes, "dictionary passes") as progress:

        def on_iteration(iteration: int, similarity: float) -> None:
            log.write(step=iteration + 1, similarity=similarity)
            progress.advance(1)
            stop.raise_if_requested()  # minutes of work with nothing to save half-way: a rerun repeats it

        dictionary.learn(
            layers, crops, config.dictionary_patches, config.dictionary_iterations, generator, on_iteration
        )
    return network.to(context.device)


# --------------------------------------------------------------------------------------------------------- wrn-D-K


def _learn_contrastively(config: PretrainConfig, context: Context, stop) -> tuple[nn.Module, float | None, float]:
    folder = context.rundir.stage_dir(STAGE)
    images = torch.from_numpy(load_images(context.rundir.stage_dir("generate"))).permute(0, 3, 1, 2)
    images, network = colour_mode(images.contiguous(), config.colour), build_extractor(config, _generator(config))
    shared = isinstance(context.ranks, Leader)
    if shared:
        trainer = data_parallel.lead(context.ranks, network, config, images, context.device)
    else:
        trainer = ContrastiveTrainer(network, config, images.to(context.device))
    first_step, loss = 0, math.nan
    saved = checkpoint.resume(folder, warn=context.console.warn)
    if saved is not None:
        trainer.load_state(saved.tensors)
        first_step, loss = saved.entry("step", int), saved.meta.get("loss")
        trainer.window = [torch.tensor(value, device=context.device) for value in saved.entry("window", list)]
        context.console.say(f"pretrain: going on at step {first_step} of {config.steps}")
    if shared:
        data_parallel.begin(trainer)
    log = MetricsLog(folder / "metrics.jsonl", first_step + 1 if first_step else 0)
    started = time.perf_counter()
    with context.console.progress(config.steps, "pretraining steps", done=first_step) as progress:

        def on_step(done: int, mean_loss: float | None) -> None:
            nonlocal loss
            progress.advance(1)
            if mean_loss is not None:
                loss = mean_loss
                log.write(step=done, loss=mean_loss)
            if stop.requested or (done % config.checkpoint_every == 0 and done < config.steps):
                meta = {"step": done, "loss": loss, "window": [float(value) for value in trainer.window]}
                checkpoint.save(folder, f"step-{done:07d}", trainer.state(), meta)
            stop.raise_if_requested()

        loss = train(trainer, first_step, on_step=on_step) if first_step < config.steps else loss
    done = config.steps - first_step
    rate = 2 * config.batch_size * done / (time.perf_counter() - started) if done else None
    return trainer.network, round(rate, 1) if rate else None, round(loss, 5)


# ------------------------------------------------------------------------------------------------- public evaluation


def _knn(network: nn.Module, config: PretrainConfig, context: Context) -> float:
    """How often a crop of a synthetic image is nearest to another crop of the same image, among ``KNN_IMAGES``.

    Every held-out image is a class of its own. A public measure of the features, not of how well they serve a
    particular data set; chance is one in ``KNN_IMAGES``.
    """
    images = load_images(context.rundir.stage_dir("generate"), KNN_IMAGES, from_end=True)
    generator = torch.Generator().manual_seed(config.seed)
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2)
    first, second = (
        extract(network.eval(), random_crops(pixels, generator), mirror=False) for _ in range(2)
    )
    centre = first.mean(dim=0)
    labels = torch.arange(len(pixels))
    return round(knn_accuracy(first - centre, labels, second - centre, labels, k=1), 4)


def _generator(config: PretrainConfig) -> torch.Generator:
    return torch.Generator().manual_seed(config.seed)
