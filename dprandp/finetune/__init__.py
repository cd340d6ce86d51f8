"""Phase III: train all parameters with DP-SGD, on the remaining budget; or from scratch (De et al. 2022).

    step-NNNNNN.safetensors   parameters, momentum and EMA, for resuming (removed when the training is done)
    model.safetensors         the tuned parameters (EMA)
    refit/                    the head fitted once more on the tuned features, where the recipe says so
    metrics.jsonl             norms of the noisy updates: functions of what is released anyway

One loop for every architecture: Poisson batch -> clipped sum (``clipped_sums.py``; of several ranks each adds its
share, and rank 0 does the rest) -> noise -> step. The extractor's parameters are trained as θ = s φ, s a public factor.

Where steps on the whole network are expensive and few (patchnet on a CPU), most of the budget is better spent on a
*refit*: cheap full-batch steps of the head on the features of the tuned extractor, from the head of the joint training.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from dprandp import probe
from dprandp.config.presets import Recipe, note, recipe_for
from dprandp.config.schema import FinetuneConfig, ProbeConfig, as_dict
from dprandp.dpsgd import masks as masking
from dprandp.dpsgd import release
from dprandp.dpsgd.clipped_sums import ClippedSums, SumSettings, share_of, steps_on_all, unscaled
from dprandp.dpsgd.features import private_features
from dprandp.dpsgd.masks import FrozenBlocks, choose_blocks
from dprandp.dpsgd.optimizers import Optimizer, OptimizerSettings
from dprandp.dpsgd.stage import PrivateStage, on_all_ranks, open_private_stage
from dprandp.dpsgd.units import unit_rows
from dprandp.finetune import start as scratch
from dprandp.finetune.start import init_hash
from dprandp.models.classifier import Classifier
from dprandp.models.extractor import add_weights
from dprandp.models.optimizers import restore
from dprandp.pretrain import load_extractor
from dprandp.privacy.adaptive import Stage
from dprandp.privacy.clipping import refuse_cross_example_layers
from dprandp.privacy.mechanism import PrivateMechanism
from dprandp.probe.head import HEAD, HeadSettings, default_lr, fit_head
from dprandp.runs import checkpoint, faults
from dprandp.runs.checkpoint import check_tensors
from dprandp.runs.console import MetricsLog
from dprandp.runs.context import Context, recorded, with_precision
from dprandp.runs.parallel import RankError, RankLostError
from dprandp.runs.results import refuse_gaps
from dprandp.runs.signals import Stop, graceful_stop
from dprandp.runs.tuning import tuning_of
from dprandp.vision.images import colour_of, to_input

# -------------------------------------------------------------------------------------------------------- update facts
#
# The processing of a fine-tune's noisy sums, as its disclosure shows it.


def settings_of(config: FinetuneConfig) -> OptimizerSettings:
    """The optimizer of a configuration.

    Raises:
        UsageError: values out of range.
    """
    return OptimizerSettings(config.optimizer or "sgd", config.momentum)


def update_facts(config: FinetuneConfig, trained_weights: str) -> dict[str, Any]:
    """Part of the result.

    Args:
        config: the run's.
        trained_weights: which weights were trained, in words.

    Returns:
        momentum, clipping, trained_weights, optimizer; recipe, where one was used; for public weights init_sha256 and
        init_source.
    """
    settings = settings_of(config)
    facts = {
        "momentum": settings.beta,
        "clipping": config.clipping,
        "trained_weights": trained_weights,
        "optimizer": settings.in_words(),
    }
    if config.recipe is not None:
        facts["recipe"] = note(config.recipe, config.arch, config.source, config.epsilon)
    if config.init is not None:
        facts |= {"init_sha256": init_hash(config)["public weights"], "init_source": config.init_source}
    return facts


STAGE = "finetune"
MODEL = "model"
REFIT = {"sample_rate": 1.0, "clip_norm": ProbeConfig.clip_norm}
"""The mechanism of the refit, without its steps and noise."""


def run(config: FinetuneConfig, context: Context) -> dict:
    """Train every parameter and write the model.

    Returns:
        The keys of ``release.evaluate``, ``PrivateStage.disclosure`` and ``update_facts``, and stage, source, arch, lr,
        extractor_scale, released, mirror, tuned, tuned_on, seconds. On another rank than rank 0 nothing ({}).

    Raises:
        InputError: no probe yet, or unusable data. BudgetError: nothing is left (no pixel was read).
        UsageError: the network has a layer that mixes examples, or options contradict each other.
    """
    ranks = context.ranks
    begun = on_all_ranks(STAGE, context, lambda: _begin(config, context))
    if begun is None:
        return context.rundir.result(STAGE) if ranks.is_first else {}
    stage, config = begun  # the recorded one, after --resume
    alone = scratch.without_phase_one(config)
    arch, recipe, refit_steps = choices(config, context)
    started = time.perf_counter()
    start = _start_alone(config, stage) if alone else None  # refuses a file before charging
    stage.fix_plan()
    model, mirror = (start, False) if start is not None else _probed_model(config, context, stage)
    model = model.to(context.device)
    refuse_cross_example_layers(model)
    lr = config.lr or recipe.lr
    scale = recipe.extractor_scale if config.extractor_scale is None else config.extractor_scale
    with graceful_stop() as stop:
        parameters, updates, trained_weights = _train(config, stage, model, lr, scale, stop)
        model.load_state_dict(parameters, strict=False)
        refit = _refit(stage, model, refit_steps, mirror, stop) if refit_steps else None
    measured = release.evaluate(model, stage, mirror, keep=False)
    if not ranks.is_first:
        return {}
    result = {
        "stage": STAGE,
        **measured,
        **stage.disclosure(updates),
        **({"epsilon_target": stage.budget.epsilon} if refit else {}),
        "refit": refit,
        "source": config.source,
        "arch": arch,
        "lr": lr,
        **update_facts(config, trained_weights),
        "extractor_scale": scale,
        "released": f"EMA, decay {config.ema}",
        "mirror": mirror,
        "precision": config.precision,
        **_tuning(config, stage),
        "seconds": round(time.perf_counter() - started, 2),
    }
    release.write_model(stage, model, result)
    outputs = [f"{MODEL}.safetensors"] + ([f"refit/{HEAD}.safetensors"] if refit else [])
    stage.finish(outputs, result)
    return result


def _begin(config: FinetuneConfig, context: Context) -> tuple[PrivateStage, FinetuneConfig] | None:
    """Plan the stage and begin it in the run directory: with its recorded configuration; None if it is done."""
    alone = scratch.without_phase_one(config)
    stage = open_stage(config, context)
    config = with_precision(STAGE, config, context, choices(config, context)[0])
    begun = context.rundir.begin(
        STAGE,
        as_dict(config),
        scratch.init_hash(config)
        if alone
        else context.rundir.inputs_from("generate", "pretrain", "continue", "probe"),
        resume=context.resume,
        overwrite=context.overwrite,
        private_inputs=stage.private_inputs(),
    )
    return None if begun.action == "skip" else (stage, recorded(STAGE, begun.config))


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
    settings_of(config)
    if scratch.without_phase_one(config):
        scratch.network_config(config)
    elif arch is None:
        context.rundir.require("probe", STAGE)
    if (said := note(config.recipe, config.arch, config.source, config.epsilon)) is not None:
        context.console.say(f"recipe {said}")
    _, recipe, refit_steps = choices(config, context, arch)
    return open_private_stage(
        STAGE,
        config,
        context,
        steps=recipe.steps,
        batch_part=recipe.batch_part,
        budget_part=1 - config.refit_part if refit_steps else 1.0,
        write=write,
        planned=planned,
    )


def _tuning(config: FinetuneConfig, stage: PrivateStage) -> dict:
    """The tuning of the probe's head, if the stage starts from it; this stage itself has none."""
    rundir = stage.context.rundir
    if not scratch.without_phase_one(config):
        return {key: rundir.result("probe").get(key) for key in ("tuned", "tuned_on")}
    return {"tuned": tuning_of(rundir, stage.ledger, stage.plan.delta, {}), "tuned_on": None}


