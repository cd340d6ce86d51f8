"""Many images to classify: folders as they are, in blocks, past images that cannot be read, into a file.

Memory is bounded by a block of images, whatever their number and size.
"""

from __future__ import annotations

import contextlib
import csv
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dprandp.data import image_files, npz_blocks, read_unlabelled
from dprandp.data import skipped_text as skipped_text
from dprandp.errors import InputError, UsageError
from dprandp.runs.files import atomic_path, to_json

if TYPE_CHECKING:
    from dprandp.release import ReleasedModel

Row = dict[str, Any]
"""image (its name), class, probability (of that class), probabilities (class -> number); of a model of several labels
an image: image, labels (names of those with a probability above ``THRESHOLD``), probabilities. Of an image that cannot
be read all but its name are None, and ``error`` says what is wrong."""

THRESHOLD = 0.5

BLOCK = 256
"""Images that are read, classified and written at a time."""


def predictions(
    model: ReleasedModel,
    images: Sequence[Path] = (),
    data: str | None = None,
    on_skipped: Callable[[dict[str, int]], object] = lambda kinds: None,
    *,
    strict: bool = False,
) -> Iterator[list[Row]]:
    """The most probable class, or the labels, of each image, in blocks of rows.

    Args:
        images: image files of any size, and folders: every image file below, at any depth, by path.
        data: further images, ``npz:PATH`` (see ``npz_blocks``) or ``folder:PATH``.
        on_skipped: called once with the number of files of each kind that were skipped, where there are any.
        strict: refuse an image that cannot be read, rather than give a row that says so.

    Raises:
        InputError: a folder or an ``npz`` file is missing, or holds no image; and of ``strict``, later.
        UsageError: there is no image, or ``data`` is neither kind.
    """
    kind, _, rest = (data or "").partition(":")
    if data is not None and (kind not in ("folder", "npz") or not rest):
        raise UsageError(f"--data {data!r} names no images to classify", fix="give npz:PATH, folder:PATH, or files")
    folder = Path(rest).expanduser() if kind == "folder" else None
    files: list[Path] = []
    skipped: Counter[str] = Counter()
    for path in [*map(Path, images), *([] if folder is None else [folder])]:
        if path.is_dir() or path is folder:  # one that is missing is refused
            found, kinds = image_files(path)
            files += found
            skipped.update(kinds)
        else:
            files.append(path)
    if skipped:
        on_skipped(dict(skipped.most_common()))
    if not files and kind != "npz":
        raise UsageError("there is no image to classify", fix="name image files, or give --data npz:PATH | folder:PATH")
    arrays = npz_blocks(rest, model.shape, BLOCK) if kind == "npz" else ()
    return _blocks(model, files, arrays, strict)


def _blocks(
    model: ReleasedModel, files: list[Path], arrays: Iterable[tuple[list[str], np.ndarray]], strict: bool
) -> Iterator[list[Row]]:
    for start in range(0, len(files), BLOCK):
        block = files[start : start + BLOCK]
        pixels, errors = [], {}
        for path in block:
            try:
                pixels.append(read_unlabelled(path, model.shape, model.decoding))
            except InputError as error:
                if strict:
                    raise
                errors[path] = error.problem
        names = [str(path) for path in block if path not in errors]
        rows = iter(classified(model, names, np.stack(pixels)) if pixels else ())
        yield [failed(str(path), errors[path], model.multi_label) if path in errors else next(rows) for path in block]
    for names, images in arrays:
        yield classified(model, names, images)


def classified(model: ReleasedModel, names: Sequence[str], pixels: np.ndarray) -> list[Row]:
    """The rows of images, uint8 [N, height, width, channels] of the model's shape."""
    rows = []
    for name, row in zip(names, model.probabilities(pixels).tolist(), strict=True):
        probabilities = dict(zip(model.classes, row, strict=True))
        if model.multi_label:
            labels = [label for label, value in probabilities.items() if value > THRESHOLD]
            rows.append({"image": name, "labels": labels, "probabilities": probabilities})
            continue
        best = max(probabilities, key=probabilities.__getitem__)
        rows.append({"image": name, "class": best, "probability": probabilities[best], "probabilities": probabilities})
    return rows


def failed(name: str, error: str, multi_label: bool) -> Row:
    """The row of an image that cannot be read."""
    return {"image": name, **dict.fromkeys(answers(multi_label)), "probabilities": None, "error": error}


def answers(multi_label: bool) -> tuple[str, ...]:
    """What a row has beside image and probabilities."""
    return ("labels",) if multi_label else ("class", "probability")


# -------------------------------------------------------------------------------------------------------------- output

TEXT = {"encoding": "utf-8", "errors": "backslashreplace"}
"""A file's name may be no valid text; in JSON such an escape stands for the same name."""


