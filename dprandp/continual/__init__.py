"""``continue``: train the extractor further, on public images, then privately (Bu et al. 2024, arXiv 2402.18752).

    step-NNNNNN.safetensors   parameters, average and optimizer, for resuming (removed when the stage is done)
    extractor.safetensors     the continued extractor, which later stages of the run take in place of pretrain's
    heads/                    the private and the public head
    metrics.jsonl             public losses; norms of the noisy updates, functions of what is released anyway

Public steps are AdamW on public images (``public.py``). Public images alone decide where they end (``switching.py``).
The number of remaining private steps then determines σ, so the plan is fixed at the switch, before anything is charged
(``loop.py``). With ``mix = 'public'`` nothing is learned from private images, and nothing is charged. They are read
only to compute their hash, if a part of them is declared public, and to refuse a public set that equals them.
"""

from __future__ import annotations

import hashlib
import time
from dataclasses import replace
from typing import Any

from dprandp.config.schema import ContinueConfig, as_dict, fraction_of
from dprandp.continual import switching
from dprandp.continual.loop import DONE, HEADS, STAGE, train
from dprandp.continual.public import PublicTask, make_task, make_training
from dprandp.dpsgd import release
from dprandp.dpsgd.stage import PrivateStage, name_private_stage, open_private_stage
from dprandp.dpsgd.training_data import not_compared
from dprandp.errors import UsageError
from dprandp.pretrain import STAGE as PRETRAIN
from dprandp.runs.context import Context, recorded, with_precision
from dprandp.runs.results import (
    ContinueResult,
    GenerateResult,
    PretrainResult,
    PrivateContinueResult,
    PublicTraining,
)
from dprandp.runs.signals import graceful_stop
from dprandp.runs.tuning import tuning_of

BATCH_PART = 0.08192
"""Expected private batch as a fraction of N; De et al. 2022, Tang et al. 2023."""


def run(config: ContinueConfig, context: Context) -> ContinueResult:
    """Continue the run's extractor; a ``PrivateContinueResult``, but for public steps alone.

    Raises:
        InputError: no extractor yet, or unusable data. BudgetError: the budget is spent (no private pixel was read).
        UsageError: a patchnet, unknown public data, or settings that contradict each other.
    """
    rundir = context.rundir
    rundir.require(PRETRAIN, STAGE)
    config = with_precision(STAGE, config, context)
    flags: dict[str, Any] = {"resume": context.resume, "overwrite": context.overwrite}
    flags["ignore"] = not_compared(config, rundir)
    config = recorded(STAGE, rundir.foresee(STAGE, as_dict(config), **flags).config)
    stage = open_stage(config, context)
    private, part = config.mix != "public", fraction_of(config.public) is not None
    task = make_task(config, context, stage.spec)
    begun = rundir.begin(
        STAGE,
        as_dict(config),
        rundir.inputs_from("generate", PRETRAIN) | {"public-images": _fingerprint(task)},
        **flags,
        private_inputs=stage.private_inputs() if private or part else None,
    )
    if begun.action == "skip":
        return rundir.result(ContinueResult)
    if part:
        stage.keep_data()  # later stages must use the data of which this one used a part
    config = recorded(STAGE, begun.config)
    started = time.perf_counter()
    training, built_from = make_training(config, context, stage.spec, task)
    before = release.tensors_of(training.model)
    with graceful_stop() as stop:
        stage, outcome = train(config, stage, training, stop, as_dict(built_from))
    result = ContinueResult(
        stage=STAGE,
        arch=built_from.arch,
        precision=config.precision,
        public_training=PublicTraining(
            images=task.title,
            examples=task.examples,
            steps=outcome.switch,
            mix=config.mix,
            switch=outcome.why,
            head="one for public and private images" if task.shared else "its own",
            loss=training.looks[-1].loss if training.looks else None,
        ),
        seconds=round(time.perf_counter() - started, 2),
    )
    outputs = [f"{DONE}.safetensors", f"{HEADS}/{HEADS}.safetensors"]
    if not private:
        rundir.finish(STAGE, rundir.hash_outputs(STAGE, outputs), result)
        return result
    model = training.model
    model.load_state_dict({name: training.average[name] for name in training.private_names}, strict=False)
    result = PrivateContinueResult(
        **vars(result),
        **vars(release.evaluate(model, stage, False, keep=False)),
        **vars(stage.disclosure(outcome.updates)),
        share=config.share,
        lr=config.lr,
        momentum=training.settings.beta,
        clipping="automatic",
        optimizer=training.settings.in_words(),
        released=f"EMA, decay {config.ema}",
        mirror=False,
        tuned=tuning_of(rundir, stage.ledger, stage.plan.delta, {}),
        tuned_on=None,
    )
    release.refuse_changed(before, model, dict(model.named_parameters()))
    result = release.write_model(stage, model, replace(result, seconds=release.coarse_seconds(started)))
    stage.finish(outputs, result)
    return result


def open_stage(config: ContinueConfig, context: Context, *, write: bool = True) -> PrivateStage:
    """Plan the largest possible number of private steps, from public facts; with public steps only, no plan.

    Args:
        write: False for ``--plan``: nothing is created, and the extractor may be absent.

    Raises:
        As ``open_private_stage``; InputError: no extractor yet; UsageError: one that does not learn by gradients.
    """
    if write:
        context.rundir.require(PRETRAIN, STAGE)
    context.rundir.result(GenerateResult)  # for the model card: refuses gaps
    made = context.rundir.result(PretrainResult)
    if made is not None and made.arch == "patchnet":
        raise UsageError(
            "a patchnet is a dictionary, which `continue` cannot train by gradients",
            fix="make another extractor: dprandp pretrain --arch wrn-16-4, or --arch vit-4-64-4",
        )
    if config.mix == "public":
        stage = name_private_stage(STAGE, config, context, write=False)
        if write:
            stage.dataset.require()
        return stage
    return open_private_stage(
        STAGE,
        config,
        context,
        steps=switching.most_private_steps(config),
        batch_part=BATCH_PART,
        budget_part=config.share,
        write=write,
    )


def _fingerprint(task: PublicTask) -> str:
    """Hash of public images and labels, with which a resumed stage compares them; public."""
    digest = hashlib.sha256(f"{tuple(task.images.shape)} {task.classes}".encode())
    for tensor in (task.images, task.labels, *task.held_out):
        digest.update(tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()
