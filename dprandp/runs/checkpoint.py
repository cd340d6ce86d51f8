"""Checkpoints as data: one safetensors file each, with the stage's own numbers and a hash in its header.

A checkpoint NAME in a folder is ``NAME.safetensors``. Its header's metadata hold, as JSON, the caller's ``meta`` and
the sha256 of tensors and ``meta``. ``LATEST`` holds the name of the newest whole one. Nothing here can run code:
safetensors is a header and raw numbers. Both files are written atomically and in this order, so a process killed
anywhere leaves ``LATEST`` on a checkpoint that loads.

Age is the order of names with their digits read as numbers (``step-9`` before ``step-10``), not a time, so that an
interrupted and resumed run leaves the same bytes as an uninterrupted one.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import safetensors.torch
import torch
from safetensors import SafetensorError

from dprandp.errors import CheckpointError
from dprandp.runs import faults
from dprandp.runs.directory import PRIVATE_STAGES
from dprandp.runs.files import atomic_write, from_json, storage_errors, to_json

FORMAT = 2
KEY = "dprandp"
MOST_HEADER = 10**8
"""Bytes that safetensors allows for a header."""
"""Of the header's metadata."""
POINTER = "LATEST"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_START_AGAIN = "resume from an older checkpoint with --resume, or restart this stage with --overwrite"


class DamagedCheckpointError(CheckpointError):
    """The file has changed since it was written (as opposed to an intact file of another configuration)."""


def tensors_to_bytes(tensors: Mapping[str, torch.Tensor], metadata: dict[str, str] | None = None) -> bytes:
    """The bytes of a safetensors file, which depend only on the values, not on device, strides or shared storage.

    Args:
        tensors: name -> dense tensor of any shape and dtype; not changed.
        metadata: of the header.
    """
    return safetensors.torch.save(_plain(tensors), metadata)


