"""The types and required keys of a stage's recorded result.

``run.json`` may come from another version, a careless edit or a damaged disk. So results are checked once, here, when
they are read.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Mapping
from typing import Any

from dprandp.errors import CheckpointError

ONE_IMAGE = "one image"
"""A result's name of the unit of privacy if each image is one."""

_FRACTIONS = {"accuracy", "balanced_accuracy", "majority_accuracy", "auc", "knn_accuracy", "linear_accuracy"}
_NUMBERS = {
    "loss", "epsilon", "delta", "epsilon_target", "epsilon_total", "noise_multiplier", "sample_rate", "clip_norm",
    "expected_batch", "lr", "momentum", "share", "seconds", "images_per_second", "views_per_second",
    "extractor_scale", "alignment", "uniformity", "effective_rank",
}  # fmt: skip
_MAY_BE_MISSING = {
    "auc", "loss", "images_per_second", "views_per_second", "refit",
    "knn_accuracy", "linear_accuracy", "alignment", "uniformity", "effective_rank",
}  # fmt: skip
_COUNTS = {
    "count", "resolution", "steps", "attempt", "charged_steps", "lost_steps", "views", "train_examples",
    "test_examples", "parameters", "feature_dim", "prior_images",
}  # fmt: skip
_TEXTS = {
    "stage", "process", "arch", "data", "title", "accountant", "adjacency", "unit", "random", "released", "device",
    "source", "prior", "prior_sha256", "ledger_head", "clipping", "optimizer", "recipe", "init_sha256",
    "init_source", "public_part", "trained_weights", "extractor_colour", "noise", "precision",
}  # fmt: skip
_FLAGS = {"private", "mirror", "random_init"}

_REFIT = {"sample_rate", "steps", "lost_steps", "noise_multiplier", "clip_norm"}
"""Required keys of a refit of the head, for the disclosure."""

_PUBLIC_TRAINING = {"images": str, "examples": int, "steps": int, "mix": str, "switch": str, "head": str}
"""Required entries of the public part of ``continue``."""

_CHARGED = {
    "stage": str, "attempt": int, "sample_rate": float, "noise_multiplier": float, "clip_norm": float,
    "charged_steps": int,
}  # fmt: skip
"""The entries of each of ``also_charged``."""

PRIVATE = {
    "stage", "data", "title", "classes", "accuracy", "balanced_accuracy", "auc", "loss", "majority_accuracy",
    "confusion", "epsilon", "delta", "epsilon_target", "epsilon_total", "accountant", "noise_multiplier", "sample_rate",
    "steps", "clip_norm", "views", "expected_batch", "train_examples", "test_examples", "lr", "momentum", "seconds",
    "device", "private", "random", "released", "adjacency", "unit", "mirror", "charged_steps", "lost_steps",
    "also_charged", "ledger_head", "noise", "precision",
}  # fmt: skip
"""Required keys of a private stage: with fewer, the disclosure would be incomplete."""

NEEDED: dict[str, set[str]] = {
    "generate": {"process", "count", "resolution", "seconds"},
    "pretrain": {"arch", "feature_dim", "knn_accuracy", "seconds"},
    "continue": {"arch", "public_training", "precision", "seconds"},  # and those of a private stage, if it was one
    "probe": PRIVATE | {"share", "extractor_colour"},
    "finetune": PRIVATE,
}


def wrong_entry(result: Mapping[str, Any]) -> str | None:
    """The name of an entry of the wrong type, or None. Entries with unknown names may have any type.

    Args:
        result: as stored in run.json: infinities are the strings "inf" and "-inf", NaN is null.
    """
    for name, value in result.items():
        if not (value is None and name in _MAY_BE_MISSING) and not _fits(name, value):
            return name
    classes, confusion = result.get("classes"), result.get("confusion")
    if classes is not None and confusion is not None and len(confusion) != len(classes):
        return "confusion"
    return None


def refuse_gaps(stage: str, result: Mapping[str, Any]) -> None:
    """Refuse the result of a finished stage that lacks required keys.

    Raises:
        CheckpointError: the message names what is missing.
    """
    needed = NEEDED[stage] | ({"prior_sha256", "prior_images"} if "prior" in result else set())
    if stage == "continue" and "epsilon" in result:
        needed |= PRIVATE
    if result.get("unit", ONE_IMAGE) != ONE_IMAGE:
        needed |= {"train_units"}
    missing = sorted(needed - result.keys())
    if missing:
        raise CheckpointError(
            f"the recorded result of stage {stage!r} lacks {', '.join(missing)}",
            fix="use the version of dprandp that wrote it, or run the stage again with --overwrite; what was spent "
            "stays spent",
        )


def _fits(name: str, value: Any) -> bool:
    if name in _FRACTIONS:
        return type(value) in (int, float) and 0 <= value <= 1
    if name in _NUMBERS:
        return value in ("inf", "-inf") or (type(value) in (int, float) and abs(value) <= 1e300)
    if name in _COUNTS:
        return type(value) is int and 0 <= value < 2**63
    if name in _TEXTS:
        return isinstance(value, str) and not any(unicodedata.category(letter) in ("Cc", "Cs") for letter in value)
    if name in _FLAGS:
        return isinstance(value, bool)
    if name == "classes":
        return isinstance(value, list) and all(isinstance(item, str) for item in value)
    if name == "confusion":
        rows = isinstance(value, list) and all(isinstance(row, list) and len(row) == len(value) for row in value)
        return rows and all(type(count) is int and 0 <= count < 2**63 for row in value for count in row)
    if name == "public_training":
        return isinstance(value, dict) and all(type(value.get(key)) is kind for key, kind in _PUBLIC_TRAINING.items())
    if name == "also_charged":
        rows = isinstance(value, list) and all(isinstance(row, dict) and row.keys() == _CHARGED.keys() for row in value)
        return rows and all(type(row[key]) in (kind, int) if kind is float else type(row[key]) is kind
                            for row in value for key, kind in _CHARGED.items())  # fmt: skip
    if name == "refit":
        return isinstance(value, dict) and value.keys() >= _REFIT and all(_fits(*entry) for entry in value.items())
    return True
