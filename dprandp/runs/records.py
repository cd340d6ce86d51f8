"""Frozen dataclasses from the JSON objects that ``files.to_json`` makes of them.

What is read may come from another version, a careless edit or a damaged disk: each value is checked against its field's
type, and entries without a field are ignored.
"""

from __future__ import annotations

import dataclasses
import math
import types
import unicodedata
from collections.abc import Mapping
from functools import cache
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

T = TypeVar("T")

Fraction = Annotated[float, lambda value: 0 <= value <= 1]
"""In [0, 1]."""
Number = Annotated[float, lambda value: abs(value) == math.inf or abs(value) <= 1e300]
"""Any number, or an infinity, which JSON holds as "inf" or "-inf" (see ``files.to_json``); never NaN."""
Count = Annotated[int, lambda value: 0 <= value < 2**63]
"""0 or more."""
Text = Annotated[str, lambda value: not any(unicodedata.category(letter) in ("Cc", "Cs") for letter in value)]
"""Without control characters."""


def missing(kind: type, record: Mapping[str, Any]) -> list[str]:
    """The fields without a default that a JSON object lacks, in alphabetical order."""
    fields = dataclasses.fields(kind)
    return sorted(each.name for each in fields if each.default is dataclasses.MISSING and each.name not in record)


def wrong_entry(kind: type, record: Mapping[str, Any]) -> str | None:
    """The name of an entry of a JSON object that is not of its field's type, or None; missing ones are not wrong."""
    for name, hint in _types_of(kind).items():
        try:
            _read(hint, record.get(name)) if name in record else None
        except (ValueError, TypeError):
            return name
    return None


def read(kind: type[T], record: Any) -> T:
    """The dataclass of a JSON object.

    Raises:
        ValueError: it is none, or a field is missing or of another type; the message names it.
    """
    if not isinstance(record, dict):
        raise ValueError("it is no JSON object")
    wrong = [*missing(kind, record), wrong_entry(kind, record)]
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
        return read(hint, value)
    if hint is float and (type(value) in (int, float) or value in ("inf", "-inf")):
        return float(value)
    if hint is Any or type(value) is hint:
        return value
    raise ValueError("of another type")
