"""Classify new images with a released model. Reads ``model/`` and the images, and nothing else of a run."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from dprandp.datasets import read_unlabelled, skipped_text
from dprandp.stages.released_model import ReleasedModel

__all__ = ["predict", "prediction_csv", "prediction_lines", "skipped_text"]


def predict(
    model: ReleasedModel,
    images: Sequence[Path] = (),
    data: str | None = None,
    on_skipped: Callable[[dict[str, int]], object] = lambda kinds: None,
) -> list[dict[str, Any]]:
    """The most probable class of each image.

    Args:
        model: see ``load_model``.
        images: image files of any size.
        data: further images, ``npz:PATH`` or ``folder:PATH``; see ``read_unlabelled``.
        on_skipped: called with the number of files of each kind that were skipped, where there are any.

    Returns:
        One row per image: image (its name), class, probability (of that class), probabilities (class -> number).

    Raises:
        InputError: an image is missing or damaged. UsageError: there is none.
    """
    names, pixels = read_unlabelled(images, data, model.shape, on_skipped)
    table = model.probabilities(pixels)
    rows = []
    for name, row in zip(names, table.tolist(), strict=True):
        best = max(range(len(row)), key=row.__getitem__)
        probabilities = dict(zip(model.classes, row, strict=True))
        rows.append({"image": name, "class": model.classes[best], "probability": row[best],
                     "probabilities": probabilities})  # fmt: skip
    return rows


def prediction_lines(rows: list[dict[str, Any]]) -> str:
    """``predict`` for people: one line per image, aligned."""
    wide = max(len(row["image"]) for row in rows)
    long = max(len(row["class"]) for row in rows)
    return "\n".join(f"{row['image']:<{wide}}  {row['class']:<{long}}  {row['probability']:.4f}" for row in rows)


def prediction_csv(rows: list[dict[str, Any]]) -> str:
    """``predict`` as CSV: image, class, probability, then the probability of every class under its name."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["image", "class", "probability", *rows[0]["probabilities"]])
    for row in rows:
        numbers = [row["probability"], *row["probabilities"].values()]
        writer.writerow([row["image"], row["class"], *(f"{value:.6g}" for value in numbers)])
    return text.getvalue()
