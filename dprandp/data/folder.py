"""``folder:PATH``: one sub-folder per class.

Two layouts::

    PATH/train/CLASS/*.png   PATH/test/CLASS/*.png        two folders
    PATH/CLASS/*.png         PATH/test.txt                a declared split: test.txt lists the test files as CLASS/NAME

``PATH/units.csv`` may say which images form one unit of privacy: a header ``file,unit`` and a line per image, with the
file as in ``train/CLASS/NAME`` or ``CLASS/NAME``.

The class list is the list of sub-folder names, and so is public; the number of files is the public N.
File names, and which file has which content, are private. Litter (``decode.py``) is ignored at every level.
"""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

import numpy as np

from dprandp.config.declared import REFUSE, Decoding, Layout
from dprandp.config.presets import INPUT_SIZE
from dprandp.data.base import SPLITS, Dataset, check_class_names, users_spec
from dprandp.data.decode import EXTENSIONS, is_litter
from dprandp.data.files import ImageFiles, Listing, Problem, UnusableData
from dprandp.data.units import (
    BY_FOLDER,
    DEFAULT_COLUMN,
    EACH_IMAGE,
    UNITS_FILE,
    Units,
    check_column_name,
    make_units,
    units_of_files,
)
from dprandp.errors import InputError

VALIDATION = ("val", "valid", "validation", "dev")
"""Names of a third split, which has to be declared as one of the two."""


def open_folder(
    root: Path,
    unit_column: str | None,
    rules: Decoding = REFUSE,
    val: str | None = None,
    *,
    strict: bool = True,
) -> Dataset:
    """A data set from a folder of images; only the listing and the table of units are read.

    Args:
        root: the folder, in one of the two layouts above.
        unit_column: the column of ``units.csv`` whose equal values make images one unit of privacy. None: ``unit``
            where there is a ``units.csv``. ``folder``: each class folder has sub-folders, and images in sub-folders
            of one name are a unit.
        val: "train" or "test": where the images of a folder ``val/`` go; None where there is none.
        rules: for ambiguous image files.
        strict: refuse files that cannot be used now; else when the data are read, together with those that cannot be
            decoded.

    Raises:
        InputError: the layout is not one of the two, a file is empty, no image by its name, or a link out of ``root``.
    """
    if not root.is_dir():
        raise InputError(f"there is no folder {root}", fix="give the folder that holds train/ and test/")
    problems: list[Problem] = []
    try:
        classes, listings = _read_listings(root, problems, unit_column == BY_FOLDER, val)
    except OSError as error:
        raise InputError(
            f"the folder {root} cannot be listed",
            fix="check its permissions",
            private_detail=f"{type(error).__name__}: {error}",
        ) from error
    name = f"folder:{root}"
    for split in SPLITS:
        if not listings[split].paths:
            if problems:
                raise UnusableData(name, problems)
            raise InputError(f"the {split} split of {root} holds no image", fix="give both splits at least one image")
    units = None
    try:
        units = _units(root, listings, unit_column)
    except InputError as error:
        if not problems and strict:
            raise
        problems.append(Problem.of(error))
    if problems and strict:
        raise UnusableData(name, problems)
    examples = len(listings["train"].paths), len(listings["test"].paths)
    shape = INPUT_SIZE, INPUT_SIZE, rules.channels
    spec = users_spec("folder", root, root.resolve().name, classes, examples, shape, units)
    spec = dataclasses.replace(spec, decoding=rules, split_rule=Layout(val=val).split_rule)
    files = ImageFiles(name, listings, rules)
    return Dataset(spec, files.read, units=units, files=files, problems=problems)


def _units(root: Path, listings: dict[str, Listing], column: str | None) -> Units | None:
    path = root / UNITS_FILE
    if column == EACH_IMAGE or (column is None and not path.exists()):
        return None
    if column == BY_FOLDER:
        folders = {split: np.array([file.parent.name for file in listings[split].paths]) for split in SPLITS}
        return make_units(BY_FOLDER, folders["train"], folders["test"], str(root))
    names = {split: [file.relative_to(root).as_posix() for file in listings[split].paths] for split in SPLITS}
    return units_of_files(path, check_column_name(column or DEFAULT_COLUMN), names["train"], names["test"])


def _read_listings(
    root: Path, problems: list[Problem], nested: bool, val: str | None
) -> tuple[tuple[str, ...], dict[str, Listing]]:
    has_folders = (root / "train").is_dir() and (root / "test").is_dir()
    has_list = (root / "test.txt").is_file()
    if has_folders == has_list:
        raise InputError(
            f"{root} holds {'both train/ + test/ and' if has_list else 'neither train/ + test/ nor'} test.txt",
            fix="use PATH/train/CLASS/* and PATH/test/CLASS/*, or PATH/CLASS/* and a list of test files, PATH/test.txt",
        )
    for entry in _entries(root):
        refuse_outside(root, entry)
    if has_list and val is None:
        classes = class_folders(root, root, problems, ignore=("test.txt", UNITS_FILE))
        return classes, _split_by_list(root, list_images(root, root, classes, problems, nested))
    if has_list:
        raise InputError(f"--val {val} was given, but {root} has no folder val/", fix="leave --val out")
    classes = class_folders(root, root / "train", problems)
    splits = ["train", "test", *(entry.name for entry in _entries(root) if entry.name.lower() in VALIDATION)]
    if len(splits) > 2 and val is None:
        raise InputError(
            f"{root} has a third split, {splits[2]}/, and a run has only two",
            fix="say where its images go with --val train or --val test, or move it out of the folder",
        )
    if len(splits) == 2 and val is not None:
        raise InputError(f"--val {val} was given, but {root} has no folder val/", fix="leave --val out")
    strange = {name for split in splits[1:] for name in class_folders(root, root / split, problems)} - set(classes)
    if strange:
        raise InputError(
            f"{root}/{' and '.join(splits[1:])} has {len(strange)} class folders that train/ has not",
            fix="give test/ the same sub-folders as train/",
            private_detail=f"only in test/: {sorted(strange)}",
        )
    listings: dict[str, Listing] = {}
    for split in splits:
        found, goes_to = list_images(root, root / split, classes, problems, nested), split if split in SPLITS else val
        before = listings.get(goes_to, Listing((), ()))
        listings[goes_to] = Listing(before.paths + found.paths, before.labels + found.labels)
    return classes, listings