def choices(config: FinetuneConfig, context: Context, planned: str | None = None) -> tuple[str, Recipe, int]:
    """The architecture (``planned``, where the extractor is not made yet), its recipe, and the refit steps (or 0)."""
    arch = config.arch if scratch.without_phase_one(config) else planned
    if arch is None:
        results = {earlier: context.rundir.result(earlier) for earlier in ("generate", "pretrain", "probe")}
        for earlier, result in results.items():  # before anything is charged
            refuse_gaps(earlier, result)
        arch = results["pretrain"]["arch"]
    recipe = recipe_for(arch, config.source)
    return arch, recipe, recipe.refit_steps if config.refit_steps is None else config.refit_steps


def _probed_model(config: FinetuneConfig, context: Context, stage: PrivateStage) -> tuple[Classifier, bool]:
    extractor, _ = load_extractor(context, colour_of(stage.spec.channels), precision=config.precision)
    model = Classifier(extractor, probe.load_whitener(context, extractor), len(stage.spec.classes))
    model.head.data.copy_(probe.load_head(context, model.head))
    return model, context.rundir.result("probe")["mirror"]


def _start_alone(config: FinetuneConfig, stage: PrivateStage) -> Classifier:
    model, left_out = scratch.start_model(config, len(stage.spec.classes))
    if left_out:
        stage.context.console.say(f"of {config.init}, made for another task, left out: {', '.join(left_out)}")
    return model


