"""The forty wavelets against their literal definition: an 11×11 image, rotated by a library, cut to its centre."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import ndimage

from dprandp.synth.stylegan_draws import base_wavelets, sign_wavelets, wavelets


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


@pytest.mark.parametrize("orientation", range(8))
def test_edges_and_lines_equal_rotated_images(orientation: int) -> None:
    base = base_wavelets()
    # The sense of rotation does not matter for the set of forty, but it must be one of the two.
    for offset, image in ((0, literal_step()), (8, literal_line())):
        candidates = [rotated_centre(image, sign * 22.5 * orientation) for sign in (1, -1)]
        errors = [np.abs(base[offset + orientation] - candidate).max() for candidate in candidates]
        assert min(errors) < 1e-9
        for half_way in (-11.25, 11.25):  # control
            wrong = [rotated_centre(image, sign * 22.5 * orientation + half_way) for sign in (1, -1)]
            assert min(np.abs(base[offset + orientation] - candidate).max() for candidate in wrong) > 0.05


def test_the_other_sense_of_rotation_gives_the_same_forty() -> None:
    everything = wavelets()
    for image in (literal_step(), literal_line()):
        for orientation in range(8):
            for sign in (1, -1):
                wanted = rotated_centre(image, sign * 22.5 * orientation)
                assert np.abs(everything - wanted).max(axis=(1, 2)).min() < 1e-9


def test_forty_different_wavelets_in_negated_pairs() -> None:
    everything = wavelets()
    assert everything.shape == (40, 3, 3)
    np.testing.assert_array_equal(everything[20:], -everything[:20])
    distance = np.abs(everything[:, None] - everything[None]).max(axis=(2, 3)) + np.eye(40)
    assert distance.min() > 0.05


def test_means() -> None:
    mean = base_wavelets().mean(axis=(1, 2))
    np.testing.assert_allclose(mean[:16], 0.0, atol=1e-15)
    np.testing.assert_allclose(mean[16:], [1 / 9, -7 / 9, 5 / 9, 1 / 9])


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
