"""``continue --take RUN``: the extractor that another run has continued, for other data than it was continued on.

What that run paid for its own private images stays its affair: it is said, and this run's ε does not count it. So the
two runs must not be about the same data: there ``continue`` and what follows belong into one run, under one budget.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch

from dprandp import checkpoint
from dprandp.config import ContinueConfig, as_dict
from dprandp.continual_config import fraction_of
from dprandp.errors import CheckpointError, UsageError
from dprandp.files import file_sha256
from dprandp.rundir import RunDir
from dprandp.runresults import refuse_gaps
from dprandp.stages.context import Context, recorded
from dprandp.stages.continual_loop import DONE, HEADS, STAGE
from dprandp.stages.pretrain import STAGE as PRETRAIN
from dprandp.stages.pretrain import pretrained
from dprandp.stages.training_data import KEPT, keep_taken, not_compared
from dprandp.vision.extractors import build_extractor, load_weights

FACTS = ("title", "epsilon", "delta", "private", "charged_steps", "unit", "adjacency")
"""Of the other run's private steps, which are said wherever this run's extractor is."""


def run(config: ContinueConfig, context: Context) -> dict:
    """Take the extractor.

    Returns:
        stage, arch, public_training (the other run's), taken (data, protected: whether images of these data must not be
        private here, by_content: whether they are known by more than their name, fraction and seed of their public
        part, and ``FACTS`` where the other run had private steps), seconds.

    Raises:
        InputError: there is no such run, or its ``continue`` is not finished. CheckpointError: it is damaged.
        UsageError: this very run, or one whose extractor is another network than this run's.
    """
    context.rundir.require(PRETRAIN, STAGE)
    other = RunDir.open(Path(config.take or "").expanduser(), create=False)
    if other.path.resolve() == context.rundir.path.resolve():
        raise UsageError("a run cannot take its own extractor", fix="name another run with --take")
    other.require(STAGE, f"continue --take {config.take}")
    made = other.result(STAGE)
    refuse_gaps(STAGE, made)
    theirs = recorded(STAGE, next(row["config"] for row in other.status() if row["stage"] == STAGE))
    if theirs.take is not None:
        raise UsageError(f"{config.take} took its extractor itself", fix=f"take it from there: --take {theirs.take}")
    loaded = checkpoint.load_finished(other.stage_dir(STAGE), DONE, STAGE)
    digest = file_sha256(loaded.path)
    begun = context.rundir.begin(
        STAGE,
        as_dict(config),
        context.rundir.inputs_from("generate", PRETRAIN) | {"taken-extractor": digest},
        resume=context.resume,
        overwrite=context.overwrite,
        ignore=not_compared(config, context.rundir),
    )
    if begun.action == "skip":
        return context.rundir.result(STAGE)
    started = time.perf_counter()
    built_from = pretrained(context)
    network = build_extractor(built_from)
    try:
        load_weights(network, loaded.tensors)
    except CheckpointError as error:
        raise UsageError(
            f"the extractor of {config.take} is a {made['arch']}, and this run's is laid out as another network",
            fix=f"lay it out alike first: dprandp pretrain --arch {made['arch']} --random-init --overwrite",
        ) from error
    (begun.directory / HEADS).mkdir(exist_ok=True)
    checkpoint.save(begun.directory / HEADS, HEADS, {"none": torch.zeros(0)}, {}, keep=1)
    meta = {"config": as_dict(built_from), "switch": 0, "why": "taken", "updates": 0, "looks": []}
    checkpoint.save(begun.directory, DONE, network.state_dict(), meta, keep=1)
    protected = "epsilon" in made or fraction_of(theirs.public) is not None
    by_content = protected and keep_taken(context.rundir, other)
    if protected and not by_content:
        context.console.warn(
            f"{config.take} has no private/{KEPT}: whether this run's data are those of that run shows by their name "
            "alone; never give both the same images"
        )
    result: dict[str, Any] = {
        "stage": STAGE,
        "arch": made["arch"],
        "public_training": made["public_training"],
        "taken": {
            "data": theirs.data,
            "protected": protected,
            "by_content": by_content,
            "fraction": fraction_of(theirs.public),
            "seed": theirs.seed,
            **({key: made[key] for key in FACTS} if "epsilon" in made else {}),
        },
        "seconds": round(time.perf_counter() - started, 2),
    }
    outputs = [f"{DONE}.safetensors", f"{DONE}.json", f"{HEADS}/{HEADS}.safetensors"]
    context.rundir.finish(STAGE, context.rundir.hash_outputs(STAGE, outputs), result)
    return result
