"""One tiny data set, one tiny run, and copies of it to damage."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from cli_process import Dprandp, RunAfter, arrays

SETTINGS = """
[generate]
process = "dead-leaves"
count = 120
resolution = 32

[pretrain]
filters = 32
layers = 1
dictionary_patches = 3000
dictionary_iterations = 2

[probe]
dims = 32
statistics_images = 100
statistics_views = 2
steps = 5

[finetune]
steps = 3
refit_steps = 6
"""


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The working directory: small.toml and tiny.npz."""
    path = tmp_path_factory.mktemp("work")
    (path / "small.toml").write_text(SETTINGS)
    np.savez(path / "tiny.npz", **arrays())
    return path


@pytest.fixture(scope="session")
def dprandp(tmp_path_factory: pytest.TempPathFactory, folder: Path) -> Dprandp:
    return Dprandp(tmp_path_factory.mktemp("output"), folder)


@pytest.fixture(scope="session")
def stages(tmp_path_factory: pytest.TempPathFactory, dprandp: Dprandp) -> dict[str, Path]:
    """A run after each stage, by the stage's name; with the JSON that the stage printed beside it."""
    base = tmp_path_factory.mktemp("runs")
    run = base / "run"
    commands = {
        "generate": ["--workers", 1],
        "pretrain": [],
        "probe": ["--data", "npz:tiny.npz", "--eps", 2],
        "finetune": [],
    }
    made = {}
    for stage, flags in commands.items():
        done = dprandp(stage, "--run", run, "--config", "small.toml", "--json", *flags)
        assert done.code == 0, done.err
        made[stage] = base / stage
        shutil.copytree(run, made[stage])
        (base / f"{stage}.json").write_text(done.out)
    return made


@pytest.fixture
def run_after(stages: dict[str, Path], tmp_path: Path) -> RunAfter:
    """A copy of the run as it was after a stage."""

    def copy(stage: str) -> Path:
        return Path(shutil.copytree(stages[stage], tmp_path / f"after-{stage}", dirs_exist_ok=True))

    return copy


@pytest.fixture(scope="session")
def vit_made(tmp_path_factory: pytest.TempPathFactory, dprandp: Dprandp, stages: dict[str, Path]) -> Path:
    run = Path(shutil.copytree(stages["generate"], tmp_path_factory.mktemp("vit") / "run"))
    made = dprandp("pretrain", "--run", run, "--arch", "vit-1-16-16", "--random-init")
    assert made.code == 0, made.err
    return run


@pytest.fixture
def vit(vit_made: Path, tmp_path: Path) -> Path:
    """A copy of a run with a small ViT of random weights."""
    return Path(shutil.copytree(vit_made, tmp_path / "vit"))
