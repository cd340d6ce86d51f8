#!/usr/bin/env python3
"""What noise that is correlated over the steps would gain: banded matrix factorisation beside independent noise.

    python scripts/correlated_noise.py --examples 50000 --batch-size 4096 --steps 779 2404 --epsilons 1 8

Choquette-Choo et al. 2023 ("(Amplified) banded matrix factorization for private training", arXiv 2306.08153): step t
adds row t of C⁻¹ Z, with C lower triangular and of b bands. The data are cut into b parts, and step t samples from part
t mod b at the rate b q, so that a record's steps are b apart and the cost is that of T / b independent steps. b = 1 is
DP-SGD. The loss is the error of all prefix sums of the noisy gradients (SGD without momentum). C is Toeplitz with a
falling first column, found by L-BFGS. For each budget and b it prints σ and the root mean squared error of the prefix
sums, also relative to the first b. No data are needed.
"""

from __future__ import annotations

import argparse
import math

import torch
from torch import Tensor

from dprandp.privacy.accounting import calibrate


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--examples", type=int, default=50_000)
    parser.add_argument("--batch-size", type=int, default=4096)
    parser.add_argument("--steps", type=int, nargs="+", default=[779])
    parser.add_argument("--epsilons", type=float, nargs="+", default=[1.0, 8.0], help="as many as --steps")
    parser.add_argument("--delta", type=float, default=1e-5)
    parser.add_argument("--bands", type=int, nargs="+", default=[1, 2, 4, 8, 12])
    args = parser.parse_args()
    print("| ε | steps | bands | σ | error of prefix sums | relative to independent noise |\n|---|---|---|---|---|---|")
    rate = args.batch_size / args.examples
    for epsilon, steps in zip(args.epsilons, args.steps, strict=True):
        first = None
        for bands in args.bands:
            if bands * rate > 1:
                continue
            sigma = calibrate(epsilon, args.delta, bands * rate, -(-steps // bands))
            error = sigma * prefix_error(best_bands(steps, bands), steps)
            first = first or error
            print(f"| {epsilon:g} | {steps} | {bands} | {sigma:.3f} | {error:.3g} | {error / first:.3f} |", flush=True)


def prefix_error(coefficients: Tensor, steps: int) -> Tensor | float:
    """Root mean squared error of all prefix sums of C⁻¹ Z, unit noise, for C with columns of norm 1.

    Args:
        coefficients: [b], the first column of a Toeplitz C; its norm is divided out.
    """
    inverse = inverse_series(coefficients / coefficients.norm(), steps)
    sums = inverse.cumsum(0)  # first column of A C⁻¹, also Toeplitz
    error = (sums.square() * torch.arange(steps, 0, -1)).sum().div(steps).sqrt()
    return error if error.requires_grad else float(error)


def inverse_series(coefficients: Tensor, steps: int) -> Tensor:
    """The first column [steps] of the inverse of a lower triangular Toeplitz matrix, by Newton's doubling."""
    padded = torch.nn.functional.pad(coefficients, (0, max(0, steps - len(coefficients))))
    found, known = 1 / padded[:1], 1
    while known < steps:
        known = min(2 * known, steps)
        product = multiplied(padded[:known], found, known)
        correction = -product
        correction = torch.cat([2 + correction[:1], correction[1:]])
        found = multiplied(correction, found, known)
    return found


def multiplied(one: Tensor, other: Tensor, terms: int) -> Tensor:
    """The first terms of the product of two power series."""
    length = 2 ** math.ceil(math.log2(len(one) + len(other)))
    return torch.fft.irfft(torch.fft.rfft(one, length) * torch.fft.rfft(other, length), length)[:terms]


def best_bands(steps: int, bands: int) -> Tensor:
    """The coefficients [b] that fall from 1 and have the least ``prefix_error``, float64."""
    free = torch.zeros(bands - 1, dtype=torch.float64, requires_grad=True)

    def coefficients() -> Tensor:
        """Where they fall, the inverse is bounded (Eneström & Kakeya)."""
        return torch.cat([torch.ones(1, dtype=torch.float64), free.sigmoid().cumprod(0)])

    if bands > 1:
        optimizer = torch.optim.LBFGS([free], max_iter=300, line_search_fn="strong_wolfe", tolerance_grad=1e-10)

        def loss() -> Tensor:
            optimizer.zero_grad()
            error = prefix_error(coefficients(), steps)
            error.backward()
            return error

        optimizer.step(loss)
    return coefficients().detach()


if __name__ == "__main__":
    main()
