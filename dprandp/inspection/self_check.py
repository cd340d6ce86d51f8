"""A self-check of the arithmetic: a forward pass and a private step of small networks, compared with stored numbers.

Weights, images and noise come from a seed; no data set and no run is read. The stored numbers were computed in float32.
A broken library, a wrong instruction set or a faulty device shows here in a second, before hours of training.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor, nn

from dprandp.config.schema import PretrainConfig
from dprandp.dpsgd.clipped_sums import Batch, ClippedSums, SumSettings
from dprandp.models.classifier import Classifier
from dprandp.models.extractor import build_extractor, extract
from dprandp.models.precision import AUTO, BFLOAT16, FLOAT32, decide
from dprandp.models.whitening import Whitener
from dprandp.privacy.clipping import clipped_softmax_sum
from dprandp.privacy.mechanism import PrivatePlan, PrivateStep
from dprandp.privacy.randomness import InsecureSeed

ARCHITECTURES = ("patchnet", "wrn-10-1")
EXAMPLES, CLASSES, VIEWS, DIMS = 4, 3, 2, 16
CLIP_NORM, NOISE_MULTIPLIER = 0.5, 1.0

TOLERANCE = {
    "patchnet": {FLOAT32: 1e-3, BFLOAT16: 5e-3},
    "wrn-10-1": {FLOAT32: 1e-3, BFLOAT16: 0.05},
}
"""Largest difference from the stored numbers, relative to the length of the vector."""

STORED = {
    "patchnet": {
        "features": (4.79798, -0.470288),
        "clipped sum": (0.526746, 0.123001),
        "head's clipped sum": (0.38988, -0.177565),
        "noisy update": (3.00693, -0.291011),
    },
    "wrn-10-1": {
        "features": (5.63149, -0.926572),
        "clipped sum": (0.991613, 0.323435),
        "head's clipped sum": (0.832247, -0.200685),
        "noisy update": (34.8275, 7.67221),
    },
}
"""Architecture -> quantity -> length of the vector, and its component along a fixed direction."""


def measure(arch: str, device: torch.device, precision: str) -> dict[str, tuple[float, float]]:
    """L2 norm, and component along a fixed direction, of the vectors of ``STORED``, as this machine computes them."""
    extractor = build_extractor(PretrainConfig(arch=arch, filters=8, layers=1, precision=precision))
    model = Classifier(extractor, Whitener(extractor.feature_dim, DIMS, extractor.parts), CLASSES)
    _fill(model)
    model = model.to(device).eval()
    words = InsecureSeed(1).words(EXAMPLES * 3 * 32 * 32 // 8)
    images = torch.from_numpy(words.astype("<u8").view(np.uint8).reshape(EXAMPLES, 3, 32, 32).copy())
    labels = torch.arange(EXAMPLES) % CLASSES

    features = extract(extractor, images, mirror=True)
    unit = model.whitener(features.to(device))
    head_sum = clipped_softmax_sum(unit, labels.to(device), model.head.detach(), CLIP_NORM)
    parameters = {name: value.detach().clone() for name, value in model.named_parameters()}
    sums = ClippedSums(model, SumSettings(1.0, VIEWS, 0, True, CLIP_NORM))
    clipped = sums.of(parameters, 0, Batch(images, labels, torch.arange(EXAMPLES)))
    plan = PrivatePlan(
        "finetune", 10 * EXAMPLES, 0.1, 1, NOISE_MULTIPLIER, CLIP_NORM, VIEWS, epsilon_target=1.0, delta=1e-5
    )
    released = PrivateStep(0, np.arange(EXAMPLES), plan, InsecureSeed(2)).release(clipped)
    vectors = {
        "features": features,
        "clipped sum": _flat(clipped),
        "head's clipped sum": head_sum,
        "noisy update": _flat(released),
    }
    return {name: _seen(value) for name, value in vectors.items()}


def compare(device: torch.device) -> tuple[float, str, str]:
    """Measure every architecture in the precision that a stage would choose, and compare.

    Returns:
        The largest difference as a fraction of its tolerance (above 1: this machine computes something else), its
        place, and the precisions in words.
    """
    worst, where, said = 0.0, "", []
    for arch in ARCHITECTURES:
        precision = decide(AUTO, device.type)
        said.append(f"{arch} in {precision}")
        found = measure(arch, device, precision)
        for name, (length, along) in STORED[arch].items():
            apart = max(abs(found[name][0] - length), abs(found[name][1] - along)) / length
            apart /= TOLERANCE[arch][precision]
            apart = math.inf if math.isnan(apart) else apart
            if apart >= worst:
                worst, where = apart, f"{name} of {arch}"
    return worst, where, ", ".join(said)


def _fill(model: nn.Module) -> None:
    """Give every matrix and filter weights of unit gain, from a seed."""
    random = InsecureSeed(0)
    with torch.no_grad():
        for _, value in sorted(model.state_dict().items()):
            if value.ndim > 1:
                value.copy_(random.gaussian(value.shape) / math.sqrt(value[0].numel()))


def _flat(tensors: dict[str, Tensor]) -> Tensor:
    return torch.cat([tensors[name].flatten().double().cpu() for name in sorted(tensors)])


def _seen(value: Tensor) -> tuple[float, float]:
    flat = value.flatten().double().cpu()
    direction = InsecureSeed(3).gaussian(flat.shape)
    return float(flat.norm()), float(flat @ direction / direction.norm() * math.sqrt(len(flat)) / 3)
