"""The steps of ``continue``: public ones, the switch, private ones; and resuming.

    public:   evaluations on held-out public images -> AdamW on a public batch
    switch:   the number of private steps is known, and with it σ: the plan is fixed, on disk, before any is charged
    private:  Poisson batch -> automatic clipping -> noise -> (mixed with a public gradient) -> AdamW

A private gradient reaches ``Training`` only as what ``PrivateStep.release`` returned.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from dprandp.config.schema import ContinueConfig
from dprandp.continual import switching
from dprandp.continual.public import Training
from dprandp.continual.switching import Look
from dprandp.dpsgd.clipped_sums import ClippedSums, SumSettings, share_of
from dprandp.dpsgd.stage import PrivateStage
from dprandp.dpsgd.units import unit_rows
from dprandp.errors import CheckpointError
from dprandp.runs import checkpoint, faults
from dprandp.runs.checkpoint import check_tensors
from dprandp.runs.console import MetricsLog
from dprandp.runs.parallel import ALONE
from dprandp.runs.signals import Stop
from dprandp.vision.images import to_input

STAGE, DONE, HEADS = "continue", "extractor", "heads"
"""``DONE`` is the checkpoint that later stages read; the heads are in a folder of their own."""

TOGETHER = 2**23
"""Numbers in the gradients that a CPU holds at a time by default: 32 MB."""


@dataclass(frozen=True)
class Outcome:
    """The outcome of a training; public.

    Attributes:
        switch: the first private step; the number of all steps if there is none.
        why: in words.
        updates: private updates that the parameters have seen.
    """

    switch: int
    why: str
    updates: int


def train(config: ContinueConfig, stage: PrivateStage, training: Training, stop: Stop, built_from: dict) -> Outcome:
    """Train from the last checkpoint, or from the start.

    Args:
        config: as recorded.
        stage: with its plan for the largest number of private steps; none with ``mix = 'public'``.
        training: at its start. Afterwards ``average`` holds the released parameters.
        stop: asked after every step.
        built_from: the extractor's configuration, for its checkpoint.

    Raises:
        CheckpointError: a damaged checkpoint, or a ledger that does not fit it.
    """
    folder = stage.context.rundir.stage_dir(STAGE)
    saved = checkpoint.resume(folder, warn=stage.context.console.warn)
    if saved is not None and saved.name == DONE:  # stopped after the last step
        heads = checkpoint.load_finished(folder / HEADS, HEADS, STAGE)
        tensors = {f"extractor.{name}": value for name, value in saved.tensors.items()} | heads.tensors
        check_tensors(tensors, training.average, saved.path)
        training.average = {name: tensors[name].to(training.device) for name in training.average}
        training.looks = _looks_of(saved)
        return Outcome(saved.entry("switch", int), saved.entry("why", str), saved.entry("updates", int))
    first, switch, why, ledger_head = 0, None, "", None
    if saved is not None:
        check_tensors(saved.tensors, training.state(), saved.path)
        training.load_state(saved.tensors)
        training.looks = _looks_of(saved)
        first, why, ledger_head = saved.entry("step", int), saved.entry("why", str), saved.meta.get("ledger")
        switch = None if saved.meta.get("switch") is None else saved.entry("switch", int)
    log = MetricsLog(folder / "metrics.jsonl", first)

    def save(done: int, begun: Outcome | None) -> None:
        meta = _meta(training, "" if begun is None else begun.why, None if begun is None else begun.switch)
        meta |= {"step": done, "ledger": None if begun is None else stage.keep_head()}
        checkpoint.save(folder, f"step-{done:06d}", training.state(), meta)

    total = config.steps
    with stage.context.console.progress(total, "steps", done=first) as progress:
        if switch is None:
            switch, why = _public_steps(config, stage, training, first, stop, log, save, progress.advance)
            first = switch
            training.switch()
            if config.mix != "public":
                stage.replan(total - switch)
                stage.fix_plan()
                save(switch, Outcome(switch, why, 0))
        elif stage.plan.steps != total - switch:
            raise CheckpointError(
                f"the checkpoint {saved.path} is of {total - switch} private steps, the plan of {stage.plan.steps}",
                fix="restore the run's privacy folder as it was when the checkpoint was written",
            )
        outcome = Outcome(switch, why, 0)
        if config.mix != "public":
            updates = private_steps(
                config, stage, training, outcome, stop, first - switch, ledger_head, log, save, progress.advance
            )
            outcome = Outcome(switch, why, updates)
    _keep(folder, training, outcome, built_from)
    return outcome


def _public_steps(
    config: ContinueConfig,
    stage: PrivateStage,
    training: Training,
    first: int,
    stop: Stop,
    log: MetricsLog,
    save: Callable[[int, Outcome | None], None],
    advance: Callable[[int], None],
) -> tuple[int, str]:
    """Public steps until private ones begin; the step and the reason."""
    for step in range(first, config.steps):
        if step % config.check_every == 0 and config.mix in ("step", "public"):
            look = _look(config, stage, training, step)
            training.looks.append(look)
            values = {} if look.slowdown is None else {"slowdown": look.slowdown}
            log.write(step=step, public_loss=look.loss, **values)
        why = switching.switch_now(config, training.looks, step)
        if why is not None:
            return step, why
        training.update(training.public_gradient(step), config.public_lr)
        advance(1)
        done = step + 1
        stop.end_step(done % config.checkpoint_every == 0, partial(save, done, None))
    return config.steps, "only public steps were requested"


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
    """The remaining private steps.

    Args:
        config, stage, training, stop: as for ``train``; the plan is fixed.
        begun: where private steps begin.
        updates: private updates that ``training`` has seen. ledger_head: of its checkpoint, or None.
        log, save, advance: metrics, checkpoints, progress.

    Returns:
        Private updates in all.

    Guarantee:
        One record (an image with its views, or a unit with its images) adds at most the plan's clip norm to a sum; all
        else is post-processing of what ``PrivateStep.release`` returns, of public images and of public settings.
    """
    split, device = stage.dataset.train(), training.device
    images, labels = to_input(split.images).to(device), torch.from_numpy(split.labels).to(device)
    rows = unit_rows(stage.dataset)
    settings = SumSettings(
        scale=1.0,
        views=stage.plan.views,
        seed=config.seed,
        flip=stage.spec.flip_ok,
        clip_norm=stage.plan.clip_norm,
        automatic=True,
        precise=stage.plan.noise == "discrete",
        microbatch=stage.context.microbatch or _together(training, device),
    )
    sums = ClippedSums(training.model, settings)
    mechanism = stage.mechanism(updates, ledger_head)
    public, private = training.task.examples, stage.spec.train_examples
    for step in mechanism.steps():
        # --------------------------------------------------------------------------------- private: a clipped sum
        parameters = {name: training.parameters[name] for name in training.private_names}
        batch = share_of(ALONE, step.indices, images, labels, None if rows is None else rows.images)
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


def _together(training: Training, device: torch.device) -> int | None:
    """Examples whose gradients a CPU computes together: many for a small network, where calls cost more than sums."""
    if device.type != "cpu":
        return None
    return max(1, min(64, TOGETHER // sum(value.numel() for value in training.parameters.values())))


def _keep(folder: Path, training: Training, outcome: Outcome, built_from: dict) -> None:
    """Write the released tensors, the extractor last: its presence means that the training is done."""
    prefix = "extractor."
    tensors = {name: value.cpu() for name, value in training.average.items()}
    (folder / HEADS).mkdir(exist_ok=True)
    heads = {name: value for name, value in tensors.items() if not name.startswith(prefix)}
    checkpoint.save(folder / HEADS, HEADS, heads, {}, keep=1)
    extractor = {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
    meta = _meta(training, outcome.why, outcome.switch) | {"updates": outcome.updates, "config": built_from}
    checkpoint.save(folder, DONE, extractor, meta, keep=1)


def _meta(training: Training, why: str, switch: int | None) -> dict:
    return {"why": why, "switch": switch, "looks": [look.to_list() for look in training.looks]}


def _looks_of(saved: checkpoint.Checkpoint) -> list[Look]:
    return [Look.from_list(values) for values in saved.entry("looks", list)]
