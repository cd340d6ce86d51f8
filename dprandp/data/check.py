"""Private facts about a data set for its owner, before a run: duplicates, units and empty classes.

An image that occurs twice is protected only half as well as ε says, and so is a patient whose images are in several
units. No ε covers these counts, so no run makes them: a separate command prints them on the terminal, and stores
nothing.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np

from dprandp.data.base import Dataset, image_digests


def check_data(dataset: Dataset) -> dict[str, Any]:
    """Count exact duplicates and find empty classes, reading both splits. All but the declared facts is private.

    Returns:
        data, unit, train_examples, train_units (declared facts); largest_unit: images of the largest unit;
        repeated_images: training images that equal an earlier one, pixel by pixel; across_units: training images of
        which a copy lies in another unit; largest_copies: units that hold the same image, at most;
        contradicting_labels: distinct images that occur with different labels; in_test: training images of which a
        copy lies in the test split; units_in_test: units with images in both splits (None where not declared);
        empty_classes: names of the declared classes that have no training image.
    """
    spec, train, test, units = dataset.spec, dataset.train(), dataset.test(), dataset.grouping()
    digests = image_digests(train.images)
    of_image = np.arange(len(digests)) if units is None else units.of_image
    seen_in: dict[bytes, set[int]] = {}
    labels: dict[bytes, set[int]] = {}
    for digest, unit, label in zip(digests, of_image.tolist(), train.labels.tolist(), strict=True):
        seen_in.setdefault(digest, set()).add(unit)
        labels.setdefault(digest, set()).add(label)
    tested = set(image_digests(test.images))
    counts = np.bincount(train.labels, minlength=len(spec.classes))
    return {
        "data": spec.name,
        "unit": spec.unit,
        "train_examples": spec.train_examples,
        "train_units": spec.train_units,
        "largest_unit": max(Counter(of_image.tolist()).values()),
        "repeated_images": len(digests) - len(seen_in),
        "across_units": sum(len(seen_in[digest]) > 1 for digest in digests),
        "largest_copies": max(map(len, seen_in.values())),
        "contradicting_labels": sum(len(found) > 1 for found in labels.values()),
        "in_test": sum(digest in tested for digest in digests),
        "units_in_test": units and units.shared_with_test,
        "empty_classes": [spec.classes[index] for index in np.flatnonzero(counts == 0)],
    }
