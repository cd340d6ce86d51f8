"""The randomness that privacy depends on: entropy, Gaussian and discrete Gaussian noise, Poisson batches.

Guarantee:
    ``SystemRandom`` takes every bit from the operating system (``os.urandom``). It keeps no state, so nothing can be
    saved, restored, seeded, forked or repeated: a resumed or a second process draws other values.

Known limits (each is part of a run's disclosure):
    * *Floating point.* A Gaussian in double precision has gaps, which can show which value was released (Mironov 2012,
      "On significance of the least significant bits for differential privacy"; Haney et al. 2022, "Precision-based
      attacks and interval refining"). Noise is computed and added in float64 and the result rounded to float32, which
      hides the 29 lowest bits: a mitigation, not a proof. Severity: low for trained models, where single noisy sums
      are not published; where they are, use discrete noise, which has no such gaps.
    * *Tail.* A value never exceeds 12.2 standard deviations. What is cut off has probability 1e-32 a coordinate, 3e-23
      in all for 875 steps of 3 million parameters: it may be thought of as added to δ.
    * *Time.* Nothing here runs in constant time.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from decimal import ROUND_HALF_EVEN, Decimal, localcontext
from functools import cache
from typing import Literal, TypeVar

import numpy as np
import torch

from dprandp.errors import UsageError
from dprandp.privacy.accounting import LATTICE_BITS, MOST_COORDINATES

NoiseKind = Literal["gaussian", "discrete"]
RandomMode = Literal["os-entropy", "insecure-seed"]
Tensors = TypeVar("Tensors", Mapping[str, torch.Tensor], Sequence[torch.Tensor])


class RandomSource:
    """A source of batches and noise, from the 64-bit random words of a subclass; ``mode`` goes into the ledger."""

    mode: RandomMode
    private: bool

    def words(self, count: int) -> np.ndarray:
        """uint64 [count], independent, uniform."""
        raise NotImplementedError

    def uniform(self, count: int) -> np.ndarray:
        """float64 [count], independent, uniform on the multiples of 2⁻⁵³ in [0, 1)."""
        return (self.words(count) >> np.uint64(11)).astype(np.float64) * 2.0**-53

    def gaussian(self, shape: Sequence[int]) -> torch.Tensor:
        """float64 tensor on the CPU, independent standard normal values.

        Box & Muller 1958: √(−2 log(1−u)) times cosine and sine of 2πv, for u, v uniform in [0, 1). Where 1−u is below
        2⁻³³ it gets 53 bits more, without which values beyond 8.6 would be missing and those near it be few.
        """
        count = math.prod(shape)
        pairs = (count + 1) // 2
        near = 1 - self.uniform(pairs)  # exact, never 0
        if len(tail := np.flatnonzero(near < 2.0**-33)):
            near[tail] -= 2.0**-53 * self.uniform(len(tail))
        radius = torch.from_numpy(near).log_().mul_(-2.0).sqrt_()
        angle = torch.from_numpy(self.uniform(pairs)).mul_(2 * math.pi)
        return torch.cat([radius * angle.cos(), radius.mul_(angle.sin_())])[:count].reshape(tuple(shape))


class SystemRandom(RandomSource):
    """The only source whose results may be called private: entropy of the operating system."""

    mode: RandomMode = "os-entropy"
    private = True

    def words(self, count: int) -> np.ndarray:
        return np.frombuffer(os.urandom(8 * count), dtype=np.uint64)


class InsecureSeed(RandomSource):
    """Repeatable values for tests, of a seed and further numbers (attempt, step): NOT PRIVATE to whoever knows it."""

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
    """Each coordinate plus independent N(0, std²): new float32 tensors, in the structure and on the devices of the old.

    ``tensors``: by name, or a list; any floating dtype. ``std`` ≥ 0 (finite, else UsageError), in their unit.

    Guarantee:
        New noise is drawn for every coordinate of every tensor in every call; noise and sum are float64 until the end.
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


