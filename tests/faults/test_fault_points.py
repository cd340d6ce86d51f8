"""kill -9 at every fault point of the storage layer, and at random times: the old state or the new, never a part."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from cli_process import Dprandp, Running

from dprandp.errors import UsageError
from dprandp.runs import checkpoint, faults
from dprandp.runs.directory import RunDir
from dprandp.runs.files import remove_leftovers

KILLED = -signal.SIGKILL


def python(script: str, *arguments: object, fault: str | None = None) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != faults.VARIABLE}
    if fault is not None:
        environment[faults.VARIABLE] = fault
    command = [sys.executable, "-c", script, *map(str, arguments)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)


PREPARE = """
import os
import torch
from dprandp.runs import checkpoint, faults
from dprandp.runs.directory import RunDir
"""
SAVES = """
for name, value, fault in saves:
    faults._hits.clear()
    os.environ[faults.VARIABLE] = fault or ""
    tensors = {"weight": torch.full((64, 64), float(value)), "step": torch.tensor(value)}
    checkpoint.save(folder, name, tensors, {"value": value})
"""


class Server:
    """Python in processes that may die."""

    def __init__(self, dprandp: Dprandp) -> None:
        self._dprandp = dprandp

    def start(self, source: str, **names: object) -> Running:
        given = "".join(f"{name} = {value!r}\n" for name, value in names.items())
        return self._dprandp.start(before=PREPARE + given + source + "\nos._exit(0)")

    def run(self, source: str, **names: object) -> int:
        return self.start(source, **names).end().code

    def save(self, folder: Path, *saves: tuple[str, int, str | None]) -> int:
        return self.run(SAVES, folder=str(folder), saves=saves)


@pytest.fixture
def server(dprandp: Dprandp) -> Server:
    return Server(dprandp)


def assert_whole(folder: Path) -> int:
    """The folder's newest checkpoint loads without fallback, tensors and meta of one piece; returns its value."""
    loaded = checkpoint.load(folder)
    value = loaded.meta["value"]
    assert int(loaded.tensors["step"]) == value
    assert torch.equal(loaded.tensors["weight"], torch.full((64, 64), float(value)))
    return value


def every_fault(files: int) -> list[str]:
    """All faults of a save that writes so many files, in the order in which it passes them."""
    return [f"{name}:{hit}" for hit in range(1, files + 1) for name in ("temp-written", "renamed")] + [
        "pointer-moved:1"
    ]


@pytest.mark.parametrize("after", ["step-2", "step-1"])
def test_checkpoint_survives_a_kill_at_every_point(tmp_path: Path, server: Server, after: str) -> None:
    found = []
    for fault in every_fault(2):
        folder = tmp_path / fault
        folder.mkdir()
        assert server.save(folder, ("step-1", 1, None), (after, 2, fault)) == KILLED
        value = assert_whole(folder)
        found.append(value)
        said: list[str] = []
        assert checkpoint.resume(folder, warn=said.append).meta["value"] == value
        assert said == []
        # and the run goes on: the same checkpoint again, nothing left behind
        remove_leftovers(folder)
        assert server.save(folder, (after, 3, None)) == 0
        assert assert_whole(folder) == 3
        names = {"step-1", after}
        assert set(os.listdir(folder)) == {"LATEST"} | {f"{name}.safetensors" for name in names}
    # The new state is there from one rename on: that of LATEST, or that of the file replaced in place.
    turn = {"step-2": 3, "step-1": 1}[after]
    assert found == [1] * turn + [2] * (len(found) - turn)


@pytest.mark.slow
def test_a_kill_within_the_repair_of_a_kill(tmp_path: Path, server: Server) -> None:
    """Twice killed while replacing the same checkpoint."""
    found = set()
    for first in every_fault(2):
        for second in every_fault(2):
            folder = tmp_path / f"{first}-{second}"
            folder.mkdir()
            assert server.save(folder, ("step-1", 1, None), ("step-1", 2, first)) == KILLED
            assert server.save(folder, ("step-1", 3, second)) == KILLED
            found.add(assert_whole(folder))
    assert found == {1, 2, 3}


def test_first_checkpoint_killed_means_start_again(tmp_path: Path, server: Server) -> None:
    found = []
    for fault in every_fault(2):
        folder = tmp_path / fault
        folder.mkdir()
        assert server.save(folder, ("step-1", 1, fault)) == KILLED
        found.append(checkpoint.resume(folder, warn=lambda text: None) is not None)
    assert found == [False] + [True] * 4  # whole from the moment that the file has its name


