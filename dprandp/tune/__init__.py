"""Choose settings of the probe: free of charge on public images, or on the private data, charged.

    --on synthetic   (default) a task made of the run's own synthetic images
    --on NAME        a data set that you declare public
    --on private     the private data; the cost is charged to the run's budget

It writes ``tune.json`` and ``tuned.toml`` (see ``runs/tuning.py``). The candidates and the configuration are public.

*On public images* settings are chosen under the noise that the private data would get: no privacy cost.

**The noise.** The best settings depend on the ratio of noise to the signal of N examples. So with n < N public examples
the noise of a step's sum is multiplied by n/N. The held-out public images decide; the default is kept unless another
setting is right on more of them by a standard error of the difference.

**The synthetic task.** Classes are groups of synthetic images, drawn at random, ``INSTANCES`` in all; the examples of
an image are random crops of it, so the images of a class share only their label. (The networks that generated the
images cannot serve as classes: linear heads stay at chance level.)

*On the private data*, charged, the best of a random number of private fits is taken. Each fit is scored by a noisy
count on private records that it was not fitted on; only the best setting and its score come out.
``privacy/selection.py`` shows that one fit is a Gaussian mechanism, ``privacy/tuning.py`` the cost of the best.
"""

from __future__ import annotations

import itertools
import math
import time
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from dprandp.config.schema import ProbeConfig, as_dict, data_options, public_data_options, same_data_name
from dprandp.data import DataSpec, open_dataset
from dprandp.dpsgd.budget import default_delta
from dprandp.dpsgd.features import placed, private_features, require_room
from dprandp.dpsgd.stage import budget_share, name_private_stage, refuse_other_labels
from dprandp.dpsgd.training_data import use_as_public
from dprandp.errors import InputError, UsageError
from dprandp.generate import open_images
from dprandp.models.extractor import extract
from dprandp.models.whitening import Whitener
from dprandp.pretrain import EXTRACTOR_STAGES, input_size, require_extractor
from dprandp.privacy.accounting import compose, rounded_up
from dprandp.privacy.adaptive import calibrate_stage
from dprandp.privacy.clipping import clipped_softmax_sum
from dprandp.privacy.gaussian_dp import gaussian_dp_mu
from dprandp.privacy.selection import PrivateSelection, Trial, make_selection_plan
from dprandp.probe import public_part
from dprandp.probe.head import HeadSettings, begin_head, default_lr, lr_at, released_head, update_head
from dprandp.runs.context import Context, with_precision
from dprandp.runs.directory import frozen
from dprandp.runs.ledger import open_run_ledger
from dprandp.runs.results import ONE_IMAGE
from dprandp.runs.tuning import (
    PRIVATE,
    SYNTHETIC,
    Chosen,
    PrivateTuning,
    PublicTuning,
    Setting,
    Simulated,
    Tried,
    Tuning,
    hide_duration,
    read_tuning,
    seal_tuning,
    write_tuning,
)
from dprandp.vision.images import ImageSet, as_declared, random_crops, to_input

STAGE = "tune"


def run(config: ProbeConfig, tune: TuneConfig, context: Context) -> Tuning:
    """Choose settings of this probe and write ``tune.json`` and ``tuned.toml``; returns the record.

    Raises:
        UsageError: settings that are not simulated, or other tuning than the run has.
        CheckpointError: the run's ledger does not bear out what private tuning recorded before.
        InputError: no extractor yet, or missing data. BudgetError: private tuning does not fit (no pixel was read).
    """
    if config.batch_size is not None or config.views > 1:
        raise UsageError("tune works only for full batches of single views", fix="leave out batch_size and views")
    if same_data_name(tune.on, config.data):
        raise private_data(tune.on)
    require_extractor(context, STAGE)
    inputs = context.rundir.inputs_from(*EXTRACTOR_STAGES)
    asked = frozen({**asdict(tune), "probe": as_dict(config), "inputs": inputs})
    before = read_tuning(context.rundir) if not context.overwrite else None
    if before is not None:
        if _alike(before.asked, asked):
            open_run_ledger(context.rundir)  # compares a private one with the ledger: its ε is shown again
            return before
        raise UsageError(
            f"this run was tuned before, on {before.on}, for other settings",
            fix="use its tuned.toml, or give --overwrite to tune again; what was spent stays spent",
        )
    choose = choose_privately if tune.on == PRIVATE else choose_publicly
    record = choose(config, tune, context, asked)
    kept = {key: value for key, value in as_dict(config).items() if key not in ("size", "tuned_on")}
    if tune.on == PRIVATE:
        seal_tuning(context.rundir, record)
    write_tuning(context.rundir, record, kept | vars(record.chosen))
    if tune.on == PRIVATE:
        hide_duration(context.rundir)
    return record


