"""The crash tests use the tiny run of tests/stages and the processes of tests/cli."""

from __future__ import annotations

import sys
from pathlib import Path

for folder in ("cli", "stages"):
    path = str(Path(__file__).parents[1] / folder)
    if path not in sys.path:
        sys.path.append(path)
