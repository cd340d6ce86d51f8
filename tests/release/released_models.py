"""Released models with random weights, of every architecture that can be released, at its smallest size."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from dprandp.config.schema import PretrainConfig, as_dict
from dprandp.dpsgd.release import MODEL_FORMAT
from dprandp.models.classifier import Classifier
from dprandp.models.extractor import build_extractor
from dprandp.models.precision import dtype_of
from dprandp.models.whitening import PooledOnly, Whitener
from dprandp.release import ReleasedModel, load_model
from dprandp.report.card import model_card
from dprandp.runs.checkpoint import tensors_to_bytes
from dprandp.runs.files import file_sha256, from_json, to_json
from dprandp.runs.results import PretrainResult, PrivateResult, read_result

CLASSES = ("cat", "dög", 'bird "3"')

PRETRAINED = PretrainResult(
    arch="patchnet", random_init=False, parameters=43_600, feature_dim=3200, precision="float32", steps=8,
    views_per_second=None, loss=None, knn_accuracy=0.615, linear_accuracy=0.7, alignment=0.3, uniformity=-2.0,
    effective_rank=None, seconds=41.2,
)  # fmt: skip

ARCHITECTURES = {
    "patchnet": {"arch": "patchnet", "filters": 16, "layers": 1},
    "two layers": {"arch": "patchnet", "filters": 16, "layers": 2, "second_filters": 12},
    "wrn": {"arch": "wrn-10-1"},
    "wrn, all stages": {"arch": "wrn-10-1", "feature_stages": "all", "padding": "same"},
    "vit": {"arch": "vit-1-16-16"},
    "nf-resnet-50": {"arch": "nf-resnet-50"},
    "resnet18": {"arch": "torchvision:resnet18"},
}


def result(**changes: object) -> PrivateResult:
    """Of a probe on three classes."""
    entries = {
        "stage": "probe", "data": "npz:animals.npz", "title": "animals.npz", "classes": CLASSES, "accuracy": 0.8,
        "balanced_accuracy": 0.79, "auc": 0.9, "loss": 0.5, "confusion": ((8, 1, 1), (1, 8, 1), (1, 1, 8)),
        "majority_accuracy": 1 / 3, "train_examples": 1437, "test_examples": 30, "train_units": 1437,
        "epsilon": 0.2991, "delta": 1e-5, "epsilon_target": 0.3, "epsilon_total": 1.0, "accountant": "Gaussian DP",
        "noise_multiplier": 133.7, "sample_rate": 1.0, "steps": 120, "attempt": 1, "charged_steps": 120,
        "lost_steps": 0, "clip_norm": 1.25, "views": 1, "expected_batch": 1437, "adjacency": "zero-out of one record",
        "unit": "one image", "noise": "gaussian", "also_charged": (), "ledger_head": "0" * 64, "random": "os-entropy",
        "private": True, "device": "cpu", "lr": 0.7, "momentum": 0.9, "released": "average", "mirror": False,
        "precision": "float32", "tuned": None, "tuned_on": None, "seconds": 9.5, "share": 0.3,
        "extractor_colour": "grey",
    }  # fmt: skip
    return read_result("probe", from_json(to_json(entries | changes)))


def model_folder(
    folder: Path, arch: str, shape: tuple[int, int, int], *, mirror: bool, whitened: bool = True,
    precision: str = "float32", **changes: object,
) -> Path:  # fmt: skip
    """A model/ folder; the head is large enough to tell images apart."""
    generator = torch.Generator().manual_seed(1)
    extractor = build_extractor(PretrainConfig(**ARCHITECTURES[arch], precision=precision), generator)
    whitener = PooledOnly(extractor.feature_dim)
    if whitened:
        whitener = Whitener(extractor.feature_dim, 20, extractor.parts, dtype_of(extractor))
        whitener.projection.normal_(generator=generator)
    network = Classifier(extractor, whitener, len(CLASSES))
    network.head.data.normal_(generator=generator).mul_(3 if whitened else 0.05)
    if arch == "nf-resnet-50":  # its branches start at zero
        for name, value in network.named_parameters():
            if name.endswith("skip_gain"):
                value.data.fill_(0.5)
    made = result(mirror=mirror, precision=precision, **changes)
    folder.mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(tensors_to_bytes(network.state_dict()))
    (folder / "MODEL_CARD.md").write_text(model_card(made, PRETRAINED, None), encoding="utf-8")
    config = {
        "format": MODEL_FORMAT, "arch": arch, "extractor": as_dict(extractor.built_from), "precision": precision,
        "classes": CLASSES, "input": {"size": 32, "mirror": mirror, "shape": list(shape)}, "result": made,
        "sha256": {name: file_sha256(folder / name) for name in ("model.safetensors", "MODEL_CARD.md")},
    }  # fmt: skip
    (folder / "config.json").write_text(to_json(config), encoding="utf-8")
    return folder


def released(folder: Path, arch: str, shape: tuple[int, int, int], **settings: object) -> ReleasedModel:
    return load_model(model_folder(folder, arch, shape, **settings))


def pictures(count: int, shape: tuple[int, int, int], seed: int = 0) -> np.ndarray:
    """Noise of different brightness and grain."""
    random = np.random.default_rng(seed)
    noise = random.integers(0, 200, (count, *shape)) * random.uniform(0.2, 1, (count, 1, 1, 1))
    return (noise + random.integers(0, 56, (count, 1, 1, shape[2]))).astype(np.uint8)