def _alike(before: dict[str, Any], asked: dict[str, Any]) -> bool:
    """Whether the request is the same; spellings of a path may differ."""
    old, new = before.get("probe"), asked["probe"]
    if not isinstance(old, dict):
        return False
    for ours, theirs, key in ((old, new, "data"), (before, asked, "on")):
        if not same_data_name(str(ours.get(key)), theirs[key]):
            return False
    return {**before, "on": asked["on"], "probe": {**old, "data": new["data"]}} == asked


def as_json(result: Tuning) -> dict[str, Any]:
    """The result as ``--json`` prints it: it begins with ``stage``."""
    return {"stage": STAGE, **frozen(result)}


def line(result: Tuning) -> str:
    """The result for people."""
    chosen = ", ".join(f"{name} = {value:.4g}" for name, value in vars(result.chosen).items())
    if isinstance(result, PrivateTuning):
        how = f"private data, {result.trials} trials expected, ε = {rounded_up(result.charged_epsilon)} charged"
    else:
        how = (
            f"{result.on}, {len(result.tried)} settings tried, {100 * result.accuracy:.1f} % against "
            f"{100 * result.default_accuracy:.1f} % of the default, nothing charged"
        )
    return f"tune: {chosen} ({how})"


# ----------------------------------------------------------------------------------------------------------- candidates

LR_FACTORS = (1.0, 0.25, 0.5, 2.0, 4.0)
STEP_FACTORS = (1.0, 0.5, 2.0)
DIM_FACTORS = (1.0, 0.5)


@dataclass(frozen=True)
class TuneConfig:
    """How to tune."""

    on: str = SYNTHETIC  # or 'private', or the name of a public data set
    trials: int = 12  # settings to try; with 'private' the expected number of trials
    spend: float = 0.3  # with 'private': fraction of the probe's ε for tuning, in (0, 1)
    held_out: float = 0.2  # with 'private': chance that a record is scored on instead of fitted, in (0, 1)

    def __post_init__(self) -> None:
        if not 2 <= self.trials <= 1000:
            raise UsageError(f"--trials {self.trials} lies outside [2, 1000]", fix="give a number such as 12")
        for flag, value in (("--spend", self.spend), ("--held-out", self.held_out)):
            if not 0 < value < 1:
                raise UsageError(f"{flag} {value} lies outside (0, 1)", fix=f"give a {flag} such as 0.3")


def private_data(on: str) -> UsageError:
    """The error for tuning on the private data without charge."""
    return UsageError(
        f"--on {on} holds images of the private data set",
        fix="give --on private, which is charged to the budget, or the name of public data",
    )


def settings_for(config: ProbeConfig, dims: int) -> list[Setting]:
    """The public list of candidates, the configuration's own first; ``dims`` are those of the whitener."""
    made = itertools.product(LR_FACTORS, STEP_FACTORS, DIM_FACTORS)
    listed = [Setting(lr, max(1, round(t * config.steps)), max(1, round(d * dims))) for lr, t, d in made]
    return list(dict.fromkeys(listed))


def probe_epsilon(config: ProbeConfig) -> float:
    """ε of the probe, with its tuning; inf for no privacy."""
    return config.epsilon * budget_share(config)