def _plain(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Contiguous copies on the CPU that share no memory."""
    as_is = torch.contiguous_format
    return {name: tensor.detach().cpu().clone(memory_format=as_is) for name, tensor in tensors.items()}


def tensors_from_bytes(data: bytes, path: Path | str) -> dict[str, torch.Tensor]:
    """Parse the bytes of a safetensors file into CPU tensors; ``path`` is for the message.

    Raises:
        DamagedCheckpointError: not a whole safetensors file.
    """
    try:
        return safetensors.torch.load(data)
    except (SafetensorError, ValueError, KeyError, TypeError) as error:
        raise DamagedCheckpointError(
            f"{path} is not a whole safetensors file: {error}", fix="restore it from a copy, or make it again"
        ) from error


def check_tensors(
    tensors: Mapping[str, torch.Tensor], expect: Mapping[str, Sequence[int] | torch.Tensor], path: Path | str
) -> None:
    """Refuse the tensors of a file that do not fit a configuration: name -> shape, or a tensor of that shape and dtype.

    Raises:
        CheckpointError: a tensor is missing, unexpected, or of another shape or dtype; the message names it.
    """
    for name, wanted in expect.items():
        found = tensors.get(name)
        if found is None:
            _refuse(path, f"has no tensor {name!r}")
        shape = tuple(wanted.shape) if isinstance(wanted, torch.Tensor) else tuple(wanted)
        if tuple(found.shape) != shape:
            _refuse(path, f"holds tensor {name!r} with shape {tuple(found.shape)}; the configuration needs {shape}")
        if isinstance(wanted, torch.Tensor) and found.dtype != wanted.dtype:
            _refuse(path, f"holds tensor {name!r} as {found.dtype}; the configuration needs {wanted.dtype}")
    unexpected = sorted(set(tensors) - set(expect))
    if unexpected:
        _refuse(path, f"holds tensor {unexpected[0]!r}, which the configuration does not have")


def _refuse(path: Path | str, problem: str) -> NoReturn:
    raise CheckpointError(
        f"{path} {problem}",
        fix="use the configuration the file was made with, or restart the stage with --overwrite",
    )


@dataclass(frozen=True)
class Checkpoint:
    """A loaded checkpoint: tensors on the CPU, the JSON values given to ``save``, and the file."""

    tensors: dict[str, torch.Tensor]
    meta: dict[str, Any]
    path: Path

    @property
    def name(self) -> str:
        return self.path.stem

    def entry(self, name: str, kind: type) -> Any:
        """``meta[name]``, of this very type.

        Raises:
            CheckpointError: it is missing or of another type: another version wrote this.
        """
        value = self.meta.get(name)
        if type(value) is not kind:
            raise CheckpointError(
                f"the description of the checkpoint {self.path} has no usable entry {name!r}",
                fix="use the version of dprandp that wrote it, or restart the stage with --overwrite",
            )
        return value


def save(
    directory: Path | str, name: str, tensors: Mapping[str, torch.Tensor], meta: Mapping[str, Any], *, keep: int = 2
) -> Path:
    """Write checkpoint ``name``, point LATEST at it, and remove all but the ``keep`` newest.

    Checkpoints whose name sorts after ``name`` are removed too: the run went back to an older checkpoint since.

    Args:
        directory: an existing folder.
        name: letters, digits, ``.``, ``_``, ``-``; must sort by age, digits read as numbers: ``step-000100``.
        tensors: name -> tensor of any dtype, shape and device; not changed.
        meta: JSON values (infinities are stored as the strings "inf" and "-inf", NaN as null).
        keep: at least 1; the second is for a damaged newest one.

    Raises:
        StorageError: the disk refuses; LATEST still names a whole checkpoint, usually the previous one.
    """
    directory = Path(directory)
    path = directory / f"{name}.safetensors"
    plain, kept = _plain(tensors), json.loads(to_json(dict(meta)))
    description = {"format": FORMAT, "sha256": _digest(plain, kept), "meta": kept}
    atomic_write(path, safetensors.torch.save(plain, {KEY: json.dumps(description, sort_keys=True)}))
    atomic_write(directory / POINTER, name + "\n")
    faults.point("pointer-moved")
    _remove_all_but(directory, name, keep)
    return path


def available(directory: Path | str) -> list[str]:
    """Names of the checkpoints in a folder, newest first, LATEST before all others, including damaged ones."""
    directory = Path(directory)
    found = [path.stem for path in directory.glob("*.safetensors") if _NAME.fullmatch(path.stem)]
    names, newest = sorted(found, key=_age, reverse=True), latest(directory)
    return names if newest is None else [newest, *(name for name in names if name != newest)]


def latest(directory: Path | str) -> str | None:
    """The name in LATEST, or None when there is no such file or it holds no name."""
    pointer = Path(directory) / POINTER
    if not pointer.exists():
        return None
    with storage_errors(pointer, "read"):
        name = pointer.read_bytes().decode("utf-8", errors="replace").strip()
    return name if _NAME.fullmatch(name) else None


def load(directory: Path | str, name: str | None = None) -> Checkpoint:
    """Read a checkpoint, and check its hash.

    Args:
        directory: the folder given to ``save``.
        name: of the checkpoint; None: the one that LATEST names.

    Raises:
        CheckpointError: none there; damaged (truncated, bits flipped, unreadable JSON), or written by a newer version.
            The message names the file.
    """
    name = name or latest(directory)
    if name is None:
        raise CheckpointError(
            f"there is no checkpoint in {directory}: no {POINTER} that names one",
            fix="run the stage that writes it first",
        )
    return _load_whole(Path(directory) / f"{name}.safetensors")


def resume(directory: Path | str, *, warn: Callable[[str], None]) -> Checkpoint | None:
    """Load the state of an interrupted stage: the newest whole checkpoint.

    Args:
        directory: the folder given to ``save``.
        warn: called for each damaged file in place of which an older one is used.

    Returns:
        None if the stage was stopped before its first checkpoint was complete, so that it starts at step 0.

    Raises:
        CheckpointError: LATEST exists and no whole checkpoint does, or one was written by a newer version.
    """
    directory, problems = Path(directory), []
    if latest(directory) is None:
        problems.append(f"{directory / POINTER} is missing or names no checkpoint")
    for name in available(directory):
        try:
            checkpoint = _load_whole(directory / f"{name}.safetensors")
        except DamagedCheckpointError as error:
            problems.append(error.problem)
            continue
        for problem in problems:
            warn(f"{problem}; continuing with the checkpoint {name}")
        return checkpoint
    if not (directory / POINTER).exists():
        return None  # killed while writing the very first one
    raise DamagedCheckpointError(
        f"no whole checkpoint is left in {directory}: " + "; ".join(problems), fix="restart this stage with --overwrite"
    )


def load_finished(directory: Path | str, name: str, stage: str) -> Checkpoint:
    """``load`` the checkpoint of a finished stage for a later one; errors name the stage that made it.

    Raises:
        CheckpointError: as ``load``.
    """
    try:
        return load(directory, name)
    except DamagedCheckpointError as error:
        cost = "; repeating a private stage is charged again" if stage in PRIVATE_STAGES else ""
        raise CheckpointError(
            error.problem, fix=f"restore it from a copy, or make it again: dprandp {stage} --overwrite{cost}"
        ) from error


def _load_whole(path: Path) -> Checkpoint:
    if not path.is_file():
        raise DamagedCheckpointError(f"the checkpoint file {path} is missing", fix=_START_AGAIN)
    with storage_errors(path, "read"):
        data = path.read_bytes()
    try:
        tensors = tensors_from_bytes(data, path)
    except DamagedCheckpointError as error:
        raise DamagedCheckpointError(error.problem, fix=_START_AGAIN) from error
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    try:
        description = from_json(header["__metadata__"][KEY].encode())
    except (KeyError, ValueError):
        description = None
    description = description if isinstance(description, dict) else {}
    form, meta = description.get("format"), description.get("meta")
    if type(form) is int and form != FORMAT:
        raise CheckpointError(
            f"{path} has format {form}; this version reads {FORMAT}",
            fix="use the version of dprandp that wrote it, or start the stage afresh with --overwrite",
        )
    if form is None or not isinstance(meta, dict) or description.get("sha256") != _digest(tensors, meta):
        raise DamagedCheckpointError(
            f"the checkpoint {path} is damaged: its sha256 differs from the recorded one", fix=_START_AGAIN
        )
    return Checkpoint(tensors, meta, path)


def description_of(path: Path) -> dict[str, Any]:
    """The ``meta`` of any safetensors file that says it is a checkpoint, unchecked; else empty."""
    try:
        with storage_errors(path, "read"), path.open("rb") as file:
            header = json.loads(file.read(min(int.from_bytes(file.read(8), "little"), MOST_HEADER)))
        meta = from_json(header["__metadata__"][KEY].encode())["meta"]
    except (KeyError, ValueError, TypeError, AttributeError, RecursionError):
        return {}
    return meta if isinstance(meta, dict) else {}


def _digest(tensors: Mapping[str, torch.Tensor], meta: Mapping[str, Any]) -> str:
    """SHA-256 of contiguous CPU tensors, with their names, types and shapes, and of ``meta``."""
    digest = hashlib.sha256(json.dumps(meta, sort_keys=True).encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"\n{json.dumps(name)} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def _age(name: str) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"([0-9]+)", name)]


def _remove_all_but(directory: Path, newest: str, keep: int) -> None:
    older = [name for name in available(directory) if name != newest and _age(name) < _age(newest)]
    kept = {newest, *older[: keep - 1]}
    for path in directory.glob("*.safetensors"):
        if path.stem not in kept and _NAME.fullmatch(path.stem):
            with storage_errors(path, "remove"):
                path.unlink()