class Lines:
    """Rows for people: one line per image, aligned; a column never becomes narrower from block to block."""

    def __init__(self) -> None:
        self._wide = self._long = 0

    def __call__(self, rows: Sequence[Row]) -> str:
        named = [row for row in rows if "error" not in row]
        self._wide = max([self._wide, *(len(row["image"]) for row in rows)])
        self._long = max([self._long, *(len(row["class"]) for row in named if "class" in row)])
        return "\n".join(f"{row['image']:<{self._wide}}  {self._said(row)}" for row in rows)

    def _said(self, row: Row) -> str:
        if "error" in row:
            return f"error: {row['error']}"
        if "class" in row:
            return f"{row['class']:<{self._long}}  {row['probability']:.4f}"
        values = row["probabilities"]
        best = max(values, key=values.__getitem__)
        said = ", ".join(f"{label} {values[label]:.4f}" for label in row["labels"])
        return said or f"none above {THRESHOLD:g}; the most probable is {best} {values[best]:.4f}"


def answer(
    model: ReleasedModel,
    blocks: Iterator[list[Row]],
    out: Path | None,
    *,
    keep: bool,
    say: Callable[[str], object],
    skipped: Mapping[str, int],
) -> dict[str, Any]:
    """Write the rows to a file, or say them, block by block.

    Args:
        out: None: say lines. keep: return the rows that are not written to a file.

    Returns:
        data, private, out, predictions (None where they were not kept), images, unreadable, skipped_files,
        skipped_kinds; and epsilon and run_epsilon where the run has spent more than the model's result states.

    Raises:
        UsageError: see ``refuse_target``. StorageError: the disk refuses.
    """
    about = {"data": model.result.data, "private": model.not_private_because is None}
    since = {} if model.run_epsilon is None else {"epsilon": model.result.epsilon, "run_epsilon": model.run_epsilon}
    kept: list[Row] | None = [] if keep and out is None else None
    lines, images, unreadable = Lines(), 0, 0
    with contextlib.nullcontext() if out is None else WRITERS[out.suffix.lower()](out, model, about) as write:
        for rows in blocks:
            images += len(rows)
            unreadable += sum("error" in row for row in rows)
            if write is not None:
                write(rows)
            elif kept is not None:
                kept += rows
            else:
                say(lines(rows))
    return {
        **about,
        **since,
        "out": None if out is None else str(out),
        "predictions": kept,
        "images": images,
        "unreadable": unreadable,
        "skipped_files": sum(skipped.values()),
        "skipped_kinds": dict(skipped),
    }


def refuse_target(out: Path, overwrite: bool) -> None:
    """Refuse (UsageError) a file that exists, or whose name does not say what to write."""
    suffix = out.suffix.lower()
    if suffix not in WRITERS:
        raise UsageError(
            f"--out {out} does not say what to write: its name ends in {suffix or 'nothing'}",
            fix="give a name ending in .csv or .json",
        )
    if out.exists() and not overwrite:
        raise UsageError(f"{out} exists", fix="give another name, or --overwrite")


@contextmanager
def _csv(path: Path, model: ReleasedModel, about: Mapping[str, Any]) -> Iterator[Callable[[Sequence[Row]], None]]:
    """image, class and probability or labels (with | between them), the probability of every class or label under its
    name, error (empty where there is none)."""
    classes, told = model.classes, answers(model.multi_label)
    with atomic_path(path) as temporary, open(temporary, "w", newline="", **TEXT) as stream:
        writer = csv.writer(stream, lineterminator="\n")
        writer.writerow(["image", *told, *classes, "error"])

        def write(rows: Sequence[Row]) -> None:
            for row in rows:
                if "error" in row:
                    writer.writerow([row["image"], *[""] * (len(told) + len(classes)), row["error"]])
                    continue
                cells = [*(row[name] for name in told), *row["probabilities"].values()]
                writer.writerow([row["image"], *map(_cell, cells), ""])

        yield write
        stream.flush()


def _cell(value: str | float | list[str]) -> str:
    if isinstance(value, list):
        return "|".join(value)
    return value if isinstance(value, str) else f"{value:.6g}"


@contextmanager
def _json(path: Path, model: ReleasedModel, about: Mapping[str, Any]) -> Iterator[Callable[[Sequence[Row]], None]]:
    """One object: ``about``, then ``predictions``, a list with a row a line."""
    with atomic_path(path) as temporary, open(temporary, "w", **TEXT) as stream:
        stream.write(to_json(dict(about)).removesuffix("}") + ', "predictions": [')
        between = "\n"

        def write(rows: Sequence[Row]) -> None:
            nonlocal between
            for row in rows:
                stream.write(between + to_json(row))
                between = ",\n"

        yield write
        stream.write("\n]}\n")
        stream.flush()


WRITERS = {".csv": _csv, ".json": _json}
