"""The forty 3×3 wavelets that the StyleGAN processes use as filters, as they are and quantised to their signs.

Source: Baradad et al., "Learning to See by Looking at Noise", NeurIPS 2021 (the *oriented* StyleGAN process; *highfreq*
and *sparse* use the signs).
"""

from __future__ import annotations

import numpy as np

ORIENTATIONS = 8
ANGLE_STEP = np.pi / ORIENTATIONS  # 22.5°


def _edges_and_lines() -> tuple[np.ndarray, np.ndarray]:
    """The eight edges and the eight lines, float64 [8, 3, 3] each, before their means are taken off."""
    offset_y, offset_x = np.meshgrid([-1.0, 0.0, 1.0], [-1.0, 0.0, 1.0], indexing="ij")
    edges, lines = [], []
    for orientation in range(ORIENTATIONS):
        angle = orientation * ANGLE_STEP
        distance = offset_x * np.cos(angle) + offset_y * np.sin(angle)
        edges.append(-np.clip(distance, -1.0, 1.0))
        lines.append(1.0 - 2.0 * np.clip(1.0 - np.abs(distance), 0.0, None))
    return np.stack(edges), np.stack(lines)


def _unoriented() -> np.ndarray:
    """Delta, centre against the rest, plus, signed plus: float64 [4, 3, 3]."""
    delta = np.zeros((3, 3))
    delta[1, 1] = 1.0
    plus = np.ones((3, 3))
    plus[::2, ::2] = 0.0
    return np.stack([delta, 2.0 * delta - 1.0, plus, np.sign(plus - 0.5)])


def base_wavelets() -> np.ndarray:
    """The twenty wavelets before negation.

    An 11×11 step (+1 left of the middle column, 0 in it, −1 right of it) or line (ones, middle column −1), rotated
    with bilinear interpolation and cut to its centre 3×3, depends on one coordinate only: the signed distance from
    the rotated middle column. Interpolated between pixels it is a ramp resp. a tent of that distance, which is what
    is evaluated here.

    Returns:
        float64 [20, 3, 3]: 8 edges and 8 lines (each zero mean), delta, centre against the rest, plus, signed plus.
    """
    oriented = np.concatenate(_edges_and_lines())
    oriented -= oriented.mean(axis=(1, 2), keepdims=True)
    return np.concatenate([oriented, _unoriented()])


def wavelets() -> np.ndarray:
    """All forty: the twenty of :func:`base_wavelets`, then their negatives in the same order.

    Returns:
        float64 [40, 3, 3].
    """
    base = base_wavelets()
    return np.concatenate([base, -base])


def sign_wavelets() -> np.ndarray:
    """The forty of *highfreq* and *sparse*: every value replaced by its sign.

    An edge keeps the mean zero (a pixel on the edge itself is 0); a line is quantised before its mean is taken off, so
    that it has −1 on the line and +1 beside it.

    Returns:
        float64 [40, 3, 3] of −1, 0 and 1, in the order of :func:`wavelets`.
    """
    edges, lines = _edges_and_lines()
    base = np.concatenate([np.sign(np.round(edges, 9)), np.sign(lines), _unoriented()])
    return np.concatenate([base, -base])
