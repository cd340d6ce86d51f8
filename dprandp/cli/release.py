"""The commands predict and export: classify new images with a released model, and copy the model for others."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dprandp.cli import flags, session
from dprandp.cli.flags import Call
from dprandp.errors import UsageError

app = typer.Typer()


@flags.command(app, "A model", options=flags.TALKING)
def predict(
    call: Call,
    images: Annotated[
        list[Path] | None,
        typer.Argument(help="Image files of any size.", metavar="IMAGE...", show_default=False,
                       rich_help_panel=flags.DATA),
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(help="npz:PATH (uint8 images in the array images, x or x_test) or folder:PATH (every image below "
                     "it; other files are skipped and counted). Labels are not read.", rich_help_panel=flags.DATA,
                     metavar="NAME"),
    ] = None,
    model: Annotated[
        Path | None,
        typer.Option(help="A model/ folder or an export. Default: the run's.", rich_help_panel=flags.DATA,
                     metavar="DIR"),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(help="Write a table with the probability of every class. Default: print class and probability.",
                     rich_help_panel=flags.OUTPUT, metavar="FILE.csv"),
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace the file of --out.", rich_help_panel=flags.OUTPUT)
    ] = False,
) -> None:  # fmt: skip
    """Classify images with a run's model. Reads only its model/ folder and the images.

    [dim]dprandp predict scan1.png scan2.png[/dim]
    [dim]dprandp predict --model exported/ --data folder:new-scans --out answers.csv[/dim]
    """
    console = session.console(call.options)
    from dprandp import release as prediction
    from dprandp.runs.files import atomic_write

    if out is not None and out.exists() and not overwrite:
        raise UsageError(f"{out} exists", fix="give another name, or --overwrite")
    loaded = session.released_model(call.options.run, model)
    skipped: dict[str, int] = {}
    rows = prediction.predict(loaded, images or [], data, skipped.update)
    if skipped:
        console.warn(prediction.skipped_text(skipped))
    if out is not None:
        atomic_write(out, prediction.prediction_csv(rows))
    result = {
        "data": loaded.result["data"],
        "private": loaded.not_private_because is None,
        "out": None if out is None else str(out),
        "predictions": rows,
        "skipped_files": sum(skipped.values()),
        "skipped_kinds": skipped,
    }
    line = prediction.prediction_lines(rows) if out is None else f"predict: {len(rows)} images, written to {out}"
    console.result(result, line)


# -------------------------------------------------------------------------------------------------------------- export


@flags.command(app, "A model", options=flags.TALKING)
def export(
    call: Call,
    *,
    allow_not_private: Annotated[
        bool,
        typer.Option("--allow-not-private", help="Export the model even if it is NOT PRIVATE; the stamp stays.",
                     rich_help_panel=flags.PRIVACY),
    ] = False,
    out: Annotated[
        Path,
        typer.Option(help="A new folder, or a new file whose name ends in .zip.", rich_help_panel=flags.OUTPUT,
                     metavar="DIR|FILE.zip"),
    ],
) -> None:  # fmt: skip
    """Copy a run's model, verified, for others: weights, configuration, model card, and an example that loads them.

    [dim]dprandp export --out scans-classifier[/dim]
    [dim]dprandp export --run runs/cifar --out cifar.zip[/dim]
    """
    console = session.console(call.options)
    from dprandp import release as exporting

    model = session.released_model(call.options.run, None)
    result = exporting.export(model, out, allow_not_private=allow_not_private)
    console.result(result, exporting.export_line(result))
