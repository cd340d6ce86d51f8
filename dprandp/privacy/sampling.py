"""True Poisson sampling: each record enters each step's batch on its own coin, whatever the others do."""

from __future__ import annotations

import math

import numpy as np

from dprandp.errors import UsageError
from dprandp.privacy.noise import RandomSource


class PoissonSampler:
    """Batches of a Poisson sample of the records 0 … examples−1.

    Args:
        examples: N ≥ 1, the public number of records.
        sample_rate: q in (0, 1]; 1 takes all records and draws no coin.
        random: where the coins come from.

    Guarantee:
        In every draw each record is included with probability q (to 2⁻⁵³), independently of the other records and of
        all other draws. There is no shuffling, no cap, no minimum, no fixed size: the accountant's assumption,
        literally.

    Raises:
        UsageError: a value is outside its range.
    """

    def __init__(self, examples: int, sample_rate: float, random: RandomSource) -> None:
        if examples < 1:
            raise UsageError(f"The number of examples is {examples}.", fix="Give a data set with at least one example.")
        if not (math.isfinite(sample_rate) and 0 < sample_rate <= 1):
            raise UsageError(f"The sample rate is {sample_rate}.", fix="Give a number above 0, at most 1.")
        self.examples = int(examples)
        self.sample_rate = float(sample_rate)
        self._random = random

    def draw(self) -> np.ndarray:
        """int64 [b], rising, b from 0 to ``examples``. Private: which records were drawn must never be released."""
        if self.sample_rate == 1:
            return np.arange(self.examples, dtype=np.int64)
        return np.flatnonzero(self._random.uniform(self.examples) < self.sample_rate).astype(np.int64)
