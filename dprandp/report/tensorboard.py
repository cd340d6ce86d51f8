"""The metrics of a run as event files for TensorBoard: what ``metrics.jsonl`` holds, all of which may be released."""

from __future__ import annotations

from pathlib import Path

from dprandp.errors import UsageError
from dprandp.report.run import read_run
from dprandp.runs.directory import RunDir


def write_events(rundir: RunDir, folder: Path) -> None:
    """Write a folder for each stage: its scalars by step, and test accuracy and ε at its last.

    Raises:
        UsageError: the folder exists, or TensorBoard is not installed. StorageError: the disk refuses.
    """
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise UsageError(
            "--tensorboard needs TensorBoard, which is not installed", fix="pip install 'dprandp[tensorboard]'"
        ) from error
    if folder.exists():
        raise UsageError(f"{folder} exists", fix="give another folder")
    run = read_run(rundir)
    for stage, lines in run.metrics.items():
        with SummaryWriter(str(folder / stage)) as writer:
            last = 0
            for line in lines:
                last = line.get("step", last)
                for name, value in line.items():
                    if name != "step" and type(value) in (int, float):
                        writer.add_scalar(name, value, last)
            for name in ("accuracy", "epsilon"):
                value = getattr(run.results[stage], name, None)
                if value is not None:
                    writer.add_scalar(name, value, last)
