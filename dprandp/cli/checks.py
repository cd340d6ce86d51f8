"""The command doctor: is this machine fit for a run, and is the run whole?"""

from __future__ import annotations

import typer

from dprandp.cli import flags, session
from dprandp.cli.flags import Call
from dprandp.runs.directory import RunDir

app = typer.Typer()


@flags.command(app, "About a run", options=(*flags.RUN, "data_dir", "device"))
def doctor(call: Call) -> None:
    """Check this machine (libraries, arithmetic, disk, data) and the run (hashes, ledger, lock, model).

    Repairs nothing. Exit code: 0 without a failure, else that of the first one: 1 wrong arithmetic, 3 a library, 4 a
    corrupt file, 5 ε, 6 disk or lock.

    [dim]dprandp doctor[/dim]
    [dim]dprandp doctor --run runs/cifar --json[/dim]
    """
    console = session.console(call.options)
    from dprandp.inspection import doctor as examination

    options = call.options
    checks = examination.examine(options.run, options.data_dir, options.device)
    result = examination.as_result(options.run, checks)
    console.result(result, examination.lines(checks))
    if result["exit_code"]:
        raise typer.Exit(result["exit_code"])


# -------------------------------------------------------------------------------------------------------------- verify
#
# The command verify: do a run's claims follow from its ledger?


@flags.command(app, "About a run", options=flags.RUN)
def verify(call: Call) -> None:
    """Check a run's claims as an outsider would: ledger, plans, ε by another library, results, model and card.

    Needs run.json, privacy/ and model/; neither the data nor private/. Exit code: 0 where all claims hold, 1 for an ε
    that is too low, 4 for files that contradict each other.

    [dim]dprandp verify[/dim]
    [dim]dprandp verify --run runs/cifar --json[/dim]
    """
    console = session.console(call.options)
    from dprandp.inspection import verify as verifying

    result = verifying.verify(RunDir.open(call.options.run, create=False))
    console.result(result, verifying.verify_lines(result))
    if result["exit_code"]:
        raise typer.Exit(result["exit_code"])
