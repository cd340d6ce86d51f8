"""Settings of Phase I's second half, and which of them belong to which way of learning.

Imports nothing of the package but ``errors``.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from dprandp.errors import UsageError, nearest

PRECISIONS = ("auto", "float32", "bfloat16")
"""See ``vision/precision.py``."""

OPTIMIZERS = ("sgd", "adamw")
"""See ``vision/optimizers.py``."""

COLOURS = ("rgb", "grey", "both")
"""Of the data that an extractor is for; see ``PretrainConfig.colour``."""


@dataclass(frozen=True)
class PretrainConfig:
    """Phase I, second half: a feature extractor from those images. Fields of the other architecture are unused."""

    size: str = "tiny"
    arch: str = "patchnet"
    seed: int = 0
    random_init: bool = False
    """Keep the extractor as initialised: the control experiment that says what Phase I was worth."""
    colour: str = "both"
    """Of the data that it is for: 'rgb', 'grey', or 'both' where they are not known yet. A patchnet for both is two
    dictionaries (``extractors_of``); a network that learns by gradients is one, and sees every second image in grey."""
    prior: str | None = None
    """A shipped prior (``priors/``) to be taken as it is; all other settings are then those of its card."""
    precision: str = "auto"
    """What the network's products are computed in; 'auto' is decided by architecture and device when the stage begins,
    and recorded. A patchnet has no choice: float32."""
    # patchnet
    filters: int = 400
    patch_size: int = 6
    patch_dims: int = 64
    stride: int = 1
    dictionary_patches: int = 100_000
    dictionary_iterations: int = 8
    layers: int = 1
    """2: beside the features of patches of pixels those of patches of their responses."""
    second_filters: int = 400
    # wrn-D-K
    steps: int = 100
    batch_size: int = 32
    optimizer: str = "sgd"
    lr: float | None = None
    """None: by optimizer and size, see ``lr_of``."""
    momentum: float = 0.9
    weight_decay: float = 1e-4
    schedule: str = "cosine"
    grow: bool = False
    """Views of half the side in the first half of the steps: a quarter of the time each."""
    projection_hidden: int = 512
    projection_dim: int = 128
    layer_order: str = "relu-norm-conv"
    weight_standardisation: bool = True
    padding: str | None = None
    """Of convolutions with stride 2: 'symmetric' (None: so), or 'same' as De et al. 2022."""
    pooling: str | None = None
    """Grids that the last stage's map is averaged over; None: '1+4'."""
    feature_stages: str = "last"
    """Features: averages of the 'last' stage's map (published), or of those of 'all' three stages (tiny, small)."""
    checkpoint_every: int = 20


CHOICES = {"optimizer": OPTIMIZERS, "feature_stages": ("last", "all")}

_SECOND_LAYER = {"layers", "second_filters"}
_PATCHNET = _SECOND_LAYER | {
    "filters", "patch_size", "patch_dims", "stride", "dictionary_patches", "dictionary_iterations",
}  # fmt: skip
_WRN = {
    "steps", "batch_size", "optimizer", "lr", "momentum", "weight_decay", "schedule", "grow", "projection_hidden",
    "projection_dim", "layer_order", "weight_standardisation", "padding", "pooling", "feature_stages",
    "checkpoint_every",
}  # fmt: skip


_LEARNING = {
    "dictionary_patches", "dictionary_iterations", "steps", "batch_size", "optimizer", "lr", "momentum", "weight_decay",
    "schedule", "grow", "projection_hidden", "projection_dim", "checkpoint_every",
}  # fmt: skip


def extractors_of(config: PretrainConfig) -> tuple[PretrainConfig, ...]:
    """The extractors that a configuration asks for: itself, or one for colour and then one for grey data.

    Learning a dictionary takes seconds, so where the data are not known there is one for each kind. Random weights
    have seen no image: one network serves both kinds.
    """
    if config.arch == "patchnet" and config.colour == "both" and not config.random_init:
        return tuple(dataclasses.replace(config, colour=colour) for colour in ("rgb", "grey"))
    return (config,)


def unused(config: PretrainConfig) -> set[str]:
    """Settings that have no say in what a configuration describes; they are not recorded."""
    return _of_another_network(config) | (_LEARNING if config.random_init else set())


def _of_another_network(config: PretrainConfig) -> set[str]:
    if config.arch == "patchnet":
        return {"precision"} | _WRN | (_SECOND_LAYER if config.layers == 1 else set())
    return (
        _PATCHNET
        | ({"momentum"} if config.optimizer == "adamw" else set())
    )


def check(config: PretrainConfig) -> None:
    """Refuse settings that do not go together.

    Raises:
        UsageError: a choice that is unknown, or two that exclude each other.
    """
    values: dict[str, Any] = dataclasses.asdict(config)
    for key, known in CHOICES.items():
        if values[key] not in known:
            raise UsageError(f"[pretrain] {key} = {values[key]!r} is unknown", fix=nearest(values[key], known))
    if config.arch == "patchnet" and config.precision == "bfloat16":
        raise UsageError(
            "[pretrain] precision = 'bfloat16', and a patchnet computes in float32",
            fix="leave --precision out, or use --arch wrn-16-4 or another wrn",
        )


def lr_of(config: PretrainConfig) -> float:
    """The learning rate: as given, else 0.03 (0.12 at size paper, as published) for sgd, 0.001 for adamw."""
    if config.lr is not None:
        return config.lr
    if config.optimizer == "adamw":
        return 1e-3
    return 0.12 if config.size == "paper" else 0.03
