"""``--plan``: the stages that would run, and their privacy cost, from public facts only.

No pixel is read, nothing is written, and time and memory are not estimated. A plan refuses what the stage would refuse,
as far as this can be decided without reading data.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from dprandp import continual, finetune
from dprandp.config.schema import (
    PRETRAINED,
    ContinueConfig,
    GenerateConfig,
    PretrainConfig,
    PrivateConfig,
    StageConfig,
    as_dict,
    extractors_of,
    switch_step,
)
from dprandp.continual import switching
from dprandp.dpsgd.budget import read_plan_file
from dprandp.dpsgd.stage import name_private_stage, open_private_stage
from dprandp.dpsgd.training_data import no_counts_after_a_charge, not_compared
from dprandp.errors import InputError
from dprandp.generate import blocks_of
from dprandp.generate import check as check_images
from dprandp.models.extractor import build_extractor, layout_device, refuse_unlearnable
from dprandp.models.precision import AUTO
from dprandp.priors import shipped_extractor
from dprandp.privacy.accounting import rounded_up
from dprandp.privacy.adaptive import Stage, compose_stages
from dprandp.privacy.mechanism import PrivatePlan, make_plan
from dprandp.runs.context import Context, recorded
from dprandp.runs.directory import DATA, IGNORED
from dprandp.runs.files import size_text
from dprandp.runs.results import ONE_IMAGE

Action = Literal["fresh", "resume", "skip"]
ACTIONS = {"fresh": "", "resume": " (begun before: continues)", "skip": " (finished: nothing to do)"}


@dataclass(frozen=True, kw_only=True)
class GeneratePlan:
    """Of ``generate``."""

    stage: str
    action: Action
    process: str
    count: int  # images
    resolution: int  # pixels
    seed: int
    shards: int
    disk_bytes: int  # of the pixels


@dataclass(frozen=True, kw_only=True)
class PretrainPlan:
    """Of ``pretrain``."""

    stage: str
    action: Action
    arch: str
    parameters: int
    feature_dim: int
    input_size: int  # side of the images that it sees, in pixels
    random_init: bool
    steps: int
    filters: int | None = None  # of a patchnet
    extractors: int | None = None  # of a patchnet: how many are learned
    batch_size: int | None = None  # of a network
    prior: str | None = None  # that takes the place of learning
    init: str | None = None  # so do public weights from a file


@dataclass(frozen=True, kw_only=True)
class PublicPlan:
    """Of ``continue`` without private steps."""

    stage: str
    action: Action
    data: str
    public: str  # the images
    steps: int


@dataclass(frozen=True)
class RefitPlan:
    """Of a fine-tune's second mechanism."""

    noise_multiplier: float
    sample_rate: float
    steps: int
    clip_norm: float


@dataclass(frozen=True, kw_only=True)
class PrivateStagePlan(PrivatePlan):
    """Of a private stage."""

    action: Action
    data: str
    unit: str  # of privacy, in words
    train_examples: int  # images
    split_rule: str | None  # how the splits were made, where that was declared
    labels: str | None  # what was declared about them beside the classes, in words
    decoding: str | None  # declared rules by which image files are read
    refit: RefitPlan | None
    epsilon_after: float  # the run's ε when the stage is done
    warning: str | None = None  # that N is small for ε
    missing: str | None = None  # files of the data that are not there


@dataclass(frozen=True, kw_only=True)
class ContinuePlan(PrivateStagePlan):
    """Of ``continue``."""

    public: str  # the images
    public_steps: int  # before the first private one, at least
    switch: str | None  # the rule; None if steps and noise are final, and not upper limits


Plan = GeneratePlan | PretrainPlan | PublicPlan | PrivateStagePlan


@dataclass(frozen=True, kw_only=True)
class RunPlan:
    """Of ``dprandp run``."""

    stage: str = "run"
    data: str
    examples: int  # N
    delta: float
    epsilon_after: float
    epsilon: float  # the budget
    stages: list[Plan]  # no fine-tune where the probe has the whole budget


def _line(made: Plan) -> str:
    """One stage's plan in one line."""
    action = ACTIONS[made.action]
    if isinstance(made, GeneratePlan):
        size = size_text(made.disk_bytes)
        return f"generate: {made.count} images of {made.process} at {made.resolution} px, {size}{action}"
    if isinstance(made, PretrainPlan):
        seen = f"images of {made.input_size} × {made.input_size} pixels"
        if made.prior is not None:
            return f"pretrain: the prior {made.prior} ({made.arch}, {made.feature_dim} features of {seen}){action}"
        if made.random_init or made.init:
            how = made.init or "random weights"
        elif made.filters is not None:
            both = " each for colour and for grey data" if made.extractors > 1 else ""
            how = f"{made.filters} filters{both}"
        else:
            how = f"{made.steps} steps of {made.batch_size} images"
        return f"pretrain: {made.arch}, {how}, {made.feature_dim} features of {seen}{action}"
    if isinstance(made, PublicPlan):
        return f"continue: {made.steps} steps on public images only ({made.public}), no cost in ε{action}"
    refit = made.refit
    then = "" if refit is None else f", then the head alone: T = {refit.steps}, σ = {refit.noise_multiplier:.4g}"
    size = f"N = {made.examples} units of privacy, each {made.unit}"
    if made.unit != ONE_IMAGE:
        size += f", {made.train_examples} images"
    size += "".join(f", {declared}" for declared in (made.labels, made.split_rule, made.decoding) if declared)
    noise = ", discrete noise" if made.noise == "discrete" else ""
    if isinstance(made, ContinuePlan):
        noise += ", after public ones" if made.public_steps else ""
        noise += "; T and σ are upper limits: the switch decides" if made.switch else ""
    return (
        f"{made.stage} on {made.data} ({size}): T = {made.steps} steps, "
        f"q = {made.sample_rate:.4g}, σ = {made.noise_multiplier:.4g}, C = {made.clip_norm:g}, "
        f"K = {made.views}{noise}{then}; the run's ε afterwards: {rounded_up(made.epsilon_after)} at "
        f"δ = {made.delta:g}{action}"
    )


