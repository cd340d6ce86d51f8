"""95 % intervals of the figures of a test split: what another test split of the same kind might have shown.

A share of independent images has Wilson's interval. Every other figure, and every figure where a unit (a patient, say)
has several test images, is computed again on test splits that are drawn from the units with replacement (the
bootstrap; Efron 1979), with a public seed: its interval holds the middle 95 % of these values. An interval speaks of
the model as it is: another training, with other noise, is not in it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from scipy.sparse import csr_matrix

SEED = 0
"""Of the draws; public."""
MOST_DRAWS, FEWEST_DRAWS = 1000, 200
WORK = 5e7
"""Draws × images × classes: of more, there are fewer draws."""
AT_ONCE = 50
"""Draws that are in memory together."""

Interval = tuple[float, float]


def wilson(share: float, count: int, deviations: float = 1.96) -> Interval:
    """Wilson's 95 % interval of a share in [0, 1] that was observed in ``count`` cases (Wilson 1927)."""
    z2 = deviations**2 / count
    centre = (share + z2 / 2) / (1 + z2)
    half = deviations * math.sqrt(share * (1 - share) / count + z2 / (4 * count)) / (1 + z2)
    return max(0.0, centre - half), min(1.0, centre + half)


@dataclass(frozen=True)
class Redrawn:
    """Each figure on each redrawn test split; NaN where it is not defined there."""

    accuracy: np.ndarray  # [draws]
    majority_accuracy: np.ndarray
    balanced_accuracy: np.ndarray
    auc: np.ndarray
    recall: np.ndarray  # [draws, C]
    precision: np.ndarray


def redraw(scores: np.ndarray, labels: np.ndarray, units: np.ndarray, predicted: np.ndarray) -> Redrawn:
    """Draw the units of the test split with replacement, as many as there are, and compute every figure, many times.

    Args:
        scores: [N, C]. labels, predicted: integers [N] in 0 … C-1. units: integers [N] in 0 … U-1.
    """
    count, classes = scores.shape
    right = _by_class(np.where(predicted == labels, labels, -1), classes)
    true, named = _by_class(labels, classes), _by_class(predicted, classes)
    rankings = [_Ranking(scores[:, c], labels == c) for c in np.unique(labels)]
    parts: list[tuple[np.ndarray, ...]] = []
    for weights in _weights(units, draws_for(count, classes)):
        hits, of, said = right @ weights, true @ weights, named @ weights
        recall = _ratio(hits, of)
        areas = np.array([ranking.auc(weights) for ranking in rankings])
        parts.append((
            _ratio(hits.sum(axis=0), of.sum(axis=0)), _ratio(of.max(axis=0), of.sum(axis=0)), _mean(recall),
            _mean(areas), recall.T, _ratio(hits, said).T,
        ))  # fmt: skip
    return Redrawn(*(np.concatenate(part) for part in zip(*parts, strict=True)))


@dataclass(frozen=True)
class RedrawnLabels:
    """``Redrawn`` where an image may have several of L labels; ``auc`` is the mean of ``areas``."""

    accuracy: np.ndarray  # [draws]
    majority_accuracy: np.ndarray
    balanced_accuracy: np.ndarray
    auc: np.ndarray
    recall: np.ndarray  # [draws, L]
    precision: np.ndarray
    areas: np.ndarray


def redraw_labels(scores: np.ndarray, labels: np.ndarray, units: np.ndarray, predicted: np.ndarray) -> RedrawnLabels:
    """``redraw`` for several labels an image: scores, labels and predicted [N, L], the last two bool."""
    count, names = scores.shape
    having, said = (csr_matrix(each.T.astype(np.float64)) for each in (labels, predicted))
    both = csr_matrix((labels & predicted).T.astype(np.float64))
    rankings = [_Ranking(scores[:, j], labels[:, j]) for j in range(names)]
    parts: list[tuple[np.ndarray, ...]] = []
    for weights in _weights(units, draws_for(count, names)):
        images = weights.sum(axis=0)
        of, named, hits = having @ weights, said @ weights, both @ weights
        passed = images - of - named + hits  # rightly without the label
        recall, areas = _ratio(hits, of), np.array([ranking.auc(weights) for ranking in rankings])
        balanced = [_mean(np.stack(pair)) for pair in zip(recall, _ratio(passed, images - of), strict=True)]
        parts.append((
            ((hits + passed) / images).mean(axis=0), (np.maximum(of, images - of) / images).mean(axis=0),
            np.mean(balanced, axis=0), _mean(areas), recall.T, _ratio(hits, named).T, areas.T,
        ))  # fmt: skip
    return RedrawnLabels(*(np.concatenate(part) for part in zip(*parts, strict=True)))


