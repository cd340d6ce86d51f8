"""The search behind ``accounting.calibrate``: the noise at which a falling function meets the budget.

``solve`` finds a guess with a cheap function, ``settle`` checks it with the promised one and corrects it. So an error
in the cheap function costs time, never privacy.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache

from scipy.optimize import brentq

Falling = Callable[[float], float]

# ``settle`` aims at the first part of the budget and accepts anything from the second part up to the whole.
AIM, ACCEPT = 0.9995, 0.998
_SMALLEST = 1e-6


def solve(function: Falling, goal: float, start: float, largest: float, tolerance: float = 1e-4) -> float:
    """Where ``function`` (positive argument, falling) equals ``goal``, to a relative ``tolerance`` of the argument.

    Returns:
        The argument; ``inf`` when the function stays above the goal up to ``largest``, 1e-6 when it is below it there.
    """

    @cache
    def excess(log_argument: float) -> float:
        return math.log(max(function(math.exp(log_argument)), 1e-300)) - math.log(goal)

    here = math.log(min(max(start, _SMALLEST), largest))
    upwards = excess(here) > 0
    end = math.log(largest if upwards else _SMALLEST)
    stride = 0.1
    while here != end:
        there = min(here + stride, end) if upwards else max(here - stride, end)
        if (excess(there) > 0) != upwards:
            return math.exp(brentq(excess, min(here, there), max(here, there), xtol=tolerance, maxiter=60))
        here, stride = there, 2 * stride
    return math.inf if upwards else _SMALLEST


def settle(promised: Falling, budget: float, guess: float, largest: float) -> float | None:
    """An argument at which ``promised`` is at most ``budget`` and, where it can be, not below ACCEPT of it.

    Returns:
        The smallest argument that was seen to fit; None when none up to ``largest`` does.
    """
    fits, exceeds = math.inf, 0.0
    argument, slope, stride = min(guess, largest), -1.0, 0.0
    previous: tuple[float, float] | None = None
    for _ in range(24):
        value = promised(argument)
        if value <= budget:
            fits = min(fits, argument)
            if value >= ACCEPT * budget or argument <= _SMALLEST:
                break
        else:
            exceeds = max(exceeds, argument)
            if exceeds >= largest:
                break
        if exceeds and fits / exceeds < 1.0005:
            break  # the accountant's grid is coarser than the window
        here = (math.log(argument), math.log(max(value, 1e-300)))
        if previous and previous[0] != here[0]:
            slope = min(-0.05, (here[1] - previous[1]) / (here[0] - previous[0]))
        previous = here
        last, stride = stride, max(-1.0, min(1.0, (math.log(AIM * budget) - here[1]) / slope))
        if value > budget and math.isinf(fits):
            stride = max(stride, 2 * last, 2e-4)  # nothing fits yet: strides double, since the function may flatten out
        argument = math.exp(here[0] + stride)
        if exceeds and math.isfinite(fits) and not exceeds < argument < fits:
            argument = math.sqrt(exceeds * fits)
        argument = max(min(argument, largest), _SMALLEST)
    return fits if math.isfinite(fits) else None


def nudge(promised: Falling, budget: float, guess: float) -> float | None:
    """The first step above ``guess`` (at most 0.001 %) that fits: for guesses that are exact but for rounding."""
    for exponent in range(-14, -4):
        argument = guess * (1 + 10.0**exponent)
        if promised(argument) <= budget:
            return argument
    return None
