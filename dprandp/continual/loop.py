"""The steps of ``continue``: public ones, the switch, private ones; and resuming.

    public:   evaluations on held-out public images -> AdamW on a public batch
    switch:   the number of private steps is known, and with it σ: the plan is fixed, on disk, before any is charged
    private:  Poisson batch -> automatic clipping -> noise -> (mixed with a public gradient) -> AdamW
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from dprandp.config.schema import ContinueConfig
from dprandp.continual import switching
from dprandp.continual.public import Training
from dprandp.continual.switching import Look
from dprandp.dpsgd.clipped_sums import ClippedSums, SumSettings, refuse_without_gradients, share_of
from dprandp.dpsgd.masks import EXTRACTOR
from dprandp.dpsgd.stage import CONTINUE, PrivateStage
from dprandp.dpsgd.units import unit_rows
from dprandp.errors import CheckpointError
from dprandp.runs import checkpoint, faults
from dprandp.runs.checkpoint import check_tensors
from dprandp.runs.console import MetricsLog
from dprandp.runs.parallel import ALONE
from dprandp.runs.signals import Stop
from dprandp.vision.images import to_input

STAGE, DONE, HEADS = CONTINUE, "extractor", "heads"
"""``DONE`` is the checkpoint that later stages read; the heads are in a folder of their own."""

TOGETHER = 2**23
"""Numbers in the gradients that a CPU holds at a time by default: 32 MB."""


@dataclass(frozen=True)
class Outcome:
    """The course of a training; public."""

    switch: int  # the first private step; the number of all steps if there is none
    why: str  # in words
    updates: int = 0  # private updates that the parameters have seen


def train(
    config: ContinueConfig, stage: PrivateStage, training: Training, stop: Stop, built_from: dict
) -> tuple[PrivateStage, Outcome]:
    """Train from the last checkpoint, or from the start; afterwards ``training.average`` is what is released.

    Args:
        stage: with its plan for the largest number of private steps; none with ``mix = 'public'``.
        built_from: the extractor's configuration, for its checkpoint.

    Returns:
        The stage with the plan that was carried out, and the course of the training.

    Raises:
        CheckpointError: a damaged checkpoint, or a ledger that does not fit it.
    """
    folder = stage.context.rundir.stage_dir(STAGE)
    saved = checkpoint.resume(folder, warn=stage.context.console.warn)
    if saved is not None and saved.name == DONE:  # stopped after the last step
        heads = checkpoint.load_finished(folder / HEADS, HEADS, STAGE)
        tensors = {EXTRACTOR + name: value for name, value in saved.tensors.items()} | heads.tensors
        check_tensors(tensors, training.average, saved.path)
        training.average = {name: tensors[name].to(training.device) for name in training.average}
        training.looks = _looks_of(saved)
        return stage, Outcome(saved.entry("switch", int), saved.entry("why", str), saved.entry("updates", int))
    first, ledger_head, begun = 0, None, None
    if saved is not None:
        check_tensors(saved.tensors, training.state(), saved.path)
        training.load_state(saved.tensors)
        training.looks = _looks_of(saved)
        first, ledger_head = saved.entry("step", int), saved.meta.get("ledger")
        if saved.meta.get("switch") is not None:
            begun = Outcome(saved.entry("switch", int), saved.entry("why", str))
    log = MetricsLog(folder / "metrics.jsonl", first)

    def save(done: int, begun: Outcome | None) -> None:
        meta = _meta(training, begun) | {"step": done, "ledger": None if begun is None else stage.keep_head()}
        checkpoint.save(folder, f"step-{done:06d}", training.state(), meta)

    total = config.steps

    def note() -> str:
        return "" if stage.ledger is None or stage.plan is None else stage.spent_note()

    with stage.context.console.progress(total, "steps", done=first, note=note) as progress:
        if begun is None:
            begun = _public_steps(config, stage, training, first, stop, log, save, progress.advance)
            first = begun.switch
            training.switch()
            if config.mix != "public":
                stage = stage.replanned(total - first).fix_plan()
                save(first, begun)
        elif stage.plan.steps != total - begun.switch:
            raise CheckpointError(
                f"the checkpoint {saved.path} is of {total - begun.switch} private steps, the plan of "
                f"{stage.plan.steps}",
                fix="restore the run's privacy folder as it was when the checkpoint was written",
            )
        if config.mix != "public":
            done = first - begun.switch
            updates = private_steps(
                config, stage, training, begun, stop, done, ledger_head, log, save, progress.advance
            )
            begun = replace(begun, updates=updates)
    _keep(folder, training, begun, built_from)
    return stage, begun


def _public_steps(
    config: ContinueConfig,
    stage: PrivateStage,
    training: Training,
    first: int,
    stop: Stop,
    log: MetricsLog,
    save: Callable[[int, Outcome | None], None],
    advance: Callable[[int], None],
) -> Outcome:
    """Public steps until private ones begin."""
    for step in range(first, config.steps):
        if step % config.check_every == 0 and config.mix in ("step", "public"):
            look = _look(config, stage, training, step)
            training.looks.append(look)
            values = {} if look.slowdown is None else {"slowdown": look.slowdown}
            log.write(step=step, public_loss=look.loss, **values)
        why = switching.switch_now(config, training.looks, step)
        if why is not None:
            return Outcome(step, why)
        training.update(training.public_gradient(step), config.public_lr)
        advance(1)
        done = step + 1
        stop.end_step(done % config.checkpoint_every == 0, partial(save, done, None))
    return Outcome(config.steps, "only public steps were requested")


def _look(config: ContinueConfig, stage: PrivateStage, training: Training, step: int) -> Look:
    """Evaluate the held-out images; and the loss terms of a private step, if these decide the switch."""
    slowdown = None
    if config.mix == "step" and config.switch == "decelerator":
        slowdown = training.terms(step, stage.plan.noise_multiplier, stage.plan.expected_batch).slowdown
    return Look(step, training.held_out_loss(), slowdown)


def private_steps(
    config: ContinueConfig,
    stage: PrivateStage,
    training: Training,
    begun: Outcome,
    stop: Stop,
    updates: int = 0,
    ledger_head: str | None = None,
    log: MetricsLog | None = None,
    save: Callable[[int, Outcome], None] = lambda done, begun: None,
    advance: Callable[[int], None] = lambda count: None,
) -> int:
    """The remaining private steps, of which ``training`` has seen some ``updates``; returns their number in all.

    Args:
        stage: its plan is fixed.
        begun: where private steps begin.
        ledger_head: of the checkpoint, or None.

    Guarantee:
        One record (an image with its views, or a unit with its images) adds at most the plan's clip norm to a sum; all
        else is post-processing of what ``PrivateStep.release`` returns, of public images and of public settings.
    """
    split, device, plan = stage.dataset.train(), training.device, stage.plan
    images = to_input(split.images, training.model.extractor.input_size).to(device)
    labels = torch.from_numpy(split.labels).to(device)
    settings = SumSettings(
        scale=1.0,
        views=plan.views,
        seed=config.seed,
        flip=stage.spec.flip_ok,
        clip_norm=plan.clip_norm,
        automatic=True,
        precise=plan.noise == "discrete",
        microbatch=stage.context.microbatch or _together(training),
    )
    refuse_without_gradients(
        training.model, settings, {name: training.parameters[name] for name in training.private_names}
    )
    sums, rows = ClippedSums(training.model, settings), unit_rows(stage.dataset)
    mechanism = stage.mechanism(updates, ledger_head)
    public, private = training.task.examples, stage.spec.train_examples
    for step in mechanism.steps():
        # --------------------------------------------------------------------------------- private: a clipped sum
        parameters = {name: training.parameters[name] for name in training.private_names}
        batch = share_of(ALONE, step.indices, images, labels, rows)
        clipped = sums.of(parameters, step.number, batch)
        # ----------------------------------------------------------------------- from here on: post-processing of noise
        noisy = step.release(clipped)
        number = begun.switch + step.number
        weight = switching.public_weight(config, number, begun.switch, public, private)
        gradient = noisy if weight == 0 else mixed(noisy, training.public_gradient(number), weight)
        training.update(gradient, config.lr)
        training.average_in(step.number)
        faults.point("update-applied")
        if log is not None:
            norm = torch.stack([value.norm() for value in gradient.values()]).norm()
            norms = torch.stack([norm, training.parameters["head"].norm()]).tolist()  # one synchronisation
            log.write(step=number, update_norm=norms[0], weight_norm=norms[1])
        advance(1)
        done = number + 1
        due = done % config.checkpoint_every == 0 or mechanism.remaining_steps == 0
        stop.end_step(due, partial(save, done, begun))
    return mechanism.next_step


def mixed(noisy: dict[str, Tensor], public: dict[str, Tensor], weight: float) -> dict[str, Tensor]:
    """α g_public + (1 − α) g_private, name by name; a missing name counts as zero."""
    out = {name: (1 - weight) * value for name, value in noisy.items()}
    for name, value in public.items():
        out[name] = out[name] + weight * value if name in out else weight * value
    return out


def _together(training: Training) -> int | None:
    """Examples whose gradients a CPU computes together: many for a small network, where calls cost more than sums."""
    if training.device.type != "cpu":
        return None
    return max(1, min(64, TOGETHER // sum(value.numel() for value in training.parameters.values())))


def _keep(folder: Path, training: Training, outcome: Outcome, built_from: dict) -> None:
    """Write the released tensors, the extractor last: its presence means that the training is done."""
    tensors = {name: value.cpu() for name, value in training.average.items()}
    (folder / HEADS).mkdir(exist_ok=True)
    heads = {name: value for name, value in tensors.items() if not name.startswith(EXTRACTOR)}
    checkpoint.save(folder / HEADS, HEADS, heads, {}, keep=1)
    extractor = {name.removeprefix(EXTRACTOR): value for name, value in tensors.items() if name.startswith(EXTRACTOR)}
    meta = _meta(training, outcome) | {"updates": outcome.updates, "config": built_from}
    checkpoint.save(folder, DONE, extractor, meta, keep=1)


def _meta(training: Training, begun: Outcome | None) -> dict:
    why, switch = ("", None) if begun is None else (begun.why, begun.switch)
    return {"why": why, "switch": switch, "looks": [look.to_list() for look in training.looks]}


def _looks_of(saved: checkpoint.Checkpoint) -> list[Look]:
    return [Look.from_list(values) for values in saved.entry("looks", list)]
