"""The command priors: which finished extractors ship with the package."""

from __future__ import annotations

from typing import Annotated

import typer

from dprandp.cli import flags, session

app = typer.Typer()


@app.command(rich_help_panel="About a run")
def priors(
    check: Annotated[
        bool,
        typer.Option("--check", help="Compare every file with its card; exit with 4 where one is damaged.",
                     rich_help_panel=flags.DATA),
    ] = False,
    json: flags.Json = False,
    debug: flags.Debug = False,
) -> None:  # fmt: skip
    """List the shipped priors, for --prior: process, size, features, results, licence.

    [dim]dprandp priors[/dim]
    [dim]dprandp priors --check --json[/dim]
    """
    console = session.console(json=json, debug=debug)
    from dprandp.stages import prior

    rows = prior.table()
    console.result({"priors": rows}, prior.lines(rows))
    if check:
        prior.check(rows)
