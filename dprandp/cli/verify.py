"""The command verify: do a run's claims follow from its ledger?"""

from __future__ import annotations

import typer

from dprandp.cli import flags, session
from dprandp.cli.session import DEFAULT_RUN
from dprandp.rundir import RunDir

app = typer.Typer()


@app.command(rich_help_panel="About a run")
def verify(run: flags.Run = DEFAULT_RUN, json: flags.Json = False, debug: flags.Debug = False) -> None:
    """Check a run's claims as an outsider would: ledger, plans, ε by another library, results, model and card.

    Needs run.json, privacy/ and model/; neither the data nor private/. Exit code: 0 where all claims hold, 1 for an ε
    that is too low, 4 for files that contradict each other.

    [dim]dprandp verify[/dim]
    [dim]dprandp verify --run runs/cifar --json[/dim]
    """
    console = session.console(json=json, debug=debug)
    from dprandp.stages import verify as verifying

    result = verifying.verify(RunDir.open(run, create=False))
    console.result(result, verifying.verify_lines(result))
    if result["exit_code"]:
        raise typer.Exit(result["exit_code"])
