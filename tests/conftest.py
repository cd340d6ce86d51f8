"""What the suite adds up over its tests (hostile inputs tried, kills survived), the processor's mode between files, and
torch's own generator.

A test counts with ``record_property``; the sums are printed below the outcome, also where the tests ran in several
processes.
"""

from __future__ import annotations

import signal
from collections import Counter

import pytest
import torch

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # in the background of a script; children would ignore it
    signal.signal(signal.SIGINT, signal.default_int_handler)

COUNTED = ("cases tried", "kills survived")


@pytest.fixture(scope="module", autouse=True)
def subnormal_numbers():
    """A stage flushes them to zero for its process; the next file of tests has them again."""
    yield
    torch.set_flush_denormal(False)


@pytest.fixture(autouse=True)
def seeded_torch():
    """Where a test leaves torch's own generator unseeded, it meets the same numbers in every run and order."""
    torch.manual_seed(0)


@pytest.fixture
def one_thread():
    """Sums in one order, whatever the machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(params=["1", "0"], ids=["bfloat16-unit", "no-bfloat16-unit"])
def processor(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Pretend either kind of processor; a command started with this environment pretends too."""
    monkeypatch.setenv("DPRANDP_PRETEND_BFLOAT16", request.param)
    return request.param


def pytest_terminal_summary(terminalreporter) -> None:
    for name in COUNTED:
        sums: Counter[str] = Counter()
        for report in terminalreporter.getreports("passed"):
            for key, value in getattr(report, "user_properties", ()):
                if key == name and report.when == "call":
                    sums[report.nodeid.partition("::")[0].rpartition("/")[2]] += value
        if sums:
            parts = ", ".join(f"{file} {count}" for file, count in sorted(sums.items()))
            terminalreporter.write_line(f"{name}: {sums.total()} ({parts})")
