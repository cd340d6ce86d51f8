"""``dprandp tune``: settings for the probe, chosen on public images for nothing or on the private data at a price."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer

from dprandp.cli import flags, session
from dprandp.cli.session import DEFAULT_RUN

app = typer.Typer()

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
    from dprandp.stages import tune as stage
    from dprandp.stages.tune_settings import TuneConfig

    asked = TuneConfig(on=on, trials=trials, spend=spend, held_out=held_out)
    with session.opened(run) as rundir:
        probe = session.resolve(rundir, "probe", size, config, given)
        context = session.context(
            rundir, console, device=device, data_dir=data_dir, insecure_seed=insecure_seed, overwrite=overwrite
        )
        result = stage.run(probe, asked, context)
    console.result(result, stage.line(result))
    console.next(session.command("probe", run) + f" --config {shlex.quote(str(run / 'tuned.toml'))}")
