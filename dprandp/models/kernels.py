"""Loops that a patch layer runs over one image on a CPU, each in a single pass over memory.

Torch would write and read an array as large as all responses several times for each of them. Numba compiles the loops
on first use (a few seconds) and keeps the machine code in a cache on disk. ``patchnet.py`` has the same arithmetic in
torch, for gradients and for other devices; a test compares the two.

Responses are float32, or bfloat16 as NumPy can hold it: uint16, the upper half of a float32's bits.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic


def compiled(loop: Callable) -> Callable:
    """``nogil``: threads run it side by side. ``fastmath``: sums may be reordered, as in every BLAS."""
    settings = {"nogil": True, "fastmath": True}
    try:
        return njit(cache=True, **settings)(loop)
    except RuntimeError:  # no folder for the cache can be written: each process compiles
        return njit(**settings)(loop)


@intrinsic
def as_float32(context: Any, number: types.Type) -> tuple[Any, Callable]:
    """In a compiled loop: a float32 as it is, or the float32 whose upper half a uint16 has (a bfloat16's value)."""
    if number == types.float32:
        return types.float32(types.float32), lambda target, builder, signature, given: given[0]

    def shifted(target: Any, builder: ir.IRBuilder, signature: Any, given: list[ir.Value]) -> ir.Value:
        word = ir.IntType(32)
        return builder.bitcast(builder.shl(builder.zext(given[0], word), ir.Constant(word, 16)), ir.FloatType())

    return types.float32(types.uint16), shifted


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
def pooled(
    responses: np.ndarray, profiles: np.ndarray, threshold: float, floor: float, sums: np.ndarray, out: np.ndarray
) -> None:
    """Roots of thresholded responses of both signs, averaged over the five regions of ``patchnet.region_weights``.

    A region's weight is a product of one profile down and one across. So each row of positions is summed with the three
    profiles, for both signs, and its sums are added to the five regions. A response has one sign, so it needs one root:
    √(max(|response| - threshold, 0) + floor) - √floor.

    Args:
        responses: float32 or bfloat16 [S², F], position after position.
        profiles: float32 [S, 3], ``patchnet.region_profiles``.
        sums: float32 [6, F], overwritten.
        out: float32 [2, 5, F], to be filled: both signs, the regions, the filters.
    """
    side, filters = len(profiles), responses.shape[1]
    zero, low, least, root = np.float32(0), np.float32(threshold), np.float32(floor), np.float32(np.sqrt(floor))
    out[:] = 0
    for row in range(side):
        sums[:] = 0
        for column in range(side):
            p = row * side + column
            first, last, middle = profiles[column, 0], profiles[column, 1], profiles[column, 2]
            for f in range(filters):
                response = as_float32(responses[p, f])
                both = np.sqrt(max(abs(response) - low, zero) + least) - root
                positive = both if response > zero else zero
                negative = both - positive
                sums[0, f] += first * positive
                sums[1, f] += last * positive
                sums[2, f] += middle * positive
                sums[3, f] += first * negative
                sums[4, f] += last * negative
                sums[5, f] += middle * negative
        upper, lower, centre = profiles[row, 0], profiles[row, 1], profiles[row, 2]
        for sign in range(2):
            left, right, between = sums[3 * sign], sums[3 * sign + 1], sums[3 * sign + 2]
            for f in range(filters):
                out[sign, 0, f] += upper * left[f]
                out[sign, 1, f] += upper * right[f]
                out[sign, 2, f] += lower * left[f]
                out[sign, 3, f] += lower * right[f]
                out[sign, 4, f] += centre * between[f]


@compiled
def window_roots(responses: np.ndarray, side: int, threshold: float, floor: float, out: np.ndarray) -> None:
    """Roots of (averages of thresholded responses over 3 x 3 windows at every second position + ``floor``).

    Args:
        responses: float32 or bfloat16 [side², M].
        out: float32 [S'², 2 M], to be filled: all positive responses, then all negative ones.
    """
    filters = responses.shape[1]
    above = (side - 3) // 2 + 1
    zero, low, least, ninth = np.float32(0), np.float32(threshold), np.float32(floor), np.float32(1 / 9)
    for place in range(above * above):
        p = place // above * 2 * side + place % above * 2
        both, positive, negative = out[place], out[place, :filters], out[place, filters:]
        both[:] = 0
        for down in range(3):
            x, y, z = responses[p + down * side], responses[p + down * side + 1], responses[p + down * side + 2]
            for f in range(filters):
                a, b, c = as_float32(x[f]), as_float32(y[f]), as_float32(z[f])
                positive[f] += max(a - low, zero) + max(b - low, zero) + max(c - low, zero)
                negative[f] += max(-a - low, zero) + max(-b - low, zero) + max(-c - low, zero)
        for f in range(2 * filters):
            both[f] = np.sqrt(both[f] * ninth + least)
