"""Test-split metrics against hand counting and scikit-learn's own multi-class AUC."""

from __future__ import annotations

import json
import math
import warnings

import numpy as np
import pytest
import torch
from sklearn.metrics import balanced_accuracy_score, roc_auc_score

from dprandp.errors import UsageError
from dprandp.vision.metrics import classification_metrics


@pytest.fixture(autouse=True)
def _warnings_are_errors():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def scored(rows: int, classes: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(seed)
    labels = np.concatenate([np.arange(classes), random.integers(classes, size=rows - classes)])
    logits = random.normal(size=(rows, classes)) + 1.0 * np.eye(classes)[labels]
    return logits, labels


def pairwise_auc(scores: np.ndarray, positive: np.ndarray) -> float:
    """Share of (positive, negative) pairs ranked right; a tie counts one half."""
    wins = [float(p > n) + 0.5 * float(p == n) for p in scores[positive] for n in scores[~positive]]
    return sum(wins) / len(wins)


def test_against_hand_counting():
    logits, labels = scored(60, 4)
    result = classification_metrics(torch.tensor(logits), torch.tensor(labels))
    probabilities = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    confusion = [[0] * 4 for _ in range(4)]
    for row, label in zip(logits, labels, strict=True):
        confusion[label][int(np.argmax(row))] += 1
    assert result["confusion"] == confusion
    assert result["accuracy"] == pytest.approx(sum(confusion[c][c] for c in range(4)) / 60)
    assert result["balanced_accuracy"] == pytest.approx(
        np.mean([confusion[c][c] / sum(confusion[c]) for c in range(4)])
    )
    assert result["loss"] == pytest.approx(
        -np.mean([math.log(p[c]) for p, c in zip(probabilities, labels, strict=True)])
    )
    by_hand = np.mean([pairwise_auc(probabilities[:, c], labels == c) for c in range(4)])
    assert result["auc"] == pytest.approx(by_hand)
    assert result["auc"] == pytest.approx(roc_auc_score(labels, probabilities, multi_class="ovr", average="macro"))
    assert result["balanced_accuracy"] == pytest.approx(balanced_accuracy_score(labels, logits.argmax(1)))
    half = classification_metrics(torch.tensor(logits).bfloat16(), torch.tensor(labels))
    assert half["auc"] == pytest.approx(result["auc"], abs=0.02)


def test_two_classes_give_the_plain_auc():
    logits, labels = scored(50, 2)
    result = classification_metrics(torch.tensor(logits), torch.tensor(labels))
    assert result["auc"] == pytest.approx(roc_auc_score(labels, logits[:, 1] - logits[:, 0]))


def test_absent_class_is_left_out_of_the_averages():
    logits, labels = scored(60, 4)
    kept = labels != 2
    result = classification_metrics(torch.tensor(logits[kept]), torch.tensor(labels[kept]))
    assert result["confusion"][2] == [0, 0, 0, 0]
    probabilities = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    by_hand = np.mean([pairwise_auc(probabilities[kept, c], labels[kept] == c) for c in (0, 1, 3)])
    assert result["auc"] == pytest.approx(by_hand)
    recalls = [np.mean(logits[labels == c].argmax(1) == c) for c in (0, 1, 3)]
    assert result["balanced_accuracy"] == pytest.approx(np.mean(recalls))


def test_single_class_has_no_auc():
    result = classification_metrics(torch.eye(3)[[0, 0, 1]], torch.tensor([0, 0, 0]))
    assert result["auc"] is None
    assert result["accuracy"] == result["balanced_accuracy"] == pytest.approx(2 / 3)
    json.dumps(result, allow_nan=False)


def test_certain_and_wrong_costs_a_finite_loss_and_infinite_scores_are_refused():
    result = classification_metrics(torch.tensor([[1000.0, 0.0], [0.0, 1000.0]]), torch.tensor([1, 1]))
    assert result["loss"] == pytest.approx(-math.log(1e-12) / 2)
    for broken in (math.nan, math.inf):
        with pytest.raises(UsageError):
            classification_metrics(torch.tensor([[0.0, broken]]), torch.tensor([0]))
