"""A signal that arrives between the look whether to save and the end of a step: the step must not be lost."""

from __future__ import annotations

import contextlib
import signal
from pathlib import Path

import pytest
from tiny_run import make_public, run_probe, write_blobs

from dprandp import probe
from dprandp.runs.signals import Interrupted, Stop

STEPS = 200
"""So many that not every step is saved."""


class Late(Stop):
    """After the third step, no signal at the first look and one right after it."""

    def __init__(self) -> None:
        self.looks = 0
        super().__init__()

    @property
    def requested(self) -> signal.Signals | None:
        self.looks += 1
        return signal.SIGTERM if self.looks > 3 else None

    @requested.setter
    def requested(self, value: object) -> None:
        pass


def test_a_step_is_saved_before_a_late_signal_ends_the_stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, data = tmp_path / "run", write_blobs(tmp_path / "blobs.npz")
    make_public(run)
    with monkeypatch.context() as patched:
        patched.setattr(probe, "graceful_stop", lambda: contextlib.nullcontext(Late()))
        with pytest.raises(Interrupted):
            run_probe(run, data, steps=STEPS)
    assert run_probe(run, data, steps=STEPS)["lost_steps"] == 0
