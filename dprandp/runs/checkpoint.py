"""Checkpoints as data: tensors in safetensors, everything else in JSON, with a hash of the tensors.

A checkpoint NAME in a folder is ``NAME.safetensors`` and, beside it, ``NAME.json`` with the sha256, size, shapes and
dtypes of the tensors and the caller's ``meta``. ``LATEST`` holds the name of the newest whole one. Nothing here can run
code: safetensors is a header and raw numbers. Files are written atomically and in this order, so a process killed
anywhere leaves ``LATEST`` on a checkpoint that loads.

Age is the order of names with their digits read as numbers (``step-9`` before ``step-10``), not a time, so that an
interrupted and resumed run leaves the same bytes as an uninterrupted one.
"""

from __future__ import annotations

import hashlib
import json
import logging
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
from dprandp.runs.files import atomic_write, file_sha256, from_json, storage_errors, to_json

# ---------------------------------------------------------------------------------------------------------- tensorfile
#
# Tensors in one safetensors file: to bytes, from bytes, and the check against a configuration.
#
# A safetensors file is a JSON header and raw numbers; reading one runs no code. Used by ``checkpoint`` and for the
# released model.


class DamagedCheckpointError(CheckpointError):
    """The file has changed since it was written (as opposed to an intact file of another configuration)."""


def tensors_to_bytes(tensors: Mapping[str, torch.Tensor]) -> bytes:
    """The bytes of a safetensors file, which depend only on the values, not on device, strides or shared storage.

    Args:
        tensors: name -> dense tensor of any shape and dtype; not changed.
    """
    plain = {
        name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()
    }
    return safetensors.torch.save(plain)


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
    """Refuse tensors that do not fit a configuration.

    Args:
        tensors: the content of ``path``.
        expect: name -> required shape, or a tensor whose shape and dtype are required.
        path: the file, for the message.

    Raises:
        CheckpointError: a tensor is missing, unexpected, or of another shape or dtype. The message names file and
            tensor.
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


FORMAT = 1
POINTER = "LATEST"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_START_AGAIN = "resume from an older checkpoint with --resume, or restart this stage with --overwrite"


@dataclass(frozen=True)
class Checkpoint:
    """A loaded checkpoint.

    Attributes:
        tensors: name -> tensor, on the CPU.
        meta: the JSON values given to ``save`` (tuples have become lists).
        path: the ``.safetensors`` file it came from.
    """

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
        keep: number of checkpoints to leave, at least 1; the second is for a damaged newest one.

    Returns:
        The path of the ``.safetensors`` file.

    Raises:
        StorageError: the disk refuses; LATEST still names a whole checkpoint, usually the previous one.
    """
    if not _NAME.fullmatch(name) or name == POINTER or keep < 1:
        raise ValueError(f"bad checkpoint name {name!r} or keep {keep}")
    directory = Path(directory)
    path, sidecar = directory / f"{name}.safetensors", directory / f"{name}.json"
    data = tensors_to_bytes(tensors)
    record = {
        "format": FORMAT,
        "sha256": hashlib.sha256(data).hexdigest(),
        "bytes": len(data),
        "tensors": {key: _describe(tensor) for key, tensor in sorted(tensors.items())},
        "meta": dict(meta),
    }
    if path.exists() and sidecar.exists():
        # Two files cannot be replaced in one step. In between, the sidecar describes both contents.
        old = _record_of(file_sha256(path), _read_json_or_none(sidecar))
        if old is not None:
            atomic_write(sidecar, _sealed({**record, "superseded": old}))
    atomic_write(path, data)
    atomic_write(sidecar, _sealed(record))
    atomic_write(directory / POINTER, name + "\n")
    faults.point("pointer-moved")
    _remove_all_but(directory, name, keep)
    return path


def available(directory: Path | str) -> list[str]:
    """Names of the checkpoints in a folder, newest first, LATEST before all others, including damaged ones."""
    directory = Path(directory)
    found = [path.stem for path in directory.glob("*.safetensors") if _NAME.fullmatch(path.stem)]
    names = sorted(found, key=_age, reverse=True)
    newest = latest(directory)
    if newest is None:
        return names
    return [newest, *(name for name in names if name != newest)]


def latest(directory: Path | str) -> str | None:
    """The name in LATEST, or None when there is no such file or it holds no name."""
    pointer = Path(directory) / POINTER
    if not pointer.exists():
        return None
    with storage_errors(pointer, "read"):
        name = pointer.read_bytes().decode("utf-8", errors="replace").strip()
    return name if _NAME.fullmatch(name) else None


def load(
    directory: Path | str,
    name: str | None = None,
    expect: Mapping[str, Sequence[int] | torch.Tensor] | None = None,
    *,
    fallback: bool = False,
    warn: Callable[[str], None] | None = None,
) -> Checkpoint:
    """Read a checkpoint, check its hash, and check it against what the caller needs.

    Args:
        directory: the folder given to ``save``.
        name: of the checkpoint; None: the one that LATEST names.
        expect: tensor name -> required shape, or a tensor whose shape and dtype are required. None: no check.
        fallback: if the file is damaged, use the next older whole one, and call ``warn``.
        warn: called with the warning; default ``logging``.

    Raises:
        CheckpointError: none there; damaged (truncated, bits flipped, unreadable JSON); written by a newer version; or
            a tensor missing, unexpected, or of another shape or dtype. The message names the file and the tensor.
    """
    directory = Path(directory)
    warn = warn or logging.getLogger(__name__).warning
    if name is None:
        name = latest(directory)
        candidates = available(directory) if fallback else [name] if name else []
    else:
        candidates = [name, *(other for other in available(directory) if _age(other) < _age(name))]
    if not candidates:
        raise CheckpointError(
            f"there is no checkpoint in {directory}: no {POINTER} that names one",
            fix="run the stage that writes it first",
        )
    problems: list[str] = [] if name else [f"{directory / POINTER} is missing or names no checkpoint"]
    for candidate in candidates:
        try:
            checkpoint = _load_whole(directory / f"{candidate}.safetensors")
        except DamagedCheckpointError as error:
            if not fallback:
                raise
            problems.append(error.problem)
            continue
        for problem in problems:
            warn(f"{problem}; continuing with the checkpoint {candidate}")
        if expect is not None:
            check_tensors(checkpoint.tensors, expect, checkpoint.path)
        return checkpoint
    raise DamagedCheckpointError(
        f"no whole checkpoint is left in {directory}: " + "; ".join(problems),
        fix="restart this stage with --overwrite",
    )


