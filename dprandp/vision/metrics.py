"""Figures of a test split, by scikit-learn, with their intervals (``intervals.py``)."""

from __future__ import annotations

from typing import Any

import numpy as np
from scipy.special import log_softmax
from sklearn.metrics import accuracy_score, confusion_matrix, recall_score, roc_auc_score
from torch import Tensor

from dprandp.errors import UsageError
from dprandp.vision.intervals import SEED, Interval, draws_for, middle, redraw, wilson

_LOSS_FLOOR = np.log(1e-12)  # a wrong answer given with certainty costs 27.6 nats, not infinity


def classification_metrics(scores: Tensor, labels: Tensor, units: np.ndarray | None = None) -> dict[str, Any]:
    """What a model's scores on the test split say about it; plain Python values, ready for JSON.

    A class that does not occur among the labels has no recall and no ROC curve: it is left out of ``balanced_accuracy``
    and ``auc``, and its row in ``confusion`` is zero.

    Args:
        scores: logits, floating [N, C], N >= 1, C >= 2. labels: integers [N] in 0..C-1.
        units: integers [N], which images belong together (to one patient, say); None where each stands for itself.

    Returns:
        accuracy: fraction of rows whose largest score (the first of several) is at the label.
        majority_accuracy: fraction of the most frequent class, which a model that always names it gets right.
        balanced_accuracy: mean recall over the classes that occur, in [0, 1].
        auc: one-vs-rest area under the ROC curve, mean over the classes that occur; with two classes the plain AUC.
            None when a single class occurs.
        sensitivity, specificity: with two classes, the recall of the second and of the first; else None.
        loss: mean cross-entropy, nats; probabilities below 1e-12 count as 1e-12.
        confusion: C rows (true class) of C counts (predicted class).
        per_class: for each class recall and precision with their intervals; None where the class does not occur, or
            is never predicted.
        intervals: figure -> [low, high], of the fractions above that are not None.
        interval_method: how they were found, in words.

    Raises:
        UsageError: scores that are not finite (a diverged training).
    """
    values, wanted = scores.detach().cpu().double().numpy(), labels.cpu().numpy()
    if not np.isfinite(values).all():
        raise UsageError(
            "the model's scores contain values that are not finite: the training diverged",
            fix="lower the learning rate; the budget already spent stays spent",
        )
    log_probabilities = log_softmax(values, axis=1)
    predicted, present = values.argmax(axis=1), np.unique(wanted)
    auc = None
    if len(present) > 1:
        auc = float(np.mean([roc_auc_score(wanted == c, log_probabilities[:, c]) for c in present]))
    confusion = confusion_matrix(wanted, predicted, labels=np.arange(values.shape[1]))
    figures = {
        "accuracy": float(accuracy_score(wanted, predicted)),
        "majority_accuracy": float(confusion.sum(axis=1).max() / len(wanted)),
        "balanced_accuracy": float(recall_score(wanted, predicted, labels=present, average="macro")),
        "auc": auc,
    }
    per_class, intervals, method = _intervals(figures, log_probabilities, wanted, predicted, confusion, units)
    two = len(per_class) == 2
    found: dict[str, Any] = figures | {
        "sensitivity": per_class[1]["recall"] if two else None,
        "specificity": per_class[0]["recall"] if two else None,
        "loss": float(-np.maximum(log_probabilities[np.arange(len(wanted)), wanted], _LOSS_FLOOR).mean()),
        "confusion": confusion.tolist(),
        "per_class": per_class,
        "intervals": intervals,
        "interval_method": method,
    }
    if two:
        recalls = {"sensitivity": per_class[1]["recall_interval"], "specificity": per_class[0]["recall_interval"]}
        intervals |= {name: interval for name, interval in recalls.items() if interval is not None}
    return found


def _intervals(
    figures: dict[str, float | None],
    log_probabilities: np.ndarray,
    labels: np.ndarray,
    predicted: np.ndarray,
    confusion: np.ndarray,
    units: np.ndarray | None,
) -> tuple[list[dict[str, Any]], dict[str, Interval], str]:
    """``per_class``, ``intervals`` and ``interval_method``."""
    count, classes = log_probabilities.shape
    _, of = (None, np.arange(count)) if units is None else np.unique(units, return_inverse=True)
    # a predicted class must be the same with log-probabilities as with scores, between which rounding makes ties
    redrawn = redraw(log_probabilities, labels, of.reshape(-1), predicted)
    smallest = min(len(np.unique(of[labels == c])) for c in np.unique(labels))
    cases = {"accuracy": len(np.unique(of)), "majority_accuracy": len(np.unique(of))}
    intervals: dict[str, Interval] = {}
    for name, value in figures.items():
        if value is None:
            continue
        if name in cases and units is None:
            intervals[name] = wilson(value, count)
        else:
            intervals[name] = middle(value, getattr(redrawn, name), cases.get(name, smallest))
    per_class = []
    for c in range(classes):
        one: dict[str, Any] = {}
        for name, chosen, draws in (
            ("recall", labels == c, redrawn.recall), ("precision", predicted == c, redrawn.precision),
        ):  # fmt: skip
            one |= {name: None, f"{name}_interval": None}
            if chosen.any():
                value, belong = float(confusion[c, c] / chosen.sum()), len(np.unique(of[chosen]))
                interval = wilson(value, belong) if units is None else middle(value, draws[:, c], belong)
                one |= {name: value, f"{name}_interval": interval}
        per_class.append(one)
    how = f"{draws_for(count, classes)} draws, public seed {SEED}"
    if units is None:
        method = f"95 %: Wilson; of balanced accuracy and AUC by bootstrap over the {count} test images ({how})"
    else:
        method = f"95 %: bootstrap over the {len(np.unique(of))} units of the {count} test images ({how})"
    return per_class, intervals, method
