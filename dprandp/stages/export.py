"""A copy of ``model/`` to hand on: the three releasable files as they were verified, and an example that loads them."""

from __future__ import annotations

import io
import zipfile
from pathlib import Path
from typing import Any

from dprandp.errors import CheckpointError, UsageError
from dprandp.files import atomic_write, storage_errors
from dprandp.stages.release import MODEL_FILES
from dprandp.stages.released_model import ReleasedModel

EXAMPLE_FILE = "example.py"
EXPORTED_FILES = (*MODEL_FILES, EXAMPLE_FILE)
"""The allow-list of an export; a test holds it."""

EXAMPLE = '''"""Classify images with the model in this folder: python example.py IMAGE...

Needs dprandp (pip install dprandp).{stamp}"""

import sys
from pathlib import Path

from dprandp.stages.predict import predict
from dprandp.stages.released_model import load_model

model = load_model(Path(__file__).parent)  # checks the files' hashes; they hold numbers and text, no code
for row in predict(model, [Path(name) for name in sys.argv[1:]]):
    print(row["image"], row["class"], round(row["probability"], 4))
'''


def export(model: ReleasedModel, target: Path, *, allow_not_private: bool = False) -> dict[str, Any]:
    """Write a copy of a verified model.

    Args:
        model: see ``load_model``; its bytes in memory are what is written, so nothing can change in between.
        target: a folder that is new or empty, or a new file ending in ``.zip``.
        allow_not_private: consent to hand on a model without a guarantee. It stays stamped NOT PRIVATE.

    Guarantee:
        Nothing but ``EXPORTED_FILES`` is written, and every byte of them is releasable.

    Returns:
        export (path), files (names), bytes (in all), private, epsilon, delta.

    Raises:
        UsageError: the target exists, or the model is not private and no consent was given.
        CheckpointError: a model that is not private has a card that does not say so. StorageError: the disk refuses.
    """
    reason = model.not_private_because
    if reason is not None and not allow_not_private:
        raise UsageError(
            f"this model is NOT PRIVATE: {reason}",
            fix="make a private one with a finite --eps, or give --allow-not-private and handle the export as you "
            "handle the training images",
        )
    if reason is not None and b"NOT PRIVATE" not in model.content["MODEL_CARD.md"]:
        raise CheckpointError(
            "the model is NOT PRIVATE, but its MODEL_CARD.md does not say so", fix="restore model/ from a copy"
        )
    stamp = "" if reason is None else f"\n\nNOT PRIVATE. {reason}\n"
    content = {**model.content, EXAMPLE_FILE: EXAMPLE.format(stamp=stamp).encode("utf-8")}
    if target.suffix.lower() == ".zip":
        if target.exists():
            raise UsageError(f"{target} exists", fix="give another name, or delete it first")
        with storage_errors(target.parent, "create"):
            target.parent.mkdir(parents=True, exist_ok=True)
        atomic_write(target, _zipped(content, target.stem))
    else:
        if target.exists() and (not target.is_dir() or any(target.iterdir())):
            raise UsageError(f"{target} exists and is no empty folder", fix="give a new folder, or a name ending .zip")
        with storage_errors(target, "create"):
            target.mkdir(parents=True, exist_ok=True)
        for name in EXPORTED_FILES:
            atomic_write(target / name, content[name])
    return {
        "export": str(target),
        "files": list(EXPORTED_FILES),
        "bytes": sum(map(len, content.values())),
        "private": reason is None,
        "epsilon": model.result["epsilon"],
        "delta": model.result["delta"],
    }


def export_line(result: dict[str, Any]) -> str:
    """``export`` for people."""
    size = f"{len(result['files'])} files, {result['bytes'] / 1e6:.1f} MB"
    stamp = f"ε = {result['epsilon']:.4g}, δ = {result['delta']:g}" if result["private"] else "NOT PRIVATE"
    return f"export: {result['export']} ({size}; {stamp})"


def _zipped(content: dict[str, bytes], folder: str) -> bytes:
    """A zip with one folder; the same bytes for the same content."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in EXPORTED_FILES:
            archive.writestr(zipfile.ZipInfo(f"{folder}/{name}"), content[name], zipfile.ZIP_DEFLATED)
    return buffer.getvalue()
