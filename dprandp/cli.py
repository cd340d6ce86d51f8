"""The command line: flags to configuration to one stage. No logic of a stage lives here.

The contract (names, defaults, exit codes, what goes to stdout) is documented in README.md.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from dprandp import __version__, faults
from dprandp.config import DEFAULT_DATA, SIZES, build, resolve
from dprandp.console import Console
from dprandp.errors import DprandpError, InputError, UsageError
from dprandp.rundir import STAGES, RunDir

app = typer.Typer(
    name="dprandp",
    help="Train an image classifier under differential privacy, with a prior learned from random processes alone.",
    epilog="Start with: dprandp run --data digits --eps 1",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
)

DEFAULT_RUN = Path("runs/default")

# ------------------------------------------------------------------------------------------------------ shared flags

DATA, PRIVACY, TRAINING, PERFORMANCE, OUTPUT = "Data", "Privacy", "Training", "Performance", "Output"

Run = Annotated[Path, typer.Option("--run", help="Run directory.", rich_help_panel=OUTPUT, metavar="DIR")]
Size = Annotated[
    str | None,
    typer.Option(help="One dial for everything else: tiny (minutes on 2 cores), small (half an hour), paper. "
                 "Default: that of the stage before, else tiny.", rich_help_panel=TRAINING, metavar="|".join(SIZES)),
]  # fmt: skip
Config = Annotated[
    Path | None,
    typer.Option(help="TOML with a table per stage; flags win over it.", rich_help_panel=TRAINING, metavar="FILE"),
]
Seed = Annotated[
    int | None, typer.Option(help="Public randomness only; never the noise. Default 0.", rich_help_panel=TRAINING)
]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:i.", rich_help_panel=PERFORMANCE)]
Resume = Annotated[
    bool,
    typer.Option("--resume", help="Keep the recorded settings; use the last good checkpoint.", rich_help_panel=OUTPUT),
]
Overwrite = Annotated[
    bool,
    typer.Option(
        "--overwrite", help="Start the stage afresh. What was spent on privacy stays spent.", rich_help_panel=OUTPUT
    ),
]
Json = Annotated[bool, typer.Option("--json", help="One JSON object on stdout.", rich_help_panel=OUTPUT)]
Quiet = Annotated[bool, typer.Option("--quiet", help="Nothing but errors on stderr.", rich_help_panel=OUTPUT)]
Debug = Annotated[
    bool,
    typer.Option("--debug", help="Tracebacks and private details of errors; not for publication.",
                 rich_help_panel=OUTPUT),
]  # fmt: skip
Plan = Annotated[
    bool,
    typer.Option("--plan", help="Print what would run and what it would cost; read no data.", rich_help_panel=OUTPUT),
]
DataName = Annotated[
    str | None,
    typer.Option("--data", help=f"Name of a data set (see `dprandp datasets`), npz:PATH or folder:PATH. "
                 f"Default: the run's, else {DEFAULT_DATA}.", rich_help_panel=DATA, metavar="NAME"),
]  # fmt: skip
DataDir = Annotated[Path, typer.Option(help="Data root.", rich_help_panel=DATA, metavar="DIR")]
Classes = Annotated[
    int | None,
    typer.Option(help="Number of classes, for npz: files that do not declare it.", rich_help_panel=DATA, metavar="C"),
]
Epsilon = Annotated[
    float | None,
    typer.Option("--eps", help="Total ε for everything this run releases about the data; inf = NOT PRIVATE. "
                 "Default: the run's, else 1.", rich_help_panel=PRIVACY),
]  # fmt: skip
Delta = Annotated[
    float | None,
    typer.Option(help="δ. Default: 1e-5, or 1/(2N) where that is smaller.", rich_help_panel=PRIVACY),
]
Share = Annotated[
    float | None,
    typer.Option(help="Part of ε for the probe, in (0, 1]; 1 leaves nothing for finetune. "
                 "Default: measured for the architecture (see README).", rich_help_panel=PRIVACY),
]  # fmt: skip
Clip = Annotated[
    float | None,
    typer.Option("--clip", help="Clip norm C of one example's gradient. Default 1.", rich_help_panel=PRIVACY),
]
InsecureSeed = Annotated[
    int | None,
    typer.Option(help="Seed the noise, for tests. The run is stamped NOT PRIVATE.", rich_help_panel=PRIVACY),
]
Views = Annotated[
    int | None,
    typer.Option(help="Augmented views K of each example, averaged before the clip.", rich_help_panel=TRAINING),
]
BatchSize = Annotated[
    int | None,
    typer.Option(help="Expected batch B = qN of Poisson sampling. Probe default: N (every example, q = 1).",
                 rich_help_panel=TRAINING),
]  # fmt: skip
Steps = Annotated[int | None, typer.Option(help="Updates T.", rich_help_panel=TRAINING)]
Lr = Annotated[
    float | None,
    typer.Option("--lr", help="Learning rate. Default: set by the noise and the data's size.",
                 rich_help_panel=TRAINING),
]  # fmt: skip
Microbatch = Annotated[
    str,
    typer.Option(help="Examples whose gradients are in memory together: auto or n. Never changes the result.",
                 rich_help_panel=PERFORMANCE, metavar="auto|n"),
]  # fmt: skip
Workers = Annotated[
    int | None,
    typer.Option(help="Processes that make images. Default: one per core. Never changes the images.",
                 rich_help_panel=PERFORMANCE),
]  # fmt: skip
Process = Annotated[
    str | None,
    typer.Option("--process", help="stylegan-oriented or dead-leaves. Default stylegan-oriented.",
                 rich_help_panel=DATA, metavar="NAME"),
]  # fmt: skip
Count = Annotated[int | None, typer.Option(help="Number of images.", rich_help_panel=DATA)]
Resolution = Annotated[int | None, typer.Option(help="Pixels per side.", rich_help_panel=DATA)]
Arch = Annotated[
    str | None,
    typer.Option(help="patchnet or wrn-DEPTH-WIDTH, such as wrn-16-4. Default: patchnet (tiny, small), "
                 "wrn-16-4 (paper).", rich_help_panel=TRAINING),
]  # fmt: skip


@dataclass
class _Session:
    """What the error handler needs before a command has parsed its flags."""

    console: Console


_session = _Session(Console())


def _console(*, json: bool = False, quiet: bool = False, debug: bool = False) -> Console:
    _session.console = Console(quiet=quiet, json=json, debug=debug)
    _session.console.route_logging()
    return _session.console


# ------------------------------------------------------------------------------------------------------------ stages


@app.command(rich_help_panel="Stages")
def generate(
    process: Process = None,
    count: Count = None,
    resolution: Resolution = None,
    run: Run = DEFAULT_RUN,
    size: Size = None,
    config: Config = None,
    seed: Seed = None,
    workers: Workers = None,
    resume: Resume = False,
    overwrite: Overwrite = False,
    json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Phase I: make images with a random process. No data, no privacy cost.

    [dim]dprandp generate[/dim]
    [dim]dprandp generate --process dead-leaves --count 20000 --resolution 64 --run runs/leaves[/dim]
    """
    console = _console(json=json, quiet=quiet, debug=debug)
    flags = {"process": process, "count": count, "resolution": resolution, "seed": seed}
    with _opened(run, create=True) as rundir:
        stage = _resolve(rundir, "generate", size, config, flags)
        _run_stage("generate", stage, _context(rundir, console, workers=workers, resume=resume, overwrite=overwrite))
    console.next(_command("pretrain", run))


