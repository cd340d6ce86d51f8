"""Networks without Phase I: with random weights (De et al. 2022), or with public weights from a file."""

from __future__ import annotations

from pathlib import Path

import torch

from dprandp.config.schema import WITHOUT_PHASE_ONE, FinetuneConfig, PretrainConfig, is_backbone
from dprandp.errors import UsageError
from dprandp.models.classifier import Classifier
from dprandp.models.extractor import NF_RESNET, build_extractor
from dprandp.models.whitening import PooledOnly
from dprandp.pretrain.weights import load_public_weights


def without_phase_one(config: FinetuneConfig) -> bool:
    """Whether a fine-tune starts from neither probe nor pretraining."""
    return config.source in WITHOUT_PHASE_ONE


def network_config(config: FinetuneConfig) -> PretrainConfig:
    """The extractor of such a fine-tune; UsageError for an architecture or a setting that it cannot have."""
    elsewhere = is_backbone(config.arch)
    if not config.arch.startswith("wrn-") and config.arch != NF_RESNET and not elsewhere:
        raise UsageError(
            f"--from {config.source} cannot train {config.arch!r}",
            fix=f"use --arch wrn-16-4 or another wrn, {NF_RESNET}, torchvision:NAME or module:FILE.py:NAME",
        )
    order = {} if config.layer_order is None else {"layer_order": config.layer_order}
    if not config.arch.startswith("wrn-") and (order or config.padding):
        raise UsageError(f"{config.arch} has one layer order and padding", fix="leave --layer-order and --padding out")
    if elsewhere and config.pooling:
        raise UsageError(f"{config.arch} pools in its own way", fix="leave --pooling out")
    if not elsewhere and config.norm:
        raise UsageError(f"{config.arch} has no BatchNorm to replace", fix="leave --norm out")
    same = ("arch", "seed", "padding", "pooling", "precision", "input_size", "init", "init_source", "norm", "code")
    return PretrainConfig(**{key: getattr(config, key) for key in same}, **order)


def start_model(config: FinetuneConfig, classes: int) -> tuple[Classifier, list[str]]:
    """The classifier before its first step, on the CPU: no whitening, a head of zeros; and the names of the file's
    tensors that were left out (none from scratch). Raises as ``network_config`` and ``load_public_weights``."""
    generator = torch.Generator().manual_seed(config.seed)
    extractor = build_extractor(network_config(config), generator)
    left_out = [] if config.init is None else load_public_weights(Path(config.init), extractor, config.arch)
    return Classifier(extractor, PooledOnly(extractor.feature_dim), classes), left_out
