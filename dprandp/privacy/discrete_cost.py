"""What discrete noise costs beside Gaussian noise of the same size: a small part of δ. The proof is in
``discrete_noise``; this is apart from it so that accounting needs no torch."""

from __future__ import annotations

import math

from dprandp.errors import BudgetError

LATTICE_BITS = 44
"""At least 2^44 lattice points per standard deviation of the noise."""

DISTANCE = 2.0 ** (-2 * LATTICE_BITS) / 40 + 2.0**-110
"""Total variation distance, per coordinate, to rounded Gaussian noise; the second term is the sampler's."""

MOST_COORDINATES = 2**26
"""Parameters of the largest model that is noised."""

DELTA_SHARE = 1e-4
"""The part of δ that is kept for the distance between the two kinds of noise."""


def check_distance(steps: int, epsilon: float, delta: float) -> None:
    """Refuse where δ's part does not pay for the distance: (1 + exp ε) τ > DELTA_SHARE · δ, τ over all coordinates.

    Args:
        steps: with discrete noise, at least 1, of at most ``MOST_COORDINATES`` coordinates each.
        epsilon: ε of the same steps with Gaussian noise; infinite where there is no noise, which is not refused.
        delta: δ of the guarantee.

    Raises:
        BudgetError: ε is too large, or δ too small.
    """
    if math.isinf(epsilon):
        return
    log_cost = math.log(steps * MOST_COORDINATES * DISTANCE) + epsilon + math.log1p(math.exp(-epsilon))
    if log_cost > math.log(DELTA_SHARE * delta):
        raise BudgetError(
            f"At ε = {epsilon:.4g} and δ = {delta:g} the lattice of discrete noise is too coarse to be accounted for.",
            fix="Give a smaller --eps, a larger --delta, or --noise gaussian.",
        )
