"""A random part of a training split that its owner declares public, and the rest, which stays private.

Which images are which depends on a public seed, on the declared number of images and on nothing else. The rest is a
data set of its own: its N is smaller, its test split is the same, and the public part cannot be reached through it.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from dprandp.datasets.base import Dataset, Split
from dprandp.errors import UsageError

_KEY = 0x7075626C6963  # "public": so that this permutation is nobody else's for the same seed


def public_positions(examples: int, fraction: float, seed: int) -> np.ndarray:
    """Positions of the public part, int64, ascending: ⌊fraction · examples + ½⌋ of them.

    Raises:
        UsageError: the part, or the rest, would be empty.
    """
    count = int(fraction * examples + 0.5)
    if not 0 < count < examples:
        raise UsageError(
            f"fraction:{fraction:g} of {examples} training images is {count}",
            fix="give a fraction that leaves images on either side",
        )
    return np.sort(np.random.default_rng([_KEY, seed]).permutation(examples)[:count])


def without_public_part(dataset: Dataset, fraction: float, seed: int) -> Dataset:
    """The private rest. No pixel and no label is read.

    Args:
        dataset: named, not read; one image is its unit of privacy.
        fraction: of the training images, in (0, 1).
        seed: public.

    Raises:
        UsageError: units of several images, or nothing left on one side.
    """
    _refuse_units(dataset)
    spec = dataset.spec
    chosen = public_positions(spec.train_examples, fraction, seed)
    kept = np.setdiff1d(np.arange(spec.train_examples), chosen)

    def read(split: str) -> tuple[np.ndarray, np.ndarray]:
        if split == "test":
            made = dataset.test()
            return made.images, made.labels
        whole = dataset.train()
        return whole.images[kept], whole.labels[kept]

    return Dataset(dataclasses.replace(spec, train_examples=len(kept)), read, dataset.require)


def public_part(dataset: Dataset, fraction: float, seed: int) -> Split:
    """The images and labels that were declared public; arguments as for ``without_public_part``.

    Raises:
        UsageError: as there. InputError: unusable files.
    """
    _refuse_units(dataset)
    chosen = public_positions(dataset.spec.train_examples, fraction, seed)
    whole = dataset.train()
    return Split(whole.images[chosen], whole.labels[chosen])


def _refuse_units(dataset: Dataset) -> None:
    if dataset.spec.unit_column is not None:
        raise UsageError(
            f"the unit of privacy of {dataset.spec.name} is {dataset.spec.unit}, and a random part of the images would "
            "split units into a public and a private half",
            fix="put the public units into a folder of their own and give --public folder:PATH",
        )
