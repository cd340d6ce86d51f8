"""The privacy-random-variable accountant for sampled Gaussian steps, in both directions of add/remove.

Gopi, Lee & Wutschitz 2021, "Numerical composition of differential privacy": the privacy loss of a step is a random
variable Y, the loss of a composition is the sum of independent ones, and δ(ε) = E[(1 − exp(ε − Y))₊]. The sum is found
on a grid by Fourier transform; how far the grid can be from the truth is bounded, and included in ``upper``. The curve
is inverted by ``prv_accountant``, the library of that paper. Three things are different here:

* *both directions.* That library composes log(P/Q) for P = "with the record", Q = "without it". Adding a record is the
  other direction, and under composition it is not covered by the first one in general (Lebeda, Regehr, Kamath & Steinke
  2024, "Avoiding pitfalls for privacy accounting of subsampled mechanisms under composition"), so both are computed.
  The pair (P, Q) is the same under zero-out, where the record's position stays and contributes nothing.
* *the window.* Remark 5.6 of the paper makes the grid reach 2 beyond the largest loss that matters, which for ε = 0.1
  is fifteen times too wide. Here the reach comes from the Rényi divergences directly (``_reach``).
* *bounded work.* The number of grid points is chosen before anything is allocated; time and memory follow from it.

*The bound* (Theorem 5.5 of the paper, with these constants). Let Y be the sum of the k true losses and Ŷ what is on the
grid of mesh h. They differ by more than ε_error only if (a) one of the losses falls outside the grid, (b) the sum does,
so that the Fourier transform wraps it around, or (c) the k roundings, each of mean 0 and within an interval of length
h, add up to more than ε_error: probability at most 2 exp(−2 ε_error² / (k h²)) by Hoeffding. If these and the rounding
of the arithmetic have probability η together, then δ(ε) ≤ δ̂(ε − ε_error) + η and δ(ε) ≥ δ̂(ε + ε_error) − η.

Imported only when an accountant is needed: it loads most of scipy.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from prv_accountant.discrete_privacy_random_variable import DiscretePrivacyRandomVariable
from prv_accountant.domain import Domain
from scipy.fft import irfft, next_fast_len, rfft

from dprandp.privacy.sampled_loss import SampledGaussianLoss, renyi_divergence
from dprandp.privacy.tuning import TuningEvent

# The bound on time and memory, known before anything is allocated: grid points, grid points times different events, and
# different events. 400,000 points take about 0.3 s and 100 MiB a direction; the coarse grid serves searches only.
FINE_POINTS, COARSE_POINTS, ALL_POINTS, MOST_EVENTS = 400_000, 16_384, 4_000_000, 100
# The accountant's error in δ, as a part of δ: it is added to δ in every bound.
DELTA_ERROR_SHARE = 1e-3
# A Fourier transform is wrong by about eps·√(log₂ N) of its input; this many times eps·log₂ N, once for each step, is
# held to be enough for all arithmetic, and added to δ.
_ROUNDING = 8
# Beyond these, squares and quotients could leave the range of doubles.
_NOISE, _LEAST_RATE, _LEAST_PROBABILITY = (1e-50, 1e50), 1e-100, 1e-300
# Losses in one block of the curve: exp of it, and its inverse, are doubles.
_BLOCK = 300.0
# Rényi orders for the rough bound. Any order gives a valid bound; a longer list only makes it tighter.
_ORDERS = np.array([1 + x / 10 for x in range(1, 100)] + list(range(12, 64)) + [2**n for n in range(6, 14)])
# Where no divergence needs a sum of many terms.
_CLOSED_FORM_ORDERS = 1 + np.geomspace(1e-2, 1e5, 300)


class AccountantRefused(Exception):
    """The accountant cannot give a sound bound here; the caller names another one aloud."""


@dataclass(frozen=True)
class Component:
    """``steps`` independent uses of one sampled Gaussian; sample_rate = 1 is the plain Gaussian."""

    noise_multiplier: float
    sample_rate: float
    steps: int

    def loss(self, add: bool) -> SampledGaussianLoss:
        return SampledGaussianLoss(self.sample_rate, self.noise_multiplier, add)

    def divergences(self, orders: np.ndarray = _ORDERS) -> np.ndarray:
        """Rényi divergences of one step at ``orders``, of either direction or above it."""
        return np.array([renyi_divergence(self.sample_rate, self.noise_multiplier, order) for order in orders])


@dataclass(frozen=True)
class Grid:
    """Where a composition is computed, and how wrong it may be there: decided before anything is allocated.

    Attributes:
        mesh: h, distance of the points.
        points: N, even; they are h·(−N/2 … N/2 − 1).
        epsilon_error, delta_error: ε_error and η of "The bound" above.
        real: float64, or the longest float there is where δ is so small that the rounding of float64 could be seen.
    """

    mesh: float
    points: int
    epsilon_error: float
    delta_error: float
    real: type[np.floating]


def rough_epsilon(components: Sequence[Component], delta: float, tuning: Sequence[TuningEvent] = ()) -> float:
    """A valid but loose upper bound on ε through Rényi orders, in milliseconds (Balle et al. 2020, Theorem 21)."""
    sampled = any(component.sample_rate < 1 for component in components)
    orders = _CLOSED_FORM_ORDERS if tuning and not sampled else _ORDERS
    total = sum((component.steps * component.divergences(orders) for component in components), np.zeros(len(orders)))
    for event in tuning:
        total = total + event.rdp(orders)
    epsilon = total - np.log(delta * orders) / (orders - 1) + np.log1p(-1 / orders)
    return max(0.0, float(np.min(epsilon)))


def sketch_epsilon(components: Sequence[Component], delta: float) -> float:
    """ε to about 1 %, unpromised: a coarse grid and the remove direction alone, to aim a search with.

    The means are right on any grid, so that this is much nearer to the truth than the bound for such a grid would be.

    Raises:
        AccountantRefused: as ``prv_epsilon``.
    """
    reach = _reach(components, delta * DELTA_ERROR_SHARE)
    if not math.isfinite(reach):
        raise AccountantRefused("the Rényi bracket is not finite")
    grid = Grid(2.1 * reach / COARSE_POINTS, COARSE_POINTS, 0.0, 0.0, np.float64)
    return max(0.0, _invert(_compose(components, grid, add=False), delta, grid)[1])


def prv_epsilon(
    components: Sequence[Component], delta: float, epsilon_error: float
) -> tuple[float, float, float]:
    """(lower, estimate, upper) bounds on ε of the composition; not clamped, so slightly negative where ε is about 0.

    Args:
        components: the mechanisms, each with its number of steps.
        delta: δ of the guarantee, in (0, 1).
        epsilon_error: wanted half-width of the bounds; wider when the number of grid points would be passed.

    Guarantee:
        ``upper`` is at least the ε of the composition at ``delta`` under add/remove, hence under zero-out.

    Raises:
        AccountantRefused: floating point or the bound on grid points does not allow a sound, useful answer.
    """
    grid = plan_grid(components, delta * DELTA_ERROR_SHARE, epsilon_error)
    bounds = [_invert(_compose(components, grid, add), delta, grid) for add in _directions(components)]
    return tuple(max(values) for values in zip(*bounds, strict=True))


def prv_curve(
    components: Sequence[Component], delta_error: float, epsilon_error: float
) -> tuple[np.ndarray, np.ndarray]:
    """Points of a valid privacy curve: the composition is (ε_i, δ_i)-DP under add/remove for every i.

    Args:
        components: the mechanisms, each with its number of steps.
        delta_error: what the numerical error may add to every δ; more where floating point asks for it.
        epsilon_error: what it may add to every ε; wider when the number of grid points would be passed.

    Returns:
        ε ascending from 0 and δ descending, float64 [n].

    Raises:
        AccountantRefused: as ``prv_epsilon``.
    """
    grid = plan_grid(components, delta_error, epsilon_error)
    count = grid.points // 2 - 2
    epsilons = grid.epsilon_error + grid.mesh * np.arange(-1 - int(grid.epsilon_error / grid.mesh), count)
    deltas = np.zeros(len(epsilons))
    for add in _directions(components):
        losses, masses = _compose(components, grid, add)
        # δ̂ at each point of the grid; δ̂ falls, so the point at or below ε − ε_error bounds it from above
        nearest = np.searchsorted(losses, epsilons - grid.epsilon_error, side="right") - 1
        first = int(nearest[0])
        from_here = np.flip(np.flip(masses[first:]).cumsum())
        curve = np.maximum(from_here - _discounted(losses[first:], masses[first:], grid.mesh), 0) + grid.delta_error
        nearest -= first
        deltas = np.maximum(deltas, np.asarray(curve[nearest], dtype=np.float64))
    if not np.isfinite(deltas).all():
        raise AccountantRefused("it returned NaN")
    return np.maximum(epsilons, 0.0), np.minimum(deltas, 1.0)


def _discounted(losses: np.ndarray, masses: np.ndarray, mesh: float) -> np.ndarray:
    """Σ_{j ≥ i} masses_j exp(losses_i − losses_j), float [n]: in blocks, so that no exponential leaves the doubles."""
    block = max(1, int(_BLOCK / mesh))
    sums, later = np.zeros_like(masses), 0.0
    if mesh > _BLOCK:  # of all later losses nothing is left
        return masses
    with np.errstate(under="ignore"):
        for start in reversed(range(0, len(losses), block)):
            here = losses[start : start + block] - losses[start]
            # ``later`` is the sum at the first loss of the next block, a mesh away from the last of this one
            own = np.flip(np.flip(masses[start : start + block] * np.exp(-here)).cumsum())
            own = own + later * math.exp(-float(here[-1]) - mesh)
            sums[start : start + block] = np.exp(here) * own
            later = sums[start]
    return sums


def plan_grid(components: Sequence[Component], delta_error: float, epsilon_error: float) -> Grid:
    """The coarsest grid whose errors are as wanted, or the largest that is allowed and its larger ε error.

    Raises:
        AccountantRefused: that error would be a tenth of the range of the losses, or δ is beyond floating point.
    """
    most_points = min(FINE_POINTS, ALL_POINTS // len(components))
    steps = sum(component.steps for component in components)
    share = delta_error / 3  # for each of: steps outside, sum outside, rounding to the grid
    reach = _reach(components, share)
    if not math.isfinite(reach):
        raise AccountantRefused("the Rényi bracket is not finite")
    cells = math.sqrt(steps / 2 * math.log(2 / share))  # meshes in epsilon_error: Hoeffding, (c) above
    room = most_points / 2 - cells - 8
    if room <= 0 or reach * cells / room > 0.1 * reach:
        raise AccountantRefused(f"it would need more than {most_points} grid points")
    epsilon_error = max(epsilon_error, reach * cells / room)
    mesh = epsilon_error / cells
    points = next_fast_len(2 * (math.ceil((reach + epsilon_error) / mesh) + 3), real=True)
    while points % 2:
        points = next_fast_len(points + 1, real=True)
    for real, most in ((np.float64, delta_error), (np.longdouble, 30 * delta_error)):
        rounding = _ROUNDING * float(np.finfo(real).eps) * math.log2(points) * (steps + 2)
        if rounding <= most:
            return Grid(mesh, points, epsilon_error, 3 * share + rounding, real)
    raise AccountantRefused("floating point is too coarse for such a small delta")


def _reach(components: Sequence[Component], probability: float) -> float:
    """L such that the sum of the losses leaves [−L, L] with at most ``probability``, and so does any single step.

    Chernoff: P(Y ≥ L) ≤ exp((α − 1)(RDP(α) − L)) and P(Y ≤ −L) ≤ exp((α − 1) RDP'(α) − α L), where RDP' is the other
    direction's divergence. The first bound with the larger divergence covers both tails of both directions.
    """
    if not probability > _LEAST_PROBABILITY:
        raise AccountantRefused("delta is beyond floating point")
    for component in components:
        if not _NOISE[0] <= component.noise_multiplier <= _NOISE[1] or component.sample_rate < _LEAST_RATE:
            raise AccountantRefused("the noise multiplier or the sample rate is beyond floating point")
    if len(components) > MOST_EVENTS:
        raise AccountantRefused(f"{len(components)} different events are more than {MOST_EVENTS}")
    divergences = [component.divergences() for component in components]
    total = sum(component.steps * each for component, each in zip(components, divergences, strict=True))
    steps = sum(component.steps for component in components)
    whole = np.min(total + math.log(2 / probability) / (_ORDERS - 1))
    single = (np.min(each + math.log(2 * steps / probability) / (_ORDERS - 1)) for each in divergences)
    return float(max(whole, *single))


def _directions(components: Sequence[Component]) -> tuple[bool, ...]:
    """Both; the plain Gaussian is symmetric."""
    return (False, True) if any(component.sample_rate < 1 for component in components) else (False,)


Composed = tuple[np.ndarray, np.ndarray]
"""Losses [N], ascending, and their masses [N]."""


def _compose(components: Sequence[Component], grid: Grid, add: bool) -> Composed:
    """The distribution of the sum of all losses, on the grid."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a numerical warning here is a doubt about the bound: refuse instead
        try:
            return _fourier_sum([component.loss(add) for component in components], components, grid)
        except (ValueError, RuntimeError, ArithmeticError, IndexError, MemoryError, Warning) as error:
            raise AccountantRefused(str(error) or type(error).__name__) from error


def _fourier_sum(
    losses: Sequence[SampledGaussianLoss], components: Sequence[Component], grid: Grid
) -> Composed:
    half = grid.points // 2
    edges = grid.mesh * (np.arange(-half, half + 1) - 0.5)
    lattice = np.arange(-half, half)
    transform, shift = None, 0.0
    for loss, component in zip(losses, components, strict=True):
        masses = loss.masses(edges)
        masses /= masses.sum()
        # All cells move by what makes the mean right, or the roundings would not have mean 0.
        own_shift = loss.mean(edges[0], edges[-1]) - grid.mesh * float(np.dot(lattice, masses))
        if not abs(own_shift) <= grid.mesh / 2:
            raise RuntimeError("a step's loss on the grid has not the mean that it should have")
        shift += component.steps * own_shift
        factor = _power(rfft(np.fft.ifftshift(masses.astype(grid.real))), component.steps)
        transform = factor if transform is None else transform * factor
    whole = round(shift / grid.mesh)
    masses = np.fft.fftshift(np.roll(irfft(transform, grid.points), whole))
    return grid.mesh * lattice + (shift - whole * grid.mesh), masses


def _power(base: np.ndarray, exponent: int) -> np.ndarray:
    """base ** exponent by repeated squaring: the library's complex power loses digits and time."""
    result = None
    with np.errstate(under="ignore"):  # frequencies that vanish
        while exponent:
            if exponent & 1:
                result = base if result is None else result * base
            exponent >>= 1
            if exponent:
                base = base * base
    return result


def _invert(composed: Composed, delta: float, grid: Grid) -> tuple[float, float, float]:
    """(lower, estimate, upper) of ε at δ, by ``prv_accountant``."""
    losses, masses = composed
    domain = Domain(float(losses[0]), float(losses[-1]), len(losses))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        try:
            variable = DiscretePrivacyRandomVariable(masses, domain)
            bounds = variable.compute_epsilon(delta, grid.delta_error, grid.epsilon_error)
        except (ValueError, RuntimeError, ArithmeticError, IndexError, MemoryError, Warning) as error:
            raise AccountantRefused(str(error) or type(error).__name__) from error
    if any(math.isnan(bound) for bound in bounds):
        raise AccountantRefused("it returned NaN")
    return bounds
