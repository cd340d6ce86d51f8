"""Classifiers with random weights, and arithmetic on their named tensors, for tests of sums of clipped gradients."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import torch
from tiny_run import CLASSES, DEEP, blobs
from torch import Tensor

from dprandp.config.schema import PretrainConfig
from dprandp.dpsgd.clipped_sums import Batch, SumSettings, loss_function
from dprandp.models.classifier import Classifier
from dprandp.models.extractor import build_extractor
from dprandp.models.precision import dtype_of
from dprandp.models.whitening import PooledOnly, Whitener
from dprandp.privacy.clipping import per_example_gradients
from dprandp.vision.images import to_input
from dprandp.vision.views import keyed_uniforms, private_views

CLIP = 0.05
SETTING = SumSettings(scale=0.3, views=2, seed=5, flip=True, clip_norm=CLIP)
STEP = 4


def model_of(arch: str, whitened: bool = True) -> Classifier:
    """A classifier with random weights, a random whitener and a random head."""
    generator = torch.Generator().manual_seed(1)
    settings = DEEP if arch == "deep" else {"arch": arch}
    extractor = build_extractor(PretrainConfig(**{"filters": 16, "layers": 1} | settings), generator)
    whitener = PooledOnly(extractor.feature_dim)
    if whitened:
        whitener = Whitener(extractor.feature_dim, 20, extractor.parts, dtype_of(extractor))
        whitener.projection.normal_(generator=generator)
    model = Classifier(extractor, whitener, CLASSES)
    model.head.data.normal_(generator=generator)
    return model


def scaled(model: Classifier, scale: float = SETTING.scale) -> dict[str, Tensor]:
    """Its parameters, as they are trained."""
    return {
        name: value.detach().clone() / (scale if name.startswith("extractor.") else 1)
        for name, value in model.named_parameters()
    }


def images_and_labels(count: int | None = None) -> tuple[Tensor, Tensor]:
    made = blobs(3)
    return to_input(made["x_train"][:count], 32), torch.from_numpy(made["y_train"][:count])


def batch_of(count: int, sizes: list[int] | None = None) -> Batch:
    """The first records."""
    return Batch(*images_and_labels(count), torch.arange(count), None if sizes is None else torch.tensor(sizes))


def gradient_by_hand(arch: str, record: int, settings: SumSettings = SETTING) -> dict[str, Tensor]:
    """One record's gradient, float64, from its own views by automatic differentiation."""
    model, (images, labels) = model_of(arch), images_and_labels()
    draws = keyed_uniforms(np.array([record]), STEP, settings.seed, settings.views)
    views = private_views(images[record : record + 1], settings.views, draws, flip=settings.flip)
    loss = loss_function(model, settings.scale)
    (rows,) = per_example_gradients(loss, scaled(model, settings.scale), views, labels[record : record + 1], 1)
    return {name: value[0].double() for name, value in rows.items()}


def norm_of(tensors: Mapping[str, Tensor]) -> float:
    """Of all tensors jointly."""
    return math.sqrt(sum(float(value.double().square().sum()) for value in tensors.values()))


def apart(left: Mapping[str, Tensor], right: Mapping[str, Tensor]) -> float:
    """Distance over all tensors jointly, as a part of the joint norm."""
    assert left.keys() == right.keys()
    return norm_of({name: left[name].double() - right[name].double() for name in right}) / norm_of(right)