def as_probe(config: ProbeConfig, context: Context) -> ProbeConfig:
    """The configuration with the precision that the probe will have."""
    return with_precision("probe", config, context)


# ----------------------------------------------------------------------------------------------------- on public images

INSTANCES = 40
"""Synthetic images of a task, in all classes together; at least two in each."""

FIT, HELD_OUT = 2000, 500
"""Most public examples to fit, and to decide by."""

SEED = 2
"""Added to the seed for the public task, so that its crops differ from the whitener's."""


def choose_publicly(
    config: ProbeConfig, tune: TuneConfig, context: Context, asked: dict[str, Any]
) -> PublicTuning:
    """Try settings on public images; of the private data only the declaration is used.

    The exception: a public set that declares as many images of the same size is compared with them, and refused if
    equal.
    """
    started = time.perf_counter()
    dataset = open_dataset(config.data, context.data_dir, **data_options(config) | {"unit_column": None})
    dataset.for_input(input_size(context))
    spec = dataset.spec
    refuse_other_labels("tune", spec)
    epsilon = probe_epsilon(config)
    delta = config.delta or default_delta(spec.train_examples, spec.published_delta)
    mu = gaussian_dp_mu(epsilon, delta) if math.isfinite(epsilon) else math.inf
    default = config.lr or default_lr(epsilon, delta, spec.train_examples, config.steps, config.clip_norm)
    features, labels, classes, cut, whitener = _public_task(config, tune, context, spec)
    settings = settings_for(config, whitener.components)
    generator = torch.Generator().manual_seed(config.seed + SEED)
    count = spec.train_examples
    order = [0, *(1 + torch.randperm(len(settings) - 1, generator=generator)).tolist()][: tune.trials]
    rights: dict[int, Tensor] = {}
    with context.console.progress(len(order), "settings") as progress:
        for index in order:
            setting = settings[index]
            seen = whitener.cut(features, setting.dims)
            rule = HeadSettings(default * setting.lr_factor, config.momentum, config.released)
            head = simulate(
                seen[:cut], labels[:cut], classes, setting.steps, config.clip_norm, mu, count, rule, generator
            )
            rights[index] = ((seen[cut:] @ head).argmax(dim=1) == labels[cut:]).cpu()
            progress.advance(1)
    best = better_than_default(rights)
    accuracy = {index: float(right.to(torch.float32).mean()) for index, right in rights.items()}
    tried = {
        index: Tried(**vars(settings[index]), lr=default * settings[index].lr_factor, accuracy=accuracy[index])
        for index in order
    }
    return PublicTuning(
        on=tune.on,
        trials=tune.trials,
        chosen=Chosen(tried[best].lr, tried[best].steps, tried[best].dims),
        accuracy=accuracy[best],
        default_accuracy=accuracy[0],
        charged_epsilon=0.0,
        simulated=Simulated(epsilon=epsilon, delta=delta, train_examples=count),
        fitted_examples=cut,
        held_out_examples=len(labels) - cut,
        tried=tuple(tried.values()),
        seconds=round(time.perf_counter() - started, 2),
        asked=asked,
    )


def better_than_default(rights: dict[int, Tensor]) -> int:
    """Index of the setting to take, from which held-out examples (bool [m]) each one got right; 0 is the default.

    The one with the most right answers, if it is right where the default is wrong in b cases, the other way round in c,
    and b − c ≥ √(b + c), the standard error of that difference (McNemar 1947); else 0.
    """
    best = max(rights, key=lambda index: (int(rights[index].sum()), -index))
    gained = int((rights[best] & ~rights[0]).sum())
    lost = int((rights[0] & ~rights[best]).sum())
    return best if gained - lost >= math.sqrt(gained + lost) and gained > lost else 0


