"""``csv:PATH``: image files listed in a table, with their labels, splits and units; CSV, or Parquet.

    path,label,split,group
    scans/17-1.png,ill,train,17

With a declared separator, a cell of the column label holds several labels, or none. Paths are relative to the table.
The classes are declared, since which labels occur is private. Everything in the table is private but for the numbers of
its lines and groups.
"""

from __future__ import annotations

import csv
import dataclasses
import hashlib
import unicodedata
from collections import Counter
from pathlib import Path

import numpy as np

from dprandp.config.declared import AS_LISTED, REFUSE, Decoding, Layout
from dprandp.config.presets import INPUT_SIZE
from dprandp.data.base import SPLITS, Dataset, check_class_names, users_spec
from dprandp.data.decode import EXTENSIONS
from dprandp.data.files import ImageFiles, Listing, Problem, UnusableData
from dprandp.data.folder import VALIDATION
from dprandp.data.units import DEFAULT_GROUP, EACH_IMAGE, check_column_name, make_units
from dprandp.errors import InputError, UsageError


def _identity(file: Path) -> tuple[int, int] | Path:
    """Equal for two names of one file; of a file that is not there, its name."""
    try:
        found = file.stat()
    except OSError:
        return file
    return found.st_dev, found.st_ino


def open_table(
    path: Path,
    num_classes: int | None,
    unit_column: str | None,
    rules: Decoding = REFUSE,
    layout: Layout = AS_LISTED,
    *,
    strict: bool = True,
) -> Dataset:
    """A data set from a table of image files; only the table is read, and whether the files are there.

    Args:
        path: the table; Parquet where its name ends in .parquet.
        num_classes: labels are 0 … num_classes-1; None where ``layout`` names the classes.
        unit_column: whose equal values make images one unit of privacy; None: ``group`` where there is such a column.
        rules, strict: as for ``open_folder``.

    Raises:
        InputError: no table, a column is missing, or a line cannot be used. UsageError: no classes are declared.
    """
    classes = _classes(layout, num_classes)
    table, names = _read(path), layout.column_names()
    for part in ("path", "label"):
        _require(path, table, names[part], f"--columns {part}=NAME")
    group = unit_column or (DEFAULT_GROUP if DEFAULT_GROUP in table else EACH_IMAGE)
    if group != EACH_IMAGE:
        _require(path, table, check_column_name(group), "--unit-column NAME")
        table[group] = [unicodedata.normalize("NFC", value) for value in table[group]]  # before a split is drawn
    splits = _splits(path, table, names, None if group == EACH_IMAGE else group, layout)

    separator, problems = layout.label_separator, []
    labels = [
        [cell] if separator is None else [name for part in cell.split(separator) if (name := part.strip())]
        for cell in table[names["label"]]
    ]
    kept: dict[str, list[int]] = {split: [] for split in SPLITS}
    files = [_identity(path.parent / file) for file in table[names["path"]]]
    times = Counter(files)
    for row, (file, own, split) in enumerate(zip(table[names["path"]], labels, splits, strict=True)):
        kind = fix = None
        if split not in SPLITS:
            kind, fix = "a split that is neither train nor test", "correct it; for val, give --val train or --val test"
        elif not set(own) <= set(classes):
            kind, fix = "a label that was not declared", "correct it, or name its class in --class-names"
        elif times[files[row]] > 1:
            kind, fix = "a file that is listed more than once", "give each file one line, hence one split and one unit"
        elif not file.lower().endswith(EXTENSIONS):
            kind, fix = f"no image by its name (images: {' '.join(EXTENSIONS)})", "remove the line"
        elif not (path.parent / file).is_file():
            kind, fix = "a file that is not there", "correct the path, which is relative to the table"
        if kind:
            problems.append(Problem("lines", kind, fix, f"line {row + 2}: {file}"))
        else:
            kept[split].append(row)
    name, root = f"csv:{path}", path.parent
    if empty := [split for split in SPLITS if not kept[split]]:
        if problems:
            raise UnusableData(name, problems)
        fix = "give both splits at least one image, or another --split-seed"
        raise InputError(f"the {empty[0]} split of {path} holds no image", fix=fix)
    units = None
    if group != EACH_IMAGE:
        values = {split: np.array([table[group][row] for row in kept[split]]) for split in SPLITS}
        try:
            units = make_units(group, values["train"], values["test"], str(path))
        except InputError as error:
            problems.append(Problem.of(error))
    if problems and strict:
        raise UnusableData(name, problems)

    def encoded(own: list[str]) -> int | tuple[int, ...]:
        return classes.index(own[0]) if separator is None else tuple(int(name in own) for name in classes)

    listings = {
        split: Listing(
            tuple(root / table[names["path"]][row] for row in rows),
            tuple(encoded(labels[row]) for row in rows),
        )
        for split, rows in kept.items()
    }
    examples = len(kept["train"]), len(kept["test"])
    spec = users_spec("csv", path, path.stem, classes, examples, (INPUT_SIZE, INPUT_SIZE, rules.channels), units)
    spec = dataclasses.replace(
        spec, decoding=rules, split_rule=layout.split_rule, multi_label=separator is not None
    )
    files = ImageFiles(name, listings, rules)
    return Dataset(spec, files.read, units=units, files=files, problems=problems)


