"""The training loops of the private stages, run for an audit on made-up or real records, to be thrown away.

These are the loops that trained the run, with its extractor, whitener and head, and not copies of them (``replay`` has
what they run in). Made-up records are synthetic images, or their features, with random labels.
"""

from __future__ import annotations

import copy
import math
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
from torch import Tensor

from dprandp import continual, finetune, losses, probe
from dprandp.audit.bounds import AuditSettings, Game, step_score
from dprandp.audit.canaries import CLIP_OFF, FAITHFUL, Control, rehearsal_plan
from dprandp.audit.replay import Check, Rehearsal, paired_run, rehearsal_context
from dprandp.config.schema import PRETRAINED, ContinueConfig, FinetuneConfig, ProbeConfig
from dprandp.continual.loop import HEADS, STAGE, Outcome, private_steps
from dprandp.continual.public import PublicTask, Training
from dprandp.data import Dataset, DataSpec, Split, Units
from dprandp.dpsgd.features import private_features, require_room
from dprandp.dpsgd.masks import chosen
from dprandp.dpsgd.stage import open_private_stage
from dprandp.dpsgd.units import unit_rows
from dprandp.finetune import network_config
from dprandp.losses import class_weights
from dprandp.models.classifier import Classifier
from dprandp.models.extractor import build_extractor, extract, without_projection
from dprandp.models.whitening import PooledOnly
from dprandp.pretrain import STAGE as PRETRAIN
from dprandp.pretrain import load_extractor, synthetic_crops
from dprandp.privacy.mechanism import PrivatePlan
from dprandp.probe.head import HeadSettings, begin_head, default_lr, fit_head, released_head, update_head
from dprandp.runs.checkpoint import load_finished
from dprandp.runs.context import Context, recorded
from dprandp.runs.results import ONE_IMAGE, ContinueResult, FinetuneResult, ProbeResult
from dprandp.runs.signals import Stop
from dprandp.vision.images import colour_of, to_input

IMAGES = 256
"""Synthetic images that records are made of."""

EXPECTED_BATCH = 16
"""Records are made up until the expected batch is this large, so that the record is seldom alone in it."""

MOST_RECORDS = 4096

NETWORK_STEPS, NETWORK_BATCH = 2, 8
"""Steps, and the expected batch, of a loop that trains a network."""

PRIVATE_RECORDS = 3
"""Private records that are taken away, one at a time, in a replay of a head on private data."""

PUBLIC = 16
"""Made-up images that stand for the public ones of ``continue``."""

HARD_HEAD = 100.0
"""Standard deviation of a head at which most gradients are far longer than any clip norm."""

HEADS_AT_ONCE = 500
"""Canaries in one fit of a head: each has a dimension of its own, so that none moves another's part of the head."""


@dataclass(frozen=True)
class Labels:
    """What is public about the labels of made-up records."""

    classes: int
    multi_label: bool = False
    class_shares: tuple[float, ...] | None = None

    def drawn(self, count: int, generator: torch.Generator) -> Tensor:
        """Random ones: int64 [count], or [count, classes] of 0 and 1."""
        if self.multi_label:
            return torch.randint(2, (count, self.classes), generator=generator)
        return torch.randint(self.classes, (count,), generator=generator)


