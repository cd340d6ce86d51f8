"""Phase III: train all parameters with DP-SGD, on the remaining budget; or from scratch (De et al. 2022), or Phases II
and III in one training (``--from pretrain``, Tang et al. 2023), whose first steps train the head and the last norm.

    step-NNNNNN.safetensors   parameters, momentum and EMA, for resuming (removed when the training is done)
    model.safetensors         the tuned parameters (EMA)
    refit/                    the head fitted once more on the tuned features, where the recipe says so
    metrics.jsonl             norms of the noisy updates: functions of what is released anyway

One loop for every architecture: Poisson batch -> clipped sum (``clipped_sums.py``; of several ranks each adds its
share, and rank 0 does the rest) -> noise -> step. The extractor's parameters are trained as θ = s φ, s a public factor.

Where steps on the whole network are expensive and few (patchnet on a CPU), most of the budget is better spent on a
*refit*: cheap full-batch steps of the head on the features of the tuned extractor, from the head of the joint training.

Networks without Phase I start with random weights (De et al. 2022), or with public weights from a file.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from dprandp import probe
from dprandp.config.presets import PRETRAINED, Recipe, note, recipe_for
from dprandp.config.schema import (
    PATCHNET,
    WITHOUT_PHASE_ONE,
    FinetuneConfig,
    PretrainConfig,
    ProbeConfig,
    is_backbone,
    public_arch,
)
from dprandp.dpsgd import masks as masking
from dprandp.dpsgd import release
from dprandp.dpsgd.clipped_sums import (
    ClippedSums,
    SumSettings,
    refuse_without_gradients,
    share_of,
    steps_on_all,
    unscaled,
)
from dprandp.dpsgd.features import private_features
from dprandp.dpsgd.masks import EXTRACTOR
from dprandp.dpsgd.stage import PrivateStage, begin_on_all_ranks, open_private_stage
from dprandp.dpsgd.units import unit_rows
from dprandp.errors import UsageError
from dprandp.losses import class_weights
from dprandp.models.classifier import Classifier
from dprandp.models.extractor import (
    NF_RESNET,
    add_weights,
    build_extractor,
    layout_device,
    replaced_in,
    without_projection,
)
from dprandp.models.optimizers import Optimizer, OptimizerSettings, restore
from dprandp.models.torchvision import with_code
from dprandp.models.whitening import PooledOnly
from dprandp.pretrain import load_extractor, pretrained
from dprandp.pretrain.weights import declared_weights, load_public_weights, say_what_was_loaded, weights_hash
from dprandp.privacy.adaptive import Stage
from dprandp.privacy.clipping import refuse_cross_example_layers
from dprandp.privacy.mechanism import PrivateMechanism
from dprandp.probe.head import HEAD, HeadSettings, default_lr, fit_head
from dprandp.runs import checkpoint, faults
from dprandp.runs.checkpoint import check_tensors
from dprandp.runs.console import MetricsLog
from dprandp.runs.context import Context, with_precision
from dprandp.runs.parallel import RankError, RankLostError
from dprandp.runs.results import FinetuneResult, GenerateResult, PretrainResult, ProbeResult, Refit, Tuned
from dprandp.runs.signals import Stop, graceful_stop
from dprandp.runs.tuning import tuning_of
from dprandp.vision.images import colour_of, to_input

STAGE = "finetune"
MODEL = "model"
REFIT = {"sample_rate": 1.0, "clip_norm": ProbeConfig.clip_norm}
"""The mechanism of the refit, without its steps and noise."""


def run(config: FinetuneConfig, context: Context) -> FinetuneResult | None:
    """Train every parameter and write the model; None on ranks other than rank 0.

    Raises:
        InputError: no probe yet, or unusable data. BudgetError: nothing is left (no pixel was read).
        UsageError: the network has a layer that mixes examples, or options contradict each other.
    """
    ranks = context.ranks
    begun = begin_on_all_ranks(STAGE, context, lambda: _opened(config, context))
    if begun is None:
        return context.rundir.result(FinetuneResult) if ranks.is_first else None
    stage, config = begun  # the recorded one, after --resume
    arch, recipe, refit_steps = choices(config, context)
    started = time.perf_counter()
    alone = without_phase_one(config)
    if config.source == PRETRAINED:
        model, mirror = _pretrained_model(config, stage), False
    else:
        model, mirror = (_start_alone(config, stage), False) if alone else _probed_model(config, stage)
    refuse_cross_example_layers(model)
    before = release.tensors_of(model.to(context.device))
    chosen = masking.chosen(config, model.to(context.device))
    stage = stage.fix_plan()  # after whatever may be refused
    lr = config.lr or recipe.lr
    scale = recipe.extractor_scale if config.extractor_scale is None else config.extractor_scale
    with graceful_stop() as stop:
        parameters, updates, trained_weights = _train(config, stage, model, *chosen, lr, scale, stop)
        trained = masking.merged(dict(model.named_parameters()), parameters)
        model.load_state_dict(trained, strict=False)
        refit = _refit(stage, model, refit_steps, mirror, stop) if refit_steps else None
    measured = release.evaluate(model, stage, mirror, keep=False)
    release.refuse_changed(before, model, {*trained, HEAD} if refit_steps else trained)
    if measured is None:
        return None
    optimizer, guarantee = _optimizer_of(config), stage.disclosure(updates)
    if refit:
        guarantee = replace(guarantee, epsilon_target=stage.budget.epsilon)
    tuned, tuned_on = _tuning(config, stage)
    result = FinetuneResult(
        stage=STAGE,
        **vars(measured),
        **vars(guarantee),
        refit=refit,
        source=config.source,
        arch=public_arch(arch),
        lr=lr,
        momentum=optimizer.beta,
        clipping=config.clipping,
        trained_weights=trained_weights,
        optimizer=optimizer.in_words(),
        recipe=note(vars(config), arch),
        head_steps=config.head_steps or None,
        head_lr=(config.head_lr or lr) if config.head_steps else None,
        **declared_weights(config),
        extractor_scale=scale,
        released=f"EMA, decay {config.ema}",
        mirror=mirror,
        precision=config.precision,
        tuned=tuned,
        tuned_on=tuned_on,
        seconds=release.coarse_seconds(started),
    )
    result = release.write_model(stage, model, result)
    outputs = [f"{MODEL}.safetensors"] + ([f"refit/{HEAD}.safetensors"] if refit else [])
    stage.finish(outputs, result)
    return result


def _opened(config: FinetuneConfig, context: Context) -> tuple[PrivateStage, FinetuneConfig, dict[str, str]]:
    stage = open_stage(config, context)
    config = with_precision(STAGE, config, context)
    if without_phase_one(config):
        return stage, with_code(config), weights_hash(config.init)
    before = ("generate", "pretrain", "continue") + (() if config.source == PRETRAINED else ("probe",))
    return stage, config, context.rundir.inputs_from(*before)


def open_stage(
    config: FinetuneConfig,
    context: Context,
    *,
    write: bool = True,
    arch: str | None = None,
    planned: Sequence[Stage] = (),
) -> PrivateStage:
    """Plan the joint training from public facts.

    Args:
        write: False for ``--plan``: nothing is created.
        arch: of an extractor that is itself only planned; no probe is then required.
        planned: see ``open_private_stage``.

    Raises:
        As ``open_private_stage``; InputError: no probe yet; UsageError: an architecture that scratch cannot train.
    """
    masking.rule_of(config)  # refuses options that contradict each other
    network = network_config(config) if without_phase_one(config) else None
    if network is None and arch is None:
        context.rundir.require("pretrain" if config.source == PRETRAINED else "probe", STAGE)
        network = pretrained(context) if config.train else None
    if network is not None:  # refuses one that cannot be built, or has nothing of what --train names
        with layout_device(network.arch):
            extractor = build_extractor(network)
            extractor = without_projection(extractor) if config.source == PRETRAINED else extractor
            masking.choose_parameters(config, Classifier(extractor, PooledOnly(extractor.feature_dim), 2))
    arch, recipe, refit_steps = choices(config, context, arch)
    if (said := note(vars(config), arch)) is not None:
        context.console.say(f"recipe {said}")
    return open_private_stage(
        STAGE,
        config,
        context,
        steps=config.steps or recipe.steps,
        batch_part=recipe.batch_part,
        budget_part=1 - config.refit_part if refit_steps else 1.0,
        write=write,
        planned=planned,
    )


def choices(config: FinetuneConfig, context: Context, planned: str | None = None) -> tuple[str, Recipe, int]:
    """The architecture (``planned``, where the extractor is not made yet), its recipe, and the refit steps (or 0)."""
    arch = config.arch if without_phase_one(config) else planned
    if arch is None:
        for earlier in (GenerateResult,) if config.source == PRETRAINED else (GenerateResult, ProbeResult):
            context.rundir.result(earlier)  # refuses gaps before anything is charged
        arch = context.rundir.result(PretrainResult).arch
    if config.source == PRETRAINED and arch == PATCHNET:
        raise UsageError(
            "--from pretrain trains a network on its own features, and those of a patchnet need the probe's whitening",
            fix="give --from probe (at size paper --recipe ours), or pretrain a network, such as --arch wrn-16-4",
        )
    recipe = recipe_for(arch, config.source)
    return arch, recipe, recipe.refit_steps if config.refit_steps is None else config.refit_steps


def _optimizer_of(config: FinetuneConfig) -> OptimizerSettings:
    return OptimizerSettings(config.optimizer or "sgd", config.momentum)


def _tuning(config: FinetuneConfig, stage: PrivateStage) -> tuple[Tuned | None, str | None]:
    """``tuned`` and ``tuned_on`` of the probe's head, if the stage starts from it; this stage itself has none."""
    rundir = stage.context.rundir
    if config.source == "probe":
        probed = rundir.result(ProbeResult)
        return probed.tuned, probed.tuned_on
    return tuning_of(rundir, stage.ledger, stage.plan.delta, {}), None