# ------------------------------------------------------------------------------------------------------ discrete noise
#
# Sum and noise are whole multiples of a public granularity, so no gap of floating point tells which sum was released
# (Canonne, Kamath & Steinke 2020, "The discrete Gaussian for differential privacy").
#
# A sum of sensitivity C (L2, over d coordinates jointly) is released as  γ · (round(sum / γ) + X),  with
#
#     γ   the granularity, a power of two that depends on C and σ alone;
#     X   d independent values of N_Z(0, s²), P(x) ∝ exp(−x²/(2s²)) on the whole numbers;
#     s   = ⌈σ Δ / γ⌉ with Δ = C + γ√d: rounding moves each of two neighbouring sums by at most γ/2 in a coordinate, so
#         the rounded sums lie at most Δ apart. At 2^44 points per standard deviation Δ exceeds C by less than 1e-9 C.
#
# Guarantee: every accountant of the Gaussian mechanism applies, full batch or sampled, at noise multiplier σ, with δ
# larger by (1 + exp ε) τ, where τ is ``accounting.DISTANCE`` times the noisy coordinates of all steps. For: a mechanism
# that adds Gaussian noise rounded to whole numbers is a function of the Gaussian mechanism. Per coordinate the total
# variation distance between N_Z(0, s²) and the rounded N(0, s²) is at most 1/(40 s²) for s ≥ 16 (docs/privacy.md);
# distances of adaptive steps add up, and within τ of (ε, δ)-DP is (ε, δ + (1 + exp ε) τ)-DP.
#
# What remains of floating point: the sums before they are rounded. A linear head's are computed in float64
# (``precise``), features and the gradients of a whole network in float32, where the last bits of one record's may
# depend on the records beside it. Severity: low, of the size of float32 rounding.

# Doubles are trusted to this relative error when exp(−z) is compared with a uniform value; what is closer is decided
# with decimals of 60 digits. Their true error is below 2⁻⁴⁶: z ≤ 14 is off by a few units in the last place, as is exp.
_MARGIN = 2.0**-40
_DIGITS = 60
_LEVELS = 16


def add_discrete_noise(
    sums: Mapping[str, torch.Tensor], clip_norm: float, noise_multiplier: float, random: RandomSource
) -> dict[str, torch.Tensor]:
    """Each sum, rounded to the lattice, plus discrete Gaussian noise, new for every coordinate in every call.

    Args:
        sums: name -> clipped sum, any floating dtype, any device, finite.
        clip_norm: C, the L2 sensitivity of all sums jointly. noise_multiplier: σ. As for ``granularity``.

    Returns:
        float64 tensors of the same names and shapes: whole multiples of the granularity (rounded to 53 bits where they
        are larger, after the noise).

    Raises:
        UsageError: σ or C is out of range, or there are more than ``MOST_COORDINATES`` coordinates.
        RuntimeError: a sum is too large for the lattice (it was not clipped as planned).
    """
    coordinates = sum(total.numel() for total in sums.values())
    if coordinates > MOST_COORDINATES:
        raise UsageError(
            f"Discrete noise for {coordinates} parameters exceeds what is accounted for, {MOST_COORDINATES}.",
            fix="Train a smaller model, or use --noise gaussian.",
        )
    gamma = granularity(clip_norm, noise_multiplier)
    scale = lattice_scale(clip_norm, noise_multiplier, coordinates)
    noisy = {}
    for name, total in sums.items():
        # A power of two divides exactly, so only rint rounds; values beyond 2^53 γ are multiples of γ already.
        steps = np.rint(total.detach().cpu().to(torch.float64).numpy() / gamma)
        if not bool((np.abs(steps) < 2.0**61).all()):
            raise RuntimeError("a clipped sum is not finite, or too large for the lattice")
        whole = steps.astype(np.int64) + discrete_gaussian(scale, steps.size, random).reshape(steps.shape)
        noisy[name] = torch.from_numpy(np.asarray(whole.astype(np.float64) * gamma)).to(total.device)
    return noisy


def granularity(clip_norm: float, noise_multiplier: float) -> float:
    """γ: the power of two with 2^44 ≤ σC/γ < 2^45. Public. Raises UsageError unless 0 < σ < inf and 1e-8 ≤ C ≤ 1e8."""
    if not (math.isfinite(noise_multiplier) and noise_multiplier > 0 and 1e-8 <= clip_norm <= 1e8):
        raise UsageError(
            f"Discrete noise of multiplier {noise_multiplier} at clip norm {clip_norm} makes no sense.",
            fix="Give a finite noise multiplier above 0, and a clip norm from 1e-8 to 1e8.",
        )
    exponent = math.frexp(noise_multiplier * clip_norm)[1] - 1  # 2^exponent ≤ σC < 2^(exponent + 1)
    return math.ldexp(1.0, exponent - LATTICE_BITS)


def lattice_scale(clip_norm: float, noise_multiplier: float, coordinates: int) -> int:
    """s: standard deviation of the noise in steps of the lattice, the sensitivity raised by what rounding can add."""
    gamma = granularity(clip_norm, noise_multiplier)
    sensitivity = clip_norm + gamma * math.sqrt(coordinates)
    return math.ceil(noise_multiplier * sensitivity / gamma * (1 + 1e-15))


