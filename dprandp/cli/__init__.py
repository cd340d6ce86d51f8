"""The command line.

    flags.py     every flag, declared once        stages.py    the stages, run, tune, audit, diagnose
    session.py   flags -> configuration, context  about.py     status, compare, report, verify, account, predict, ...

Modules that import torch are imported inside the commands, so that ``--help`` answers at once.
"""

from __future__ import annotations

import io
import sys
from typing import Annotated

import typer

from dprandp import __version__
from dprandp.cli import about, session, stages
from dprandp.runs import faults
from dprandp.runs.signals import end_on_signals, ended_by

app = typer.Typer(
    name="dprandp",
    help="Train an image classifier under differential privacy, with a prior learned from random processes alone.",
    epilog="Start with: dprandp run --data digits --eps 1",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
)
app.add_typer(stages.app)
app.add_typer(about.app)


@app.callback(invoke_without_command=True)
def _root(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False,
) -> None:
    if version:
        print(f"dprandp {__version__}")
        raise typer.Exit
    faults.announce()
    session.refuse_command(context.invoked_subcommand)


def main(application: typer.Typer = app) -> None:
    """Run a command of the console script, or of a script's application; errors become messages and exit codes."""
    end_on_signals()
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a name that the terminal cannot show is no bug
    code: object = 0
    try:
        session.join()  # under torchrun; only rank 0 comes back
        application(standalone_mode=True)
    except SystemExit as end:
        code = end.code
    except (Exception, KeyboardInterrupt) as error:
        signum = ended_by()
        code = session.current.error(error) if signum is None else 128 + signum
    session.end(code)
    sys.exit(code)