def plan(name: str, config: StageConfig, context: Context, assumed: Mapping[str, StageConfig] | None = None) -> Plan:
    """The plan of one stage.

    Args:
        assumed: extractor and probe that a fine-tune starts from, where they are themselves only planned.

    Raises:
        As the stage, before it reads data.
    """
    if name == "generate":
        return _generate(config, context)
    if name == "pretrain":
        return _pretrain(config, context)
    if name == "continue" and config.mix == "public":
        action, config = _foreseen(name, config, context)
        data = continual.open_stage(config, context, write=False).spec.name  # whose images the public ones resemble
        return PublicPlan(stage=name, action=action, data=data, public=config.public, steps=config.steps)
    arch, events = None, []
    if assumed:
        arch = (assumed.get("pretrain") or recorded("pretrain", context.rundir.row("pretrain").config)).arch
        if "probe" in assumed:
            _, events = _private("probe", assumed["probe"], context)
    return _private(name, config, context, arch, events)[0]


def plan_run(resolve: Callable[[str, Mapping[str, StageConfig]], StageConfig], context: Context) -> RunPlan:
    """The plan of ``dprandp run``, in which each stage is planned after those before it.

    Args:
        resolve: (stage, configurations planned so far) -> configuration.
    """
    configs: dict[str, StageConfig] = {}
    plans: list[Plan] = []
    events: list[Stage] = []
    for name in ("generate", "pretrain", "probe", "finetune"):
        if name == "probe" and resolve("finetune", configs).source == PRETRAINED:
            continue
        if name == "finetune" and "probe" in configs and configs["probe"].share == 1:
            break
        configs[name] = config = _foreseen(name, resolve(name, configs), context)[1]
        if name == "generate":
            plans.append(_generate(config, context))
        elif name == "pretrain":
            plans.append(_pretrain(config, context))
        else:
            made, left = _private(name, config, context, configs["pretrain"].arch, events)
            plans.append(made)
            events.extend(left)
    last = plans[-1]
    return RunPlan(
        data=last.data,
        examples=last.examples,
        delta=last.delta,
        epsilon_after=last.epsilon_after,
        epsilon=config.epsilon,
        stages=plans,
    )


def plan_after(
    configs: Mapping[str, StageConfig], context: Context
) -> tuple[PrivateStagePlan, list[Stage]]:
    """The plan of the last private stage of a run of these stages, each after those before it, and the mechanisms of
    all of them that are not charged yet; raises as the stages do before they read data."""
    arch = configs["pretrain"].arch if "pretrain" in configs else None
    events: list[Stage] = []
    for name, config in configs.items():
        if name == "generate":
            _generate(config, context)
        elif name == "pretrain":
            _pretrain(config, context)
        else:
            last, left = _private(name, config, context, arch, events)
            events += left
    return last, events


def plan_lines(result: Plan | RunPlan) -> str:
    """``plan`` and ``plan_run`` for people."""
    last = result.stages[-1] if isinstance(result, RunPlan) else result
    warned = [f"warning: {said}" for name in ("warning", "missing") if (said := getattr(last, name, None))]
    if not isinstance(result, RunPlan):
        return "\n".join([_line(result), *warned])
    lines = [_line(made) for made in result.stages]
    if result.stages[-1].stage == "probe":
        lines.append("finetune: none, since the probe has the whole budget; --share 0.3 leaves it 70 %")
    total = f"run: ε = {rounded_up(result.epsilon_after)} of {result.epsilon:g} at δ = {result.delta:g}"
    return "\n".join([*lines, total, *warned])


# --------------------------------------------------------------------------------------------------------- the stages


def _generate(config: GenerateConfig, context: Context) -> GeneratePlan:
    check_images(config)
    action, config = _foreseen("generate", config, context)
    blocks = blocks_of(config)
    count = sum(blocks.values())
    return GeneratePlan(
        stage="generate",
        action=action,
        process=config.process,
        count=count,
        resolution=config.resolution,
        seed=config.seed,
        shards=len(blocks),
        disk_bytes=count * 3 * config.resolution**2,
    )


