"""Phase I's images on disk: the same bytes however they came about, and no shard believed that is not whole."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from stage_processes import Stages

from dprandp import generate
from dprandp.config.schema import GenerateConfig
from dprandp.errors import CheckpointError
from dprandp.generate import load_images, open_images, read_manifest
from dprandp.runs.console import Console
from dprandp.runs.context import Context
from dprandp.runs.directory import RunDir
from dprandp.runs.files import file_sha256
from dprandp.synth import render_block
from dprandp.vision.images import contact_sheet

LEAVES = {"process": "dead-leaves", "count": 320, "resolution": 8, "seed": 4}  # blocks of 100, 100, 100 and 20
KILLED = -signal.SIGKILL


def shards(run: Path) -> dict[str, bytes]:
    """Every lasting file of the stage but its configuration."""
    folder = run / "1-generate"
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.name != "config.toml"}


@pytest.fixture(scope="module")
def stages() -> Stages:
    return Stages()


@pytest.fixture(scope="module")
def whole(stages, tmp_path_factory):
    """One run in one go with one worker: (run folder, files, result)."""
    run = tmp_path_factory.mktemp("whole")
    result = stages.must("generate", run, LEAVES)
    return run, shards(run), result


# ------------------------------------------------------------------------------------------------------ what is written


def test_the_files_the_result_and_the_manifest(whole):
    run, files, result = whole
    assert sorted(files) == ["manifest.json", "preview.png", *(f"shard-0000{n}.npy" for n in range(4))]
    assert (result["process"], result["count"], result["resolution"]) == ("dead-leaves", 320, 8)
    assert (run / "1-generate" / "config.toml").is_file()
    manifest = read_manifest(run / "1-generate")
    assert {key: getattr(manifest, key) for key in LEAVES} == LEAVES
    assert [shard.count for shard in manifest.shards] == [100, 100, 100, 20]
    for shard in manifest.shards:
        assert hashlib.sha256(files[shard.file]).hexdigest() == shard.sha256
    recorded = json.loads((run / "run.json").read_text())
    assert hashlib.sha256(files["manifest.json"]).hexdigest() in json.dumps(recorded)


def test_the_shards_are_the_processs_blocks(whole):
    run, _, _ = whole
    blocks = [render_block("dead-leaves", 4, block, count, 8) for block, count in enumerate((100, 100, 100, 20))]
    images = load_images(run / "1-generate")
    assert images.dtype == np.uint8
    assert np.array_equal(images, np.concatenate(blocks))
    assert len(np.unique(images.reshape(320, -1), axis=0)) > 300  # images, not one image


def test_the_preview_shows_images_of_every_shard(whole):
    run, _, _ = whole
    with Image.open(run / "1-generate" / "preview.png") as picture:
        sheet = np.asarray(picture)
    tiles = [sheet[row : row + 8, column : column + 8] for row in range(0, 53, 9) for column in range(0, 143, 9)]
    assert len(tiles) == 96
    images = load_images(run / "1-generate")
    place = {image.tobytes(): index for index, image in reversed(list(enumerate(images)))}
    shown = {place[tile.tobytes()] for tile in tiles}
    assert [sum(start <= index < start + 100 for index in shown) for start in (0, 100, 200, 300)] == [26, 25, 25, 20]
    assert np.array_equal(sheet, contact_sheet(load_images(run / "1-generate", 96), 16))


# ---------------------------------------------------------------------------------------- the same bytes, however made


@pytest.mark.slow
def test_the_public_stages_load_neither_privacy_nor_data_sets():
    """tests/test_structure.py reads it in the source; here are the modules that importing them did load."""
    script = "import sys, dprandp.generate, dprandp.pretrain; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout.split()
    assert "dprandp.generate" in loaded
    assert "dprandp.pretrain" in loaded
    assert [name for name in loaded if name.startswith(("dprandp.privacy", "dprandp.data"))] == []


@pytest.mark.slow
def test_any_number_of_workers_writes_the_same_bytes_and_another_seed_others(stages, whole, tmp_path):
    stages.must("generate", tmp_path / "two", LEAVES, workers=2)
    assert shards(tmp_path / "two") == whole[1]
    stages.must("generate", tmp_path / "other", {**LEAVES, "seed": 5})
    assert all(data != whole[1][name] for name, data in shards(tmp_path / "other").items())


@pytest.mark.parametrize("fault", ["shard-written:1", "temp-written:5"])
def test_killed_and_resumed_is_uninterrupted_byte_for_byte(stages, whole, tmp_path, fault):
    assert stages.run("generate", tmp_path, LEAVES, fault=fault).code == KILLED
    before = {name: (tmp_path / "1-generate" / name).stat().st_mtime_ns for name in shards(tmp_path) if "shard" in name}
    kept = [name for name in before if not name.startswith(".")]
    assert 1 <= len(kept) < 4
    stages.must("generate", tmp_path, LEAVES)
    assert shards(tmp_path) == whole[1]
    for name in kept:  # only the missing ones were made
        assert (tmp_path / "1-generate" / name).stat().st_mtime_ns == before[name]


def test_a_finished_stage_is_skipped(stages, whole):
    run, files, result = whole
    before = {path: path.stat().st_mtime_ns for path in (run / "1-generate").iterdir()}
    assert stages.must("generate", run, LEAVES) == result
    assert {path: path.stat().st_mtime_ns for path in (run / "1-generate").iterdir()} == before
    assert shards(run) == files


def test_a_torn_shard_is_made_again(stages, whole, tmp_path):
    """A file with a shard's name that is no shard of the right shape (from a disk's repair, say) is not believed."""
    assert stages.run("generate", tmp_path, LEAVES, fault="shard-written:3").code == KILLED
    folder = tmp_path / "1-generate"
    torn = folder / "shard-00000.npy"
    torn.write_bytes(torn.read_bytes()[:-100])
    (folder / "shard-00001.npy").write_bytes(b"")
    np.save(folder / "shard-00002.npy", np.zeros((3, 8, 8, 3), np.uint8))
    stages.must("generate", tmp_path, LEAVES)
    assert shards(tmp_path) == whole[1]


def test_resume_keeps_the_recorded_process_and_its_blocks(stages, whole, tmp_path):
    """stylegan-oriented has blocks of 400 images, dead-leaves of 100."""
    assert stages.run("generate", tmp_path, LEAVES, fault="shard-written:2").code == KILLED
    other = {**LEAVES, "process": "stylegan-oriented"}
    refused = stages.run("generate", tmp_path, other)
    assert refused.code == 2
    assert "dead-leaves" in refused.result["problem"]
    stages.must("generate", tmp_path, other, resume=True)
    assert shards(tmp_path) == whole[1]


SLOW = """
import sys, torch
from pathlib import Path
from dprandp.config.schema import GenerateConfig
from dprandp.runs.console import Console
from dprandp.runs.directory import RunDir
from dprandp import generate
from dprandp.runs.context import Context

