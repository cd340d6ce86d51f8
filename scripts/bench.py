"""How fast each stage is beside what could be used instead: ratios within one run, and scaling curves.

    python scripts/bench.py --quick
    python scripts/bench.py --only probe --only finetune --rounds 7 --json
"""

from __future__ import annotations

from typing import Annotated

import typer

from dprandp.cli import flags, main, session

app = typer.Typer()


@flags.command(app, "The benchmark", options=("json", "quiet", "debug"))
def bench(
    call: flags.Call,
    only: Annotated[
        list[str] | None,
        typer.Option(help="This part alone; may be repeated. Default: all.", rich_help_panel=flags.PERFORMANCE,
                     metavar="NAME"),
    ] = None,
    quick: Annotated[
        bool,
        typer.Option("--quick", help="Small sizes, under two minutes; ends with exit code 1 if a ratio regressed past "
                     "its bound.", rich_help_panel=flags.PERFORMANCE),
    ] = False,
    rounds: Annotated[
        int | None,
        typer.Option(help="Rounds of every pair. Default: 5, or 3 with --quick.", rich_help_panel=flags.PERFORMANCE),
    ] = None,
    listed: Annotated[
        bool, typer.Option("--list", help="Name the parts and measure nothing.", rich_help_panel=flags.OUTPUT)
    ] = False,
) -> None:  # fmt: skip
    """Measure how fast each stage is beside what could be used instead: ratios within one run, and scaling curves."""
    console = session.console(call.options)
    from benchmark import registry, suite, table

    from dprandp.runs.context import prepare_device

    if listed:
        parts = {name: registry.PAIRS[name].summary if name in registry.PAIRS else "" for name in suite.names()}
        lines = "\n".join(f"{name:<28} {text}".rstrip() for name, text in parts.items())
        return console.result({"parts": parts}, lines)
    prepare_device("cpu")
    default = suite.QUICK_ROUNDS if quick else suite.FULL_ROUNDS
    chosen = default if rounds is None else rounds
    result = suite.run(only or [], "quick" if quick else "full", chosen, console.say)
    console.result(result, table.lines(result))
    return suite.raise_for(result)


if __name__ == "__main__":
    main(app)
