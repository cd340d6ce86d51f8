"""Promises 3, 5, 13: true Poisson batches, fresh Gaussian noise of the right size, honest stamps.

Statistical tests draw from the operating system, so they cannot be seeded. Each rejects at p < 1e-6: with the tests
below, a false alarm about once in 60,000 runs of this file. Each has a positive control: a plausible mistake that the
same statistic must reject.
"""

from __future__ import annotations

import hashlib
import math
import os

import noise_checks
import numpy as np
import pytest
import torch
from scipy import stats

from dprandp.errors import UsageError
from dprandp.privacy.randomness import InsecureSeed, PoissonSampler, SystemRandom, add_gaussian_noise

ALPHA = 1e-6

# ---------------------------------------------------------------- batches


def memberships(sampler: PoissonSampler, draws: int) -> np.ndarray:
    """bool [draws, examples]."""
    drawn = np.zeros((draws, sampler.examples), dtype=bool)
    for row in drawn:
        row[sampler.draw()] = True
    return drawn


def shuffled_fixed_batches(examples: int, batch: int, draws: int) -> np.ndarray:
    """What most training loops do instead: shuffle, then cut into equal batches."""
    generator = np.random.default_rng(0)
    drawn = np.zeros((draws, examples), dtype=bool)
    for start in range(0, draws, examples // batch):
        order = generator.permutation(examples)
        for offset in range(min(examples // batch, draws - start)):
            drawn[start + offset, order[offset * batch : (offset + 1) * batch]] = True
    return drawn


def two_sided(statistic: float, distribution) -> float:
    return 2 * min(distribution.cdf(statistic), distribution.sf(statistic))


def inclusion_p(drawn: np.ndarray, q: float) -> float:
    """Every record in a share q of the batches: Σ z² over records is χ² with N degrees of freedom."""
    draws, examples = drawn.shape
    z = (drawn.sum(0) - draws * q) / math.sqrt(draws * q * (1 - q))
    return two_sided(float((z**2).sum()), stats.chi2(examples))


def batch_size_p(drawn: np.ndarray, q: float) -> float:
    """Batch sizes vary by N q (1 − q)."""
    draws, examples = drawn.shape
    z = (drawn.sum(1) - examples * q) / math.sqrt(examples * q * (1 - q))
    return two_sided(float((z**2).sum()), stats.chi2(draws))


def pairs_p(drawn: np.ndarray, q: float) -> float:
    """Records of one batch are pairwise independent: Σ z² over pairs, whose products are uncorrelated."""
    draws, examples = drawn.shape
    centred = (drawn - q) / math.sqrt(q * (1 - q))
    z = (centred.T @ centred)[np.triu_indices(examples, 1)] / math.sqrt(draws)
    return two_sided(float((z**2).sum()), stats.chi2(len(z)))


def succession_p(drawn: np.ndarray, q: float) -> float:
    """A record's next batch does not depend on this one."""
    centred = (drawn - q) / math.sqrt(q * (1 - q))
    z = (centred[1:] * centred[:-1]).sum() / math.sqrt(centred[1:].size)
    return float(2 * stats.norm.sf(abs(z)))


STATISTICS = [inclusion_p, batch_size_p, pairs_p, succession_p]
N, Q, DRAWS = 40, 0.25, 8000


@pytest.fixture(scope="module")
def poisson() -> np.ndarray:
    return memberships(PoissonSampler(N, Q, SystemRandom()), DRAWS)


@pytest.mark.parametrize("statistic", STATISTICS)
def test_batches_are_true_poisson_samples(statistic, poisson):
    assert statistic(poisson, Q) > ALPHA


@pytest.mark.parametrize("statistic", [batch_size_p, pairs_p, succession_p])
def test_shuffled_fixed_batches_are_rejected(statistic):
    assert statistic(shuffled_fixed_batches(N, int(N * Q), DRAWS), Q) < ALPHA


def test_other_batches_are_rejected(poisson):
    assert inclusion_p(poisson, Q * 1.1) < ALPHA  # another rate
    tied, favoured, capped = poisson.copy(), poisson.copy(), poisson.copy()
    tied[:, 1] = tied[:, 0]  # records that enter together
    assert pairs_p(tied, Q) < ALPHA
    favoured[:, 3] |= SystemRandom().uniform(DRAWS) < 0.15
    assert inclusion_p(favoured, Q) < ALPHA
    for row in capped:
        row[np.flatnonzero(row)[int(N * Q) :]] = False
    assert batch_size_p(capped, Q) < ALPHA


def test_batches_may_be_empty_rise_and_are_int64():
    sampler = PoissonSampler(5, 0.05, SystemRandom())
    batches = [sampler.draw() for _ in range(200)]
    assert any(len(batch) == 0 for batch in batches)
    assert all(batch.dtype == np.int64 and (np.diff(batch) > 0).all() for batch in batches)
    assert PoissonSampler(7, 1.0, SystemRandom()).draw().tolist() == list(range(7))


def test_senseless_sampling_and_noise_are_refused():
    for examples, rate in ((0, 0.5), (5, 0.0), (5, 1.5), (5, math.nan)):
        with pytest.raises(UsageError):
            PoissonSampler(examples, rate, SystemRandom())
    for std in (-1.0, math.nan, math.inf):
        with pytest.raises(UsageError, match="standard deviation"):
            add_gaussian_noise([torch.zeros(1)], std, SystemRandom())


# ---------------------------------------------------------------- noise

SIGMA, CLIP = 9.2, 0.5


def ks_p(values: torch.Tensor, std: float) -> float:
    return float(stats.kstest(values.double().flatten().numpy(), stats.norm(scale=std).cdf).pvalue)


@pytest.fixture(scope="module")
def noisy() -> torch.Tensor:
    return add_gaussian_noise([torch.zeros(120, 201)], SIGMA * CLIP, SystemRandom())[0]


def test_noise_is_gaussian_with_std_sigma_times_clip_norm_and_no_other(noisy):
    assert ks_p(noisy, SIGMA * CLIP) > ALPHA
    for factor in (2 / 3, 3 / 2, 0.85, 1.15):
        assert ks_p(noisy * factor, SIGMA * CLIP) < ALPHA


@pytest.mark.parametrize("source", [SystemRandom(), InsecureSeed(7)], ids=["system", "insecure"])
def test_neighbouring_values_are_uncorrelated(source):
    """Both halves of a Box-Muller pair, and neighbours, at the size where 1 in a million fails."""
    z = source.gaussian([40_000]).numpy()
    for shift in (1, 20_000):
        correlation = float((z[:-shift] * z[shift:]).sum()) / math.sqrt(len(z) - shift)
        assert 2 * stats.norm.sf(abs(correlation)) > ALPHA
    assert 2 * stats.norm.sf(abs(float((z[:-1] * z[:-1]).sum() - len(z)) / math.sqrt(2 * len(z)))) > ALPHA


def test_extreme_uniforms_give_finite_noise():
    class Extremes(SystemRandom):
        def words(self, count):
            return np.where(np.arange(count) % 2 == 0, 0, 2**64 - 1).astype(np.uint64)

    z = Extremes().gaussian([10])
    assert bool(torch.isfinite(z).all())
    assert float(z.abs().max()) == pytest.approx(math.sqrt(2 * 106 * math.log(2)), abs=0.01)


def test_the_tail_beyond_53_bits_has_its_probability():
    """Of a value whose first uniform is within 2⁻⁴⁵ of 1, radius²/2 exceeds 45 log 2 by an exponential variable."""

    class Tail(SystemRandom):
        def __init__(self) -> None:
            self.first = True

        def words(self, count):
            words, top = super().words(count), np.uint64((2**45 - 1) << 19)
            words, self.first = (words | top if self.first else words), False
            return words

    count = 200_000
    one, other = Tail().gaussian([2 * count]).view(2, count)
    beyond = (one.square() + other.square()) / 2 - 45 * math.log(2)
    assert float(beyond.mean()) == pytest.approx(1, abs=5 / math.sqrt(count))
    for bits in (4, 8, 9):  # 53 bits alone end at 8
        expected = count * 2.0**-bits
        assert abs(int((beyond > bits * math.log(2)).sum()) - expected) < 5 * math.sqrt(expected)


@pytest.fixture(scope="module")
def of_many_tensors() -> dict[str, np.ndarray]:
    return noise_checks.draws_of(lambda sums: add_gaussian_noise(sums, SIGMA * CLIP, SystemRandom()))


def test_every_tensor_and_every_coordinate_gets_all_of_the_noise(of_many_tensors):
    assert noise_checks.complaints(of_many_tensors, SIGMA * CLIP) == []


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda draws: draws | {"last": draws["last"] / 1000}, "last has the standard deviation"),
        (lambda draws: draws | {"gain": 0 * draws["gain"]}, "gain has the standard deviation"),
        (lambda draws: draws | {"wide": draws["wide"] * np.append(np.ones(479), 0.5)}, "a coordinate of wide"),
        (lambda draws: draws | {"row": draws["wide"][:, :16]}, "coordinates are correlated"),
        (lambda draws: {name: np.repeat(values[::2], 2, axis=0) for name, values in draws.items()}, "calls are"),
        (lambda draws: draws | {"bias": abs(draws["bias"])}, "bias has a mean"),
    ],
)
def test_less_noise_somewhere_is_complained_about(of_many_tensors, change, complaint):
    assert any(complaint in said for said in noise_checks.complaints(change(of_many_tensors), SIGMA * CLIP))


