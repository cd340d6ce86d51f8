"""What the decoders of image files share: limits, the window of grey levels, and the words of a refusal."""

from __future__ import annotations

import numpy as np

from dprandp.config.declared import flag

MAX_PIXELS = 50_000_000
"""Most pixels one image may have; more is taken for a decompression bomb."""


def windowed(values: np.ndarray, low: float, high: float) -> np.ndarray:
    """uint8 of numbers: ``low`` and less to 0, ``high`` and more to 255, evenly between, halves rounded up."""
    scaled = np.floor((values - low) * 255 / (high - low) + 0.5)
    return np.clip(scaled, 0, 255).astype(np.uint8)


def give(rule: str, value: str, otherwise: str) -> str:
    """The fix of a refusal that a declared rule resolves."""
    return f"declare how to read such files with {flag(rule)} {value}, or {otherwise}"
