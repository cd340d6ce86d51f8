"""Arrays from ``.npz`` files, read as data and never as code; and the ``npz:PATH`` data set.

Shape and dtype of every array are read from the few bytes of its header before anything is allocated. So the facts of a
data set are known without one pixel or label, and a file that lies about its size (a decompression bomb, a header that
promises terabytes) is refused.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import lzma
import math
import struct
import tokenize
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.lib import format as npy

from dprandp.data.base import MAX_CLASSES, SPLITS, Dataset, check_class_names, users_spec
from dprandp.data.units import DEFAULT_ARRAY, EACH_IMAGE, Units, check_column_name, make_units
from dprandp.errors import InputError, UsageError

#: Members of the zip beyond this are no data set.
MAX_ARRAYS = 1000
MEDMNIST = {"x": "images", "y": "labels"}
#: Bytes of an array's header; numpy refuses longer ones too, but not before it has read them.
MAX_HEADER_BYTES = 12_000
#: Real images do not shrink 200-fold; larger members that did are taken for bombs.
BOMB_RATIO, BOMB_BYTES = 200, 64 * 2**20

#: What a damaged or hostile zip or npy header makes the standard library and numpy raise.
_BROKEN = (
    zipfile.BadZipFile, zlib.error, struct.error, EOFError, OSError, ValueError, SyntaxError, TypeError, KeyError,
    NotImplementedError, RuntimeError, MemoryError, OverflowError, RecursionError, lzma.LZMAError, tokenize.TokenError,
)  # fmt: skip


@dataclass(frozen=True)
class ArrayHeader:
    """What an array says about itself: shape, dtype, and whether its order is Fortran's."""

    shape: tuple[int, ...]
    dtype: np.dtype
    fortran: bool

    def __str__(self) -> str:
        return f"{self.dtype} {list(self.shape)}"


def read_headers(path: Path) -> dict[str, ArrayHeader]:
    """Shape and dtype of each array in an ``.npz`` file; no array data is read.

    Raises:
        InputError: the file is missing, damaged, holds a pickle (an object array), or is not as large as it claims.
    """
    with _opened(path) as archive:
        members = [info for info in archive.infolist() if info.filename.endswith(".npy")]
        if len(members) > MAX_ARRAYS or len({info.filename for info in members}) != len(members):
            raise _refusal(path, "holds too many arrays, or two of the same name")
        return {info.filename.removesuffix(".npy"): _read_header(archive, info, path) for info in members}


def read_array(path: Path, name: str) -> np.ndarray:
    """One array of an ``.npz`` file whose header ``read_headers`` would accept.

    Raises:
        InputError: as ``read_headers``; also when the bytes fail their checksum or the array is absent.
    """
    with _opened(path) as archive:
        info = archive.getinfo(name + ".npy")
        _read_header(archive, info, path)
        with archive.open(info) as stream:
            array = npy.read_array(stream, allow_pickle=False)
            stream.read(1)  # at the end of the member: makes zipfile compare the checksum
    return array


def array_blocks(path: Path, name: str, rows: int) -> Iterator[np.ndarray]:
    """``read_array`` in blocks of up to ``rows`` rows, so that no more than one is in memory.

    An array in Fortran order, whose rows are not stored together, is read as a whole.

    Raises:
        InputError: as ``read_array``; that the checksum fails is known after the last block.
    """
    with _opened(path) as archive:
        info = archive.getinfo(name + ".npy")
        header = _read_header(archive, info, path)
        if header.fortran:
            whole = read_array(path, name)
            yield from (whole[start : start + rows] for start in range(0, len(whole), rows))
            return
        count, *rest = header.shape
        size = math.prod(rest) * header.dtype.itemsize
        with archive.open(info) as stream:
            stream.read(info.file_size - count * size)
            for start in range(0, count, rows):
                number = min(rows, count - start)
                block = np.frombuffer(stream.read(number * size), header.dtype)
                yield block.reshape(number, *rest)
            stream.read(1)  # at the end of the member: makes zipfile compare the checksum


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[zipfile.ZipFile]:
    """The archive; what a damaged or hostile one makes the libraries raise becomes an InputError."""
    if not path.is_file():
        raise InputError(f"there is no file {path}", fix="check the path; it has to be an .npz file of numpy.savez")
    try:
        with zipfile.ZipFile(path) as archive:
            yield archive
    except _BROKEN as error:
        raise InputError(
            f"{path} is no readable .npz file",
            fix="fetch it again, or write it again with numpy.savez",
            private_detail=f"{type(error).__name__}: {error}",
        ) from error


