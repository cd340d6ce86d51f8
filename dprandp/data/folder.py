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
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dprandp.config.decoding import REFUSE, Decoding
from dprandp.data.base import SPLITS, Dataset, check_class_names, users_spec
from dprandp.data.decode import EXTENSIONS, is_litter, read_images
from dprandp.data.units import DEFAULT_COLUMN, EACH_IMAGE, UNITS_FILE, Units, check_column_name, units_of_files
from dprandp.errors import InputError

SIDE = 32
"""Pixels that the sides of each image's centre square are resized to."""


@dataclass(frozen=True)
class Listing:
    """Files of one split with their classes, sorted by class name, then file name (code points, on every system)."""

    paths: tuple[Path, ...]
    labels: tuple[int, ...]


def open_folder(root: Path, unit_column: str | None, rules: Decoding = REFUSE) -> Dataset:
    """A data set from a folder of images; only the listing and the table of units are read.

    Args:
        root: the folder, in one of the two layouts above.
        unit_column: the column of ``units.csv`` whose equal values make images one unit of privacy. None: ``unit``
            where there is a ``units.csv``.
        rules: for ambiguous image files.

    Raises:
        InputError: the layout is not one of the two, a file is empty, no image by its name, or a link out of ``root``.
    """
    if not root.is_dir():
        raise InputError(f"there is no folder {root}", fix="give the folder that holds train/ and test/")
    try:
        classes, listings = _read_listings(root)
    except OSError as error:
        raise InputError(
            f"the folder {root} cannot be listed",
            fix="check its permissions",
            private_detail=f"{type(error).__name__}: {error}",
        ) from error
    for split in SPLITS:
        if not listings[split].paths:
            raise InputError(f"the {split} split of {root} holds no image", fix="give both splits at least one image")
    units = _units(root, listings, unit_column)
    examples = len(listings["train"].paths), len(listings["test"].paths)
    spec = users_spec("folder", root, root.resolve().name, classes, examples, (SIDE, SIDE, 3), units)
    spec = dataclasses.replace(spec, decoding=rules)

    def read(split: str) -> tuple[np.ndarray, np.ndarray]:
        listing = listings[split]
        images = read_images(listing.paths, SIDE, f"the {split} images of {spec.name}", rules)
        return images, np.array(listing.labels, np.int64)

    return Dataset(spec, read, units=units)


def _units(root: Path, listings: dict[str, Listing], column: str | None) -> Units | None:
    path = root / UNITS_FILE
    if column == EACH_IMAGE or (column is None and not path.exists()):
        return None
    names = {split: [file.relative_to(root).as_posix() for file in listings[split].paths] for split in SPLITS}
    return units_of_files(path, check_column_name(column or DEFAULT_COLUMN), names["train"], names["test"])


def _read_listings(root: Path) -> tuple[tuple[str, ...], dict[str, Listing]]:
    has_folders = (root / "train").is_dir() and (root / "test").is_dir()
    has_list = (root / "test.txt").is_file()
    if has_folders == has_list:
        raise InputError(
            f"{root} holds {'both train/ + test/ and' if has_list else 'neither train/ + test/ nor'} test.txt",
            fix="use PATH/train/CLASS/* and PATH/test/CLASS/*, or PATH/CLASS/* and a list of test files, PATH/test.txt",
        )
    for entry in _entries(root):
        _refuse_outside(root, entry)
    if has_list:
        classes = class_folders(root, root, ignore=("test.txt", UNITS_FILE))
        return classes, _split_by_list(root, list_images(root, root, classes))
    classes = class_folders(root, root / "train")
    strange = set(class_folders(root, root / "test")) - set(classes)
    if strange:
        raise InputError(
            f"{root}/test has {len(strange)} class folders that train/ has not",
            fix="give test/ the same sub-folders as train/",
            private_detail=f"only in test/: {sorted(strange)}",
        )
    return classes, {split: list_images(root, root / split, classes) for split in SPLITS}


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


def class_folders(root: Path, folder: Path, ignore: tuple[str, ...] = ()) -> tuple[str, ...]:
    """Names of the class sub-folders of ``folder``, sorted by code point.

    Raises:
        InputError: a file lies beside them, a sub-folder is a link out of ``root``, or the names cannot be classes.
    """
    names = []
    for entry in _entries(folder):
        if entry.name in ignore:
            continue
        _refuse_outside(root, entry)
        if not entry.is_dir():
            raise InputError(
                f"{folder} holds files beside its class folders",
                fix="put each image into the sub-folder of its class",
                private_detail=entry.path,
            )
        names.append(entry.name)
    return check_class_names(tuple(names), str(folder))


def list_images(root: Path, folder: Path, classes: tuple[str, ...]) -> Listing:
    """Every image file under ``folder``/CLASS for the given classes (a class may be absent here).

    Raises:
        InputError: something there is no regular file, has no image extension, is empty, or links out of ``root``.
    """
    paths: list[Path] = []
    labels: list[int] = []
    for label, name in enumerate(classes):
        for entry in _entries(folder / name) if (folder / name).is_dir() else ():
            _refuse_outside(root, entry)
            problem = None
            if not entry.is_file():
                problem = "something that is no file (a folder inside a class folder?)"
            elif not entry.name.lower().endswith(EXTENSIONS):
                problem = f"a file that is no image by its name (images: {' '.join(EXTENSIONS)})"
            elif entry.stat().st_size == 0:
                problem = "an image file of 0 bytes"
            if problem:
                raise InputError(
                    f"{folder} holds {problem}",
                    fix="remove or mend it; --debug names it (keep that output private)",
                    private_detail=entry.path,
                )
            paths.append(Path(entry.path))
            labels.append(label)
    return Listing(tuple(paths), tuple(labels))


def _entries(folder: Path) -> list[os.DirEntry]:
    """What lies in a folder, without litter, sorted by code point."""
    with os.scandir(folder) as entries:
        kept = [entry for entry in entries if not is_litter(entry.name)]
    return sorted(kept, key=lambda entry: entry.name)


def _refuse_outside(root: Path, entry: os.DirEntry) -> None:
    """A link may point elsewhere inside ``root``; one that leaves it could read any file of this machine."""
    if entry.is_symlink():
        try:
            target = Path(entry.path).resolve(strict=True)
        except (OSError, RuntimeError):  # it leads nowhere, or in a circle
            target = None
        if target is None or not target.is_relative_to(root.resolve()):
            raise InputError(
                f"{root} holds a symbolic link that leaves the folder or leads nowhere",
                fix="copy the file into the folder instead of linking to it",
                private_detail=entry.path,
            )
