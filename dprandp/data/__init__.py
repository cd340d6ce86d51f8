"""Any image set → a declared description, and uint8 arrays with labels when asked.

>>> dataset = open_dataset("digits", Path("data"))
>>> dataset.spec.train_examples, dataset.spec.image_shape
(1440, (8, 8, 1))

A known set is added as a row of ``known.py``; ``npz.py`` and ``folder.py`` read a user's own.
"""

from __future__ import annotations

import errno
import os
from dataclasses import dataclass
from pathlib import Path

from dprandp.config.declared import AS_LISTED, PARTS, REFUSE, Decoding, Layout, flag
from dprandp.data.base import (
    DataCheck,
    Dataset,
    DataSpec,
    Examination,
    Split,
    check_data,
    public_part,
    with_declared_labels,
    without_public_part,
)
from dprandp.data.files import Reading
from dprandp.data.folder import open_folder
from dprandp.data.hashes import hash_set
from dprandp.data.known import KNOWN, larger_medical, refuse_unsupported
from dprandp.data.npz import open_npz
from dprandp.data.problems import UnusableData, listed
from dprandp.data.table import open_table
from dprandp.data.units import EACH_IMAGE, Units
from dprandp.data.unlabelled import brought_to, image_files, npz_blocks, read_unlabelled, skipped_text
from dprandp.errors import InputError, UsageError, nearest

__all__ = [
    "KNOWN", "DataCheck", "DataSpec", "Dataset", "DatasetRow", "Examination", "Reading", "Split", "Units",
    "UnusableData", "brought_to", "check_data", "hash_set", "image_files", "list_datasets", "listed", "npz_blocks",
    "open_dataset", "public_part", "read_unlabelled", "skipped_text", "without_public_part",
]  # fmt: skip


LABELS = ("class_shares", "ordinal")
OWN: dict[str, tuple[str, ...]] = {"folder": ("val", *LABELS), "npz": LABELS, "csv": PARTS}
"""Kinds of a user's own data, and what a ``Layout`` may say of them; of a known set, the shares of its classes."""


def open_dataset(
    name: str,
    data_dir: Path,
    *,
    download: bool = False,
    num_classes: int | None = None,
    unit_column: str | None = None,
    decoding: Decoding = REFUSE,
    layout: Layout = AS_LISTED,
    strict: bool = True,
) -> Dataset:
    """Name a data set. No pixel and no label is read, and for a known name no file is touched.

    Args:
        name: a key of ``KNOWN``, ``folder:PATH``, ``npz:PATH`` or ``csv:PATH`` (relative to the working folder).
        data_dir: the data root, where known sets keep their files.
        download: fetch a known set's files where ``require``, ``train`` or ``test`` find them missing.
        num_classes: for ``npz:`` alone, where the file does not declare its classes.
        unit_column: for ``npz:`` and ``folder:``, what says which images form one unit of privacy; ``image`` for none.
        decoding: for image files, how ambiguous ones are read.
        layout: what was declared about labels; for ``csv:`` and ``folder:``, also about classes, columns and splits.
        strict: refuse files that cannot be used now, and not when they are read, together with all others.

    Raises:
        UsageError: an unknown name, a MedMNIST set of volumes, an option that does not apply.
        InputError: the file or folder of ``npz:`` or ``folder:`` is missing or not as it has to be.
    """
    dataset = _named(name, data_dir, download, num_classes, unit_column, decoding, layout, strict)
    dataset.spec = with_declared_labels(dataset.spec, layout.ordinal is True, layout.shares())
    return dataset


def _named(
    name: str,
    data_dir: Path,
    download: bool,
    num_classes: int | None,
    unit_column: str | None,
    decoding: Decoding,
    layout: Layout,
    strict: bool,
) -> Dataset:
    """``open_dataset`` before what its owner declares about the labels."""
    kind, colon, rest = name.partition(":")
    own = bool(colon) and kind in OWN
    idle = "num_classes" if num_classes is not None and kind not in ("npz", "csv") else None
    if unit_column not in (None, EACH_IMAGE) and not own:
        idle = "unit_column"
    layout.refuse_others(kind if own else name, OWN[kind] if own else ("class_shares",))
    if kind not in ("folder", "csv") and decoding != REFUSE:
        raise UsageError(
            f"{flag(min(decoding.as_dict()))} says how image files are read, but {name} is not a folder of them",
            fix="leave it out, or give --data folder:PATH",
        )
    if idle:
        raise UsageError(f"{idle} does not apply to the data set {name}", fix=f"leave {idle} out: it is known")
    if own:
        if download:
            raise UsageError(f"{name} is your own data: there is nothing to download", fix="leave --download out")
        if not rest:
            raise UsageError(f"{name} names no path", fix=f"write {kind}:PATH")
        try:
            path = Path(rest).expanduser()
            if kind == "npz":
                return open_npz(path, num_classes, unit_column)
            if kind == "csv":
                return open_table(path, num_classes, unit_column, decoding, layout, strict=strict)
            return open_folder(path, unit_column, decoding, layout.val, strict=strict)
        except RuntimeError as error:  # of expanduser
            raise UsageError(f"{name} names an unknown home folder", fix="write the whole path") from error
        except OSError as error:  # only the number: its file name may be that of a private example
            raise InputError(
                f"the path of the {kind} data set cannot be read: {os.strerror(error.errno or errno.EIO)}",
                fix="check the path and its permissions",
                private_detail=str(error),
            ) from error
    refuse_unsupported(name)
    known = KNOWN.get(name) or larger_medical(name)
    if known is None:
        kinds = {".csv": "csv", ".parquet": "csv", ".npz": "npz"}
        if Path(name).exists():
            meant = kinds.get(Path(name).suffix.lower(), "folder")
            raise UsageError(f"there is no data set {name!r}, but a path", fix=f"did you mean {meant}:{name}?")
        raise UsageError(
            f"there is no data set {name!r}", fix=nearest(name, [*KNOWN, *(f"{kind}:PATH" for kind in OWN)])
        )
    return known.open(Path(data_dir), download=download)


@dataclass(frozen=True)
class DatasetRow:
    """One line of ``dprandp datasets``; ``size`` is height×width×channels, such as ``"32×32×3"``."""

    name: str
    title: str
    train_examples: int
    classes: int
    size: str
    available: bool
    how_to_get: str


def list_datasets(data_dir: Path) -> list[DatasetRow]:
    """Every known set, in the order of ``KNOWN``; opens no file."""
    rows = []
    for name, known in KNOWN.items():
        spec = known.spec()
        size = "×".join(map(str, spec.image_shape))
        here = not known.missing(Path(data_dir))
        rows.append(DatasetRow(name, spec.title, spec.train_examples, len(spec.classes), size, here, known.put))
    return rows
