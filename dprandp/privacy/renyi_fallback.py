"""The accountant of last resort: Rényi DP with the divergences of Opacus. Loose, always defined; loaded when needed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from importlib.metadata import version

import numpy as np
from opacus.accountants.analysis.rdp import compute_rdp

from dprandp.errors import BudgetError

_WHOLE_ORDERS = [*range(2, 65), 72, 96, 128, 192, 256, 512]
_PART_ORDERS = [1 + x / 5 for x in range(1, 25) if x % 5]


def renyi_epsilon(steps: Sequence[tuple[float, float, int]], delta: float) -> tuple[float, str]:
    """An upper bound on ε, converted by Balle et al. 2020, Theorem 21.

    Args:
        steps: (sample rate q, noise multiplier σ, T) of each kind of step.
        delta: δ in (0, 1).

    Returns:
        ε and the accountant's name.

    Raises:
        BudgetError: no order gives a finite bound.
    """
    # Orders between integers only help where epsilon is large, and their series takes seconds where the noise is large.
    quick = all(sigma < 4 for _, sigma, _ in steps)
    orders = np.array([float(order) for order in [*(_PART_ORDERS if quick else []), *_WHOLE_ORDERS]])
    total = np.zeros(len(orders))
    for q, sigma, count in steps:
        total += compute_rdp(q=q, noise_multiplier=sigma, steps=count, orders=orders.tolist())
    epsilons = total - (math.log(delta) + np.log(orders)) / (orders - 1) + np.log1p(-1 / orders)
    usable = epsilons[np.isfinite(epsilons)]
    if not len(usable):
        raise BudgetError(
            "No accountant can bound the epsilon of these steps.",
            fix="Use a larger noise multiplier or a larger delta.",
        )
    return max(0.0, float(usable.min())), f"Rényi DP (opacus {version('opacus')})"