def _probed_model(config: FinetuneConfig, stage: PrivateStage) -> tuple[Classifier, bool]:
    context, spec = stage.context, stage.spec
    extractor, _ = load_extractor(context, colour_of(spec.channels), precision=config.precision)
    model = Classifier(extractor, probe.load_whitener(context, extractor), len(spec.classes))
    model.head.data.copy_(probe.load_head(context, model.head))
    return model, context.rundir.result(ProbeResult).mirror


def _pretrained_model(config: FinetuneConfig, stage: PrivateStage) -> Classifier:
    """The extractor of Phase I, without a projection, with a head of zeros and no whitening."""
    extractor, _ = load_extractor(stage.context, colour_of(stage.spec.channels), precision=config.precision)
    extractor = without_projection(extractor)
    return Classifier(extractor, PooledOnly(extractor.feature_dim), len(stage.spec.classes))


def _start_alone(config: FinetuneConfig, stage: PrivateStage) -> Classifier:
    model, left_out = start_model(config, len(stage.spec.classes))
    say_what_was_loaded(config, left_out, stage.context.console)
    if replaced := replaced_in(model.extractor):
        stage.context.console.say(f"replaced: {replaced}")
    return model


def _train(
    config: FinetuneConfig,
    stage: PrivateStage,
    model: Classifier,
    trained: masking.Trained,
    rule: masking.MaskRule | None,
    lr: float,
    scale: float,
    stop: Stop,
) -> tuple[dict[str, Tensor], int, str]:
    """The joint training of what ``masking.chosen`` chose; a scale of 0 freezes the extractor.

    Returns:
        The released parameters by name, the number of updates they have seen, and which weights were trained, in words.
    """
    context, plan = stage.context, stage.plan
    ranks, device, folder = context.ranks, context.device, context.rundir.stage_dir(STAGE)

    # ------------------------------------------------------------------------------------- public: what is trained, how
    trained_weights = trained.words
    start = trained.start(model, config.seed)
    if scale == 0:
        start = {name: value for name, value in start.items() if not name.startswith(EXTRACTOR)}
    masks: masking.Masks = {}
    if rule is not None:
        masks = rule.choose(start, 0)
        trained_weights = rule.in_words(masks)
        if rule.zero:
            masking.apply(masks, start)
    parameters = {name: _scaled(name, value, scale) for name, value in start.items()}
    average = {name: value.clone() for name, value in parameters.items()}
    optimizer = Optimizer(_optimizer_of(config), parameters)
    state = {f"parameters.{name}": value for name, value in parameters.items()} | optimizer.state
    state |= {f"ema.{name}": value for name, value in average.items()}
    state |= {f"mask.{name}": mask for name, mask in masks.items()}  # select's masks depend on earlier parameters

    # ----------------------------------------------------------------------------------------- an earlier part of it
    first_step, ledger_head = 0, None
    saved = checkpoint.resume(folder, warn=context.console.warn) if ranks.is_first else None
    ended = saved is not None and saved.name == MODEL  # stopped between the last step and the end of the stage
    updates = ranks.first(lambda: saved.entry("updates", int) if ended else None)
    if updates is not None:
        released = saved.tensors if ended else {name: value.cpu() for name, value in start.items()}
        check_tensors(released, parameters, folder / f"{MODEL}.safetensors")
        ranks.broadcast(released[name] for name in start)
        return released, updates, trained_weights
    if saved is not None:
        check_tensors(saved.tensors, state, saved.path)
        restore(state, saved.tensors)
        first_step, ledger_head = saved.entry("step", int), saved.entry("ledger", str)

    split = stage.dataset.train()
    images = to_input(split.images, model.extractor.input_size).to(device)
    labels = torch.from_numpy(split.labels).to(device)
    settings = SumSettings(
        scale=scale,
        views=plan.views,
        seed=config.seed,
        flip=stage.spec.flip_ok,
        clip_norm=plan.clip_norm,
        automatic=config.clipping == "automatic",
        class_shares=stage.spec.class_shares,
        multi_label=stage.spec.multi_label,
        precise=plan.noise == "discrete",
        microbatch=context.microbatch,
        frozen_first=trained.first,
        adapters=trained.rank > 0,
    )
    ranks.refuse_different("model and settings", lambda: _digest(model, settings))
    refuse_without_gradients(model, settings, parameters)
    sums, rows = ClippedSums(model, settings), unit_rows(stage.dataset)
    head_steps, head_alone = config.head_steps or 0, masking.after_the_blocks(model)
    first_sums = ClippedSums(model, replace(settings, frozen_first=head_alone.first)) if head_steps else sums

    def begin() -> tuple[MetricsLog, PrivateMechanism]:
        return MetricsLog(folder / "metrics.jsonl", first_step), stage.mechanism(first_step, ledger_head)

    def save(done: int) -> None:
        checkpoint.save(folder, f"step-{done:06d}", state, {"step": done, "ledger": stage.keep_head()})

    log, mechanism = ranks.first(begin, told=lambda made: [None, None])
    done = first_step
    try:
        note = stage.spent_note if ranks.is_first else str
        with context.console.progress(plan.steps, "finetune steps", done=first_step, note=note) as progress:
            for step in steps_on_all(ranks, mechanism.steps() if ranks.is_first else ()):
                # ------------------------------------------------------------------------- private: a clipped sum
                if ranks.is_first and rule is not None and rule.due(step.number):
                    for name, mask in rule.choose(parameters, step.number).items():
                        masks[name].copy_(mask)
                share = share_of(ranks, step.indices, images, labels, rows)
                begins = step.number < head_steps
                own = {name: value for name, value in parameters.items() if not begins or head_alone.trains(name)}
                clipped = (first_sums if begins else sums).over_ranks(ranks, own, step.number, share, masks)
                if not ranks.is_first:
                    continue
                # -------------------------------------------------------- from here on: post-processing of noise
                update = step.release(clipped)
                if masks:
                    masking.apply(masks, update)
                if config.clipping == "rescaled":
                    update = {name: value / plan.clip_norm for name, value in update.items()}
                optimizer.step(update, (config.head_lr or lr) if begins else lr, masks)
                decay = min(config.ema, (1 + step.number) / (10 + step.number))
                for name, value in average.items():
                    value.lerp_(parameters[name], 1 - decay)
                faults.point("update-applied")
                update_norm = torch.stack([u.norm() for u in update.values()]).norm()
                norms = torch.stack([update_norm, parameters["head"].norm()]).tolist()  # a device is waited for once
                log.write(step=step.number, update_norm=norms[0], weight_norm=norms[1])
                progress.advance(1)
                done = step.number + 1
                due = done % config.checkpoint_every == 0 or mechanism.remaining_steps == 0
                stop.end_step(due, partial(save, done))
    except (RankError, RankLostError):
        if ranks.is_first and done > first_step:  # the step is charged but lost; save the updates before it
            save(done)
        raise
    released = {}
    for name, value in start.items():  # keep unchanged values exactly: s may round
        mean = average[name]
        released[name] = torch.where(mean == _scaled(name, value, scale), value, unscaled(name, mean, scale)).cpu()
    updates = ranks.first(lambda: mechanism.next_step)
    if ranks.is_first:
        checkpoint.save(folder, MODEL, released, {"updates": updates}, keep=1)
    ranks.broadcast(released.values())
    return released, updates, trained_weights