class Facts:
    """Public things of a run that records are made of.

    Attributes:
        labels, mirror: what is known about labels, and whether views may be mirrored.
        images: uint8 [n, 3, 32, 32], synthetic (noise where the run has none).
        features: float32 [n, d] of these images, from the run's extractor and whitener.
        model: the classifier as the fine-tune finds it.
    """

    def __init__(self, context: Context) -> None:
        rundir = context.rundir
        continued, probed, tuned = map(rundir.result, (ContinueResult, ProbeResult, FinetuneResult))
        last = tuned or probed or continued
        self.labels, self.mirror = Labels(len(last.classes), last.multi_label is True, last.class_shares), last.mirror
        precision = last.precision
        generator = torch.Generator().manual_seed(0)
        if probed is not None:
            extractor, _ = load_extractor(context, probed.extractor_colour, precision=precision)
            whitener = probe.load_whitener(context, extractor).to(context.device)
            self.images = synthetic_crops(context, IMAGES, extractor.input_size, seed=0)
            head = probe.load_head(context, torch.empty(whitener.dims, self.labels.classes))
        elif tuned is None or tuned.source == PRETRAINED:
            extractor, _ = load_extractor(context, "rgb", precision=precision)  # that of a network is for either kind
            extractor = extractor if tuned is None else without_projection(extractor)
            whitener = PooledOnly(extractor.feature_dim)
            self.images = synthetic_crops(context, IMAGES, extractor.input_size, seed=0)
            head = None
            if tuned is None:
                head = load_finished(rundir.stage_dir(STAGE) / HEADS, HEADS, STAGE).tensors["head"]
        else:  # no Phase I, no Phase II; public weights are not looked for: random ones have gradients as well
            config = recorded(finetune.STAGE, rundir.row(finetune.STAGE).config)
            extractor, head = build_extractor(network_config(config), generator), None
            whitener = PooledOnly(extractor.feature_dim)
            side = extractor.input_size
            self.images = torch.randint(256, (IMAGES, 3, side, side), generator=generator).to(torch.uint8)
        self.model = Classifier(extractor, whitener, self.labels.classes).to(context.device)
        if head is not None:
            self.model.head.data.copy_(head)
        self.features: Tensor = extract(
            self.model.extractor, self.images, mirror=self.mirror, after=self.model.whitener
        )


def records_for(plan: PrivatePlan, batch: int = EXPECTED_BATCH) -> int:
    """How many records to make up for a replay whose expected batch is to be ``batch``."""
    return min(MOST_RECORDS, max(3 * batch, math.ceil(batch / plan.sample_rate)))


def made_up_units(count: int, images: int) -> Units | None:
    """``count`` units of so many images, one after the other; None where a unit is one image."""
    return None if images == 1 else Units("unit", np.repeat(np.arange(count), images), count)


@contextmanager
def one_thread() -> Iterator[None]:
    """Torch on one thread: for many small operations, sharing each of them costs more than it saves."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@dataclass(frozen=True)
class Tried:
    """A check of a replay, and what it was tried on."""

    on: str
    name: str
    passed: bool
    value: float
    limit: float


@dataclass(frozen=True)
class ControlFound:
    """Whether a known fault was flagged, and by which tests; the μ that the game showed, where it was played."""

    name: str
    flagged: bool
    by: list[str]
    mu_lower: float | None


def tried_on(checks: list[Check], on: str) -> list[Tried]:
    """Checks, with what they were tried on."""
    return [Tried(on, check.name, bool(check.passed), check.value, check.limit) for check in checks]


def passed(checks: list[Tried]) -> bool:
    """Whether every check of a replay holds."""
    return all(check.passed for check in checks)


# --------------------------------------------------------------------------------------------------------------- head


@dataclass(frozen=True)
class HeadRecords:
    """What a head's loop is replayed on: features float32 [N, d] or [N, K, d], labels int64 [N], and the first head.

    ``grouped``: the data set that says which rows make one record; None where each row is one.
    """

    features: Tensor
    labels: Tensor
    start: Tensor
    grouped: Dataset | None = None
    class_weights: Tensor | None = None


class _Grouped(Dataset):
    """Of a data set, what a head's loop asks for: which rows make one record."""

    def __init__(self, units: Units) -> None:
        self._units = units


def make_head_records(
    features: Tensor, kind: Labels, plan: PrivatePlan, size: str, generator: torch.Generator, images: int = 1
) -> HeadRecords:
    """Made-up records for a head's loop, drawn from public features, float [n, d]; the last one is a hard one.

    Args:
        kind: of the labels.
        size: 'ordinary', 'long' (a gradient far above the clip norm, the same in every view) or 'broken' (not a
            number).
        images: of each record; the last record's are alike.
    """
    count, views = records_for(plan), max(1, plan.views)
    grouped = None if images == 1 else _Grouped(made_up_units(count, images))
    count *= images
    drawn = torch.randint(len(features), (count, views), generator=generator)
    rows = features[drawn].float()
    if size == "long":
        rows[-1] = 1000 * plan.clip_norm * torch.nn.functional.normalize(rows[-1, :1] + 1e-3, dim=-1)
    elif size == "broken":
        rows[-1, :, 0] = math.nan
    labels = kind.drawn(count, generator)
    rows[-images:], labels[-images:] = rows[-1].clone(), labels[-1].clone()
    start = torch.randn(features.shape[1], kind.classes, generator=generator)
    if size == "long":  # at the zero head every residual, and so the long gradient, points away from its label
        start.zero_()
    rows = rows[:, 0].contiguous() if views == 1 else rows
    return HeadRecords(rows, labels, start, grouped, class_weights(kind.class_shares, kind.multi_label))


