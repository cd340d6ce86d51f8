"""The training loops of the private stages, run for an audit: on made-up or real records, watched, to be thrown away.

These are the loops that trained the run, with its extractor, whitener and head, and not copies of them. Each runs in a
temporary folder with a ledger of its own, so nothing of it reaches the run, and nothing is charged: what the loops
compute is compared and forgotten.
"""

from __future__ import annotations

import copy
import math
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dprandp import finetune
from dprandp.config.schema import FinetuneConfig, ProbeConfig
from dprandp.data import Dataset, DataSpec, Split, Units
from dprandp.dpsgd.budget import Budget
from dprandp.dpsgd.stage import PrivateStage
from dprandp.dpsgd.units import unit_rows
from dprandp.models.classifier import Classifier
from dprandp.privacy.auditing.controls import FAITHFUL, Control, rehearsal_plan
from dprandp.privacy.auditing.games import Game, step_score
from dprandp.privacy.auditing.replay import Check, Tape, Watch, compare
from dprandp.privacy.ledger import Ledger
from dprandp.privacy.mechanism import PrivateMechanism, PrivatePlan
from dprandp.probe.head import HeadSettings, begin_head, default_lr, fit_head, released_head, update_head
from dprandp.runs.console import Console
from dprandp.runs.context import Context
from dprandp.runs.directory import RunDir
from dprandp.runs.signals import Stop
from dprandp.vision.images import to_input

REPLAYED_STEPS = 3

EXPECTED_BATCH = 16
"""Records are made up until the expected batch is this large, so that the record is seldom alone in it."""

MOST_RECORDS = 4096

ROOM = 2**30
"""Free bytes of memory from which on temporary files are kept there."""


class Rehearsal(PrivateStage):
    """A private stage whose loop is watched, with nothing to pay for.

    Args:
        plan: what was accounted, for the number of records at hand.
        context: of a temporary run directory.
        dataset: what the fine-tune reads; None for a loop that is given its features.
        control: the fault to make, if any.
        tape: the random bits.
        watching: further arguments of ``Watch``.
    """

    def __init__(
        self,
        plan: PrivatePlan,
        context: Context,
        *,
        dataset: Dataset | None = None,
        control: Control = FAITHFUL,
        tape: Tape | None = None,
        most: int = REPLAYED_STEPS,
        **watching: Any,
    ) -> None:
        budget = Budget("an audit", math.inf, plan.delta, plan.examples, "one record")
        ledger = Ledger.create(context.rundir.privacy_dir / "ledger.jsonl", plan.examples)
        clipping = replace(plan, clip_norm=control.clip_norm(plan))  # what the loop clips at
        super().__init__(plan.stage, dataset, budget, context, clipping, ledger=ledger)
        source = control.random(Tape() if tape is None else tape)
        mechanism = PrivateMechanism(control.mechanism_plan(plan), ledger, source, charge_block=plan.steps)
        watch = Watch(mechanism, plan, min(most, plan.steps), control.step, **watching)
        object.__setattr__(self, "watch", watch)  # a stage is frozen

    def mechanism(self, updates_done: int, ledger_head: str | None = None) -> Watch:
        """The watched mechanism."""
        if updates_done or ledger_head:
            raise RuntimeError("a rehearsal begins at the beginning")
        return self.watch


@contextmanager
def scratch_folder() -> Iterator[Path]:
    """A temporary folder, in memory where there is room: hundreds of small ledgers need not reach a disk."""
    memory = Path("/dev/shm")
    roomy = memory.is_dir() and os.access(memory, os.W_OK) and shutil.disk_usage(memory).free >= ROOM
    with tempfile.TemporaryDirectory(prefix="dprandp-audit-", dir=memory if roomy else None) as folder:
        yield Path(folder)


@contextmanager
def rehearsal_context(like: Context | None = None) -> Iterator[Context]:
    """A context of its own, in a temporary folder, locked."""
    with scratch_folder() as folder:
        rundir = RunDir.open(folder, create=True)
        device = torch.device("cpu") if like is None else like.device
        with rundir.lock():
            yield Context(
                rundir=rundir,
                console=Console(quiet=True),
                device=device,
                data_dir=folder,
                microbatch=None if like is None else like.microbatch,
            )