if __name__ == "__main__":
    rundir = RunDir.open(Path(sys.argv[1]), create=True)
    with rundir.lock():
        context = Context(rundir, Console(quiet=True), torch.device("cpu"), Path(), workers=2)
        generate.run(GenerateConfig(process="dead-leaves", count=20_000, resolution=16), context)
"""


def group_of(leader: int) -> list[int]:
    """Processes of a process group that still run."""
    members = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, group = path.read_text().rpartition(")")[2].split()[:3]
        except OSError:
            continue  # it has just ended
        if int(group) == leader and state != "Z":
            members.append(int(path.parent.name))
    return members


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_no_worker_outlives_its_parent_and_ctrl_c_is_the_parents_to_obey(tmp_path, how):
    """Ctrl-C in a terminal reaches all processes of the group; kill -9 reaches the parent alone."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", SLOW, str(tmp_path)]
    process = subprocess.Popen(command, start_new_session=True, env=environment, stderr=subprocess.PIPE, text=True)
    try:
        deadline = time.monotonic() + 90
        while not list(tmp_path.glob("1-generate/shard-*")):
            assert time.monotonic() < deadline
            assert process.poll() is None
            time.sleep(0.05)
        assert len(group_of(process.pid)) >= 3  # the parent, a worker and the tracker of what they share
        if how == signal.SIGINT:
            os.killpg(process.pid, how)
            message = process.communicate(timeout=60)[1]
            assert "stopped by SIGINT; the state was saved" in message
            assert "BrokenProcessPool" not in message
        else:
            process.kill()
            process.wait()
        while group_of(process.pid):
            assert time.monotonic() < deadline + 30, "workers stay behind"
            time.sleep(0.05)
    finally:
        if group_of(process.pid):
            os.killpg(process.pid, signal.SIGKILL)
        process.stderr.close()
        process.wait()


def is_worker(pid: int) -> bool:
    try:
        return b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes()
    except (FileNotFoundError, ProcessLookupError):  # it has ended since it was listed
        return False


