"""The audit as a command."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dprandp.cli import flags, session
from dprandp.cli.session import DEFAULT_RUN
from dprandp.errors import UsageError

app = typer.Typer()


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
    from dprandp.stages import audit as stage
    from dprandp.stages.audit_tests import AuditSettings

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