def replay_head(
    plan: PrivatePlan, records: HeadRecords, watched: int | None = None, control: Control = FAITHFUL
) -> list[Check]:
    """Fit a head on the records, then with one of them (``watched``, or the last) zeroed out; see ``paired_run``."""
    grouped = None if control.separate_views else records.grouped  # of a unit the control would clip each image
    whose, features, labels, rows = unit_rows(grouped), records.features, records.labels, 1
    count = len(labels) if whose is None else len(whose.offsets) - 1
    watched = count - 1 if watched is None else watched
    if control.separate_views:
        rows = control.views(plan)
        features = features.reshape(count, -1, features.shape[-1])
        features = features[:, torch.arange(rows) % features.shape[1]].flatten(0, 1)  # views come round again
        labels = labels.repeat_interleave(rows, dim=0)
    empty = np.arange(watched * rows, (watched + 1) * rows) if whose is None else whose.images(np.array([watched]))[0]
    settings = HeadSettings(lr=1.0, momentum=0.9, released="last", class_weights=records.class_weights)

    def loop(stage: Rehearsal) -> None:
        seen, told = features, labels
        if not stage.present:  # the slot is empty: nothing is left of its features, whose gradient is zero
            seen, told = features.clone(), labels.clone()
            seen[torch.from_numpy(empty)] = 0
            values = 2 if told.ndim == 2 else records.start.shape[1]
            told[torch.from_numpy(empty)] = (told[torch.from_numpy(empty)] + 1) % values
        fit_head(stage, seen, told, records.start, settings, stage.context.rundir.path, Stop())

    return paired_run(plan, count, watched, loop, dataset=grouped, control=control, rows=rows)


def head_game_scores(plan: PrivatePlan, game: Game) -> tuple[np.ndarray, np.ndarray, float]:
    """Scores of a distinguishing game, on full batches, in which the attacker sees nothing but released heads.

    The worst case that a head's loop allows: a canary is alone in a dimension, in which the head begins so far on the
    wrong side that its gradient is clipped, and the same, in every step. The loop is the stage's, with its momentum and
    its averaging, which weigh the steps' noise unevenly; that is all that is lost against somebody who sees every step.
    Also returned is the signal that is left in a released head, as a part of that in all steps.
    """
    defaults = ProbeConfig(data="none", epsilon=1.0)
    lr = default_lr(plan.epsilon_target, plan.delta, plan.examples, plan.steps, plan.clip_norm)
    settings = HeadSettings(lr, defaults.momentum, defaults.released)
    # how much each update moves the released head, float64 [steps]; and what is left in it of the beginning
    state = begin_head(torch.eye(plan.steps + 1, dtype=torch.float64)[-1])
    one = torch.eye(plan.steps, plan.steps + 1, dtype=torch.float64)
    for number in range(plan.steps):
        update_head(state, one[number], settings, number, plan.steps)
    released = released_head(state, settings)
    weights, start_weight = -released[:-1], float(released[-1])
    total, length = float(weights.sum()), float(weights.square().sum().sqrt())

    def of(included: np.ndarray) -> np.ndarray:
        """One fit: what each canary's part of the released head says of it, 0 without and 1 with it, up to noise."""
        count = len(included)
        runnable = replace(rehearsal_plan(plan, count), views=1)
        moved = plan.clip_norm * (abs(total) + 12 * plan.noise_multiplier * length) / count  # by the head, at most
        rows = torch.diag(torch.from_numpy(included).float()) * (1000 * plan.clip_norm)
        start = torch.tensor([-1.0, 1.0]).expand(count, 2) * (moved + 1 / plan.clip_norm)
        with rehearsal_context() as context:
            stage = Rehearsal(runnable, context, most=plan.steps)
            labels = torch.zeros(count, dtype=torch.int64)
            head, _ = fit_head(stage, rows, labels, start, settings, context.rundir.path, Stop())
        apart = (head.double() - start_weight * start.double()) @ torch.tensor([1.0, -1.0], dtype=torch.float64)
        found = apart / math.sqrt(2) * (runnable.expected_batch / (plan.clip_norm * total))
        return step_score(found.numpy(), plan.noise_multiplier * length / total, 1.0)

    return *game.scores(HEADS_AT_ONCE, of), total / (length * math.sqrt(plan.steps))


