"""One finished run, made once; the runs to damage are copies of it."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

for folder in ("cli", "stages"):
    path = str(Path(__file__).parents[1] / folder)
    if path not in sys.path:
        sys.path.append(path)

from tiny_run import TRAIN, make_public, run_finetune, run_probe, write_blobs  # noqa: E402

torch.set_num_threads(1)

FULL = {"batch_size": TRAIN}
"""Full batches are accounted in closed form, at once."""


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Name of the private data set."""
    return write_blobs(tmp_path_factory.mktemp("blobs") / "blobs.npz")


@pytest.fixture(scope="session")
def probed(tmp_path_factory: pytest.TempPathFactory, data: str) -> Path:
    """A run after its probe."""
    path = tmp_path_factory.mktemp("probed") / "run"
    make_public(path)
    run_probe(path, data, **FULL)
    return path


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory, probed: Path, data: str) -> Path:
    """A run after all stages. Not to be changed."""
    path = Path(shutil.copytree(probed, tmp_path_factory.mktemp("finished") / "run"))
    run_finetune(path, data, **FULL)
    return path


@pytest.fixture
def copy_of(tmp_path: Path) -> Iterator[Callable[[Path], Path]]:
    """``copy(run)`` gives a fresh copy at the same place; the one before is gone."""

    def copied(run: Path) -> Path:
        target = tmp_path / "run"
        if target.exists():
            shutil.rmtree(target)
        return Path(shutil.copytree(run, target))

    yield copied
    shutil.rmtree(tmp_path / "run", ignore_errors=True)
