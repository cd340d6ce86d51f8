"""Small data sets of a user's own, as the commands of docs/own-data.md name them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image


def make_own_data(folder: Path) -> None:
    """Write all of them into ``folder``."""
    random = np.random.default_rng(0)
    for split, count in (("train", 20), ("test", 6)):
        for label, name in enumerate(("healthy", "ill")):
            for root in ("scans", "scans-16-bit"):
                (folder / root / split / name).mkdir(parents=True)
            for index in range(count):
                values = 1200 * label + random.integers(0, 2400, (40, 36))
                Image.fromarray(values.astype(np.uint16)).save(folder / f"scans-16-bit/{split}/{name}/{index}.png")
                Image.fromarray((values // 16).astype(np.uint8)).save(folder / f"scans/{split}/{name}/{index}.png")