def _pretrain(config: PretrainConfig, context: Context) -> PretrainPlan:
    action, config = _foreseen("pretrain", config, context)
    refuse_unlearnable(config)
    with layout_device(config.arch):
        network = build_extractor(config)
    made = PretrainPlan(
        stage="pretrain",
        action=action,
        arch=config.arch,
        parameters=sum(parameter.numel() for parameter in network.parameters()),
        feature_dim=network.feature_dim,
        input_size=network.input_size,
        random_init=config.random_init,
        steps=0,
    )
    if config.prior:
        shipped_extractor(config)  # refuses a damaged one
        return replace(made, prior=config.prior)
    steps = config.dictionary_iterations if config.arch == "patchnet" else config.steps
    made = replace(made, steps=0 if config.random_init or config.init else steps, init=config.init and "public weights")
    if config.arch != "patchnet":
        return replace(made, batch_size=config.batch_size)
    return replace(made, filters=config.filters, extractors=len(extractors_of(config)))


def _private(
    name: str,
    config: PrivateConfig,
    context: Context,
    arch: str | None = None,
    planned: Sequence[Stage] = (),
) -> tuple[PrivateStagePlan, list[Stage]]:
    """A private stage, after everything that was charged or planned before it.

    Args:
        arch: of a planned extractor and probe; None: the run's own.
        planned: mechanisms of the stages planned before that are not charged yet.

    Returns:
        The plan, and its mechanisms that are not charged yet.
    """
    named = name_private_stage(name, config, context, write=False)  # refuses another budget before other settings
    with no_counts_after_a_charge(context.rundir):
        named.dataset.require_sound()
    missing = None
    try:
        named.dataset.require()
    except InputError as error:
        missing = error.problem
    action, config = _foreseen(name, config, context)
    refit_steps = 0
    if name == "finetune":
        stage = finetune.open_stage(config, context, write=False, planned=planned, arch=arch)
        refit_steps = finetune.choices(config, context, arch)[2]
    elif name == "continue":
        stage = continual.open_stage(config, context, write=False)
    else:
        stage = open_private_stage(name, config, context, write=False, planned=planned)
    written = read_plan_file(context.rundir)
    ledger = stage.ledger if written else None
    refit_name = f"{name}.{finetune.HEAD}"
    entry = written.stages.get(refit_name) if written else None
    if entry is not None and entry.parent_attempt != stage.attempt:
        entry = None
    refit_key = (refit_name, entry.attempt if entry else 0)
    before = [*(ledger.stages(besides=[(name, stage.attempt), refit_key]) if ledger else []), *planned]
    mechanisms = {(name, stage.attempt): stage.plan}
    if entry is not None:
        mechanisms[refit_key] = entry.plan
    elif refit_steps:
        mechanisms[refit_key] = make_plan(
            stage=refit_name,
            epsilon=stage.budget.epsilon,
            delta=stage.budget.delta,
            epsilon_target=stage.budget.epsilon,
            spent=[*before, [stage.plan.event]],
            examples=stage.budget.examples,
            steps=refit_steps,
            noise=stage.plan.noise,
            warn=context.console.warn,
            **finetune.REFIT,
        )
    whole = [*before, *([made.event] for made in mechanisms.values())]
    after = compose_stages(whole, stage.plan.delta, context.console.warn)
    left: list[Stage] = []
    for key, made in mechanisms.items():
        charged = ledger.charged_steps(*key) if ledger else 0
        if made.sample_rate == 1 and charged < made.steps:
            left.append([replace(made.event, steps=made.steps - charged)])
        elif charged == 0:
            left.append([made.event])
    refit = mechanisms.get(refit_key)
    facts = {
        **vars(stage.plan),
        "action": action,
        "data": stage.spec.name,
        "unit": stage.spec.unit,
        "train_examples": stage.spec.train_examples,
        "split_rule": stage.spec.split_rule or None,
        "labels": stage.spec.label_rule or None,
        "decoding": str(stage.spec.decoding) or None,
        "refit": refit and RefitPlan(refit.noise_multiplier, refit.sample_rate, refit.steps, refit.clip_norm),
        "epsilon_after": after.upper,
        "warning": stage.warning,
        "missing": missing,
    }
    if name != "continue":
        return PrivateStagePlan(**facts), left
    least = config.steps - switching.most_private_steps(config)
    rule = config.switch if config.mix == "step" and switch_step(config) is None else None
    return ContinuePlan(**facts, public=config.public, public_steps=least, switch=rule), left


def _foreseen(name: str, config: StageConfig, context: Context) -> tuple[str, Any]:
    ignore = not_compared(config, context.rundir) if isinstance(config, ContinueConfig) else (*IGNORED, DATA)
    if getattr(config, "precision", None) == AUTO:
        ignore = (*ignore, "precision")  # the stage has decided it
    if getattr(config, "code", None) is None:
        ignore = (*ignore, "code")
    flags = {"resume": context.resume, "overwrite": context.overwrite}
    begun = context.rundir.foresee(name, as_dict(config), ignore=ignore, **flags)
    return begun.action, recorded(name, begun.config)
