"""Tensors in one safetensors file: to bytes, from bytes, and the check against what a configuration needs.

A safetensors file is a JSON header and raw numbers; reading one runs no code. Used by ``checkpoint`` and for the
released model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NoReturn

import safetensors.torch
import torch
from safetensors import SafetensorError

from dprandp.errors import CheckpointError


class DamagedCheckpointError(CheckpointError):
    """The file is not what was written (as opposed to: it is whole, but belongs to another configuration)."""


def tensors_to_bytes(tensors: Mapping[str, torch.Tensor]) -> bytes:
    """The bytes of a safetensors file: same values, same bytes, whatever the device, the strides or shared storage.

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
            f"{path} is no whole safetensors file: {error}", fix="take an intact copy, or make the file anew"
        ) from error


def check_tensors(
    tensors: Mapping[str, torch.Tensor], expect: Mapping[str, Sequence[int] | torch.Tensor], path: Path | str
) -> None:
    """Refuse tensors that are not those a configuration needs.

    Args:
        tensors: what ``path`` holds.
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
        fix="use the configuration the file was made with, or start the stage afresh with --overwrite",
    )
