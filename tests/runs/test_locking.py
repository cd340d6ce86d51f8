"""One process at a time in a run directory, and no lock that outlives its holder."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from dprandp.errors import StorageError
from dprandp.runs.directory import RunDir


def test_lock_nests_and_is_given_back(tmp_path: Path) -> None:
    run, other = (RunDir.open(tmp_path / "x", create=True) for _ in range(2))
    with run.lock():
        with run.lock():
            pass
        with pytest.raises(StorageError, match=f"pid {os.getpid()}"), other.lock():
            pass
    with other.lock():
        pass


HOLDER = """
import os, sys, time
from dprandp.runs.directory import RunDir
with RunDir.open(sys.argv[1], create=True).lock():
    worker = os.fork() if "fork" in sys.argv else None
    if worker == 0:  # the worker itself speaks: whoever reads it knows that it has let go of the lock
        print(os.getpid(), flush=True)
        os.close(1)
        time.sleep(60)
    if worker is None:
        print("no worker", flush=True)
    time.sleep(60)
"""


def hold(*arguments: Any) -> tuple[subprocess.Popen[str], str]:
    process = subprocess.Popen([sys.executable, "-c", HOLDER, *map(str, arguments)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    return process, process.stdout.readline().strip()


def test_second_process_is_told_who_holds_the_run_and_kill_frees_it(tmp_path: Path) -> None:
    process, _ = hold(tmp_path / "x")
    run = RunDir.open(tmp_path / "x", create=True)
    with pytest.raises(StorageError, match=rf"another dprandp process \(pid {process.pid}\) is working") as caught:
        run.lock().__enter__()
    assert "--run" in caught.value.fix
    assert run.status()  # reading needs no lock
    process.kill()
    process.wait(timeout=30)
    with run.lock():
        assert (run.path / ".lock").read_text() == f"{os.getpid()}\n"


def test_an_orphaned_worker_does_not_keep_the_lock(tmp_path: Path) -> None:
    process, worker = hold(tmp_path / "x", "fork")
    try:
        process.kill()
        process.wait(timeout=30)
        os.kill(int(worker), 0)  # the worker lives on
        with RunDir.open(tmp_path / "x", create=True).lock():
            pass
    finally:
        os.kill(int(worker), signal.SIGKILL)


def test_lock_sweeps_what_killed_processes_left(tmp_path: Path) -> None:
    run = RunDir.open(tmp_path / "x", create=True)
    (run.path / ".trash-01234567" / "deep").mkdir(parents=True)
    (run.path / ".run.01234567.partial.json").touch()
    with run.lock():
        assert os.listdir(run.path) == [".lock"]


def test_a_file_system_without_locks_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr("dprandp.runs.directory.fcntl.flock", refuse)
    with pytest.raises(StorageError, match="cannot lock files"), RunDir.open(tmp_path / "x", create=True).lock():
        pass
