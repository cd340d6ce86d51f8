"""Metrics of a test split, by scikit-learn."""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch
from scipy.special import log_softmax
from sklearn.metrics import accuracy_score, confusion_matrix, recall_score, roc_auc_score
from torch import Tensor

from dprandp.errors import InputError, UsageError

_LOSS_FLOOR = np.log(1e-12)  # a wrong answer given with certainty costs 27.6 nats, not infinity


def classification_metrics(
    scores: Tensor | np.ndarray, labels: Tensor | np.ndarray, *, kind: Literal["logits", "probabilities"] = "logits"
) -> dict[str, float | list[list[int]] | None]:
    """Accuracy, balanced accuracy, AUC, loss and the confusion matrix; plain Python values, ready for JSON.

    A class that does not occur among the labels has no recall and no ROC curve. It is left out of ``balanced_accuracy``
    and ``auc``, which are averages over the classes that do occur, and its row in ``confusion`` is zero.

    Args:
        scores: floating [N, C], N >= 1, C >= 2: logits, or probabilities whose rows sum to 1.
        labels: integers [N] in 0..C-1.
        kind: which of the two ``scores`` are.

    Returns:
        accuracy: share of rows whose largest score (the first of several) is at the label, in [0, 1].
        balanced_accuracy: mean recall over the classes that occur, in [0, 1].
        auc: one-vs-rest area under the ROC curve, mean over the classes that occur; with two classes the plain AUC.
            None when a single class occurs: there is nothing to rank.
        loss: mean cross-entropy, nats; probabilities below 1e-12 count as 1e-12.
        confusion: C rows (true class) of C counts (predicted class).

    Raises:
        InputError: no rows, shapes that do not fit, labels out of range.
        UsageError: scores that are not finite (a diverged training), or negative probabilities, or an unknown kind.
    """
    scores = _array(scores).astype(np.float64)
    labels = _array(labels)
    if scores.ndim != 2 or scores.shape[1] < 2 or labels.shape != scores.shape[:1] or len(labels) == 0:
        raise InputError(
            f"scores of shape {scores.shape} and labels of shape {labels.shape} cannot be compared",
            fix="pass scores [N, C] with at least two classes and labels [N], N at least 1",
        )
    classes = scores.shape[1]
    if not np.issubdtype(labels.dtype, np.integer) or labels.min() < 0 or labels.max() >= classes:
        raise InputError(f"a label is not an integer in 0..{classes - 1}", fix="check the class list of the data set")
    if not np.isfinite(scores).all():
        raise UsageError(
            "the model's scores contain values that are not finite: the training diverged",
            fix="lower the learning rate; the budget already spent stays spent",
        )
    log_probabilities = _log_probabilities(scores, kind)

    predicted = scores.argmax(axis=1)
    present = np.unique(labels)
    auc = None
    if len(present) > 1:
        auc = float(np.mean([roc_auc_score(labels == c, log_probabilities[:, c]) for c in present]))
    return {
        "accuracy": float(accuracy_score(labels, predicted)),
        "balanced_accuracy": float(recall_score(labels, predicted, labels=present, average="macro")),
        "auc": auc,
        "loss": float(-np.maximum(log_probabilities[np.arange(len(labels)), labels], _LOSS_FLOOR).mean()),
        "confusion": confusion_matrix(labels, predicted, labels=np.arange(classes)).tolist(),
    }


def _array(values: Tensor | np.ndarray) -> np.ndarray:
    if isinstance(values, Tensor):
        values = values.detach().cpu()
        return (values.float() if values.dtype == torch.bfloat16 else values).numpy()
    return np.asarray(values)


def _log_probabilities(scores: np.ndarray, kind: str) -> np.ndarray:
    if kind == "logits":
        return log_softmax(scores, axis=1)
    if kind == "probabilities":
        if scores.min() < 0 or not np.allclose(scores.sum(axis=1), 1, atol=1e-2):
            raise UsageError("the scores are not probabilities: negative or not summing to 1", fix="pass kind='logits'")
        return np.log(np.maximum(scores, np.finfo(np.float64).tiny))
    raise UsageError(f"scores of kind {kind!r} are unknown", fix="use 'logits' or 'probabilities'")
