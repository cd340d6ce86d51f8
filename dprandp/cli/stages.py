"""The stages as commands: flags to configuration to one stage. No logic of a stage lives here."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from dprandp.cli import flags, session
from dprandp.cli import flags as own
from dprandp.cli.session import DEFAULT_RUN
from dprandp.config.schema import WITHOUT_PHASE_ONE, StageConfig
from dprandp.errors import UsageError
from dprandp.runs.directory import OPTIONAL_STAGES, STAGES, RunDir

app = typer.Typer()


@app.command(rich_help_panel="Stages")
def generate(
    process: flags.Process = None,
    count: flags.Count = None,
    resolution: flags.Resolution = None,
    size: flags.Size = None,
    config: flags.Config = None,
    seed: flags.Seed = None,
    workers: flags.Workers = None,
    run: flags.Run = DEFAULT_RUN,
    plan: flags.Plan = False,
    resume: flags.Resume = False,
    overwrite: flags.Overwrite = False,
    json: flags.Json = False,
    quiet: flags.Quiet = False,
    debug: flags.Debug = False,
) -> None:
    """Phase I: make images with a random process; no data, no privacy cost.

    [dim]dprandp generate[/dim]
    [dim]dprandp generate --process dead-leaves --count 20000 --resolution 64 --run runs/leaves[/dim]
    """
    console = session.console(json=json, quiet=quiet, debug=debug)
    given = {"process": process, "count": count, "resolution": resolution, "seed": seed}
    with (session.looked_at if plan else session.opened)(run, create=True) as rundir:
        stage = session.resolve(rundir, "generate", size, config, given)
        context = session.context(rundir, console, workers=workers, resume=resume, overwrite=overwrite)
        if plan:
            return session.print_plan("generate", stage, context)
        session.run_stage("generate", stage, context)
    console.next(session.command("pretrain", run))
    return None


@app.command(rich_help_panel="Stages")
def pretrain(
    colour: Annotated[
        str | None,
        typer.Option(help="Learn for rgb or grey data, or both: later stages take what fits. Default: both.",
                     rich_help_panel=flags.DATA),
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(help="Learn only for the colour that this data set declares; reads none of its files.",
                     rich_help_panel=flags.DATA, metavar="NAME"),
    ] = None,
    arch: flags.Arch = None,
    layers: flags.Layers = None,
    steps: flags.PretrainSteps = None,
    batch_size: flags.PretrainBatchSize = None,
    optimizer: flags.Optimizer = None,
    feature_stages: flags.FeatureStages = None,
    lr: flags.PretrainLr = None,
    random_init: flags.RandomInit = None,
    prior: flags.Prior = None,
    size: flags.Size = None,
    config: flags.Config = None,
    seed: flags.Seed = None,
    device: flags.Device = "auto",
    precision: flags.Precision = None,
    run: flags.Run = DEFAULT_RUN,
    plan: flags.Plan = False,
    resume: flags.Resume = False,
    overwrite: flags.Overwrite = False,
    json: flags.Json = False,
    quiet: flags.Quiet = False,
    debug: flags.Debug = False,
) -> None:  # fmt: skip
    """Phase I: learn a feature extractor from those images; no data, no privacy cost.

    [dim]dprandp pretrain[/dim]
    [dim]dprandp pretrain --arch wrn-16-4 --steps 2000[/dim]
    [dim]dprandp pretrain --data fashion-mnist --run runs/grey[/dim]
    [dim]dprandp pretrain --prior patchnet-tiny --run runs/quick[/dim]
    """
    console = session.console(json=json, quiet=quiet, debug=debug)
    given = {
        "arch": arch, "layers": layers, "steps": steps, "batch_size": batch_size, "lr": lr, "optimizer": optimizer,
        "feature_stages": feature_stages, "colour": colour, "random_init": random_init, "seed": seed,
        "precision": precision,
    }  # fmt: skip
    fitting = {} if data is None else {"colour": session.colour_of(data)}
    with (session.looked_at if plan else session.opened)(run, create=prior is not None) as rundir:
        public: dict[str, StageConfig] = {}
        if prior is not None:
            session.refuse_made(prior, data=data, **given)
            public = session.public_stages(rundir, prior, size, config, {})
        stage = public.get("pretrain") or session.resolve(rundir, "pretrain", size, config, given, fitting=fitting)
        context = session.context(rundir, console, device=device, resume=resume, overwrite=overwrite)
        if plan:
            return session.print_plan("pretrain", stage, context, public)
        session.run_stage("pretrain", stage, context, public)
    console.next(session.command("probe", run) + " --data NAME --eps 1")
    return None


@app.command(rich_help_panel="Stages")
def probe(
    data: flags.DataName = None,
    data_dir: flags.DataDir = Path("data"),
    download: flags.Download = False,
    classes: flags.Classes = None,
    unit_column: flags.UnitColumn = None,
    eps: flags.Epsilon = None,
    delta: flags.Delta = None,
    share: flags.Share = None,
    clip: flags.Clip = None,
    noise: flags.Noise = None,
    insecure_seed: flags.InsecureSeed = None,
    prior: flags.Prior = None,
    steps: flags.Steps = None,
    batch_size: flags.BatchSize = None,
    lr: flags.Lr = None,
    views: flags.Views = None,
    size: flags.Size = None,
    config: flags.Config = None,
    seed: flags.Seed = None,
    device: flags.Device = "auto",
    precision: flags.Precision = None,
    run: flags.Run = DEFAULT_RUN,
    tuned_on: flags.TunedOn = None,
    plan: flags.Plan = False,
    resume: flags.Resume = False,
    overwrite: flags.Overwrite = False,
    json: flags.Json = False,
    quiet: flags.Quiet = False,
    debug: flags.Debug = False,
) -> None:
    """Phase II: fit a linear head on the frozen features with DP-SGD.

    [dim]dprandp probe --eps 1[/dim]
    [dim]dprandp probe --prior patchnet-tiny-grey --run runs/quick[/dim]
    [dim]dprandp probe --data npz:scans.npz --classes 3 --eps 2 --share 1[/dim]
    """
    console = session.console(json=json, quiet=quiet, debug=debug)
    given = {
        "data": data, "classes": classes, "epsilon": eps, "delta": delta, "share": share, "clip_norm": clip,
        "steps": steps, "batch_size": batch_size, "lr": lr, "views": views, "seed": seed, "precision": precision,
        "unit_column": unit_column, "noise": noise, "tuned_on": tuned_on,
    }  # fmt: skip
    with (session.looked_at if plan else session.opened)(run, create=prior is not None) as rundir:
        public = {} if prior is None else session.public_stages(rundir, prior, size, config, given)
        stage = session.resolve(rundir, "probe", size, config, given, public)
        context = session.context(
            rundir, console, device=device, data_dir=data_dir, download=download, insecure_seed=insecure_seed,
            resume=resume, overwrite=overwrite,
        )  # fmt: skip
        if plan:
            return session.print_plan("probe", stage, context, public)
        result = session.run_stage("probe", stage, context, public)
    console.next(session.command("report" if result.get("share") == 1 else "finetune", run))
    return None


@app.command(rich_help_panel="Stages")
def finetune(
    data: flags.DataName = None,
    data_dir: flags.DataDir = Path("data"),
    download: flags.Download = False,
    classes: flags.Classes = None,
    unit_column: flags.UnitColumn = None,
    eps: flags.Epsilon = None,
    delta: flags.Delta = None,
    clip: flags.Clip = None,
    clipping: flags.Clipping = None,
    noise: flags.Noise = None,
    insecure_seed: flags.InsecureSeed = None,
    source: own.Source = None,
    arch: own.ScratchArch = None,
    recipe: own.Recipe = None,
    init: own.Init = None,
    init_source: own.InitSource = None,
    layer_order: own.LayerOrder = None,
    padding: own.Padding = None,
    pooling: own.Pooling = None,
    steps: flags.FinetuneSteps = None,
    batch_size: flags.FinetuneBatchSize = None,
    lr: flags.FinetuneLr = None,
    views: flags.FinetuneViews = None,
    optimizer: own.PrivateOptimizer = None,
    momentum: own.Momentum = None,
    ema: own.Ema = None,
    freeze: flags.Freeze = None,
    select: flags.Select = None,
    keep: flags.Keep = None,
    prune: flags.Prune = None,
    every: flags.Every = None,
    scope: flags.Scope = None,
    size: flags.Size = None,
    config: flags.Config = None,
    seed: flags.Seed = None,
    device: flags.Device = "auto",
    precision: flags.Precision = None,
    microbatch: flags.Microbatch = "auto",
    run: flags.Run = DEFAULT_RUN,
    plan: flags.Plan = False,
    resume: flags.Resume = False,
    overwrite: flags.Overwrite = False,
    json: flags.Json = False,
    quiet: flags.Quiet = False,
    debug: flags.Debug = False,
) -> None:  # fmt: skip
    """Phase III: train every parameter with DP-SGD, on the budget that the probe left.

    [dim]dprandp finetune[/dim]
    [dim]dprandp finetune --from scratch --recipe de2022 --data cifar10 --eps 8 --run runs/scratch[/dim]
    """
    console = session.console(json=json, quiet=quiet, debug=debug)
    source = "init" if source is None and init is not None else source
    given = {
        "source": source, "arch": arch, "data": data, "classes": classes, "epsilon": eps, "delta": delta,
        "clip_norm": clip, "steps": steps, "batch_size": batch_size, "lr": lr, "views": views, "seed": seed,
        "unit_column": unit_column, "noise": noise, "clipping": clipping, "precision": precision,
        "freeze": freeze, "select": select, "keep": keep, "prune": prune, "every": every, "scope": scope,
        "recipe": recipe, "init": None if init is None else str(init), "init_source": init_source,
        "layer_order": layer_order, "padding": padding, "pooling": pooling, "optimizer": optimizer,
        "momentum": momentum, "ema": ema,
    }  # fmt: skip
    with (session.looked_at if plan else session.opened)(run, create=source in WITHOUT_PHASE_ONE) as rundir:
        stage = session.resolve(rundir, "finetune", size, config, given)
        context = session.context(
            rundir, console, device=device, data_dir=data_dir, download=download, insecure_seed=insecure_seed,
            microbatch=session.microbatch(microbatch), resume=resume, overwrite=overwrite,
        )  # fmt: skip
        if plan:
            return session.print_plan("finetune", stage, context)
        session.run_stage("finetune", stage, context)
    console.next(session.command("report", run))
    return None


# --------------------------------------------------------------------------------------------------------------- audit
#
# The audit as a command.


@app.command(rich_help_panel="About a run")
def audit(
    examples: Annotated[
        int | None, typer.Option(help="With --eps: records N. Default 10000.", rich_help_panel=flags.DATA)
    ] = None,
    with_data: Annotated[
        bool,
        typer.Option("--with-data", help="Replay on the run's private data too. Reads them; publishes passed or "
                     "failed alone.", rich_help_panel=flags.DATA),
    ] = False,
    data_dir: flags.DataDir = Path("data"),
    eps: Annotated[
        float | None,
        typer.Option("--eps", help="Audit the plan of this ε instead of a run. Default: audit the run.",
                     rich_help_panel=flags.PRIVACY),
    ] = None,
    delta: Annotated[
        float | None,
        typer.Option(help="With --eps: δ. Default: 1e-5, or 0.1/N (one digit, rounded down) where that is smaller.",
                     rich_help_panel=flags.PRIVACY),
    ] = None,
    sample_rate: Annotated[
        float | None,
        typer.Option(help="With --eps: q in (0, 1]. Default 1, full batch.", rich_help_panel=flags.PRIVACY),
    ] = None,
    trials: Annotated[
        int, typer.Option(help="Trials of the two-world test, a world.", rich_help_panel=flags.PRIVACY)
    ] = 5000,
    canaries: Annotated[int, typer.Option(help="Canaries of the one-run test.", rich_help_panel=flags.PRIVACY)] = 1000,
    controls: Annotated[
        bool,
        typer.Option("--controls/--no-controls", help="Run the positive controls: known faults that must be flagged.",
                     rich_help_panel=flags.PRIVACY),
    ] = True,
    steps: Annotated[
        int | None, typer.Option(help="With --eps: noisy steps T. Default 120.", rich_help_panel=flags.TRAINING)
    ] = None,
    seed: flags.Seed = None,
    device: flags.Device = "auto",
    run: flags.Run = DEFAULT_RUN,
    json: flags.Json = False,
    quiet: flags.Quiet = False,
    debug: flags.Debug = False,
) -> None:  # fmt: skip
    """Try to contradict the claimed ε by experiment. A clean audit is no proof; a contradiction ends with exit code 1.

    [dim]dprandp audit[/dim]
    [dim]dprandp audit --run runs/cifar --trials 20000[/dim]
    [dim]dprandp audit --eps 1 --steps 875 --sample-rate 0.08192 --examples 50000[/dim]
    """
    console = session.console(json=json, quiet=quiet, debug=debug)
    plan_only = {"--delta": delta, "--sample-rate": sample_rate, "--steps": steps, "--examples": examples}
    given = [name for name, value in plan_only.items() if value is not None]
    if eps is None and given:
        raise UsageError(f"{given[0]} describes a plan, and there is no --eps", fix="give --eps too, or only --run")
    if eps is not None and (run != DEFAULT_RUN or with_data):
        raise UsageError(
            "--eps audits a bare plan, --run and --with-data belong to a run", fix="leave out the one or the other"
        )
    from dprandp import audit as stage
    from dprandp.audit.games import AuditSettings

    settings = AuditSettings(trials, canaries, controls, 0 if seed is None else seed, with_data)
    if eps is not None:
        result = stage.audit_plan(
            eps, delta, 1.0 if sample_rate is None else sample_rate, 120 if steps is None else steps,
            10_000 if examples is None else examples, settings, console,
        )  # fmt: skip
    else:
        with session.opened(run) as rundir:
            context = session.context(rundir, console, device=device, data_dir=data_dir)
            result = stage.audit_run(settings, context)
    console.result(result, stage.line(result))
    stage.raise_unless_passed(result)


# ----------------------------------------------------------------------------------------------------------- continual
#
# The commands continue and diagnose: learning from public images first, and when that is enough.

Public = Annotated[
    str | None,
    typer.Option(help="Public images: synth (the run's synthetic ones), fraction:F (a random part F of the training "
                 "split, which you declare public), or a data set that you declare public, such as folder:PATH. "
                 "Default: synth.", rich_help_panel=flags.DATA, metavar="WHAT"),
]  # fmt: skip
Instances = Annotated[
    int | None,
    typer.Option(help="With --public synth: images to tell apart. Default: 256 (tiny), 2000 (small), 10000 (paper).",
                 rich_help_panel=flags.DATA),
]  # fmt: skip
ContinueShare = Annotated[
    float | None,
    typer.Option("--share", help="Part of what is left of ε for the private steps, in (0, 1]; 1 leaves nothing for a "
                 "probe on the same data. Default: 0.7.", rich_help_panel=flags.PRIVACY),
]  # fmt: skip
Switch = Annotated[
    str | None,
    typer.Option(help="Where private steps begin: plateau of the loss of held-out public images; decelerator, when "
                 "noise costs less than a tenth of a step, estimated on public images; or a step. Default: plateau.",
                 rich_help_panel=flags.TRAINING, metavar="plateau|decelerator|STEP"),
]  # fmt: skip
Mix = Annotated[
    str | None,
    typer.Option(help="Weight of the public gradient: step (1, then 0 from the switch on), cosine or ratio (in every "
                 "private step), public or private (alone). Default: step.", rich_help_panel=flags.TRAINING,
                 metavar="step|cosine|ratio|public|private"),
]  # fmt: skip
ContinueSteps = Annotated[
    int | None,
    typer.Option("--steps", help="Public and private steps in all. Default: 200 (tiny), 600 (small), 2000 (paper).",
                 rich_help_panel=flags.TRAINING),
]  # fmt: skip
ContinueBatchSize = Annotated[
    int | None,
    typer.Option("--batch-size", help="Expected private batch B = qN of Poisson sampling. Default: 0.082 N, 4096 "
                 "(paper).", rich_help_panel=flags.TRAINING),
]  # fmt: skip
PublicBatchSize = Annotated[
    int | None,
    typer.Option(help="Images of a public step. Default: 64, or 256 (paper).", rich_help_panel=flags.TRAINING),
]
ContinueLr = Annotated[
    float | None,
    typer.Option("--lr", help="AdamW's learning rate of private steps. Default: 0.001.",
                 rich_help_panel=flags.TRAINING),
]  # fmt: skip
PublicLr = Annotated[
    float | None,
    typer.Option(help="AdamW's learning rate of public steps. Default: 0.002.", rich_help_panel=flags.TRAINING),
]
ContinueViews = Annotated[
    int | None,
    typer.Option("--views", help="Augmented views K of each private example, averaged before the clip. Default: 1.",
                 rich_help_panel=flags.TRAINING),
]  # fmt: skip


@app.command("continue", rich_help_panel="Stages")
def continue_extractor(
    public: Public = None,
    instances: Instances = None,
    data: flags.DataName = None,
    data_dir: flags.DataDir = Path("data"),
    download: flags.Download = False,
    classes: flags.Classes = None,
    unit_column: flags.UnitColumn = None,
    eps: flags.Epsilon = None,
    delta: flags.Delta = None,
    share: ContinueShare = None,
    noise: flags.Noise = None,
    insecure_seed: flags.InsecureSeed = None,
    switch: Switch = None,
    mix: Mix = None,
    steps: ContinueSteps = None,
    batch_size: ContinueBatchSize = None,
    public_batch_size: PublicBatchSize = None,
    lr: ContinueLr = None,
    public_lr: PublicLr = None,
    views: ContinueViews = None,
    size: flags.Size = None,
    config: flags.Config = None,
    seed: flags.Seed = None,
    device: flags.Device = "auto",
    precision: flags.Precision = None,
    microbatch: flags.Microbatch = "auto",
    run: flags.Run = DEFAULT_RUN,
    plan: flags.Plan = False,
    resume: flags.Resume = False,
    overwrite: flags.Overwrite = False,
    json: flags.Json = False,
    quiet: flags.Quiet = False,
    debug: flags.Debug = False,
) -> None:
    """Between Phases I and II: the extractor learns on, from public images, then privately (Bu et al. 2024).

    [dim]dprandp continue --public fraction:0.1 --data digits --eps 2[/dim]
    [dim]dprandp continue --switch decelerator --mix step --plan[/dim]
    """
    console = session.console(json=json, quiet=quiet, debug=debug)
    given = {
        "public": public, "instances": instances, "data": data, "classes": classes, "unit_column": unit_column,
        "epsilon": eps, "delta": delta, "share": share, "noise": noise, "switch": switch, "mix": mix, "steps": steps,
        "batch_size": batch_size, "public_batch_size": public_batch_size, "lr": lr, "public_lr": public_lr,
        "views": views, "seed": seed, "precision": precision,
    }  # fmt: skip
    with (session.looked_at if plan else session.opened)(run) as rundir:
        stage = session.resolve(rundir, "continue", size, config, given)
        context = session.context(
            rundir, console, device=device, data_dir=data_dir, download=download, insecure_seed=insecure_seed,
            microbatch=session.microbatch(microbatch), resume=resume, overwrite=overwrite,
        )  # fmt: skip
        if plan:
            return session.print_plan("continue", stage, context)
        result = session.run_stage("continue", stage, context)
    console.next(session.command("report" if result.get("share") == 1 else "probe", run))
    return None


@app.command(rich_help_panel="About a run")
def diagnose(
    public: Public = None,
    instances: Instances = None,
    data: flags.DataName = None,
    data_dir: flags.DataDir = Path("data"),
    download: flags.Download = False,
    classes: flags.Classes = None,
    unit_column: flags.UnitColumn = None,
    eps: flags.Epsilon = None,
    delta: flags.Delta = None,
    share: ContinueShare = None,
    switch: Switch = None,
    steps: ContinueSteps = None,
    batch_size: ContinueBatchSize = None,
    public_batch_size: PublicBatchSize = None,
    public_lr: PublicLr = None,
    size: flags.Size = None,
    config: flags.Config = None,
    seed: flags.Seed = None,
    device: flags.Device = "auto",
    run: flags.Run = DEFAULT_RUN,
    json: flags.Json = False,
    quiet: flags.Quiet = False,
    debug: flags.Debug = False,
) -> None:
    """What privacy would cost a step of `continue`, term by term, from public images alone; nothing is charged.

    [dim]dprandp diagnose --public fraction:0.1 --data digits --eps 2[/dim]
    [dim]dprandp diagnose --steps 500 --batch-size 512 --json[/dim]
    """
    console = session.console(json=json, quiet=quiet, debug=debug)
    given = {
        "public": public, "instances": instances, "data": data, "classes": classes, "unit_column": unit_column,
        "epsilon": eps, "delta": delta, "share": share, "switch": switch, "steps": steps, "batch_size": batch_size,
        "public_batch_size": public_batch_size, "public_lr": public_lr, "seed": seed,
    }  # fmt: skip
    from dprandp.continual import diagnose as stage

    with session.opened(run) as rundir:
        settings = session.resolve(rundir, "continue", size, config, given)
        context = session.context(rundir, console, device=device, data_dir=data_dir, download=download)
        result = stage.run(settings, context)
    console.result(result, stage.line(result))
    return None


# ----------------------------------------------------------------------------------------------------------------- run
#
# The command run: all four stages and the report.


@app.command("run", rich_help_panel="Stages")
def run_all(
    data: flags.DataName = None,
    data_dir: flags.DataDir = Path("data"),
    download: flags.Download = False,
    classes: flags.Classes = None,
    unit_column: flags.UnitColumn = None,
    process: flags.Process = None,
    count: flags.Count = None,
    resolution: flags.Resolution = None,
    eps: flags.Epsilon = None,
    delta: flags.Delta = None,
    share: flags.Share = None,
    clip: flags.Clip = None,
    noise: flags.Noise = None,
    insecure_seed: flags.InsecureSeed = None,
    prior: flags.Prior = None,
    arch: flags.Arch = None,
    random_init: flags.RandomInit = None,
    pretrain_steps: flags.RunPretrainSteps = None,
    probe_steps: flags.ProbeSteps = None,
    probe_batch_size: flags.ProbeBatchSize = None,
    probe_lr: flags.ProbeLr = None,
    probe_views: flags.ProbeViews = None,
    steps: flags.RunSteps = None,
    batch_size: flags.RunBatchSize = None,
    lr: flags.RunLr = None,
    views: flags.RunViews = None,
    size: flags.Size = None,
    config: flags.Config = None,
    seed: flags.Seed = None,
    device: flags.Device = "auto",
    precision: flags.Precision = None,
    workers: flags.Workers = None,
    microbatch: flags.Microbatch = "auto",
    run: flags.Run = DEFAULT_RUN,
    plan: flags.Plan = False,
    resume: flags.Resume = False,
    overwrite: flags.Overwrite = False,
    json: flags.Json = False,
    quiet: flags.Quiet = False,
    debug: flags.Debug = False,
) -> None:
    """Run all four stages and the report, skipping what is finished; with --share 1 there is no fine-tune.

    [dim]dprandp run --data digits --eps 1[/dim]
    [dim]dprandp run --data cifar10 --eps 8 --size small --run runs/cifar --plan[/dim]
    """
    console = session.console(json=json, quiet=quiet, debug=debug)
    private = {
        "data": data, "classes": classes, "unit_column": unit_column, "epsilon": eps, "delta": delta,
        "clip_norm": clip, "noise": noise,
    }  # fmt: skip
    tuning = {"steps": steps, "batch_size": batch_size, "lr": lr, "views": views}
    given = {
        "generate": {"process": process, "count": count, "resolution": resolution},
        "pretrain": {
            "arch": arch, "steps": pretrain_steps, "random_init": random_init,
        },
        "probe": private | {
            "share": share, "steps": probe_steps, "batch_size": probe_batch_size, "lr": probe_lr, "views": probe_views,
        },
        "finetune": private | tuning,
    }  # fmt: skip
    colour = session.colour_of(data, data_dir, classes)
    fitting = {"pretrain": {"colour": colour}} if colour else {}
    with (session.looked_at if plan else session.opened)(run, create=True) as rundir:
        public: dict[str, StageConfig] = {}
        if prior is not None:
            session.refuse_made(
                prior, process=process, count=count, resolution=resolution, arch=arch, random_init=random_init,
                pretrain_steps=pretrain_steps,
            )  # fmt: skip
            public = session.public_stages(rundir, prior, size, config, given["probe"])
        context = session.context(
            rundir, console, device=device, data_dir=data_dir, download=download, workers=workers,
            insecure_seed=insecure_seed, microbatch=session.microbatch(microbatch), resume=resume, overwrite=overwrite,
        )  # fmt: skip

        def resolve(stage: str, planned: Mapping[str, StageConfig] | None = None):
            if stage in public:
                return public[stage]
            flags_of_stage = given[stage] | {"seed": seed} | ({} if stage == "generate" else {"precision": precision})
            return session.resolve(rundir, stage, size, config, flags_of_stage, planned, fitting.get(stage))

        configs = _all_stages(resolve, rundir, resume)
        if configs["probe"].share == 1:
            _refuse_unused(tuning)
        if plan:
            from dprandp.pipeline import plan as planning

            made = planning.plan_run(resolve, context)
            return console.result(made, planning.plan_lines(made))
        probe = configs["probe"]
        session.require_data(
            probe.data, data_dir, classes=probe.classes, unit_column=probe.unit_column, download=download
        )
        from dprandp import pipeline

        result = pipeline.run(resolve, context)
    console.result(result, pipeline.line(result))
    return None


def _all_stages(resolve, rundir: RunDir, resume: bool) -> dict[str, Any]:
    """Every stage's configuration before the first one runs: a wrong value is refused at once, not hours later.

    With ``resume`` the settings that the run has recorded stand.
    """
    configs: dict[str, Any] = {}
    for stage in STAGES:
        if stage in OPTIONAL_STAGES:
            continue
        configs[stage] = resolve(stage, configs)
    if resume:
        for row in rundir.status():
            if row["config"] and row["stage"] in configs:
                now = configs[row["stage"]]
                moved = {"data": now.data} if "data" in row["config"] else {}  # known by content, wherever they lie now
                configs[row["stage"]] = type(now)(**row["config"] | moved)
    return configs


def _refuse_unused(tuning: dict[str, Any]) -> None:
    """Flags of the fine-tune where there is none: passing over them would look like obeying them."""
    unused = [f"--{name.replace('_', '-')}" for name, value in tuning.items() if value is not None]
    if unused:
        raise UsageError(
            f"{', '.join(unused)} set the fine-tune, and with --share 1 there is none",
            fix=f"give --probe-{unused[0].removeprefix('--')} for the probe, or a smaller --share",
        )


# ---------------------------------------------------------------------------------------------------------------- tune
#
# ``dprandp tune``: settings for the probe, chosen on public images for nothing or on the private data at a price.

@app.command(rich_help_panel="Stages")
def tune(
    data: flags.DataName = None,
    data_dir: flags.DataDir = Path("data"),
    classes: flags.Classes = None,
    unit_column: flags.UnitColumn = None,
    eps: flags.Epsilon = None,
    delta: flags.Delta = None,
    share: flags.Share = None,
    clip: flags.Clip = None,
    on: Annotated[
        str,
        typer.Option(help="synthetic: the run's own images, no cost. NAME: data that you declare public, no cost. "
                     "private: the private data, charged to the budget. Default: synthetic.",
                     rich_help_panel=flags.PRIVACY, metavar="synthetic|NAME|private"),
    ] = "synthetic",
    spend: Annotated[
        float,
        typer.Option(help="With --on private: part of the probe's share of ε for tuning.",
                     rich_help_panel=flags.PRIVACY),
    ] = 0.3,
    held_out: Annotated[
        float,
        typer.Option(help="With --on private: chance of an image to be scored on, not fitted on, in a trial.",
                     rich_help_panel=flags.PRIVACY),
    ] = 0.2,
    insecure_seed: flags.InsecureSeed = None,
    trials: Annotated[
        int,
        typer.Option(help="Settings to try; with --on private the expected number (the real one is random and secret).",
                     rich_help_panel=flags.TRAINING),
    ] = 12,
    steps: flags.Steps = None,
    lr: flags.Lr = None,
    size: flags.Size = None,
    config: flags.Config = None,
    seed: flags.Seed = None,
    device: flags.Device = "auto",
    run: flags.Run = DEFAULT_RUN,
    overwrite: flags.Overwrite = False,
    json: flags.Json = False,
    quiet: flags.Quiet = False,
    debug: flags.Debug = False,
) -> None:  # fmt: skip
    """Choose learning rate, steps and dimensions for the probe; writes tuned.toml. By default no privacy cost.

    [dim]dprandp tune --data digits --eps 1[/dim]
    [dim]dprandp tune --data pneumoniamnist --eps 2 --on fashion-mnist[/dim]
    """
    console = session.console(json=json, quiet=quiet, debug=debug)
    given = {
        "data": data, "classes": classes, "unit_column": unit_column, "epsilon": eps, "delta": delta, "share": share,
        "clip_norm": clip, "steps": steps, "lr": lr, "seed": seed,
    }  # fmt: skip
    from dprandp import tune as stage
    from dprandp.tune.settings import TuneConfig

    asked = TuneConfig(on=on, trials=trials, spend=spend, held_out=held_out)
    with session.opened(run) as rundir:
        probe = session.resolve(rundir, "probe", size, config, given)
        context = session.context(
            rundir, console, device=device, data_dir=data_dir, insecure_seed=insecure_seed, overwrite=overwrite
        )
        result = stage.run(probe, asked, context)
    console.result(result, stage.line(result))
    console.next(session.command("probe", run) + f" --config {shlex.quote(str(run / 'tuned.toml'))}")