@pytest.mark.slow
def test_a_worker_that_dies_is_an_error_with_a_way_out(tmp_path):
    command = [sys.executable, "-c", SLOW, str(tmp_path)]
    process = subprocess.Popen(command, start_new_session=True, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 90
    while not (workers := [pid for pid in group_of(process.pid) if is_worker(pid)]):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    os.kill(workers[0], signal.SIGKILL)
    message = process.communicate(timeout=90)[1]
    assert process.returncode == 1  # no command line, which would make it 6
    assert "StorageError: a worker process died" in message


# ----------------------------------------------------------------------------------------------------------- progress


@pytest.mark.slow
def test_the_bar_moves_with_every_chunk_also_of_workers_and_ends_at_the_total(tmp_path, monkeypatch):
    """A block of 400 images takes seconds, and so does the start of a worker."""
    heard = []

    class Bar:
        def advance(self, count=1, note=""):
            heard.append(count)

    monkeypatch.setattr(Console, "progress", lambda *arguments: contextlib.nullcontext(Bar()))
    for workers, process, count in ((1, "perlin", 450), (2, "dead-leaves", 230), (1, "kml:perlin", 41)):
        run = RunDir.open(tmp_path / process.replace(":", "-"), create=True)
        with run.lock():
            context = Context(run, Console(quiet=True), torch.device("cpu"), Path(), workers=workers)
            generate.run(GenerateConfig(process=process, count=count, resolution=8), context)
        assert sum(heard) == count
        assert len(heard) > 5 * len(list(run.path.glob("1-generate/shard-*")))
        heard.clear()


# ------------------------------------------------------------------------------------------------------- reading shards


@pytest.fixture
def copied(whole, tmp_path):
    for name, data in whole[1].items():
        (tmp_path / name).write_bytes(data)
    return tmp_path


@pytest.mark.parametrize("damage", ["flip", "truncate", "missing", "other shard"])
def test_a_damaged_shard_is_named(copied, damage):
    load_images(copied)
    path = copied / "shard-00001.npy"
    data = path.read_bytes()
    if damage == "missing":
        path.unlink()
    else:
        flipped = data[:-1] + bytes([data[-1] ^ 1])
        other = (copied / "shard-00002.npy").read_bytes()
        path.write_bytes({"flip": flipped, "truncate": data[:-1], "other shard": other}[damage])
    with pytest.raises(CheckpointError, match=r"shard-00001\.npy") as caught:
        load_images(copied, 3)  # though the first three images lie in other shards
    assert "dprandp generate --overwrite" in caught.value.fix


def test_a_shard_that_is_a_pickle_is_not_opened(copied):
    """Even when the manifest vouches for it."""
    path = copied / "shard-00001.npy"
    np.save(path, np.array([{"a": 1}], dtype=object), allow_pickle=True)
    manifest = json.loads((copied / "manifest.json").read_text())
    manifest["shards"][1]["sha256"] = file_sha256(path)
    (copied / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match=r"shard-00001\.npy does not hold the images"):
        load_images(copied)
    np.load(path, allow_pickle=True)  # positive control: it is one


def test_a_damaged_manifest_is_named(copied):
    path = copied / "manifest.json"
    elsewhere = b'{"shards": [{"file": "../x.npy", "sha256": "0"}]}'
    for content in (b"", b"[1, 2]", b"{}", b"\xff\xfe", b'{"shards": [1]}', b'{"shards": []}', elsewhere, None):
        path.unlink() if content is None else path.write_bytes(content)
        with pytest.raises(CheckpointError, match=r"manifest\.json") as caught:
            load_images(copied)
        assert "dprandp generate --overwrite" in caught.value.fix


@pytest.mark.parametrize("from_end", [False, True])
@pytest.mark.parametrize("limit", [1, 3, 79, 81, 319, 1000])
def test_a_limit_takes_evenly_from_all_shards(copied, limit, from_end):
    blocks = [np.load(copied / f"shard-0000{n}.npy") for n in range(4)]
    quotas = [0, 0, 0, 0]
    while sum(quotas) < min(limit, 320):  # deal them out one by one
        for shard in range(4):
            if quotas[shard] < len(blocks[shard]) and sum(quotas) < limit:
                quotas[shard] += 1
    parts = [block[len(block) - n :] if from_end else block[:n] for block, n in zip(blocks, quotas, strict=True)]
    assert np.array_equal(np.concatenate(open_images(copied, limit, from_end=from_end)), np.concatenate(parts))
