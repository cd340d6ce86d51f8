"""Which images are the same in any reading, and which are not."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
from PIL import Image

from dprandp.data.decode import grey_hash, grey_hashes, hash_set


def pictures(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


def test_grey_values_are_those_of_pillow_and_the_hash_is_that_of_blake2b() -> None:
    colour = pictures(5, 6, 7, 3)
    by_pillow = [np.asarray(Image.fromarray(image).convert("L")) for image in colour]
    assert np.array_equal(grey_hashes(colour), [grey_hash(grey) for grey in by_pillow])
    digest = hashlib.blake2b(by_pillow[0].tobytes(), digest_size=16, key=b"(6, 7)").digest()
    assert grey_hash(by_pillow[0]).tobytes() == digest


def test_colour_and_grey_are_the_same_and_a_bit_or_a_side_is_another() -> None:
    grey = pictures(4, 6, 8, 1)
    assert np.array_equal(grey_hashes(grey), grey_hashes(np.repeat(grey, 3, axis=3)))
    changed = grey.copy()
    changed[0, 0, 0] ^= 1
    known = hash_set(grey_hashes(grey)[:, None])
    assert len(known) == 4
    assert len(known & hash_set(grey_hashes(changed)[:, None])) == 3
    assert not known & hash_set(grey_hashes(grey.reshape(4, 8, 6, 1))[:, None])


def test_equal_files_are_equal_images_whatever_their_pixels_became() -> None:
    """As where two runs read the same 16-bit files by other rules: other grey values, the same bytes."""
    one, other, files = pictures(3, 6, 8, 1), 255 - pictures(3, 6, 8, 1), pictures(3, 16)
    known = [hash_set(np.stack([grey_hashes(images), files], axis=1)) for images in (one, other)]
    assert [len(each) for each in known] == [6, 6]
    assert known[0] & known[1] == frozenset(row.tobytes() for row in files)


@pytest.mark.parametrize("value", [0, 255])
def test_an_image_of_one_value_is_in_no_set(value: int) -> None:
    blank = np.full((2, 6, 8, 3), value, np.uint8)
    files = np.stack([grey_hashes(blank), pictures(2, 16)], axis=1)  # with hashes of their files
    assert hash_set(files) == frozenset()
