"""Figures of a test split, by scikit-learn, with their intervals (``intervals.py``)."""

from __future__ import annotations

from typing import Any

import numpy as np
from scipy.special import log_expit, log_softmax
from sklearn.metrics import accuracy_score, cohen_kappa_score, confusion_matrix, recall_score, roc_auc_score
from torch import Tensor

from dprandp.errors import UsageError
from dprandp.vision.intervals import (
    SEED,
    Interval,
    Redrawn,
    RedrawnLabels,
    draws_for,
    middle,
    redraw,
    redraw_kappa,
    redraw_labels,
    wilson,
)

_LOSS_FLOOR = np.log(1e-12)  # a wrong answer given with certainty costs 27.6 nats, not infinity


def classification_metrics(
    scores: Tensor, labels: Tensor, units: np.ndarray | None = None, *, ordinal: bool = False
) -> dict[str, Any]:
    """What a model's scores on the test split say about it; plain Python values, ready for JSON.

    A class that does not occur among the labels has no recall and no ROC curve: it is left out of ``balanced_accuracy``
    and ``auc``, and its row in ``confusion`` is zero.

    Args:
        scores: logits, floating [N, C], N >= 1, C >= 2. labels: integers [N] in 0..C-1.
        units: integers [N], which images belong together (to one patient, say); None where each stands for itself.
        ordinal: the classes are grades, in their order.

    Returns:
        accuracy: fraction of rows whose largest score (the first of several) is at the label.
        majority_accuracy: fraction of the most frequent class, which a model that always names it gets right.
        balanced_accuracy: mean recall over the classes that occur, in [0, 1].
        auc: one-vs-rest area under the ROC curve, mean over the classes that occur; with two classes the plain AUC.
            None when a single class occurs.
        sensitivity, specificity: with two classes, the recall of the second and of the first; else None.
        kappa: of grades, Cohen's kappa with quadratic weights (Cohen 1968), in [-1, 1]; None for other classes, and
            where all images have one grade and get it.
        loss: mean cross-entropy, nats; probabilities below 1e-12 count as 1e-12.
        confusion: C rows (true class) of C counts (predicted class).
        per_class: for each class recall and precision with their intervals; None where the class does not occur, or
            is never predicted.
        intervals: figure -> [low, high], of the fractions above that are not None.
        interval_method: how they were found, in words.

    Raises:
        UsageError: scores that are not finite (a diverged training).
    """
    values, wanted = _finite(scores), labels.cpu().numpy()
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
    of = _of_units(units, len(wanted))
    # a predicted class must be the same with log-probabilities as with scores, between which rounding makes ties
    redrawn = redraw(log_probabilities, wanted, of, predicted)
    chosen = [(wanted == c, predicted == c) for c in range(values.shape[1])]
    per_class, intervals, method = _intervals(figures, redrawn, chosen, of, units is None)
    kappa = _kappa(wanted, predicted, values.shape[1], of, intervals) if ordinal else None
    two = len(per_class) == 2
    found: dict[str, Any] = figures | {
        "sensitivity": per_class[1]["recall"] if two else None,
        "specificity": per_class[0]["recall"] if two else None,
        "kappa": kappa,
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


def multi_label_metrics(scores: Tensor, labels: Tensor, units: np.ndarray | None = None) -> dict[str, Any]:
    """``classification_metrics`` where an image may have several of L labels: means over the labels, as MedMNIST's.

    Args:
        scores: log odds, floating [N, L], N >= 1; a model says yes where they are above 0, a probability of .5.
        labels: integers [N, L], 0 or 1.
        units: as there.

    Returns:
        accuracy: fraction of right answers, yes or no, over images and labels.
        majority_accuracy: of always giving each label its more frequent answer.
        balanced_accuracy: mean over the labels of the mean recall of yes and of no, as far as they occur.
        auc: mean area under the ROC curve over the labels of which both occur; None where there is none.
        loss: mean binary cross-entropy over images and labels, nats.
        per_class: for each label recall, precision and auc with their intervals; None where they are not defined.
        confusion, sensitivity, specificity, kappa: None.
        intervals, interval_method: as there. The answers about one image are not independent, so that the interval of
            accuracy is found by bootstrap too.

    Raises:
        UsageError: scores that are not finite (a diverged training).
    """
    values, wanted = _finite(scores), labels.cpu().numpy() > 0
    predicted = values > 0
    areas = [
        float(roc_auc_score(own, values[:, j])) if 0 < own.sum() < len(own) else None for j, own in enumerate(wanted.T)
    ]
    known = [area for area in areas if area is not None]
    right, having = wanted == predicted, wanted.mean(axis=0)
    balanced = [
        np.mean([right[own == value, j].mean() for value in np.unique(own)]) for j, own in enumerate(wanted.T)
    ]
    figures = {
        "accuracy": float(right.mean()),
        "majority_accuracy": float(np.maximum(having, 1 - having).mean()),
        "balanced_accuracy": float(np.mean(balanced)),
        "auc": float(np.mean(known)) if known else None,
    }
    of = _of_units(units, len(wanted))
    redrawn = redraw_labels(values, wanted, of, predicted)
    chosen = list(zip(wanted.T, predicted.T, strict=True))
    per_class, intervals, method = _intervals(figures, redrawn, chosen, of, units is None)
    for j, (one, area) in enumerate(zip(per_class, areas, strict=True)):
        cases = min(len(np.unique(of[wanted[:, j] == value])) for value in np.unique(wanted[:, j]))
        one |= {"auc": area, "auc_interval": None if area is None else middle(area, redrawn.areas[:, j], cases)}
    log_odds = np.where(wanted, values, -values)
    return figures | {
        "sensitivity": None,
        "specificity": None,
        "kappa": None,
        "loss": float(-np.maximum(log_expit(log_odds), _LOSS_FLOOR).mean()),
        "confusion": None,
        "per_class": per_class,
        "intervals": intervals,
        "interval_method": method,
    }


def _finite(scores: Tensor) -> np.ndarray:
    values = scores.detach().cpu().double().numpy()
    if not np.isfinite(values).all():
        raise UsageError(
            "the model's scores contain values that are not finite: the training diverged",
            fix="lower the learning rate; the budget already spent stays spent",
        )
    return values


def _of_units(units: np.ndarray | None, count: int) -> np.ndarray:
    """The number of each image's unit, from 0; each is its own where there are none."""
    return np.arange(count) if units is None else np.unique(units, return_inverse=True)[1].reshape(-1)


def _kappa(
    labels: np.ndarray, predicted: np.ndarray, classes: int, of: np.ndarray, intervals: dict[str, Interval]
) -> float | None:
    """The kappa of grades, and its interval among the others."""
    if len(np.unique(np.concatenate([labels, predicted]))) == 1:
        return None
    kappa = float(cohen_kappa_score(labels, predicted, weights="quadratic"))
    redrawn = redraw_kappa(labels, predicted, of, draws_for(len(labels), classes))
    found = redrawn[np.isfinite(redrawn)]
    if kappa >= 0 or (len(found) and found.min() < found.max()):  # else there is nothing to say how far off it is
        intervals["kappa"] = middle(kappa, redrawn, len(np.unique(of)))
    return kappa


def _intervals(
    figures: dict[str, float | None],
    redrawn: Redrawn | RedrawnLabels,
    chosen: list[tuple[np.ndarray, np.ndarray]],
    of: np.ndarray,
    independent: bool,
) -> tuple[list[dict[str, Any]], dict[str, Interval], str]:
    """``per_class``, ``intervals`` and ``interval_method``.

    Args:
        chosen: for each class or label, bool [N] which images have it, and of which the model says so.
        of: the unit of each image. independent: each image is one.
    """
    count, classes, units = len(of), len(chosen), len(np.unique(of))
    several = isinstance(redrawn, RedrawnLabels)
    smallest = min(len(np.unique(of[having])) for having, _ in chosen if having.any()) if not several else units
    cases = {"accuracy": units, "majority_accuracy": units}
    intervals: dict[str, Interval] = {}
    for name, value in figures.items():
        if value is None:
            continue
        if name in cases and independent and not several:
            intervals[name] = wilson(value, count)
        else:
            intervals[name] = middle(value, getattr(redrawn, name), cases.get(name, smallest))
    per_class = []
    for c, (having, named) in enumerate(chosen):
        one: dict[str, Any] = {}
        for name, whole, draws in (("recall", having, redrawn.recall), ("precision", named, redrawn.precision)):
            one |= {name: None, f"{name}_interval": None}
            if whole.any():
                value, belong = float((having & named).sum() / whole.sum()), len(np.unique(of[whole]))
                interval = wilson(value, belong) if independent else middle(value, draws[:, c], belong)
                one |= {name: value, f"{name}_interval": interval}
        per_class.append(one)
    how = f"{draws_for(count, classes)} draws, public seed {SEED}"
    figure = "mean figures" if several else "balanced accuracy and AUC"
    method = f"95 %: Wilson; of {figure} by bootstrap over the {count} test images ({how})"
    if not independent:
        method = f"95 %: bootstrap over the {units} units of the {count} test images ({how})"
    return per_class, intervals, method
