"""Figures of several labels an image against counting and medmnist, the kappa of grades against scikit-learn, and their
intervals against draws written out."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from medmnist.evaluator import getACC, getAUC
from sklearn.metrics import cohen_kappa_score, roc_auc_score

from dprandp.errors import UsageError
from dprandp.vision import intervals
from dprandp.vision.intervals import redraw_kappa, redraw_labels, wilson
from dprandp.vision.metrics import classification_metrics, multi_label_metrics

TASK = "multi-label, binary-class"


def scored(rows: int, names: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(seed)
    labels = (random.random((rows, names)) < np.linspace(0.1, 0.6, names)).astype(int)
    return np.round(random.normal(size=labels.shape) + 1.5 * labels - 1, 1) + 0.03, labels  # with ties


def measured(scores: np.ndarray, labels: np.ndarray, units: np.ndarray | None = None) -> dict:
    return multi_label_metrics(torch.tensor(scores), torch.tensor(labels), units)


def test_accuracy_and_auc_are_those_of_medmnist() -> None:
    scores, labels = scored(200, 14, seed=3)
    result, probabilities = measured(scores, labels), 1 / (1 + np.exp(-scores))
    assert result["accuracy"] == pytest.approx(getACC(labels, probabilities, TASK))
    assert result["auc"] == pytest.approx(getAUC(labels, probabilities, TASK))


def by_hand(scores: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """By counting."""
    said, names, having = scores > 0, labels.shape[1], labels.mean(axis=0).tolist()
    balanced, areas = [], []
    for j in range(names):
        rights = [np.mean(said[labels[:, j] == value, j] == value) for value in (0, 1) if (labels[:, j] == value).any()]
        balanced.append(np.mean(rights))
        if len(rights) == 2:
            areas.append(roc_auc_score(labels[:, j], scores[:, j]))
    return {
        "accuracy": float(np.mean(said == labels)),
        "majority_accuracy": float(np.mean([max(share, 1 - share) for share in having])),
        "balanced_accuracy": float(np.mean(balanced)),
        "auc": float(np.mean(areas)) if areas else math.nan,
    }


def test_figures_by_counting() -> None:
    scores, labels = scored(80, 4)
    result, probabilities = measured(scores, labels), 1 / (1 + np.exp(-scores))
    for name, value in by_hand(scores, labels).items():
        assert result[name] == pytest.approx(value)
        low, high = result["intervals"][name]
        assert low <= value <= high
        assert high - low < 0.3
    losses = [-math.log(p if own else 1 - p) for p, own in zip(probabilities.flat, labels.flat, strict=True)]
    assert result["loss"] == pytest.approx(np.mean(losses))
    assert result["confusion"] is result["sensitivity"] is result["specificity"] is result["kappa"] is None
    for j, each in enumerate(result["per_class"]):
        said, own = scores[:, j] > 0, labels[:, j] == 1
        assert each["recall"] == (said & own).sum() / own.sum()
        assert each["precision"] == (said & own).sum() / said.sum()
        assert each["recall_interval"] == wilson(each["recall"], own.sum())
        assert each["auc"] == pytest.approx(roc_auc_score(own, scores[:, j]))
        assert each["auc_interval"][0] <= each["auc"] <= each["auc_interval"][1]
    assert "of mean figures by bootstrap over the 80 test images" in result["interval_method"]
    json.dumps(result, allow_nan=False)


def test_a_label_on_no_image_on_all_or_never_given() -> None:
    scores, labels = scored(40, 4)
    labels[:, 0], labels[:, 1], scores[:, 2] = 0, 1, -1.0
    result = measured(scores, labels)
    none, everywhere, silent, _ = result["per_class"]
    assert (none["recall"], none["auc"], none["auc_interval"]) == (None, None, None)
    assert (everywhere["auc"], everywhere["precision"]) == (None, 1.0)
    assert (silent["recall"], silent["precision"], silent["auc"]) == (0.0, None, 0.5)
    for name, value in by_hand(scores, labels).items():
        assert result[name] == pytest.approx(value)
    labels[:] = 1
    assert measured(scores, labels)["auc"] is None
    with pytest.raises(UsageError, match="diverged"):
        measured(np.full((2, 2), math.nan), np.ones((2, 2), int))


@pytest.mark.parametrize("several", [True, False])
def test_a_redrawn_split_has_the_figures_of_its_images_written_out(
    several: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whole units are drawn."""
    monkeypatch.setattr(intervals, "WORK", 0)
    monkeypatch.setattr(intervals, "FEWEST_DRAWS", 60)
    random = np.random.default_rng(1)
    units = random.integers(0, 12, 40)
    units = np.unique(units, return_inverse=True)[1]
    scores, labels = scored(40, 3)
    grades, said = random.integers(0, 4, 40), random.integers(0, 4, 40)
    draws = intervals.draws_for(40, 3)
    assert draws == 60
    if several:
        found = redraw_labels(scores, labels == 1, units, scores > 0)
    else:
        kappas = redraw_kappa(grades, said, units, draws)
        assert kappas.shape == (draws,)
    weights = np.concatenate(list(intervals._weights(units, draws)), axis=1)
    for draw in range(0, draws, max(1, draws // 20)):
        written = np.repeat(np.arange(40), weights[:, draw].astype(int))
        if several:
            for name, value in by_hand(scores[written], labels[written]).items():
                assert getattr(found, name)[draw] == pytest.approx(value, nan_ok=True)
        else:
            value = cohen_kappa_score(grades[written], said[written], weights="quadratic")
            assert kappas[draw] == pytest.approx(value)


def test_the_kappa_of_grades_is_scikit_learns() -> None:
    random = np.random.default_rng(0)
    labels = np.concatenate([np.arange(5), random.integers(0, 5, 75)])
    logits = -np.abs(labels[:, None] + random.normal(size=(80, 1)) - np.arange(5))
    found = classification_metrics(torch.tensor(logits), torch.tensor(labels), ordinal=True)
    assert found["kappa"] == pytest.approx(cohen_kappa_score(labels, logits.argmax(1), weights="quadratic"))
    low, high = found["intervals"]["kappa"]
    assert low < found["kappa"] < high
    plain = classification_metrics(torch.tensor(logits), torch.tensor(labels))
    assert (plain["kappa"], "kappa" in plain["intervals"]) == (None, False)
    right = classification_metrics(torch.eye(5)[labels], torch.tensor(labels), ordinal=True)
    assert right["kappa"] == 1.0
    assert right["intervals"]["kappa"][1] == 1.0
    same = classification_metrics(torch.eye(3)[[1, 1]], torch.tensor([1, 1]), ordinal=True)
    assert same["kappa"] is None
    worse = classification_metrics(torch.eye(3)[[2, 2, 0, 0]], torch.tensor([0, 0, 2, 2]), ordinal=True)
    assert worse["kappa"] == -1.0
    json.dumps([right, same, worse], allow_nan=False)
