"""From flags to a stage: the console, the locked run directory, the configuration, the context."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from dprandp.cli import together
from dprandp.config.schema import SIZES, WITHOUT_PHASE_ONE, StageConfig, as_dict
from dprandp.config.schema import resolve as resolve_config
from dprandp.config.toml import read as read_toml
from dprandp.errors import InputError, UsageError
from dprandp.runs.console import Console
from dprandp.runs.directory import STAGES, RunDir

DEFAULT_RUN = Path("runs/default")

current = Console()
"""The console of the command under way; errors raised before a command has parsed its flags go to this plain one."""


def console(*, json: bool = False, quiet: bool = False, debug: bool = False) -> Console:
    """Set up the command's console."""
    global current
    current = Console(quiet=quiet, json=json, debug=debug)
    current.route_logging()
    return current


@contextlib.contextmanager
def opened(path: Path, create: bool = False) -> Iterator[RunDir]:
    """The run directory, locked."""
    if not create and not path.exists():
        raise InputError(f"there is no run at {path}", fix=f"start one: {command('generate', path)}")
    rundir = RunDir.open(path, create=True)
    with rundir.lock():
        yield rundir


@contextlib.contextmanager
def looked_at(path: Path, create: bool = False) -> Iterator[RunDir]:
    """The run directory for ``--plan``: neither locked nor written to. A run yet to be made is an empty folder."""
    if path.exists() or not create:
        yield RunDir.open(path, create=False)
        return
    with tempfile.TemporaryDirectory() as empty:
        yield RunDir.open(empty, create=False)


def resolve(
    rundir: RunDir,
    stage: str,
    size: str | None,
    file: Path | None,
    given: dict[str, Any],
    planned: Mapping[str, StageConfig] | None = None,
    fitting: Mapping[str, Any] | None = None,
):
    """Configuration from flags, with what the run already decided (size, data, budget) as defaults.

    ``planned`` stages count as decided by the run. ``fitting`` values suit the data, as they are declared: they stand
    where neither a flag nor the configuration file says otherwise.
    """
    recorded = {row["stage"]: row["config"] for row in rundir.status() if row["config"]}
    recorded |= {name: as_dict(config) for name, config in (planned or {}).items()}
    order = list(STAGES)
    before = [recorded[name] for name in order[: order.index(stage) + 1] if name in recorded]
    if size is None and before:
        size = before[-1].get("size")
    inherited: dict[str, Any] = dict(fitting or {})
    decided = ("data", "epsilon", "delta", "classes", "unit_column", "noise")
    if stage == "finetune" and given.get("source") not in WITHOUT_PHASE_ONE and "probe" in recorded:
        inherited |= {k: v for k, v in recorded["probe"].items() if k in decided}
        if "data" in recorded.get("finetune", {}):  # begun after the data had moved, maybe
            inherited["data"] = recorded["finetune"]["data"]
    elif stage in ("continue", "probe") and stage not in recorded and (other := _private_before(recorded)):
        inherited |= {k: v for k, v in other.items() if k in decided}
    elif stage in recorded:
        inherited |= {k: v for k, v in recorded[stage].items() if k in (*decided, "arch", "public")}
        if recorded[stage].get("colour") == "both":  # fits whatever the data are
            inherited["colour"] = "both"
    return resolve_config(stage, size or SIZES[0], file, given, inherited)


