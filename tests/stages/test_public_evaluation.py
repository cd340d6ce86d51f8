"""What is said of features from synthetic images alone, against slow references and features of known quality."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn

from dprandp.pretrain.contrastive import MEASURES, effective_rank, evaluate, linear_accuracy, nearest_accuracy
from dprandp.synth import render_block


class Fixed(nn.Module):
    """An extractor that is a function of the mean colours of four quarters, after a linear map."""

    def __init__(self, matrix: torch.Tensor) -> None:
        super().__init__()
        self.matrix = nn.Parameter(matrix)
        self.feature_dim, self.input_size = matrix.shape[1], 32

    @staticmethod
    def normalise(images):
        return images.float() / 255

    def features(self, x):
        return nn.functional.adaptive_avg_pool2d(x, 2).flatten(1) @ self.matrix


def leaves(count):
    return torch.from_numpy(render_block("dead-leaves", 0, 0, count, 64)).permute(0, 3, 1, 2)


def test_the_effective_rank_is_exp_of_the_spectrums_entropy():
    generator = torch.Generator().manual_seed(0)
    for shape in ((50, 8), (8, 50)):
        features = torch.randn(*shape, generator=generator) * torch.arange(1, shape[1] + 1)
        values = np.linalg.eigvalsh(np.cov(features.double().numpy().T))
        parts = [value / values.sum() for value in values if value > 1e-12]
        expected = math.exp(-sum(part * math.log(part) for part in parts))
        assert effective_rank(features) == pytest.approx(expected, rel=1e-4)
    assert effective_rank(torch.cat([torch.eye(6), -torch.eye(6)]) + 3) == pytest.approx(6, abs=1e-4)
    assert effective_rank(torch.ones(4, 3)) == 0.0


def test_the_linear_accuracy_equals_ridge_regression_by_the_normal_equations():
    generator = torch.Generator().manual_seed(1)
    features = torch.randn(20, 6, generator=generator)
    asked = features + 1.5 * torch.randn(20, 6, generator=generator)
    scaled, asked_scaled = (rows.double() / features.double().std(0) for rows in (features, asked))
    ridge = 1e-3 * (scaled @ scaled.T).diagonal().mean()
    weights = torch.linalg.solve(scaled.T @ scaled + ridge * torch.eye(6), scaled.T)
    expected = float(((asked_scaled @ weights).argmax(1) == torch.arange(20)).double().mean())
    assert 0.1 < expected < 0.9
    assert linear_accuracy(features, asked) == pytest.approx(expected, abs=0.051)  # a near tie


def test_good_features_are_told_from_bad_ones():
    """The control: mean colours tell images apart, one number of them hardly does, and nothing does nothing."""
    images = leaves(40)
    seen = {
        name: vars(evaluate(Fixed(matrix), images, torch.Generator().manual_seed(0)))
        for name, matrix in {
            "good": torch.eye(12),
            "one": torch.ones(12, 1) / 12 @ torch.ones(1, 12),
            "nothing": torch.zeros(12, 12),
        }.items()
    }
    assert seen["good"]["knn_accuracy"] > 0.3 > seen["one"]["knn_accuracy"]
    assert seen["good"]["linear_accuracy"] > 0.3 > seen["nothing"]["linear_accuracy"]
    assert seen["good"]["effective_rank"] > 2
    assert seen["one"]["effective_rank"] == pytest.approx(1, abs=1e-3)
    assert seen["good"]["uniformity"] < seen["one"]["uniformity"] - 1  # a line has two directions
    assert 0 < seen["good"]["alignment"] < 1
    for values in seen.values():
        assert tuple(values) == MEASURES
        assert all(math.isfinite(value) for value in values.values())


def test_it_is_a_function_of_the_seed_and_leaves_the_network_as_it_was():
    images, network = leaves(10), Fixed(torch.eye(12)).train()
    first, again, other = (evaluate(network, images, torch.Generator().manual_seed(seed)) for seed in (0, 0, 1))
    assert first == again != other
    assert network.training
    assert network.matrix.grad is None


def test_the_nearest_row_is_that_of_a_slow_loop() -> None:
    generator = torch.Generator().manual_seed(0)
    first = torch.randn(30, 5, generator=generator)
    second = 3 * first + 2 * torch.randn(30, 5, generator=generator)
    right = 0
    for position, query in enumerate(second):
        cosines = [float(query @ row / (query.norm() * row.norm())) for row in first]
        right += cosines.index(max(cosines)) == position
    assert 3 < right < 27
    assert nearest_accuracy(first, second) == pytest.approx(right / 30)
