"""From flags to a stage: the console, the locked run directory, the configuration, the context.

One command may run on several processes: ``torchrun --nproc-per-node N -m dprandp ...``. Rank 0 reads the flags and the
run, and announces each stage, with its configuration; every rank then runs it. What several processes cannot do is
refused.
"""

from __future__ import annotations

import contextlib
import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from dprandp.cli.flags import DEFAULT_RUN, Call, Options
from dprandp.config.schema import (
    DATA_SETTINGS,
    PRETRAINED,
    SIZES,
    WITHOUT_PHASE_ONE,
    PrivateConfig,
    StageConfig,
    as_dict,
    data_options,
    input_size_of,
)
from dprandp.config.schema import resolve as resolve_config
from dprandp.config.toml import read as read_toml
from dprandp.errors import DprandpError, InputError, UsageError
from dprandp.runs import signals
from dprandp.runs.console import Console
from dprandp.runs.directory import PRIVATE_STAGES, STAGES, RunDir
from dprandp.runs.results import StageResult

if TYPE_CHECKING:
    from dprandp.runs.parallel import Ranks

current = Console()
"""The console of the running command; errors raised before its flags are parsed go to this plain one."""


def console(options: Options) -> Console:
    """Set up the command's console, and what the process may do."""
    global current
    current = Console(quiet=options.quiet, json=options.json, debug=options.debug)
    current.route_logging()
    if options.trust_code:
        from dprandp.models.torchvision import trust_code

        trust_code()
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
def directory(options: Options, create: bool = False) -> Iterator[RunDir]:
    """The run directory; with ``--plan`` neither locked nor written to, and an empty folder where there is none."""
    with contextlib.ExitStack() as stack:
        if not options.plan:
            yield stack.enter_context(opened(options.run, create))
        elif options.run.exists():
            yield RunDir.open(options.run, create=False)
        else:
            yield RunDir.open(stack.enter_context(tempfile.TemporaryDirectory()), create=False)


def resolve(
    rundir: RunDir,
    stage: str,
    options: Options,
    given: dict[str, Any],
    planned: Mapping[str, StageConfig] | None = None,
    fitting: Mapping[str, Any] | None = None,
) -> Any:
    """Configuration from flags, with what the run already decided (size, data, budget) as defaults.

    ``planned`` stages count as decided by the run. ``fitting`` values follow from the declared data: flags and the
    configuration file override them.
    """
    recorded = {row.stage: row.config for row in rundir.status() if row.config}
    recorded |= {name: as_dict(config) for name, config in (planned or {}).items()}
    order = list(STAGES)
    before = [recorded[name] for name in order[: order.index(stage) + 1] if name in recorded]
    size = options.size
    if size is None and before:
        size = before[-1].get("size")
    from dprandp.dpsgd.budget import read_plan_file

    inherited: dict[str, Any] = dict(fitting or {})
    new = stage in PRIVATE_STAGES and recorded.keys().isdisjoint(PRIVATE_STAGES)
    if new and (fixed := read_plan_file(rundir)) is not None:  # by private tuning
        inherited |= {"data": fixed.budget.data, "epsilon": fixed.budget.epsilon}  # δ has the same default
    if stage == "finetune" and given.get("source") not in WITHOUT_PHASE_ONE and "probe" in recorded:
        inherited |= {k: v for k, v in recorded["probe"].items() if k in DECIDED}
        if given.get("source") is None and given.get("recipe") is None and rundir.row("probe").config:
            inherited |= {"source": "probe", "recipe": "ours"}  # a fine-tune goes on from the probe that the run has
        if "data" in recorded.get("finetune", {}):  # its path may be newer
            inherited["data"] = recorded["finetune"]["data"]
    elif stage in recorded:
        own = {"colour"} if stage == "pretrain" else set()  # that of an extractor, not of data
        inherited |= {k: v for k, v in recorded[stage].items() if k in {*DECIDED, "arch", "public"} - own}
        if recorded[stage].get("colour") == "both":  # fits all data
            inherited["colour"] = "both"
    elif stage in ("continue", "probe"):  # another private stage holds the run's data and budget
        other = next((recorded[name] for name in ("probe", "continue", "finetune") if name in recorded), {})
        known = DATA_SETTINGS if other.get("mix") == "public" else DECIDED  # it had no budget
        inherited |= {k: v for k, v in other.items() if k in known}
    return resolve_config(stage, size or SIZES[0], options.config, given, inherited)


