"""Any image set → a declared description, and uint8 arrays with labels when asked.

>>> dataset = open_dataset("digits", Path("data"))
>>> dataset.spec.train_examples, dataset.spec.image_shape
(1440, (8, 8, 1))

A known set is added as a row of ``known.py``; ``npz.py`` and ``folder.py`` read a user's own.

New images to classify are read here too. The guarantee does not cover these, so messages name a file that cannot be
read.
"""

from __future__ import annotations

import errno
import os
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

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
from dprandp.data.decode import EXTENSIONS, hash_set, is_litter, read_image, sized
from dprandp.data.files import Reading, UnusableData, listed
from dprandp.data.folder import open_folder
from dprandp.data.known import KNOWN, larger_medical, refuse_unsupported
from dprandp.data.npz import array_blocks, image_shape, open_npz, read_headers
from dprandp.data.table import open_table
from dprandp.data.units import EACH_IMAGE, Units
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


# ----------------------------------------------------------------------------------------------------------- new images

ARRAYS = ("images", "x", "x_test")
"""Names under which an ``.npz`` file may hold the images; exactly one of them has to be there."""

LINKED, SPECIAL, BARE = "links to folders", "no regular files", "no extension"
"""Kinds of skipped files without an extension."""

_GREY = np.array([0.299, 0.587, 0.114])  # ITU-R BT.601 luma, as PIL's convert("L")


def read_unlabelled(path: Path, shape: tuple[int, int, int], rules: Decoding = REFUSE) -> np.ndarray:
    """Read a new image and bring it to the shape of the images that a model was trained on.

    An image of other proportions loses its edges: the largest centred part is kept. Grey and colour are converted.

    Args:
        shape: height, width, channels (1 or 3). rules: for ambiguous files.

    Returns:
        uint8 [height, width, channels].

    Raises:
        InputError: missing or damaged; the message names the file.
    """
    if not path.is_file():
        raise InputError(f"there is no file or folder {path}", fix="check the path")
    return _grey_or_rgb(read_image(path, shape[0], shape[1], str(path), rules), shape[2])


def npz_blocks(place: str, shape: tuple[int, int, int], rows: int) -> Iterator[tuple[list[str], np.ndarray]]:
    """New images from an ``.npz`` file, treated as ``read_unlabelled`` treats files, in blocks of up to ``rows``.

    Args:
        place: the file, with uint8 [N, H, W], [N, H, W, 1] or [N, H, W, 3] under one of the names ``ARRAYS``.
        shape: height, width, channels (1 or 3).

    Returns:
        Blocks of names (``PATH[i]``) and uint8 [rows, height, width, channels].

    Raises:
        InputError: at once, where its headers show that it holds no images; later, where it is damaged.
    """
    path = Path(place).expanduser()
    headers = read_headers(path)
    present = [name for name in ARRAYS if name in headers]
    if len(present) != 1:
        raise InputError(
            f"{path} holds {' and '.join(present) or 'none of the arrays ' + ', '.join(ARRAYS)}",
            fix="save the images to classify under one of these names, such as numpy.savez(path, images=…)",
        )
    size = image_shape(path, headers, present[0])

    def blocks() -> Iterator[tuple[list[str], np.ndarray]]:
        start = 0
        for block in array_blocks(path, present[0], rows):
            names = [f"{place}[{index}]" for index in range(start, start + len(block))]
            yield names, brought_to(block.reshape(-1, *size), shape)
            start += len(block)

    return blocks()


def brought_to(images: np.ndarray, shape: tuple[int, int, int]) -> np.ndarray:
    """Images of any size as uint8 [N, height, width, channels] of ``shape``; cut and resized as files are.

    Args:
        images: uint8 [H, W], [H, W, C] or [N, H, W, C] with C = 1 or 3.

    Raises:
        InputError: the array holds no such images.
    """
    many = images[None] if images.ndim == 3 else images[None, ..., None] if images.ndim == 2 else images
    if many.dtype != np.uint8 or many.ndim != 4 or many.shape[3] not in (1, 3) or 0 in many.shape:
        raise InputError(
            f"an array of type {images.dtype} and shape {list(images.shape)} holds no images",
            fix="give uint8 [height, width, 3] or [N, height, width, 3], or one channel for grey",
        )
    height, width, channels = shape
    plain = many[..., 0] if many.shape[3] == 1 else many
    small = np.stack([np.asarray(sized(Image.fromarray(image), height, width)) for image in plain])
    return _grey_or_rgb(small.reshape(len(many), height, width, many.shape[3]), channels)


def skipped_text(kinds: Mapping[str, int]) -> str:
    """``skipped 3 files that are not images by name: .svs (2), .txt (1); readable are .png ...``."""
    count = sum(kinds.values())
    listed = ", ".join(f"{kind} ({number})" for kind, number in kinds.items())
    what = "1 file that is not an image" if count == 1 else f"{count} files that are not images"
    return f"skipped {what} by name: {listed}; readable are {' '.join(EXTENSIONS)}"


def image_files(folder: Path) -> tuple[list[Path], dict[str, int]]:
    """Every image file below a folder, by path, and how many other files of each kind; litter is in neither."""
    if not folder.is_dir():
        raise InputError(f"there is no folder {folder}", fix="check the path")
    found: list[Path] = []
    skipped: Counter[str] = Counter()

    def refuse(error: OSError) -> None:  # a folder that cannot be listed would hide its images
        raise InputError(f"{error.filename} cannot be listed: {error.strerror}", fix="check its permissions") from error

    for here, folders, files in os.walk(folder, onerror=refuse):
        folders[:] = [name for name in folders if not is_litter(name)]
        skipped[LINKED] += sum(os.path.islink(os.path.join(here, name)) for name in folders)
        for path in (Path(here, name) for name in files if not is_litter(name)):
            extension = path.suffix.lower()
            if not path.is_file():
                skipped[SPECIAL] += 1
            elif path.name.lower().endswith(EXTENSIONS):
                found.append(path)
            else:
                skipped[extension if extension.isprintable() and 0 < len(extension) <= 16 else BARE] += 1
    kinds = {kind: count for kind, count in sorted(skipped.items(), key=lambda item: (-item[1], item[0])) if count}
    if not found:
        raise InputError(
            f"{folder} holds no image" + (f": {skipped_text(kinds)}" if kinds else ""),
            fix=f"images are known by their names: {' '.join(EXTENSIONS)}",
        )
    return sorted(found), kinds


def _grey_or_rgb(images: np.ndarray, channels: int) -> np.ndarray:
    """uint8 [..., H, W, 1 or 3] with the wanted number of channels."""
    if images.shape[-1] == channels:
        return images
    if channels == 3:
        return np.repeat(images, 3, axis=-1)
    return np.round(images @ _GREY).clip(0, 255).astype(np.uint8)[..., None]
