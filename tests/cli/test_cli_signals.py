"""Ctrl-C and SIGTERM: exit 130 or 143, and the same command then finishes the run (private stages: tests/faults)."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from cli_process import ENVIRONMENT, TIMEOUT, Dprandp, refused

from dprandp.runs import checkpoint

RunAfter = Callable[[str], Path]


def lines(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


# (run it starts from, command, file to watch, lines to wait for)
STAGES = {
    "generate": ("", ["generate", "--workers", 1, "--count", 300], "1-generate/shard-00000.npy", 0),
    "pretrain": ("generate", ["pretrain"], "2-pretrain/metrics.jsonl", 1),
    "wrn": ("generate", ["pretrain", "--arch", "wrn-10-1", "--steps", 12, "--batch-size", 2], "2-pretrain/LATEST", 1),
}

LONG = """
[pretrain]
filters = 400
layers = 1
dictionary_patches = 20000
dictionary_iterations = 5
"""


@pytest.mark.slow
@pytest.mark.parametrize("name", STAGES)
def test_ctrl_c(dprandp: Dprandp, run_after: RunAfter, folder: Path, tmp_path: Path, name: str) -> None:
    after, command, file, count = STAGES[name]
    run = run_after(after) if after else tmp_path / "new"
    settings = (folder / "small.toml").read_text()
    if name == "pretrain":
        settings = settings.partition("[pretrain]")[0] + LONG
    if name == "wrn":
        settings = settings.replace("[pretrain]", "[pretrain]\ncheckpoint_every = 1")
    (tmp_path / "long.toml").write_text(settings)
    command = [*command, "--config", tmp_path / "long.toml", "--run", run]
    stage = str(command[0])
    running = dprandp.start(*command)
    running.wait_until(lambda: (run / file).exists() and lines(run / file) >= count)
    running.signal(signal.SIGINT)
    done = running.end()
    refused(done, 130, "SIGINT", "saved", "run the same command again")
    states = {row["stage"]: row["state"] for row in dprandp("status", "--run", run, "--json").json["stages"]}
    assert states[stage] == "partial"
    assert not list(run.rglob("*.partial*"))

    done = dprandp(*command, "--json")
    assert done.code == 0, done.err
    assert done.json["stage"] == stage
    assert dprandp(*command, "--json").json == done.json  # and now it is finished


STOPPED_OUTSIDE_THE_LOOP = """
import os, signal, time
from dprandp.models import whitening
def fit(*arguments, **settings):
    os.kill(os.getpid(), signal.{name})
    time.sleep(10)
whitening.fit = fit
"""


@pytest.mark.parametrize(("name", "code"), [("SIGINT", 130), ("SIGTERM", 143)])
def test_signal_while_nothing_can_be_saved(dprandp: Dprandp, run_after: RunAfter, name: str, code: int) -> None:
    """Before the first step, too, the exit code says what happened, and the command can be repeated."""
    run = run_after("pretrain")
    command = ["probe", "--config", "small.toml", "--data", "npz:tiny.npz", "--run", run]
    done = dprandp(*command, before=STOPPED_OUTSIDE_THE_LOOP.format(name=name))
    assert done.code == code, done.err
    assert "Traceback" not in done.err
    assert "error: " in done.err
    assert dprandp(*command, "--json").json["charged_steps"] == 5


@pytest.mark.parametrize(
    "signals",
    [[(signal.SIGINT, 130)], [(signal.SIGTERM, 143), (signal.SIGINT, 130)]],
    ids=len,
)
@pytest.mark.slow
def test_a_real_process(run_after: RunAfter, folder: Path, signals: list) -> None:
    """``python -m dprandp`` itself, no server; one run, stopped and resumed, where there are two signals."""
    run = run_after("pretrain")
    command = [sys.executable, "-m", "dprandp", "probe", "--config", "small.toml", "--data", "npz:tiny.npz"]
    command += ["--run", str(run), "--steps", "100000"]
    charged = []
    metrics = run / "3-probe" / "metrics.jsonl"
    for signum, code in signals:
        had = lines(metrics)
        process = subprocess.Popen(
            command, cwd=folder, env=os.environ | ENVIRONMENT, stderr=subprocess.PIPE, text=True,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
        )  # fmt: skip
        end = time.monotonic() + TIMEOUT
        while lines(metrics) <= had and process.poll() is None and time.monotonic() < end:
            time.sleep(0.02)
        process.send_signal(signum)
        _, said = process.communicate(timeout=TIMEOUT)
        assert process.returncode == code, said
        assert f"stopped by {signum.name}; the state was saved" in said
        assert "Traceback" not in said
        saved = checkpoint.load(run / "3-probe")
        charged.append(lines(run / "privacy" / "ledger.jsonl") - 1)
        assert saved.meta["step"] == charged[-1] == lines(metrics)
    assert charged[0] > 0
    assert charged == sorted(set(charged))


@pytest.mark.slow
def test_ctrl_c_while_many_workers_render(dprandp: Dprandp, tmp_path: Path) -> None:
    run = tmp_path / "new"
    command = ["generate", "--config", "small.toml", "--count", 1500, "--workers", 2, "--run", run]
    running = dprandp.start(*command)
    running.wait_until(lambda: (run / "1-generate" / "shard-00001.npy").exists())
    running.signal(signal.SIGINT)
    refused(running.end(), 130, "SIGINT")
    assert dprandp(*command).code == 0
    assert len(list((run / "1-generate").glob("shard-*.npy"))) == 15


# A library in C that is interrupted by a signal, and makes an exception of its own of what the handler raised; and a
# signal while Python removes an object: what is raised there is printed and forgotten.
SWALLOWED = """
    try:
        os.kill(os.getpid(), signal.{name})
        time.sleep(10)
    except BaseException as error:
        raise ValueError("in C") from error
"""
FORGOTTEN = """
    class Removed:
        def __del__(self):
            os.kill(os.getpid(), signal.{name})
            time.sleep(0.05)
    Removed()
    time.sleep(10)
"""


@pytest.mark.parametrize("lost", [SWALLOWED, FORGOTTEN], ids=["swallowed", "forgotten"])
@pytest.mark.parametrize(("name", "code"), [("SIGTERM", 143), ("SIGINT", 130)])
def test_a_signal_whose_exception_is_lost_ends_the_command_and_is_no_bug(
    dprandp: Dprandp, run_after: RunAfter, name: str, code: int, lost: str
) -> None:
    before = "import os, signal, time\nfrom dprandp.inspection import overview\ndef status(rundir):"
    before += lost.format(name=name) + "overview.status = status"
    done = dprandp("status", "--run", run_after("generate"), before=before)
    refused(done, code, f"stopped by {name}", "run the same command again")
    assert "bug" not in done.err
