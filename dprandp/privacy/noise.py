"""Randomness that privacy rests on, and the Gaussian noise made of it.

Guarantee:
    ``SystemRandom`` takes every bit from the operating system (``os.urandom``). It keeps no state, so nothing can be
    saved, restored, seeded, forked or repeated: a resumed or a second process draws other values.

Known limits (each is part of a run's disclosure):
    * *Floating point.* A Gaussian in double precision has gaps, and gaps can show which value was released (Mironov
      2012, "On significance of the least significant bits for differential privacy"; Haney et al. 2022,
      "Precision-based attacks and interval refining"). The noise is computed and added in float64 and the result
      rounded to float32, which hides the 29 lowest bits, so that the known attacks do not apply directly; this is a
      mitigation, not a proof. Severity: low for trained models, where single noisy sums are not published; where they
      are, use ``discrete_noise``, which has no such gaps.
    * *Tail.* Box-Muller from 53-bit uniforms never exceeds 8.6 standard deviations. What is cut off has probability
      1e-17 a coordinate, 3e-8 in all for 875 steps of 3 million parameters: it may be thought of as added to δ.
    * *Time.* Nothing here runs in constant time.
"""

from __future__ import annotations

import math
import os
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Literal, Protocol, TypeVar

import numpy as np
import torch

from dprandp.errors import UsageError

NoiseKind = Literal["gaussian", "discrete"]
RandomMode = Literal["os-entropy", "insecure-seed"]
Tensors = TypeVar("Tensors", Mapping[str, torch.Tensor], Sequence[torch.Tensor])


class RandomSource(Protocol):
    """Where batches and noise come from; ``mode`` goes into the ledger."""

    mode: RandomMode
    private: bool

    def uniform(self, count: int) -> np.ndarray:
        """float64 [count], independent, uniform on the multiples of 2⁻⁵³ in [0, 1)."""

    def gaussian(self, shape: Sequence[int]) -> torch.Tensor:
        """float64 tensor of ``shape`` on the CPU, independent standard normal values."""

    def words(self, count: int) -> np.ndarray:
        """uint64 [count], independent, uniform."""


class _WordSource(ABC):
    """Uniform and Gaussian values from 64-bit random words."""

    @abstractmethod
    def words(self, count: int) -> np.ndarray:
        """As in ``RandomSource``."""

    def uniform(self, count: int) -> np.ndarray:
        return (self.words(count) >> np.uint64(11)).astype(np.float64) * 2.0**-53

    def gaussian(self, shape: Sequence[int]) -> torch.Tensor:
        """Box & Muller 1958: √(−2 log(1−u)) times cosine and sine of 2πv, for u, v uniform in [0, 1)."""
        count = math.prod(shape)
        pairs = (count + 1) // 2
        radius = torch.from_numpy(self.uniform(pairs)).neg_().log1p_().mul_(-2.0).sqrt_()  # 1−u is never 0
        angle = torch.from_numpy(self.uniform(pairs)).mul_(2 * math.pi)
        return torch.cat([radius * angle.cos(), radius.mul_(angle.sin_())])[:count].reshape(tuple(shape))


class SystemRandom(_WordSource):
    """The only source whose results may be called private: entropy of the operating system."""

    mode: RandomMode = "os-entropy"
    private = True

    def words(self, count: int) -> np.ndarray:
        return np.frombuffer(os.urandom(8 * count), dtype=np.uint64)


class InsecureSeed(_WordSource):
    """Repeatable values for tests. Whoever knows the seed can subtract the noise: NOT PRIVATE.

    Args:
        seed: a whole number of at least 0.
        stream: further whole numbers of at least 0 (attempt, step) that pick an unrelated sequence of the same seed.
    """

    mode: RandomMode = "insecure-seed"
    private = False

    def __init__(self, seed: int, *stream: int) -> None:
        if min(seed, *stream, 0) < 0:
            raise UsageError(f"The insecure seed is {seed}.", fix="Give a whole number of at least 0.")
        self._generator = np.random.Generator(np.random.Philox(np.random.SeedSequence([seed, *stream])))

    def words(self, count: int) -> np.ndarray:
        return self._generator.integers(0, 2**64, size=count, dtype=np.uint64)


def add_gaussian_noise(
    tensors: Tensors, std: float, random: RandomSource
) -> dict[str, torch.Tensor] | list[torch.Tensor]:
    """Each coordinate plus independent N(0, std²), in a structure like ``tensors``.

    Args:
        tensors: name -> tensor, or a list of tensors; any floating dtype, any device, any shape.
        std: standard deviation of the noise in one coordinate, in the tensors' unit; finite, at least 0. 0 adds
            nothing.
        random: where the noise comes from.

    Returns:
        New float32 tensors on the devices of the old ones.

    Guarantee:
        Noise is drawn afresh for every coordinate of every tensor in every call; noise and sum are float64 until the
        end.

    Raises:
        UsageError: std is negative, infinite or NaN.
    """
    if not (math.isfinite(std) and std >= 0):
        raise UsageError(f"The standard deviation of the noise is {std}.", fix="Give a finite number of at least 0.")

    given = list(tensors.values() if isinstance(tensors, Mapping) else tensors)
    # All of it is drawn before any goes to a device, which waits for the tensors: meanwhile it computes them.
    noises = [random.gaussian(tensor.shape).mul_(std) if std > 0 else None for tensor in given]
    noisy = [
        tensor.to(torch.float32, copy=True)
        if noise is None
        else noise.to(tensor.device).add_(tensor.to(torch.float64)).to(torch.float32)
        for tensor, noise in zip(given, noises, strict=True)
    ]
    return dict(zip(tensors, noisy, strict=True)) if isinstance(tensors, Mapping) else noisy