def _train(
    config: FinetuneConfig, stage: PrivateStage, model: Classifier, lr: float, scale: float, stop: Stop
) -> tuple[dict[str, Tensor], int, str]:
    """The joint training; a scale of 0 freezes the extractor.

    Returns:
        The released parameters by name, the number of updates they have seen, and which weights were trained, in words.
    """
    rule = masking.rule_of(config)
    blocks: FrozenBlocks | None = None
    if rule is not None and rule.scope == "block":
        blocks, rule = choose_blocks(rule, model), None
    folder = stage.context.rundir.stage_dir(STAGE)
    device = stage.context.device
    start = {
        name: value.detach().clone()
        for name, value in model.named_parameters()
        if (scale > 0 or not name.startswith("extractor.")) and (blocks is None or blocks.trains(name))
    }
    masks = {} if rule is None else rule.choose(start, 0)
    if rule is not None and rule.zero:
        masking.apply(masks, start)
    parameters = {name: _scaled(name, value, scale) for name, value in start.items()}
    trained_weights = masking.ALL_WEIGHTS if rule is None else rule.in_words(masks)
    trained_weights = trained_weights if blocks is None else blocks.in_words()
    optimizer = Optimizer(settings_of(config), parameters)
    average = {name: value.clone() for name, value in parameters.items()}
    state = {f"parameters.{name}": value for name, value in parameters.items()} | optimizer.state
    state |= {f"ema.{name}": value for name, value in average.items()}
    state |= {f"mask.{name}": mask for name, mask in masks.items()}  # select's masks depend on earlier parameters
    ranks, first_step, ledger_head = stage.context.ranks, 0, None
    saved = checkpoint.resume(folder, warn=stage.context.console.warn) if ranks.is_first else None
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
    images, labels = to_input(split.images).to(device), torch.from_numpy(split.labels).to(device)
    settings = SumSettings(
        scale=scale,
        views=stage.plan.views,
        seed=config.seed,
        flip=stage.spec.flip_ok,
        clip_norm=stage.plan.clip_norm,
        automatic=config.clipping == "automatic",
        precise=stage.plan.noise == "discrete",
        microbatch=stage.context.microbatch,
        frozen_first=0 if blocks is None else blocks.first,
    )
    ranks.refuse_different("model and settings", lambda: _digest(model, settings))
    sums, rows = ClippedSums(model, settings), unit_rows(stage.dataset)

    def begin() -> tuple[MetricsLog, PrivateMechanism]:
        return MetricsLog(folder / "metrics.jsonl", first_step), stage.mechanism(first_step, ledger_head)

    def save(done: int) -> None:
        checkpoint.save(folder, f"step-{done:06d}", state, {"step": done, "ledger": stage.keep_head()})

    log, mechanism = ranks.first(begin, told=lambda made: [None, None])
    done = first_step
    try:
        with stage.context.console.progress(stage.plan.steps, "finetune steps", done=first_step) as progress:
            for step in steps_on_all(ranks, mechanism.steps() if ranks.is_first else ()):
                # ------------------------------------------------------------------------- private: a clipped sum
                if ranks.is_first and rule is not None and rule.due(step.number):
                    for name, mask in rule.choose(parameters, step.number).items():
                        masks[name].copy_(mask)
                share = share_of(ranks, step.indices, images, labels, None if rows is None else rows.images)
                clipped = sums.over_ranks(ranks, parameters, step.number, share, masks)
                if not ranks.is_first:
                    continue
                # -------------------------------------------------------- from here on: post-processing of noise
                update = step.release(clipped)
                masking.apply(masks, update)
                if config.clipping == "rescaled":
                    update = {name: value / stage.plan.clip_norm for name, value in update.items()}
                optimizer.step(update, lr, masks)
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
    return value / (scale if name.startswith("extractor.") else 1)


def _refit(stage: PrivateStage, model: Classifier, steps: int, mirror: bool, stop: Stop) -> dict | None:
    """Fit the head once more, full batch, on the tuned features, with the remaining budget; returns its disclosure, or
    None on ranks other than rank 0."""
    context, ranks = stage.context, stage.context.ranks
    folder = context.rundir.stage_dir(STAGE) / "refit"
    if ranks.is_first:
        folder.mkdir(exist_ok=True)
    further = ranks.first(lambda: stage.following(f"{STAGE}.{HEAD}", steps=steps, **REFIT), told=lambda made: None)
    features, labels = private_features(stage, model.extractor, model.whitener, mirror=mirror, views=1, seed=0)

    def fitted() -> dict[str, Any]:
        plan = further.plan
        lr = default_lr(further.epsilon_alone, plan.delta, plan.examples, steps, plan.clip_norm)
        settings = HeadSettings(lr, momentum=0.9, released="average")
        head, updates = fit_head(further, features, labels, model.head.detach(), settings, folder, stop)
        model.head.data.copy_(head)
        return {
            "noise_multiplier": plan.noise_multiplier,
            "sample_rate": plan.sample_rate,
            "steps": plan.steps,
            "lost_steps": further.ledger.charged_steps(further.name, further.attempt) - updates,
            "clip_norm": plan.clip_norm,
            "lr": lr,
            "momentum": settings.momentum,
        }

    return ranks.first(fitted, told=lambda made: None)