def resume(
    directory: Path | str,
    expect: Mapping[str, Sequence[int] | torch.Tensor] | None = None,
    *,
    warn: Callable[[str], None] | None = None,
) -> Checkpoint | None:
    """Load the state of an interrupted stage: ``load`` with ``fallback``.

    Returns:
        The newest whole checkpoint, or None if the stage was stopped before its first checkpoint was complete, so that
        it starts at step 0.

    Raises:
        CheckpointError: as ``load``; also when LATEST exists and no whole checkpoint does.
    """
    if not (Path(directory) / POINTER).exists():
        try:
            return load(directory, None, expect, fallback=True, warn=warn) if available(directory) else None
        except DamagedCheckpointError:
            return None  # killed while writing the very first one
    return load(directory, None, expect, fallback=True, warn=warn)


def load_finished(directory: Path | str, name: str, stage: str) -> Checkpoint:
    """``load`` the checkpoint of a finished stage for a later one; errors name the stage that made it.

    Raises:
        CheckpointError: as ``load``.
    """
    try:
        return load(directory, name)
    except DamagedCheckpointError as error:
        cost = "; repeating a private stage is charged again" if stage in ("continue", "probe", "finetune") else ""
        raise CheckpointError(
            error.problem, fix=f"restore it from a copy, or make it again: dprandp {stage} --overwrite{cost}"
        ) from error


def _load_whole(path: Path) -> Checkpoint:
    sidecar = path.with_name(path.name.removesuffix(".safetensors") + ".json")
    for needed in (path, sidecar):
        if not needed.is_file():
            raise DamagedCheckpointError(f"the checkpoint file {needed} is missing", fix=_START_AGAIN)
    record = _read_json_or_none(sidecar)
    if record is not None and isinstance(record.get("format"), int) and record["format"] > FORMAT:
        raise CheckpointError(
            f"{sidecar} has format {record['format']}; this version reads up to {FORMAT}",
            fix="upgrade dprandp to the version that wrote it",
        )
    if record is None or record.get("description_sha256") != _seal(record):
        raise DamagedCheckpointError(f"the checkpoint's description {sidecar} is damaged", fix=_START_AGAIN)
    with storage_errors(path, "read"):
        data = path.read_bytes()
    digest = hashlib.sha256(data).hexdigest()
    size, record = record.get("bytes"), _record_of(digest, record)
    if record is None:
        what = (
            f"{len(data)} bytes instead of {size}" if len(data) != size else "its sha256 differs from the recorded one"
        )
        raise DamagedCheckpointError(f"the checkpoint {path} is damaged: {what}", fix=_START_AGAIN)
    tensors = tensors_from_bytes(data, path)
    described = {key: _describe(tensor) for key, tensor in tensors.items()}
    if not isinstance(record.get("meta"), dict) or record.get("tensors") != described:
        raise DamagedCheckpointError(
            f"the checkpoint's description {sidecar} does not fit its tensors", fix=_START_AGAIN
        )
    return Checkpoint(tensors, record["meta"], path)


def _describe(tensor: torch.Tensor) -> dict[str, Any]:
    return {"shape": list(tensor.shape), "dtype": str(tensor.dtype).removeprefix("torch.")}


def _record_of(digest: str, record: dict[str, Any] | None) -> dict[str, Any] | None:
    """The one of a sidecar's descriptions that belongs to tensors with this sha256."""
    superseded = (record or {}).get("superseded")
    for candidate in (record, superseded):
        if isinstance(candidate, dict) and candidate.get("sha256") == digest:
            return {key: value for key, value in candidate.items() if key != "superseded"}
    return None


def _seal(record: Mapping[str, Any]) -> str:
    sealed = {key: value for key, value in record.items() if key != "description_sha256"}
    return hashlib.sha256(json.dumps(sealed, sort_keys=True).encode()).hexdigest()


def _sealed(record: dict[str, Any]) -> str:
    """JSON text of a description with its own hash, which reveals a flipped bit in ``meta``."""
    plain = json.loads(to_json(record))
    return to_json({**plain, "description_sha256": _seal(plain)}, indent=1) + "\n"


def _read_json_or_none(path: Path) -> dict[str, Any] | None:
    with storage_errors(path, "read"):
        content = path.read_bytes()
    try:
        record = from_json(content)
    except ValueError:
        return None
    return record if isinstance(record, dict) else None


def _age(name: str) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"([0-9]+)", name)]


def _remove_all_but(directory: Path, newest: str, keep: int) -> None:
    older = [name for name in available(directory) if name != newest and _age(name) < _age(newest)]
    kept = {newest, *older[: keep - 1]}
    for path in directory.glob("*.safetensors"):
        if path.stem not in kept and _NAME.fullmatch(path.stem):
            with storage_errors(path, "remove"):
                # Remove the tensors last: the next call finds the leftovers of a killed one by them.
                path.with_name(path.stem + ".json").unlink(missing_ok=True)
                path.unlink()
