"""The forty wavelets against their literal definition: an 11×11 image, rotated by a library, cut to its centre."""

from __future__ import annotations

import numpy as np
from scipy import ndimage

from dprandp.synth.stylegan import base_wavelets, sign_wavelets, wavelets


def rotated_centre(image: np.ndarray, degrees: float) -> np.ndarray:
    rotated = ndimage.rotate(image, degrees, reshape=False, order=1, mode="nearest")
    centre = rotated[4:7, 4:7]
    return centre - centre.mean()


def literal_step() -> np.ndarray:
    step = np.ones((11, 11))
    step[:, 5] = 0.0
    step[:, 6:] = -1.0
    return step


def literal_line() -> np.ndarray:
    line = np.ones((11, 11))
    line[:, 5] = -1.0
    return line


def test_edges_and_lines_equal_rotated_images() -> None:
    """The sense of rotation does not matter for the set of forty, but it must be one of the two."""
    base, everything = base_wavelets(), wavelets()
    for orientation in range(8):
        for offset, image in ((0, literal_step()), (8, literal_line())):
            own = base[offset + orientation]
            both = [rotated_centre(image, sign * 22.5 * orientation) for sign in (1, -1)]
            assert min(np.abs(own - candidate).max() for candidate in both) < 1e-9
            assert max(np.abs(everything - candidate).max(axis=(1, 2)).min() for candidate in both) < 1e-9
            half_way = [rotated_centre(image, sign * 22.5 * orientation + 11.25) for sign in (1, -1)]  # control
            assert min(np.abs(own - wrong).max() for wrong in half_way) > 0.05


def test_forty_different_wavelets_in_negated_pairs() -> None:
    everything = wavelets()
    assert everything.shape == (40, 3, 3)
    np.testing.assert_array_equal(everything[20:], -everything[:20])
    distance = np.abs(everything[:, None] - everything[None]).max(axis=(2, 3)) + np.eye(40)
    assert distance.min() > 0.05


def test_the_four_unoriented_ones() -> None:
    delta, centre_against_rest, plus, signed_plus = base_wavelets()[16:]
    np.testing.assert_array_equal(delta, [[0, 0, 0], [0, 1, 0], [0, 0, 0]])
    np.testing.assert_array_equal(centre_against_rest, [[-1, -1, -1], [-1, 1, -1], [-1, -1, -1]])
    np.testing.assert_array_equal(plus, [[0, 1, 0], [1, 1, 1], [0, 1, 0]])
    np.testing.assert_array_equal(signed_plus, [[-1, 1, -1], [1, 1, 1], [-1, 1, -1]])


def test_sign_wavelets_equal_the_signs_of_rotated_images() -> None:
    """Sixteen edges round the circle, eight lines with both signs, four others with both signs: forty."""
    everything = sign_wavelets()
    assert everything.shape == (40, 3, 3)
    assert set(np.unique(everything)) == {-1.0, 0.0, 1.0}
    found = set()
    for orientation in range(16):
        edge = np.sign(np.round(rotated_centre(literal_step(), 22.5 * orientation), 6))
        line = ndimage.rotate(literal_line(), 22.5 * orientation, reshape=False, order=1, mode="nearest")
        line = np.sign(np.round(line[4:7, 4:7], 6))
        for wanted in (edge, line, -line):
            matches = np.flatnonzero((everything == wanted).all(axis=(1, 2)))
            assert len(matches) >= 1
            found |= set(matches)
    assert found | {16, 17, 18, 19, 36, 37, 38, 39} == set(range(40))
    np.testing.assert_array_equal(everything[20:], -everything[:20])
    np.testing.assert_array_equal(everything[16:20], np.concatenate([base_wavelets()[16:]]))
    assert not (everything == wavelets()).all()