def _digest(model: Classifier, settings: SumSettings) -> str:
    digest = hashlib.sha256(repr(settings).encode())
    for module in (model.extractor, model.whitener):
        add_weights(digest, module)
    return digest.hexdigest()


def _scaled(name: str, value: Tensor, scale: float) -> Tensor:
    return value / (scale if name.startswith(EXTRACTOR) else 1)


def _refit(stage: PrivateStage, model: Classifier, steps: int, mirror: bool, stop: Stop) -> Refit | None:
    """Fit the head once more, full batch, on the tuned features, with the remaining budget.

    None on ranks other than rank 0.
    """
    ranks, folder = stage.context.ranks, stage.context.rundir.stage_dir(STAGE) / "refit"
    if ranks.is_first:
        folder.mkdir(exist_ok=True)
    further = ranks.first(lambda: stage.following(f"{STAGE}.{HEAD}", steps=steps, **REFIT), told=lambda made: None)
    features, labels = private_features(stage, model.extractor, model.whitener, mirror=mirror, views=1, seed=0)

    def fitted() -> Refit:
        plan = further.plan
        lr = default_lr(further.epsilon_alone, plan.delta, plan.examples, steps, plan.clip_norm)
        weights = class_weights(stage.spec.class_shares, stage.spec.multi_label)
        settings = HeadSettings(lr, momentum=0.9, released="average", class_weights=weights)
        head, updates = fit_head(further, features, labels, model.head.detach(), settings, folder, stop)
        model.head.data.copy_(head)
        return Refit(
            noise_multiplier=plan.noise_multiplier,
            sample_rate=plan.sample_rate,
            steps=plan.steps,
            lost_steps=further.ledger.charged_steps(further.name, further.attempt) - updates,
            clip_norm=plan.clip_norm,
            lr=lr,
            momentum=settings.momentum,
        )

    return ranks.first(fitted, told=lambda made: None)


