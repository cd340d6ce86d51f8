"""Public weights from a file, as a safetensors file holds them under the network's own names.

A program cannot check whether weights from a file are public. The user declares it; the declaration, the file's name
and its hash are recorded and shown wherever ε is.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from dprandp.config.schema import FinetuneConfig, PretrainConfig, public_arch
from dprandp.errors import CheckpointError, InputError
from dprandp.models.torchvision import Backbone
from dprandp.runs.checkpoint import DamagedCheckpointError, description_of, tensors_from_bytes
from dprandp.runs.console import Console
from dprandp.runs.files import file_sha256, read_object, storage_errors

INPUT = "public weights"
"""Name of the file's hash among the inputs of a stage."""

OF_ANOTHER_TASK = ("head", "fc.", "classifier.", "whitener.")
"""Names of tensors of a classifier for other classes, and of its whitener: not used."""

COUNTED = ".num_batches_tracked"
"""End of the name of a count that BatchNorm keeps, and that no result depends on."""

MOST_BYTES = 2**32

SHOWN = 3
"""Most tensors of a kind that a refusal names."""


def weights_hash(init: str | None) -> dict[str, str]:
    """sha256 of a file of public weights, named for ``RunDir.begin``; empty where none is asked for."""
    if init is None:
        return {}
    path = _existing(Path(init))
    with storage_errors(path, "read"):
        return {INPUT: file_sha256(path)}


def declared_weights(config: PretrainConfig | FinetuneConfig) -> dict[str, str]:
    """What the results say about public weights: the file's name and sha256, and its source; empty without any."""
    if config.init is None:
        return {}
    path, sha256 = Path(config.init), weights_hash(config.init)[INPUT]
    said = {"init_file": path.name, "init_sha256": sha256, "init_source": str(config.init_source)}
    origin = private_origin(path)
    return said if origin is None else said | {"init_origin": origin}


def say_what_was_loaded(config: PretrainConfig | FinetuneConfig, left_out: Sequence[str], console: Console) -> None:
    """Tell the user what is known about the file of public weights, if there is one.

    Args:
        left_out: tensors of it that were not used.
    """
    if config.init is not None and (origin := private_origin(Path(config.init))) is not None:
        console.warn(origin)
    if left_out:
        console.say(f"of {config.init}, made for another task, left out: {', '.join(left_out)}")


def private_origin(path: Path) -> str | None:
    """A warning where a file of weights was made by private steps of dprandp, else None: by the file's own description,
    if it is a checkpoint, or by the configuration beside it, if it is a released model."""
    beside = path.parent / "config.json"
    result = (read_object(beside) or {}).get("result") if beside.is_file() else None
    epsilon = result.get("epsilon") if isinstance(result, dict) else None
    if epsilon is None:
        if not path.is_file() or not any(description_of(path).get(name) for name in ("updates", "ledger")):
            return None
        return (
            f"{path.name} is a checkpoint of a run's private steps, and tells about its images: where this run has one "
            "of them too, add up the ε of both"
        )
    spent = f"spent ε = {math.ceil(1000 * epsilon) / 1000:g}" if isinstance(epsilon, int | float) else "was not private"
    return (
        f"{path.name} is the model of a run on {result.get('data')} that {spent}, and tells about its images: where "
        "this run has one of them too, add up the ε of both"
    )


def load_public_weights(path: Path, extractor: nn.Module, arch: str) -> list[str]:
    """Fill an extractor from a safetensors file; returns the names of tensors that were left out, sorted.

    Args:
        path: tensors named as the extractor's own (those of torchvision for its networks), all with or all without
            ``extractor.`` before them; float32, float16 or bfloat16. A classifier for other classes may be among them:
            of torchvision's networks their last layer, else ``OF_ANOTHER_TASK``.

    Raises:
        InputError: no such file, or one that is no safetensors file by its size.
        CheckpointError: the file is damaged, or a tensor is missing, unexpected, of another shape or type, or not
            finite: one sentence with counts and the first names.
    """
    path = _existing(path)
    with storage_errors(path, "read"):
        if path.stat().st_size > MOST_BYTES:
            raise InputError(f"{path} has more than {MOST_BYTES:,} bytes", fix="give a file with the network's weights")
        try:
            tensors = tensors_from_bytes(path.read_bytes(), path)
        except DamagedCheckpointError as error:
            raise CheckpointError(
                error.problem,
                fix="give public weights as a whole safetensors file; of a .pth file make one first, as in "
                "docs/stages.md (Networks of torchvision, and your own)",
            ) from error
    target, another_task = extractor, OF_ANOTHER_TASK
    if isinstance(extractor, Backbone):
        target, last = extractor.network, extractor.classifier
        another_task = ("whitener.", *(["head"] if last is None else ["head", f"{last}."]))
    left_out = sorted(name for name in tensors if name.startswith(another_task))
    given = {
        name.removeprefix("extractor.").removeprefix("network." if target is not extractor else ""): value
        for name, value in tensors.items() if name not in left_out
    }  # fmt: skip
    own = target.state_dict()
    given = {name: value for name, value in given.items() if name in own or not name.endswith(COUNTED)}
    if wrong := _differences(given, own):
        statistics = any(name.endswith(".running_var") for name in given.keys() - own.keys())
        raise CheckpointError(
            f"{path} does not hold the weights of {public_arch(arch)}: {wrong}",
            fix="its BatchNorm layers were replaced by GroupNorm: give --norm frozen to keep their statistics as "
            "constants, or weights of a network with GroupNorm" if statistics and target is not extractor
            else f"give weights of {public_arch(arch)} under its own names, or another --arch",
        )  # fmt: skip
    target.load_state_dict({name: value.to(torch.float32) for name, value in given.items()})
    return left_out


def _differences(given: dict[str, Tensor], own: dict[str, Tensor]) -> str:
    """What does not fit, by kind: counts and first names in one sentence; empty where all fits."""
    both = sorted(given.keys() & own.keys())
    kinds = {
        "missing": sorted(own.keys() - given.keys()),
        "unexpected": sorted(given.keys() - own.keys()),
        "of another shape": [
            f"{name}: {tuple(given[name].shape)} instead of {tuple(own[name].shape)}"
            for name in both if given[name].shape != own[name].shape
        ],
        "of another type": [
            f"{name}: {given[name].dtype}" for name in both
            if given[name].dtype not in (torch.float32, torch.float16, torch.bfloat16)
        ],
        "not finite": [name for name in both if not bool(torch.isfinite(given[name]).all())],
    }  # fmt: skip
    return "; ".join(
        f"{len(names)} {kind} ({', '.join(names[:SHOWN])}{', ...' if len(names) > SHOWN else ''})"
        for kind, names in kinds.items() if names
    )  # fmt: skip


def _existing(path: Path) -> Path:
    if not path.is_file():
        raise InputError(f"there is no file {path}", fix="give a safetensors file with --init")
    return path
