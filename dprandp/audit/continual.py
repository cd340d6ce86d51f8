"""The audit of ``continue``: its own loop of private steps, watched, on made-up or real records, and thrown away.

As for the fine-tune (``loops.py``): the loop runs with and without one record, with the same random bits; nothing
but the record's own part, no longer than the clip norm, may differ. Examples are taken one at a time, so that leaving
one out moves no rounding of the others.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from dprandp import continual
from dprandp.audit.games import AuditSettings, as_values, passed
from dprandp.audit.loops import Rehearsal, made_up_images, records_for, rehearsal_context
from dprandp.audit.records import Facts
from dprandp.config.schema import ContinueConfig
from dprandp.continual.loop import STAGE, Outcome, private_steps
from dprandp.continual.public import PublicTask, Training
from dprandp.data import Dataset
from dprandp.models.classifier import Classifier
from dprandp.models.whitening import PooledOnly
from dprandp.pretrain import STAGE as PRETRAIN
from dprandp.pretrain import load_extractor
from dprandp.privacy.auditing.controls import CONTROLS, FAITHFUL, Control, rehearsal_plan
from dprandp.privacy.auditing.replay import Check, Tape, compare
from dprandp.privacy.mechanism import PrivatePlan
from dprandp.runs.context import Context
from dprandp.runs.signals import Stop
from dprandp.vision.images import colour_of, to_input

STEPS, BATCH = 2, 8
PUBLIC = 16
"""Made-up images that stand for the public ones."""

CLIP_OFF = tuple(control for control in CONTROLS if control.name == "clip off")


def on_made_up(
    plan: PrivatePlan, facts: Facts, settings: AuditSettings, context: Context
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The loop on public records: its checks, and the control that shows that its clip is seen."""
    generator = torch.Generator().manual_seed(settings.seed)
    count = records_for(plan, BATCH)
    dataset, _ = made_up_images(facts.images, facts.classes, count, facts.mirror, generator, settings.images)
    config, last = _config(context), dataset.spec.train_units - 1

    def replayed(steps: int, control: Control = FAITHFUL) -> list[Check]:
        return replay(plan, config, dataset, last, facts, context, steps, control)

    controls = []
    for control in CLIP_OFF if settings.controls else ():
        seen = not passed(as_values(replayed(1, control), ""))
        name = f"{control.name}, in continue"
        controls.append({"name": name, "flagged": seen, "by": ["replay"] if seen else [], "mu_lower": None})
    return as_values(replayed(STEPS), "synthetic image"), controls


def on_private_record(plan: PrivatePlan, facts: Facts, context: Context, watched: int) -> list[dict[str, Any]]:
    """The loop with and without one of the run's records; every value of what is returned is private."""
    config = _config(context)
    dataset = continual.open_stage(config, context, write=False).dataset
    return as_values(replay(plan, config, dataset, watched, facts, context, STEPS), "private record")


def replay(
    plan: PrivatePlan,
    config: ContinueConfig,
    dataset: Dataset,
    watched: int,
    facts: Facts,
    like: Context,
    most: int,
    control: Control = FAITHFUL,
) -> list[Check]:
    """Run the private steps with and without one record, with the same random bits; compare.

    Args:
        plan: what was accounted.
        config: the run's.
        dataset: its records; private where it is the run's own.
        watched: position of the record.
        facts: for the public images that are mixed in.
        like: the run's context: its extractor, its device.
        most: steps.
        control: the fault to make, if any.
    """
    runnable = rehearsal_plan(plan, dataset.spec.train_units)
    tape, notes = Tape(), None
    for present in (True, False):
        with rehearsal_context(like) as context:
            extractor, _ = load_extractor(like, colour_of(dataset.spec.channels), PRETRAIN, config.precision)
            model = Classifier(extractor, PooledOnly(extractor.feature_dim), len(dataset.spec.classes))
            torch.nn.init.normal_(model.head, generator=torch.Generator().manual_seed(0))  # zeros stop gradients
            stage = Rehearsal(runnable, replace(context, microbatch=1), dataset=dataset, control=control, most=most,
                              watched=watched, tape=tape if present else tape.again(), present=present,
                              follow=notes)  # fmt: skip
            training = Training(config, model.to(like.device), _task(facts, dataset, config))
            private_steps(config, stage, training, Outcome(0, "an audit", 0), Stop())
        if present:
            notes = stage.watch.observed
    return compare(notes, stage.watch.observed, runnable, watched)


def _config(context: Context) -> ContinueConfig:
    row = next(row for row in context.rundir.status() if row["stage"] == STAGE)
    return ContinueConfig(**row["config"])


def _task(facts: Facts, dataset: Dataset, config: ContinueConfig) -> PublicTask:
    generator = torch.Generator().manual_seed(config.seed)
    _, split = made_up_images(facts.images, facts.classes, PUBLIC, facts.mirror, generator)
    images, labels = to_input(split.images), torch.from_numpy(split.labels)
    return PublicTask(
        title="made up", images=images, labels=labels, classes=facts.classes, shared=True, held_out=(images, labels),
        flip=facts.mirror, spec=dataset.spec, synthetic=False, seed=config.seed,
    )  # fmt: skip
