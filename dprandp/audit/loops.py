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
from dprandp.config.schema import FinetuneConfig
from dprandp.data import Dataset, DataSpec, Split
from dprandp.dpsgd.budget import Budget
from dprandp.dpsgd.stage import PrivateStage
from dprandp.models.classifier import Classifier
from dprandp.privacy.auditing.controls import FAITHFUL, Control, rehearsal_plan
from dprandp.privacy.auditing.replay import Check, Tape, Watch, compare
from dprandp.privacy.ledger import Ledger
from dprandp.privacy.mechanism import PrivateMechanism, PrivatePlan
from dprandp.probe.head import HeadSettings, fit_head
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

OTHERS = 64
"""Records beside the canaries in a whole run, and dimensions that they have."""

STANDING_STILL = 1e-20
"""A learning rate at which the head stays where it is, and with it a canary's gradient."""


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
        super().__init__(plan.stage, dataset, budget, context)
        runnable = control.mechanism_plan(plan)
        self._ledger = Ledger.create(context.rundir.privacy_dir / "ledger.jsonl", plan.examples)
        source = control.random(Tape() if tape is None else tape)
        mechanism = PrivateMechanism(runnable, self._ledger, source, charge_block=plan.steps)
        self.watch = Watch(mechanism, plan, min(most, plan.steps), control.step, **watching)
        self.plan = replace(plan, clip_norm=control.clip_norm(plan))  # what the loop clips at

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
        features: float32 [N, d] or [N, K, d]; the last record is the one that is taken away.
        labels: int64 [N].
        start: float32 [d, classes], the head at the first step.
    """

    features: Tensor
    labels: Tensor
    start: Tensor

    def ending_with(self, record: int) -> HeadRecords:
        """The same with this record and the last one exchanged; arrays are changed in place."""
        for array in (self.features, self.labels):
            kept = array[record].clone()
            array[record] = array[-1]
            array[-1] = kept
        return self


def make_head_records(
    features: Tensor, classes: int, plan: PrivatePlan, kind: str, generator: torch.Generator
) -> HeadRecords:
    """Made-up records for a head's loop, of which the last is a hard one.

    Args:
        features: float [n, d] public features, of which records are drawn.
        classes: number of classes.
        plan: for the number of records and views.
        kind: 'ordinary', 'long' (a gradient far above the clip norm, the same in every view) or 'broken' (not a
            number).
        generator: public randomness.
    """
    count, views = records_for(plan), max(1, plan.views)
    drawn = torch.randint(len(features), (count, views), generator=generator)
    rows = features[drawn].float()
    if kind == "long":
        rows[-1] = 1000 * plan.clip_norm * torch.nn.functional.normalize(rows[-1, :1] + 1e-3, dim=-1)
    elif kind == "broken":
        rows[-1, :, 0] = math.nan
    labels = torch.randint(classes, (count,), generator=generator)
    start = torch.randn(features.shape[1], classes, generator=generator)
    if kind == "long":  # at the zero head every residual, and so the long gradient, points away from its label
        start.zero_()
    return HeadRecords(rows[:, 0].contiguous() if views == 1 else rows, labels, start)


def replay_head(plan: PrivatePlan, records: HeadRecords, control: Control = FAITHFUL) -> list[Check]:
    """Fit a head on the records, then with the last zeroed out, with the same random bits; compare.

    Args:
        plan: what was accounted.
        records: the data.
        control: the fault to make, if any.
    """
    count = len(records.labels)
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
        kept = slice(None) if present else slice(None, -rows)
        with rehearsal_context() as context:
            played = tape if present else tape.again()
            stage = Rehearsal(runnable, context, control=control, tape=played, watched=count - 1, present=present,
                              follow=notes, rows=rows)  # fmt: skip
            fit_head(stage, features[kept], labels[kept], records.start, settings, context.rundir.path, Stop())
        if present:
            notes = stage.watch.observed
    return compare(notes, stage.watch.observed, runnable, count - 1)


def canary_run(
    plan: PrivatePlan, features: Tensor, classes: int, included: np.ndarray, generator: torch.Generator,
    control: Control = FAITHFUL,
) -> np.ndarray:  # fmt: skip
    """One whole run of a head's loop on public records and canaries.

    A canary's feature vector has a dimension of its own, and a length at which its gradient is clipped. The head
    stands still, so that a canary's gradient is the same in every step in which it is drawn.

    Args:
        plan: what was accounted; every step of it is run.
        features: float [n, d] public features of the other records.
        classes: number of classes.
        included: bool [m], which canaries are in the data. The others are zeros, which add nothing to any sum.
        generator: public randomness: labels.
        control: the fault to make, if any.

    Returns:
        float64 [m], in units of the noise that was accounted.
    """
    features = features[:OTHERS, :OTHERS]  # the others are company; most of the work is theirs if there are many
    canaries, (count, width) = len(included), features.shape
    rows = torch.zeros(count + canaries, width + canaries)
    rows[:count, :width] = features
    rows[count:, width:].diagonal().copy_(torch.from_numpy(included) * 1000 * plan.clip_norm)
    labels = torch.randint(classes, (len(rows),), generator=generator)
    runnable = replace(rehearsal_plan(plan, len(rows)), views=1)
    settings = HeadSettings(lr=STANDING_STILL, momentum=0.0, released="last")
    with rehearsal_context() as context:
        stage = Rehearsal(runnable, context, control=control, most=plan.steps, keep=False)
        start = torch.zeros(width + canaries, classes)
        fit_head(stage, rows, labels, start, settings, context.rundir.path, Stop())
    towards = torch.full((canaries, classes), 1 / classes, dtype=torch.float64)  # softmax at the zero head - one-hot
    towards[torch.arange(canaries), labels[count:]] -= 1
    towards /= towards.norm(dim=1, keepdim=True)
    found = (stage.watch.total["head"][width:] * towards).sum(dim=1)
    return (found * runnable.expected_batch / (plan.noise_std * math.sqrt(plan.steps))).numpy()


# ---------------------------------------------------------------------------------------------------------- fine-tune


def made_up_images(
    images: Tensor, classes: int, count: int, flip: bool, generator: torch.Generator
) -> tuple[Dataset, Split]:
    """A data set of public images and random labels, with every class in it; and its records.

    Args:
        images: uint8 [n, 3, 32, 32].
        classes: number of classes.
        count: records to draw.
        flip: whether views may be mirrored.
        generator: public randomness.
    """
    count = max(count, classes)
    drawn = images[torch.randint(len(images), (count,), generator=generator)].permute(0, 2, 3, 1).contiguous().numpy()
    labels = torch.randperm(count, generator=generator).numpy() % classes
    spec = DataSpec(
        name="audit", title="Synthetic images with random labels", classes=tuple(map(str, range(classes))),
        train_examples=count, test_examples=0, channels=3, height=drawn.shape[1], width=drawn.shape[2],
        source="the run's own synthetic images", licence="none", citation="none", flip_ok=flip,
    )  # fmt: skip
    return Dataset(spec, lambda split: (drawn, labels)), Split(drawn, labels)


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
    runnable = rehearsal_plan(plan, dataset.spec.train_examples)
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
    return compare(notes, stage.watch.observed, runnable, watched)
