"""The stages as commands: flags to configuration to one stage. No logic of a stage lives here."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dprandp.cli import finetune_flags as own
from dprandp.cli import flags, session
from dprandp.cli.session import DEFAULT_RUN
from dprandp.config import StageConfig
from dprandp.finetune_options import WITHOUT_PHASE_ONE

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
    arch: own.Arch = None,
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
    optimizer: own.Optimizer = None,
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