def test_checkpoint_survives_kills_at_random_times(tmp_path: Path, server: Server) -> None:
    draw = random.Random()
    reached = 0
    for _ in range(8):
        saves = [(f"step-{value // 3}", value, None) for value in range(reached + 1, 5000)]
        running = server.start(SAVES, folder=str(tmp_path), saves=saves)
        while not (tmp_path / "LATEST").exists():
            time.sleep(0.01)
        time.sleep(0.15 * draw.random())
        running.signal(signal.SIGKILL)
        assert running.end().code == KILLED
        now = assert_whole(tmp_path)
        assert now >= reached
        reached = now
    assert reached > 3  # the kills interrupted real work


@pytest.mark.parametrize(("fault", "content"), [("temp-written:1", "old"), ("renamed:1", "new")])
def test_atomic_write(tmp_path: Path, fault: str, content: str) -> None:
    (tmp_path / "a.json").write_text("old")
    script = "import sys; from dprandp.runs.files import atomic_write; atomic_write(sys.argv[1], 'new')"
    done = python(script, tmp_path / "a.json", fault=fault)
    assert done.returncode == KILLED
    assert "killing this process now" in done.stderr
    assert (tmp_path / "a.json").read_text() == content
    assert len(remove_leftovers(tmp_path)) == (1 if fault == "temp-written:1" else 0)
    assert python(script, tmp_path / "a.json").returncode == 0
    assert (tmp_path / "a.json").read_text() == "new"
    assert os.listdir(tmp_path) == ["a.json"]


OVERWRITE = """
os.environ[faults.VARIABLE] = fault
run = RunDir.open(path, create=True)
with run.lock():
    begun = run.begin("generate", {"seed": 2}, {}, overwrite=True)
    (begun.directory / "out.bin").write_text("2")
    run.finish("generate", run.hash_outputs("generate", ["out.bin"]), {})
"""


@pytest.mark.parametrize("hit", [1, 2, 3])
@pytest.mark.parametrize("name", ["temp-written", "renamed"])
def test_overwrite_never_mixes_two_configurations(tmp_path: Path, server: Server, name: str, hit: int) -> None:
    """run.json, config.toml, run.json: wherever it dies, files, recorded settings and state belong together."""
    run = RunDir.open(tmp_path / "x", create=True)
    with run.lock():
        begun = run.begin("generate", {"seed": 1}, {})
        (begun.directory / "out.bin").write_text("1")
        run.finish("generate", run.hash_outputs("generate", ["out.bin"]), {})
    assert server.run(OVERWRITE, path=str(run.path), fault=f"{name}:{hit}") == KILLED
    with run.lock():
        row = run.status()[0]
        output = run.stage_dir("generate") / "out.bin"
        if output.exists():
            assert output.read_text() == str(row.config["seed"])
        else:
            assert row.state in ("partial", "stale")
        assert (row.state == "done") == (name == "renamed" and hit == 3)
    assert server.run(OVERWRITE, path=str(run.path), fault="") == 0
    assert (run.status()[0].state, run.status()[0].config) == ("done", {"seed": 2})


def test_nothing_happens_without_the_variable_or_before_the_nth_hit() -> None:
    script = "from dprandp.runs import faults\nfor _ in range(3): faults.point('renamed'); print('passed', flush=True)"
    assert python(script).stdout.count("passed") == 3
    done = python(script, fault="renamed:3")
    assert (done.returncode, done.stdout.count("passed")) == (KILLED, 2)
    done = python(script, fault="pointer-moved:1")
    assert (done.returncode, done.stdout.count("passed"), done.stderr) == (0, 3, "")


def test_a_request_that_would_never_kill_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for request in ("renamed", "renamed:0", "renamed:-1", "renamed:x", "renamed:1:2", ":1", "ledger-fsynk:2"):
        monkeypatch.setenv(faults.VARIABLE, request)
        for call in (lambda: faults.point("renamed"), faults.announce):
            with pytest.raises(UsageError, match="'ledger-fsynced'" if "fsynk" in request else "NAME:N"):
                call()
    with pytest.raises(ValueError, match="'renammed' is not a fault point"):
        faults.point("renammed")
    monkeypatch.setenv(faults.VARIABLE, "ledger-fsynced:2")
    faults.announce()
    assert "will be killed at hit 2 of 'ledger-fsynced'" in capsys.readouterr().err
