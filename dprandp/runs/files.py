"""Atomic file writing: every file that this package writes is complete or absent.

Files are written under a temporary name in the same folder, forced to the disk, and renamed. A reader, and a run
resumed after ``kill -9`` or a power cut, sees the old file or the new one, never a part. Every ``OSError`` on the way
becomes a ``StorageError`` that says what happened and what to do.

*Records* are frozen dataclasses from the JSON objects that ``to_json`` makes of them. What is read may come from
another version, a careless edit or a damaged disk: each value is checked against its field's type, and entries without
a field are ignored.
"""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import json
import math
import os
import re
import secrets
import types
import unicodedata
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from dprandp.errors import StorageError
from dprandp.runs import faults

_TEMPORARY = re.compile(r"\..+\.[0-9a-f]{8}\.partial(\.[^.]+)?")

_ADVICE = {
    None: (  # numpy omits the number where only a part of an array was written
        "not all of it could be written or read",
        "free some space or raise the limit on file sizes (ulimit -f), then run the same command again",
    ),
    errno.ENOSPC: ("the disk is full", "free some space, then run the same command again"),
    errno.EDQUOT: ("the disk quota is used up", "free some space within the quota, then run the same command again"),
    errno.EFBIG: (
        "the file is larger than the limit set for this process or file system",
        "raise the limit (ulimit -f), or choose another folder",
    ),
    errno.EROFS: ("the file system is read-only", "choose a folder that can be written"),
    errno.EACCES: ("permission denied", "change the folder's permissions, or choose another folder"),
    errno.EPERM: ("the operation is not permitted", "change the folder's permissions, or choose another folder"),
}


@contextmanager
def storage_errors(path: Path | str, action: str = "write") -> Iterator[None]:
    """Turn every ``OSError`` of the block into a ``StorageError`` naming ``path``.

    Args:
        path: the file or folder at work. It appears in the message, so it must not be the name of a private example.
        action: the verb of the message, ``cannot {action} {path}``.
    """
    try:
        yield
    except OSError as error:
        reason, fix = _ADVICE.get(
            error.errno or None,
            (error.strerror or type(error).__name__, "check the disk and the path, then run the same command again"),
        )
        raise StorageError(f"cannot {action} {path}: {reason}", fix=fix) from error


@contextmanager
def atomic_path(path: Path | str) -> Iterator[Path]:
    """Yield a temporary path to write; the file gets its real name only when the block ends without an error.

    It is in the same folder and keeps the suffix, which writers such as ``numpy.save`` append where it is missing. On
    any exception it is removed and the old file stays. A process killed inside the block leaves it behind;
    ``remove_leftovers`` removes it.

    Raises:
        StorageError: any ``OSError``, including those of the block.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.stem}.{secrets.token_hex(4)}.partial{path.suffix}")
    with storage_errors(path):
        try:
            yield temporary
            move_into_place(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise


def move_into_place(temporary: Path, path: Path) -> None:
    """Give a closed file in the same folder its real name, with bytes and name forced to the disk (or StorageError)."""
    with storage_errors(path):
        _fsync(temporary, os.O_RDWR)
        faults.point("temp-written")
        os.replace(temporary, path)
        _fsync(path.parent, os.O_RDONLY | os.O_DIRECTORY)  # fsync of a file does not cover its name
        faults.point("renamed")


def atomic_write(path: Path | str, data: bytes | str) -> None:
    """Replace ``path`` by ``data`` (a string is written as UTF-8), completely and on the disk, or not at all.

    Raises:
        StorageError: any ``OSError``. The old file is intact and no temporary file is left.
    """
    content = data.encode("utf-8") if isinstance(data, str) else data
    with atomic_path(path) as temporary, open(temporary, "xb") as file:
        file.write(content)


def _fsync(path: Path, flags: int) -> None:
    descriptor = os.open(path, flags)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove_leftovers(directory: Path | str) -> list[Path]:
    """Remove, and return, what killed processes left below a folder, while no other writes there (``RunDir.lock``)."""
    leftovers = sorted(path for path in Path(directory).rglob(".*.partial*") if _TEMPORARY.fullmatch(path.name))
    for path in leftovers:
        with storage_errors(path, "remove"):
            path.unlink(missing_ok=True)
    return leftovers


def size_text(count: float) -> str:
    """Bytes for people: ``49 MB``."""
    unit, name = (1e9, "GB") if count >= 1e9 else (1e6, "MB")
    return f"{float(f'{count / unit:.2g}'):g} {name}"


def file_sha256(path: Path | str) -> str:
    """Hex sha256 of a file's bytes, read in pieces."""
    with storage_errors(path, "read"), open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def to_json(value: Any, indent: int | None = None) -> str:
    """Serialise to JSON that every parser accepts, keys in the given order.

    A dataclass is an object of its fields. One whose default is None is left out where it is None; other Nones are
    ``null``. ``read_record`` is the inverse.

    JSON has no infinity and no NaN: infinities, such as the ε of a run without privacy, become the strings ``"inf"``
    and ``"-inf"``, which ``float()`` understands; NaN becomes ``null``.
    """
    return json.dumps(_finite(value), indent=indent, allow_nan=False, ensure_ascii=False)


