"""Phase I, second half: a feature extractor from synthetic images. No data is read; no privacy is spent.

    step-NNNNNN.safetensors   WRN training state, for resuming (removed when the training is done)
    extractor.safetensors     the finished extractor, with its configuration in the header
    filters.png               the filters of its first layer
    metrics.jsonl             loss and public evaluation, or dictionary similarity, step by step
    grey/                     the same of a second patchnet, where the colour of the data is not known yet

Two ways to learn, chosen by ``arch``:

* ``patchnet``: dictionaries of whitened patches (``models/dictionary.py``), in minutes on a laptop;
* ``wrn-D-K`` and ``vit-...``: steps on two views of each image (``contrastive.py``), the published contrastive recipe.

With ``prior`` or ``init`` nothing is learned: a shipped extractor takes its place (``priors/``), or a network with
public weights from a file (``weights.py``), such as one of torchvision's.

A dictionary of colour patches wastes most of its filters on grey images. If the colour of the data is unknown, a
patchnet is therefore learned twice, from the same images in colour and in grey. Later stages take the one that fits the
declared channels of the data, a public fact, so the choice costs no privacy.

All ranks train a WRN together (``contrastive.py``); rank 0 does everything else.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from dprandp.config.schema import PretrainConfig, as_dict, extractors_of, input_size_of, public_arch, resolution_for
from dprandp.errors import CheckpointError, UsageError
from dprandp.generate import open_images
from dprandp.models import dictionary
from dprandp.models.extractor import (
    build_extractor,
    first_filters,
    form_of,
    load_weights,
    refuse_unlearnable,
    replaced_in,
)
from dprandp.models.precision import AUTO, decide, precision_of
from dprandp.models.torchvision import with_code
from dprandp.pretrain.contrastive import MEASURES, Learned, evaluate, held_out_images, learn
from dprandp.pretrain.weights import declared_weights, load_public_weights, say_what_was_loaded, weights_hash
from dprandp.priors import Card, shipped_extractor
from dprandp.runs import checkpoint
from dprandp.runs.console import MetricsLog
from dprandp.runs.context import Context, recorded, with_precision
from dprandp.runs.files import atomic_path
from dprandp.runs.results import GenerateResult, Measures, PretrainResult
from dprandp.runs.signals import Stop, graceful_stop
from dprandp.vision.images import ImageSet, colour_mode, filter_sheet, random_crops

STAGE, CONTINUE = "pretrain", "continue"
EXTRACTOR_STAGES = ("generate", STAGE, CONTINUE)
"""The stages before an extractor; the last one is optional."""
EXTRACTOR = "extractor"
GREY = "grey"
"""Folder of the second extractor."""
FILTERS = "filters.png"


def run(config: PretrainConfig, context: Context) -> PretrainResult | None:
    """Learn an extractor from the run's synthetic images; None on ranks other than rank 0.

    Raises:
        InputError: there are no images yet.
        UsageError: unknown architecture, or a configuration other than the one the directory holds.
    """
    ranks = context.ranks
    with graceful_stop() as stop:
        begun = ranks.first(lambda: _begin(config, context, stop), told=_training)
        if begun is None:
            return context.rundir.result(PretrainResult) if ranks.is_first else None
        if ranks.is_first and begun.learned is not None:  # the other ranks had nothing to do, and have left
            return _finish(begun, begun.learned, context)
        learned = learn(begun.config if ranks.is_first else recorded(STAGE, begun), context, stop)
        return ranks.first(lambda: _finish(begun, learned, context), told=lambda result: None)


@dataclass(frozen=True)
class _Begun:
    """A stage that has begun."""

    config: PretrainConfig  # as recorded
    beside: list[PretrainConfig]  # of the second extractor, which is there already, if there is to be one
    directory: Path
    learned: Learned | None  # the extractor; None where a WRN is still to be trained
    steps: int  # of its training
    known: Card | None  # of a prior
    started: float  # seconds


def _training(begun: _Begun | None) -> dict[str, Any] | None:
    """What the other ranks are told: the configuration of a WRN to train, or None."""
    return as_dict(begun.config) if begun is not None and begun.learned is None else None


def _begin(config: PretrainConfig, context: Context, stop: Stop) -> _Begun | None:
    """Begin the stage in the run directory, and do the work of a single process; None if the stage is done."""
    build_extractor(config)  # refuses an unknown architecture before anything is written
    refuse_unlearnable(config)
    context.rundir.require("generate", STAGE)
    refuse_enlarged(input_size_of(config), context.rundir.result(GenerateResult).resolution)
    config = with_code(with_precision(STAGE, config, context))
    flags = {"resume": context.resume, "overwrite": context.overwrite}
    foreseen = recorded(STAGE, context.rundir.foresee(STAGE, as_dict(config), **flags).config)
    ready, known, from_outside = shipped_extractor(foreseen) if foreseen.prior else (None, None, {})
    if foreseen.init is not None:
        ready, from_outside = build_extractor(foreseen), weights_hash(foreseen.init)
        say_what_was_loaded(foreseen, load_public_weights(Path(foreseen.init), ready, foreseen.arch), context.console)
    inputs = context.rundir.inputs_from("generate") | from_outside
    begun = context.rundir.begin(STAGE, as_dict(config), inputs, **flags)
    if begun.action == "skip":
        return None
    config, *beside = extractors_of(recorded(STAGE, begun.config))
    started, learned, steps = time.perf_counter(), None, config.steps
    for other in beside:
        _learn_beside(other, context, stop)
    done = checkpoint.resume(begun.directory, warn=context.console.warn)
    if done is not None and done.name == EXTRACTOR:  # stopped after the last step
        network, _ = _network_of(done, context, config.precision)
        learned, steps = Learned(network, None, done.meta.get("loss")), done.entry("steps", int)
    elif ready is not None:
        learned, steps = Learned(ready, None, None), 0
        if known is not None:
            learned, steps = Learned(ready, None, known.result.loss), known.result.steps
    elif config.random_init:
        learned, steps = Learned(build_extractor(config, _generator(config)), None, None), 0
    elif config.arch == "patchnet":
        network = _learn_dictionaries(config, context, begun.directory, stop)
        learned, steps = Learned(network, None, None), config.dictionary_iterations
    return _Begun(config, beside, begun.directory, learned, steps, known, started)


def _finish(begun: _Begun, learned: Learned, context: Context) -> PretrainResult:
    """Save the extractor, evaluate it, and record the stage as done."""
    config = begun.config
    _save(learned.network, config, begun.steps, learned.loss, begun.directory)
    # Evaluate the saved network: a freshly trained one has another memory order, and in bfloat16 another order of sums
    # changes a digit of the measures.
    network, _ = _network_of(checkpoint.load_finished(begun.directory, EXTRACTOR, STAGE), context, config.precision)
    card = begun.known
    if card is not None:  # a prior's evaluation is on its card
        prior = {"prior": card.name, "prior_sha256": card.sha256, "prior_images": card.generate.count}
        known = vars(card.result) | {"precision": card.result.precision or precision_of(network)} | prior
    else:
        by_gradients = config.arch != "patchnet" and not config.random_init and config.init is None
        known = {
            **vars(_evaluation(network, config, context)),
            "arch": public_arch(config.arch),
            "random_init": config.random_init,
            "parameters": sum(parameter.numel() for parameter in network.parameters()),
            "feature_dim": network.feature_dim,
            "precision": precision_of(network),
            "steps": begun.steps,
            "loss": learned.loss,
            "optimizer": config.optimizer if by_gradients else None,
            "replaced": replaced_in(network),
            **declared_weights(config),
        }
    outputs, grey = [f"{EXTRACTOR}.safetensors"], None
    for other in begun.beside:
        grey = _evaluation(load_extractor(context, GREY, STAGE)[0], other, context)
        outputs += [f"{GREY}/{name}" for name in outputs]
    result = PretrainResult(
        **known,
        views_per_second=None if card else learned.views_per_second,
        grey=grey,
        seconds=round(time.perf_counter() - begun.started, 2),
    )
    context.rundir.finish(STAGE, context.rundir.hash_outputs(STAGE, outputs), result)
    return result


def refuse_enlarged(size: int, resolution: int) -> None:
    """Refuse (UsageError) an input of ``size`` pixels that synthetic images of ``resolution`` would be enlarged for."""
    if size > resolution:
        raise UsageError(
            f"the synthetic images have {resolution} pixels a side, fewer than the {size} of the extractor's input: an "
            "extractor of enlarged images knows no fine detail",
            fix=f"generate larger images (--resolution {resolution_for(size)}), or give a smaller --input-size",
        )


def require_extractor(context: Context, needed_by: str) -> None:
    """Refuse (InputError) unless the run has a finished extractor, and a finished ``continue`` where that was begun."""
    context.rundir.require(STAGE, needed_by)
    if context.rundir.row(CONTINUE).state != "missing":
        context.rundir.require(CONTINUE, needed_by)


def load_extractor(
    context: Context, colour: str, made_by: str | None = None, precision: str = AUTO
) -> tuple[nn.Module, PretrainConfig]:
    """The run's finished extractor on the context's device, and the configuration that laid it out.

    Args:
        colour: of the data, 'rgb' or 'grey', as they declare it: decides where the run has an extractor for each.
        precision: what it is to compute in; what it was pretrained in has no say.
        made_by: 'pretrain' or 'continue'; None for the one that later stages take, the continued one if there is one.

    Raises:
        CheckpointError: the checkpoint is damaged or does not fit.
    """
    made_by = made_by or (CONTINUE if context.rundir.row(CONTINUE).result else STAGE)
    folder = context.rundir.stage_dir(made_by)
    if colour == GREY and made_by == STAGE and len(extractors_of(pretrained(context))) > 1:
        folder /= GREY
    return _network_of(checkpoint.load_finished(folder, EXTRACTOR, made_by), context, precision)


def pretrained(context: Context) -> PretrainConfig:
    """The configuration that the run's ``pretrain`` was begun with.

    Raises:
        CheckpointError: it is not one of this version.
    """
    return recorded(STAGE, context.rundir.row(STAGE).config or {})


def input_size(context: Context) -> int:
    """Side of the input of the run's extractor, in pixels; raises as ``pretrained``."""
    return input_size_of(pretrained(context))


