"""The accountant: noise for a budget, found cold, against the noise search of another library, prv-accountant.

Our caches are emptied before every call; the library has none. Our result must keep the promised bound. The library is
asked for ε to within 1 % (in --quick 3 %), which is wider than our own bounds; the two must then agree on σ to 3 %.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping

from benchmark.cases import OURS, Absolute, Case, Comparison, Limit, Side
from benchmark.timing import Work
from dprandp.errors import BenchmarkError
from dprandp.privacy import accounting

LIBRARY = "prv-accountant's search"
DELTA = 1e-5

SETTINGS = {  # ε, q, T, and the library's eps_error
    "full": (1.0, 0.08192, 875, 0.01),  # Tang et al. 2023: batch 4096 of CIFAR-10
    "quick": (3.0, 0.05, 100, 0.1),
    "tiny": (3.0, 0.05, 20, 0.1),
}
LARGER_BUDGET = {**SETTINGS, "full": (8.0, 0.08192, 2000, 0.08)}  # as large a run as De et al. 2022
AGREEMENT = 0.03
_FIX = "one of the two accountants is wrong: see tests/privacy/test_calibration.py"


def cold() -> None:
    """Empty every cache of the privacy package."""
    for name, module in list(sys.modules.items()):
        if name.startswith("dprandp.privacy"):
            for value in vars(module).values():
                if callable(getattr(value, "cache_clear", None)):
                    value.cache_clear()


def calibrated(epsilon: float, rate: float, steps: int) -> float:
    """σ by ``accounting.calibrate``, cold."""
    cold()
    return accounting.calibrate(epsilon, DELTA, rate, steps)


def case(settings: Mapping[str, tuple[float, float, int, float]]) -> Callable[[str], Case]:
    """Cold calibration at a setting."""

    def build(scale: str) -> Case:
        epsilon, rate, steps, error = settings[scale]
        difference: dict[str, float] = {}

        def check() -> Mapping[str, float]:
            sigma = calibrated(epsilon, rate, steps)
            bound = accounting.compose([accounting.GaussianEvent(sigma, rate, steps)], DELTA).upper
            if not 0.99 * epsilon <= bound <= epsilon:
                raise BenchmarkError(f"σ = {sigma:.5g} gives ε = {bound:.5g}, not {epsilon:g}", fix=_FIX)
            return difference

        def library() -> Work:
            from prv_accountant.dpsgd import find_noise_multiplier

            own = calibrated(epsilon, rate, steps)

            def work() -> None:
                found = find_noise_multiplier(rate, steps, epsilon, DELTA, eps_error=error)
                difference[LIBRARY] = abs(found / own - 1)
                if difference[LIBRARY] > AGREEMENT:
                    raise BenchmarkError(f"σ is {own:.5g} by us, {found:.5g} by the library", fix=_FIX)

            return work

        return Case(
            ours=Side(OURS, lambda: lambda: calibrated(epsilon, rate, steps)),
            others=(Side(LIBRARY, library),),
            comparisons=(Comparison(LIBRARY),),
            absolutes=(Absolute("2 s", 2.0, Limit(1, at_most=True)),),
            check=check,
            sizes=f"ε = {epsilon:g}, q = {rate:g}, T = {steps}, δ = {DELTA:g}; their error in ε ≤ {error:g}",
            unit="calibration",
            rounds=2 if scale == "full" else None,
            warm_up=False,
        )

    return build
