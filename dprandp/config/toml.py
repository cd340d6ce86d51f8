"""Read TOML files within limits, and write TOML."""

from __future__ import annotations

import os
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tomli_w

from dprandp.errors import InputError

MOST_BYTES, MOST_DOTS = 65_536, 200
"""Limits of a file, and of one line. The time of the standard library's parser grows with the square of the parts of a
dotted key: within these limits any file is parsed, or refused, in a tenth of a second. A configuration with every
setting takes 3,000 bytes and has at most one dot in a key."""


def read(file: Path) -> dict[str, Any]:
    """Parse a TOML file, once its size and dots are within the limits.

    Raises:
        InputError: missing, unreadable, beyond a limit, or not TOML.
    """
    try:
        with file.open("rb") as stream:
            content = stream.read(MOST_BYTES + 1)
            size = max(len(content), os.fstat(stream.fileno()).st_size)
    except OSError as error:
        raise InputError(f"cannot read configuration {file}: {error.strerror}", fix="check the path") from error
    if len(content) > MOST_BYTES:
        raise InputError(
            f"{file} has {size} bytes; a configuration may have at most {MOST_BYTES}",
            fix="check that this is the TOML file with the settings",
        )
    for number, line in enumerate(content.splitlines(), start=1):
        if (dots := line.count(b".")) > MOST_DOTS:
            raise InputError(
                f"line {number} of {file} has {dots} dots; a line may have at most {MOST_DOTS}",
                fix="write settings as name = value below the table of their stage, such as [probe]",
            )
    try:
        return tomllib.loads(content.decode("utf-8"))
    except RecursionError as error:
        fix = "write one table for each stage, and plain values"
        raise InputError(f"{file} is not valid TOML: it is nested too deeply", fix=fix) from error
    except ValueError as error:  # not TOML, not UTF-8, or a number of thousands of digits
        raise InputError(f"{file} is not valid TOML: {error}", fix="correct that line") from error


def dumps(table: Mapping[str, Any]) -> str:
    """Serialise a dict, flat or with one level of nested dicts, to TOML.

    Args:
        table: str keys; values as TOML has them, tuples, None (left out: TOML has no null), or a dict of such values.

    Raises:
        TypeError: a value or key of another type, or a None in a list.
        ValueError: a string that is not valid Unicode (a lone surrogate).
    """
    def without_none(part: Mapping[str, Any]) -> dict[str, Any]:
        return {key: value for key, value in part.items() if value is not None}

    inner = {key: without_none(value) if isinstance(value, Mapping) else value for key, value in table.items()}
    made = tomli_w.dumps(without_none(inner))
    made.encode("utf-8")
    return made
