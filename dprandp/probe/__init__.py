"""Phase II: a linear head on frozen features, fitted with DP-SGD.

    statistics/whitener.safetensors   statistics of *synthetic* features (public)
    step-NNNNNN.safetensors           the head and its momentum, for resuming (removed when the training is done)
    head.safetensors                  the released head
    metrics.jsonl                     norms of the noisy updates: functions of what is released anyway

Private pixels pass through the frozen extractor once, each image independently; their features stay in ``private/``.
Only results of ``PrivateMechanism`` leave the stage.
"""

from __future__ import annotations

import time

import torch
from torch import Tensor, nn

from dprandp.config.schema import ProbeConfig
from dprandp.data import DataSpec
from dprandp.dpsgd import release
from dprandp.dpsgd.features import WHITENER, private_features, public_whitener, whitener_of
from dprandp.dpsgd.stage import PrivateStage, begin_on_all_ranks, budget_share, open_private_stage
from dprandp.losses import class_weights
from dprandp.models import whitening
from dprandp.models.classifier import Classifier
from dprandp.pretrain import EXTRACTOR_STAGES, load_extractor, require_extractor
from dprandp.probe.head import HEAD, HeadSettings, default_lr, fit_head
from dprandp.runs import checkpoint
from dprandp.runs.checkpoint import check_tensors
from dprandp.runs.context import Context, with_precision
from dprandp.runs.results import GenerateResult, PretrainResult, ProbeResult
from dprandp.runs.signals import graceful_stop
from dprandp.runs.tuning import elsewhere, tuning_of
from dprandp.vision.images import colour_of

STAGE = "probe"
WHITENER_FILE = f"statistics/{WHITENER}.safetensors"


def run(config: ProbeConfig, context: Context) -> ProbeResult | None:
    """Fit the head and write the model; None on ranks other than rank 0.

    Raises:
        InputError: no extractor yet, or unusable data. BudgetError: the budget does not allow it (no pixel was read).
    """
    ranks = context.ranks
    begun = begin_on_all_ranks(STAGE, context, lambda: _opened(config, context))
    if begun is None:
        return context.rundir.result(ProbeResult) if ranks.is_first else None
    stage, config = begun
    started = time.perf_counter()
    stage = stage.fix_plan()
    spec, plan = stage.spec, stage.plan

    extractor, mirror, whitener = public_part(config, context, spec)
    if warning := colour_warning(extractor.built_from.colour, spec):
        context.console.warn(warning)
    if ranks.is_first:
        whitener = _keep_whitener(context, whitener, extractor)
    model = Classifier(extractor, whitener, len(spec.classes)).to(context.device)
    before = release.tensors_of(model)

    # ------------------------------------------------------------------------ private: features, then nothing but noise
    features, labels = private_features(
        stage, extractor, whitener, mirror=mirror, views=plan.views, seed=config.seed
    )
    lr = config.lr or default_lr(stage.epsilon_alone, plan.delta, plan.examples, config.steps, plan.clip_norm)

    def fitted() -> int:
        weights = class_weights(spec.class_shares, spec.multi_label)
        settings, folder = HeadSettings(lr, config.momentum, config.released, weights), context.rundir.stage_dir(STAGE)
        with graceful_stop() as stop:
            start = torch.zeros_like(model.head)
            head, updates = fit_head(stage, features, labels, start, settings, folder, stop)
        model.head.data.copy_(head)
        return updates

    updates = ranks.first(fitted)

    # -------------------------------------------------------------------------------------------------- test, once; out
    measured = release.evaluate(model, stage, mirror, keep=True)
    release.refuse_changed(before, model, {HEAD})
    if measured is None:
        return None
    settings = {"lr": lr, "steps": config.steps, "dims": config.dims}
    tuned = tuning_of(context.rundir, stage.ledger, plan.delta, settings)
    here = tuned is not None and config.tuned_on == elsewhere(tuned.on)  # the run's own tuned.toml
    result = ProbeResult(
        stage=STAGE,
        **vars(measured),
        **vars(stage.disclosure(updates)),
        share=budget_share(config),
        lr=lr,
        momentum=config.momentum,
        released=config.released,
        mirror=mirror,
        precision=config.precision,
        extractor_colour=extractor.built_from.colour,
        tuned=tuned,
        tuned_on=None if here else config.tuned_on,
        seconds=release.coarse_seconds(started),
    )
    result = release.write_model(stage, model, result)
    stage.finish([f"{HEAD}.safetensors", WHITENER_FILE], result)
    return result


def _opened(config: ProbeConfig, context: Context) -> tuple[PrivateStage, ProbeConfig, dict[str, str]]:
    require_extractor(context, STAGE)
    for made in (GenerateResult, PretrainResult):  # for the model card: refuses gaps before charging
        context.rundir.result(made)
    config = with_precision(STAGE, config, context)
    return open_private_stage(STAGE, config, context), config, context.rundir.inputs_from(*EXTRACTOR_STAGES)


def public_part(
    config: ProbeConfig, context: Context, spec: DataSpec
) -> tuple[nn.Module, bool, whitening.Whitener]:
    """The run's extractor, whether images are averaged with their mirror images, and the whitener."""
    extractor, _ = load_extractor(context, colour_of(spec.channels), precision=config.precision)
    mirror = spec.flip_ok if config.mirror is None else config.mirror
    return extractor, mirror, public_whitener(config, context, extractor, mirror, spec)


def colour_warning(colour: str, spec: DataSpec) -> str | None:
    """The warning for an extractor that has only seen images of the other colour; None if it fits the data."""
    data = colour_of(spec.channels)
    if colour in ("both", data):
        return None
    return (
        f"this extractor was learned from {colour} images, and {spec.name} declares {data} ones, so accuracy is lower; "
        f"`dprandp pretrain --colour {data}`, or such a prior (`dprandp priors`), fits better"
    )


def load_whitener(context: Context, extractor: nn.Module) -> whitening.Whitener:
    """The whitener of a finished probe, for the run's extractor."""
    folder = context.rundir.stage_dir(STAGE) / "statistics"
    return whitener_of(checkpoint.load_finished(folder, WHITENER, STAGE), extractor)


def load_head(context: Context, like: Tensor) -> Tensor:
    """The released head of a finished probe, float32 [dims, classes], of the shape and type of ``like``."""
    loaded = checkpoint.load_finished(context.rundir.stage_dir(STAGE), HEAD, STAGE)
    check_tensors(loaded.tensors, {HEAD: like}, loaded.path)
    return loaded.tensors[HEAD]


def _keep_whitener(context: Context, whitener: whitening.Whitener, extractor: nn.Module) -> whitening.Whitener:
    """The probe's own copy of the whitener, or its copy from before a stop."""
    own = context.rundir.stage_dir(STAGE) / "statistics"
    own.mkdir(exist_ok=True)
    if checkpoint.latest(own) != WHITENER:
        checkpoint.save(own, WHITENER, whitener.state_dict(), {}, keep=1)
    return load_whitener(context, extractor)
