"""Atomic writes: the old file or the new one, a clear error, nothing left behind."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from dprandp.errors import StorageError
from dprandp.runs import files
from dprandp.runs.files import atomic_path, atomic_write, remove_leftovers, to_json


def test_writes_bytes_and_text(tmp_path: Path) -> None:
    target = tmp_path / "a.txt"
    atomic_write(target, "ε = 1")
    assert target.read_text(encoding="utf-8") == "ε = 1"
    atomic_write(target, b"\x00\xff")
    assert target.read_bytes() == b"\x00\xff"
    assert os.listdir(tmp_path) == ["a.txt"]
    umask = os.umask(0)
    os.umask(umask)
    assert target.stat().st_mode & 0o777 == 0o666 & ~umask  # not the 0600 of mkstemp: others may read public files


def test_a_reader_never_sees_a_part(tmp_path: Path) -> None:
    """While the block writes, the old content stays under the name."""
    target = tmp_path / "shard.npy"
    np.save(target, np.zeros(3))
    with atomic_path(target) as temporary:
        np.save(temporary, np.ones(3))  # appends .npy to a name without it; the temporary name keeps the suffix
        assert np.load(target).sum() == 0
    assert np.load(target).sum() == 3
    assert os.listdir(tmp_path) == ["shard.npy"]


def test_an_exception_in_the_block_leaves_the_old_file(tmp_path: Path) -> None:
    target = tmp_path / "a"
    target.write_text("old")

    def interrupted() -> None:
        with atomic_path(target) as temporary:
            temporary.write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert target.read_text() == "old"
    assert os.listdir(tmp_path) == ["a"]


REFUSALS = {
    errno.ENOSPC: "disk is full", errno.EDQUOT: "quota", errno.EROFS: "read-only", errno.EACCES: "permission denied",
    errno.EIO: "Input/output error",
}  # fmt: skip


@pytest.mark.parametrize("call", ["fsync", "replace", "open"])
def test_every_refusal_of_the_disk_is_a_storage_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    target = tmp_path / "a"
    target.write_text("old")
    for number, words in REFUSALS.items():

        def refuse(*args: object, number: int = number, **kwargs: object) -> None:
            raise OSError(number, os.strerror(number))

        with monkeypatch.context() as patched:
            patched.setattr(files.os, call, refuse)
            with pytest.raises(StorageError) as caught:
                atomic_write(target, "new")
        assert words in caught.value.problem
        assert str(target) in caught.value.problem
        assert caught.value.fix
        assert target.read_text() == "old"
        assert os.listdir(tmp_path) == ["a"]


def test_a_real_refusal_half_way_through_the_bytes(tmp_path: Path) -> None:
    """The kernel's own file size limit, in a process of its own: no monkeypatch between the code and the error."""
    script = """
import resource, sys
from dprandp.errors import StorageError
from dprandp.runs.files import atomic_write
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
try:
    atomic_write(sys.argv[1], b"x" * 100_000)
except StorageError as error:
    print(error.problem)
    sys.exit(error.exit_code)
"""
    target = tmp_path / "a"
    target.write_text("old")
    done = subprocess.run([sys.executable, "-c", script, str(target)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 6, done.stderr
    assert "larger than the limit" in done.stdout
    assert target.read_text() == "old"
    assert os.listdir(tmp_path) == ["a"]


def test_remove_leftovers_takes_temporary_files_alone(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    keep = [tmp_path / ".lock", tmp_path / "a.partial", tmp_path / ".b.partial.txt", tmp_path / "sub" / "shard.npy"]
    gone = [tmp_path / ".run.0123abcd.partial.json", tmp_path / "sub" / ".LATEST.89abcdef.partial"]
    for path in keep + gone:
        path.touch()
    assert remove_leftovers(tmp_path) == sorted(gone)
    assert all(path.exists() for path in keep)
    assert not any(path.exists() for path in gone)


def test_temporary_names_are_recognised(tmp_path: Path) -> None:
    """The pattern of ``remove_leftovers`` fits the names that ``atomic_path`` makes: with a suffix, without, dotted."""
    for name in ("run.json", "LATEST", "step-1.5.safetensors", ".hidden"):
        with atomic_path(tmp_path / name) as temporary:
            temporary.touch()
            assert remove_leftovers(tmp_path) == [temporary]
            temporary.touch()


def test_json_is_strict() -> None:
    text = to_json({"epsilon": float("inf"), "low": [float("-inf")], "loss": float("nan"), "name": "ε", "pair": (1, 2)})

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    expected = {"epsilon": "inf", "low": ["-inf"], "loss": None, "name": "ε", "pair": [1, 2]}
    assert json.loads(text, parse_constant=refuse) == expected
