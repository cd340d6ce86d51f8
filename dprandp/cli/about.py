"""Commands that look at a run, or at nothing: status, report, account, datasets."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dprandp.cli import flags, session
from dprandp.cli.session import DEFAULT_RUN
from dprandp.errors import UsageError
from dprandp.runs.directory import RunDir

app = typer.Typer()


@app.command(rich_help_panel="About a run")
def status(run: flags.Run = DEFAULT_RUN, json: flags.Json = False, debug: flags.Debug = False) -> None:
    """Show which stages are done, partial, stale or missing, and what was spent.

    [dim]dprandp status[/dim]
    [dim]dprandp status --run runs/cifar --json[/dim]
    """
    console = session.console(json=json, debug=debug)
    from dprandp.inspection import overview

    table = overview.status(RunDir.open(run, create=False))
    console.result(table, overview.status_lines(table))


@app.command(rich_help_panel="About a run")
def report(
    run: flags.Run = DEFAULT_RUN, json: flags.Json = False, quiet: flags.Quiet = False, debug: flags.Debug = False
) -> None:
    """Write report.html (one self-contained page) from the run's files.

    [dim]dprandp report[/dim]
    [dim]dprandp report --run runs/cifar[/dim]
    """
    console = session.console(json=json, quiet=quiet, debug=debug)
    from dprandp.report import page as report_module

    with session.opened(run) as rundir:
        path = report_module.write(rundir)
    console.result({"report": str(path)}, f"report: {path}")


@app.command(rich_help_panel="About a run")
def account(
    eps: Annotated[
        float | None, typer.Option("--eps", help="Find the noise for this ε.", rich_help_panel=flags.PRIVACY)
    ] = None,
    noise_multiplier: Annotated[
        float | None,
        typer.Option(help="Find the ε of this σ (noise std over clip norm).", rich_help_panel=flags.PRIVACY),
    ] = None,
    sample_rate: Annotated[
        float, typer.Option(help="q in (0, 1]; 1 is full batch.", rich_help_panel=flags.PRIVACY)
    ] = 1.0,
    steps: Annotated[int, typer.Option(help="Noisy steps T.", rich_help_panel=flags.PRIVACY)] = 1,
    delta: Annotated[float, typer.Option(help="δ.", rich_help_panel=flags.PRIVACY)] = 1e-5,
    adjacency: Annotated[
        str,
        typer.Option(
            help="What must not be noticed: zero-out (a record's slot is empty), add-remove or replace-one.",
            rich_help_panel=flags.PRIVACY,
        ),
    ] = "zero-out",
    curve: Annotated[
        bool, typer.Option("--curve", help="Print ε for δ = 1e-3 … 1e-10 as well.", rich_help_panel=flags.OUTPUT)
    ] = False,
    group_size: Annotated[
        int,
        typer.Option(help="Also the ε of k records together, such as one person's.", rich_help_panel=flags.PRIVACY),
    ] = 1,
    json: flags.Json = False,
    debug: flags.Debug = False,
) -> None:
    """Calculate σ from ε, or ε from σ, and what that leaves to an attacker; reads no data.

    [dim]dprandp account --eps 1 --sample-rate 0.08192 --steps 875[/dim]
    [dim]dprandp account --noise-multiplier 40.9 --steps 120 --curve[/dim]
    """
    console = session.console(json=json, debug=debug)
    from dprandp.inspection import calculator

    if (eps is None) == (noise_multiplier is None):
        raise UsageError(
            "account needs exactly one of --eps and --noise-multiplier",
            fix="give --eps to find σ, or --noise-multiplier to find ε",
        )
    result = calculator.account(eps, noise_multiplier, sample_rate, steps, delta, adjacency, curve or json)
    result |= calculator.account_group(result, group_size)
    if not json:
        console.say(calculator.opinion_lines(result))
        console.say(calculator.attack_lines(result))
    console.result(result, calculator.account_lines(result))


@app.command(rich_help_panel="About a run")
def datasets(
    data: Annotated[
        str | None,
        typer.Option(help="This data set alone. Default: all.", rich_help_panel=flags.DATA, metavar="NAME"),
    ] = None,
    data_dir: flags.DataDir = Path("data"),
    download: flags.Download = False,
    check: Annotated[
        str | None,
        typer.Option("--check", help="Count duplicates, units and empty classes of this data set (known name, "
                     "npz:PATH, folder:PATH). "
                     "Reads private data; the answer is private and is written nowhere. Default: none.",
                     rich_help_panel=flags.DATA, metavar="NAME"),
    ] = None,
    unit_column: flags.UnitColumn = None,
    classes: flags.Classes = None,
    json: flags.Json = False,
    debug: flags.Debug = False,
) -> None:  # fmt: skip
    """List the data sets that --data knows and which are at hand; fetch one with --download, or --check your own.

    [dim]dprandp datasets --data fashion-mnist --download --data-dir /data[/dim]
    [dim]dprandp datasets --check npz:scans.npz --unit-column patient[/dim]
    """
    console = session.console(json=json, debug=debug)
    from dprandp.inspection import overview

    if check is not None:
        found = overview.check_dataset(check, data_dir, classes, unit_column)
        console.say("what follows was counted in private data without noise: keep it, and do not publish it")
        return console.result(found, overview.check_lines(found))
    if unit_column is not None or classes is not None:
        raise UsageError("--unit-column and --classes belong to --check", fix="name the data set with --check NAME")
    rows = overview.datasets(data_dir, data, download=download)
    return console.result({"datasets": rows}, overview.dataset_lines(rows))


# -------------------------------------------------------------------------------------------------------------- priors
#
# The command priors: which finished extractors ship with the package.


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
    from dprandp.pretrain import shipped

    rows = shipped.table()
    console.result({"priors": rows}, shipped.lines(rows))
    if check:
        shipped.check(rows)