def _split_by_list(root: Path, everything: Listing) -> dict[str, Listing]:
    try:
        lines = (root / "test.txt").read_text("utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise InputError(f"{root}/test.txt is not UTF-8 text", fix="save it as UTF-8") from error
    wanted = {line.strip() for line in lines if line.strip()}
    names = [path.relative_to(root).as_posix() for path in everything.paths]
    unknown = wanted - set(names)
    if unknown:
        raise InputError(
            f"{root}/test.txt lists {len(unknown)} files that do not exist",
            fix="write one CLASS/FILE per line, relative to the folder",
            private_detail=f"for example {min(unknown)!r}",
        )
    parts: dict[str, Listing] = {}
    for split in SPLITS:
        chosen = [i for i, name in enumerate(names) if (name in wanted) == (split == "test")]
        parts[split] = Listing(tuple(everything.paths[i] for i in chosen), tuple(everything.labels[i] for i in chosen))
    return parts


def class_folders(
    root: Path, folder: Path, problems: list[Problem], ignore: tuple[str, ...] = ()
) -> tuple[str, ...]:
    """Names of the class sub-folders of ``folder``, sorted by code point.

    A file beside them is a problem.

    Raises:
        InputError: a sub-folder is a link out of ``root``, or the names cannot be classes.
    """
    names = []
    for entry in _entries(folder):
        if entry.name in ignore:
            continue
        refuse_outside(root, entry)
        if entry.is_dir():
            names.append(entry.name)
        else:
            fix = "put each image into the sub-folder of its class"
            problems.append(Problem("files", f"beside the class folders of {folder}", fix, entry.path))
    return check_class_names(tuple(names), str(folder))


def list_images(
    root: Path, folder: Path, classes: tuple[str, ...], problems: list[Problem], nested: bool = False
) -> Listing:
    """Every image file under ``folder``/CLASS for the given classes (a class may be absent here).

    With ``nested`` they lie in sub-folders of the class folders, one for each unit of privacy.

    Something that is no regular file, has no image extension, is empty, or links out of ``root`` is a problem.
    """
    paths: list[Path] = []
    labels: list[int] = []
    for label, name in enumerate(classes):
        place = folder / name
        entries = _entries(place) if place.is_dir() else []
        if nested:
            loose = [entry for entry in entries if leads_out(root, entry) or not entry.is_dir()]
            fix = "put it into the sub-folder of its unit, such as its patient"
            problems += [Problem(f"entries of {folder}", "in no sub-folder", fix, entry.path) for entry in loose]
            entries = [inner for entry in entries if entry not in loose for inner in _entries(Path(entry.path))]
        for entry in entries:
            kind, fix = None, "remove it"
            if leads_out(root, entry):
                kind, fix = LEADS_OUT
            elif not entry.is_file():
                kind = "no file (a folder inside a class folder? --unit-column folder takes it for one patient, say)"
            elif not entry.name.lower().endswith(EXTENSIONS):
                kind = f"no image by its name (images: {' '.join(EXTENSIONS)})"
            elif entry.stat().st_size == 0:
                kind, fix = "an image file of 0 bytes", "replace or remove it"
            if kind:
                problems.append(Problem(f"entries of {folder}", kind, fix, entry.path))
                continue
            paths.append(Path(entry.path))
            labels.append(label)
    return Listing(tuple(paths), tuple(labels))


def _entries(folder: Path) -> list[os.DirEntry]:
    """What lies in a folder, without litter, sorted by code point."""
    with os.scandir(folder) as entries:
        kept = [entry for entry in entries if not is_litter(entry.name)]
    return sorted(kept, key=lambda entry: entry.name)


LEADS_OUT = ("a symbolic link that leaves the folder or leads nowhere", "copy the file instead of linking to it")


def leads_out(root: Path, entry: os.DirEntry) -> bool:
    """A link may point elsewhere inside ``root``; one that leaves it could read any file of this machine."""
    if not entry.is_symlink():
        return False
    try:
        target = Path(entry.path).resolve(strict=True)
    except (OSError, RuntimeError):  # it leads nowhere, or in a circle
        return True
    return not target.is_relative_to(root.resolve())


def refuse_outside(root: Path, entry: os.DirEntry) -> None:
    """Raise InputError for a folder or a list that is such a link."""
    if leads_out(root, entry):
        raise InputError(f"{root} holds {LEADS_OUT[0]}", fix=LEADS_OUT[1], private_detail=entry.path)