def _read_header(archive: zipfile.ZipFile, info: zipfile.ZipInfo, path: Path) -> ArrayHeader:
    if info.file_size > BOMB_BYTES and info.file_size > BOMB_RATIO * info.compress_size:
        raise _refusal(path, f"unpacks to more than {BOMB_RATIO} times its size (a decompression bomb)")
    with archive.open(info) as packed:
        # numpy would first read all of a header that claims gigabytes, and only then find it too long
        stream = io.BytesIO(packed.read(MAX_HEADER_BYTES))
        version = npy.read_magic(stream)
        if version not in ((1, 0), (2, 0)):
            raise _refusal(path, f"has an array of npy format {version[0]}.{version[1]}; 1.0 and 2.0 are read")
        shape, fortran, dtype = (npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0)(stream)
        offset = stream.tell()
    if dtype.hasobject:
        raise InputError(
            f"{path} holds an object array, which is a pickle and could run code; it was not read",
            fix="save plain arrays: images as uint8, labels as integers, class names as numpy.array([...], dtype=str)",
        )
    if any(length < 0 for length in shape) or offset + math.prod(shape) * dtype.itemsize != info.file_size:
        raise _refusal(path, "has an array whose header does not fit its length")
    return ArrayHeader(tuple(shape), dtype, fortran)


def _refusal(path: Path, what: str) -> InputError:
    return InputError(f"{path} {what}", fix="write it again with numpy.savez or numpy.savez_compressed")


def open_npz(path: Path, num_classes: int | None, unit_column: str | None) -> Dataset:
    """A data set from one ``.npz`` file; only headers, the declared class list and the column of units are read.

    Args:
        path: file with ``x_train`` and ``x_test`` (uint8 [N, H, W], [N, H, W, 1] or [N, H, W, 3]), ``y_train`` and
            ``y_test`` (integers, or names of classes, [N] or [N, 1]; 0 and 1 [N, C], C > 1, for several labels an
            image), and the class list: ``classes`` (text [C]) or ``num_classes`` (one integer). MedMNIST's names
            (``train_images``, ``train_labels`` and so on) are taken too.
        num_classes: declares the number of classes when the file does not. Which classes occur is private, so the
            labels are never consulted.
        unit_column: the array (integers or text, [N] or [N, 1]) whose equal values make images one unit of privacy,
            with or without ``_train`` at its end. None: ``groups_train`` where the file has it.

    Raises:
        InputError: an array is missing or has the wrong dtype or shape, or the classes are not declared.
        UsageError: ``num_classes`` is not a possible number.
    """
    if num_classes is not None and not 2 <= num_classes <= MAX_CLASSES:
        raise UsageError(f"the number of classes is {num_classes}", fix=f"give a number from 2 to {MAX_CLASSES}")
    headers = read_headers(path)
    # the names of MedMNIST stand for ours
    theirs = {f"{ours}_{split}": f"{split}_{kind}" for split in SPLITS for ours, kind in MEDMNIST.items()}
    if "x_train" in headers or "train_images" not in headers:
        theirs = {name: name for name in theirs}
    headers |= {ours: headers[name] for ours, name in theirs.items() if name in headers}
    missing = [name for name in ("x_train", "y_train", "x_test", "y_test") if name not in headers]
    if missing:
        raise InputError(
            f"{path} lacks {', '.join(missing)}",
            fix="save with numpy.savez(path, x_train=…, y_train=…, x_test=…, y_test=…, classes=…)",
        )
    shape = image_shape(path, headers, "x_train")
    if image_shape(path, headers, "x_test") != shape:
        raise InputError(
            f"{path}: x_train is {headers['x_train']} but x_test is {headers['x_test']}",
            fix="give both splits images of one size and one number of channels",
        )
    columns = {_label_columns(path, headers, split) for split in SPLITS}
    if len(columns) > 1 or len({headers[f"y_{split}"].dtype.kind in "US" for split in SPLITS}) > 1:
        raise InputError(
            f"{path}: y_train is {headers['y_train']} but y_test is {headers['y_test']}",
            fix="give both splits labels of one kind",
        )
    units = _units(path, headers, unit_column)
    multi_label = columns != {1}
    classes = _declared_classes(path, headers, num_classes, columns.pop() if multi_label else None)
    if headers["y_train"].dtype.kind in "US" and "classes" not in headers:
        raise InputError(
            f"{path} has labels that are text, and does not say which there are",
            fix="save classes=numpy.array(['first name', 'second name', …]) too",
        )
    examples = headers["x_train"].shape[0], headers["x_test"].shape[0]
    spec = users_spec("npz", path, path.stem, classes, examples, shape, units)
    if unused := [name for name in ("x_val", "val_images") if name in headers]:
        spec = dataclasses.replace(spec, split_rule=f"the array {unused[0]} is not used")
    spec = dataclasses.replace(spec, multi_label=multi_label)

    def read(split: str) -> tuple[np.ndarray, np.ndarray]:
        images, labels = (read_array(path, theirs[f"{part}_{split}"]) for part in MEDMNIST)
        if labels.dtype.kind in "US":
            labels = _numbered(path, theirs[f"y_{split}"], labels, classes)
        return images, labels

    return Dataset(spec, read, units=units)


