"""DP-SGD of a linear head on features that are already computed: Phase II, and the end of Phase III.

The gradient of a linear head and its norm have a closed form: a full-batch step over 50,000 examples takes a fraction
of a second.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from dprandp.dpsgd.features import placed
from dprandp.dpsgd.stage import PrivateStage
from dprandp.dpsgd.units import unit_rows
from dprandp.privacy.clipping import clipped_softmax_sum
from dprandp.privacy.gaussian_dp import gaussian_dp_mu
from dprandp.runs import checkpoint, faults
from dprandp.runs.checkpoint import check_tensors
from dprandp.runs.console import MetricsLog
from dprandp.runs.signals import Stop

HEAD = "head"
CHECKPOINTS = 8
"""Checkpoints of the head per fit: a crash loses at most an eighth of the steps."""

EMA_DECAY = 0.97
"""Decay of ``released = "ema"``: about the last thirty iterates."""

LR_PER_SIGNAL = 10 / (0.268 * 50_000)
LR_MAX = 100.0
LR_STEPS = 120
"""With more steps than these, each is shorter in proportion, so that the path has the same length."""


@dataclass(frozen=True)
class HeadSettings:
    """How a head is fitted; see ``ProbeConfig`` for the meaning of the fields. Steps and clip norm are the plan's."""

    lr: float
    momentum: float
    released: str
    class_weights: Tensor | None = None  # of the loss: ``losses.class_weights``


State = dict[str, Tensor]


def begin_head(start: Tensor) -> State:
    """The state of a fit before its first update: head, velocity, average, each float32 [d, classes]."""
    return {"head": start.clone(), "velocity": torch.zeros_like(start), "average": torch.zeros_like(start)}


def update_head(state: State, update: Tensor, settings: HeadSettings, number: int, steps: int) -> None:
    """Apply one noisy mean gradient, [d, classes], in place; the update rule of every head, real or simulated.

    Args:
        number: of the update, from 0. steps: of all updates; their second half is averaged.
    """
    state["velocity"] = settings.momentum * state["velocity"] + update
    state["head"] = state["head"] - settings.lr * state["velocity"]
    averaged_from = steps // 2
    if settings.released == "average" and number >= averaged_from:
        state["average"] = torch.lerp(state["average"], state["head"], 1 / (number - averaged_from + 1))
    elif settings.released == "ema":
        decay = min(EMA_DECAY, (1 + number) / (10 + number))
        state["average"] = torch.lerp(state["head"], state["average"], decay)


def released_head(state: State, settings: HeadSettings) -> Tensor:
    """What is released of a fit that has ended."""
    averaged = settings.released != "last" and bool(state["average"].any())  # crashes may have eaten the second half
    return state["average"] if averaged else state["head"]


def default_lr(epsilon: float, delta: float, examples: int, steps: int, clip_norm: float) -> float:
    """Learning rate from public numbers: proportional to μN, what N examples (or units) say above the noise.

    With momentum .9 and unit-norm features a rate of 10 at ε = 1 and N = 50,000 (μ = .268) and 60 at ε = 8 (μ = 1.67)
    serve where C = 1; both lie on one line through zero. Without noise the rate is capped. It is divided by the clip
    norm, in whose unit sums and noise are.
    """
    return lr_at(math.inf if math.isinf(epsilon) else gaussian_dp_mu(epsilon, delta), examples, steps, clip_norm)


def lr_at(mu: float, examples: int, steps: int, clip_norm: float) -> float:
    """``default_lr`` of a budget that is μ-Gaussian; inf without noise."""
    return min(LR_MAX, LR_PER_SIGNAL * mu * examples) * min(1.0, LR_STEPS / steps) / clip_norm


def fit_head(
    stage: PrivateStage,
    features: Tensor,
    labels: Tensor,
    start: Tensor,
    settings: HeadSettings,
    folder: Path,
    stop: Stop,
) -> tuple[Tensor, int]:
    """Fit a head with DP-SGD and momentum, as ``stage.plan`` says; resumes from ``folder``.

    Args:
        stage: its plan is fixed.
        features: float [N, d] or [N, K, d] on the CPU, unit norm (private); memory-mapped or not.
        labels: int64 [N], or [N, classes] of 0 and 1, on the CPU (private).
        start: float32 [d, classes], where the head begins: zero, or the released head of an earlier stage.
        folder: checkpoints and metrics.jsonl.

    Returns:
        What is released, [d, classes] on the context's device, and the number of updates it has seen.

    Guarantee:
        Features and labels enter only through sums of sensitivity ``clip_norm``, to one record (an image, or a unit of
        several), that ``step.release`` makes noisy.
    """
    plan, device = stage.plan, stage.context.device
    start = start.to(device)
    saved = checkpoint.resume(folder, warn=stage.context.console.warn)
    if saved is not None and saved.name == HEAD:  # stopped between the last step and the end of the stage
        check_tensors(saved.tensors, {HEAD: start}, saved.path)
        return saved.tensors[HEAD].to(device), saved.entry("updates", int)
    state = begin_head(start)
    first_step, ledger_head = 0, None
    if saved is not None:
        check_tensors(saved.tensors, state, saved.path)
        state = {name: value.to(device) for name, value in saved.tensors.items()}
        first_step, ledger_head = saved.entry("step", int), saved.entry("ledger", str)
    features, labels = placed(features, labels, start.shape[1], device)
    log = MetricsLog(folder / "metrics.jsonl", first_step)
    every = max(1, plan.steps // CHECKPOINTS)
    mechanism = stage.mechanism(first_step, ledger_head)
    precise = plan.noise == "discrete"  # then rounding must not add to the sensitivity either
    rule = {"precise": precise, "class_weights": settings.class_weights}
    rows = unit_rows(stage.dataset)

    def save(done: int) -> None:
        checkpoint.save(folder, f"step-{done:06d}", state, {"step": done, "ledger": stage.keep_head()})

    console = stage.context.console
    with console.progress(plan.steps, f"{stage.name} steps", done=first_step, note=stage.spent_note) as progress:
        for step in mechanism.steps():
            # ----------------------------------------------------------------------------------- private: a clipped sum
            head = state["head"]
            if rows is not None:
                clipped = rows.clipped_softmax_sum(features, labels, step.indices, head, plan.clip_norm, **rule)
            else:
                batch = None if plan.sample_rate == 1 else torch.from_numpy(step.indices)
                clipped = clipped_softmax_sum(features, labels, head, plan.clip_norm, rows=batch, **rule)
            # ------------------------------------------------------------------- from here on: post-processing of noise
            update = step.release({"head": clipped})["head"]
            update_head(state, update, settings, step.number, plan.steps)
            faults.point("update-applied")
            update_norm, weight_norm = torch.stack([update.norm(), state["head"].norm()]).tolist()
            log.write(step=step.number, update_norm=update_norm, weight_norm=weight_norm)
            progress.advance(1)
            done = step.number + 1
            stop.end_step(done % every == 0 or mechanism.remaining_steps == 0, partial(save, done))
    released = released_head(state, settings)
    checkpoint.save(folder, HEAD, {HEAD: released}, {"updates": mechanism.next_step}, keep=1)
    return released, mechanism.next_step
