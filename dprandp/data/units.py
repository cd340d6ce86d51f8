"""Units of privacy that hold several images: which images belong to the same patient, say.

A column gives each training image an integer or a text; images with equal values are one unit. The *number* of units is
treated as public, like the number of images; which image belongs to which unit is private. Values that look like a
missing entry are refused: an image of an unknown patient may be of one who has other images in the set.
"""

from __future__ import annotations

import csv
import re
import shlex
import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dprandp.errors import InputError, UsageError
from dprandp.runs.results import ONE_IMAGE

#: The value of ``--unit-column`` that makes every image a unit of its own, also where the data declare groups.
EACH_IMAGE = "image"
#: What is used where ``--unit-column`` was not given: the array of an ``npz:`` file, the column of ``units.csv``.
DEFAULT_ARRAY, DEFAULT_COLUMN = "groups_train", "unit"
DEFAULT_GROUP = "group"  # of a table
BY_FOLDER = "folder"  # a folder: data set whose classes have a sub-folder for each unit
UNITS_FILE = "units.csv"

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9 _.-]{0,63}")
_MISSING = ("", "nan", "none", "null", "na", "n/a", "<na>", "nat")


@dataclass(frozen=True)
class Units:
    """Which unit each training image belongs to.

    Attributes:
        column: the name of the array or column that says so.
        of_image: int64 [N], values in 0 … count-1, in the order of the images. Private.
        count: the number of units; treated as public.
        shared_with_test: units that also have images in the test split; None where that is not declared. Private.
        of_test_image: int64 [N] in the test split, numbers of its own; None where that is not declared.
        alike: names that are those of another unit but for case, width, spaces and invisible characters. Private.
    """

    column: str
    of_image: np.ndarray
    count: int
    shared_with_test: int | None = None
    of_test_image: np.ndarray | None = None
    alike: int = 0


def unit_text(column: str | None) -> str:
    """The unit of privacy in words: ``one image``, or ``one patient (column patient_train)``."""
    if column is None:
        return ONE_IMAGE
    noun = column.removesuffix("_train")
    return f"one {'group' if noun == 'groups' else noun} (column {column})"


def check_column_name(name: str) -> str:
    """The name as it is; it will stand in reports and file headers.

    Raises:
        UsageError: it is empty, long, or holds anything but letters, digits, space, ``_ . -``.
    """
    if not _NAME.fullmatch(name):
        raise UsageError(
            f"the unit column {name!r} is no plain name",
            fix="name an array or column of at most 64 letters, digits, spaces and _ . -",
        )
    return name


def make_units(column: str, train: np.ndarray, test: np.ndarray | None, origin: str) -> Units:
    """Number the units.

    Args:
        column: its name. origin: what holds it.
        train: integers or text, [N] or [N, 1]: one value per training image. test: of the test images, if declared.

    Raises:
        InputError: a value is negative or looks like a missing one. The message holds no value.
    """
    values = _clean(train, f"{origin}: {column}")
    names, of_image = np.unique(values, return_inverse=True)
    of_image = of_image.astype(np.int64).reshape(-1)
    alike = len(names) - len({_plain(str(name)) for name in names})
    if test is None:
        return Units(column, of_image, len(names), alike=alike)
    tested, of_test = np.unique(_clean(test, f"{origin}: {column} of the test split"), return_inverse=True)
    shared = int(np.isin(names, tested).sum())
    return Units(column, of_image, len(names), shared, of_test.astype(np.int64).reshape(-1), alike)


def _read_units_file(path: Path, column: str) -> dict[str, str]:
    """File -> unit from a ``units.csv`` with a header line, a column ``file`` and the column asked for."""
    try:
        text = path.read_text("utf-8-sig")
    except FileNotFoundError as error:
        raise InputError(
            f"there is no {path} that says which unit an image belongs to",
            fix=f"write one with the header file,{column} and one line per image, such as train/CLASS/FILE,17",
        ) from error
    except (OSError, UnicodeDecodeError) as error:
        fix = "save it as UTF-8 and check its permissions"
        raise InputError(f"{path} cannot be read as UTF-8 text", fix=fix) from error
    try:
        header, *lines = [[cell.strip() for cell in row] for row in csv.reader(text.splitlines()) if row] or [[]]
    except csv.Error as error:
        raise InputError(f"{path} is no table of comma-separated values", fix="save it again as CSV") from error
    missing = [name for name in ("file", column) if header.count(name) != 1]
    if missing:
        others = [name for name in header if name != "file" and header.count(name) == 1]
        there = f"--unit-column {shlex.quote(others[0])}, or " if missing == [column] and others else ""
        raise InputError(
            f"{path} has no single column {missing[0]!r}; its columns are {', '.join(header)}",
            fix=f"give {there}the file the header file,{column}",
        )
    if any(len(row) != len(header) for row in lines):
        raise InputError(f"{path} has lines of other lengths than its header", fix="save it again as CSV")
    units = {row[header.index("file")]: row[header.index(column)] for row in lines}
    if len(units) != len(lines):
        raise InputError(f"{path} names a file more than once", fix="give each file one line, hence one unit")
    return units


def units_of_files(path: Path, column: str, train: Iterable[str], test: Iterable[str]) -> Units:
    """The units of a folder's images, from a column of its ``units.csv``.

    Args:
        train, test: the images' names relative to the folder, with forward slashes, in order.

    Raises:
        InputError: no such file, no UTF-8 table, a column missing, a file named twice, a training image without a line
            or a line without an image; as ``make_units``.
    """
    units, train, test = _read_units_file(path, column), list(train), list(test)
    unknown = set(units) - {*train, *test}
    if unknown:
        raise InputError(
            f"{path} has lines for files that do not exist",
            fix="write each file as CLASS/FILE or train/CLASS/FILE, relative to the folder",
            private_detail=f"{len(unknown)} files, for example {min(unknown)!r}",
        )
    absent = [name for name in train if name not in units]
    if absent:
        raise InputError(
            f"{path} has no line for some of the training images",
            fix="give every training image a line: an image of no unit cannot be protected",
            private_detail=f"{len(absent)} files, for example {min(absent)!r}",
        )
    tested = np.array([units[name] for name in test]) if test and all(name in units for name in test) else None
    return make_units(column, np.array([units[name] for name in train]), tested, str(path))


def _plain(name: str) -> str:
    """A name without what people do not see or mean: ``1.0`` is ``1``, and so is a wide 1."""
    seen = (each for each in unicodedata.normalize("NFKC", name) if not each.isspace())
    plain = "".join(each for each in seen if unicodedata.category(each) != "Cf").casefold()
    return re.sub(r"^0+(?=\d)|(?<=\d)\.0+$", "", plain)


def _clean(values: np.ndarray, origin: str) -> np.ndarray:
    """[N] integers as they are, or text in Unicode's composed form (NFC) without surrounding space."""
    values = values.reshape(-1)
    if values.dtype.kind in "iu":
        absent = values < 0
    else:
        if values.dtype.kind == "S":
            values = np.char.decode(values, "utf-8", "backslashreplace")
        # one name in two spellings of Unicode (files from macOS have the other one) is one unit
        values = np.array([unicodedata.normalize("NFC", value).strip() for value in values.tolist()])
        absent = np.isin(np.char.lower(values), _MISSING)
    if absent.any():
        raise InputError(
            f"{origin} has missing values (negative numbers, empty text, nan and the like)",
            fix="give each image its unit; an image of unknown origin cannot be protected together with its others",
            private_detail=f"{int(absent.sum())} values, the first at position {int(absent.argmax())}",
        )
    return values
