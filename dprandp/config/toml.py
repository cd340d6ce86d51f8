"""Read TOML files, and write TOML; the standard library's ``tomllib`` reads it back.

Only what configurations need: scalars, lists, and one level of tables. Whatever ``dumps`` accepts, ``tomllib.loads``
returns unchanged (tuples as lists), infinities and NaN included; keys whose value is None are left out, as TOML has no
null.

Imports nothing of the package but ``errors``.
"""

from __future__ import annotations

import json
import math
import os
import re
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dprandp.errors import InputError

MOST_BYTES, MOST_DOTS = 65_536, 200
"""Of a file, and of one line. The standard library's parser takes time that grows with the square of the parts of a
dotted key, and with the number of such keys: within these limits any file is parsed, or refused, in a tenth of a
second. A configuration that sets everything there is takes 3,000 bytes and has one dot in a key, if any."""

_BARE_KEY = re.compile(r"[A-Za-z0-9_-]+")


def read(file: Path) -> dict[str, Any]:
    """Parse a TOML file.

    Raises:
        InputError: missing, unreadable, not TOML, of more than ``MOST_BYTES``, or with more than ``MOST_DOTS`` dots in
            a line. The two limits are checked before anything is parsed, in time that grows with the file alone.
    """
    try:
        with file.open("rb") as stream:
            content = stream.read(MOST_BYTES + 1)
            size = max(len(content), os.fstat(stream.fileno()).st_size)
    except OSError as error:
        raise InputError(f"cannot read configuration {file}: {error.strerror}", fix="check the path") from error
    if len(content) > MOST_BYTES:
        raise InputError(
            f"{file} holds {size} bytes, and a configuration may hold at most {MOST_BYTES}",
            fix="name the TOML file with the settings; anything else belongs into other files",
        )
    for number, line in enumerate(content.splitlines(), start=1):
        if (dots := line.count(b".")) > MOST_DOTS:
            raise InputError(
                f"line {number} of {file} holds {dots} dots, and a line may hold at most {MOST_DOTS}",
                fix="write settings as name = value below the table of their stage, such as [probe]",
            )
    try:
        return tomllib.loads(content.decode("utf-8"))
    except RecursionError as error:
        fix = "write one table for each stage, and plain values"
        raise InputError(f"{file} is not valid TOML: it is nested too deeply", fix=fix) from error
    except ValueError as error:  # not TOML, not UTF-8, or a number of thousands of digits
        raise InputError(f"{file} is not valid TOML: {error}", fix="mend the line it names") from error


def dumps(table: Mapping[str, Any]) -> str:
    """Serialise a dict, flat or with one level of nested dicts, to TOML.

    Args:
        table: str keys; values are str, bool, int, float, None (left out), lists or tuples of these without None, or a
            dict of such values. Plain values come first and nested tables after them, each in the given order.

    Raises:
        TypeError: a value or key of another type, a None in a list, or tables nested deeper.
        ValueError: a string that is not valid Unicode (a lone surrogate).
    """
    lines = [f"{_key(key)} = {_value(value)}" for key, value in table.items() if not _skipped(value)]
    for key, value in table.items():
        if isinstance(value, Mapping):
            lines += ["", f"[{_key(key)}]"] if lines else [f"[{_key(key)}]"]
            lines += [f"{_key(name)} = {_value(item)}" for name, item in value.items() if item is not None]
    return "".join(line + "\n" for line in lines)


def _skipped(value: Any) -> bool:
    return value is None or isinstance(value, Mapping)


def _key(key: Any) -> str:
    if not isinstance(key, str):
        raise TypeError(f"a TOML key is a string, not {key!r}")
    return key if _BARE_KEY.fullmatch(key) else _string(key)


def _value(value: Any) -> str:
    if isinstance(value, bool):  # before int: True is an int
        return "true" if value else "false"
    if isinstance(value, str):
        return _string(value)
    if isinstance(value, int):
        return str(int(value))
    if isinstance(value, float):
        return repr(float(value)) if math.isfinite(value) else str(float(value))
    if isinstance(value, list | tuple):
        return "[" + ", ".join(_value(item) for item in value) + "]"
    raise TypeError(f"this writer has no TOML for {type(value).__name__}: {value!r}")


def _string(text: str) -> str:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(f"not valid Unicode: {text!r}") from error
    # JSON's escapes are a subset of those of TOML's basic strings; TOML also wants DEL escaped.
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")