def _private_before(recorded: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
    """The configuration of another private stage of the run, by which its data and its budget are known."""
    found = next((recorded[name] for name in ("probe", "continue", "finetune") if name in recorded), {})
    if found.get("mix") == "public":  # it had no budget
        return {key: value for key, value in found.items() if key not in ("epsilon", "delta", "noise")}
    return found


def public_stages(
    rundir: RunDir, prior: str, size: str | None, file: Path | None, given: dict[str, Any]
) -> dict[str, StageConfig]:
    """What ``generate`` and ``pretrain`` are with a shipped prior; as many images as the probe takes statistics of.

    Raises:
        UsageError: no such prior, or a configuration file that sets one of the two stages.
        CheckpointError: the prior's files are damaged.
    """
    from dprandp.pretrain.shipped import public_stages

    if file is not None and (tables := [name for name in ("generate", "pretrain") if read_toml(file).get(name)]):
        raise UsageError(
            f"{file} sets {tables[0]}, and the prior {prior} brings its own",
            fix=f"take the table [{tables[0]}] out of the file, or leave --prior out",
        )
    probe = resolve(rundir, "probe", size, file, given, public_stages(prior))
    return public_stages(prior, probe.statistics_images)


def refuse_made(prior: str, **given: Any) -> None:
    """Raise UsageError for a flag that sets how an extractor is made: a prior is made already."""
    for name, value in given.items():
        if value is not None:
            flag = f"--{name.replace('_', '-')}"
            raise UsageError(
                f"{flag} sets how an extractor is made, and the prior {prior} is made already",
                fix=f"leave {flag} or --prior out",
            )


def colour_of(data: str | None, data_dir: Path = Path("data"), classes: int | None = None) -> str | None:
    """'rgb' or 'grey' as a data set declares its channels; None where none is named. Reads no pixel."""
    if data is None:
        return None
    from dprandp.data import open_dataset
    from dprandp.vision import images

    spec = open_dataset(data, data_dir, num_classes=classes, unit_column="image").spec  # units are the stages' business
    return images.colour_of(spec.channels)


def require_data(
    data: str, data_dir: Path, *, classes: int | None, unit_column: str | None, download: bool
) -> None:
    """Make sure that a data set's files are there, fetching them if allowed, before hours of public stages.

    Raises:
        InputError: they are not; which file to put where.
    """
    from dprandp.data import open_dataset

    open_dataset(data, data_dir, download=download, num_classes=classes, unit_column=unit_column).require()


def context(
    rundir: RunDir,
    console: Console,
    *,
    device: str = "cpu",
    data_dir: Path = Path("data"),
    download: bool = False,
    workers: int | None = None,
    microbatch: int | None = None,
    insecure_seed: int | None = None,
    resume: bool = False,
    overwrite: bool = False,
):
    """What a stage is given beside its configuration, from flags.

    Raises:
        UsageError: a flag out of its range.
    """
    from dprandp.runs.context import Context, prepare_device
    from dprandp.runs.parallel import ALONE

    ranks = together.ranks or ALONE
    if ranks.size > 1:
        together.refuse_flags(device, workers)
    if workers is not None and workers < 1:
        raise UsageError(f"--workers {workers} is below 1", fix="give 1 or more")
    if insecure_seed is not None and insecure_seed < 0:
        raise UsageError(f"--insecure-seed {insecure_seed} is negative", fix="give 0 or more")
    if insecure_seed is not None:
        console.warn("--insecure-seed makes the noise predictable: this run is NOT PRIVATE")
    return Context(
        rundir=rundir,
        console=console,
        device=prepare_device(device),
        data_dir=data_dir,
        download=download,
        workers=workers or len(os.sched_getaffinity(0)),
        microbatch=microbatch,
        resume=resume,
        overwrite=overwrite,
        insecure_seed=insecure_seed,
        ranks=ranks,
    )


def run_stage(name: str, config, context, public: Mapping[str, StageConfig] | None = None) -> dict:
    """Run a stage, after the ``public`` stages that come before it, and print its result."""
    from dprandp import pipeline

    if name == "probe" and public:  # before minutes of images
        facts = {"classes": config.classes, "unit_column": config.unit_column, "download": context.download}
        require_data(config.data, context.data_dir, **facts)
    pipeline.adopt({stage: made for stage, made in (public or {}).items() if stage != name}, context)
    result = pipeline.run_stage(name, config, context)
    context.console.result(result, pipeline.stage_line(name, result))
    return result


def print_plan(stage: str, config, context, public: Mapping[str, StageConfig] | None = None) -> None:
    """Print what a stage would run; ``public`` stages are themselves only planned."""
    from dprandp.pipeline import plan as planning

    plan = planning.plan(stage, config, context, public or {})
    context.console.result(plan, planning.plan_lines(plan))


def released_model(run: Path, folder: Path | None):
    """The model of ``--model``, or of the run; says aloud when it has no guarantee.

    Raises:
        InputError: there is none. CheckpointError: it is damaged, or the run's ledger does not bear it out.
    """
    from dprandp.release import load_model, load_run_model

    model = load_run_model(RunDir.open(run, create=False)) if folder is None else load_model(folder)
    if model.not_private_because is not None:
        current.warn(f"this model is NOT PRIVATE. {model.not_private_because}")
    return model


def microbatch(text: str) -> int | None:
    """The value of ``--microbatch``; None for auto."""
    if text == "auto":
        return None
    if not text.isdecimal() or len(text) > 9 or int(text) < 1:
        raise UsageError(f"--microbatch {text!r} is neither auto nor a number above 0", fix="give auto, or 1, 2, ...")
    return int(text)


def command(stage: str, run: Path) -> str:
    """A command line to suggest."""
    return f"dprandp {stage}" + ("" if run == DEFAULT_RUN else f" --run {run}")