# --------------------------------------------------------------------------------------------- networks without Phase I


def without_phase_one(config: FinetuneConfig) -> bool:
    """Whether a fine-tune starts from neither probe nor pretraining."""
    return config.source in WITHOUT_PHASE_ONE


def network_config(config: FinetuneConfig) -> PretrainConfig:
    """The extractor of such a fine-tune; UsageError for an architecture or a setting that it cannot have."""
    elsewhere = is_backbone(config.arch)
    if not config.arch.startswith("wrn-") and config.arch != NF_RESNET and not elsewhere:
        raise UsageError(
            f"--from {config.source} cannot train {config.arch!r}",
            fix=f"use --arch wrn-16-4 or another wrn, {NF_RESNET}, torchvision:NAME or module:FILE.py:NAME",
        )
    order = {} if config.layer_order is None else {"layer_order": config.layer_order}
    if not config.arch.startswith("wrn-") and (order or config.padding):
        raise UsageError(f"{config.arch} has one layer order and padding", fix="leave --layer-order and --padding out")
    if elsewhere and config.pooling:
        raise UsageError(f"{config.arch} pools in its own way", fix="leave --pooling out")
    if not elsewhere and config.norm:
        raise UsageError(f"{config.arch} has no BatchNorm to replace", fix="leave --norm out")
    same = ("arch", "seed", "padding", "pooling", "precision", "input_size", "init", "init_source", "norm", "code")
    return PretrainConfig(**{key: getattr(config, key) for key in same}, **order)


def start_model(config: FinetuneConfig, classes: int) -> tuple[Classifier, list[str]]:
    """The classifier before its first step, on the CPU: no whitening, a head of zeros; and the names of the file's
    tensors that were left out (none from scratch). Raises as ``network_config`` and ``load_public_weights``."""
    generator = torch.Generator().manual_seed(config.seed)
    extractor = build_extractor(network_config(config), generator)
    left_out = [] if config.init is None else load_public_weights(Path(config.init), extractor, config.arch)
    return Classifier(extractor, PooledOnly(extractor.feature_dim), classes), left_out
