"""The commands status and datasets."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from dprandp.config.schema import PRETRAINED, WITHOUT_PHASE_ONE, ProbeConfig, data_options
from dprandp.data import (
    DataCheck,
    DatasetRow,
    Reading,
    UnusableData,
    check_data,
    list_datasets,
    listed,
    open_dataset,
)
from dprandp.dpsgd.budget import BudgetUse, read_budget
from dprandp.errors import UsageError
from dprandp.privacy.accounting import rounded_up
from dprandp.runs.console import Console
from dprandp.runs.directory import OPTIONAL_STAGES, PRIVATE_STAGES, RunDir, StageRow
from dprandp.runs.files import atomic_path

SHOWN_CLASSES = 20
"""Most empty classes that the text names; JSON has all of them."""


@dataclass(frozen=True)
class Status:
    """Stage table and budget of a run."""

    run: str  # path
    stages: list[StageRow]  # without those that a run need not have
    budget: BudgetUse | None  # None before the first private stage


def status(rundir: RunDir) -> Status:
    """What ``dprandp status`` shows."""
    table = {row.stage: row for row in rundir.status()}
    needless = {*OPTIONAL_STAGES}
    if (table["probe"].result or {}).get("share") == 1:  # nothing is left for a fine-tune
        needless.add("finetune")
    if (table["finetune"].config or {}).get("source") in (PRETRAINED, *WITHOUT_PHASE_ONE):
        needless.add("probe")
    rows = [row for row in table.values() if row.state != "missing" or row.stage not in needless]
    return Status(str(rundir.path), rows, read_budget(rundir))


def status_lines(table: Status) -> str:
    """``status`` for people."""
    lines = [f"run {table.run}"]
    for row in table.stages:
        accuracy = (row.result or {}).get("accuracy") if row.stage in PRIVATE_STAGES else None
        extra = f"  test accuracy {100 * accuracy:.2f} %" if accuracy is not None else ""
        why = f"  ({'; '.join(row.reasons)})" if row.reasons else ""
        lines.append(f"  {row.stage:<9} {row.state:<8}{extra}{why}")
    if (budget := table.budget) is not None:
        said = f"ε = {budget.epsilon:g} at δ = {budget.delta:g}, spent {rounded_up(budget.spent)}"
        lines.append(f"  budget    {said}" + ("" if budget.private else "  NOT PRIVATE"))
    return "\n".join(lines)


def datasets(data_dir: Path, name: str | None = None, *, download: bool = False) -> list[DatasetRow]:
    """The known data sets, or the one of this name; ``download`` fetches its files if they are missing.

    Raises:
        UsageError: no such known set, or a download of all. InputError: the download failed.
    """
    if download and name is None:
        raise UsageError("--download needs the name of one data set", fix="add --data NAME, such as --data cifar10")
    if name is not None:
        dataset = open_dataset(name, data_dir, download=download)
        if name.partition(":")[1]:
            raise UsageError(f"{name} is your own data, not a known set", fix="leave --data out to see the known sets")
        if download:
            dataset.require()
    return [row for row in list_datasets(data_dir) if name in (None, row.name)]


def dataset_lines(rows: list[DatasetRow]) -> str:
    """``datasets`` for people."""
    lines = [f"{'name':<16} {'N':>7} {'classes':>7}  {'size':<10} here"]
    lines += [
        f"{row.name:<16} {row.train_examples:>7} {row.classes:>7}  {row.size:<10} "
        + ("yes" if row.available else f"no: {row.how_to_get}")
        for row in rows
    ]
    lines.append(
        "also: npz:PATH (x_train, y_train, x_test, y_test), folder:PATH (train/CLASS/*, test/CLASS/*) and csv:PATH "
        "(path, label, split, group)"
    )
    return "\n".join(lines)


def check_dataset(config: ProbeConfig, data_dir: Path, console: Console, names: Path | None) -> DataCheck:
    """Duplicates, units, empty classes of a probe's data set. Private, and ``private_output`` says so.

    Args:
        names: a file for the names of what is wrong or occurs in both splits; None for none.

    Raises:
        UnusableData: with everything that is wrong. InputError: the only problem, of data that are no files.
    """
    dataset = open_dataset(config.data, data_dir, strict=False, **data_options(config))
    dataset.read_with(lambda: Reading(workers=len(os.sched_getaffinity(0)), progress=console.progress))
    try:
        examined = dataset.examine()
    except UnusableData as error:
        if names is not None:
            _write_private(names, listed(error.problems) + "\n")
        raise UnusableData(error.name, error.problems, str(names) if names else "--names FILE") from error
    if names is not None:
        _write_private(names, examined.listed())
    return check_data(dataset, examined)


def _write_private(path: Path, text: str) -> None:
    """Write a file that its owner alone may read."""
    with atomic_path(path) as temporary, open(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w",
                                              encoding="utf-8") as file:  # fmt: skip
        file.write(text)


def check_lines(found: DataCheck) -> str:
    """``check_dataset`` for people."""
    lines = [
        f"{found.data}: {found.train_examples} training images, {found.train_units} units of privacy, each "
        f"{found.unit}; PRIVATE from here on",
        f"  images of the largest unit                          {found.largest_unit}",
        f"  images that repeat an earlier one exactly           {found.repeated_images}",
        f"  images with a copy in another unit                  {found.across_units}",
        f"  units that hold the same image, at most             {found.largest_copies}",
        f"  distinct images with contradicting labels           {found.contradicting_labels}",
        f"  training images with a copy in the test split       {found.in_test}",
    ]
    if found.units_in_test is not None:
        lines.append(f"  units with images in both splits                    {found.units_in_test}")
        if found.units_in_test:
            lines.append("A run refuses these units: put all images of a unit into one split, or give "
                         "--allow-shared-units to it.")  # fmt: skip
    if found.units_alike:
        lines.append(f"  units named as another one, but for case or the like {found.units_alike}")
        lines.append("If these are the same, their images are protected as a group: write their names in one way.")
    empty = found.empty_classes
    lines.append(f"  declared classes without a training image           {len(empty)}")
    if empty:
        shown = ", ".join(empty[:SHOWN_CLASSES]) + (", …" if len(empty) > SHOWN_CLASSES else "")
        lines.append(f"No training image has the label {shown}: a run continues, and never learns these classes.")
    if found.across_units:
        lines.append(
            f"An image in {found.largest_copies} units is protected as a group of that size (dprandp account "
            f"--group-size {found.largest_copies}). Remove the copies, or give them one unit (--unit-column)."
        )
    if found.in_test or found.units_in_test:
        lines.append("The test split is not protected: its metrics are published without noise. Keep the splits apart.")
    return "\n".join(lines)
