"""Figures of a test split against hand counting, scikit-learn and medmnist; their intervals against draws written out.
"""

from __future__ import annotations

import json
import math
import warnings

import numpy as np
import pytest
import torch
from sklearn.metrics import balanced_accuracy_score, roc_auc_score

from dprandp.errors import UsageError
from dprandp.vision import intervals
from dprandp.vision.intervals import redraw, wilson
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


# ------------------------------------------------------------------------------------------- against another program


@pytest.mark.parametrize(("rows", "classes", "task"), [(80, 2, "binary-class"), (120, 5, "multi-class")])
def test_accuracy_and_auc_are_those_of_medmnist(rows: int, classes: int, task: str) -> None:
    from medmnist.evaluator import getACC, getAUC

    logits, labels = scored(rows, classes, seed=3)
    result = classification_metrics(torch.tensor(logits), torch.tensor(labels))
    probabilities = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    assert result["accuracy"] == pytest.approx(getACC(labels[:, None], probabilities, task))
    assert result["auc"] == pytest.approx(getAUC(labels[:, None], probabilities, task))


# -------------------------------------------------------------------------------------- figures of classes, by counting


def test_recall_precision_sensitivity_and_specificity_by_counting() -> None:
    logits, labels = scored(90, 2, seed=1)
    result = classification_metrics(torch.tensor(logits), torch.tensor(labels))
    said = [int(row[1] > row[0]) for row in logits]
    pairs = list(zip(said, labels.tolist(), strict=True))
    assert result["sensitivity"] == sum(s == t == 1 for s, t in pairs) / sum(t == 1 for _, t in pairs)
    assert result["specificity"] == sum(s == t == 0 for s, t in pairs) / sum(t == 0 for _, t in pairs)
    assert result["majority_accuracy"] == max(sum(t == c for _, t in pairs) for c in (0, 1)) / 90
    for c, each in enumerate(result["per_class"]):
        assert each["recall"] == sum(s == t == c for s, t in pairs) / sum(t == c for _, t in pairs)
        assert each["precision"] == sum(s == t == c for s, t in pairs) / sum(s == c for s, _ in pairs)
        assert each["recall_interval"] == wilson(each["recall"], sum(t == c for _, t in pairs))
        assert each["precision_interval"] == wilson(each["precision"], sum(s == c for s, _ in pairs))
    assert result["intervals"]["sensitivity"] == result["per_class"][1]["recall_interval"]
    assert result["intervals"]["accuracy"] == wilson(result["accuracy"], 90)
    assert "Wilson" in result["interval_method"]
    assert "90 test images" in result["interval_method"]


def test_a_class_that_is_absent_or_never_predicted_has_no_figure() -> None:
    result = classification_metrics(torch.eye(3)[[0, 0, 1]], torch.tensor([0, 0, 0]))
    absent = result["per_class"][1]
    assert (absent["recall"], absent["recall_interval"], absent["precision"]) == (None, None, 0.0)
    assert result["per_class"][2] == dict.fromkeys(absent)
    assert result["sensitivity"] is result["specificity"] is None
    two = classification_metrics(torch.eye(2)[[0, 0, 1]], torch.tensor([0, 0, 0]))
    assert (two["sensitivity"], two["specificity"]) == (None, 2 / 3)
    assert "sensitivity" not in two["intervals"]


# ------------------------------------------------------------------------------------------------------- the bootstrap


def figures_by_hand(scores: np.ndarray, labels: np.ndarray, predicted: np.ndarray) -> dict[str, float]:
    """Of a test split whose images were written out as often as they were drawn."""
    present = sorted(set(labels.tolist()))
    areas = [pairwise_auc(scores[:, c], labels == c) for c in present] if len(present) > 1 else [math.nan]
    return {
        "accuracy": float(np.mean(predicted == labels)),
        "majority_accuracy": max(float(np.mean(labels == c)) for c in present),
        "balanced_accuracy": float(np.mean([np.mean(predicted[labels == c] == c) for c in present])),
        "auc": float(np.mean(areas)),
    }