@app.command(rich_help_panel="Stages")
def pretrain(
    arch: Arch = None,
    steps: Steps = None,
    batch_size: BatchSize = None,
    lr: Lr = None,
    colour: Annotated[
        str | None,
        typer.Option(help="Learn from rgb, grey or mixed images (half of them grey). Default mixed.",
                     rich_help_panel=DATA),
    ] = None,
    random_init: Annotated[
        bool | None,
        typer.Option("--random-init", help="Keep the random initialisation: a control.", rich_help_panel=TRAINING),
    ] = None,
    run: Run = DEFAULT_RUN,
    size: Size = None,
    config: Config = None,
    seed: Seed = None,
    device: Device = "auto",
    resume: Resume = False,
    overwrite: Overwrite = False,
    json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:  # fmt: skip
    """Phase I: learn a feature extractor from those images. No data, no privacy cost.

    [dim]dprandp pretrain[/dim]
    [dim]dprandp pretrain --arch wrn-16-4 --steps 2000[/dim]
    """
    console = _console(json=json, quiet=quiet, debug=debug)
    flags = {
        "arch": arch, "steps": steps, "batch_size": batch_size, "lr": lr, "colour": colour,
        "random_init": random_init, "seed": seed,
    }  # fmt: skip
    with _opened(run) as rundir:
        stage = _resolve(rundir, "pretrain", size, config, flags)
        _run_stage("pretrain", stage, _context(rundir, console, device=device, resume=resume, overwrite=overwrite))
    console.next(_command("probe", run) + " --data NAME --eps 1")


@app.command(rich_help_panel="Stages")
def probe(
    data: DataName = None,
    data_dir: DataDir = Path("data"),
    classes: Classes = None,
    eps: Epsilon = None,
    delta: Delta = None,
    share: Share = None,
    clip: Clip = None,
    insecure_seed: InsecureSeed = None,
    steps: Steps = None,
    batch_size: BatchSize = None,
    lr: Lr = None,
    views: Views = None,
    run: Run = DEFAULT_RUN,
    size: Size = None,
    config: Config = None,
    seed: Seed = None,
    device: Device = "auto",
    plan: Plan = False,
    resume: Resume = False,
    overwrite: Overwrite = False,
    json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Phase II: fit a linear head on the frozen features with DP-SGD.

    [dim]dprandp probe --eps 1[/dim]
    [dim]dprandp probe --data npz:scans.npz --classes 3 --eps 2 --share 1[/dim]
    """
    console = _console(json=json, quiet=quiet, debug=debug)
    flags = {
        "data": data, "classes": classes, "epsilon": eps, "delta": delta, "share": share, "clip_norm": clip,
        "steps": steps, "batch_size": batch_size, "lr": lr, "views": views, "seed": seed,
    }  # fmt: skip
    with _opened(run) as rundir:
        stage = _resolve(rundir, "probe", size, config, flags)
        context = _context(
            rundir, console, device=device, data_dir=data_dir, insecure_seed=insecure_seed,
            resume=resume, overwrite=overwrite,
        )  # fmt: skip
        if plan:
            return _print_plan("probe", stage, context)
        result = _run_stage("probe", stage, context)
    console.next(_command("report" if result.get("share") == 1 else "finetune", run))
    return None


@app.command(rich_help_panel="Stages")
def finetune(
    source: Annotated[
        str | None,
        typer.Option("--from", help="probe, or scratch: a random WRN without Phases I and II (De et al. 2022).",
                     rich_help_panel=TRAINING, metavar="probe|scratch"),
    ] = None,
    arch: Annotated[
        str | None,
        typer.Option(help="With --from scratch: wrn-DEPTH-WIDTH. Default wrn-16-4.", rich_help_panel=TRAINING),
    ] = None,
    data: DataName = None,
    data_dir: DataDir = Path("data"),
    classes: Classes = None,
    eps: Epsilon = None,
    delta: Delta = None,
    clip: Clip = None,
    insecure_seed: InsecureSeed = None,
    steps: Steps = None,
    batch_size: BatchSize = None,
    lr: Lr = None,
    views: Views = None,
    run: Run = DEFAULT_RUN,
    size: Size = None,
    config: Config = None,
    seed: Seed = None,
    device: Device = "auto",
    microbatch: Microbatch = "auto",
    plan: Plan = False,
    resume: Resume = False,
    overwrite: Overwrite = False,
    json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:  # fmt: skip
    """Phase III: train every parameter with DP-SGD, on the budget that the probe left.

    [dim]dprandp finetune[/dim]
    [dim]dprandp finetune --from scratch --data cifar10 --eps 8 --run runs/scratch[/dim]
    """
    console = _console(json=json, quiet=quiet, debug=debug)
    flags = {
        "source": source, "arch": arch, "data": data, "classes": classes, "epsilon": eps, "delta": delta,
        "clip_norm": clip, "steps": steps, "batch_size": batch_size, "lr": lr, "views": views, "seed": seed,
    }  # fmt: skip
    with _opened(run, create=source == "scratch") as rundir:
        stage = _resolve(rundir, "finetune", size, config, flags)
        context = _context(
            rundir, console, device=device, data_dir=data_dir, insecure_seed=insecure_seed,
            microbatch=_microbatch(microbatch), resume=resume, overwrite=overwrite,
        )  # fmt: skip
        if plan:
            return _print_plan("finetune", stage, context)
        _run_stage("finetune", stage, context)
    console.next(_command("report", run))
    return None


@app.command("run", rich_help_panel="Stages")
def run_all(
    data: DataName = None,
    data_dir: DataDir = Path("data"),
    classes: Classes = None,
    eps: Epsilon = None,
    delta: Delta = None,
    share: Share = None,
    insecure_seed: InsecureSeed = None,
    process: Process = None,
    arch: Arch = None,
    run: Run = DEFAULT_RUN,
    size: Size = None,
    config: Config = None,
    seed: Seed = None,
    device: Device = "auto",
    workers: Workers = None,
    microbatch: Microbatch = "auto",
    resume: Resume = False,
    overwrite: Overwrite = False,
    json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """All four stages and the report. Finished stages are skipped; with --share 1 there is no fine-tune.

    [dim]dprandp run --data digits --eps 1[/dim]
    [dim]dprandp run --data cifar10 --eps 8 --size small --run runs/cifar[/dim]
    """
    console = _console(json=json, quiet=quiet, debug=debug)
    everywhere = {"seed": seed}
    private = {"data": data, "classes": classes, "epsilon": eps, "delta": delta}
    flags = {
        "generate": everywhere | {"process": process},
        "pretrain": everywhere | {"arch": arch},
        "probe": everywhere | private | {"share": share},
        "finetune": everywhere | private,
    }
    with _opened(run, create=True) as rundir:
        context = _context(
            rundir, console, device=device, data_dir=data_dir, workers=workers, insecure_seed=insecure_seed,
            microbatch=_microbatch(microbatch), resume=resume, overwrite=overwrite,
        )  # fmt: skip
        from dprandp.stages import pipeline

        result = pipeline.run(lambda stage: _resolve(rundir, stage, size, config, flags[stage]), context)
    console.result(result, pipeline.line(result))


# ---------------------------------------------------------------------------------------------------- about the run


@app.command(rich_help_panel="About a run")
def status(run: Run = DEFAULT_RUN, json: Json = False, debug: Debug = False) -> None:
    """Which stages are done, partial, stale or missing, and what was spent.

    [dim]dprandp status[/dim]
    [dim]dprandp status --run runs/cifar --json[/dim]
    """
    console = _console(json=json, debug=debug)
    from dprandp.stages import overview

    table = overview.status(RunDir.open(run, create=False))
    console.result(table, overview.status_lines(table))


@app.command(rich_help_panel="About a run")
def report(
    run: Run = DEFAULT_RUN, json: Json = False, quiet: Quiet = False, debug: Debug = False
) -> None:
    """Write report.html (one self-contained page) from the run's files.

    [dim]dprandp report[/dim]
    [dim]dprandp report --run runs/cifar[/dim]
    """
    console = _console(json=json, quiet=quiet, debug=debug)
    from dprandp import report as report_module

    with _opened(run) as rundir:
        path = report_module.write(rundir)
    console.result({"report": str(path)}, f"report: {path}")


@app.command(rich_help_panel="About a run")
def account(
    eps: Annotated[
        float | None, typer.Option("--eps", help="Find the noise for this ε.", rich_help_panel=PRIVACY)
    ] = None,
    noise_multiplier: Annotated[
        float | None,
        typer.Option(help="Find the ε of this σ (noise std over clip norm).", rich_help_panel=PRIVACY),
    ] = None,
    sample_rate: Annotated[
        float, typer.Option(help="q in (0, 1]; 1 is full batch.", rich_help_panel=PRIVACY)
    ] = 1.0,
    steps: Annotated[int, typer.Option(help="Noisy steps T.", rich_help_panel=PRIVACY)] = 1,
    delta: Annotated[float, typer.Option(help="δ.", rich_help_panel=PRIVACY)] = 1e-5,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """The calculator: σ from ε, or ε from σ. Reads no data.

    [dim]dprandp account --eps 1 --sample-rate 0.08192 --steps 875[/dim]
    [dim]dprandp account --noise-multiplier 40.9 --steps 120[/dim]
    """
    console = _console(json=json, debug=debug)
    from dprandp.stages import overview

    if (eps is None) == (noise_multiplier is None):
        raise UsageError(
            "account needs exactly one of --eps and --noise-multiplier",
            fix="give --eps to find σ, or --noise-multiplier to find ε",
        )
    result = overview.account(eps, noise_multiplier, sample_rate, steps, delta)
    console.result(result, overview.account_lines(result))


@app.command(rich_help_panel="About a run")
def datasets(data_dir: DataDir = Path("data"), json: Json = False, debug: Debug = False) -> None:
    """The data sets that --data knows, and which of them are at hand.

    [dim]dprandp datasets[/dim]
    [dim]dprandp datasets --data-dir /data --json[/dim]
    """
    console = _console(json=json, debug=debug)
    from dprandp.stages import overview

    rows = overview.datasets(data_dir)
    console.result({"datasets": rows}, overview.dataset_lines(rows))


@app.callback(invoke_without_command=True)
def _root(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False,
) -> None:
    if version:
        print(f"dprandp {__version__}")
        raise typer.Exit
    faults.announce()


# ----------------------------------------------------------------------------------------------------------- plumbing


@contextlib.contextmanager
def _opened(path: Path, create: bool = False) -> Iterator[RunDir]:
    """The run directory, locked."""
    if not create and not path.exists():
        raise InputError(f"there is no run at {path}", fix=f"start one: {_command('generate', path)}")
    rundir = RunDir.open(path, create=True)
    with rundir.lock():
        yield rundir


def _resolve(rundir: RunDir, stage: str, size: str | None, file: Path | None, flags: dict[str, Any]):
    """Configuration from flags, with what the run already decided (size, data, budget) as defaults."""
    recorded = {row["stage"]: row["config"] for row in rundir.status() if row["config"]}
    order = list(STAGES)
    before = [recorded[name] for name in order[: order.index(stage) + 1] if name in recorded]
    if size is None and before:
        size = before[-1]["size"]
    inherited: dict[str, Any] = {}
    if stage == "finetune" and flags.get("source") != "scratch" and "probe" in recorded:
        inherited = {k: v for k, v in recorded["probe"].items() if k in ("data", "epsilon", "delta", "classes")}
    elif stage in recorded:
        inherited = {k: v for k, v in recorded[stage].items() if k in ("data", "epsilon", "delta", "classes", "arch")}
    given = inherited | {key: value for key, value in flags.items() if value is not None}
    return resolve(stage, size or SIZES[0], file, given)


def _context(
    rundir: RunDir,
    console: Console,
    *,
    device: str = "cpu",
    data_dir: Path = Path("data"),
    workers: int | None = None,
    microbatch: int | None = None,
    insecure_seed: int | None = None,
    resume: bool = False,
    overwrite: bool = False,
):
    from dprandp.stages.context import Context, prepare_device

    if workers is not None and workers < 1:
        raise UsageError(f"--workers {workers} is below 1", fix="give 1 or more")
    if insecure_seed is not None:
        console.warn("--insecure-seed makes the noise predictable: this run is NOT PRIVATE")
    return Context(
        rundir=rundir,
        console=console,
        device=prepare_device(device),
        data_dir=data_dir,
        workers=workers or len(os.sched_getaffinity(0)),
        microbatch=microbatch,
        resume=resume,
        overwrite=overwrite,
        insecure_seed=insecure_seed,
    )


def _run_stage(name: str, config, context) -> dict:
    from dprandp.stages import pipeline

    result = pipeline.run_stage(name, config, context)
    context.console.result(result, pipeline.stage_line(name, result))
    return result


def _print_plan(stage: str, config, context) -> None:
    from dprandp.stages import overview

    plan = overview.plan(stage, config, context)
    context.console.result(plan, overview.plan_lines(plan))


def _microbatch(text: str) -> int | None:
    if text == "auto":
        return None
    if not text.isdigit() or int(text) < 1:
        raise UsageError(f"--microbatch {text!r} is neither auto nor a number above 0", fix="give auto, or 1, 2, 4, ...")
    return int(text)


def _command(stage: str, run: Path) -> str:
    return f"dprandp {stage}" + ("" if run == DEFAULT_RUN else f" --run {run}")


def main() -> None:
    """Entry point of the console script: run a command, turn errors into messages and exit codes."""
    try:
        app(standalone_mode=True)
    except DprandpError as error:
        sys.exit(_session.console.error(error))
    except KeyboardInterrupt as error:
        sys.exit(_session.console.error(error))
    except Exception as error:
        sys.exit(_session.console.error(error))


__all__ = ["app", "build", "main"]