def _units(path: Path, headers: Mapping[str, ArrayHeader], column: str | None) -> Units | None:
    """Units from an array of the file: what was asked for, else ``groups_train`` where the file has it."""
    if column == EACH_IMAGE or (column is None and DEFAULT_ARRAY not in headers):
        return None
    asked = check_column_name(column or DEFAULT_ARRAY)
    name = next((name for name in (asked, f"{asked}_train") if name in headers), None)
    if {asked, f"{asked}_train"} <= headers.keys():
        raise InputError(
            f"{path} has two arrays that may say which unit an image belongs to, {asked!r} and '{asked}_train'",
            fix=f"give --unit-column {asked}_train, or save the file with one of the two",
        )
    if name is None:
        raise InputError(
            f"{path} has no array {asked!r} that says which unit an image belongs to",
            fix=f"save {asked.removesuffix('_train')}_train=… with one integer or text per training image",
        )
    columns = {"train": name} | ({"test": f"{name[:-6]}_test"} if name.endswith("_train") else {})
    values: dict[str, np.ndarray] = {}
    for split, array in columns.items():
        if array not in headers:
            continue  # units of the test split are not needed: it is not protected
        header, count = headers[array], headers[f"x_{split}"].shape[0]
        if header.dtype.kind not in "iuUS" or header.shape not in ((count,), (count, 1)):
            raise InputError(
                f"{path}: {array} is {header} for {count} images; units must be integers or text [{count}]",
                fix="give one integer or text per image, and no missing values",
            )
        values[split] = read_array(path, array)
    return make_units(name, values["train"], values.get("test"), str(path))


def image_shape(path: Path, headers: Mapping[str, ArrayHeader], name: str) -> tuple[int, int, int]:
    """Height, width and channels of an array of images.

    Raises:
        InputError: it is not uint8 [N, H, W], [N, H, W, 1] or [N, H, W, 3], or is empty.
    """
    header = headers[name]
    if header.dtype != np.uint8:
        raise InputError(
            f"{path}: {name} is {header}; images must be uint8, 0…255",
            fix="convert with a fixed, public scale, as (images * 255).round().astype(numpy.uint8) for images in 0…1",
        )
    grey = len(header.shape) == 3
    if not (grey or (len(header.shape) == 4 and header.shape[3] in (1, 3))):
        raise InputError(
            f"{path}: {name} is {header}; images must be [N, H, W], [N, H, W, 1] or [N, H, W, 3]",
            fix="put the channels last, as in images.transpose(0, 2, 3, 1), and drop alpha channels",
        )
    if 0 in header.shape:
        raise InputError(f"{path}: {name} is {header}, which holds no image", fix="give at least one image")
    return header.shape[1], header.shape[2], 1 if grey else header.shape[3]


