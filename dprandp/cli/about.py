"""Commands about a run, its model, the accounting, data sets and priors."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dprandp.cli import flags, session
from dprandp.cli.flags import DATA, DEFAULT_RUN, OUTPUT, PRIVACY, Call, option
from dprandp.config.declared import Publication
from dprandp.config.schema import DATA_SETTINGS, build
from dprandp.config.settings import checked
from dprandp.errors import InputError, UsageError
from dprandp.runs.directory import RunDir

app = typer.Typer()


@flags.command(app, "About a run", options=(*flags.RUN, "data_dir", "device"))
def status(
    call: Call,
    check: Annotated[bool, option("Examine the run's files (hashes, ledger, lock, model) and this machine (libraries, "
                                  "arithmetic, disk, data). Repairs nothing.", OUTPUT, "--check")] = False,
    runs: Annotated[Path | None, option("List the runs below this folder instead, at any depth, with what those "
                                        "about the same data have spent together. Default: one run.", OUTPUT,
                                        metavar="DIR")] = None,
) -> None:  # fmt: skip
    """Show which stages are done, partial, stale or missing, and what was spent; or --check the run and this machine.

    Exit code of --check: 0 without a failure, else that of the first one: 1 wrong arithmetic, 3 a library, 4 a corrupt
    file, 5 ε, 6 disk or lock.

    [dim]dprandp status[/dim]
    [dim]dprandp status --run runs/cifar --check[/dim]
    [dim]dprandp status --runs runs[/dim]
    """
    console, options = session.console(call.options), call.options
    if runs is not None:
        if check or options.run != DEFAULT_RUN:
            raise UsageError("--runs lists runs; --run and --check are about one", fix="leave one of them out")
        from dprandp.inspection import compare as comparing

        found = comparing.runs_in(runs)
        return console.result(found, comparing.lines(found))
    if check:
        from dprandp.inspection import check as examination
        from dprandp.inspection import exit_code

        checks = examination.examine(options.run, options.data_dir, options.device)
        console.result(examination.as_json(options.run, checks), examination.lines(checks))
        raise typer.Exit(exit_code(checks))
    from dprandp.inspection import overview

    table = overview.status(RunDir.open(options.run, create=False))
    console.result(table, overview.status_lines(table))


@flags.command(app, "About a run", options=("json", "debug"))
def compare(
    call: Call,
    runs: Annotated[list[Path], typer.Argument(help="Run directories.", metavar="RUN...", show_default=False,
                                               rich_help_panel=DATA)],
    csv: Annotated[Path | None, option("Also write it as comma-separated values. Default: not.", OUTPUT,
                                       metavar="FILE")] = None,
    latex: Annotated[Path | None, option("Also write it as a LaTeX tabular. Default: not.", OUTPUT,
                                         metavar="FILE")] = None,
    html: Annotated[Path | None, option("Also write it as a page of its own. Default: not.", OUTPUT,
                                        metavar="FILE")] = None,
    overwrite: Annotated[bool, option("Replace the files of --csv, --latex and --html.", OUTPUT,
                                      "--overwrite")] = False,
) -> None:  # fmt: skip
    """Show runs side by side, and the ε that those about the same data have spent together.

    [dim]dprandp compare runs/a runs/b[/dim]
    [dim]dprandp compare runs/* --latex table.tex[/dim]
    """
    console = session.console(call.options)
    from dprandp.inspection import compare as comparing
    from dprandp.runs.files import atomic_write

    comparing.refuse_existing(csv, latex, html, overwrite=overwrite)
    found = comparing.compare(runs)
    for path, text in ((csv, comparing.as_csv), (latex, comparing.as_latex), (html, comparing.as_html)):
        if path is not None:
            atomic_write(path, text(found))
    console.result(found, comparing.lines(found))


@flags.command(app, "About a run", options=flags.TALKING)
def report(
    call: Call,
    tensorboard: Annotated[Path | None, option("Also write the run's metrics as event files for TensorBoard, into this "
                                               "new folder. Default: not.", OUTPUT, metavar="DIR")] = None,
) -> None:  # fmt: skip
    """Write report.html (one self-contained page) from the run's files.

    [dim]dprandp report[/dim]
    [dim]dprandp report --run runs/cifar --tensorboard events[/dim]
    """
    console = session.console(call.options)
    from dprandp.report import page
    from dprandp.report.run import write_events

    with session.opened(call.options.run) as rundir:
        if tensorboard is not None:
            write_events(rundir, tensorboard)
        path = page.write(rundir)
    console.result({"report": str(path)}, f"report: {path}")


@flags.command(app, "About a run", options=(*flags.RUN, "trust_code"))
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
    raise typer.Exit(result.exit_code)


@flags.command(app, "About a run", options=("json", "debug"))
def account(
    call: Call,
    eps: Annotated[float | None, option("Find the noise for this ε.", PRIVACY, "--eps")] = None,
    noise_multiplier: Annotated[float | None, option("Find the ε of this σ (noise std over clip norm).",
                                                     PRIVACY)] = None,
    sample_rate: Annotated[float, option("q in (0, 1]; 1 is full batch.", PRIVACY)] = 1.0,
    steps: Annotated[int, option("Noisy steps T.", PRIVACY)] = 1,
    delta: Annotated[float, option("δ.", PRIVACY)] = 1e-5,
    adjacency: Annotated[str, option("How neighbours differ: zero-out (a record's slot is empty), add-remove or "
                                     "replace-one.", PRIVACY)] = "zero-out",
    curve: Annotated[bool, option("Print ε for δ = 1e-3 … 1e-10 as well.", OUTPUT, "--curve")] = False,
    group_size: Annotated[int, option("Also give ε for k records together, such as one person's.", PRIVACY)] = 1,
) -> None:  # fmt: skip
    """Calculate σ from ε, or ε from σ, and the best attack at that ε; reads no data.

    [dim]dprandp account --eps 1 --sample-rate 0.08192 --steps 875[/dim]
    [dim]dprandp account --noise-multiplier 40.9 --steps 120 --curve[/dim]
    """
    console = session.console(call.options)
    from dprandp.inspection import account as calculator

    if (eps is None) == (noise_multiplier is None):
        raise UsageError(
            "account needs exactly one of --eps and --noise-multiplier",
            fix="give --eps to find σ, or --noise-multiplier to find ε",
        )
    result = calculator.account(
        eps, noise_multiplier, sample_rate, steps, delta, adjacency, curve or call.options.json, group_size
    )
    if not call.options.json:
        console.say(calculator.opinion_lines(result))
        console.say(calculator.attack_lines(result))
    console.result(result, calculator.account_lines(result))


CHECKED = tuple(name for name in DATA_SETTINGS if name not in ("data", "allow_shared_units"))


@flags.command(app, "About a run", flags.of_settings("probe", names=CHECKED),
               ("json", "debug", "data_dir", "download"))  # fmt: skip
def datasets(
    call: Call,
    data: Annotated[str | None, option("List only this data set. Default: all.", DATA, metavar="NAME")] = None,
    check: Annotated[str | None, option("Count duplicates, units and empty classes of this data set (known name, "
                                        "npz:PATH, folder:PATH). Reads private data; the result is private and is not "
                                        "stored. Exit code 3 for what a run would refuse. Default: none.", DATA,
                                        "--check", "NAME")] = None,
    names: Annotated[Path | None, option("With --check: write the names of files that cannot be used, or that occur in "
                                         "both splits, into this file, which is private. Default: no names.", DATA,
                                         metavar="FILE")] = None,
) -> None:  # fmt: skip
    """List the data sets for --data, and which of them are present; fetch one with --download, or --check your own.

    [dim]dprandp datasets --data fashion-mnist --download --data-dir /data[/dim]
    [dim]dprandp datasets --check npz:scans.npz --unit-column patient[/dim]
    """
    console = session.console(call.options)
    from dprandp.inspection import overview

    options, given = call.options, call.given["probe"]
    if check is not None:
        asked = {name: value for name, value in given.items() if value is not None}
        config = build("probe", asked | {"data": check})
        found = overview.check_dataset(config, options.data_dir, console, names)
        console.say("these counts are of private data, without noise: do not publish them")
        console.result(found, overview.check_lines(found))
        if found.units_in_test:
            raise typer.Exit(InputError.exit_code)
        return None
    if names is not None:
        raise UsageError("--names needs --check", fix="name the data set with --check NAME")
    if idle := [name for name, value in given.items() if value is not None]:
        raise UsageError(f"--{idle[0].replace('_', '-')} needs --check", fix="name the data set with --check NAME")
    rows = overview.datasets(options.data_dir, data, download=options.download)
    return console.result({"datasets": rows}, overview.dataset_lines(rows))


@flags.command(app, "About a run", options=("json", "debug"))
def priors(
    call: Call,
    check: Annotated[bool, option("Compare every file with its card; exit with 4 where one is damaged.", DATA,
                                  "--check")] = False,
) -> None:  # fmt: skip
    """List the shipped priors for --prior: process, size, features, results, licence.

    [dim]dprandp priors[/dim]
    [dim]dprandp priors --check --json[/dim]
    """
    console = session.console(call.options)
    from dprandp import priors as shipped

    rows = shipped.table()
    console.result({"priors": rows}, shipped.lines(rows))
    if check:
        shipped.check(rows)


# ------------------------------------------------------------------------------------------------------------- a model


@flags.command(app, "A model", options=(*flags.TALKING, "trust_code"))
def predict(
    call: Call,
    images: Annotated[list[Path] | None, typer.Argument(help="Image files of any size, and folders: every image below "
                                                             "one is taken, other files are skipped and counted.",
                                                        metavar="IMAGE|DIR", show_default=False,
                                                        rich_help_panel=DATA)] = None,
    data: Annotated[str | None, option("npz:PATH (uint8 images in the array images, x or x_test) or folder:PATH. "
                                       "Labels are not read.", DATA, metavar="NAME")] = None,
    model: Annotated[Path | None, option("A model/ folder or an export. Default: the run's.", DATA,
                                         metavar="DIR")] = None,
    out: Annotated[Path | None, option("Write the probability of every class to a file, CSV or JSON by its name. "
                                       "Default: print class and probability.", OUTPUT,
                                       metavar="FILE.csv|FILE.json")] = None,
    overwrite: Annotated[bool, option("Replace the file of --out.", OUTPUT, "--overwrite")] = False,
) -> None:  # fmt: skip
    """Classify images with a run's model. Reads only its model/ folder and the images.

    An image that cannot be read gets a row that says so, and the others are classified; the exit code is then 3.

    [dim]dprandp predict scan1.png scan2.png[/dim]
    [dim]dprandp predict --model exported/ new-scans/ --out answers.csv[/dim]
    """
    console = session.console(call.options)
    from dprandp.release import predictions

    if out is not None:
        predictions.refuse_target(out, overwrite)
    loaded = session.released_model(call.options.run, model)
    skipped: dict[str, int] = {}
    blocks = predictions.predictions(loaded, images or [], data, skipped.update)
    if skipped:
        console.warn(predictions.skipped_text(skipped))
    result = predictions.answer(
        loaded, blocks, out, keep=call.options.json, skipped=skipped,
        say=lambda lines: None if call.options.json else console.result({}, lines),
    )  # fmt: skip
    count, bad = result["images"], result["unreadable"]
    if bad:
        console.warn(f"{bad} of {count} images cannot be read; their rows say why")
    if call.options.json or out is not None:
        console.result(result, f"predict: {count} images, written to {out}")
    raise typer.Exit(InputError.exit_code if bad else 0)


@flags.command(app, "A model", flags.of_publication(), (*flags.TALKING, "trust_code"))
def export(
    call: Call,
    *,
    allow_not_private: Annotated[bool, option("Export the model even if it is NOT PRIVATE; the stamp stays.", PRIVACY,
                                              "--allow-not-private")] = False,
    format: Annotated[str, option("safetensors: the model's files, and an example that loads them with dprandp. "
                                  "torch-export, onnx: one graph from pixels to probabilities, which runs without "
                                  "dprandp.", OUTPUT, metavar="safetensors|torch-export|onnx")] = "safetensors",
    out: Annotated[Path, option("A new folder or FILE.zip (safetensors), FILE.pt2 (torch-export), FILE.onnx (onnx).",
                                OUTPUT, metavar="DIR|FILE")],
) -> None:  # fmt: skip
    """Write a run's model for others, verified: as its files, or as one graph for torch or ONNX alone.

    [dim]dprandp export --out scans-classifier[/dim]
    [dim]dprandp export --license cc-by-4.0 --contact "a@b.org" --format onnx --out scans.onnx[/dim]
    """
    console = session.console(call.options)
    from dprandp import release

    said = {name: text for name, text in call.given["publication"].items() if text is not None}
    about = checked("export", Publication, said)
    model = session.released_model(call.options.run, None)
    result = release.export(model, out, format=format, about=about, allow_not_private=allow_not_private)
    console.result(result, release.export_line(result))