def records_for(plan: PrivatePlan, batch: int = EXPECTED_BATCH) -> int:
    """How many records to make up for a replay whose expected batch is to be ``batch``."""
    return min(MOST_RECORDS, max(3 * batch, math.ceil(batch / plan.sample_rate)))


@contextmanager
def one_thread() -> Iterator[None]:
    """Torch on one thread: for many small operations, sharing each of them costs more than it saves."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


# --------------------------------------------------------------------------------------------------------------- head


@dataclass(frozen=True)
class HeadRecords:
    """What a head's loop is replayed on.

    Attributes:
        features: float32 [N, d] or [N, K, d]; the last record, or unit, is the one that is taken away.
        labels: int64 [N].
        start: float32 [d, classes], the head at the first step.
        grouped: the data set that says which rows make one record; None where each row is one.
        watched: the record that is taken away, where it is not the last.
    """

    features: Tensor
    labels: Tensor
    start: Tensor
    grouped: Dataset | None = None
    watched: int | None = None

    @property
    def count(self) -> int:
        """Records."""
        rows = unit_rows(self.grouped)
        return len(self.labels) if rows is None else len(rows.offsets) - 1

    def ending_with(self, record: int) -> HeadRecords:
        """The same with this record and the last one exchanged; arrays are changed in place."""
        if self.grouped is not None:
            return replace(self, watched=record)
        for array in (self.features, self.labels):
            kept = array[record].clone()
            array[record] = array[-1]
            array[-1] = kept
        return self


def make_head_records(
    features: Tensor, classes: int, plan: PrivatePlan, kind: str, generator: torch.Generator, images: int = 1
) -> HeadRecords:
    """Made-up records for a head's loop, of which the last is a hard one.

    Args:
        features: float [n, d] public features, of which records are drawn.
        classes: number of classes.
        plan: for the number of records and views.
        kind: 'ordinary', 'long' (a gradient far above the clip norm, the same in every view) or 'broken' (not a
            number).
        generator: public randomness.
        images: of each record; the last record's are alike.
    """
    count, views = records_for(plan), max(1, plan.views)
    grouped = None if images == 1 else _Grouped(made_up_units(count, images))
    count *= images
    drawn = torch.randint(len(features), (count, views), generator=generator)
    rows = features[drawn].float()
    if kind == "long":
        rows[-1] = 1000 * plan.clip_norm * torch.nn.functional.normalize(rows[-1, :1] + 1e-3, dim=-1)
    elif kind == "broken":
        rows[-1, :, 0] = math.nan
    labels = torch.randint(classes, (count,), generator=generator)
    rows[-images:], labels[-images:] = rows[-1].clone(), labels[-1].clone()
    start = torch.randn(features.shape[1], classes, generator=generator)
    if kind == "long":  # at the zero head every residual, and so the long gradient, points away from its label
        start.zero_()
    return HeadRecords(rows[:, 0].contiguous() if views == 1 else rows, labels, start, grouped)


def made_up_units(count: int, images: int) -> Units | None:
    """``count`` units of so many images, one after the other; None where a unit is one image."""
    return None if images == 1 else Units("unit", np.repeat(np.arange(count), images), count)


class _Grouped(Dataset):
    """Of a data set, what a head's loop asks for: which rows make one record."""

    def __init__(self, units: Units) -> None:
        self._units = units