def _network_of(
    loaded: checkpoint.Checkpoint, context: Context, precision: str
) -> tuple[nn.Module, PretrainConfig]:
    settings = loaded.entry("config", dict)
    config = recorded(STAGE, settings)
    network = build_extractor(config)
    unsaid = config.arch == "patchnet" and "layers" not in settings  # it meant one layer once
    if unsaid or loaded.meta.get("form") != form_of(network):
        raise CheckpointError(
            f"{loaded.path} is of another version of dprandp, whose features were others: form "
            f"{loaded.meta.get('form', 1)}{', of one layer' if unsaid else ''}; this version computes form "
            f"{form_of(network)}",
            fix="use the version that wrote it, or begin a new run",
        )
    load_weights(network, loaded.tensors)
    network.precision = decide(precision, context.device.type)
    return network.to(context.device).eval(), config


def synthetic_crops(context: Context, count: int, size: int, seed: int) -> Tensor:
    """Random crops of the run's synthetic images, ``size`` pixels a side.

    Returns:
        uint8 [count, 3, size, size] (fewer where there are fewer images), shuffled.
    """
    images = ImageSet(open_images(context.rundir.stage_dir("generate"), count))
    generator = torch.Generator().manual_seed(seed)
    crops = random_crops(images, size, generator)
    return crops[torch.randperm(len(crops), generator=generator)]