def redraw_kappa(labels: np.ndarray, predicted: np.ndarray, units: np.ndarray, draws: int) -> np.ndarray:
    """The kappa of grades with quadratic weights on each redrawn test split, [draws]; arguments as ``redraw``'s."""
    true, said, parts = labels.astype(np.float64), predicted.astype(np.float64), []
    for weights in _weights(units, draws):
        images = weights.sum(axis=0)
        apart = (true - said) ** 2 @ weights
        # squared distance of a true and a predicted grade of two images drawn independently
        chance = (true**2 + said**2) @ weights - 2 * (true @ weights) * (said @ weights) / images
        parts.append(1 - _ratio(apart, chance))
    return np.concatenate(parts)


def draws_for(count: int, classes: int) -> int:
    """How often the test split is drawn."""
    return round(min(MOST_DRAWS, max(FEWEST_DRAWS, WORK / (count * classes))))


def middle(value: float, redrawn: np.ndarray, cases: int) -> Interval:
    """The middle 95 % of a figure on redrawn test splits; with the figure itself in it.

    Where all of them are the same, such as without a single error, they cannot say how far the figure may be off:
    then Wilson's interval for ``cases`` ≥ 1 independent cases.
    """
    found = redrawn[np.isfinite(redrawn)]
    if not len(found) or found.min() == found.max():
        return wilson(value, cases)
    low, high = np.percentile(found, [2.5, 97.5])
    return min(float(low), value), max(float(high), value)


def _weights(units: np.ndarray, draws: int) -> Iterator[np.ndarray]:
    """How often each image is in each redrawn split, float64 [N, up to AT_ONCE]; all images of a unit come together."""
    random, count = np.random.default_rng(SEED), int(units.max()) + 1
    for first in range(0, draws, AT_ONCE):
        several = min(AT_ONCE, draws - first)
        drawn = [np.bincount(random.integers(count, size=count), minlength=count) for _ in range(several)]
        yield np.stack(drawn, axis=1).astype(np.float64)[units]


def _by_class(classes_of: np.ndarray, classes: int) -> csr_matrix:
    """[C, N], 1 where the image is of the class; -1 is of none."""
    kept = np.flatnonzero(classes_of >= 0)
    return csr_matrix((np.ones(len(kept)), (classes_of[kept], kept)), shape=(classes, len(classes_of)))


def _ratio(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    return np.divide(part, whole, out=np.full(part.shape, np.nan), where=whole > 0)


def _mean(values: np.ndarray) -> np.ndarray:
    """[C, draws] -> [draws]: over the classes for which it is defined."""
    known = np.isfinite(values)
    return _ratio(np.where(known, values, 0.0).sum(axis=0), known.sum(axis=0).astype(np.float64))


class _Ranking:
    """Images in the order of their scores for a class, for AUCs of weighted images."""

    def __init__(self, scores: np.ndarray, positive: np.ndarray) -> None:
        self._order = np.argsort(scores, kind="stable")
        ordered, self._positive = scores[self._order], positive[self._order]
        places = np.flatnonzero(self._positive)
        # images with a lower score come before ``below``, those with a lower or equal one before ``upto``
        self._below = np.searchsorted(ordered, ordered[places], side="left")
        self._upto = np.searchsorted(ordered, ordered[places], side="right")

    def auc(self, weights: np.ndarray) -> np.ndarray:
        """[N, draws] -> [draws]: the share of pairs of a positive and a negative image that are in the right order, a
        tie counted half."""
        weights = weights[self._order]
        wins, negative = weights[self._positive], np.where(self._positive[:, None], 0.0, weights)
        passed = np.concatenate([np.zeros((1, weights.shape[1])), np.cumsum(negative, axis=0)])
        right = (wins * (passed[self._below] + passed[self._upto]) / 2).sum(axis=0)
        return _ratio(right, wins.sum(axis=0) * passed[-1])