def test_noise_is_added_in_float64_and_keeps_the_structure():
    class Constant(SystemRandom):
        def gaussian(self, shape):
            return torch.full(tuple(shape), 1.0, dtype=torch.float64)

    sums = {"a": torch.full((2, 3), 1e8, dtype=torch.float64), "b": torch.tensor(1.0, dtype=torch.bfloat16)}
    out = add_gaussian_noise(sums, 8.0, Constant())
    assert list(out) == ["a", "b"]
    assert torch.equal(out["a"], torch.full((2, 3), 1e8 + 8))
    assert out["b"].item() == 9.0
    assert {v.dtype for v in out.values()} == {torch.float32}
    assert isinstance(add_gaussian_noise([torch.zeros(2)], 1.0, Constant()), list)
    total = torch.ones(3)
    copied = add_gaussian_noise([total], 0.0, SystemRandom())[0]  # no noise copies
    assert torch.equal(copied, total)
    assert copied.data_ptr() != total.data_ptr()


# ---------------------------------------------------------------- entropy


class Entropy:
    """Stands for the operating system: known bytes, counted, of which one bit may be turned over."""

    def __init__(self, turned: int | None = None) -> None:
        self.given, self._turned = b"", turned

    def __call__(self, count: int) -> bytes:
        blocks = range(count // 32 + 1)
        fresh = b"".join(hashlib.sha256(b"%d %d" % (len(self.given), block)).digest() for block in blocks)[:count]
        begun, self.given = len(self.given), self.given + fresh
        if self._turned is not None and begun <= self._turned // 8 < len(self.given):
            changed = bytearray(fresh)
            changed[self._turned // 8 - begun] ^= 1 << self._turned % 8
            return bytes(changed)
        return fresh


def drawn(monkeypatch: pytest.MonkeyPatch, turned: int | None = None) -> tuple[np.ndarray, Entropy]:
    """Words of two sources, and where they came from."""
    entropy = Entropy(turned)
    monkeypatch.setattr(os, "urandom", entropy)
    first, second = SystemRandom(), SystemRandom()
    words = [first.words(5), first.words(300), second.words(1), first.words(5)]
    monkeypatch.undo()
    return np.concatenate(words), entropy


def test_every_word_is_64_bits_of_the_operating_system(monkeypatch):
    """No seed, no state: what the operating system gave is what comes out, and is asked for anew every time."""
    words, entropy = drawn(monkeypatch)
    assert words.dtype == np.uint64
    assert words.tobytes() == entropy.given
    assert len(np.unique(words)) == len(words) == 311
    for turned in range(0, 64 * len(words), 997):  # each bit of it matters, for one word
        other, _ = drawn(monkeypatch, turned)
        assert np.flatnonzero(words != other).tolist() == [turned // 64]


def test_uniforms_are_uniform_with_53_bits():
    """No two of 400,000 values are equal; of 32 bits they would be about twenty times."""
    values = SystemRandom().uniform(400_000)
    assert stats.kstest(values, "uniform").pvalue > ALPHA
    assert stats.kstest(values * 0.97, "uniform").pvalue < ALPHA
    assert ((values >= 0) & (values < 1) & (values * 2.0**53 == np.floor(values * 2.0**53))).all()
    assert len(np.unique(values)) == len(values)
    assert len(np.unique(np.floor(values * 2.0**32))) < len(values)
    assert float(np.bincount((values * 2.0**53).astype(np.uint64).astype(np.int64) % 2).min()) > 190_000


# ---------------------------------------------------------------- stamps


def test_the_insecure_seed_repeats_and_its_streams_differ():
    def first(*key):
        return InsecureSeed(*key).gaussian([4]).tolist()

    assert (SystemRandom().mode, SystemRandom().private) == ("os-entropy", True)
    assert (InsecureSeed(1).mode, InsecureSeed(1).private) == ("insecure-seed", False)
    assert first(3) == first(3)
    assert len({tuple(first(*key)) for key in ((3,), (4,), (3, 1), (3, 2), (3, 1, 0))}) >= 4
    with pytest.raises(UsageError):
        InsecureSeed(-1)