def simulate(
    features: Tensor,
    labels: Tensor,
    classes: int,
    steps: int,
    clip_norm: float,
    mu: float,
    examples: int,
    settings: HeadSettings,
    generator: torch.Generator,
) -> Tensor:
    """The probe's arithmetic on public features, with the signal-to-noise ratio of a private data set.

    Args:
        features: float32 [n, d], unit norm, *public*, on the device that computes. labels: int64 [n], there too.
        mu: of the whole private fit, so that σ = √T/μ; inf for no noise.
        examples: N of the private data. The sum over n examples gets noise of std σ C n/N: μN is what matters.
        generator: seeded, of the CPU; this noise protects nothing.
    """
    count = len(features)
    noise_std = math.sqrt(steps) / mu * clip_norm * count / examples
    state = begin_head(torch.zeros(features.shape[1], classes, device=features.device))
    for number in range(steps):
        clipped = clipped_softmax_sum(features, labels, state["head"], clip_norm)
        noise = noise_std * torch.randn(clipped.shape, generator=generator).to(clipped.device)
        update_head(state, (clipped + noise) / count, settings, number, steps)
    return released_head(state, settings)


def _public_task(
    config: ProbeConfig, tune: TuneConfig, context: Context, spec: DataSpec
) -> tuple[Tensor, Tensor, int, int, Whitener]:
    """Whitened unit-norm features [n, dims], labels [n], number of classes, how many of n to fit, whitener."""
    size = input_size(context)
    generator = torch.Generator().manual_seed(config.seed + SEED)
    fitted = min(FIT, spec.train_examples)
    if tune.on == SYNTHETIC:
        images, labels, classes = synthetic_task(context, len(spec.classes), fitted + HELD_OUT, size, generator)
    else:
        public_dataset = open_dataset(tune.on, context.data_dir, **public_data_options(config, tune.on))
        own = open_dataset(config.data, context.data_dir, **data_options(config))
        for each in (public_dataset, own):
            each.for_input(size)
        refuse_other_labels("tune", public_dataset.spec)
        if public_dataset.shares_images_with(own):
            raise private_data(tune.on)
        use_as_public(context.rundir, public_dataset)
        split = public_dataset.train()
        chosen = torch.randperm(len(split.labels), generator=generator)[: fitted + HELD_OUT]
        images = to_input(split.images[chosen.numpy()], size)
        labels = torch.from_numpy(split.labels)[chosen]
        classes = len(public_dataset.spec.classes)
        fitted = min(fitted, len(labels) * 4 // 5)
    images = as_declared(images, channels=spec.channels, height=spec.height, width=spec.width)
    extractor, mirror, whitener = public_part(as_probe(config, context), context, spec)
    whitener = whitener.to(context.device)
    with context.console.progress(len(images), "public features") as progress:
        features = extract(extractor, images, mirror=mirror, after=whitener, on_batch=progress.advance)
    return *placed(features, labels, classes, context.device), classes, fitted, whitener


def synthetic_task(
    context: Context, classes: int, count: int, size: int, generator: torch.Generator
) -> tuple[Tensor, Tensor, int]:
    """A classification task of synthetic images, of which a class is crops of some: uint8 [count, 3, size, size], int64
    [count] and the number of classes, in random order. Raises InputError for fewer images than classes."""
    wanted = max(2, INSTANCES // classes)
    images = ImageSet(open_images(context.rundir.stage_dir("generate"), classes * wanted))
    instances = min(wanted, len(images) // classes)
    if instances < 1:
        raise InputError(
            f"{len(images)} synthetic images are too few for {classes} classes",
            fix="generate more images, or tune with --on NAME",
        )
    drawn = torch.randperm(len(images), generator=generator)[: classes * instances]
    instance = torch.arange(count) % len(drawn)
    instance = instance[torch.randperm(count, generator=generator)]
    crops = random_crops(images, size, generator, drawn[instance])
    return crops, instance % classes, classes


# -------------------------------------------------------------------------------------------------- on the private data

ETA = 0.0
"""Logarithmic number of private trials, one of Papernot & Steinke's distributions with low cost for its mean."""

ROWS_AT_ONCE = 1024


def choose_privately(
    config: ProbeConfig, tune: TuneConfig, context: Context, asked: dict[str, Any]
) -> PrivateTuning:
    """Try settings on the private data by ``privacy/selection.py``, and record only its result."""
    warn = context.console.warn
    stage = name_private_stage(STAGE, config, context)
    spec, budget, spent = stage.spec, stage.budget, stage.spent
    if spec.unit != ONE_IMAGE:
        raise UsageError(
            f"tuning on private data counts single images, but one unit of these data is {spec.unit}",
            fix="tune with --on synthetic or on a public set; the probe then protects whole units",
        )
    extractor, mirror, whitener = public_part(as_probe(config, context), context, spec)
    whitener = whitener.to(context.device)
    settings = settings_for(config, whitener.components)
    epsilon = probe_epsilon(config)
    plan = make_selection_plan(
        stage=STAGE, epsilon=budget.epsilon, delta=budget.delta, epsilon_target=tune.spend * epsilon, spent=spent,
        examples=spec.train_examples, mean_trials=tune.trials, eta=ETA, held_out=tune.held_out,
        clip_norm=config.clip_norm, steps=[setting.steps for setting in settings], warn=warn,
    )  # fmt: skip
    # plan the probe now, to refuse too small a budget before charging
    sigma = calibrate_stage(epsilon, budget.delta, 1.0, config.steps, [*spent, [plan.event]], warn)
    probe_mu = math.sqrt(config.steps) / sigma
    stage = replace(stage, plan=plan).fix_plan()
    stage.remove_report()
    selection = PrivateSelection(plan, stage.ledger, stage.random_source(), stage.attempt, warn)
    # ------------------------------------------------------------------------------------------------ private from here
    features, labels = private_features(stage, extractor, whitener, mirror=mirror, views=1, seed=config.seed)
    require_room(features.numel() * features.element_size() // 2, "tune's candidates with half the dimensions")
    features, labels = placed(features, labels, len(spec.classes), context.device)
    context.console.say("tune: running a random, secret number of private trials")

    def one_trial(trial: Trial) -> None:
        setting = settings[trial.setting]
        default = config.lr or lr_at(plan.mu, round(trial.expected_fitted), config.steps, plan.clip_norm)
        rule = HeadSettings(setting.lr_factor * default, config.momentum, config.released)
        fitted, held_out = torch.from_numpy(trial.fitted), torch.from_numpy(trial.held_out)
        seen = whitener.cut(features, setting.dims)
        state = begin_head(torch.zeros(seen.shape[1], len(spec.classes), device=context.device))
        for number in range(trial.steps):
            clipped = clipped_softmax_sum(seen, labels, state["head"], plan.clip_norm, rows=fitted)
            update_head(state, trial.release(clipped), rule, number, trial.steps)
        head = released_head(state, rule)
        parts = held_out.split(ROWS_AT_ONCE)  # in blocks, to bound memory
        answers = [(seen[part].to(head) @ head).argmax(dim=1) for part in parts]
        trial.score(torch.cat(answers) == labels[held_out])

    best, score = selection.run(one_trial)
    stage.keep_head()
    # ------------------------------------------------------------------------------------------ from here on: charged
    default = config.lr or lr_at(probe_mu, spec.train_examples, config.steps, config.clip_norm)
    return PrivateTuning(
        on=tune.on,
        trials=tune.trials,
        chosen=Chosen(default * settings[best].lr_factor, settings[best].steps, settings[best].dims),
        noisy_right_answers=score,
        noise_std=plan.score_std,
        held_out_examples_expected=plan.held_out * plan.examples,
        charged_epsilon=compose([plan.event], plan.delta).upper,
        epsilon=stage.ledger.spent(plan.delta).upper,
        delta=plan.delta,
        plan=plan.to_dict(),
        settings=tuple(settings),
        private=stage.ledger.private,
        asked=asked,
    )
