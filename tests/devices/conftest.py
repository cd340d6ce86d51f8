"""The stages' tiny run is of the folder beside this one, the checks of a device are a script."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent

sys.path[:0] = [str(HERE), str(HERE.parent / "stages"), str(HERE.parents[1] / "scripts")]


@pytest.fixture(autouse=True)
def float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """Devices are compared with the CPU in one precision, whatever the processor is.

    The process of the emulated device is started with this environment.
    """
    monkeypatch.setenv("DPRANDP_PRETEND_BFLOAT16", "0")