def public_stages(rundir: RunDir, options: Options, given: dict[str, Any]) -> dict[str, StageConfig]:
    """The stages ``generate`` and ``pretrain`` of a shipped prior, with as many images as the probe's statistics take.

    Raises:
        UsageError: no such prior, or a configuration file that sets one of the two stages.
        CheckpointError: the prior's files are damaged.
    """
    from dprandp import priors

    prior, file = str(options.prior), options.config
    if file is not None and (tables := [name for name in ("generate", "pretrain") if read_toml(file).get(name)]):
        raise UsageError(
            f"{file} sets {tables[0]}, which the prior {prior} sets too",
            fix=f"take the table [{tables[0]}] out of the file, or leave --prior out",
        )
    probe = resolve(rundir, "probe", options, given, priors.public_stages(prior))
    return priors.public_stages(prior, probe.statistics_images)


DECIDED = (*DATA_SETTINGS, "epsilon", "delta", "noise")
"""What the first private stage decides for the run."""


def assumed_stages(rundir: RunDir, stage: str, options: Options, given: dict[str, Any]) -> dict[str, StageConfig]:
    """With ``--plan``, what a fine-tune starts from, where the run has not begun it: extractor and probe by default."""
    source = resolve(rundir, stage, options, given).source if stage == "finetune" else None
    if source is None or source in WITHOUT_PHASE_ONE:
        return {}
    assumed: dict[str, StageConfig] = {}
    for name in ("pretrain",) if source == PRETRAINED else ("pretrain", "probe"):
        if rundir.row(name).config is None:
            said = {key: given[key] for key in DECIDED} if name == "probe" else {}
            assumed[name] = resolve(rundir, name, options, said, assumed)
    return assumed


def refuse_made(prior: str, **given: Any) -> None:
    """Raise UsageError for a flag that sets how an extractor is made, which a prior does not need."""
    for name, value in given.items():
        if value is not None:
            flag = f"--{name.replace('_', '-')}"
            raise UsageError(
                f"{flag} sets how an extractor is made, but the prior {prior} is a finished one",
                fix=f"leave {flag} or --prior out",
            )


def colour_of(
    data: str | None, data_dir: Path = Path("data"), classes: int | None = None, colour: str | None = None
) -> dict[str, str]:
    """``resolve``'s ``fitting`` of the pretraining: the colour of a data set's declared channels. Reads no pixel.

    ``colour`` is what was declared of image files.
    """
    if data is None:
        return {}
    from dprandp.data import open_dataset
    from dprandp.vision import images

    kind, _, path = data.partition(":")
    if kind in ("folder", "csv") and os.path.exists(os.path.expanduser(path)):
        return {"colour": colour or images.colour_of(3)}  # what else is declared is not needed
    # units and damaged files are the stages' business
    spec = open_dataset(data, data_dir, num_classes=classes, unit_column="image", strict=False).spec
    return {"colour": images.colour_of(spec.channels)}


def require_data(config: PrivateConfig, options: Options) -> None:
    """Make sure that a data set's files are present, fetching them if allowed, before hours of public stages.

    Raises:
        InputError: files are missing; it says which file to put where.
    """
    from dprandp.data import open_dataset

    facts = data_options(config) | {"download": options.download, "strict": False}  # the stage names all problems
    open_dataset(config.data, options.data_dir, **facts).require()


def context(rundir: RunDir, console: Console, options: Options):
    """The context of a stage, from flags.

    Raises:
        UsageError: a flag out of its range.
    """
    from dprandp.runs.context import Context, prepare_device
    from dprandp.runs.parallel import ALONE

    workers, seed, batch = options.workers, options.insecure_seed, options.microbatch
    ranks = joined or ALONE
    if ranks.size > 1:
        refuse_flags(options.device, workers)
    if workers is not None and workers < 1:
        raise UsageError(f"--workers {workers} is below 1", fix="give 1 or more")
    if seed is not None and seed < 0:
        raise UsageError(f"--insecure-seed {seed} is negative", fix="give 0 or more")
    if seed is not None:
        console.warn("--insecure-seed makes the noise predictable: this run is NOT PRIVATE")
    if batch != "auto" and (not batch.isdecimal() or len(batch) > 9 or int(batch) < 1):
        raise UsageError(f"--microbatch {batch!r} is neither auto nor a number above 0", fix="give auto, or 1, 2, ...")
    return Context(
        rundir=rundir,
        console=console,
        device=prepare_device(options.device),
        data_dir=options.data_dir,
        download=options.download,
        workers=workers or len(os.sched_getaffinity(0)),
        microbatch=None if batch == "auto" else int(batch),
        resume=options.resume,
        overwrite=options.overwrite,
        insecure_seed=seed,
        ranks=ranks,
    )


