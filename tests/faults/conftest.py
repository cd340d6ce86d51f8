"""The crash tests use the tiny run of tests/stages and the processes of tests/cli."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

for folder in ("cli", "stages"):
    path = str(Path(__file__).parents[1] / folder)
    if path not in sys.path:
        sys.path.append(path)

from cli_process import Dprandp  # noqa: E402
from tiny_run import make_public, run_probe, write_blobs  # noqa: E402
from victims import Victim, Work, settings  # noqa: E402


@pytest.fixture(scope="session")
def work(tmp_path_factory: pytest.TempPathFactory) -> Work:
    folder = tmp_path_factory.mktemp("crashes")
    data = write_blobs(folder / "blobs.npz")
    (folder / "full.toml").write_text(settings(False))
    (folder / "poisson.toml").write_text(settings(True))
    make_public(folder / "public")
    shutil.copytree(folder / "public", folder / "probed")
    run_probe(folder / "probed", data)
    return Work(folder, {"probe": folder / "public", "finetune": folder / "probed"}, data)


@pytest.fixture(scope="session")
def dprandp(tmp_path_factory: pytest.TempPathFactory, work: Work) -> Dprandp:
    return Dprandp(tmp_path_factory.mktemp("output"), work.folder)


@pytest.fixture
def victim(dprandp: Dprandp, work: Work, tmp_path: Path) -> Callable[..., Victim]:
    def make(stage: str, settings: str = "full.toml") -> Victim:
        base = tmp_path / f"{len(list(tmp_path.iterdir()))}"
        base.mkdir()
        return Victim(dprandp, work, base, stage, settings)

    return make