def from_json(content: bytes | str) -> Any:
    """Parse JSON from a file that may be damaged or hostile.

    Raises:
        ValueError: it is not JSON, is nested too deeply, or holds invalid Unicode (a lone surrogate) or a whole number
            beyond the range of a float.
    """
    try:
        value = json.loads(content, parse_int=_whole)
        json.dumps(value, ensure_ascii=False).encode("utf-8")
    except (RecursionError, OverflowError) as error:
        raise ValueError("it is nested too deeply, or holds a number of too many digits") from error
    return value


def read_object(path: Path) -> dict[str, Any] | None:
    """The JSON object that a file holds; None where it holds none."""
    with storage_errors(path, "read"):
        content = path.read_bytes()
    try:
        value = from_json(content)
    except ValueError:
        return None
    return value if isinstance(value, dict) else None


def _whole(digits: str) -> int:
    value = int(digits)
    float(value)  # OverflowError
    return value


def _finite(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        fields = ((field, getattr(value, field.name)) for field in dataclasses.fields(value))
        return {field.name: _finite(item) for field, item in fields if item is not None or field.default is not None}
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None if math.isnan(value) else str(float(value))
    return value


# -------------------------------------------------------------------------------------------------------------- records

T = TypeVar("T")

Fraction = Annotated[float, lambda value: 0 <= value <= 1]
"""In [0, 1]."""
Number = Annotated[float, lambda value: abs(value) == math.inf or abs(value) <= 1e300]
"""Any number, or an infinity, which JSON holds as "inf" or "-inf" (see ``to_json``); never NaN."""
Count = Annotated[int, lambda value: 0 <= value < 2**63]
"""0 or more."""
Text = Annotated[str, lambda value: not any(unicodedata.category(letter) in ("Cc", "Cs") for letter in value)]
"""Without control characters."""


def missing_entries(kind: type, record: Mapping[str, Any]) -> list[str]:
    """The fields without a default that a JSON object lacks, in alphabetical order."""
    fields = dataclasses.fields(kind)
    return sorted(each.name for each in fields if each.default is dataclasses.MISSING and each.name not in record)


def ill_typed_entry(kind: type, record: Mapping[str, Any]) -> str | None:
    """The name of an entry of a JSON object that is not of its field's type, or None; missing ones are not wrong."""
    for name, hint in _types_of(kind).items():
        try:
            _read(hint, record.get(name)) if name in record else None
        except (ValueError, TypeError):
            return name
    return None


def read_record(kind: type[T], record: Any) -> T:
    """The dataclass of a JSON object.

    Raises:
        ValueError: it is none, or a field is missing or of another type; the message names it.
    """
    if not isinstance(record, dict):
        raise ValueError("it is no JSON object")
    wrong = [*missing_entries(kind, record), ill_typed_entry(kind, record)]
    if wrong[0] is not None:
        raise ValueError(f"{wrong[0]!r} is missing, or of another kind")
    return kind(**{name: _read(hint, record[name]) for name, hint in _types_of(kind).items() if name in record})


@cache
def _types_of(kind: type) -> dict[str, Any]:
    hints = get_type_hints(kind, include_extras=True)
    return {field.name: hints[field.name] for field in dataclasses.fields(kind)}


def _read(hint: Any, value: Any) -> Any:
    """A JSON value as a field's type; ValueError where it does not fit."""
    origin, parts = get_origin(hint), get_args(hint)
    if origin is Annotated:
        found = _read(parts[0], value)
        if not parts[1](found):
            raise ValueError("out of its range")
        return found
    if origin in (Union, types.UnionType):
        return None if value is None else _read(next(part for part in parts if part is not type(None)), value)
    if origin is tuple and type(value) is list:
        return tuple(_read(parts[0], item) for item in value)
    if origin is dict and type(value) is dict:
        return {key: _read(parts[1], item) for key, item in value.items()}
    if origin is Literal and value in parts:
        return value
    if dataclasses.is_dataclass(hint):
        return read_record(hint, value)
    if hint is float and (type(value) in (int, float) or value in ("inf", "-inf")):
        return float(value)
    if hint is Any or type(value) is hint:
        return value
    raise ValueError("of another type")
