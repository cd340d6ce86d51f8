"""The head of a model card: facts in YAML, as hubs of models read them.

The YAML is written here rather than by a library: mappings and lists in block style, numbers, and strings that are all
in double quotes, as in JSON, so that nothing in them can be taken for syntax.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from typing import Any

from dprandp.config.declared import Publication
from dprandp.report.disclosure import why_not_private
from dprandp.runs.results import PrivateResult

IDENTIFIER = re.compile(r"[a-z0-9]+([.-][a-z0-9]+)*")
"""A licence of which hubs know the name; any other text is called ``other`` there, with the text as its name."""

_HEAD = re.compile(r"\A---\n.*?\n---\n+", re.DOTALL)


def head(result: PrivateResult, about: Publication) -> str:
    """The head of a result's card, with the lines ``---`` around it."""
    return f"---\n{yaml(_facts(result, about))}---\n\n"


def without_head(card: str) -> str:
    """A card without its head, if it has one."""
    return _HEAD.sub("", card)


def default_title(result: PrivateResult) -> str:
    """The title of a card where the publisher gives none."""
    return f"image classifier for {result.title}"


def _facts(result: PrivateResult, about: Publication) -> dict[str, Any]:
    private = why_not_private(result) is None
    licence: dict[str, Any] = {}
    if about.license is not None:
        known = IDENTIFIER.fullmatch(about.license.lower()) is not None
        licence = {"license": about.license.lower()} if known else {"license": "other", "license_name": about.license}
    measured = {
        "accuracy": result.accuracy, "balanced_accuracy": result.balanced_accuracy, "roc_auc": result.auc,
        "loss": result.loss,
    }  # fmt: skip
    metrics = [{"type": name, "value": value} for name, value in measured.items() if _finite(value)]
    data = {"name": result.title, "type": result.data, "split": "test"}
    return {
        **licence,
        "library_name": "dprandp",
        "pipeline_tag": "image-classification",
        "tags": ["image-classification", "differential-privacy" if private else "not-private", "dp-randp"],
        "metrics": [each["type"] for each in metrics],
        "model-index": [
            {
                "name": about.title or default_title(result),
                "results": [{"task": {"type": "image-classification"}, "dataset": data, "metrics": metrics}],
            }
        ],
        "differential_privacy": {
            "private": private,
            "epsilon": result.epsilon if math.isfinite(result.epsilon) else "inf",
            "delta": result.delta,
            "unit": result.unit,
            "adjacency": result.adjacency,
        },
    }


def _finite(value: float | None) -> bool:
    return value is not None and math.isfinite(value)


def yaml(facts: Mapping[str, Any], indent: str = "") -> str:
    """A mapping in block style. Its values are mappings, lists of mappings or strings, strings, numbers, booleans."""
    lines = []
    for key, value in facts.items():
        if isinstance(value, Mapping):
            lines.append(f"{indent}{key}:\n{yaml(value, indent + '  ')}")
        elif isinstance(value, list):
            lines.append(f"{indent}{key}:\n")
            for each in value:
                item = yaml(each, indent + "  ") if isinstance(each, Mapping) else f"{indent}  {scalar(each)}\n"
                lines.append(f"{indent}- {item[len(indent) + 2 :]}")
        else:
            lines.append(f"{indent}{key}: {scalar(value)}\n")
    return "".join(lines)


def scalar(value: str | float | bool) -> str:
    """A string in double quotes, a number with a point where it has an exponent, true or false."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        flat = " ".join(value.split())
        text = json.dumps("".join(each if each.isprintable() else "\ufffd" for each in flat), ensure_ascii=False)
        return text.replace("<", "\\u003c").replace(">", "\\u003e")  # a viewer of Markdown may show the head as HTML
    text = repr(value)
    # YAML 1.1 takes 1e-05 for a string
    return text if "e" not in text or "." in text else text.replace("e", ".0e")