def replay_head(plan: PrivatePlan, records: HeadRecords, control: Control = FAITHFUL) -> list[Check]:
    """Fit a head on the records, then with the last zeroed out, with the same random bits; compare.

    Args:
        plan: what was accounted.
        records: the data.
        control: the fault to make, if any.
    """
    if control.separate_views:  # of a unit the control would clip each image
        records = replace(records, grouped=None)
    count, grouped = records.count, unit_rows(records.grouped)
    watched = count - 1 if records.watched is None else records.watched
    runnable = rehearsal_plan(plan, count)
    features, labels, rows = records.features, records.labels, 1
    if control.separate_views:
        rows = control.views(plan)
        features = features.reshape(count, -1, features.shape[-1])
        features = features[:, torch.arange(rows) % features.shape[1]].flatten(0, 1)  # views come round again
        labels = labels.repeat_interleave(rows)
    settings = HeadSettings(lr=1.0, momentum=0.9, released="last")
    tape, notes = Tape(), None
    for present in (True, False):
        kept = slice(None) if present or grouped is not None else slice(None, -rows)
        if grouped is not None and not present:  # the slot is empty: nothing of the unit's images is left
            features = features.clone()
            features[torch.from_numpy(grouped.images(np.array([watched]))[0])] = 0
        with rehearsal_context() as context:
            played = tape if present else tape.again()
            stage = Rehearsal(runnable, context, dataset=records.grouped, control=control, tape=played,
                              watched=watched, present=present, follow=notes, rows=rows)  # fmt: skip
            fit_head(stage, features[kept], labels[kept], records.start, settings, context.rundir.path, Stop())
        if present:
            notes = stage.watch.observed
    return compare(notes, stage.watch.observed, runnable, watched)


HEADS_AT_ONCE = 500
"""Canaries in one fit of a head: each has a dimension of its own, so that none moves another's part of the head."""


def head_game_scores(plan: PrivatePlan, game: Game) -> tuple[np.ndarray, np.ndarray, float]:
    """Scores of a distinguishing game in which the attacker sees nothing but released heads.

    The worst case that a head's loop allows: a canary is alone in a dimension, in which the head begins so far on the
    wrong side that its gradient is clipped, and the same, in every step. The loop is the stage's, with its momentum and
    its averaging, which weigh the steps' noise unevenly; that is all that is lost against somebody who sees every step.

    Args:
        plan: of full batches.
        game: how many trials.

    Returns:
        float64 [game.without], float64 [game.having], log likelihood ratios; and the signal that is left in a released
        head, as a part of that in all steps.
    """
    defaults = ProbeConfig(data="none", epsilon=1.0)
    lr = default_lr(plan.epsilon_target, plan.delta, plan.examples, plan.steps, plan.clip_norm)
    settings = HeadSettings(lr, defaults.momentum, defaults.released)
    weights, start_weight = _weights(settings, plan.steps)
    total, length = float(weights.sum()), float(weights.square().sum().sqrt())
    noise = plan.noise_multiplier * length / total
    included = np.concatenate([np.ones(game.having, bool), np.zeros(game.without, bool)])
    scores = []
    for first in range(0, game.trials, HEADS_AT_ONCE):
        found = _released_canaries(plan, included[first : first + HEADS_AT_ONCE], settings, total, length, start_weight)
        scores.append(step_score(found, noise, 1.0))
    together = np.concatenate(scores)
    return together[game.having :], together[: game.having], total / (length * math.sqrt(plan.steps))


def _weights(settings: HeadSettings, steps: int) -> tuple[Tensor, float]:
    """How much each update moves the released head, float64 [steps]; and what is left in it of the beginning."""
    start = torch.zeros(steps + 1, dtype=torch.float64)
    start[-1] = 1
    state, one = begin_head(start), torch.eye(steps, steps + 1, dtype=torch.float64)
    for number in range(steps):
        update_head(state, one[number], settings, number, steps)
    released = released_head(state, settings)
    return -released[:-1], float(released[-1])


def _released_canaries(
    plan: PrivatePlan, included: np.ndarray, settings: HeadSettings, total: float, length: float, start_weight: float
) -> np.ndarray:
    """One fit: what each canary's part of the released head says of it, 0 without and 1 with it, up to noise."""
    count = len(included)
    runnable = replace(rehearsal_plan(plan, count), views=1)
    moved = plan.clip_norm * (abs(total) + 12 * plan.noise_multiplier * length) / count  # what the head moves at most
    rows = torch.diag(torch.from_numpy(included).float()) * (1000 * plan.clip_norm)
    labels = torch.zeros(count, dtype=torch.int64)
    start = torch.tensor([-1.0, 1.0]).expand(count, 2) * (moved + 1 / plan.clip_norm)
    with rehearsal_context() as context:
        stage = Rehearsal(runnable, context, most=plan.steps, keep=False)
        released, _ = fit_head(stage, rows, labels, start, settings, context.rundir.path, Stop())
    apart = (released.double() - start_weight * start.double()) @ torch.tensor([1.0, -1.0], dtype=torch.float64)
    return (apart / math.sqrt(2) * (runnable.expected_batch / (plan.clip_norm * total))).numpy()


