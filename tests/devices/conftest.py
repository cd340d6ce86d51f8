"""The stages' tiny run is of the folder beside this one, the checks of a device are a script."""

from __future__ import annotations

import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent

sys.path[:0] = [str(HERE), str(HERE.parent / "stages"), str(HERE.parents[1] / "scripts")]