def _classes(layout: Layout, count: int | None) -> tuple[str, ...]:
    if (layout.class_names is None) == (count is None):
        raise UsageError(
            "csv: data need their classes declared, once: which labels occur is private, so they are not asked",
            fix="give --class-names healthy,ill or, for labels 0 … C-1, --classes C",
        )
    if count is not None:
        return check_class_names(tuple(map(str, range(count))), "--classes")
    return check_class_names(tuple(name.strip() for name in layout.class_names.split(",")), "--class-names")


def _splits(
    path: Path, table: dict[str, list[str]], names: dict[str, str], group: str | None, layout: Layout
) -> list[str]:
    """The split of every line, as the table or the layout says."""
    if names["split"] in table:
        if layout.split_by is not None:
            raise UsageError(
                f"{path} has a column {names['split']!r}, and --split-by would draw another split",
                fix="leave --split-by out, or name the column otherwise",
            )
        said = [value.lower() for value in table[names["split"]]]
        return [layout.val if value in VALIDATION and layout.val else value for value in said]
    if layout.split_by is None:
        raise InputError(
            f"{path} has no column {names['split']!r}",
            fix="add one with train or test in each line, name it with --columns split=NAME, or draw the split with "
            "--split-by group --test-fraction 0.2",
        )
    if layout.split_by == "group" and group is None:
        raise UsageError("--split-by group needs a column of groups", fix="name it with --unit-column NAME")
    keys = table[names["path"] if layout.split_by == "image" else str(group)]
    return ["test" if _drawn(key, layout) else "train" for key in keys]


def _drawn(key: str, layout: Layout) -> bool:
    """Whether a group or image is drawn: by its own name and the seed alone, so that no other one changes it."""
    digest = hashlib.sha256(f"dprandp-split-1 {layout.split_seed or 0} {key}".encode()).digest()
    return int.from_bytes(digest[:8], "big") < layout.test_fraction * 2**64


def _require(path: Path, table: dict[str, list[str]], name: str, flag: str) -> None:
    if name not in table:
        raise InputError(f"{path} has no column {name!r}", fix=f"add it to the header, or name another with {flag}")


def _read(path: Path) -> dict[str, list[str]]:
    """Column -> its values as text, without surrounding space."""
    if not path.is_file():
        raise InputError(f"there is no file {path}", fix="check the path")
    if path.suffix.lower() == ".parquet":
        return _read_parquet(path)
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            header, *lines = [[cell.strip() for cell in row] for row in csv.reader(file) if row] or [[]]
    except (UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{path} is no CSV in UTF-8", fix="save it again as CSV, UTF-8") from error
    if len(set(header)) != len(header):
        raise InputError(f"{path} has two columns of the same name", fix="give each column its own name")
    if any(len(row) != len(header) for row in lines):
        fix = "save it again as CSV, with commas"
        raise InputError(f"{path} has lines of other lengths than its header", fix=fix)
    return {name: [row[index] for row in lines] for index, name in enumerate(header)}


def _read_parquet(path: Path) -> dict[str, list[str]]:
    try:
        from pyarrow import ArrowException, parquet
    except ImportError as error:
        raise InputError(
            f"{path} needs pyarrow, which is not installed", fix='pip install "dprandp[parquet]", or save it as CSV'
        ) from error
    try:
        columns = parquet.read_table(path).to_pydict()
    except (ArrowException, OSError, ValueError) as error:
        fix = "write it again, or save it as CSV"
        raise InputError(f"{path} is no readable Parquet file", fix=fix, private_detail=str(error)) from error
    return {name: ["" if value is None else str(value).strip() for value in values] for name, values in columns.items()}
