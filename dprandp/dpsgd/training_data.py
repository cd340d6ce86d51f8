"""The identity of a run's data: their content, not their name.

    private/training-data.json   hashes of the training split; from the run's first private stage on, or from the first
                                 stage that declares a part of it public
    private/data-check.txt       problems found before the first charge, with the names of files
    private/public-data.json     hashes of the images of whole sets that the run has used as public ones

A hash of private data lets anyone confirm a guess at them, so it is stored only in ``private/``. Only equal data are
recognised: a set with one changed image is another set.
"""

from __future__ import annotations

from dprandp.config.schema import FRACTION, SYNTHETIC, ContinueConfig, same_data_name
from dprandp.data import Dataset, UnusableData, listed
from dprandp.errors import BudgetError, CheckpointError, InputError, UsageError
from dprandp.runs.console import Console
from dprandp.runs.directory import DATA, IGNORED, RunDir, read_hashes
from dprandp.runs.files import atomic_write, to_json
from dprandp.runs.ledger import ledger_file

KEPT, PUBLIC = "training-data.json", "public-data.json"


def fingerprint_of(dataset: Dataset) -> str:
    """Hash of private images, labels and units, in order; reads them."""
    return dataset.fingerprint()


CHECK = "data-check.txt"


def examine(rundir: RunDir, dataset: Dataset, console: Console) -> None:
    """Find everything that is wrong with a run's data, before the run charges anything.

    The terminal gets kinds and counts. ``private/data-check.txt`` gets the names. What is refused depends on the data,
    so this is never done once something about them may have been released.

    Raises:
        UnusableData: with all problems. InputError: the only one, of data that are no files.
    """
    if ledger_file(rundir).exists():
        return
    path = rundir.private_dir / CHECK
    try:
        found = dataset.examine()
    except UnusableData as error:
        atomic_write(path, listed(error.problems) + "\n")
        raise UnusableData(error.name, error.problems, str(path)) from error
    text = found.listed()
    before = path.read_text("utf-8") if path.exists() else ""
    if text == before:
        return  # told already
    atomic_write(path, text)
    if found.looks_grey:
        console.say("note: all training images are grey, and are read as RGB: with --colour grey the extractor is one "
                    "for grey images")  # fmt: skip
    for said, _ in found.notes():
        console.warn(f"{said}: the test split is not protected, and such results are too good; {path} (private)")


def keep(rundir: RunDir, dataset: Dataset, fingerprint: str) -> None:
    """Record the hashes of the run's data: of everything in order; in any order, of the images and of their files."""
    hashes = {"train": fingerprint, "images": dataset.image_fingerprint(), "files": dataset.file_fingerprint()}
    hashes = {name: value for name, value in hashes.items() if value is not None}
    atomic_write(rundir.private_dir / KEPT, to_json(hashes, indent=1) + "\n")


def hashes_of(rundir: RunDir) -> dict[str, str] | None:
    """The recorded hashes of the run's data, ``train``, ``images`` perhaps ``files``; None without the first two."""
    path = rundir.path / "private" / KEPT
    found = read_hashes(path) if path.exists() else {}
    return found if {"train", "images"} <= found.keys() else None


def refuse_other(rundir: RunDir, name: str, fingerprint: str) -> None:
    """Raise InputError unless the given data have the hash of the run's data, which the run calls ``name``.

    Raises:
        CheckpointError: the record is lost or damaged.
    """
    path = rundir.path / "private" / KEPT
    if not path.exists():
        raise CheckpointError(
            f"{path} is missing, so it is unknown whether these are the data of this run",
            fix="restore the run's private folder from a copy, or start a new run",
        )
    if read_hashes(path).get("train") != fingerprint:
        raise InputError(
            f"the training data are not those that this run began with ({name}): their content, order, labels or units "
            "differ",
            fix="give the same data with --data, from any path, and the same rules for their image files, or start a "
            "new --run for these",
        )


def use_as_public(rundir: RunDir, dataset: Dataset) -> None:
    """Refuse a whole set as public where its images are the run's private ones; else record that it was public.

    Raises:
        UsageError: they are the run's training images, under any name, order and labels.
    """
    images = dataset.image_fingerprint()
    private = rundir.path / "private" / KEPT
    if private.exists() and read_hashes(private).get("images") == images:
        raise UsageError(
            f"{dataset.spec.name} holds the private images that this run is about, and was given as public",
            fix="give other public data, or --public fraction:0.1 to declare a part of them public",
        )
    known = _public_sets(rundir)
    if images not in known.values():
        path = rundir.private_dir / PUBLIC
        atomic_write(path, to_json(known | {str(len(known)): images}, indent=1) + "\n")


def refuse_public(rundir: RunDir, dataset: Dataset) -> None:
    """Raise BudgetError if the run has used these private images as public ones: that cost was never counted."""
    known = _public_sets(rundir)
    if known and dataset.image_fingerprint() in known.values():
        raise BudgetError(
            f"this run has used the images of {dataset.spec.name} as public data, so it cannot count what it tells "
            "about them",
            fix="start a new --run for these data, with other public data or none",
        )


def _public_sets(rundir: RunDir) -> dict[str, str]:
    path = rundir.path / "private" / PUBLIC
    return read_hashes(path) if path.exists() else {}


def not_compared(config: ContinueConfig, rundir: RunDir) -> tuple[str, ...]:
    """Settings of ``continue`` of which another spelling is no change: their data are compared by content instead.

    Private data that only shape the images are not read, so their path is compared.
    """
    before = rundir.row("continue").config or {}
    part = config.public.startswith(FRACTION)
    sets = (config.public, before.get("public", SYNTHETIC))
    known = []
    if not any(what == SYNTHETIC or what.startswith(FRACTION) for what in sets):
        known.append("public")
    if config.mix != "public" or part or same_data_name(before.get(DATA, ""), config.data):
        known.append(DATA)
    return (*IGNORED, *known)
