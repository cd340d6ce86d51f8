"""Evaluation of features on synthetic images only: no data, no privacy cost.

Every image is a class of its own; one random crop of it is known, another has to be recognised. In addition there are
the two quantities of Wang & Isola 2020 and the effective rank of Roy & Vetterli 2007, which need no classes. They
detect a collapsed training, but do not predict accuracy on a particular data set.
"""

from __future__ import annotations

from dataclasses import fields

import torch
from torch import Tensor, nn
from torch.nn import functional

from dprandp.models.extractor import extract
from dprandp.pretrain.contrastive import alignment, uniformity
from dprandp.runs.results import Measures
from dprandp.vision.images import ImageSet, random_crops

RIDGE = 1e-3
"""Ridge of the linear classifier, relative to the mean of the squared singular values."""

MEASURES = tuple(field.name for field in fields(Measures))


@torch.no_grad()
def evaluate(network: nn.Module, images: Tensor | ImageSet, generator: torch.Generator) -> Measures:
    """Evaluate an extractor by two random crops of each image, uint8 [n, 3, R, R] synthetic, n >= 2, on the CPU.

    Returns:
        knn_accuracy: of second crops by the nearest first crop, cosine similarity; chance is 1/n.
        linear_accuracy: of second crops by a ridge regression on the first ones; chance is 1/n.
        alignment: mean squared distance between the two crops' features, on the unit sphere, in [0, 4].
        uniformity: log mean exp(-2 squared distance) of different images' features, in [-8, 0]; lower is more spread.
        effective_rank: see ``effective_rank``.
        All of features minus the mean of the first crops', rounded to four digits.
    """
    training = network.training
    network.eval()
    crops = (random_crops(images, network.input_size, generator) for _ in range(2))
    first, second = (extract(network, each, mirror=False) for each in crops)
    network.train(training)
    centre = first.mean(dim=0)
    first, second = first - centre, second - centre
    return Measures(
        knn_accuracy=round(nearest_accuracy(first, second), 4),
        linear_accuracy=round(linear_accuracy(first, second), 4),
        alignment=round(float(alignment(first, second)), 4),
        uniformity=round(float(uniformity(first)), 4),
        effective_rank=round(effective_rank(torch.cat([first, second])), 4),
    )


def nearest_accuracy(first: Tensor, second: Tensor) -> float:
    """Fraction of rows of ``second`` whose nearest row of ``first``, by cosine similarity, is that of the same
    position.

    Both are float [n, D]; a row of zeros has similarity 0 to everything.
    """
    similarity = functional.normalize(second, dim=1) @ functional.normalize(first, dim=1).T
    return float((similarity.argmax(dim=1) == torch.arange(len(first))).float().mean())


def effective_rank(features: Tensor) -> float:
    """exp of the entropy (nats) of the covariance's eigenvalues, as fractions of their sum, for features [n, D], n >=
    2.

    From 1 (all variance along one direction) to min(n - 1, D) (equal along all); 0 where nothing varies.
    """
    centred = (features - features.mean(dim=0)).double()
    gram = centred @ centred.T if len(centred) < centred.shape[1] else centred.T @ centred
    values = torch.linalg.eigvalsh(gram).clamp(min=0)
    if not values.sum() > 0:
        return 0.0
    parts = values / values.sum()
    return float(torch.special.entr(parts).sum().exp())


def linear_accuracy(features: Tensor, test_features: Tensor) -> float:
    """Fraction of test rows for which a linear classifier finds the training row of the same position.

    Every row is a class. The classifier is the ridge regression of one-hot labels on standardised features, without
    intercept, solved in its dual form: n equations.

    Args:
        features, test_features: float [n, D], about centred.
    """
    deviation = features.std(dim=0)
    scale = 1 / (deviation + 1e-3 * deviation.mean() + 1e-12)
    known, asked = (features * scale).double(), (test_features * scale).double()
    gram = known @ known.T
    gram.diagonal().add_(RIDGE * gram.diagonal().mean() + 1e-12)
    one_hot = torch.eye(len(features), dtype=torch.float64)
    scores = asked @ known.T @ torch.linalg.solve(gram, one_hot)
    return float((scores.argmax(dim=1) == torch.arange(len(features))).double().mean())
