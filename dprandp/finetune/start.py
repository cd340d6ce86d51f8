"""Networks without Phase I: with random weights (De et al. 2022), or with public weights from a file.

A program cannot check whether weights from a file are public. The user declares it; the declaration and the file's hash
are recorded and shown wherever ε is.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from dprandp.config.schema import WITHOUT_PHASE_ONE, FinetuneConfig, PretrainConfig
from dprandp.errors import CheckpointError, InputError, UsageError
from dprandp.models.classifier import Classifier
from dprandp.models.extractor import NF_RESNET, build_extractor
from dprandp.models.whitening import PooledOnly
from dprandp.runs.checkpoint import tensors_from_bytes
from dprandp.runs.files import file_sha256, storage_errors

OF_ANOTHER_TASK = ("head", "fc.", "classifier.", "whitener.")
"""Names of tensors of a classifier for other classes, and of its whitener: not used."""

MOST_BYTES = 2**32


def without_phase_one(config: FinetuneConfig) -> bool:
    """Whether a fine-tune starts from neither probe nor pretraining."""
    return config.source in WITHOUT_PHASE_ONE


def network_config(config: FinetuneConfig) -> PretrainConfig:
    """The extractor of such a fine-tune; UsageError for an architecture or a setting that it cannot have."""
    if not config.arch.startswith("wrn-") and config.arch != NF_RESNET:
        raise UsageError(
            f"--from {config.source} cannot train {config.arch!r}",
            fix=f"use --arch wrn-16-4 or another wrn, or {NF_RESNET}",
        )
    order = {} if config.layer_order is None else {"layer_order": config.layer_order}
    if config.arch == NF_RESNET and (order or config.padding):
        raise UsageError(f"{NF_RESNET} has one layer order and padding", fix="leave --layer-order and --padding out")
    same = {key: getattr(config, key) for key in ("arch", "seed", "padding", "pooling", "precision", "input_size")}
    return PretrainConfig(**same, **order)


def start_model(config: FinetuneConfig, classes: int) -> tuple[Classifier, list[str]]:
    """The classifier before its first step, on the CPU: no whitening, a head of zeros; and the names of the file's
    tensors that were left out (none from scratch). Raises as ``network_config`` and ``load_public_weights``."""
    generator = torch.Generator().manual_seed(config.seed)
    extractor = build_extractor(network_config(config), generator)
    left_out = [] if config.init is None else load_public_weights(Path(config.init), extractor, config.arch)
    return Classifier(extractor, PooledOnly(extractor.feature_dim), classes), left_out


def init_hash(config: FinetuneConfig) -> dict[str, str]:
    """sha256 of the file of public weights, named for ``RunDir.begin``; empty where none is asked for."""
    if config.init is None:
        return {}
    path = _existing(Path(config.init))
    with storage_errors(path, "read"):
        return {"public weights": file_sha256(path)}


def load_public_weights(path: Path, extractor: torch.nn.Module, arch: str) -> list[str]:
    """Fill an extractor from a safetensors file; returns the names of tensors that were left out, sorted.

    Args:
        path: tensors named as the extractor's own, all with or all without ``extractor.`` before them; float32,
            float16 or bfloat16. A classifier for other classes (``OF_ANOTHER_TASK``) may be among them.

    Raises:
        InputError: no such file, or one that is no safetensors file by its size.
        CheckpointError: the file is damaged, or a tensor is missing, unknown, of another shape or type, or not finite;
            all of them are named.
    """
    path = _existing(path)
    with storage_errors(path, "read"):
        if path.stat().st_size > MOST_BYTES:
            raise InputError(f"{path} has more than {MOST_BYTES:,} bytes", fix="give a file with the network's weights")
        tensors = tensors_from_bytes(path.read_bytes(), path)
    left_out = sorted(name for name in tensors if name.startswith(OF_ANOTHER_TASK))
    given = {name.removeprefix("extractor."): value for name, value in tensors.items() if name not in left_out}
    own = extractor.state_dict()
    names = sorted(own.keys() | given.keys())
    wrong = [f"{name}: {why}" for name in names if (why := _why_not(given.get(name), own.get(name), arch))]
    if wrong:
        more = f"; and {len(wrong) - 20} more" if len(wrong) > 20 else ""
        raise CheckpointError(
            f"{path} does not hold the weights of {arch}: {'; '.join(wrong[:20])}{more}",
            fix=f"give weights of {arch} under this package's names (see dprandp/models), or another --arch",
        )
    extractor.load_state_dict({name: value.to(torch.float32) for name, value in given.items()})
    return left_out


def _why_not(found: Tensor | None, own: Tensor | None, arch: str) -> str | None:
    if found is None:
        return "missing"
    if own is None:
        return f"unknown to {arch}"
    if found.shape != own.shape:
        return f"shape {tuple(found.shape)} instead of {tuple(own.shape)}"
    if found.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"{found.dtype} instead of {own.dtype}"
    return None if bool(torch.isfinite(found).all()) else "holds what is no finite number"


def _existing(path: Path) -> Path:
    if not path.is_file():
        raise InputError(f"there is no file {path}", fix="give a safetensors file with --init")
    return path