# ---------------------------------------------------------------------------------------------------------- fine-tune


def made_up_images(
    images: Tensor, classes: int, count: int, flip: bool, generator: torch.Generator, each: int = 1
) -> tuple[Dataset, Split]:
    """A data set of public images and random labels, with every class in it; and its records.

    Args:
        images: uint8 [n, 3, 32, 32].
        classes: number of classes.
        count: records to draw.
        flip: whether views may be mirrored.
        generator: public randomness.
        each: images of a record.
    """
    records = max(count, classes)
    count, units = records * each, made_up_units(records, each)
    drawn = images[torch.randint(len(images), (count,), generator=generator)].permute(0, 2, 3, 1).contiguous().numpy()
    labels = torch.randperm(count, generator=generator).numpy() % classes
    spec = DataSpec(
        name="audit", title="Synthetic images with random labels", classes=tuple(map(str, range(classes))),
        train_examples=count, test_examples=0, channels=3, height=drawn.shape[1], width=drawn.shape[2],
        source="the run's own synthetic images", licence="none", citation="none", flip_ok=flip,
        unit_column=None if units is None else "unit", unit_count=None if units is None else records,
    )  # fmt: skip
    return Dataset(spec, lambda split: (drawn, labels), units=units), Split(drawn, labels)


HARD_HEAD = 100.0
"""Standard deviation of a head at which most gradients are far longer than any clip norm."""


def hardened(model: Classifier, generator: torch.Generator) -> Classifier:
    """A copy whose head is large and random: its scores are far apart and, for random labels, mostly wrong.

    At a run's own head no gradient may reach the clip norm, and a clip that never acts is not tested.
    """
    hard = copy.deepcopy(model)
    hard.head.data.copy_(HARD_HEAD * torch.randn(model.head.shape, generator=generator))
    return hard


def most_wrong(model: Classifier, split: Split) -> int:
    """The made-up record whose label the model's scores are furthest from: a long gradient."""
    scores = model.predict(to_input(split.images), mirror=False)
    own = scores.gather(1, torch.from_numpy(split.labels)[:, None])[:, 0]
    return int((scores.amax(dim=1) - own).argmax())


def replay_finetune(
    plan: PrivatePlan,
    config: FinetuneConfig,
    model: Classifier,
    lr: float,
    scale: float,
    dataset: Dataset,
    watched: int,
    like: Context,
    most: int,
    control: Control = FAITHFUL,
) -> list[Check]:
    """Run the fine-tune's joint training with and without one record, with the same random bits; compare.

    Args:
        plan: what was accounted.
        config: the run's.
        model: where the training begins; on the context's device.
        lr, scale: of the head, and the extractor's factor.
        dataset: its records; private where it is the run's own.
        watched: position of the record.
        like: the run's context, for device and microbatch.
        most: steps.
        control: the fault to make, if any; the fine-tune makes its own views, which cannot be separated.
    """
    runnable = rehearsal_plan(plan, dataset.spec.train_units)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    tape, notes = Tape(), None
    for present in (True, False):
        with rehearsal_context(like) as context:
            context.rundir.stage_dir(finetune.STAGE).mkdir()
            stage = Rehearsal(runnable, context, dataset=dataset, control=control, most=most, watched=watched,
                              tape=tape if present else tape.again(), present=present, follow=notes)  # fmt: skip
            model.load_state_dict(before)  # the closed form of the gradients writes into the model
            finetune._train(config, stage, model, lr, scale, Stop())
        if present:
            notes = stage.watch.observed
    model.load_state_dict(before)  # whoever replays again begins at the same place
    return compare(notes, stage.watch.observed, runnable, watched)