def _label_columns(path: Path, headers: Mapping[str, ArrayHeader], split: str) -> int:
    """1 where each image has one class; else the number of labels that it may have."""
    images, labels = headers[f"x_{split}"], headers[f"y_{split}"]
    count, columns = images.shape[0], 1 if len(labels.shape) == 1 else math.prod(labels.shape[1:])
    kinds = "iuUS" if columns == 1 else "iub"
    if labels.dtype.kind not in kinds or labels.shape not in ((count,), (count, columns)):
        raise InputError(
            f"{path}: y_{split} is {labels} for {count} images; labels must be integers, or names of classes, "
            f"[{count}] or [{count}, 1]; or 0 and 1 for each of several labels an image, [{count}, labels]",
            fix="give one integer class index per image, such as labels.astype(numpy.int64)",
        )
    return columns


def _numbered(path: Path, name: str, labels: np.ndarray, classes: tuple[str, ...]) -> np.ndarray:
    """Labels that are names of classes, as their numbers."""
    numbers = {each: index for index, each in enumerate(classes)}
    found = np.array([numbers.get(_text(each), -1) for each in labels.reshape(-1).tolist()], np.int64)
    if (found < 0).any():
        first = int(found.argmin())
        raise InputError(
            f"{path}: {name} holds labels that are not among the declared classes",
            fix="name every class in the array classes, spelled as in the labels",
            private_detail=f"{int((found < 0).sum())} labels; the first at position {first}",
        )
    return found


def _text(value: str | bytes) -> str:
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else value


def _declared_classes(
    path: Path, headers: Mapping[str, ArrayHeader], num_classes: int | None, columns: int | None
) -> tuple[str, ...]:
    """The class list by declaration; ``columns`` of the labels where there are several. Sizes are checked on the
    header, before the array is read."""
    names: tuple[str, ...] | None = None
    counts = {} if num_classes is None else {"the caller": num_classes}
    if columns is not None:
        counts["the shape of its labels"] = columns
    if "classes" in headers:
        header = headers["classes"]
        if header.dtype.kind not in "US" or len(header.shape) != 1 or header.shape[0] > MAX_CLASSES:
            raise InputError(
                f"{path}: classes is {header}; it must be a list of names",
                fix="save classes=numpy.array(['first name', 'second name', …])",
            )
        names = tuple(map(_text, read_array(path, "classes").tolist()))
        counts["its array classes"] = len(names)
    if "num_classes" in headers:
        header = headers["num_classes"]
        if header.dtype.kind not in "iu" or math.prod(header.shape) != 1:
            raise InputError(f"{path}: num_classes is {header}, not one integer", fix="save num_classes=10, say")
        counts["its array num_classes"] = int(read_array(path, "num_classes").reshape(-1)[0])
    if not counts:
        raise InputError(
            f"{path} does not say how many classes there are, and the labels are private, so they are not asked",
            fix="add classes=['cat', 'dog', …] or num_classes=10 to the file, or declare the number of classes",
        )
    if len(set(counts.values())) > 1:
        said = ", ".join(f"{who} says {count}" for who, count in counts.items())
        raise InputError(f"{path}: the number of classes is contradictory: {said}", fix="declare it once, correctly")
    count = next(iter(counts.values()))
    if names is None:
        if not 2 <= count <= MAX_CLASSES:
            raise InputError(f"{path} declares {count} classes", fix=f"declare from 2 to {MAX_CLASSES}")
        names = tuple(str(index) for index in range(count))
    return check_class_names(names, str(path))
