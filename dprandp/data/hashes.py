"""Hashes of single images: which are equal, and which are in another data set too. As private as the images."""

from __future__ import annotations

import hashlib

import numpy as np

_LUMA = np.array([19595, 38470, 7471])
"""ITU-R BT.601 in 65,536ths, as Pillow converts colour to grey."""


def image_digests(images: np.ndarray) -> list[bytes]:
    """A 128-bit hash of each image; uint8 [N, ...]."""
    return [hashlib.blake2b(image.tobytes(), digest_size=16).digest() for image in np.ascontiguousarray(images)]


def grey_hashes(images: np.ndarray) -> np.ndarray:
    """``grey_hash`` of each image: uint8 [N, H, W, 1 or 3] to uint8 [N, 16]. In colour and in grey it is the same."""
    out = np.empty((len(images), 16), np.uint8)
    for row, image in zip(out, images, strict=True):
        wide = image.astype(np.int64)
        row[:] = grey_hash((wide[..., 0] if image.shape[-1] == 1 else wide @ _LUMA + 0x8000 >> 16).astype(np.uint8))
    return out


def grey_hash(grey: np.ndarray) -> np.ndarray:
    """A 128-bit hash of the values and the size of an image, uint8 [H, W]: uint8 [16].

    Zeros for an image of a single value, which belongs to nobody, and may be in many sets.
    """
    if grey.min() == grey.max():
        return np.zeros(16, np.uint8)
    digest = hashlib.blake2b(grey.tobytes(), digest_size=16, key=str(grey.shape).encode())
    return np.frombuffer(digest.digest(), np.uint8)


def hash_set(hashes: np.ndarray) -> frozenset[bytes]:
    """``Dataset.hashes`` as a set, without images of a single value: sets with a common hash share an image."""
    return frozenset(row.tobytes() for row in hashes[hashes[:, 0].any(axis=1)].reshape(-1, 16))
