"""Phase II: a linear head on frozen features, fitted with DP-SGD.

    statistics/whitener.safetensors   statistics of *synthetic* features (public)
    step-NNNNNN.safetensors           the head and its momentum, for resuming (removed when the training is done)
    head.safetensors                  the released head
    metrics.jsonl                     norms of the noisy updates: functions of what is released anyway

Private pixels pass through the frozen extractor once, each image on its own; their features stay in ``private/``. The
only thing learned from them comes out of ``PrivateMechanism``.
"""

from __future__ import annotations

import math
import time

import torch
from torch import Tensor

from dprandp import checkpoint, faults
from dprandp.config import ProbeConfig, as_dict
from dprandp.console import MetricsLog
from dprandp.privacy.clipping import clipped_softmax_sum
from dprandp.privacy.gaussian_dp import equivalent_mu
from dprandp.signals import Stop, graceful_stop
from dprandp.stages import release
from dprandp.stages.context import Context
from dprandp.stages.features import private_features
from dprandp.stages.pretrain import load_extractor, synthetic_crops
from dprandp.stages.private import DEFAULT_SHARE, PrivateStage, open_private_stage
from dprandp.vision import whitening
from dprandp.vision.classifier import Classifier
from dprandp.vision.extractors import extract
from dprandp.vision.images import as_declared

STAGE = "probe"
HEAD, WHITENER = "head", "whitener"
WHITENER_FILE = f"statistics/{WHITENER}.safetensors"
CHECKPOINTS = 8
"""Checkpoints of the head per run: a crash loses at most an eighth of the steps."""

EMA_DECAY = 0.97
"""Of ``released = "ema"``: about the last thirty iterates."""

SYNTHETIC_SEED = 1
"""Added to the seed for the crops that the whitener is fitted to, so that they differ from the pretraining's."""

LR_PER_SIGNAL = 10 / (0.268 * 50_000)
LR_MAX = 100.0


def default_lr(epsilon: float, delta: float, examples: int) -> float:
    """Learning rate from public numbers: proportional to μN, what N examples say above the noise.

    With momentum .9 and unit-norm features a rate of 10 at ε = 1 and N = 50,000 (μ = .268) and 60 at ε = 8 (μ = 1.67)
    serve; both lie on one line through zero. Without noise the rate is capped.
    """
    return LR_MAX if math.isinf(epsilon) else min(LR_MAX, LR_PER_SIGNAL * equivalent_mu(epsilon, delta) * examples)


def run(config: ProbeConfig, context: Context) -> dict:
    """Fit the head and write the model.

    Returns:
        The keys of ``release.evaluate`` and ``PrivateStage.disclosure``, and stage, share, lr, momentum, released,
        mirror, seconds.

    Raises:
        InputError: no extractor yet, or unusable data. BudgetError: the budget does not allow it (no pixel was read).
    """
    context.rundir.require("pretrain", STAGE)
    stage = open_private_stage(STAGE, config, context)
    begun = context.rundir.begin(
        STAGE,
        as_dict(config),
        context.rundir.inputs_from("generate", "pretrain"),
        resume=context.resume,
        overwrite=context.overwrite,
        private_inputs=stage.private_inputs(),
    )
    if begun.action == "skip":
        return context.rundir.result(STAGE)
    config = ProbeConfig(**begun.config)
    started = time.perf_counter()
    stage.fix_plan()
    spec = stage.spec

    # ------------------------------------------------------------------------------------- public: extractor, whitener
    extractor, _ = load_extractor(context)
    mirror = spec.flip_ok if config.mirror is None else config.mirror
    whitener = _fit_whitener(config, context, extractor, mirror, spec)
    model = Classifier(extractor, whitener, len(spec.classes)).to(context.device)

    # ------------------------------------------------------------------------ private: features, then nothing but noise
    features, labels = private_features(stage, extractor, whitener, mirror=mirror, views=config.views, seed=config.seed)
    lr = config.lr or default_lr(stage.epsilon_alone, stage.plan.delta, spec.train_examples)
    with graceful_stop() as stop:
        head, updates = _fit_head(config, stage, features, labels, lr, stop)
    model.head.data.copy_(head)

    # -------------------------------------------------------------------------------------------------- test, once; out
    result = {
        "stage": STAGE,
        **release.evaluate(model, stage, mirror),
        **stage.disclosure(updates),
        "share": DEFAULT_SHARE if config.share is None else config.share,
        "lr": lr,
        "momentum": config.momentum,
        "released": config.released,
        "mirror": mirror,
        "seconds": round(time.perf_counter() - started, 2),
    }
    release.write_model(context.rundir, model, result)
    context.rundir.finish(STAGE, context.rundir.hash_outputs(STAGE, [f"{HEAD}.safetensors", WHITENER_FILE]), result)
    return result


