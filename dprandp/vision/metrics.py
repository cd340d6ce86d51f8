"""Metrics of a test split, by scikit-learn."""

from __future__ import annotations

import numpy as np
from scipy.special import log_softmax
from sklearn.metrics import accuracy_score, confusion_matrix, recall_score, roc_auc_score
from torch import Tensor

from dprandp.errors import UsageError

_LOSS_FLOOR = np.log(1e-12)  # a wrong answer given with certainty costs 27.6 nats, not infinity


def classification_metrics(scores: Tensor, labels: Tensor) -> dict[str, float | list[list[int]] | None]:
    """Accuracy, balanced accuracy, AUC, loss and the confusion matrix; plain Python values, ready for JSON.

    A class that does not occur among the labels has no recall and no ROC curve: it is left out of ``balanced_accuracy``
    and ``auc``, and its row in ``confusion`` is zero.

    Args:
        scores: logits, floating [N, C], N >= 1, C >= 2. labels: integers [N] in 0..C-1.

    Returns:
        accuracy: fraction of rows whose largest score (the first of several) is at the label.
        balanced_accuracy: mean recall over the classes that occur, in [0, 1].
        auc: one-vs-rest area under the ROC curve, mean over the classes that occur; with two classes the plain AUC.
            None when a single class occurs.
        loss: mean cross-entropy, nats; probabilities below 1e-12 count as 1e-12.
        confusion: C rows (true class) of C counts (predicted class).

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
    return {
        "accuracy": float(accuracy_score(wanted, predicted)),
        "balanced_accuracy": float(recall_score(wanted, predicted, labels=present, average="macro")),
        "auc": auc,
        "loss": float(-np.maximum(log_probabilities[np.arange(len(wanted)), wanted], _LOSS_FLOOR).mean()),
        "confusion": confusion_matrix(wanted, predicted, labels=np.arange(values.shape[1])).tolist(),
    }