def test_a_redrawn_split_has_the_figures_of_its_images_written_out() -> None:
    """Whole units are drawn; ties count half; a class may be missing from a split."""
    random = np.random.default_rng(5)
    labels, units = random.integers(3, size=24), np.repeat(np.arange(8), 3)
    scores = np.round(random.normal(size=(24, 3)) + np.eye(3)[labels], 1)
    predicted = scores.argmax(axis=1)
    found, again = redraw(scores, labels, units, predicted), np.random.default_rng(intervals.SEED)
    assert len(found.accuracy) == intervals.draws_for(24, 3) == intervals.MOST_DRAWS
    for draw in range(30):
        rows = np.concatenate([np.flatnonzero(units == unit) for unit in again.integers(8, size=8)])
        for name, value in figures_by_hand(scores[rows], labels[rows], predicted[rows]).items():
            assert getattr(found, name)[draw] == pytest.approx(value, nan_ok=True), (draw, name)
        for c in range(3):
            of, said = labels[rows] == c, predicted[rows] == c
            recall = np.mean(predicted[rows][of] == c) if of.any() else math.nan
            precision = np.mean(labels[rows][said] == c) if said.any() else math.nan
            assert found.recall[draw, c] == pytest.approx(recall, nan_ok=True)
            assert found.precision[draw, c] == pytest.approx(precision, nan_ok=True)


def test_images_of_one_unit_are_not_independent() -> None:
    """Each image four times is no more evidence than once: the interval of units is twice as wide as that of images,
    and that of single images, by bootstrap, is Wilson's."""
    logits, labels = scored(100, 2, seed=7)
    once = classification_metrics(torch.tensor(logits), torch.tensor(labels))
    rows = np.repeat(np.arange(100), 4)
    four, units = (torch.tensor(logits[rows]), torch.tensor(labels[rows])), rows * 7 + 3  # any numbers
    apart, together = classification_metrics(*four), classification_metrics(*four, units)
    single = classification_metrics(torch.tensor(logits), torch.tensor(labels), np.arange(100))

    def width(result: dict, name: str) -> float:
        low, high = result["intervals"][name]
        assert low <= result[name] <= high
        return high - low

    for name in ("accuracy", "balanced_accuracy", "auc", "sensitivity", "specificity"):
        assert together[name] == pytest.approx(once[name])
        assert width(together, name) == pytest.approx(2 * width(apart, name), rel=0.15), name
        assert width(single, name) == pytest.approx(width(once, name), rel=0.15), name
    assert "100 units of the 400 test images" in together["interval_method"]
    assert together == classification_metrics(*four, units)  # the seed is public and fixed


def test_a_model_without_an_error_has_an_interval_all_the_same() -> None:
    labels = torch.arange(12) % 2
    units = np.arange(12) // 4
    for given, cases in ((None, 12), (units, 3)):
        result = classification_metrics(5 * torch.eye(2)[labels], labels, given)
        assert result["accuracy"] == result["auc"] == 1
        assert result["intervals"]["accuracy"] == wilson(1, cases)
        assert result["intervals"]["auc"] == wilson(1, 6 if given is None else 3)  # as the smallest class has
        json.dumps(result, allow_nan=False)


@pytest.mark.slow
def test_the_bootstrap_covers_the_truth_about_as_often_as_it_says(monkeypatch: pytest.MonkeyPatch) -> None:
    """150 test splits of 60 units of 1 to 5 images; the true AUC and balanced accuracy from many images."""
    random = np.random.default_rng(11)
    monkeypatch.setattr(intervals, "MOST_DRAWS", 200)

    def split(units: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        of = np.repeat(np.arange(units), random.integers(1, 6, size=units))
        labels = (np.arange(units) % 2)[of]
        shared = random.normal(size=units)[of]  # what the images of a unit have in common
        value = 1.2 * labels - 0.6 + shared + random.normal(size=len(of))
        return np.stack([-value, value], axis=1), labels, of

    scores, labels, _ = split(20_000)
    truth = classification_metrics(torch.tensor(scores), torch.tensor(labels))
    covered = dict.fromkeys(("accuracy", "auc", "balanced_accuracy"), 0)
    for _ in range(150):
        scores, labels, units = split(60)
        found = redraw(scores, labels, units, scores.argmax(axis=1))
        for name in covered:
            low, high = np.percentile(getattr(found, name), [2.5, 97.5])
            covered[name] += low <= truth[name] <= high
    assert all(0.87 <= count / 150 <= 0.99 for count in covered.values()), covered