def _learn_beside(config: PretrainConfig, context: Context, stop: Stop) -> None:
    """Learn the second extractor into its own folder, unless it is there already."""
    folder = context.rundir.stage_dir(STAGE) / GREY
    folder.mkdir(exist_ok=True)
    done = checkpoint.resume(folder, warn=context.console.warn)
    if done is None:
        network = _learn_dictionaries(config, context, folder, stop)
    else:
        network, _ = _network_of(done, context, config.precision)
    _save(network, config, config.dictionary_iterations, None, folder)  # again: a kill may have come before its pointer


def _save(network: nn.Module, config: PretrainConfig, steps: int, loss: float | None, folder: Path) -> None:
    if (filters := first_filters(network)) is not None:
        with atomic_path(folder / FILTERS) as temporary:
            Image.fromarray(filter_sheet(filters.cpu().numpy())).save(temporary, format="PNG")
    meta = {"config": as_dict(config), "steps": steps, "loss": loss, "form": form_of(network)}
    checkpoint.save(folder, EXTRACTOR, network.state_dict(), meta, keep=1)


def _learn_dictionaries(config: PretrainConfig, context: Context, folder: Path, stop: Stop) -> nn.Module:
    log = MetricsLog(folder / "metrics.jsonl", 0)
    generator = _generator(config)
    crops = synthetic_crops(context, config.dictionary_patches, input_size_of(config), config.seed)
    crops = colour_mode(crops, config.colour)
    network = build_extractor(config)
    passes = config.dictionary_iterations * (2 * config.layers - 1)
    with context.console.progress(passes, f"dictionary passes ({config.colour})") as progress:

        def on_iteration(iteration: int, similarity: float) -> None:
            log.write(step=iteration + 1, similarity=similarity)
            progress.advance(1)
            stop.raise_if_requested()  # nothing to save half-way: a rerun repeats it

        dictionary.learn(
            network.chain, crops, config.dictionary_patches, config.dictionary_iterations, generator, on_iteration
        )
    return network.to(context.device)


def _evaluation(network: nn.Module, config: PretrainConfig, context: Context) -> Measures:
    images = held_out_images(context)
    if not len(images):
        return Measures(**dict.fromkeys(MEASURES))
    return evaluate(network, images, _generator(config))


def _generator(config: PretrainConfig) -> torch.Generator:
    return torch.Generator().manual_seed(config.seed)