# ------------------------------------------------------------------------------------------------------------ networks


def made_up_images(
    images: Tensor, kind: Labels, count: int, flip: bool, generator: torch.Generator, each: int = 1
) -> tuple[Dataset, Split]:
    """A data set of ``count`` records, each of ``each`` public images (uint8 [n, 3, 32, 32]), and its images.

    Labels of one class are random, with every class among them. ``flip``: whether views may be mirrored.
    """
    records = max(count, kind.classes)
    count, units = records * each, made_up_units(records, each)
    drawn = images[torch.randint(len(images), (count,), generator=generator)].permute(0, 2, 3, 1).contiguous().numpy()
    labels = torch.randperm(count, generator=generator).numpy() % kind.classes
    if kind.multi_label:
        labels = kind.drawn(count, generator).numpy()
    spec = DataSpec(
        name="audit", title="Synthetic images with random labels", classes=tuple(map(str, range(kind.classes))),
        train_examples=count, test_examples=0, channels=3, height=drawn.shape[1], width=drawn.shape[2],
        flip_ok=flip, multi_label=kind.multi_label, class_shares=kind.class_shares,
        unit_column=None if units is None else "unit", unit_count=None if units is None else records,
    )  # fmt: skip
    return Dataset(spec, lambda split: (drawn, labels), units=units), Split(drawn, labels)


def hardened(model: Classifier, generator: torch.Generator) -> Classifier:
    """A copy whose head is large and random: its scores are far apart and, for random labels, mostly wrong.

    At a run's own head no gradient may reach the clip norm, and a clip that never acts is not tested.
    """
    hard = copy.deepcopy(model)
    hard.head.data.copy_(HARD_HEAD * torch.randn(model.head.shape, generator=generator))
    return hard


def most_wrong(model: Classifier, split: Split) -> int:
    """The made-up image whose labels the model's scores contradict most: a long gradient."""
    scores = model.predict(to_input(split.images, model.extractor.input_size), mirror=False)
    return int(losses.loss(scores, torch.from_numpy(split.labels)).argmax())


def replay_finetune(
    plan: PrivatePlan,
    config: FinetuneConfig,
    model: Classifier,
    lr: float,
    scale: float,
    dataset: Dataset,
    watched: int,
    like: Context | None = None,
    most: int = NETWORK_STEPS,
    control: Control = FAITHFUL,
) -> list[Check]:
    """Run the fine-tune's joint training with and without one record; see ``paired_run``.

    Args:
        model: where the training begins, on the context's device; left as it was.
        lr, scale: of the head, and the extractor's factor.
        dataset: its records; private where it is the run's own.
        control: the fine-tune makes its own views, which cannot be separated.
    """
    before = {name: value.clone() for name, value in model.state_dict().items()}

    def loop(stage: Rehearsal) -> None:
        stage.context.rundir.stage_dir(finetune.STAGE).mkdir()
        model.load_state_dict(before)  # the closed form of the gradients writes into the model
        finetune._train(config, stage, model, *chosen(config, model), lr, scale, Stop())

    checks = paired_run(plan, dataset.spec.train_units, watched, loop, dataset=dataset, like=like, most=most,
                        control=control)  # fmt: skip
    model.load_state_dict(before)
    return checks


def replay_continue(
    plan: PrivatePlan,
    config: ContinueConfig,
    dataset: Dataset,
    watched: int,
    facts: Facts,
    like: Context,
    most: int = NETWORK_STEPS,
    control: Control = FAITHFUL,
) -> list[Check]:
    """Run the private steps of ``continue`` with and without one record; see ``paired_run`` and ``replay_finetune``.

    Examples are taken one at a time, so that leaving one out moves no rounding of the others.
    """

    def loop(stage: Rehearsal) -> None:
        extractor, _ = load_extractor(like, colour_of(dataset.spec.channels), PRETRAIN, config.precision)
        model = Classifier(extractor, PooledOnly(extractor.feature_dim), len(dataset.spec.classes))
        torch.nn.init.normal_(model.head, generator=torch.Generator().manual_seed(0))  # zeros stop gradients
        generator = torch.Generator().manual_seed(config.seed)
        _, split = made_up_images(facts.images, facts.labels, PUBLIC, facts.mirror, generator)
        images = to_input(split.images, extractor.input_size)
        labels = torch.from_numpy(split.labels)
        task = PublicTask(
            title="made up", images=images, labels=labels, classes=facts.labels.classes, shared=True,
            flip=facts.mirror, held_out=(images, labels), spec=dataset.spec, size=extractor.input_size,
            synthetic=False, seed=config.seed,
        )  # fmt: skip
        training = Training(config, model.to(like.device), task)
        private_steps(config, stage, training, Outcome(0, "an audit", 0), Stop())

    return paired_run(plan, dataset.spec.train_units, watched, loop, dataset=dataset, most=most, control=control,
                      like=replace(like, microbatch=1))  # fmt: skip