def discrete_gaussian(scale: int, count: int, random: RandomSource) -> np.ndarray:
    """int64 [count], independent values of N_Z(0, scale²), scale from 1 to 2^48 (else UsageError).

    Karney 2016, "Sampling exactly from the normal distribution", for whole numbers: draw k ≥ 0 with P(k) ∝ exp(−k²/2),
    j uniform in 0 … scale−1 and a sign; with x = j/scale accept k·scale + j with probability exp(−x(2k+x)/2); reject
    the second zero. What is accepted has probability ∝ exp(−(k+x)²/2), which is the discrete Gaussian.

    Guarantee:
        The total variation distance to the exact distribution is below 2⁻¹¹⁰ a value: k comes from cumulative
        probabilities of 128 bits; j and the sign are exact; acceptance compares a uniform value with exp in double
        precision only where that is certain, and otherwise with 60 decimal digits and 128 more bits.
    """
    if not 1 <= scale <= 2**48:
        raise UsageError(f"The scale of the discrete noise is {scale}.", fix="Give a whole number from 1 to 2^48.")
    accepted: list[np.ndarray] = []
    missing = count
    while missing > 0:
        tries = int(1.5 * missing) + 16
        k, offset, negative = _level(tries, random), _below(scale, tries, random), random.words(tries) >> np.uint64(63)
        keep = _accepts(k, offset, scale, random) & ~((k == 0) & (offset == 0) & (negative == 1))
        values = (k * scale + offset) * np.where(negative == 1, -1, 1)
        accepted.append(values[keep][:missing])
        missing -= len(accepted[-1])
    return np.concatenate(accepted) if accepted else np.zeros(0, np.int64)


def _level(count: int, random: RandomSource) -> np.ndarray:
    """int64 [count]: k with P(k) ∝ exp(−k²/2), by its cumulative probabilities."""
    thresholds = _thresholds()
    upper = np.array([threshold >> 64 for threshold in thresholds], dtype=np.uint64)
    words = random.words(count)
    level = np.searchsorted(upper, words, side="right")  # the number of thresholds whose upper half is ≤ the word
    for place in np.flatnonzero(np.isin(words, upper)):  # about once in 2^60 words: the lower halves decide
        value = (int(words[place]) << 64) + int(random.words(1)[0])
        level[place] = sum(value >= threshold for threshold in thresholds)
    return level.astype(np.int64)


@cache
def _thresholds() -> tuple[int, ...]:
    """Σ_{i≤k} P(i) in units of 2⁻¹²⁸, up to where it is 1: a uniform 128-bit value below it is of level k at most."""
    with localcontext() as exact:
        exact.prec = _DIGITS
        weights = [(Decimal(-k * k) / 2).exp() for k in range(2 * _LEVELS)]
        total = sum(weights)
        rounded = (
            int((sum(weights[: k + 1]) / total * 2**128).to_integral_value(ROUND_HALF_EVEN)) for k in range(_LEVELS)
        )
        return tuple(threshold for threshold in rounded if threshold < 2**128)


def _below(limit: int, count: int, random: RandomSource) -> np.ndarray:
    """int64 [count], uniform in 0 … limit−1: random bits, drawn again where they are not below."""
    bits = max(1, (limit - 1).bit_length())
    values = np.zeros(count, np.uint64)
    waiting = np.arange(count)
    while len(waiting):
        drawn = random.words(len(waiting)) >> np.uint64(64 - bits)
        values[waiting] = drawn
        waiting = waiting[drawn >= np.uint64(limit)]
    return values.astype(np.int64)


def _accepts(k: np.ndarray, offset: np.ndarray, scale: int, random: RandomSource) -> np.ndarray:
    """bool: true with probability exp(−x(2k+x)/2), x = offset/scale."""
    x = offset / scale
    probability = np.exp(-0.5 * x * (2 * k + x))
    words = random.words(len(k))
    uniform = words.astype(np.float64) * 2.0**-64
    accepts = uniform < probability
    unsure = np.abs(uniform - probability) <= _MARGIN * probability + 2.0**-60
    for place in np.flatnonzero(unsure):
        accepts[place] = _accepts_exactly(int(k[place]), int(offset[place]), scale, int(words[place]), random)
    return accepts


def _accepts_exactly(k: int, offset: int, scale: int, word: int, random: RandomSource) -> bool:
    """The same comparison with 192 random bits, of which ``word`` is the first 64, and 60 digits."""
    first, second = (int(more) for more in random.words(2))
    with localcontext() as exact:
        exact.prec = _DIGITS
        uniform = Decimal((word << 128) + (first << 64) + second) / 2**192
        return uniform < (-Decimal(offset * (2 * k * scale + offset)) / (2 * scale * scale)).exp()


# ------------------------------------------------------------------------------------------------------------ sampling


class PoissonSampler:
    """Batches of a true Poisson sample of the records 0 … examples−1, at a rate q in (0, 1] (else UsageError).

    Guarantee:
        In every draw each record is included with probability q (to 2⁻⁵³), independently of the other records and of
        all other draws. There is no shuffling, no cap, no minimum, no fixed size.
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