def load_whitener(context: Context) -> whitening.Whitener:
    """The whitener of a finished probe."""
    tensors = checkpoint.load(context.rundir.stage_dir(STAGE) / "statistics", WHITENER).tensors
    whitener = whitening.Whitener(*tensors["projection"].shape)
    whitener.load_state_dict(tensors)
    return whitener


def load_head(context: Context) -> Tensor:
    """The released head of a finished probe, float32 [dims, classes]."""
    return checkpoint.load(context.rundir.stage_dir(STAGE), HEAD).tensors[HEAD]


def _fit_whitener(config: ProbeConfig, context: Context, extractor, mirror: bool, spec) -> whitening.Whitener:
    folder = context.rundir.stage_dir(STAGE) / "statistics"
    folder.mkdir(exist_ok=True)
    if checkpoint.latest(folder) == WHITENER:
        return load_whitener(context)
    crops = synthetic_crops(context, config.statistics_images, config.seed + SYNTHETIC_SEED)
    crops = as_declared(crops, channels=spec.channels, height=spec.height, width=spec.width)
    with context.console.progress(len(crops), "synthetic features") as progress:
        features = extract(extractor, crops, mirror=mirror, on_batch=progress.advance)
    whitener = whitening.fit(features, config.dims, config.whitening_floor)
    checkpoint.save(folder, WHITENER, whitener.state_dict(), {"images": len(crops), "mirror": mirror}, keep=1)
    return whitener


def _fit_head(
    config: ProbeConfig, stage: PrivateStage, features: Tensor, labels: Tensor, lr: float, stop: Stop
) -> tuple[Tensor, int]:
    """DP-SGD with momentum from a zero head.

    Args:
        features: [N, d] or [N, K, d], unit norm (private).
        labels: int64 [N] (private).

    Returns:
        What is released, [dims, classes], and the number of updates it has seen.
    """
    folder = stage.context.rundir.stage_dir(STAGE)
    dims, classes = features.shape[-1], len(stage.spec.classes)
    state = {name: torch.zeros(dims, classes) for name in ("head", "velocity", "average")}
    first_step = 0
    saved = checkpoint.resume(folder, warn=stage.context.console.warn)
    if saved is not None and saved.name == HEAD:  # stopped between the last step and the end of the stage
        return saved.tensors[HEAD], saved.meta["updates"]
    if saved is not None:
        state, first_step = saved.tensors, saved.meta["step"]
    log = MetricsLog(folder / "metrics.jsonl", first_step)
    every = max(1, config.steps // CHECKPOINTS)
    averaged_from = config.steps // 2
    full_batch = stage.plan.sample_rate == 1
    mechanism = stage.mechanism(first_step)
    with stage.context.console.progress(config.steps, "probe steps", done=first_step) as progress:
        for step in mechanism.steps():
            batch = slice(None) if full_batch else torch.from_numpy(step.indices)
            clipped = clipped_softmax_sum(features[batch], labels[batch], state["head"], config.clip_norm)
            update = step.release({"head": clipped})["head"]
            state["velocity"] = config.momentum * state["velocity"] + update
            state["head"] = state["head"] - lr * state["velocity"]
            if config.released == "average" and step.number >= averaged_from:
                weight = 1 / (step.number - averaged_from + 1)
                state["average"] = torch.lerp(state["average"], state["head"], weight)
            elif config.released == "ema":
                decay = min(EMA_DECAY, (1 + step.number) / (10 + step.number))
                state["average"] = torch.lerp(state["head"], state["average"], decay)
            faults.point("update-applied")
            log.write(step=step.number, update_norm=float(update.norm()), weight_norm=float(state["head"].norm()))
            progress.advance(1)
            done = step.number + 1
            if stop.requested or done % every == 0 or mechanism.remaining_steps == 0:
                checkpoint.save(folder, f"step-{done:06d}", state, {"step": done})
            stop.raise_if_requested()
    averaged = config.released != "last" and bool(state["average"].any())  # crashes may have eaten the second half
    released = state["average"] if averaged else state["head"]
    checkpoint.save(folder, HEAD, {HEAD: released}, {"updates": mechanism.next_step}, keep=1)
    return released, mechanism.next_step