def stage_command(
    stage: str,
    call: Call,
    following: Callable[[StageResult], str],
    *,
    create: bool = False,
    fitting: Mapping[str, Any] | None = None,
) -> None:
    """Run one stage, after the stages that a shipped prior replaces, and print its result; or print its plan.

    Args:
        following: from the stage's result to the command to suggest next.
        create: whether the run may be a new one.
        fitting: see ``resolve``.
    """
    options, given = call.options, call.given[stage]
    told = console(options)
    with directory(options, create) as rundir:
        public: dict[str, StageConfig] = {}
        if options.prior is not None:
            public = public_stages(rundir, options, given if stage == "probe" else {})
        assumed = assumed_stages(rundir, stage, options, given) if options.plan else {}
        public |= assumed
        config = public.get(stage) or resolve(rundir, stage, options, given, public, fitting)
        made = context(rundir, told, options)
        if options.plan:
            from dprandp.pipeline import plan as planning

            plan = planning.plan(stage, config, made, assumed)
            if assumed:
                told.say(f"note: planned as after {' and '.join(assumed)} by default, which the run does not have yet")
            return told.result(plan, planning.plan_lines(plan))
        from dprandp import pipeline

        if stage == "probe" and public:  # before minutes of images
            require_data(config, options)
            pipeline.examine_data(config, input_size_of(public["pretrain"]), made)
        pipeline.adopt({name: adopted for name, adopted in public.items() if name != stage}, made)
        result = pipeline.run_stage(stage, config, made)
        told.result(pipeline.as_json(stage, result), pipeline.stage_line(stage, result))
    return told.next(command(following(result), options.run))


def released_model(run: Path, folder: Path | None):
    """The model of ``--model``, or of the run; warns if it has no guarantee, or the run has spent more since.

    Raises:
        InputError: there is none. CheckpointError: it is damaged, or contradicts the run's ledger.
    """
    from dprandp.release import load_model, load_run_model, run_of

    if folder is not None and (own := run_of(folder)) is not None:
        folder, run = None, own
    if folder is not None:
        model = load_model(folder)
    else:
        if not run.exists():
            raise InputError(f"there is no run at {run}", fix="name the run that made the model: --run DIR")
        model = load_run_model(RunDir.open(run, create=False))
    if model.spent_since is not None:
        current.warn(model.spent_since)
    if model.not_private_because is not None:
        current.warn(f"this model is NOT PRIVATE. {model.not_private_because}")
    return model


def command(stage: str, run: Path) -> str:
    """A command line to suggest; ``stage`` may have flags of its own."""
    name, _, more = stage.partition(" ")
    return f"dprandp {name}" + ("" if run == DEFAULT_RUN else f" --run {run}") + (f" {more}" if more else "")


# ---------------------------------------------------------------------------------------------------- several processes

COMMANDS = ("generate", "pretrain", "probe", "finetune", "run")
"""Commands that several processes can share."""

joined: Ranks | None = None
"""The processes, as rank 0 sees them; None for a single process."""


def join() -> None:
    """Under ``torchrun``, join the other processes. Rank 0 returns; any other rank runs the stages, and exits."""
    global joined
    if "RANK" not in os.environ or os.environ.get("WORLD_SIZE", "1") == "1":
        return  # without the import of torch
    from dprandp.runs.parallel import join as join_others

    met = join_others()
    if not met.is_first:
        _run_stages(met)
    joined = met
    met.stage_done()


def end(code: object) -> None:
    """Under ``torchrun``, end rank 0 with an exit code, which the other ranks will have too."""
    if joined is None:
        return
    code = code if isinstance(code, int) else int(code is not None)
    try:
        if code == 0:
            joined.announce(None)
        else:
            joined.leave_words({"exit_code": code, "problem": None, "fix": None})
    except DprandpError as error:
        code = Console().error(error)
    _exit(code)


def refuse_command(command: str | None) -> None:
    """Raise UsageError for a command of one process."""
    if joined is not None and command is not None and command not in COMMANDS:
        raise UsageError(
            f"`dprandp {command}` runs in one process, not in {joined.size}",
            fix=f"run it without torchrun; several processes can run {', '.join(COMMANDS)}",
        )


def refuse_flags(device: str, workers: int | None) -> None:
    """Raise UsageError for a flag that contradicts several processes."""
    if device.startswith("cuda:"):
        raise UsageError(
            f"--device {device} names one device for several processes",
            fix="give --device cuda: each process takes the device with its own number",
        )
    if workers is not None and workers > 1:
        raise UsageError(f"--workers {workers} does not go with several processes", fix="leave --workers out")


def _run_stages(met: Ranks) -> NoReturn:
    """On another rank, run each stage that rank 0 announces; print nothing unless the others are lost."""
    from dprandp import pipeline
    from dprandp.runs.parallel import RankError, RankLostError

    signals.leave_to_rank_0()
    console = Console(quiet=True, debug="--debug" in sys.argv)
    console.route_logging()
    code = 0
    try:
        while (stage := met.announced()) is not None:
            pipeline.run_announced(stage, met, console)
    except RankError as error:
        code = error.exit_code
    except RankLostError as error:
        code = console.error(error)
    except BaseException as error:
        told = console.described(error)
        met.leave_words(told)
        code = told["exit_code"]
    _exit(code)


def _exit(code: int) -> NoReturn:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # no shutdown hooks of libraries: they may wait for lost processes
