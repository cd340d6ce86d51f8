"""The command line.

    flags.py     every flag, declared once        stages.py   generate, pretrain, probe, finetune
    session.py   flags -> configuration, context   about.py    status, report, account, datasets
    continual.py   continue, diagnose
    run.py, predict.py, export.py, doctor.py, verify.py, tune.py, audit.py, bench.py, priors.py   one command each
    together.py  the same command on several processes

Modules that import torch are imported inside the commands, so that ``--help`` answers at once.
"""

from __future__ import annotations

import io
import sys
from typing import Annotated

import typer

from dprandp import __version__, faults
from dprandp.cli import (
    about,
    audit,
    bench,
    continual,
    doctor,
    export,
    predict,
    priors,
    run,
    session,
    stages,
    together,
    tune,
    verify,
)  # fmt: skip
from dprandp.signals import end_on_signals

app = typer.Typer(
    name="dprandp",
    help="Train an image classifier under differential privacy, with a prior learned from random processes alone.",
    epilog="Start with: dprandp run --data digits --eps 1",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
)
app.add_typer(stages.app)
app.add_typer(continual.app)
app.add_typer(run.app)
app.add_typer(predict.app)
app.add_typer(export.app)
app.add_typer(tune.app)
app.add_typer(about.app)
app.add_typer(doctor.app)
app.add_typer(verify.app)
app.add_typer(priors.app)
app.add_typer(audit.app)
app.add_typer(bench.app)


@app.callback(invoke_without_command=True)
def _root(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False,
) -> None:
    if version:
        print(f"dprandp {__version__}")
        raise typer.Exit
    faults.announce()
    together.refuse_command(context.invoked_subcommand)


def main() -> None:
    """Entry point of the console script: run a command, turn errors into messages and exit codes."""
    end_on_signals()
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a name that the terminal cannot show is no bug
    code: object = 0
    try:
        together.join()  # under torchrun; only rank 0 comes back
        app(standalone_mode=True)
    except SystemExit as end:
        code = end.code
    except (Exception, KeyboardInterrupt) as error:
        code = session.current.error(error)
    together.end(code)
    sys.exit(code)
