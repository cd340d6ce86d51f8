"""From units of privacy to the rows of their images, and back to one clipped contribution for each unit."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dprandp.data import Dataset, DataSpec
from dprandp.errors import InputError
from dprandp.privacy.clipping import clipped_softmax_sum_of_units


@dataclass(frozen=True)
class UnitRows:
    """Which images a unit has. Private."""

    order: np.ndarray  # int64 [N], the images' positions, those of one unit next to each other, in their old order
    offsets: np.ndarray  # int64 [U+1]: unit u has the images order[offsets[u] : offsets[u+1]]

    def images(self, units: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Positions of all images of these units (int64 [U]), unit by unit; and how many each unit has."""
        sizes = self.offsets[units + 1] - self.offsets[units]
        within = np.arange(sizes.sum()) - np.repeat(np.cumsum(sizes) - sizes, sizes)
        return self.order[np.repeat(self.offsets[units], sizes) + within], sizes

    def clipped_softmax_sum(
        self,
        features: Tensor,
        labels: Tensor,
        units: np.ndarray,
        weight: Tensor,
        clip_norm: float,
        *,
        precise: bool,
        class_weights: Tensor | None = None,
    ) -> Tensor:
        """``clipped_softmax_sum_of_units`` of a batch: ``units``, int64 [U], maybe none. No feature is copied.

        Args:
            features: float [N, d] or [N, K, d], of all images. labels: int64 [N] or [N, classes].
        """
        images, sizes = self.images(units)
        offsets = torch.from_numpy(np.concatenate([[0], np.cumsum(sizes)]))
        return clipped_softmax_sum_of_units(
            features, labels, offsets, weight, clip_norm, precise=precise, rows=torch.from_numpy(images),
            class_weights=class_weights,
        )  # fmt: skip


def unit_rows(dataset: Dataset | None) -> UnitRows | None:
    """Which images each record of the sampler stands for; None where every image (or given row) is a record."""
    units = None if dataset is None else dataset.grouping()
    if units is None:
        return None
    sizes = np.bincount(units.of_image, minlength=units.count)
    return UnitRows(np.argsort(units.of_image, kind="stable"), np.concatenate([[0], np.cumsum(sizes)]))


def refuse_shared(dataset: Dataset) -> None:
    """Raise InputError where units are known to have images in both splits, before a pixel is read.

    The answer depends on private facts, as that about an unreadable image does: the guarantee is about data sets that
    are not refused, and to empty a slot never makes a refused one of them. How many units it is stays private.
    """
    units = dataset.grouping()
    if units is not None and units.shared_with_test:
        unit = dataset.spec.unit
        raise InputError(
            f"in {dataset.spec.name} some units of privacy, each {unit}, have images in both the training and the test "
            "split, so the figures of the test split would be too good",
            fix="put all images of a unit into one split; or give --allow-shared-units, which is stored and shown",
            private_detail=f"{units.shared_with_test} units",
        )


def unit_reminder(spec: DataSpec, asked: str | None) -> str | None:
    """What to say before a run on somebody's own images without units; a function of declared facts alone."""
    if asked is not None or spec.unit_column is not None or ":" not in spec.name:
        return None
    return (
        "note: one image is the unit of privacy. Where a person has several, or an image occurs twice, ε is too small: "
        f"give --unit-column NAME, and see `dprandp datasets --check {spec.name}` (its answer is private)"
    )
