"""The accountant of last resort: Rényi DP with the divergences of Opacus. Loose, always defined; loaded when needed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from importlib.metadata import version

import numpy as np
from opacus.accountants.analysis.rdp import compute_rdp

from dprandp.errors import BudgetError
from dprandp.privacy.accounting import EpsilonBound, GaussianEvent

_WHOLE_ORDERS = [*range(2, 65), 72, 96, 128, 192, 256, 512]
_PART_ORDERS = [1 + x / 5 for x in range(1, 25) if x % 5]


def renyi_bound(events: Sequence[GaussianEvent], delta: float) -> EpsilonBound:
    """Rényi DP with the divergences of Opacus, converted by Balle et al. 2020, Theorem 21: loose, always defined."""
    # Orders between integers only help where epsilon is large, and their series takes seconds where the noise is large.
    quick = all(e.noise_multiplier < 4 for e in events)
    orders = np.array([float(order) for order in [*(_PART_ORDERS if quick else []), *_WHOLE_ORDERS]])
    total = np.zeros(len(orders))
    for e in events:
        total += compute_rdp(
            q=e.sample_rate, noise_multiplier=e.noise_multiplier, steps=e.steps, orders=orders.tolist()
        )
    epsilons = total - (math.log(delta) + np.log(orders)) / (orders - 1) + np.log1p(-1 / orders)
    usable = epsilons[np.isfinite(epsilons)]
    if not len(usable):
        raise BudgetError(
            "No accountant can bound the epsilon of these steps.",
            fix="Use a larger noise multiplier or a larger delta.",
        )
    epsilon = max(0.0, float(usable.min()))
    return EpsilonBound(0.0, epsilon, epsilon, delta, f"Rényi DP (opacus {version('opacus')})")
