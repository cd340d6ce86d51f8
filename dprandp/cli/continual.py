"""The commands continue and diagnose: learning from public images first, and when that is enough."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dprandp.cli import flags, session
from dprandp.cli.session import DEFAULT_RUN

app = typer.Typer()

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
    from dprandp.stages import diagnose as stage

    with session.opened(run) as rundir:
        settings = session.resolve(rundir, "continue", size, config, given)
        context = session.context(rundir, console, device=device, data_dir=data_dir, download=download)
        result = stage.run(settings, context)
    console.result(result, stage.line(result))
    return None
