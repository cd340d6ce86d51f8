"""Loops that a patch layer runs over one image on a CPU, each in a single pass over memory.

Torch would write and read an array as large as all responses several times for each of them. Numba compiles the loops
on first use (a few seconds) and keeps the machine code in a cache on disk. ``patchnet.py`` has the same arithmetic in
torch, for gradients and for other devices; a test compares the two.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numba import njit


def compiled(loop: Callable) -> Callable:
    """``nogil``: threads run it side by side. ``fastmath``: sums may be reordered, as in every BLAS."""
    settings = {"nogil": True, "fastmath": True}
    try:
        return njit(cache=True, **settings)(loop)
    except RuntimeError:  # no folder for the cache can be written: each process compiles
        return njit(**settings)(loop)


@compiled
def normalised_patches(image: np.ndarray, size: int, stride: int, floor: float, out: np.ndarray) -> None:
    """Each patch minus its mean, over (its standard deviation + ``floor``).

    Args:
        image: float32 [C, H, W]. size: side of a patch. stride: pixels between patches.
        out: float32 [L, C size²], to be filled, patch after patch.
    """
    channels, width = image.shape[0], image.shape[2]
    across = (width - size) // stride + 1
    for place in range(len(out)):
        top, left = place // across * stride, place % across * stride
        patch = out[place]
        at = 0
        for channel in range(channels):
            for y in range(size):
                for x in range(size):
                    patch[at + x] = image[channel, top + y, left + x]
                at += size
        total = np.float32(0)
        for value in patch:
            total += value
        mean = total / np.float32(len(patch))
        squares = np.float32(0)
        for k in range(len(patch)):
            patch[k] -= mean
            squares += patch[k] * patch[k]
        scale = np.float32(1) / (np.sqrt(squares / np.float32(len(patch)) + np.float32(1e-12)) + np.float32(floor))
        for k in range(len(patch)):
            patch[k] *= scale


@compiled
def pooled(responses: np.ndarray, profiles: np.ndarray, threshold: float, sums: np.ndarray, out: np.ndarray) -> None:
    """Thresholded responses of both signs, averaged over the five regions of ``patchnet.region_weights``.

    A region's weight is a product of one profile down and one across. So each row of positions is summed with the three
    profiles, for both signs, and its sums are added to the five regions.

    Args:
        responses: float32 [S², F], position after position.
        profiles: float32 [S, 3], ``patchnet.region_profiles``.
        sums: float32 [6, F], overwritten.
        out: float32 [2, 5, F], to be filled: both signs, the regions, the filters.
    """
    side, filters = len(profiles), responses.shape[1]
    zero, floor = np.float32(0), np.float32(threshold)
    out[:] = 0
    for row in range(side):
        sums[:] = 0
        first = 0
        while first + 3 <= side:  # three positions at a time: a third of the loads and stores of ``sums``
            p = row * side + first
            a0, b0, c0 = profiles[first, 0], profiles[first, 1], profiles[first, 2]
            a1, b1, c1 = profiles[first + 1, 0], profiles[first + 1, 1], profiles[first + 1, 2]
            a2, b2, c2 = profiles[first + 2, 0], profiles[first + 2, 1], profiles[first + 2, 2]
            for f in range(filters):
                u = max(responses[p, f] - floor, zero)
                v = max(responses[p + 1, f] - floor, zero)
                w = max(responses[p + 2, f] - floor, zero)
                sums[0, f] += a0 * u + a1 * v + a2 * w
                sums[1, f] += b0 * u + b1 * v + b2 * w
                sums[2, f] += c0 * u + c1 * v + c2 * w
                u = max(-responses[p, f] - floor, zero)
                v = max(-responses[p + 1, f] - floor, zero)
                w = max(-responses[p + 2, f] - floor, zero)
                sums[3, f] += a0 * u + a1 * v + a2 * w
                sums[4, f] += b0 * u + b1 * v + b2 * w
                sums[5, f] += c0 * u + c1 * v + c2 * w
            first += 3
        while first < side:
            p = row * side + first
            for f in range(filters):
                u = max(responses[p, f] - floor, zero)
                v = max(-responses[p, f] - floor, zero)
                for k in range(3):
                    sums[k, f] += profiles[first, k] * u
                    sums[3 + k, f] += profiles[first, k] * v
            first += 1
        for sign in range(2):
            near, far, middle = sums[3 * sign], sums[3 * sign + 1], sums[3 * sign + 2]
            for f in range(filters):
                out[sign, 0, f] += profiles[row, 0] * near[f]
                out[sign, 1, f] += profiles[row, 0] * far[f]
                out[sign, 2, f] += profiles[row, 1] * near[f]
                out[sign, 3, f] += profiles[row, 1] * far[f]
                out[sign, 4, f] += profiles[row, 2] * middle[f]


@compiled
def window_roots(responses: np.ndarray, side: int, threshold: float, floor: float, out: np.ndarray) -> None:
    """Roots of (averages of thresholded responses over 3 x 3 windows at every second position + ``floor``).

    Args:
        responses: float32 [side², M].
        out: float32 [S'², 2 M], to be filled: all positive responses, then all negative ones.
    """
    filters = responses.shape[1]
    above = (side - 3) // 2 + 1
    zero, low, least, ninth = np.float32(0), np.float32(threshold), np.float32(floor), np.float32(1 / 9)
    for place in range(above * above):
        p = place // above * 2 * side + place % above * 2
        x0, x1, x2 = responses[p], responses[p + 1], responses[p + 2]
        x3, x4, x5 = responses[p + side], responses[p + side + 1], responses[p + side + 2]
        x6, x7, x8 = responses[p + 2 * side], responses[p + 2 * side + 1], responses[p + 2 * side + 2]
        both, positive, negative = out[place], out[place, :filters], out[place, filters:]
        for f in range(filters):
            total = max(x0[f] - low, zero) + max(x1[f] - low, zero) + max(x2[f] - low, zero)
            total += max(x3[f] - low, zero) + max(x4[f] - low, zero) + max(x5[f] - low, zero)
            total += max(x6[f] - low, zero) + max(x7[f] - low, zero) + max(x8[f] - low, zero)
            positive[f] = total * ninth + least
            total = max(-x0[f] - low, zero) + max(-x1[f] - low, zero) + max(-x2[f] - low, zero)
            total += max(-x3[f] - low, zero) + max(-x4[f] - low, zero) + max(-x5[f] - low, zero)
            total += max(-x6[f] - low, zero) + max(-x7[f] - low, zero) + max(-x8[f] - low, zero)
            negative[f] = total * ninth + least
        for f in range(2 * filters):
            both[f] = np.sqrt(both[f])
