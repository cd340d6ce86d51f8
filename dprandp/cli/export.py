"""The command export: a released model, copied for others."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dprandp.cli import flags, session
from dprandp.cli.session import DEFAULT_RUN

app = typer.Typer()


@app.command(rich_help_panel="A model")
def export(
    *,
    allow_not_private: Annotated[
        bool,
        typer.Option("--allow-not-private", help="Export a model without a guarantee too, stamped NOT PRIVATE.",
                     rich_help_panel=flags.PRIVACY),
    ] = False,
    out: Annotated[
        Path,
        typer.Option(help="A new folder, or a new file whose name ends in .zip.", rich_help_panel=flags.OUTPUT,
                     metavar="DIR|FILE.zip"),
    ],
    run: flags.Run = DEFAULT_RUN,
    json: flags.Json = False,
    quiet: flags.Quiet = False,
    debug: flags.Debug = False,
) -> None:  # fmt: skip
    """Copy a run's model, verified, for others: weights, configuration, model card, and an example that loads them.

    [dim]dprandp export --out scans-classifier[/dim]
    [dim]dprandp export --run runs/cifar --out cifar.zip[/dim]
    """
    console = session.console(json=json, quiet=quiet, debug=debug)
    from dprandp.stages import export as exporting

    model = session.released_model(run, None)
    result = exporting.export(model, out, allow_not_private=allow_not_private)
    console.result(result, exporting.export_line(result))
