"""A strict reader of the YAML that cards begin with: block mappings and lists, JSON strings, numbers, true and false.

Anything else is refused, so that what it reads is read in the same way by every YAML parser.
"""

from __future__ import annotations

import json
import re
from typing import Any

_KEY = re.compile(r"([A-Za-z_][A-Za-z0-9_-]*):(?: (.*))?")


def head_of(card: str) -> Any:
    """The facts at the beginning of a card."""
    match = re.match(r"---\n(.*?)\n---\n\n# ", card, re.DOTALL)
    assert match, card[:200]
    lines = match[1].split("\n")
    assert not [line for line in lines if not line.strip() or "\t" in line or line != line.rstrip()]
    value, rest = _block([(len(line) - len(line.lstrip(" ")), line.lstrip(" ")) for line in lines])
    assert rest == []
    return value


def _block(lines: list[tuple[int, str]]) -> tuple[Any, list[tuple[int, str]]]:
    """The mapping or list that begins at the first line, and the lines after it."""
    indent = lines[0][0]
    if lines[0][1].startswith("- "):
        items = []
        while lines and lines[0][0] == indent and lines[0][1].startswith("- "):
            text = lines[0][1][2:]
            if _KEY.fullmatch(text):
                lines = [(indent + 2, text), *lines[1:]]
                item, lines = _block(lines)
            else:
                item, lines = _scalar(text), lines[1:]
            items.append(item)
        return items, lines
    found: dict[str, Any] = {}
    while lines and lines[0][0] == indent and not lines[0][1].startswith("- "):
        match = _KEY.fullmatch(lines[0][1])
        assert match, lines[0]
        assert match[1] not in found
        lines = lines[1:]
        if match[2] is None:
            assert lines[0][0] > indent or lines[0][1].startswith("- ")
            found[match[1]], lines = _block(lines)
        else:
            found[match[1]] = _scalar(match[2])
    assert not lines or lines[0][0] < indent or lines[0][1].startswith("- ")
    return found, lines


def _scalar(text: str) -> Any:
    value = json.loads(text)
    assert isinstance(value, str | int | float)
    if isinstance(value, float) and "e" in text:
        assert "." in text  # else YAML 1.1 reads a string
    return value