# -------------------------------------------------------------------------------------------------------- a run's loops


def on_made_up(
    name: str, plan: PrivatePlan, facts: Facts, settings: AuditSettings, context: Context
) -> tuple[list[Tried], list[ControlFound]]:
    """The loop of fine-tune or ``continue`` on public records: its checks, and the control that its clip is seen."""
    generator = torch.Generator().manual_seed(settings.seed)
    count = records_for(plan, NETWORK_BATCH)
    dataset, split = made_up_images(facts.images, facts.labels, count, facts.mirror, generator, settings.images)
    if name == STAGE:
        config, last = recorded(name, context.rundir.row(name).config), dataset.spec.train_units - 1
        replays = {"synthetic image": partial(replay_continue, plan, config, dataset, last, facts, context)}
        controls, title = settings.controls, f"{CLIP_OFF.name}, in continue"
    else:
        config, lr, scale = _finetune_settings(context)
        hard = hardened(facts.model, generator)
        of_run = (lr, scale, dataset, most_wrong(hard, split) // settings.images, context)
        replays = {
            "synthetic image": partial(replay_finetune, plan, config, facts.model, *of_run),
            "synthetic image, long gradient": partial(replay_finetune, plan, config, hard, *of_run),
        }
        # with a frozen extractor no gradient exceeds √2: there is little to clip
        controls, title = settings.controls and scale > 0, f"{CLIP_OFF.name}, in the fine-tune"
    checks = [check for on, replay in replays.items() for check in tried_on(replay(), on)]
    if not controls:
        return checks, []
    _, hardest = replays.popitem()
    seen = not all(check.passed for check in hardest(most=1, control=CLIP_OFF))
    return checks, [ControlFound(title, seen, ["replay"] if seen else [], None)]


def on_private_data(name: str, plan: PrivatePlan, facts: Facts, context: Context) -> list[Tried]:
    """Replays on the run's private records; every value of what is returned is private."""
    watched = [secrets.randbelow(plan.examples) for _ in range(PRIVATE_RECORDS)]
    if name == finetune.STAGE:
        config, lr, scale = _finetune_settings(context)
        dataset = finetune.open_stage(config, context, write=False).dataset
        checks = replay_finetune(plan, config, facts.model, lr, scale, dataset, watched[0], context)
    elif name == STAGE:
        config = recorded(name, context.rundir.row(name).config)
        dataset = continual.open_stage(config, context, write=False).dataset
        checks = replay_continue(plan, config, dataset, watched[0], facts, context)
    else:
        config = recorded(name, context.rundir.row(name).config)
        stage = open_private_stage(name, config, context, write=False)
        features, labels = private_features(
            stage, facts.model.extractor, facts.model.whitener, mirror=facts.mirror, views=plan.views, seed=config.seed
        )
        require_room(features.numel() * features.element_size(), "replaying on the private records")
        grouped = None if stage.spec.unit == ONE_IMAGE else stage.dataset
        weights = class_weights(facts.labels.class_shares, facts.labels.multi_label)
        records = HeadRecords(features, labels, probe.load_head(context, facts.model.head), grouped, weights)
        checks = [check for record in watched for check in replay_head(plan, records, record)]
    return tried_on(checks, "private record")


def _finetune_settings(context: Context) -> tuple[FinetuneConfig, float, float]:
    """The run's configuration, learning rate and factor of the extractor."""
    rundir = context.rundir
    config, result = recorded(finetune.STAGE, rundir.row(finetune.STAGE).config), rundir.result(FinetuneResult)
    return config, result.lr, result.extractor_scale
