"""One signal stops at the next step, two stop at once; nothing is lost between stages or in workers."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest

from dprandp.runs.signals import Interrupted, graceful_stop

LOOP = """
import os, sys, time
from dprandp.runs.signals import Interrupted, graceful_stop
try:
    with graceful_stop() as stop:
        print("ready", flush=True)
        for step in range(1000):
            time.sleep(float(sys.argv[1]))
            if stop.requested:
                print("saved", flush=True)
                stop.raise_if_requested()
except Interrupted as error:
    print(error.problem, flush=True)
    sys.exit(error.exit_code)
"""


def start(*arguments: str, script: str = LOOP) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", script, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_first_signal_saves_and_exits_with_its_code(signum: signal.Signals, code: int) -> None:
    process = start("0.05")
    process.send_signal(signum)
    out, err = process.communicate(timeout=30)
    assert process.returncode == code, err
    assert out.splitlines() == ["saved", f"stopped by {signum.name}; the state was saved"]
    assert "stopping after this step" in err


@pytest.mark.parametrize("second", [signal.SIGINT, signal.SIGTERM])
def test_second_signal_ends_at_once(second: signal.Signals) -> None:
    process = start("30")
    process.send_signal(signal.SIGTERM)
    assert process.stderr is not None
    while "stopping after" not in process.stderr.readline():
        pass
    process.send_signal(second)
    out, _ = process.communicate(timeout=15)
    assert process.returncode == -second
    assert "saved" not in out


def test_forked_workers_end_on_sigterm_and_outlive_ctrl_c() -> None:
    """A worker that inherited the handler must still die when its parent terminates it."""
    script = """
import os, signal, time
from dprandp.runs.signals import graceful_stop
with graceful_stop() as stop:
    worker = os.fork()
    if worker == 0:
        while True:
            time.sleep(1)
    print("ready", flush=True)
    os.kill(worker, signal.SIGINT)
    time.sleep(0.3)
    print(os.waitpid(worker, os.WNOHANG) == (0, 0), flush=True)
    os.kill(worker, signal.SIGTERM)
    print(os.waitstatus_to_exitcode(os.waitpid(worker, 0)[1]), stop.requested, flush=True)
"""
    out, err = start(script=script).communicate(timeout=30)
    assert out.split() == ["True", "-15", "None"], err


def test_nested_blocks_share_the_flag_and_handlers_come_back() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with graceful_stop() as outer:
        with graceful_stop() as first:
            os.kill(os.getpid(), signal.SIGTERM)
        assert first is outer
        with graceful_stop() as second:
            assert second.requested is signal.SIGTERM  # arrived in the first stage, seen by the next
            with pytest.raises(Interrupted) as caught:
                second.raise_if_requested()
    assert caught.value.exit_code == 143
    assert signal.getsignal(signal.SIGTERM) is before
    with graceful_stop() as later:
        assert later.requested is None
        later.raise_if_requested()


def test_an_ignored_signal_stays_ignored() -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with graceful_stop() as stop:
            os.kill(os.getpid(), signal.SIGINT)
        assert stop.requested is None
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


def test_outside_the_main_thread_the_flag_never_rises() -> None:
    def work() -> object:
        with graceful_stop() as stop:
            return stop.requested

    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(work).result() is None
