"""The context of a stage, apart from its configuration: where to write, how to report, and options for speed."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from dprandp.config.schema import StageConfig, build
from dprandp.errors import CheckpointError, InputError, UsageError
from dprandp.models.precision import AUTO, decide
from dprandp.runs.console import Console
from dprandp.runs.directory import RunDir
from dprandp.runs.parallel import ALONE, Ranks


@dataclass(frozen=True)
class Context:
    """A stage's inputs that are not part of the experiment: none of them changes a public stage's result.

    Attributes:
        rundir: opened and locked.
        download: fetch a known data set's files where they are missing; nothing is fetched otherwise.
        workers: processes for image generation.
        microbatch: examples whose gradients are in memory together; None lets the stage choose. No effect on results.
        resume: keep the recorded configuration, and start from the last good checkpoint.
        overwrite: restart the stage.
        insecure_seed: seed of the noise for tests; makes the run NOT PRIVATE. None is OS entropy.
        ranks: the processes that run the stage together. Ranks other than rank 0 never write to the run directory.
    """

    rundir: RunDir
    console: Console
    device: torch.device
    data_dir: Path
    download: bool = False
    workers: int = 1
    microbatch: int | None = None
    resume: bool = False
    overwrite: bool = False
    insecure_seed: int | None = None
    ranks: Ranks = ALONE


def prepare_device(name: str) -> torch.device:
    """The device of a ``--device`` flag; also makes the process-wide settings for every stage.

    Raises:
        UsageError: unknown name, or a device that is not there.
    """
    # Softmax tails are denormal numbers, on which a CPU is a hundred times slower; they change no sum.
    torch.set_flush_denormal(True)
    torch.set_float32_matmul_precision("highest")  # with less, no sum is clipped exactly
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if not re.fullmatch(r"cpu|cuda(:\d{1,3})?", name):
        raise UsageError(f"--device {name!r} is unknown", fix="use auto, cpu, cuda or cuda:0")
    device = torch.device(name)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UsageError(
            f"--device {name}: this machine has {torch.cuda.device_count()} such devices", fix="use --device cpu"
        )
    return device


def device_of_rank(kind: str) -> torch.device:
    """This rank's device, of the same kind as rank 0's: the CPU, or the accelerator with its number on its machine.

    Raises:
        InputError: its machine has no device for each of its processes.
    """
    device = prepare_device("cpu")
    if kind != "cpu":
        local, found = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
        if local >= found:
            raise InputError(
                f"there are {found} CUDA devices on its machine, and it is process {local + 1} there",
                fix="start one process for each device, or give --device cpu",
            )
        device = torch.device("cuda", local)
        torch.cuda.set_device(device)
    return device


def with_precision(stage: str, config: StageConfig, context: Context) -> StageConfig:
    """A stage's configuration with its precision decided: as given, else as recorded, else by the device.

    A stage keeps its precision when it continues on another machine, and a fine-tune takes that of its probe.
    """
    asked = config.precision
    recorded = {row.stage: (row.config or {}).get("precision", AUTO) for row in context.rundir.status()}
    if asked == AUTO and not context.overwrite:
        asked = recorded[stage]
    if asked == AUTO and stage == "finetune" and config.source == "probe":
        asked = recorded["probe"]
    return replace(config, precision=decide(asked, context.device.type))


def recorded(stage: str, values: dict[str, Any]) -> StageConfig:
    """A stage's configuration as a run recorded it.

    Raises:
        CheckpointError: it has other settings than this version, or values out of range.
    """
    try:
        return build(stage, values)
    except UsageError as error:
        raise CheckpointError(
            f"the recorded configuration of stage {stage!r} is not one of this version: {error.problem}",
            fix="use the version of dprandp that wrote it, or restart the stage with --overwrite",
        ) from error
