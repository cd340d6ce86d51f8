"""Public stages and a data set, made once; each test works on its own copy."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tiny_run import Recorder, make_public, run_finetune, run_probe, write_blobs

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Name of the private data set."""
    return write_blobs(tmp_path_factory.mktemp("blobs") / "blobs.npz")


@pytest.fixture(scope="session")
def public_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with images and a patchnet."""
    path = tmp_path_factory.mktemp("public") / "run"
    make_public(path)
    return path


def _with_random_weights(arch: str) -> Callable[..., Path]:
    @pytest.fixture(scope="session")
    def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
        """A run with the same images and a small network with random weights."""
        path = tmp_path_factory.mktemp(arch) / "run"
        make_public(path, arch=arch, random_init=True)
        return path

    return made


wide_run, vit_run = _with_random_weights("wrn-10-1"), _with_random_weights("vit-1-16-16")


@pytest.fixture(scope="session")
def probed_run(tmp_path_factory: pytest.TempPathFactory, public_run: Path, data: str) -> Path:
    """The first run after its probe."""
    path = Path(shutil.copytree(public_run, tmp_path_factory.mktemp("probed") / "run"))
    run_probe(path, data)
    return path


@pytest.fixture(scope="session")
def tuned_run(tmp_path_factory: pytest.TempPathFactory, probed_run: Path, data: str) -> Path:
    """The same run after its fine-tune."""
    path = Path(shutil.copytree(probed_run, tmp_path_factory.mktemp("tuned") / "run"))
    run_finetune(path, data)
    return path


@pytest.fixture
def copy(tmp_path: Path) -> Callable[..., Path]:
    """Copy a run to work on."""
    count = 0

    def copied(run: Path) -> Path:
        nonlocal count
        count += 1
        return Path(shutil.copytree(run, tmp_path / f"run-{count}"))

    return copied


@pytest.fixture
def record(monkeypatch: pytest.MonkeyPatch) -> Callable[[Path], Recorder]:
    """Record everything private that happens in a run from now on."""
    return lambda run: Recorder(run).install(monkeypatch)
